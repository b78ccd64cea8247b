//! The short ways of whoever has a range for itself: the same leaves as the general way makes, and the same refusals.
//!
//! Seen red: a second table that is not looked at before the first is written; one that is not cleared; a block stored over a
//! linked table; a piece that is not published; a table that is found in the place of another.

use super::fake::FakeMemory;
use super::*;
use crate::{MapError, Prot, RevokeError};
use alloc::vec::Vec;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What the walker sees.
fn seen(memory: &FakeMemory, table: &PageTable) -> Vec<(u64, u64, u64)> {
    memory.leaves(table).iter().map(|leaf| (leaf.iova, leaf.size, leaf.entry)).collect()
}

#[test]
fn both_ways_make_the_same_leaves() {
    let (memory, other) = (FakeMemory::new(), FakeMemory::new());
    let geometry = stage1(Granule::K4, 48, 44);
    let (table, plain) = (memory.table(geometry), other.table(geometry));
    // Blocks; runs over one edge of a table and over two; over the end of the tables that are found without a walk; a list.
    let cases: &[(u64, &[(u64, u64)])] = &[
        (2 * MIB, &[(8 * MIB, 2 * MIB)]),
        (4 * GIB, &[(GIB, GIB)]),
        (12 * MIB - 0x10000, &[(32 * MIB - 0x10000, 0x20000)]),
        (22 * MIB - 0x1000, &[(64 * MIB, 4 * MIB)]),
        (GIB - 0x3000, &[(5 * MIB, 0x1000), (6 * MIB, 0x4000), (7 * MIB, 0x1000)]),
        (64 * GIB + 0x1000, &[(4 * MIB, 2 * MIB)]),
        // A contiguous group, and one that cannot be; pages whose tables share a place, which only one of them has.
        (26 * MIB + 0x10000, &[(48 * MIB + 0x10000, 0x10000)]),
        (26 * MIB + 0x20000, &[(48 * MIB + 0x21000, 0x10000)]),
        (28 * MIB, &[(50 * MIB, 0x1000)]),
        (28 * MIB + 8 * GIB, &[(52 * MIB, 0x1000)]),
    ];
    for prot in [RW, Prot::READ, RW | Prot::PAGEWISE] {
        // The second time all tables are there.
        for _ in 0..2 {
            for (start, runs) in cases {
                let runs: Vec<PhysRange> = runs.iter().map(|(at, len)| phys(*at, *len)).collect();
                let range = iova(*start, runs.iter().map(|run| run.len()).sum());
                table.map_exclusively::<false>(range, &runs, prot).unwrap();
                plain.map(range, &runs, prot).unwrap();
                assert_eq!(seen(memory, &table), seen(other, &plain), "{range} {prot:?}");
                let last = Iova::new(range.end().get() - 1);
                assert_eq!(table.translate(last), plain.translate(last));
                assert!(table.translate(last).is_some());
            }
            for (start, runs) in cases {
                let range = iova(*start, runs.iter().map(|(_, len)| len).sum());
                let unmapped = table.unmap(range).unwrap();
                assert_eq!(unmapped.missing, None);
                assert_eq!(unmapped, plain.unmap(range).unwrap());
                assert_eq!(seen(memory, &table), seen(other, &plain), "{range} {prot:?}");
            }
            assert!(seen(memory, &table).is_empty());
        }
    }
}

#[test]
fn a_page_in_the_second_table_keeps_the_first_from_being_written() {
    let memory = FakeMemory::new();
    let table = memory.table(stage1(Granule::K4, 48, 44));
    let range = iova(2 * MIB - 0x2000, 0x4000);
    table.map_exclusively::<false>(range, &[phys(MIB, 0x4000)], RW).unwrap();
    let _ = table.unmap(range).unwrap();
    table.map_exclusively::<false>(iova(2 * MIB + 0x1000, 0x1000), &[phys(0x1000, 0x1000)], RW).unwrap();
    let before = seen(memory, &table);
    let error = table.map_exclusively::<false>(range, &[phys(MIB, 0x4000)], RW);
    assert_eq!(error, Err(MapError::AlreadyMapped(Iova::new(2 * MIB + 0x1000))));
    assert_eq!(seen(memory, &table), before);
    // Unmapping says what was missing, clears the rest, and names no level for it to be believed.
    let unmapped = table.unmap(range).unwrap();
    assert_eq!((unmapped.missing, unmapped.leaves), (Some(range.start()), 1));
    assert!(seen(memory, &table).is_empty());
}

#[test]
fn a_block_is_neither_put_twice_nor_over_a_table_nor_taken_in_part() {
    let memory = FakeMemory::new();
    let table = memory.table(stage1(Granule::K4, 48, 44));
    let block = iova(4 * GIB, 2 * MIB);
    table.map_exclusively::<false>(block, &[phys(2 * MIB, 2 * MIB)], RW).unwrap();
    let error = table.map_exclusively::<false>(block, &[phys(4 * MIB, 2 * MIB)], RW);
    assert_eq!(error, Err(MapError::AlreadyMapped(block.start())));
    assert_eq!(memory.leaves(&table).len(), 1);
    let part = table.unmap(iova(4 * GIB + MIB, 2 * MIB));
    assert_eq!(part, Err(RevokeError::SplitsBlock(block.start())));
    let unmapped = table.unmap(block).unwrap();
    assert_eq!((unmapped.level, unmapped.leaf_size, unmapped.leaves), (Some(2), Some(2 * MIB), 1));
    assert!(seen(memory, &table).is_empty());
    // A page links a table, and stays.
    table.map_exclusively::<false>(iova(4 * GIB, 0x1000), &[phys(0x1000, 0x1000)], RW).unwrap();
    let error = table.map_exclusively::<false>(block, &[phys(2 * MIB, 2 * MIB)], RW);
    assert_eq!(error, Err(MapError::AlreadyMapped(block.start())));
    let _ = table.unmap(iova(4 * GIB, 0x1000)).unwrap();
    table.map_exclusively::<false>(block, &[phys(2 * MIB, 2 * MIB)], RW).unwrap();
    assert_eq!(memory.leaves(&table).len(), 512);
}

#[test]
fn a_group_that_lies_across_the_edge_of_a_range_is_not_split() {
    let memory = FakeMemory::new();
    let table = memory.table(stage1(Granule::K4, 48, 44));
    for _ in 0..2 {
        let range = iova(2 * MIB - 0x10000, 0x20000);
        table.map_exclusively::<false>(range, &[phys(8 * MIB - 0x10000, 0x20000)], RW).unwrap();
        let before = seen(memory, &table);
        for part in [iova(2 * MIB - 0x8000, 0x18000), iova(2 * MIB - 0x10000, 0x18000)] {
            assert!(matches!(table.unmap(part), Err(RevokeError::SplitsBlock(_))), "{part}");
            assert_eq!(seen(memory, &table), before);
        }
        assert_eq!(table.unmap(range).unwrap().leaves, 32);
    }
}
