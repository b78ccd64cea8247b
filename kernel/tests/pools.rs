//! Pools of memory for DMA in edited trees of QEMU's: what they are, whose they are, where they go; lies refused by name.

mod fdt;
mod random;

use fdt::{NOP, Node, QEMU_10, cells, parse, places, set_word, word, write};
use iommu::{PhysAddr, PhysRange};
use kernel::machine::*;
use random::Random;

const PCIE: &str = "/pcie@10000000";
const MIB: u64 = 1 << 20;

fn phys(base: u64, size: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(base), size).unwrap()
}

/// A tree with pools, and with nodes of a function, a bridge and a function behind it.
fn tree() -> Node {
    let mut tree = parse(QEMU_10);
    let parent = tree.at("/reserved-memory");
    parent.set("#address-cells", cells(&[2])).set("#size-cells", cells(&[2])).set("ranges", "");
    let restricted = tree.at("/reserved-memory/restricted@60000000");
    restricted.set("compatible", "restricted-dma-pool\0").set("reg", cells(&[0, 0x6000_0000, 0, 0x10_0000]));
    restricted.set("phandle", cells(&[0x9001]));
    let own = tree.at("/reserved-memory/own@61000000");
    own.set("compatible", "shared-dma-pool\0").set("no-map", "").set("reg", cells(&[0, 0x6100_0000, 0, 0x20_0000]));
    own.set("phandle", cells(&[0x9002]));
    let cma = tree.at("/reserved-memory/cma");
    cma.set("compatible", "shared-dma-pool\0").set("reusable", "").set("linux,cma-default", "");
    cma.set("size", cells(&[0, 0x100_0000])).set("alignment", cells(&[0, 0x40_0000]));
    cma.set("alloc-ranges", cells(&[0, 0x4000_0000, 0, 0x2000_0000]));
    tree.at(&format!("{PCIE}/disk@3,1"))
        .set("reg", cells(&[0x1900, 0, 0, 0, 0]))
        .set("memory-region", cells(&[0x9001]));
    let bridge = tree.at(&format!("{PCIE}/bridge@8"));
    bridge.set("#address-cells", cells(&[3])).set("#size-cells", cells(&[2])).set("reg", cells(&[0x4000, 0, 0, 0, 0]));
    bridge.set("memory-region", cells(&[0x9002]));
    let behind = tree.at(&format!("{PCIE}/bridge@8/screen@2"));
    behind.set("reg", cells(&[0x0005_1000, 0, 0, 0, 0])).set("memory-region", cells(&[0x9001, 0x9002]));
    // Something on another bus behind a function: no bus master of PCI's.
    let usb = tree.at(&format!("{PCIE}/usb@4"));
    usb.set("#address-cells", cells(&[1])).set("#size-cells", cells(&[0])).set("reg", cells(&[0x2000, 0, 0, 0, 0]));
    tree.at(&format!("{PCIE}/usb@4/stick@1")).set("reg", cells(&[1])).set("memory-region", cells(&[0x9001]));
    tree
}

fn read(tree: &Node) -> Result<Machine, Error> {
    Machine::from_fdt(&write(tree, &[]))
}

#[test]
fn pools_are_read_with_their_kind() {
    let machine = read(&tree()).unwrap();
    let pools: Vec<_> = machine.pools().map(|pool| (pool.path, pool.kind, pool.range, pool.default)).collect();
    let (restricted, own) = (phys(0x6000_0000, MIB), phys(0x6100_0000, 2 * MIB));
    assert_eq!(
        pools,
        [
            ("/reserved-memory/restricted@60000000", PoolKind::Restricted, Some(restricted), false),
            ("/reserved-memory/own@61000000", PoolKind::CarveOut, Some(own), false),
            ("/reserved-memory/cma", PoolKind::Contiguous, None, true),
        ]
    );
}

/// Red when the first node on the way was taken instead of the nearest.
#[test]
fn a_function_has_the_pools_of_the_nearest_node() {
    let mut tree = tree();
    let pools = |tree: &Node, way: &[(u8, u8)]| {
        let machine = read(tree).unwrap();
        let pools = machine.function_pools(0, way);
        assert!(pools.contiguous.is_some_and(|pool| pool.path == "/reserved-memory/cma"), "the default is everybody's");
        (pools.restricted.is_some(), pools.carve_out.is_some())
    };
    assert_eq!(pools(&tree, &[(3, 1)]), (true, false));
    assert_eq!(pools(&tree, &[(3, 0)]), (false, false));
    assert_eq!(pools(&tree, &[(8, 0)]), (false, true));
    assert_eq!(pools(&tree, &[(8, 0), (1, 0)]), (false, true), "the bridge's");
    // 0x5_1000 is bus 5, device 2: whatever the bus is called now.
    assert_eq!(pools(&tree, &[(8, 0), (2, 0)]), (true, true));
    assert_eq!(pools(&tree, &[(2, 0)]), (false, false));
    assert_eq!(pools(&tree, &[(4, 0)]), (false, false));
    tree.at(PCIE).set("memory-region", cells(&[0x9001]));
    assert_eq!(pools(&tree, &[(3, 0)]), (true, false), "the host's");
    assert_eq!(pools(&tree, &[(8, 0), (1, 0)]), (false, true), "not the host's");
    assert_eq!(read(&tree).unwrap().function_regions(1, &[(3, 1)]), [0; 0]);
    // A pool that is switched off is nobody's.
    tree.at("/reserved-memory/restricted@60000000").set("status", "disabled\0");
    assert_eq!(pools(&tree, &[(3, 1)]), (false, false));
}

#[test]
fn a_default_carve_out_is_for_those_without_their_own() {
    let mut tree = tree();
    let all = tree.at("/reserved-memory/all@62000000");
    all.set("compatible", "shared-dma-pool\0")
        .set("linux,dma-default", "")
        .set("reg", cells(&[0, 0x6200_0000, 0, 0x1000]));
    let machine = read(&tree).unwrap();
    let path = |way| machine.function_pools(0, way).carve_out.map(|pool| pool.path);
    assert_eq!(path(&[(3, 0)]), Some("/reserved-memory/all@62000000"));
    assert_eq!(path(&[(8, 0)]), Some("/reserved-memory/own@61000000"));
    let second = tree.at("/reserved-memory/second@63000000");
    second.set("compatible", "shared-dma-pool\0").set("linux,dma-default", "");
    second.set("reg", cells(&[0, 0x6300_0000, 0, 0x1000]));
    let node = "/reserved-memory/second@63000000".into();
    assert_eq!(read(&tree), Err(Error::Duplicate { node, what: "a default pool" }));
}

#[test]
fn places_left_open_are_chosen_where_nothing_else_is() {
    let mut machine = read(&tree()).unwrap();
    // The highest 4 MiB boundary with 16 MiB below the end of what is allowed, were it not for what is taken.
    let taken = [phys(0x5f80_0000, 0x1000), phys(0x5e00_0000, 1)];
    assert_eq!(machine.place(&taken), Ok(vec![]));
    assert_eq!(machine.pools().nth(2).unwrap().range, Some(phys(0x5e80_0000, 16 * MIB)));
    // Once chosen, it stays.
    assert_eq!(machine.place(&[phys(0x5e80_0000, MIB)]), Ok(vec![]));
    assert_eq!(machine.pools().nth(2).unwrap().range, Some(phys(0x5e80_0000, 16 * MIB)));

    let mut crowded = read(&tree()).unwrap();
    let taken: Vec<_> = (0..64).map(|n| phys(0x4000_0000 + n * 8 * MIB, 4096)).collect();
    assert_eq!(crowded.place(&taken), Ok(vec!["/reserved-memory/cma".to_owned()]));
    assert_eq!(crowded.function_pools(0, &[(3, 0)]).contiguous.unwrap().range, None);

    let mut nowhere = tree();
    nowhere.at("/reserved-memory/cma").set("alloc-ranges", cells(&[0x100, 0, 0, 0x2000_0000]));
    assert_eq!(read(&nowhere).unwrap().place(&[]), Ok(vec!["/reserved-memory/cma".to_owned()]));
    let mut huge = tree();
    huge.at("/reserved-memory/cma").set("size", cells(&[u32::MAX, u32::MAX])).set("alignment", cells(&[1 << 31, 0]));
    assert_eq!(read(&huge).unwrap().place(&[]), Ok(vec!["/reserved-memory/cma".to_owned()]));
}

#[test]
fn two_open_places_do_not_overlap() {
    let mut tree = tree();
    for name in ["a", "b", "c"] {
        let node = tree.at(&format!("/reserved-memory/{name}"));
        node.set("compatible", "restricted-dma-pool\0").set("size", cells(&[0, 0x30_1234]));
    }
    let mut machine = read(&tree).unwrap();
    assert_eq!(machine.place(&[]), Ok(vec![]));
    let ranges: Vec<_> = machine.reserved.iter().flat_map(|region| region.ranges.clone()).collect();
    assert_eq!(ranges.len(), 6);
    for (i, a) in ranges.iter().enumerate() {
        assert!(a.is_aligned(4096) && machine.memory.iter().any(|bank| bank.covers(*a)));
        assert!(ranges[i + 1..].iter().all(|b| !a.overlaps(*b)), "{ranges:?}");
    }
}

#[test]
fn pools_that_cannot_be_are_refused_by_name() {
    let fault = |path: &str, name: &str, value: &[u8]| {
        let mut tree = tree();
        tree.at(path).set(name, value);
        match read(&tree) {
            Err(Error::Property { node, property, fault }) => (node, property, fault),
            other => panic!("{path} {name}: {other:?}"),
        }
    };
    let restricted = "/reserved-memory/restricted@60000000";
    for name in ["no-map", "reusable", "linux,cma-default", "linux,dma-default"] {
        let (node, property, what) = fault(restricted, name, &[]);
        assert_eq!((node.as_str(), property, what), (restricted, name, PropertyFault::Word));
    }
    let (own, cma) = ("/reserved-memory/own@61000000", "/reserved-memory/cma");
    let (node, property, what) = fault(own, "linux,cma-default", &[]);
    assert_eq!((node.as_str(), property, what), (own, "linux,cma-default", PropertyFault::Word));
    assert_eq!(fault(cma, "linux,dma-default", &[]).1, "linux,dma-default");
    assert_eq!(fault(own, "compatible", b"shared-dma-pool\0restricted-dma-pool\0").2, PropertyFault::Word);
    let (_, property, what) = fault(own, "reg", &cells(&[0, 0x6100_0000, 0, 0x1800]));
    assert_eq!((property, what), ("reg", PropertyFault::Range { base: 0x6100_0000, size: 0x1800 }));
    let (_, property, what) = fault(own, "reg", &cells(&[0, 0x6100_0000, 0, 0x1000, 0, 0x6200_0000, 0, 0x1000]));
    assert_eq!((property, what), ("reg", PropertyFault::Length(2)));
    assert_eq!(fault(cma, "size", &cells(&[0, 0])).1, "size");
    assert_eq!(fault(cma, "alignment", &cells(&[0, 0x3000])).1, "alignment");
    let disk = format!("{PCIE}/disk@3,1");
    assert_eq!(fault(&disk, "memory-region", &cells(&[0x8005])).1, "memory-region");
    assert_eq!(fault(&disk, "memory-region", &cells(&[0x77])).2, PropertyFault::Unresolved(0x77));
    assert_eq!(fault(&disk, "memory-region", &[0, 1, 2]).2, PropertyFault::Length(3));
    assert_eq!(fault(&disk, "reg", &cells(&[0x0200_1900, 0, 0, 0, 0])).1, "reg");
    assert_eq!(fault(&disk, "reg", &cells(&[0x1900])).1, "reg");
    // The same function twice: rid 0x40 is the bridge.
    assert_eq!(fault(&disk, "reg", &cells(&[0x4000, 0, 0, 0, 0])).2, PropertyFault::Overlap(0x40));
}

/// Damages a tree with pools in ways that are the same every time: reading and placing end without a panic, and what is
/// accepted keeps the promises.
#[test]
fn damaged_pools_end_in_named_errors_or_keep_their_promises() {
    let original = write(&tree(), &[]);
    let places = places(&original);
    let spots: Vec<_> = places
        .properties
        .iter()
        .filter(|(path, name, _)| path.starts_with("/reserved-memory") || path.starts_with(PCIE) || name == "phandle")
        .collect();
    let mut random = Random(0xa110c);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut dtb = original.clone();
        let (.., range) = spots[random.below(spots.len())];
        let at = range.start + 4 * random.below(range.len() / 4);
        match random.below(4) {
            0 => dtb[at + random.below(4)] ^= 1 << random.below(8),
            1 => {
                let value = word(&dtb, 4 * random.below(dtb.len() / 4));
                set_word(&mut dtb, at, value);
            }
            2 => set_word(&mut dtb, at, [0, 1, 0x1000, u32::MAX, 1 << 31, 0x9001, 0x9002][random.below(7)]),
            _ => range.clone().step_by(4).for_each(|at| set_word(&mut dtb, at, NOP)),
        }
        match Machine::from_fdt(&dtb) {
            Ok(mut machine) => {
                accepted += 1;
                let homeless = machine.place(&[]).unwrap();
                for pool in machine.pools() {
                    assert!(pool.range.is_none_or(|range| range.is_aligned(4096) && !range.is_empty()));
                    assert!(pool.range.is_some() || homeless.iter().any(|path| path == pool.path));
                }
                for way in [&[(3, 1)][..], &[(8, 0), (2, 0)], &[]] {
                    _ = machine.function_pools(0, way);
                    assert!(machine.function_regions(0, way).iter().all(|&region| region < machine.reserved.len()));
                }
            }
            Err(Error::Structure { node, .. } | Error::Property { node, .. } | Error::Duplicate { node, .. }) => {
                assert!(node.starts_with('/'));
                refused += 1;
            }
            Err(Error::NoMemory | Error::NoCpu) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(accepted > 1000 && refused > 1000, "{accepted} {refused}");
}
