//! What a mapping may be, what the entries say, and what happens when cores meet.

#![allow(unsafe_code)] // Implements the unsafe trait of table memory.

use super::fake::FakeMemory;
use super::*;
use crate::contract::{TableBlock, TableMemory};
use crate::pgtable::{MAIR, MAIR_DEVICE, MAIR_NON_CACHEABLE, PageTable};
use crate::{GeometryError, MapError, OutOfMemory, Prot, RevokeError};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::Barrier;
use std::thread;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const MIB: u64 = 1 << 20;

fn table(memory: &'static FakeMemory) -> PageTable {
    memory.table(stage1(Granule::K4, 48, 44))
}

#[test]
fn shapes_that_do_not_exist_are_refused() {
    for ias in [0, 31, 49, 64, 255] {
        assert_eq!(Geometry::new(Granule::K4, Stage::One, ias, 48), Err(GeometryError::InputSize(ias)));
        assert_eq!(Geometry::new(Granule::K4, Stage::One, 48, ias), Err(GeometryError::OutputSize(ias)));
    }
    let error = GeometryError::InputExceedsOutput { input: 48, output: 44 };
    assert_eq!(Geometry::new(Granule::K4, Stage::Two, 48, 44), Err(error));
}

#[test]
fn levels_and_sizes_are_those_of_the_architecture() {
    let shape = |granule, stage, ias| {
        let geometry = Geometry::new(granule, stage, ias, 48).unwrap();
        (geometry.start_level(), geometry.tsz(), geometry.root_bytes())
    };
    assert_eq!(shape(Granule::K4, Stage::One, 48), (0, 16, 4096));
    assert_eq!(shape(Granule::K4, Stage::One, 39), (1, 25, 4096));
    assert_eq!(shape(Granule::K4, Stage::One, 32), (1, 32, 64));
    assert_eq!(shape(Granule::K4, Stage::Two, 40), (1, 24, 2 * 4096));
    assert_eq!(shape(Granule::K4, Stage::Two, 43), (1, 21, 16 * 4096));
    assert_eq!(shape(Granule::K4, Stage::Two, 44), (0, 20, 256));
    assert_eq!(shape(Granule::K16, Stage::One, 48), (0, 16, 64));
    assert_eq!(shape(Granule::K16, Stage::Two, 48), (1, 16, 2 * 16384));
    assert_eq!(shape(Granule::K16, Stage::Two, 40), (2, 24, 16 * 16384));
    assert_eq!(shape(Granule::K64, Stage::One, 48), (1, 16, 512));
    assert_eq!(shape(Granule::K64, Stage::Two, 46), (2, 18, 16 * 65536));
    let sizes = |granule| Geometry::new(granule, Stage::One, 48, 48).unwrap().page_sizes();
    assert_eq!(sizes(Granule::K4), 1 << 12 | 1 << 21 | 1 << 30);
    assert_eq!(sizes(Granule::K16), 1 << 14 | 1 << 25);
    assert_eq!(sizes(Granule::K64), 1 << 16 | 1 << 29);
}

/// The bits, by the architecture's tables: D8.3 (attributes), D8.4 (permissions), D8.6 (memory types).
#[test]
fn entries_say_what_was_asked_for() {
    let common1 = 3 | 1 << 10 | 1 << 11 | 1 << 53 | 1 << 54;
    let (inner, outer) = (3 << 8, 2 << 8);
    let (unprivileged, read_only) = (1 << 6, 1 << 7);
    let common2 = 3 | 1 << 10 | 1 << 54;
    let cases: [(Prot, u64, u64); 7] = [
        (RW, inner | unprivileged, 0b1111 << 2 | inner | 0b11 << 6),
        (Prot::READ, inner | unprivileged | read_only, 0b1111 << 2 | inner | 0b01 << 6),
        (Prot::WRITE, inner | unprivileged, 0b1111 << 2 | inner | 0b10 << 6),
        (RW | Prot::PRIVILEGED, inner, 0b1111 << 2 | inner | 0b11 << 6),
        (RW | Prot::NON_COHERENT, 1 << 2 | outer | unprivileged, 0b0101 << 2 | outer | 0b11 << 6),
        (RW | Prot::MMIO, 2 << 2 | outer | unprivileged, 0b0001 << 2 | outer | 0b11 << 6),
        (RW | Prot::PAGEWISE, inner | unprivileged, 0b1111 << 2 | inner | 0b11 << 6),
    ];
    for (prot, one, two) in cases {
        for (stage, expected) in [(Stage::One, common1 | one), (Stage::Two, common2 | two)] {
            let memory = FakeMemory::new();
            let table = memory.table(Geometry::new(Granule::K4, stage, 40, 40).unwrap());
            table.map(iova(0x1000, 0x1000), &[phys(0x8_0000_1000, 0x1000)], prot).unwrap();
            let leaf = memory.leaves(&table)[0];
            assert_eq!(leaf.entry, expected | 0x8_0000_1000, "{prot:?} {stage:?} {:#x}", leaf.entry);
            let reported = table.translate(Iova::new(0x1000)).unwrap().1;
            let mut told = prot - Prot::PAGEWISE;
            match stage {
                Stage::One => told |= Prot::READ,
                Stage::Two => told -= Prot::PRIVILEGED,
            }
            assert_eq!(reported, told);
        }
    }
    assert_eq!(
        (MAIR & 0xff, MAIR >> (8 * MAIR_NON_CACHEABLE) & 0xff, MAIR >> (8 * MAIR_DEVICE) & 0xff),
        (0xff, 0x44, 0x04)
    );
}

#[test]
fn what_cannot_be_mapped_is_refused_by_its_name() {
    let memory = FakeMemory::new();
    let table = table(memory);
    let page = iova(0x1000, 0x1000);
    let frame = phys(0x1000, 0x1000);
    assert_eq!(table.map(page, &[frame], Prot::empty()), Err(MapError::BadProt));
    assert_eq!(table.map(page, &[frame], Prot::MMIO | Prot::PRIVILEGED), Err(MapError::BadProt));
    assert_eq!(table.map(page, &[phys(1 << 44, 0x1000)], RW), Err(MapError::OutputTooLarge((1 << 44) + 0xfff)));
    let over = phys((1 << 44) - 0x1000, 0x2000);
    assert_eq!(table.map(iova(0, 0x2000), &[over], RW), Err(MapError::OutputTooLarge((1 << 44) + 0xfff)));
    let edge = iova((1 << 48) - 0x1000, 0x2000);
    assert_eq!(table.map(edge, &[phys(0, 0x2000)], RW), Err(MapError::OutOfAperture(edge)));
    for (range, run) in
        [(iova(0x800, 0x1000), frame), (iova(0x1000, 0x800), phys(0x1000, 0x800)), (page, phys(0x1800, 0x1000))]
    {
        assert_eq!(table.map(range, &[run], RW), Err(MapError::Misaligned(0x1000)));
    }
    let mismatch = |physical| Err(MapError::LengthMismatch { iova: 0x1000, physical });
    assert_eq!(table.map(page, &[], RW), mismatch(0));
    assert_eq!(table.map(page, &[frame, frame], RW), mismatch(0x2000));
    assert!(memory.leaves(&table).is_empty());
    assert_eq!(memory.live(), 1, "no table was made for any of it");
    table.map(iova(0x1000, 0), &[], RW).unwrap();
    table.map(page, &[phys(0x5000, 0), frame, phys(0x7000, 0)], RW).unwrap();
    let unmap = |start, len| table.unmap(iova(start, len));
    assert_eq!(unmap(0x1800, 0x1000), Err(RevokeError::SplitsBlock(Iova::new(0x1000))));
    assert_eq!(unmap(0x1000, 0x800), Err(RevokeError::SplitsBlock(Iova::new(0x1000))));
    assert_eq!(unmap(0x1000, 0).map(|unmapped| unmapped.leaves), Ok(0));
    assert_eq!(memory.leaves(&table).len(), 1);
}

#[test]
fn physically_adjacent_runs_get_the_leaves_of_one() {
    let memory = FakeMemory::new();
    let table = table(memory);
    let runs: Vec<PhysRange> = (0..512).map(|n| phys(0x4000_0000 + n * 0x1000, 0x1000)).collect();
    table.map(iova(2 * MIB, 2 * MIB), &runs, RW).unwrap();
    let leaves = memory.leaves(&table);
    assert_eq!((leaves.len(), leaves[0].size), (1, 2 * MIB));
}

#[test]
fn sixteen_blocks_in_a_row_are_contiguous_and_go_only_together() {
    let memory = FakeMemory::new();
    let table = table(memory);
    let range = iova(32 * MIB, 34 * MIB);
    table.map(range, &[phys(64 * MIB, 34 * MIB)], RW).unwrap();
    let leaves = memory.leaves(&table);
    assert_eq!(leaves.len(), 17);
    assert!(leaves[..16].iter().all(|leaf| leaf.contiguous()) && !leaves[16].contiguous());
    let first = Iova::new(32 * MIB);
    assert_eq!(table.unmap(iova(32 * MIB, 2 * MIB)), Err(RevokeError::SplitsBlock(first)));
    assert_eq!(table.unmap(iova(62 * MIB, 4 * MIB)), Err(RevokeError::SplitsBlock(first)));
    assert_eq!(memory.leaves(&table).len(), 17, "nothing was changed");
    assert_eq!(table.unmap(iova(64 * MIB, 2 * MIB)).unwrap().leaves, 1);
    let unmapped = table.unmap(iova(32 * MIB, 32 * MIB)).unwrap();
    assert_eq!((unmapped.leaves, unmapped.leaf_size, unmapped.level), (16, Some(2 * MIB), Some(2)));
}

#[test]
fn mixed_leaves_are_reported_as_mixed() {
    let memory = FakeMemory::new();
    let table = table(memory);
    let range = iova(2 * MIB, 2 * MIB + 0x1000);
    table.map(range, &[phys(2 * MIB, 2 * MIB + 0x1000)], RW).unwrap();
    let unmapped = table.unmap(range).unwrap();
    assert_eq!((unmapped.leaves, unmapped.leaf_size, unmapped.level, unmapped.missing), (2, None, None, None));
    let unmapped = table.unmap(range).unwrap();
    assert_eq!((unmapped.leaves, unmapped.leaf_size, unmapped.missing), (0, None, Some(Iova::new(2 * MIB))));
}

#[test]
fn a_block_is_not_put_over_a_table() {
    let memory = FakeMemory::new();
    let table = table(memory);
    table.map(iova(4 * MIB, 0x1000), &[phys(0, 0x1000)], RW).unwrap();
    let _ = table.unmap(iova(4 * MIB, 0x1000)).unwrap();
    table.map(iova(2 * MIB, 6 * MIB), &[phys(2 * MIB, 6 * MIB)], RW).unwrap();
    let sizes: Vec<u64> = memory.leaves(&table).iter().map(|leaf| leaf.size).collect();
    let expected: Vec<u64> = [[2 * MIB].as_slice(), &[0x1000; 512], &[2 * MIB]].concat();
    assert_eq!(sizes, expected);
    assert_eq!(table.unmap(iova(2 * MIB, 6 * MIB)).unwrap().leaves, 514);
}

#[test]
fn a_table_is_not_put_over_a_block() {
    let memory = FakeMemory::new();
    let table = table(memory);
    table.map(iova(4 * MIB, 2 * MIB), &[phys(4 * MIB, 2 * MIB)], RW).unwrap();
    let inside = table.map(iova(5 * MIB, 0x1000), &[phys(0, 0x1000)], RW);
    assert_eq!(inside, Err(MapError::AlreadyMapped(Iova::new(5 * MIB))));
    let _ = table.unmap(iova(4 * MIB, 2 * MIB)).unwrap();
    table.map(iova(5 * MIB, 0x1000), &[phys(0, 0x1000)], RW).unwrap();
    assert_eq!(memory.walk(&table, 5 * MIB), Some(0));
}

/// Memory that does as little as possible, so that two cores meet at the tables and not here.
struct Quiet;

// SAFETY: leaked words of the test's own, which no hardware walks.
unsafe impl TableMemory for Quiet {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let words: &'static [AtomicU64] = Box::leak((0..bytes / 8).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>());
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(PhysAddr::new(words.as_ptr().addr() as u64 & !0xfff), words, self) })
    }

    fn free(&self, _: PhysAddr, _: &'static [AtomicU64]) {}

    fn publish(&self, _: &[AtomicU64]) {}
}

/// Red when a mapping of one page, or of several, looked at an entry and then stored to it, instead of exchanging.
#[test]
fn pages_that_two_cores_map_at_once_go_to_exactly_one_of_them() {
    const ATTEMPTS: u64 = 4096;
    const ROUNDS: usize = 60;
    for pages in [1, 2] {
        let table = PageTable::new(stage1(Granule::K4, 39, 44), &Quiet).unwrap();
        let range = |n: u64| iova(n * pages * 0x1000, pages * 0x1000);
        let run = phys(0x4000_0000, pages * 0x1000);
        (0..ATTEMPTS).for_each(|n| table.map(range(n), &[run], RW).unwrap());
        let clear = || (0..ATTEMPTS).for_each(|n| assert_eq!(table.unmap(range(n)).unwrap().missing, None));
        for _ in 0..ROUNDS {
            clear();
            // Spinning, and not a barrier that puts threads to sleep: both are to run when it begins.
            let ready = AtomicU64::new(0);
            let work = || {
                ready.fetch_add(1, SeqCst);
                while ready.load(SeqCst) != 2 {
                    thread::yield_now();
                }
                (0..ATTEMPTS).filter(|n| table.map(range(*n), &[run], RW).is_ok()).count() as u64
            };
            let won = thread::scope(|scope| {
                let other = scope.spawn(work);
                work() + other.join().unwrap()
            });
            assert_eq!(won, ATTEMPTS);
        }
    }
}

#[test]
fn of_overlapping_mappings_made_at_once_exactly_one_succeeds() {
    for round in 0..200 {
        let memory = FakeMemory::new();
        let table = table(memory);
        let start = Barrier::new(4);
        let won: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..4_u64)
                .map(|n| {
                    let (table, start) = (&table, &start);
                    scope.spawn(move || {
                        // All of them contain the page at 2 MiB + 30 pages; some begin with a block, some need two tables.
                        let (at, len) =
                            [(2 * MIB, 2 * MIB), (2 * MIB + 0x1_e000, 0x1000), (MIB, 2 * MIB), (0, 4 * MIB)]
                                [n as usize];
                        start.wait();
                        table.map(iova(at, len), &[phys((n + 1) << 30, len)], RW).is_ok()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
        });
        // More than one cannot win; none can, where all saw each other.
        assert!(won <= 1, "round {round}: {won}");
        let leaves = memory.leaves(&table);
        let owners: Vec<u64> = leaves.iter().map(|leaf| leaf.phys >> 30).collect();
        assert!(owners.windows(2).all(|pair| pair[0] == pair[1]), "leaves of two mappings");
        assert_eq!(leaves.is_empty(), won == 0, "what failed is gone");
        // No claim is left behind.
        let rest = iova(0, 4 * MIB);
        if won == 0 {
            table.map(rest, &[phys(0, 4 * MIB)], RW).unwrap();
        }
    }
}

#[test]
fn cores_that_map_disjoint_ranges_do_not_disturb_each_other() {
    let memory = FakeMemory::new();
    let table = table(memory);
    let start = Barrier::new(4);
    thread::scope(|scope| {
        for n in 0..4_u64 {
            let (table, start) = (&table, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..60 {
                    // Pages of the four interleave in the same tables; every round needs tables that no round had before.
                    let at = round * 512 * MIB + n * 0x1_0000;
                    let frame = 0x10_0000_0000 + n * 0x1000_0000 + round * 0x1_0000;
                    table.map(iova(at, 0x1_0000), &[phys(frame, 0x1_0000)], RW).unwrap();
                    assert_eq!(memory.walk(table, at + 0x8000), Some(frame + 0x8000), "visible when map returns");
                    if round % 3 == 0 {
                        assert_eq!(table.unmap(iova(at, 0x1_0000)).unwrap().missing, None);
                        assert_eq!(memory.walk(table, at), None, "gone when unmap returns");
                    }
                }
            });
        }
    });
    assert_eq!(memory.leaves(&table).len(), 4 * 40 * 16);
    drop(table);
    assert_eq!(memory.live(), 0);
}

#[test]
fn tables_of_two_address_spaces_do_not_mix() {
    let memory = FakeMemory::new();
    let one = PageTable::new(stage1(Granule::K4, 39, 40), memory).unwrap();
    let two = PageTable::new(stage1(Granule::K4, 39, 40), memory).unwrap();
    one.map(iova(0x1000, 0x1000), &[phys(0x5000, 0x1000)], RW).unwrap();
    two.map(iova(0x1000, 0x1000), &[phys(0x6000, 0x1000)], RW).unwrap();
    assert_eq!((memory.walk(&one, 0x1000), memory.walk(&two, 0x1000)), (Some(0x5000), Some(0x6000)));
    drop(one);
    assert_eq!(memory.walk(&two, 0x1000), Some(0x6000));
}
