//! Memory whose contents the SMMU sees only once they have been published, and the driver only once it has observed them.

#![allow(unsafe_code)] // Implements the unsafe trait of table memory.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::SeqCst;
use iommu::contract::{TableBlock, TableMemory};
use iommu::{OutOfMemory, PhysAddr};

/// Why a read by the SMMU gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRead {
    /// No memory was ever allocated there.
    Nowhere,
    /// The memory has been freed: the driver let go of it too early.
    Freed,
}

/// Table memory for a [`super::Model`]. Addresses are never given out twice, so that a use of freed memory is seen.
pub struct ModelMemory {
    state: IrqMutex<State>,
}

struct State {
    /// By physical address.
    blocks: BTreeMap<u64, Block>,
    /// Physical addresses by where the words are.
    by_words: BTreeMap<usize, u64>,
    next: u64,
    /// Allocations that succeed before all others fail.
    allowance: Option<usize>,
    /// Publications have no effect.
    forget: bool,
    /// Blocks that are allocated and not freed.
    live: usize,
}

impl State {
    /// Runs `f` on what the SMMU sees and what the processor sees of `words`.
    fn each(&mut self, words: &[AtomicU64], f: impl Fn(&mut u64, &AtomicU64)) {
        let at = words.as_ptr().addr();
        let Some((&base, &phys)) = self.by_words.range(..=at).next_back() else { return };
        let Some(block) = self.blocks.get_mut(&phys) else { return };
        for (seen, cell) in block.seen.iter_mut().skip((at - base) / 8).zip(words) {
            f(seen, cell);
        }
    }
}

struct Block {
    /// What the SMMU sees.
    seen: Vec<u64>,
    freed: bool,
}

impl ModelMemory {
    /// Makes memory. It lives for ever, as the driver asks.
    pub fn new() -> &'static Self {
        let state = State {
            blocks: BTreeMap::new(),
            by_words: BTreeMap::new(),
            next: 0x1_0000_0000,
            allowance: None,
            forget: false,
            live: 0,
        };
        Box::leak(Box::new(Self { state: IrqMutex::new(state) }))
    }

    /// Lets `count` more allocations succeed and all others fail; `None` lifts that.
    pub fn allow(&self, count: Option<usize>) {
        self.state.lock().allowance = count;
    }

    /// Makes publications have no effect, as a driver that forgets them would.
    pub fn lose_publications(&self, lose: bool) {
        self.state.lock().forget = lose;
    }

    /// Blocks that are allocated and not freed.
    pub fn live(&self) -> usize {
        self.state.lock().live
    }

    /// What the SMMU reads at `phys` (a multiple of 8).
    ///
    /// # Errors
    ///
    /// [`BadRead`].
    pub fn read(&self, phys: u64) -> Result<u64, BadRead> {
        let state = self.state.lock();
        let (base, block) = state.blocks.range(..=phys).next_back().ok_or(BadRead::Nowhere)?;
        let word = usize::try_from((phys - base) / 8).map_err(|_| BadRead::Nowhere)?;
        let value = *block.seen.get(word).ok_or(BadRead::Nowhere)?;
        if block.freed { Err(BadRead::Freed) } else { Ok(value) }
    }

    /// What the SMMU reads of the `count` words from `phys`.
    ///
    /// # Errors
    ///
    /// [`BadRead`].
    pub fn read_run(&self, phys: u64, count: usize) -> Result<Vec<u64>, BadRead> {
        let state = self.state.lock();
        let (base, block) = state.blocks.range(..=phys).next_back().ok_or(BadRead::Nowhere)?;
        let word = usize::try_from((phys - base) / 8).map_err(|_| BadRead::Nowhere)?;
        let end = word.checked_add(count).ok_or(BadRead::Nowhere)?;
        let words = block.seen.get(word..end).ok_or(BadRead::Nowhere)?;
        if block.freed { Err(BadRead::Freed) } else { Ok(words.to_vec()) }
    }

    /// Writes as the SMMU does: the processor sees it once it has observed it.
    ///
    /// # Errors
    ///
    /// [`BadRead`].
    pub fn write(&self, phys: u64, value: u64) -> Result<(), BadRead> {
        let mut state = self.state.lock();
        let (base, block) = state.blocks.range_mut(..=phys).next_back().ok_or(BadRead::Nowhere)?;
        let word = usize::try_from((phys - base) / 8).map_err(|_| BadRead::Nowhere)?;
        if block.freed {
            return Err(BadRead::Freed);
        }
        *block.seen.get_mut(word).ok_or(BadRead::Nowhere)? = value;
        Ok(())
    }
}

// SAFETY: the blocks are allocations of the model's own, zeroed for processor and walker alike, and named by addresses that it
// gives to one owner at a time.
unsafe impl TableMemory for ModelMemory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let mut state = self.state.lock();
        match &mut state.allowance {
            Some(0) => return Err(OutOfMemory),
            Some(count) => *count -= 1,
            None => {}
        }
        let size = u64::try_from(bytes).map_err(|_| OutOfMemory)?;
        let phys = state.next.next_multiple_of(size);
        // A gap after each block: what runs past its end finds nothing.
        state.next = phys + 2 * size;
        let words: Vec<AtomicU64> = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        let words: &'static [AtomicU64] = Box::leak(words.into_boxed_slice());
        state.by_words.insert(words.as_ptr().addr(), phys);
        state.blocks.insert(phys, Block { seen: alloc::vec![0; words.len()], freed: false });
        state.live += 1;
        drop(state);
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(PhysAddr::new(phys), words, self) })
    }

    fn free(&self, phys: PhysAddr, _words: &'static [AtomicU64]) {
        let mut state = self.state.lock();
        if let Some(block) = state.blocks.get_mut(&phys.get()) {
            block.freed = true;
        }
        state.live -= 1;
    }

    fn publish(&self, words: &[AtomicU64]) {
        base::barrier::publish();
        let mut state = self.state.lock();
        if !state.forget {
            state.each(words, |seen, cell| *seen = cell.load(SeqCst));
        }
    }

    fn observe(&self, words: &[AtomicU64]) {
        base::barrier::device_read();
        self.state.lock().each(words, |seen, cell| cell.store(*seen, SeqCst));
    }
}
