//! The event queue (IHI 0070, 3.5 and 7.2 to 7.4): records in, [`Fault`]s out.
//!
//! # No lost wake-up
//!
//! The SMMU interrupts when the queue becomes non-empty, not for each record. So the queue is looked at again after every
//! write of EVENTQ_CONS, and left only when it was seen empty after that. The work of one call is bounded all the same: after
//! twice the queue's size in records a flood is skipped unread (two register accesses for a whole queue), and if even that does
//! not keep up, the queue is left with a backlog, for which no interrupt will come. Who sees to it then is in `service.rs`.
//!
//! # Locking
//!
//! That of [`Inbox`], for taking up to [`CHUNK`] records out of the queue. Records are delivered after it is released, so a sink
//! may take locks of its own. Called from the interrupt handler: no allocation, no waiting.

use crate::Error;
use crate::counters::Counters;
use crate::inbox::{Inbox, Offsets, Tally};
use crate::registers::Registers;
use crate::spec::event::{Event, EventKind, WORDS};
use crate::spec::registers as reg;
use iommu::contract::TableMemory;
use iommu::{Access, Fault, FaultReason, FaultSink, Iova, StreamId};

/// Records taken out under one lock.
const CHUNK: usize = 16;
/// Different faults of one call that are told apart; a repetition of an older one is reported again.
const DISTINCT: usize = 16;
/// How often a flood is skipped before the call gives up on seeing the queue empty.
const SKIPS: u32 = 64;

const OFFSETS: Offsets = Offsets { base: reg::EVENTQ_BASE, prod: reg::EVENTQ_PROD, cons: reg::EVENTQ_CONS };

pub(crate) struct EventQueue {
    inbox: Inbox<WORDS>,
}

impl EventQueue {
    /// Allocates a queue of at most 2^`log2` records.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(log2: u32, memory: &'static dyn TableMemory) -> Result<Self, Error> {
        Ok(Self { inbox: Inbox::new(log2, OFFSETS, memory)? })
    }

    /// The number of records that fit.
    pub fn entries(&self) -> u32 {
        self.inbox.entries()
    }

    /// Tells the SMMU where the queue is, empty. The queue is off.
    pub fn program(&self, registers: &impl Registers) {
        self.inbox.program(registers);
    }

    /// Empties the queue into `sink`. Says whether it was seen empty in the end: then the next record interrupts.
    pub fn drain(&self, registers: &impl Registers, counters: &Counters, sink: &dyn FaultSink) -> bool {
        let tally = Tally {
            overflows: &counters.event_overflows,
            skipped: &counters.skipped_events,
            bad_indexes: &counters.bad_indexes,
        };
        let mut seen = Seen::default();
        let mut any = false;
        let mut budget = 2 * self.inbox.entries() as usize;
        while budget != 0 {
            let mut records = [[0; WORDS]; CHUNK];
            let count = self.inbox.take(registers, &tally, &mut records);
            if count == 0 {
                if any {
                    base::notify();
                }
                return true;
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
        let empty = (0..SKIPS).any(|_| self.inbox.skip(registers, &tally));
        base::notify();
        empty
    }
}

/// What makes two faults the same: stream, page, access and event.
type Key = (StreamId, Option<u64>, Option<Access>, &'static str);

/// The faults of one call, to tell repetitions: one faulting DMA of 4 KiB can make a thousand records.
#[derive(Default)]
pub(crate) struct Seen {
    keys: [Option<Key>; DISTINCT],
    next: usize,
}

impl Seen {
    /// Whether no fault like this was seen lately.
    pub fn is_new(&mut self, fault: &Fault) -> bool {
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
