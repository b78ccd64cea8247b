//! Memory whose contents the SMMU sees only once they have been published, and the driver only once it has observed them.
//!
//! Memory is not kind in the other direction either: with an adversary (see [`super::Model::adversary`]) stores that were not
//! published yet may be seen at any moment, word by word and in any order, as evictions from a cache make them.

#![allow(unsafe_code)] // Implements the unsafe trait of table memory.

use super::Model;
use super::rng::Rng;
use crate::bugs::{Bug, seeded};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Weak;
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
    /// Blocks that were ever freed.
    freed: usize,
    /// What happens at the next publication.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
    /// Who looks at this memory of its own accord.
    watchers: Vec<Weak<Model>>,
}

impl State {
    /// Runs `f` on what the SMMU sees and what the processor sees of `words`.
    fn each(&mut self, words: &[AtomicU64], f: impl Fn(&mut Word, &AtomicU64)) {
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
    seen: Vec<Word>,
    /// What the processor sees.
    cells: &'static [AtomicU64],
    freed: bool,
}

#[derive(Clone, Copy, Default)]
struct Word {
    /// What the SMMU sees.
    value: u64,
    /// What the processor had stored when it was last published, or observed.
    clean: u64,
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
            freed: 0,
            meanwhile: None,
            watchers: Vec::new(),
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
        let value = block.seen.get(word).ok_or(BadRead::Nowhere)?.value;
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
        if block.freed { Err(BadRead::Freed) } else { Ok(words.iter().map(|word| word.value).collect()) }
    }

    /// Whether `phys` lies in memory that has been freed.
    pub fn is_freed(&self, phys: u64) -> bool {
        let state = self.state.lock();
        let block = state.blocks.range(..=phys).next_back();
        block.is_some_and(|(base, block)| block.freed && phys - base < block.seen.len() as u64 * 8)
    }

    /// How many blocks were ever freed.
    pub fn frees(&self) -> usize {
        self.state.lock().freed
    }

    /// Runs `f` once, right after the next publication: what another core, or a device, does at that moment.
    pub fn meanwhile(&self, f: impl FnOnce() + Send + 'static) {
        self.state.lock().meanwhile = Some(Box::new(f));
    }

    /// From now on `model` looks at this memory whenever it changes.
    pub(super) fn watch(&self, model: Weak<Model>) {
        self.state.lock().watchers.push(model);
    }

    /// Lets the SMMU see some stores of one block that were not published yet.
    pub(super) fn evict(&self, rng: &mut Rng) {
        let mut state = self.state.lock();
        let Some(pick) = rng.below(u32::try_from(state.blocks.len()).unwrap_or(u32::MAX)) else { return };
        let Some(block) = state.blocks.values_mut().nth(pick as usize) else { return };
        for (word, cell) in block.seen.iter_mut().zip(block.cells) {
            let now = cell.load(SeqCst);
            if now != word.clean && rng.chance(2) {
                (word.value, word.clean) = (now, now);
            }
        }
    }

    /// Gives the models a moment in which something else may happen.
    fn disturb(&self) {
        let (watchers, meanwhile) = {
            let mut state = self.state.lock();
            (state.watchers.clone(), state.meanwhile.take())
        };
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        watchers.iter().filter_map(Weak::upgrade).for_each(|model| model.disturb());
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
        // Coherent memory has one order: what the processor stored before is overwritten, seen or not.
        let clean = block.cells.get(word).map_or(0, |cell| cell.load(SeqCst));
        *block.seen.get_mut(word).ok_or(BadRead::Nowhere)? = Word { value, clean };
        Ok(())
    }
}

impl ModelMemory {
    /// Writes 32 bits as the SMMU does, for messages.
    ///
    /// # Errors
    ///
    /// [`BadRead`].
    pub fn write32(&self, phys: u64, value: u32) -> Result<(), BadRead> {
        let shift = 8 * (phys & 4);
        let old = self.read(phys & !7)?;
        self.write(phys & !7, old & !(0xffff_ffff << shift) | u64::from(value) << shift)
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
        state
            .blocks
            .insert(phys, Block { seen: alloc::vec![Word::default(); words.len()], cells: words, freed: false });
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
        state.freed += 1;
        drop(state);
        self.disturb();
    }

    fn publish(&self, words: &[AtomicU64]) {
        base::barrier::publish();
        let mut state = self.state.lock();
        if !state.forget && !lost(words) {
            state.each(words, |word, cell| {
                let now = cell.load(SeqCst);
                (word.value, word.clean) = (now, now);
            });
        }
        drop(state);
        self.disturb();
    }

    fn observe(&self, words: &[AtomicU64]) {
        base::barrier::device_read();
        self.state.lock().each(words, |word, cell| {
            cell.store(word.value, SeqCst);
            word.clean = word.value;
        });
    }
}

/// Whether a seeded bug forgets to publish these words: leaves have the access flag, links have not.
fn lost(words: &[AtomicU64]) -> bool {
    let first = words.first().map_or(0, |cell| cell.load(SeqCst));
    let leaf = first & 1 << 10 != 0 && first & 1 << 54 != 0;
    let table = words.len() == 1 && first & 0xfff == 3 && first >> 48 == 0;
    leaf && seeded(Bug::LeafNotPublished)
        || table && seeded(Bug::LinkNotPublished)
        || first == 0 && seeded(Bug::ClearNotPublished)
}
