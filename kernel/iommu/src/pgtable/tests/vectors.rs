//! Fixed vectors, and the matrix of granules, sizes and stages.

use super::fake::FakeMemory;
use super::*;
use crate::pgtable::PageTable;
use crate::{MapError, Prot, RevokeError};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const GIB: u64 = 1 << 30;

#[test]
fn an_identity_mapping_of_many_blocks_has_exactly_the_leaves_it_needs() {
    let memory = FakeMemory::new();
    let table = memory.table(stage1(Granule::K4, 48, 48));
    let (start, end) = (0x3_fe40_0000, 0x4_c060_0000);
    table.map(iova(start, end - start), &[phys(start, end - start)], RW).unwrap();
    let leaves = memory.leaves(&table);
    let sizes: Vec<u64> = leaves.iter().map(|leaf| leaf.size >> 21).collect();
    let expected: Vec<u64> = [[1; 14].as_slice(), &[512; 3], &[1; 3]].concat();
    assert_eq!(sizes, expected);
    assert!(leaves.iter().all(|leaf| leaf.iova == leaf.phys));
}

#[test]
fn a_mapping_that_crosses_a_table_boundary_is_whole() {
    let memory = FakeMemory::new();
    let table = memory.table(stage1(Granule::K4, 48, 48));
    let (from, to, len) = (0xfef8_0000, 0x20_8b95_d000, 0x2_0000);
    table.map(iova(from, len), &[phys(to, len)], RW).unwrap();
    for offset in (0..len).step_by(0x800) {
        assert_eq!(memory.walk(&table, from + offset), Some(to + offset));
        assert_eq!(table.translate(Iova::new(from + offset)), Some((PhysAddr::new(to + offset), RW)));
    }
    assert_eq!(memory.walk(&table, from - 1), None);
    assert_eq!(memory.walk(&table, from + len), None);
    let from = 0x7fff_f000 - 0xf000;
    table.map(iova(from, len), &[phys(to, len)], RW).unwrap();
    assert_eq!(memory.walk(&table, from + len - 1), Some(to + len - 1));
    let unmapped = table.unmap(iova(from, len)).unwrap();
    assert_eq!((unmapped.leaves, unmapped.leaf_size, unmapped.missing), (32, Some(4096), None));
    assert_eq!(memory.leaves(&table).len(), 32);
}

fn exercise(table: &PageTable, memory: &FakeMemory) {
    let sizes = table.geometry().aperture().page_sizes;
    let input_end = 1_u64 << table.geometry().input_bits();
    let sizes: Vec<u64> = (0..63).map(|bit| 1 << bit).filter(|size| sizes & size != 0).collect();
    for (n, size) in sizes.iter().copied().enumerate() {
        let at = n as u64 * GIB;
        let range = iova(at, size);
        assert_eq!(table.translate(Iova::new(at + 42)), None);
        table.map(range, &[phys(at, size)], RW).unwrap();
        assert_eq!(table.map(range, &[phys(at, size)], RW), Err(MapError::AlreadyMapped(Iova::new(at))));
        assert_eq!(table.translate(Iova::new(at + 42)), Some((PhysAddr::new(at + 42), RW)));
        assert_eq!(memory.walk(table, at + 42), Some(at + 42));
        let mapped = memory.leaves(table);
        assert!(mapped.iter().any(|leaf| (leaf.iova, leaf.size) == (at, size)));
        for _ in 0..2 {
            let unmapped = table.unmap(range).unwrap();
            assert_eq!((unmapped.leaves, unmapped.leaf_size), (1, Some(size)));
            assert_eq!(memory.walk(table, at + 42), None);
            table.map(range, &[phys(at, size)], RW).unwrap();
            assert_eq!(memory.walk(table, at + 42), Some(at + 42));
        }
        if size > sizes[0] {
            assert_eq!(table.unmap(iova(at, sizes[0])), Err(RevokeError::SplitsBlock(Iova::new(at))));
            assert_eq!(memory.walk(table, at), Some(at));
        }
    }
    let largest = *sizes.last().unwrap();
    let top = input_end - largest;
    let _ = table.unmap(iova((sizes.len() as u64 - 1) * GIB, largest)).unwrap();
    table.map(iova(top, largest), &[phys(0, largest)], RW).unwrap();
    assert_eq!(memory.walk(table, input_end - 1), Some(largest - 1));
    let beyond = iova(input_end, largest);
    assert_eq!(table.map(beyond, &[phys(0, largest)], RW), Err(MapError::OutOfAperture(beyond)));
    assert_eq!(table.unmap(beyond), Err(RevokeError::OutOfAperture(beyond)));
}

#[test]
fn every_granule_size_and_stage_maps_each_leaf_size_and_the_top_of_its_range() {
    let mut shapes = 0;
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        for stage in [Stage::One, Stage::Two] {
            for ias in 32..=48_u8 {
                for oas in (32..=48).filter(|oas| *oas >= ias) {
                    let memory = FakeMemory::new();
                    exercise(&memory.table(Geometry::new(granule, stage, ias, oas).unwrap()), memory);
                    assert_eq!(memory.live(), 0, "{granule:?} {stage:?} {ias} {oas}");
                    shapes += 1;
                }
            }
        }
    }
    // Three granules, two stages, and 17 + 16 + ... + 1 pairs of sizes.
    assert_eq!(shapes, 3 * 2 * 153);
}

#[test]
fn a_thousand_random_maps_and_unmaps_agree_with_a_map_of_pages() {
    for (granule, stage) in [(Granule::K4, Stage::One), (Granule::K16, Stage::Two), (Granule::K64, Stage::One)] {
        let memory = FakeMemory::new();
        let table = memory.table(Geometry::new(granule, stage, 40, 44).unwrap());
        let page = granule.size();
        let mut pages = BTreeMap::new();
        let mut whole = BTreeMap::new();
        let (mut seed, mut refused, mut unmapped) = (1_u64, 0, 0);
        let mut below = |end: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % end
        };
        for step in 0..1000 {
            if below(3) == 0 && !whole.is_empty() {
                let pick = below(whole.len() as u64) as usize;
                let (&at, &count) = whole.iter().nth(pick).unwrap();
                whole.remove(&at);
                let done = table.unmap(iova(at * page, count * page)).unwrap();
                assert_eq!(done.missing, None, "step {step}");
                pages.retain(|page, _| !(at..at + count).contains(page));
                unmapped += 1;
                continue;
            }
            let most = 1 << below(8);
            let (at, to, count) = (below(4096), below(1 << 16), 1 + below(most));
            let free = (at..at + count).all(|at| !pages.contains_key(&at));
            let made = table.map(iova(at * page, count * page), &[phys(to * page, count * page)], RW);
            assert_eq!(made.is_ok(), free, "step {step}");
            if free {
                pages.extend((0..count).map(|n| (at + n, to + n)));
                whole.insert(at, count);
            } else {
                assert!(matches!(made, Err(MapError::AlreadyMapped(_))));
                refused += 1;
            }
        }
        for at in 0..4096 + 128 {
            let expected = pages.get(&at).map(|to| to * page);
            assert_eq!(memory.walk(&table, at * page), expected, "{granule:?} page {at}");
        }
        assert!(refused > 100 && unmapped > 100, "{refused} {unmapped}");
        for (at, count) in whole {
            assert_eq!(table.unmap(iova(at * page, count * page)).unwrap().missing, None);
        }
        assert!(memory.leaves(&table).is_empty());
        drop(table);
        assert_eq!(memory.live(), 0, "no table is left");
    }
}
