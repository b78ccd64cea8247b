//! The event queue (IHI 0070, 3.5 and 7.2 to 7.4): records in, [`Fault`]s out.
//!
//! # No lost wake-up
//!
//! The SMMU interrupts when the queue becomes non-empty, not for each record. So the queue is looked at again after every
//! write of EVENTQ_CONS, and left only when it was seen empty after that. The work of one call is bounded all the same: after
//! twice the queue's size in records a flood is skipped unread (two register accesses for a whole queue), and if even that does
//! not keep up, [`EventQueue::backlog`] stays set until a later call has seen the queue empty.
//!
//! # Locking
//!
//! An [`IrqMutex`] for taking up to [`CHUNK`] records out of the queue. Records are delivered after it is released, so a sink
//! may take locks of its own. Called from the interrupt handler: no allocation, no waiting.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::Registers;
use crate::spec::event::{Event, EventKind, SIZE, WORDS};
use crate::spec::queue::QueueSize;
use crate::spec::registers::{self as reg, OVFLG, queue_base};
use base::IrqMutex;
use core::sync::atomic::{AtomicBool, Ordering};
use iommu::contract::{TableBlock, TableMemory};
use iommu::{Access, Fault, FaultReason, FaultSink, Iova, StreamId};

/// Records taken out under one lock.
const CHUNK: usize = 16;
/// Different faults of one call that are told apart; a repetition of an older one is reported again.
const DISTINCT: usize = 16;
/// How often a flood is skipped before the call gives up on seeing the queue empty.
const SKIPS: u32 = 64;

pub(crate) struct EventQueue {
    size: QueueSize,
    block: TableBlock,
    /// EVENTQ_CONS as last written: index, wrap bit and OVACKFLG.
    cons: IrqMutex<u32>,
    backlog: AtomicBool,
}

impl EventQueue {
    /// Allocates a queue of at most 2^`log2` records.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(log2: u32, memory: &'static dyn TableMemory) -> Result<Self, Error> {
        let size = QueueSize::new(log2);
        let bytes = (size.entries() as usize * SIZE).max(64);
        Ok(Self { size, block: memory.allocate(bytes)?, cons: IrqMutex::new(0), backlog: AtomicBool::new(false) })
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
        registers.write64(reg::EVENTQ_BASE, base);
        registers.write32(reg::EVENTQ_PROD, 0);
        registers.write32(reg::EVENTQ_CONS, 0);
    }

    /// Whether a flood was left behind.
    pub fn backlog(&self) -> bool {
        self.backlog.load(Ordering::Acquire)
    }

    /// Empties the queue into `sink`.
    pub fn drain(&self, registers: &impl Registers, counters: &Counters, sink: &dyn FaultSink) {
        let mut seen = Seen::default();
        let mut any = false;
        let mut budget = 2 * self.size.entries() as usize;
        while budget != 0 {
            let mut records = [[0; WORDS]; CHUNK];
            let count = self.take(registers, counters, &mut records);
            if count == 0 {
                self.backlog.store(false, Ordering::Release);
                if any {
                    base::notify();
                }
                return;
            }
            any = true;
            budget = budget.saturating_sub(count);
            for words in records.iter().take(count) {
                counters.events.add(1);
                let fault = fault(&Event::decode(*words));
                if seen.is_new(&fault) {
                    sink.fault(&fault);
                } else {
                    counters.coalesced_events.add(1);
                }
            }
        }
        let empty = (0..SKIPS).any(|_| self.skip(registers, counters));
        self.backlog.store(!empty, Ordering::Release);
        base::notify();
    }

    /// Takes records out of the queue and says how many.
    fn take(&self, registers: &impl Registers, counters: &Counters, records: &mut [[u64; WORDS]; CHUNK]) -> usize {
        let mut cons = self.cons.lock();
        let prod = registers.read32(reg::EVENTQ_PROD);
        let waiting = self.size.distance(*cons, prod);
        if waiting > self.size.entries() {
            // Indexes that cannot be: begin anew where the SMMU says it is.
            counters.bad_indexes.add(1);
            self.acknowledge(registers, counters, &mut cons, prod, prod);
            return 0;
        }
        let count = (waiting as usize).min(CHUNK);
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
            #[allow(clippy::cast_possible_truncation)] // At most CHUNK.
            let next = self.size.advance(*cons, count as u32);
            self.acknowledge(registers, counters, &mut cons, prod, next);
        }
        count
    }

    /// Throws away what is in the queue, unread. Says whether it was empty.
    fn skip(&self, registers: &impl Registers, counters: &Counters) -> bool {
        let mut cons = self.cons.lock();
        let prod = registers.read32(reg::EVENTQ_PROD);
        let waiting = self.size.distance(*cons, prod);
        if waiting == 0 {
            return true;
        }
        counters.skipped_events.add(u64::from(waiting.min(self.size.entries())));
        self.acknowledge(registers, counters, &mut cons, prod, prod);
        false
    }

    /// Writes EVENTQ_CONS: `index`, and the overflow of `prod` acknowledged.
    fn acknowledge(&self, registers: &impl Registers, counters: &Counters, cons: &mut u32, prod: u32, index: u32) {
        if (prod ^ *cons) & ovflg() != 0 {
            counters.event_overflows.add(1);
        }
        let overflow = if seeded(Bug::OverflowNotAcknowledged) { *cons } else { prod };
        *cons = (index & self.size.mask()) | (overflow & ovflg());
        if !seeded(Bug::EventsNotTakenOut) {
            registers.write32(reg::EVENTQ_CONS, *cons);
        }
    }
}

const fn ovflg() -> u32 {
    OVFLG.mask() as u32
}

/// What makes two faults the same: stream, page, access and event.
type Key = (StreamId, Option<u64>, Option<Access>, &'static str);

/// The faults of one call, to tell repetitions: one faulting DMA of 4 KiB can make a thousand records.
#[derive(Default)]
struct Seen {
    keys: [Option<Key>; DISTINCT],
    next: usize,
}

impl Seen {
    fn is_new(&mut self, fault: &Fault) -> bool {
        let page = fault.iova.map(|iova| iova.get() & !(iommu::PAGE_SIZE - 1));
        let key = Some((fault.stream, page, fault.access, fault.event));
        if self.keys.contains(&key) {
            return false;
        }
        if let Some(place) = self.keys.get_mut(self.next % DISTINCT) {
            *place = key;
        }
        self.next = self.next.wrapping_add(1);
        true
    }
}

/// An event in words that do not depend on the IOMMU.
pub fn fault(event: &Event) -> Fault {
    let access = |read| if read { Access::Read } else { Access::Write };
    let reason = match event.kind {
        EventKind::FTranslation { .. } => FaultReason::NotMapped,
        EventKind::FPermission { .. } => FaultReason::Permission,
        EventKind::FAddrSize { .. } => FaultReason::AddressSize,
        EventKind::CBadStreamId
        | EventKind::FBadAtsTreq { .. }
        | EventKind::FStreamDisabled
        | EventKind::FTranslForbidden { .. }
        | EventKind::CBadSubstreamId => FaultReason::Blocked,
        EventKind::FSteFetch { .. }
        | EventKind::CBadSte
        | EventKind::FCdFetch { .. }
        | EventKind::CBadCd
        | EventKind::FWalkEabt { .. }
        | EventKind::FAccess { .. }
        | EventKind::FTlbConflict { .. }
        | EventKind::FCfgConflict { .. }
        | EventKind::FVmsFetch { .. } => FaultReason::Configuration,
        _ => FaultReason::Other,
    };
    let read = match event.kind {
        EventKind::FTranslForbidden { read, .. } => Some(read),
        kind => kind.transaction().map(|transaction| transaction.read),
    };
    Fault {
        stream: StreamId::new(event.stream),
        iova: event.kind.input_addr().map(Iova::new),
        access: read.map(access),
        reason,
        event: event.kind.name(),
    }
}
