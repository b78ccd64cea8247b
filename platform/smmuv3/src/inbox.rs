//! A queue that the SMMU fills and the driver empties: what the event queue and the PRI queue have in common
//! (IHI 0070, 3.5.1, 7.4 and 8.1).
//!
//! # Locking
//!
//! An [`IrqMutex`], a leaf, around taking records out and writing the read index. For handlers: no allocation, no waiting.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counter;
use crate::registers::Registers;
use crate::spec::queue::QueueSize;
use crate::spec::registers::{OVFLG, queue_base};
use base::IrqMutex;
use core::sync::atomic::Ordering;
use iommu::contract::{TableBlock, TableMemory};

/// Where a queue's registers are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offsets {
    pub base: usize,
    pub prod: usize,
    pub cons: usize,
}

/// What is counted.
pub(crate) struct Tally<'a> {
    pub overflows: &'a Counter,
    pub skipped: &'a Counter,
    pub bad_indexes: &'a Counter,
}

/// A queue of records of `WORDS` 64-bit words.
pub(crate) struct Inbox<const WORDS: usize> {
    size: QueueSize,
    block: TableBlock,
    offsets: Offsets,
    /// The read index as last written: index, wrap bit and OVACKFLG.
    cons: IrqMutex<u32>,
}

impl<const WORDS: usize> Inbox<WORDS> {
    /// Allocates a queue of at most 2^`log2` records.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(log2: u32, offsets: Offsets, memory: &'static dyn TableMemory) -> Result<Self, Error> {
        let size = QueueSize::new(log2);
        let bytes = (size.entries() as usize * WORDS * size_of::<u64>()).max(64);
        Ok(Self { size, block: memory.allocate(bytes)?, offsets, cons: IrqMutex::new(0) })
    }

    /// The number of records that fit.
    pub fn entries(&self) -> u32 {
        self.size.entries()
    }

    /// Tells the SMMU where the queue is, empty. The queue is off.
    pub fn program(&self, registers: &impl Registers) {
        let mut cons = self.cons.lock();
        *cons = 0;
        let base = queue_base::ALLOC.mask()
            | queue_base::ADDR.address(self.block.phys().get())
            | queue_base::LOG2SIZE.put(u64::from(self.size.log2()));
        registers.write64(self.offsets.base, base);
        registers.write32(self.offsets.prod, 0);
        registers.write32(self.offsets.cons, 0);
    }

    /// Takes as many records out of the queue as there are, at most `records.len()`, and says how many.
    pub fn take(&self, registers: &impl Registers, tally: &Tally<'_>, records: &mut [[u64; WORDS]]) -> usize {
        let mut cons = self.cons.lock();
        let prod = registers.read32(self.offsets.prod);
        let waiting = self.size.distance(*cons, prod);
        if waiting > self.size.entries() {
            // Indexes that cannot be: begin anew where the SMMU says it is.
            tally.bad_indexes.add(1);
            self.acknowledge(registers, tally, &mut cons, prod, prod);
            return 0;
        }
        let count = (waiting as usize).min(records.len());
        for (i, record) in (0..).zip(records.iter_mut().take(count)) {
            let word = self.size.slot(self.size.advance(*cons, i)) * WORDS;
            if !seeded(Bug::EventsNotObserved) {
                self.block.observe(word, word + WORDS);
            }
            for (place, cell) in record.iter_mut().zip(self.block.iter().skip(word)) {
                *place = cell.load(Ordering::Relaxed);
            }
        }
        let overflowed = (prod ^ *cons) & ovflg() != 0;
        if count != 0 || overflowed {
            // The records have been read before the SMMU may overwrite them.
            base::barrier::publish();
            #[allow(clippy::cast_possible_truncation)] // At most a queue's size.
            let next = self.size.advance(*cons, count as u32);
            self.acknowledge(registers, tally, &mut cons, prod, next);
        }
        count
    }

    /// Throws away what is in the queue, unread. Says whether it was empty.
    pub fn skip(&self, registers: &impl Registers, tally: &Tally<'_>) -> bool {
        let mut cons = self.cons.lock();
        let prod = registers.read32(self.offsets.prod);
        let waiting = self.size.distance(*cons, prod);
        if waiting == 0 {
            return true;
        }
        tally.skipped.add(u64::from(waiting.min(self.size.entries())));
        self.acknowledge(registers, tally, &mut cons, prod, prod);
        false
    }

    /// Writes the read index: `index`, and the overflow of `prod` acknowledged.
    fn acknowledge(&self, registers: &impl Registers, tally: &Tally<'_>, cons: &mut u32, prod: u32, index: u32) {
        if (prod ^ *cons) & ovflg() != 0 {
            tally.overflows.add(1);
        }
        let overflow = if seeded(Bug::OverflowNotAcknowledged) { *cons } else { prod };
        *cons = (index & self.size.mask()) | (overflow & ovflg());
        if !seeded(Bug::EventsNotTakenOut) {
            registers.write32(self.offsets.cons, *cons);
        }
    }
}

const fn ovflg() -> u32 {
    OVFLG.mask() as u32
}
