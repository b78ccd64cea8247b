//! Events: what the device says it has stopped \[5.13.6.9\].
//!
//! The device puts events into buffers that it was given beforehand; each goes back as soon as it has been read. Where there is
//! none left the device drops the event, so that a flood costs its later records.
//!
//! # Floods
//!
//! One call hands on at most as many events as there are buffers. If the queue has not been seen empty by then it is *flooded*: it
//! is left as it is, interrupts find nothing to do, and the board's timer comes back to it ([`Config::defer`],
//! [`Events::serve_backlog`]). Buffers are given back by these calls alone, so that the device can raise no more interrupts between
//! two of them than there are buffers. Without [`Config::defer`] a flood holds the handler for as long as it lasts.
//!
//! Nothing is left behind: the mark is taken away *before* the queue is looked at, so that an event which that look does not find
//! has an interrupt that finds no mark.
//!
//! [`Config::defer`]: super::Config::defer
//!
//! # Locking
//!
//! One [`IrqMutex`] around the buffers, and under it that of the queue. The sink is called without.

use super::streams::{Known, Streams};
use crate::Error;
use crate::queue::{Access as Direction, Command, Loans, Parts, Queue, Request};
use crate::spec::iommu::{fault, size};
use ::iommu::{Access, Fault, FaultReason, FaultSink, Iova, Prot, StreamId};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{IrqMutex, barrier};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Events that are carried out of the lock at a time.
const BATCH: usize = 16;

/// Serves the event queue.
pub struct Events {
    queue: Arc<Queue>,
    buffers: IrqMutex<Buffers>,
    streams: Arc<Streams>,
    sink: Arc<dyn FaultSink>,
    delivered: AtomicU64,
    malformed: AtomicU64,
    defer: Option<fn()>,
    /// The deferred calls serve, and nobody else.
    flooded: AtomicBool,
    floods: AtomicU64,
}

struct Buffers {
    requests: Vec<Request>,
    /// Where the next event is expected: a device that uses buffers in order is then read in order.
    next: usize,
}

impl Events {
    /// Gives the device as many buffers as the queue has room for.
    pub(super) fn new(
        queue: Arc<Queue>,
        streams: Arc<Streams>,
        sink: Arc<dyn FaultSink>,
        defer: Option<fn()>,
    ) -> Result<Self, Error> {
        let mut requests = Vec::new();
        let count = usize::from(queue.size());
        requests.try_reserve_exact(count).map_err(|_| Error::OutOfMemory)?;
        for _ in 0..count {
            requests.push(add(&queue)?);
        }
        Ok(Self {
            queue,
            buffers: IrqMutex::new(Buffers { requests, next: 0 }),
            streams,
            sink,
            delivered: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            defer,
            flooded: AtomicBool::new(false),
            floods: AtomicU64::new(0),
        })
    }

    /// Tells the device that there are buffers. It runs.
    pub(super) fn begin(&self) {
        self.queue.kick();
    }

    /// Events that were handed on, and such that made no sense.
    pub fn counts(&self) -> (u64, u64) {
        (self.delivered.load(Ordering::Relaxed), self.malformed.load(Ordering::Relaxed))
    }

    /// How often there were more events than could be handed on at once.
    pub fn floods(&self) -> u64 {
        self.floods.load(Ordering::Relaxed)
    }

    /// Hands on the events that have come. Where they do not end, the rest is left to [`Self::serve_backlog`].
    pub fn service(&self) {
        while !self.flooded.load(Ordering::Acquire) && !self.drain() {
            if let Some(defer) = self.defer {
                self.flooded.store(true, Ordering::Release);
                self.floods.fetch_add(1, Ordering::Relaxed);
                return defer();
            }
        }
    }

    /// What [`Config::defer`](super::Config::defer) asks for.
    pub fn serve_backlog(&self) {
        if self.flooded.swap(false, Ordering::AcqRel) {
            // The mark is gone before the queue is looked at.
            barrier::publish();
            self.service();
        }
    }

    /// Hands on at most as many events as there are buffers. Says whether the queue was seen empty then.
    fn drain(&self) -> bool {
        let mut budget = usize::from(self.queue.size());
        while budget != 0 {
            let mut batch = [None; BATCH];
            let wanted = budget.min(BATCH);
            let mut count = 0;
            {
                let mut buffers = self.buffers.lock();
                for place in batch.iter_mut().take(wanted) {
                    let Some(event) = buffers.take(&self.queue) else { break };
                    *place = Some(event);
                    count += 1;
                }
            }
            self.queue.kick();
            for event in batch.into_iter().flatten() {
                match event.and_then(|bytes| self.decode(&bytes)) {
                    Some(fault) => {
                        self.delivered.fetch_add(1, Ordering::Relaxed);
                        self.sink.fault(&fault);
                    }
                    None => {
                        self.malformed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            // Looked at again after the last was handed on: more may have come meanwhile.
            if count == 0 {
                return true;
            }
            budget -= count;
        }
        false
    }

    /// Says an event in words. `None` if it is none.
    fn decode(&self, bytes: &[u8; size::FAULT]) -> Option<Fault> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let flags = word(fault::FLAGS)?;
        let stream = StreamId::new(word(fault::ENDPOINT)?);
        let address = u64::from(word(fault::ADDRESS)?) | u64::from(word(fault::ADDRESS + 4)?) << 32;
        let iova = (flags & fault::F_ADDRESS != 0).then(|| Iova::new(address));
        let access = match (flags & fault::F_READ != 0, flags & fault::F_WRITE != 0) {
            (_, true) => Some(Access::Write),
            (true, false) => Some(Access::Read),
            (false, false) => None,
        };
        let known = self.streams.look(stream, iova);
        let (reason, event) = match *bytes.first()? {
            fault::R_UNKNOWN => (FaultReason::Other, "VIRTIO_IOMMU_FAULT_R_UNKNOWN"),
            fault::R_DOMAIN => (FaultReason::Blocked, "VIRTIO_IOMMU_FAULT_R_DOMAIN"),
            fault::R_MAPPING => (mapping(known, access), "VIRTIO_IOMMU_FAULT_R_MAPPING"),
            _ => return None,
        };
        // An endpoint that was never attached may be unknown to the device.
        let reason = if known == Known::Blocked { FaultReason::Blocked } else { reason };
        Some(Fault { stream, iova, access, reason, event })
    }
}

/// What of a mapping stopped an access: the event does not say.
fn mapping(known: Known, access: Option<Access>) -> FaultReason {
    let needed = match access {
        Some(Access::Read) => Prot::READ,
        Some(Access::Write) => Prot::WRITE,
        None => Prot::READ | Prot::WRITE,
    };
    match known {
        Known::Attached(Some(prot)) if !prot.contains(needed) => FaultReason::Permission,
        // Mapped meanwhile, perhaps.
        _ => FaultReason::NotMapped,
    }
}

impl Buffers {
    /// Takes the next event, if there is one (`None` inside: it was too short), and gives the buffer back to the device.
    fn take(&mut self, queue: &Arc<Queue>) -> Option<Option<[u8; size::FAULT]>> {
        let count = self.requests.len();
        for step in 0..count {
            let index = (self.next + step) % count;
            let mut bytes = [0; size::FAULT];
            let Some(result) = self.requests.get_mut(index).and_then(|request| request.try_take(&mut bytes)) else {
                continue;
            };
            let event = match result {
                Ok(len) => Some(bytes).filter(|_| len >= size::FAULT as u32),
                // Out of use. The queue has said why, and there is nothing to give back to.
                Err(_) => {
                    self.requests.clear();
                    return None;
                }
            };
            self.next = (index + 1) % count;
            match (add(queue), self.requests.get_mut(index)) {
                (Ok(request), Some(place)) => *place = request,
                _ => {
                    self.requests.swap_remove(index);
                    self.next = 0;
                }
            }
            return Some(event);
        }
        None
    }
}

/// Puts a buffer into the queue.
fn add(queue: &Arc<Queue>) -> Result<Request, Error> {
    queue.add(Command {
        header: &[],
        data: Parts::none(),
        access: Direction::Write,
        response: size::FAULT,
        loans: Loans::none(),
    })
}

impl base::irq::Handler for Events {
    fn handle(&self) {
        self.queue.handle();
        self.service();
        base::notify();
    }
}
