//! The PRI queue (IHI 0070, chapter 8): devices that ask for pages, all of which are told no.
//!
//! Nothing is paged in here: what a device may reach is mapped before it is told of it. So every page request group is
//! answered with ResponseFailure at its last request, which tells the device to ask no more, and reported as a fault. The SMMU
//! answers for itself what it drops in an overflow (8.1).
//!
//! A record is taken out before its group is answered, because the answer entitles the device to another request. An answer for
//! which the command queue has no room is owed, and given by a later call; the queue is then left as it is.
//!
//! # Locking
//!
//! That of [`Inbox`], and an [`IrqMutex`] around what is owed; never both, and neither while commands are issued. Called from the
//! interrupt handler: no allocation, no waiting.

use crate::Error;
use crate::cmdq::CommandQueue;
use crate::counters::Counters;
use crate::evtq::Seen;
use crate::inbox::{Inbox, Offsets, Tally};
use crate::registers::Registers;
use crate::spec::command::{Command, PriResponse};
use crate::spec::page_request::{PageRequest, WORDS};
use crate::spec::registers as reg;
use base::IrqMutex;
use iommu::contract::TableMemory;
use iommu::{Access, Fault, FaultReason, FaultSink, Iova, StreamId};

/// Answers that can be owed: each core that serves the queue owes at most one at a time.
const OWED: usize = base::cpu::MAX_CPUS;

const OFFSETS: Offsets = Offsets { base: reg::PRIQ_BASE, prod: reg::PRIQ_PROD, cons: reg::PRIQ_CONS };

pub(crate) struct PriQueue {
    inbox: Inbox<WORDS>,
    owed: IrqMutex<[Option<Command>; OWED]>,
}

impl PriQueue {
    /// Allocates a queue of at most 2^`log2` records.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(log2: u32, memory: &'static dyn TableMemory) -> Result<Self, Error> {
        Ok(Self { inbox: Inbox::new(log2, OFFSETS, memory)?, owed: IrqMutex::new([None; OWED]) })
    }

    /// Tells the SMMU where the queue is, empty. The queue is off.
    pub fn program(&self, registers: &impl Registers) {
        self.inbox.program(registers);
    }

    /// Answers everything in the queue, and reports it to `sink`. Says whether the queue was seen empty in the end: then the next
    /// record interrupts.
    pub fn drain(
        &self,
        registers: &impl Registers,
        commands: &CommandQueue,
        counters: &Counters,
        sink: &dyn FaultSink,
    ) -> bool {
        let tally = Tally {
            overflows: &counters.page_request_overflows,
            skipped: &counters.page_requests,
            bad_indexes: &counters.bad_indexes,
        };
        let mut seen = Seen::default();
        for _ in 0..2 * self.inbox.entries() {
            if !self.settle(registers, commands) {
                return false;
            }
            let mut record = [[0; WORDS]];
            if self.inbox.take(registers, &tally, &mut record) == 0 {
                return true;
            }
            let [words] = record;
            let request = PageRequest::decode(words);
            counters.page_requests.add(1);
            if request.is_stop_marker() {
                continue;
            }
            let fault = fault(&request);
            if seen.is_new(&fault) {
                sink.fault(&fault);
            }
            if request.last {
                let answer = Command::PriResp {
                    sid: request.stream,
                    ssid: request.substream,
                    group: request.group,
                    response: PriResponse::ResponseFailure,
                };
                if !commands.post(registers, answer) {
                    self.owe(answer, counters);
                }
            }
        }
        false
    }

    /// Gives the answers that are owed. Says whether none is any more.
    fn settle(&self, registers: &impl Registers, commands: &CommandQueue) -> bool {
        loop {
            let next = self.owed.lock().iter_mut().find_map(Option::take);
            let Some(answer) = next else { return true };
            if !commands.post(registers, answer) {
                self.put_back(answer);
                return false;
            }
        }
    }

    fn owe(&self, answer: Command, counters: &Counters) {
        if !self.put_back(answer) {
            counters.unanswered_page_requests.add(1);
        }
    }

    fn put_back(&self, answer: Command) -> bool {
        match self.owed.lock().iter_mut().find(|place| place.is_none()) {
            Some(place) => {
                *place = Some(answer);
                true
            }
            None => false,
        }
    }
}

/// A request in words that do not depend on the IOMMU.
fn fault(request: &PageRequest) -> Fault {
    Fault {
        stream: StreamId::new(request.stream),
        iova: Some(Iova::new(request.address)),
        access: Some(if request.write { Access::Write } else { Access::Read }),
        reason: FaultReason::NotMapped,
        event: "PRI page request",
    }
}
