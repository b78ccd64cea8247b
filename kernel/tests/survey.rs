//! Surveys of trees that the strict reader refuses, and of bytes that are hardly trees.
//!
//! What surveys of good trees say is compared with a second reader in `tests/tests/describe.rs`.

mod fdt;

use fdt::{NOP, Node, QEMU, QEMU_10, cells, parse, places, set_word, write};
use kernel::machine::survey::{Missing, Survey};
use kernel::machine::{Error, Machine, StructureFault};

const HOST: &str = "/pcie@10000000";
const SMMU: &str = "/smmuv3@9050000";

fn changed(change: impl FnOnce(&mut Node)) -> Vec<u8> {
    let mut tree = parse(QEMU_10);
    change(&mut tree);
    write(&tree, &[])
}

fn survey(change: impl FnOnce(&mut Node)) -> Survey {
    Survey::from_fdt(&changed(change)).unwrap()
}

/// The nodes named in faults, each once where its faults follow each other.
fn faults(survey: &Survey) -> Vec<&str> {
    let nodes = survey.missing.iter().filter_map(|missing| match missing {
        Missing::Fault(Error::Property { node, .. }) => Some(node.as_str()),
        _ => None,
    });
    let mut nodes: Vec<&str> = nodes.collect();
    nodes.dedup();
    nodes
}

#[test]
fn what_the_strict_reader_finds_the_survey_finds_too() {
    for dtb in QEMU {
        let (machine, survey) = (Machine::from_fdt(dtb).unwrap(), Survey::from_fdt(dtb).unwrap());
        assert_eq!((&survey.model, &survey.compatible), (&machine.model, &machine.compatible));
        assert_eq!((&survey.memory, &survey.reserved), (&machine.memory, &machine.reserved));
        assert_eq!(survey.smmus.len(), machine.smmus.len());
        for (surveyed, smmu) in survey.smmus.iter().zip(&machine.smmus) {
            assert_eq!((&surveyed.path, surveyed.registers), (&smmu.path, Some(smmu.registers)));
            let wired =
                [smmu.interrupts.eventq, smmu.interrupts.priq, smmu.interrupts.cmdq_sync, smmu.interrupts.gerror];
            assert_eq!(surveyed.interrupts, ["eventq", "priq", "cmdq-sync", "gerror"]);
            assert_eq!(surveyed.wired.iter().copied().map(Some).collect::<Vec<_>>(), wired);
        }
        assert_eq!(survey.pci.len(), machine.pcie.len());
        for (surveyed, host) in survey.pci.iter().zip(&machine.pcie) {
            assert_eq!((&surveyed.path, surveyed.ecam, surveyed.buses), (&host.path, Some(host.ecam), host.buses));
            for rid in [0, 1, 8, 0x100, 0xffff] {
                let row = surveyed.iommu_map.iter().find(|row| (row.rid..row.rid + row.count).contains(&rid));
                let stream = host.stream_of(rid as u16).map(|(_, stream)| stream.get());
                assert_eq!(row.map(|row| row.output + (rid - row.rid)), stream, "requester {rid:#x}");
            }
        }
        assert!(faults(&survey).is_empty(), "{:?}", survey.missing);
    }
}

#[test]
fn one_bad_node_hides_nothing_but_itself() {
    // Each of these makes the strict reader refuse the tree.
    for (path, property, value) in [
        (SMMU, "reg", vec![1]),
        (SMMU, "interrupts", vec![9, 9, 9]),
        (HOST, "iommu-map", vec![0, 0x7777, 0, 0x1_0000]),
        (HOST, "iommu-map", vec![0, 1]),
        (HOST, "msi-map", vec![0, 0x7777, 0, 0x1_0000]),
        (HOST, "bus-range", vec![9, 3]),
        (HOST, "dma-ranges", vec![1, 2, 3]),
        ("/pl011@9000000", "reg", vec![7]),
    ] {
        let change = |tree: &mut Node| {
            tree.at(path).set(property, cells(&value));
        };
        assert!(Machine::from_fdt(&changed(change)).is_err(), "{path} {property}");
        let survey = survey(change);
        assert_eq!(faults(&survey), [path], "{property}: {:?}", survey.missing);
        assert_eq!((survey.smmus.len(), survey.pci.len(), survey.memory.len()), (1, 1, 1), "{path} {property}");
    }
}

#[test]
fn memory_that_firmware_fills_in_is_missing_and_not_a_fault() {
    let none = survey(|tree| tree.remove("/memory@40000000"));
    assert!(none.memory.is_empty() && none.missing.contains(&Missing::Memory), "{:?}", none.missing);
    let empty = survey(|tree| {
        tree.at("/memory@40000000").set("reg", cells(&[0, 0, 0, 0]));
    });
    assert!(empty.memory.is_empty() && empty.missing.contains(&Missing::MemorySize), "{:?}", empty.missing);
}

#[test]
fn two_nodes_of_one_name_or_phandle_are_both_seen() {
    let bytes = changed(|tree| {
        let copy = tree.at(SMMU).clone();
        tree.children.push(copy);
    });
    let refused = Machine::from_fdt(&bytes);
    assert!(matches!(refused, Err(Error::Structure { fault: StructureFault::SameNode, .. })), "{refused:?}");
    let survey = Survey::from_fdt(&bytes).unwrap();
    assert_eq!(survey.smmus.iter().map(|smmu| smmu.path.as_str()).collect::<Vec<_>>(), [SMMU, SMMU]);
    assert_eq!(survey.pci[0].iommu_map[0].target, SMMU);
}

#[test]
fn an_old_phandle_is_known_and_a_status_that_is_no_text_disables() {
    let survey = survey(|tree| {
        let phandle = tree.at(SMMU).properties.iter().find(|(name, _)| name == "phandle").unwrap().1.clone();
        tree.at(SMMU).unset("phandle").set("linux,phandle", phandle);
        tree.at("/pl011@9000000").set("status", vec![0xff, 0xfe]);
    });
    assert_eq!(survey.pci[0].iommu_map[0].target, SMMU);
    let disabled = self::survey(|tree| {
        tree.at(SMMU).set("status", Vec::new());
    });
    assert_eq!((disabled.smmus.len(), disabled.disabled_smmus.as_slice()), (0, [SMMU.to_string()].as_slice()));
    assert!(disabled.pci[0].iommu_map.is_empty());
}

#[test]
fn a_property_that_became_nops_is_not_there() {
    let places = places(QEMU_10);
    let mut found = places.properties.iter().filter(|(path, name, _)| path == HOST && name == "iommu-map");
    let range = found.next().unwrap().2.clone();
    let mut bytes = QEMU_10.to_vec();
    for at in range.step_by(4) {
        set_word(&mut bytes, at, NOP);
    }
    let survey = Survey::from_fdt(&bytes).unwrap();
    assert_eq!((survey.pci.len(), survey.pci[0].iommu_map.len(), survey.pci[0].msi_map.len()), (1, 0, 1));
}

#[test]
fn windows_multiplied_by_windows_end_in_a_fault_and_not_in_a_hang() {
    // 16 KiB of entries on each of many buses, each entry the whole space: more pairs than anybody has time for.
    let survey = survey(|tree| {
        let many: Vec<u32> = (0..1000).flat_map(|_| [0, 0, 0x1000_0000]).collect();
        let mut path = String::new();
        for level in 0..20 {
            path += &format!("/bus@{level}");
            let bus = tree.at(&path);
            bus.set("#address-cells", cells(&[1])).set("#size-cells", cells(&[1])).set("dma-ranges", cells(&many));
        }
        tree.at("/bus@0").set("#address-cells", cells(&[1]));
        let smmu = tree.at(SMMU).properties.iter().find(|(name, _)| name == "phandle").unwrap().1.clone();
        tree.at(&path).at("device@0").set("iommus", [smmu, cells(&[1])].concat());
    });
    assert_eq!(survey.masters.len(), 1);
    assert!(!faults(&survey).is_empty());
}

#[test]
fn no_change_of_one_word_makes_it_panic() {
    // Every word of the structure, set to what may be most surprising there.
    let words = [0, 1, 2, 3, 4, 9, 0x7fff_ffff, 0x8000_0000, 0xffff_fffc, 0xffff_ffff];
    for dtb in [QEMU_10, fdt::QEMU_10_GIC_V2] {
        let mut bytes = dtb.to_vec();
        for at in (0..dtb.len() & !3).step_by(4) {
            let before = fdt::word(dtb, at);
            for word in words {
                set_word(&mut bytes, at, word);
                let _ = Survey::from_fdt(&bytes);
            }
            set_word(&mut bytes, at, before);
        }
    }
}
