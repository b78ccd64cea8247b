//! Table memory with a walker that sees only what was published, and an independent reader of what it sees.

#![allow(unsafe_code)] // Implements the unsafe trait of table memory.

use crate::contract::{TableBlock, TableMemory};
use crate::pgtable::{Geometry, Granule, PageTable, Stage};
use crate::{OutOfMemory, PhysAddr};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::Mutex;

pub struct FakeMemory {
    /// The walker sees what was stored; publishing is a barrier.
    coherent: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Live blocks by physical address.
    blocks: BTreeMap<u64, Block>,
    /// Physical addresses by where the words are.
    by_words: BTreeMap<usize, u64>,
    /// Freed words, for blocks to come (a leaked slice cannot be given back in safe code).
    pool: Vec<&'static [AtomicU64]>,
    /// The next free physical address.
    next: u64,
    /// Allocations until one fails.
    fail_in: Option<usize>,
    /// Leaves that a coherent walker could have used at the moment of the failure.
    exposed: usize,
    /// The root whose links are checked at each publication.
    root: Option<(u64, Geometry)>,
}

struct Block {
    words: &'static [AtomicU64],
    /// What the walker sees.
    seen: Vec<u64>,
}

/// A leaf as the walker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenLeaf {
    pub iova: u64,
    pub phys: u64,
    pub size: u64,
    pub entry: u64,
}

impl SeenLeaf {
    pub fn contiguous(&self) -> bool {
        self.entry >> 52 & 1 == 1
    }
}

impl FakeMemory {
    pub fn new() -> &'static Self {
        Self::make(false)
    }

    /// Memory that the walker snoops.
    pub fn coherent() -> &'static Self {
        Self::make(true)
    }

    fn make(coherent: bool) -> &'static Self {
        let state = State { next: 0x1_0000_0000, ..State::default() };
        Box::leak(Box::new(Self { coherent, state: Mutex::new(state) }))
    }

    /// Makes tables whose links are checked at every publication.
    pub fn table(&'static self, geometry: Geometry) -> PageTable {
        let table = PageTable::new(geometry, self).unwrap();
        self.state.lock().unwrap().root = Some((table.root().get(), geometry));
        table
    }

    /// Blocks that were allocated and not freed.
    pub fn live(&self) -> usize {
        self.state.lock().unwrap().blocks.len()
    }

    /// Lets the `n`th allocation from now (counted from 0) fail, once.
    pub fn fail_nth(&self, n: usize) {
        self.state.lock().unwrap().fail_in = Some(n);
    }

    /// Takes the failure back, and says whether it was still to come.
    pub fn spare(&self) -> bool {
        self.state.lock().unwrap().fail_in.take().is_some()
    }

    /// How many leaves a walker that sees every store could have used when the allocation failed.
    pub fn exposed(&self) -> usize {
        self.state.lock().unwrap().exposed
    }

    /// Every leaf that the walker can reach, in order.
    pub fn leaves(&self, table: &PageTable) -> Vec<SeenLeaf> {
        let mut leaves = Vec::new();
        let state = self.state.lock().unwrap();
        let level = first_level(table.geometry());
        state.walk(table.root().get(), table.geometry(), level, 0, &mut leaves, self.coherent);
        leaves
    }

    /// What the walker makes of one address.
    pub fn walk(&self, table: &PageTable, iova: u64) -> Option<u64> {
        let state = self.state.lock().unwrap();
        let geometry = table.geometry();
        let (mut phys, mut level) = (table.root().get(), first_level(geometry));
        loop {
            let shift = shift(geometry, level);
            let mask = if level == first_level(geometry) { u64::MAX } else { (1 << bits(geometry)) - 1 };
            let (block, index) = (&state.blocks[&phys], (iova >> shift & mask) as usize);
            let entry = if self.coherent { block.words[index].load(SeqCst) } else { block.seen[index] };
            match entry & 3 {
                3 if level < 3 => (phys, level) = (output(entry), level + 1),
                3 | 1 if (entry & 3 == 3) == (level == 3) => {
                    return Some(output(entry) & !((1 << shift) - 1) | iova & ((1 << shift) - 1));
                }
                _ => return None,
            }
        }
    }
}

fn bits(geometry: &Geometry) -> u32 {
    match geometry.granule() {
        Granule::K4 => 9,
        Granule::K16 => 11,
        Granule::K64 => 13,
    }
}

/// The first level, from the architecture's tables and not from the code under test.
fn first_level(geometry: &Geometry) -> u32 {
    let ias = geometry.input_bits();
    match (geometry.granule(), geometry.stage()) {
        (Granule::K4, Stage::One) => u32::from(ias <= 39),
        (Granule::K4, Stage::Two) => u32::from(ias <= 43),
        (Granule::K16, Stage::One) => u32::from(ias <= 47) + u32::from(ias <= 36),
        (Granule::K16, Stage::Two) => 1 + u32::from(ias <= 40),
        (Granule::K64, Stage::One) => 1 + u32::from(ias <= 42),
        (Granule::K64, Stage::Two) => 1 + u32::from(ias <= 46),
    }
}

fn shift(geometry: &Geometry, level: u32) -> u32 {
    bits(geometry) + 3 + bits(geometry) * (3 - level)
}

fn output(entry: u64) -> u64 {
    entry & 0xffff_ffff_f000
}

impl State {
    /// Collects what the walker reaches below `phys`; a link to what is no table is the kernel's death on real hardware.
    fn walk(&self, phys: u64, geometry: &Geometry, level: u32, base: u64, leaves: &mut Vec<SeenLeaf>, coherent: bool) {
        let block = self.blocks.get(&phys).expect("the walker followed a link to memory that is no table");
        for index in 0..block.seen.len() {
            let entry = if coherent { block.words[index].load(SeqCst) } else { block.seen[index] };
            let size = 1_u64 << shift(geometry, level);
            let iova = base + index as u64 * size;
            match entry & 3 {
                3 if level < 3 => self.walk(output(entry), geometry, level + 1, iova, leaves, coherent),
                3 => leaves.push(SeenLeaf { iova, phys: output(entry), size, entry }),
                1 if level < 3 => leaves.push(SeenLeaf { iova, phys: output(entry), size, entry }),
                _ => {}
            }
        }
    }
}

// SAFETY: words of the test's own, which no hardware walks; a walker of the test sees what was published.
unsafe impl TableMemory for FakeMemory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let mut state = self.state.lock().unwrap();
        assert!(bytes.is_power_of_two() && bytes >= 64);
        match &mut state.fail_in {
            Some(0) => {
                state.fail_in = None;
                if let Some((root, geometry)) = state.root {
                    let mut leaves = Vec::new();
                    state.walk(root, &geometry, first_level(&geometry), 0, &mut leaves, true);
                    state.exposed = leaves.len();
                }
                return Err(OutOfMemory);
            }
            Some(n) => *n -= 1,
            None => {}
        }
        let pooled = state.pool.iter().position(|words| words.len() == bytes / 8);
        let words: &'static [AtomicU64] = match pooled {
            Some(index) => state.pool.swap_remove(index),
            None => Box::leak((0..bytes / 8).map(|_| AtomicU64::new(0)).collect::<Box<[_]>>()),
        };
        words.iter().for_each(|word| word.store(0, SeqCst));
        let phys = state.next.next_multiple_of(bytes as u64);
        state.next = phys + bytes as u64;
        state.by_words.insert(words.as_ptr().addr(), phys);
        state.blocks.insert(phys, Block { words, seen: alloc::vec![0; bytes / 8] });
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(PhysAddr::new(phys), words, self) })
    }

    fn free(&self, phys: PhysAddr, words: &'static [AtomicU64]) {
        let mut state = self.state.lock().unwrap();
        let block = state.blocks.remove(&phys.get()).expect("freed once, by the address that was given out");
        assert!(core::ptr::eq(block.words, words));
        state.by_words.remove(&words.as_ptr().addr());
        if state.root.is_some_and(|(root, _)| root == phys.get()) {
            state.root = None;
        }
        state.pool.push(words);
    }

    fn publishes_by_barrier(&self) -> bool {
        self.coherent
    }

    fn publish(&self, words: &[AtomicU64]) {
        let mut state = self.state.lock().unwrap();
        let at = words.as_ptr().addr();
        let (start, phys) = state.by_words.range(..=at).next_back().map(|(a, b)| (*a, *b)).expect("words of a block");
        let first = (at - start) / 8;
        let block = state.blocks.get_mut(&phys).unwrap();
        for (index, word) in words.iter().enumerate() {
            block.seen[first + index] = word.load(SeqCst);
        }
        // Freed blocks may have been linked by an older table of the same memory: only the current root counts.
        if words.len() <= 1
            && let Some((root, geometry)) = state.root
        {
            state.walk(root, &geometry, first_level(&geometry), 0, &mut Vec::new(), false);
        }
    }
}
