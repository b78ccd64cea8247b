//! QEMU's device trees, damaged in many ways that are the same every time: reading them ends, without a panic, and what it
//! accepts a second parser (`dtoolkit`) reads the same way.

mod fdt;
mod random;

use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::{Node as _, Property as _};
use fdt::{NOP, Places, QEMU, places, set_word, word};
use kernel::machine::{Error, Gic, Machine};
use random::Random;
use std::collections::BTreeMap;

/// The ways a tree is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    FlipBit,
    ReplaceWord,
    CopyWord,
    Truncate,
    NopProperty,
    NopNode,
    SwapBlocks,
    HeaderLie,
    PropertyLength,
}

const DAMAGES: [Damage; 9] = [
    Damage::FlipBit,
    Damage::ReplaceWord,
    Damage::CopyWord,
    Damage::Truncate,
    Damage::NopProperty,
    Damage::NopNode,
    Damage::SwapBlocks,
    Damage::HeaderLie,
    Damage::PropertyLength,
];

/// Words that are more likely to hurt than others.
const NASTY: [u32; 16] = [
    0,
    1,
    2,
    3,
    4,
    9,
    0x8003,
    0x8004,
    0x8005,
    0xff,
    0x1000,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX - 3,
    u32::MAX,
];

fn damage(dtb: &mut Vec<u8>, places: &Places, kind: Damage, random: &mut Random) {
    let words = dtb.len() / 4;
    match kind {
        Damage::FlipBit => {
            let at = random.below(dtb.len());
            dtb[at] ^= 1 << random.below(8);
        }
        Damage::ReplaceWord => {
            let value = NASTY[random.below(NASTY.len())];
            set_word(dtb, random.below(words) * 4, value);
        }
        Damage::CopyWord => {
            let value = word(dtb, random.below(words) * 4);
            set_word(dtb, random.below(words) * 4, value);
        }
        Damage::Truncate => dtb.truncate(random.below(dtb.len())),
        Damage::NopProperty => {
            let (.., range) = &places.properties[random.below(places.properties.len())];
            range.clone().step_by(4).for_each(|at| set_word(dtb, at, NOP));
        }
        Damage::NopNode => {
            let (_, range) = &places.nodes[random.below(places.nodes.len())];
            range.clone().step_by(4).for_each(|at| set_word(dtb, at, NOP));
        }
        Damage::SwapBlocks => {
            let size = 4 * (1 + random.below(64));
            let (a, b) = (random.below((dtb.len() - size) / 4) * 4, random.below((dtb.len() - size) / 4) * 4);
            let (first, second) = (dtb[a..a + size].to_vec(), dtb[b..b + size].to_vec());
            dtb[a..a + size].copy_from_slice(&second);
            dtb[b..b + size].copy_from_slice(&first);
        }
        Damage::HeaderLie => {
            let at = 4 * random.below(10);
            let old = word(dtb, at);
            let value = match random.below(4) {
                0 => NASTY[random.below(NASTY.len())],
                1 => old.wrapping_add(random.below(64) as u32).wrapping_sub(32),
                2 => word(dtb, 4 * random.below(10)),
                _ => random.next() as u32,
            };
            set_word(dtb, at, value);
        }
        Damage::PropertyLength => {
            let (.., range) = &places.properties[random.below(places.properties.len())];
            let value = NASTY[random.below(NASTY.len())];
            set_word(dtb, range.start + 4, value);
        }
    }
}

/// What both parsers are asked.
#[derive(Debug, Default, PartialEq, Eq)]
struct Facts {
    model: Option<String>,
    memory: Vec<(u64, u64)>,
    cpus: Vec<u64>,
    smmus: Vec<(u64, u64)>,
    ecams: Vec<(u64, u64)>,
    distributors: Vec<(u64, u64)>,
    bootargs: Option<String>,
    reservations: Vec<(u64, u64)>,
}

fn ours(machine: &Machine) -> Facts {
    let pair = |range: &iommu::PhysRange| (range.start().get(), range.len());
    Facts {
        model: Some(machine.model.clone()),
        memory: machine.memory.iter().map(pair).collect(),
        cpus: machine.cpus.iter().map(|cpu| cpu.mpidr).collect(),
        smmus: machine.smmus.iter().map(|smmu| pair(&smmu.registers)).collect(),
        ecams: machine.pcie.iter().map(|host| pair(&host.ecam)).collect(),
        distributors: machine
            .gic
            .iter()
            .map(|gic| match gic {
                Gic::V3(gic) => pair(&gic.distributor),
                Gic::V2(gic) => pair(&gic.distributor),
            })
            .collect(),
        bootargs: Some(machine.chosen.bootargs.clone()),
        reservations: machine.memreserve.iter().map(pair).collect(),
    }
}

/// Reads the same facts with the other parser. Below the root only, where addresses need no translation.
fn theirs(dtb: &[u8]) -> Option<Facts> {
    let fdt = Fdt::new(dtb).ok()?;
    let root = fdt.root();
    let text = |node: &FdtNode<'_>, name: &str| -> Option<String> {
        let property = node.property(name)?;
        Some(std::str::from_utf8(property.value()).ok()?.trim_end_matches('\0').to_owned())
    };
    let is = |node: &FdtNode<'_>, names: &[&str]| {
        node.property("compatible").is_some_and(|list| {
            list.value().split(|&byte| byte == 0).any(|own| names.iter().any(|name| name.as_bytes() == own))
        })
    };
    let enabled = |node: &FdtNode<'_>| matches!(text(node, "status").as_deref(), None | Some("okay" | "ok"));
    let registers = |node: &FdtNode<'_>| -> Vec<(u64, u64)> {
        let list = node.reg().ok().flatten().into_iter().flatten();
        list.filter_map(|reg| Some((reg.address::<u64>().ok()?, reg.size::<u64>().ok()?))).collect()
    };
    let mut facts = Facts {
        model: Some(text(&root, "model").unwrap_or_default()),
        bootargs: Some(fdt.find_node("/chosen").and_then(|node| text(&node, "bootargs")).unwrap_or_default()),
        reservations: fdt.memory_reservations().map(|entry| (entry.address(), entry.size())).collect(),
        ..Facts::default()
    };
    for node in root.children() {
        if !enabled(&node) || !enabled(&root) {
            continue;
        }
        let registers = registers(&node);
        if text(&node, "device_type").as_deref() == Some("memory") {
            facts.memory.extend(&registers);
        }
        if is(&node, &["arm,smmu-v3"]) {
            facts.smmus.extend(registers.first());
        }
        if is(&node, &["pci-host-ecam-generic"]) {
            facts.ecams.extend(registers.first());
        }
        if is(&node, &["arm,gic-v3", "arm,cortex-a15-gic", "arm,gic-400", "arm,cortex-a9-gic", "arm,cortex-a7-gic"]) {
            facts.distributors.extend(registers.first());
        }
        if node.name() == "cpus" {
            for cpu in node.children() {
                if text(&cpu, "device_type").as_deref() == Some("cpu") && enabled(&cpu) {
                    let reg = cpu.property("reg").map(|reg| reg.value().to_vec()).unwrap_or_default();
                    facts.cpus.push(reg.iter().fold(0, |number, &byte| number << 8 | u64::from(byte)));
                }
            }
        }
    }
    facts.memory.sort_unstable();
    Some(facts)
}

#[test]
fn damaged_trees_end_in_named_errors_or_in_what_a_second_parser_reads() {
    let mut random = Random(0x51_0fce);
    let mut ends: BTreeMap<(Damage, bool), usize> = BTreeMap::new();
    let (mut compared, mut refused_by_them) = (0, 0);
    for round in 0..30_000 {
        let original = QEMU[round % QEMU.len()];
        let places = places(original);
        let kind = DAMAGES[random.below(DAMAGES.len())];
        let mut dtb = original.to_vec();
        for _ in 0..1 + random.below(3) {
            damage(&mut dtb, &places, kind, &mut random);
            if kind == Damage::Truncate {
                break;
            }
        }
        let result = Machine::from_fdt(&dtb);
        *ends.entry((kind, result.is_ok())).or_default() += 1;
        match result {
            Ok(machine) => match theirs(&dtb) {
                Some(facts) => {
                    assert_eq!(ours(&machine), facts, "round {round}, {kind:?}");
                    compared += 1;
                }
                None => refused_by_them += 1,
            },
            Err(error) => assert!(names_a_place(&error), "round {round}, {kind:?}: {error}"),
        }
    }
    println!("{ends:?}; compared {compared}, accepted by us alone {refused_by_them}");
    assert!(compared > 5_000, "only {compared} compared");
    for kind in DAMAGES {
        assert!(ends.contains_key(&(kind, false)), "{kind:?} never led to an error");
    }
}

/// Says whether an error says where in the tree it is.
fn names_a_place(error: &Error) -> bool {
    match error {
        Error::Structure { node, .. } | Error::Property { node, .. } | Error::Duplicate { node, .. } => {
            node.starts_with('/')
        }
        Error::Header(_) | Error::NoMemory | Error::NoCpu => true,
        _ => false,
    }
}

#[test]
fn every_truncation_is_refused() {
    for dtb in QEMU {
        for length in 0..dtb.len() {
            assert!(Machine::from_fdt(&dtb[..length]).is_err(), "{length} bytes accepted");
        }
    }
}

#[test]
fn bytes_after_the_tree_do_not_matter() {
    for dtb in QEMU {
        let padded = [dtb, &[0xa5; 4096]].concat();
        assert_eq!(Machine::from_fdt(&padded), Machine::from_fdt(dtb));
        assert_eq!(Machine::fdt_size(&padded[..8]), Ok(dtb.len()));
    }
}
