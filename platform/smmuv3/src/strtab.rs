//! The stream table (IHI 0070, 3.3 and 5.1).
//!
//! Two levels where the SMMU has them: a level-1 descriptor has Span 0 until a stream below it is first attached, so a StreamID
//! that nobody knows has no STE at all and is blocked. A second-level table is filled with STEs that abort before it is linked;
//! a linear table, before the SMMU is told of it. Tables are never unlinked.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::descriptors::ste_abort;
use crate::entry::{Entry, WORDS};
use crate::features::Features;
use crate::registers::Registers;
use crate::spec::registers::{self as reg, strtab_base, strtab_base_cfg};
use crate::spec::ste;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Relaxed, Release};
use iommu::contract::{TableBlock, TableMemory};
use iommu::{OutOfMemory, StreamId};
use spin::Once;

/// Bits of a StreamID that the second level resolves: 256 STEs in 16 KiB.
const SPLIT: u8 = 8;
/// The most StreamID bits of a linear table: 65 536 STEs in 4 MiB.
const LINEAR_MAX: u8 = 16;
/// The most StreamID bits of a two-level table: a first level of 512 KiB.
const TWO_LEVEL_MAX: u8 = 24;

pub(crate) struct StreamTable {
    memory: &'static dyn TableMemory,
    /// Bits of the StreamIDs that the table has a place for.
    bits: u8,
    layout: Layout,
}

enum Layout {
    Linear(TableBlock),
    TwoLevel {
        first: TableBlock,
        /// As many as `first` has descriptors.
        second: Box<[Once<TableBlock>]>,
    },
}

/// Where one entry is: the STE of a stream, or the CD of a substream.
pub(crate) struct Slot<'a> {
    block: &'a TableBlock,
    word: usize,
}

impl StreamTable {
    /// Makes a table in which every stream is blocked, for as many StreamIDs as the SMMU has, at most 2^`bits`.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new(features: &Features, bits: u8, memory: &'static dyn TableMemory) -> Result<Self, OutOfMemory> {
        let bits = bits.min(features.stream_id_bits);
        let (bits, layout) = if features.two_level && bits > SPLIT {
            let bits = bits.min(TWO_LEVEL_MAX);
            let entries = 1_usize << (bits - SPLIT);
            let mut second = Vec::new();
            second.try_reserve_exact(entries).map_err(|_| OutOfMemory)?;
            second.resize_with(entries, Once::new);
            let first = memory.allocate((entries * 8).max(64))?;
            (bits, Layout::TwoLevel { first, second: second.into_boxed_slice() })
        } else {
            let bits = bits.min(LINEAR_MAX);
            (bits, Layout::Linear(Self::blocked(bits, memory)?))
        };
        Ok(Self { memory, bits, layout })
    }

    /// A table of 2^`bits` STEs that abort, visible to the SMMU.
    fn blocked(bits: u8, memory: &'static dyn TableMemory) -> Result<TableBlock, OutOfMemory> {
        let block = memory.allocate(ste::SIZE << bits)?;
        let abort = ste_abort();
        for (cell, word) in block.iter().zip(abort.iter().cycle()) {
            cell.store(*word, Relaxed);
        }
        if !seeded(Bug::StesNotPublished) {
            block.publish(0, block.len());
        }
        Ok(block)
    }

    /// Tells the SMMU where the table is. Translation is off.
    pub fn program(&self, registers: &impl Registers) {
        let size = strtab_base_cfg::LOG2SIZE.put(u64::from(self.bits));
        let (base, config) = match &self.layout {
            Layout::Linear(table) => (table.phys(), size),
            Layout::TwoLevel { first, .. } => {
                (first.phys(), size | strtab_base_cfg::SPLIT.put(u64::from(SPLIT)) | strtab_base_cfg::FMT.put(1))
            }
        };
        registers.write64(reg::STRTAB_BASE, strtab_base::RA.mask() | strtab_base::ADDR.address(base.get()));
        #[allow(clippy::cast_possible_truncation)] // A 32-bit register.
        registers.write32(reg::STRTAB_BASE_CFG, config as u32);
    }

    /// Bits of the StreamIDs that have a place.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether there are two levels.
    pub fn is_two_level(&self) -> bool {
        matches!(self.layout, Layout::TwoLevel { .. })
    }

    /// The STE of `stream`; makes and links the second-level table if there is none. `Ok(None)` for a StreamID beyond the
    /// table.
    ///
    /// The link is visible to the SMMU on return, but the SMMU may have cached that there was none: the first invalidation of
    /// the STE includes the L1STD (CFGI_STE with Leaf clear).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn slot(&self, stream: StreamId) -> Result<Option<Slot<'_>>, Error> {
        let id = stream.get() as usize;
        if u64::from(stream.get()) >> self.bits != 0 {
            return Ok(None);
        }
        match &self.layout {
            Layout::Linear(block) => Ok(Some(Slot { block, word: id * WORDS })),
            Layout::TwoLevel { first, second } => {
                let index = id >> SPLIT;
                let Some(place) = second.get(index) else { return Ok(None) };
                let block = match place.get() {
                    Some(block) => block,
                    None => self.link(first, index, place)?,
                };
                Ok(Some(Slot { block, word: (id & ((1 << SPLIT) - 1)) * WORDS }))
            }
        }
    }

    fn link<'a>(&self, first: &TableBlock, index: usize, place: &'a Once<TableBlock>) -> Result<&'a TableBlock, Error> {
        let fresh = Self::blocked(SPLIT, self.memory)?;
        // Interrupts are masked so that a handler of this core never spins on what its own core has begun; a core that comes
        // second waits for a store and a barrier, and gives its table back.
        Ok(base::cpu::without_interrupts(|| {
            place.call_once(|| {
                let descriptor = ste::L1STD_L2PTR.address(fresh.phys().get())
                    | ste::L1STD_SPAN.put(u64::from(SPLIT) + u64::from(!seeded(Bug::SpanTooShort)));
                if let Some(cell) = first.get(index) {
                    cell.store(descriptor, Release);
                }
                if !seeded(Bug::L1NotPublished) {
                    first.publish(index, index + 1);
                }
                fresh
            })
        }))
    }
}

impl<'a> Slot<'a> {
    /// The entry that begins at `word` of `block`.
    pub fn new(block: &'a TableBlock, word: usize) -> Self {
        Self { block, word }
    }

    /// The entry as it is in memory.
    pub fn read(&self) -> Entry {
        core::array::from_fn(|i| self.block.get(self.word + i).map_or(0, |cell| cell.load(Relaxed)))
    }

    /// Stores one word and makes it visible to the SMMU.
    pub fn store(&self, index: usize, word: u64) {
        if let Some(cell) = self.block.get(self.word + index) {
            cell.store(word, Release);
        }
        if index != 0 || !seeded(Bug::SteNotPublished) {
            self.block.publish(self.word + index, self.word + index + 1);
        }
    }
}
