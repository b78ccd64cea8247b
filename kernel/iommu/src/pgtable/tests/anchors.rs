//! Anchors: the same leaves as the other ways make, and the same refusals.

#![allow(unsafe_code)] // Maps by anchors, where no device is.

use super::fake::FakeMemory;
use super::*;
use crate::Prot;
use crate::pgtable::{Anchor, Leaf};
use alloc::sync::Arc;
use alloc::vec::Vec;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const PAGE: u64 = 0x1000;
const GROUP: u64 = 0x1_0000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Of each kind one range, with the leaf that maps it.
const RANGES: [(u64, u64, Leaf); 4] = [
    (64 * GIB + 3 * PAGE, PAGE, Leaf::PAGE),
    (64 * GIB + 5 * GROUP, GROUP, Leaf::GROUP),
    (64 * GIB + 6 * MIB, 2 * MIB, Leaf::block(2)),
    (66 * GIB, GIB, Leaf::block(1)),
];

/// What the walker sees.
fn seen(memory: &FakeMemory, table: &PageTable) -> Vec<(u64, u64, u64)> {
    memory.leaves(table).iter().map(|leaf| (leaf.iova, leaf.size, leaf.entry)).collect()
}

/// Tables with those above the leaves of [`RANGES`], in which nothing is mapped.
fn tables(memory: &'static FakeMemory) -> Arc<PageTable> {
    let table = Arc::new(memory.table(stage1(Granule::K4, 48, 44)));
    for (start, len, _) in RANGES {
        table.map(iova(start, len), &[phys(4 * GIB, len)], RW).unwrap();
        let _ = table.unmap(iova(start, len)).unwrap();
    }
    table
}

/// Both ways of mapping by an anchor.
fn ways(anchor: &Anchor, run: PhysRange, prot: Prot) -> [impl Fn() -> bool; 2] {
    [false, true].map(|inline| {
        move || {
            if inline {
                // SAFETY: no device walks the tables.
                unsafe { anchor.map_inline(run, prot) }
            } else {
                // SAFETY: as above.
                unsafe { anchor.map(run, prot) }
            }
        }
    })
}

/// Red when an anchor made a page's leaf of a block, left the Contiguous bit out, wrote fewer entries of a group, or cleared only the
/// first of them.
#[test]
fn an_anchor_maps_and_clears_as_the_other_ways_do() {
    let (memory, other) = (FakeMemory::coherent(), FakeMemory::coherent());
    let (table, plain) = (tables(memory), tables(other));
    let anchors: Vec<Anchor> = RANGES.iter().map(|(start, len, _)| table.anchor(iova(*start, *len)).unwrap()).collect();
    for prot in [RW, Prot::READ, RW | Prot::NON_COHERENT, Prot::READ | Prot::EXECUTE] {
        for way in 0..2 {
            for (anchor, (start, len, leaf)) in anchors.iter().zip(RANGES) {
                let (range, run) = (iova(start, len), phys(8 * GIB + len, len));
                assert_eq!((anchor.range(), anchor.leaf(), anchor.is_of(&table)), (range, leaf, true));
                assert!(!anchor.is_of(&plain));
                assert!(ways(anchor, run, prot)[way]());
                plain.map(range, &[run], prot).unwrap();
                assert_eq!(seen(memory, &table), seen(other, &plain), "{range} {prot:?}");
                assert_eq!(table.translate(range.start()), plain.translate(range.start()));
            }
            for (anchor, (start, len, _)) in anchors.iter().zip(RANGES) {
                anchor.clear();
                assert_eq!(plain.unmap(iova(start, len)).unwrap().missing, None);
                assert_eq!(seen(memory, &table), seen(other, &plain));
            }
            assert!(seen(memory, &table).is_empty());
        }
    }
    // What an anchor has mapped the other ways take away, and the other way round.
    for (anchor, (start, len, leaf)) in anchors.iter().zip(RANGES) {
        assert!(ways(anchor, phys(8 * GIB, len), RW)[0]());
        assert_eq!(table.unmap_leaf::<true>(iova(start, len)), Some(leaf));
        table.map_exclusively::<true>(iova(start, len), &[phys(8 * GIB, len)], RW).unwrap();
        anchor.clear();
    }
    assert!(seen(memory, &table).is_empty());
}

/// Red, each by itself, when the length, the alignment or the limit, of pages or of larger leaves, or `PAGEWISE` was not looked at.
#[test]
fn an_anchor_refuses_what_its_leaf_cannot_map() {
    let memory = FakeMemory::coherent();
    let table = tables(memory);
    for (start, len, leaf) in RANGES {
        let anchor = table.anchor(iova(start, len)).unwrap();
        let mut cases = alloc::vec![
            ("too short", phys(8 * GIB, len / 2), RW),
            ("too long", phys(8 * GIB, len * 2), RW),
            ("empty", phys(8 * GIB, 0), RW),
            ("misaligned", phys(8 * GIB + len / 2, len), RW),
            ("beyond what can be put out", phys(1 << 44, len), RW),
            ("without a right", phys(8 * GIB, len), Prot::empty()),
            ("code that can be written", phys(8 * GIB, len), RW | Prot::EXECUTE),
        ];
        if leaf != Leaf::PAGE {
            cases.push(("to be in pages", phys(8 * GIB, len), RW | Prot::PAGEWISE));
        }
        for (what, run, prot) in cases {
            for way in ways(&anchor, run, prot) {
                assert!(!way(), "{what}: {run} by {leaf:?}");
                assert!(seen(memory, &table).is_empty(), "{what}");
            }
        }
        // The last that can be put out; a page is a page.
        for way in ways(&anchor, phys((1 << 44) - len, len), RW) {
            assert!(way());
            anchor.clear();
        }
    }
    let page = table.anchor(iova(RANGES[0].0, PAGE)).unwrap();
    assert!(ways(&page, phys(8 * GIB, PAGE), RW | Prot::PAGEWISE)[0]());
}

/// Red, each by itself, when a page's, a group's or a block's entries were not looked at, when only the first of a group was, and when
/// an anchor was found where something is mapped.
#[test]
fn an_anchor_does_not_map_over_what_is_mapped_or_linked() {
    let memory = FakeMemory::coherent();
    let table = tables(memory);
    let anchors = RANGES.map(|(start, len, _)| table.anchor(iova(start, len)).unwrap());
    let refused = |anchor: &Anchor, len| {
        let before = seen(memory, &table);
        for way in ways(anchor, phys(16 * GIB, len), RW) {
            assert!(!way(), "{}", anchor.range());
            assert_eq!(seen(memory, &table), before);
        }
        assert!(table.anchor(anchor.range()).is_none(), "none is found there either");
    };
    for (anchor, (start, len, _)) in anchors.iter().zip(RANGES) {
        let last = if len == GROUP { start + GROUP - PAGE } else { start };
        let taken = iova(last, if len == GROUP { PAGE } else { len });
        table.map(taken, &[phys(8 * GIB, taken.len())], RW).unwrap();
        refused(anchor, len);
        let _ = table.unmap(taken).unwrap();
        assert!(ways(anchor, phys(16 * GIB, len), RW)[0]());
        refused(anchor, len);
        anchor.clear();
    }
    // A table that was linked where a block would stand stays, with and without pages.
    for (anchor, (start, len, leaf)) in anchors.iter().zip(RANGES).skip(2) {
        let inside = iova(start + len / 2, PAGE);
        table.map(inside, &[phys(PAGE, PAGE)], RW).unwrap();
        refused(anchor, len);
        let _ = table.unmap(inside).unwrap();
        refused(anchor, len);
        assert!(seen(memory, &table).is_empty(), "{leaf:?}");
    }
    // And what lies below was never out of reach.
    let below = table.anchor(iova(RANGES[2].0 + MIB, PAGE)).unwrap();
    assert!(ways(&below, phys(PAGE, PAGE), RW)[0]());
    assert_eq!(memory.walk(&table, RANGES[2].0 + MIB), Some(PAGE));
}

/// Red when a misaligned range had one, and one in memory that takes more than a barrier.
#[test]
fn anchors_are_found_where_one_leaf_would_be() {
    let memory = FakeMemory::coherent();
    let fresh = Arc::new(memory.table(stage1(Granule::K4, 48, 44)));
    for (start, len, _) in RANGES {
        assert!(fresh.anchor(iova(start, len)).is_none(), "there is no table");
    }
    let table = tables(memory);
    for (start, len) in
        [(64 * GIB, 2 * PAGE), (64 * GIB, 0), (64 * GIB, GROUP / 2), (64 * GIB, 4 * MIB), (1 << 48, PAGE)]
    {
        assert!(table.anchor(iova(start, len)).is_none(), "{start:#x}, {len:#x}");
    }
    for (start, len, leaf) in RANGES {
        if leaf != Leaf::PAGE {
            assert!(table.anchor(iova(start + len / 2, len)).is_none());
        }
    }
    let (not_snooped, other) = (FakeMemory::new(), FakeMemory::coherent());
    let published = tables(not_snooped);
    assert!(published.anchor(iova(RANGES[0].0, PAGE)).is_none(), "a barrier is not enough there");
    let large = Arc::new(other.table(stage1(Granule::K64, 48, 48)));
    large.map(iova(0, 0x1_0000), &[phys(0, 0x1_0000)], RW).unwrap();
    let _ = large.unmap(iova(0, 0x1_0000)).unwrap();
    for len in [PAGE, GROUP] {
        assert!(large.anchor(iova(0, len)).is_none(), "the pages have another size");
    }
}

#[test]
fn tables_live_as_long_as_anchors_in_them() {
    let memory = FakeMemory::coherent();
    let table = tables(memory);
    let live = memory.live();
    let anchor = table.anchor(iova(RANGES[0].0, PAGE)).unwrap();
    drop(table);
    assert_eq!(memory.live(), live);
    drop(anchor);
    assert_eq!(memory.live(), 0);
}
