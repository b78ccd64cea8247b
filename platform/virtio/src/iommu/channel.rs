//! Requests to the device and their answers.
//!
//! A request is answered, or lost: sent without an answer in time, or with an answer of a queue that broke its rules. Whether a
//! lost request was carried out is unknown, and the device is not asked anything any more: the channel is dead.
//!
//! # Locking
//!
//! Those of the queue. Answers are polled, so that it does not matter whether the caller has interrupts masked.

use super::request::Encoded;
use crate::Error;
use crate::queue::{Access, Command, Loans, Parts, Queue, Request};
use crate::spec::iommu::{size, status};
use ::iommu::AttachError;
use alloc::string::String;
use alloc::sync::Arc;
use base::Deadline;
use base::time::Duration;
use core::sync::atomic::{AtomicBool, Ordering};

/// Requests that one call has in flight at a time.
const WINDOW: usize = 32;
/// Looks at the queue before the core takes a nap.
const LOOKS: u32 = 200;
/// What a status becomes that the device did not write in full.
const UNWRITTEN: u8 = u8::MAX;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The device has answered with this status.
    Answered(u8),
    /// The device has, or had, the request; whether it was carried out is unknown.
    Lost,
    /// The device has never seen it.
    NotSent,
}

impl Outcome {
    /// Whether the request was carried out.
    pub fn is_ok(self) -> bool {
        self == Self::Answered(status::OK)
    }
}

/// What to say of an attachment, unless it succeeded.
pub(super) fn attached(outcome: Outcome, endpoint: ::iommu::StreamId) -> Result<(), AttachError> {
    match outcome {
        Outcome::Answered(status::OK) => Ok(()),
        Outcome::Answered(status::NOENT) => Err(AttachError::NoSuchStream(endpoint)),
        Outcome::Answered(status::NOMEM) => Err(AttachError::OutOfMemory),
        Outcome::Answered(_) => Err(AttachError::Unsupported("this attachment")),
        Outcome::Lost => Err(AttachError::TimedOut),
        Outcome::NotSent => Err(AttachError::Dead),
    }
}

/// The request queue.
pub(super) struct Channel {
    name: String,
    queue: Arc<Queue>,
    timeout: Duration,
    dead: AtomicBool,
}

impl Channel {
    pub fn new(name: String, queue: Arc<Queue>, timeout: Duration) -> Self {
        Self { name, queue, timeout, dead: AtomicBool::new(false) }
    }

    /// Whether the device is asked nothing any more.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// When a wait that begins now gives up.
    pub fn deadline(&self) -> Deadline {
        Deadline::after(self.timeout)
    }

    /// The name, for reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn die(&self, why: &Error) {
        if !self.dead.swap(true, Ordering::AcqRel) {
            log::error!("{}: it is asked nothing any more: {why}", self.name);
        }
    }

    /// Sends one request and awaits its answer.
    pub fn ask(&self, request: &Encoded) -> Outcome {
        self.ask_for(request, &mut [0; size::TAIL])
    }

    /// Sends one request whose answer, all of `answer`, ends with the status.
    pub fn ask_for(&self, request: &Encoded, answer: &mut [u8]) -> Outcome {
        let deadline = self.deadline();
        let sent = self.add(request, answer.len(), deadline);
        self.queue.kick();
        sent.map_or(Outcome::NotSent, |sent| self.finish(sent, answer, deadline))
    }

    /// Sends `requests`, several at a time, and tells `done` of each, in order.
    pub fn ask_all(&self, requests: impl Iterator<Item = Encoded>, mut done: impl FnMut(Outcome)) {
        let mut requests = requests.peekable();
        while requests.peek().is_some() {
            let deadline = self.deadline();
            let mut window = [const { None::<Request> }; WINDOW];
            let mut unsent = 0;
            for place in &mut window {
                let Some(request) = requests.next() else { break };
                *place = self.add(&request, size::TAIL, deadline);
                if place.is_none() {
                    unsent = 1;
                    break;
                }
            }
            self.queue.kick();
            for sent in window.iter_mut().map_while(Option::take) {
                done(self.finish(sent, &mut [0; size::TAIL], deadline));
            }
            for _ in 0..unsent {
                done(Outcome::NotSent);
            }
        }
    }

    /// Puts a request into the queue, waiting for room until `deadline`. The caller kicks.
    fn add(&self, request: &Encoded, answer: usize, deadline: Deadline) -> Option<Request> {
        let mut looks = 0;
        loop {
            if self.is_dead() {
                return None;
            }
            let command = Command {
                header: request.bytes(),
                data: Parts::none(),
                access: Access::Read,
                response: answer,
                loans: Loans::none(),
            };
            match self.queue.add(command) {
                Ok(sent) => return Some(sent),
                Err(Error::QueueFull) if !deadline.has_passed() => {
                    // Those in it may not have been announced yet.
                    self.queue.kick();
                    self.queue.drain();
                    pause(&mut looks, deadline);
                }
                // The others' requests are in the way, and theirs is the judgement.
                Err(Error::QueueFull) => return None,
                Err(error) => {
                    self.die(&error);
                    return None;
                }
            }
        }
    }

    /// Awaits the answer to a request.
    fn finish(&self, mut sent: Request, answer: &mut [u8], deadline: Deadline) -> Outcome {
        let mut looks = 0;
        loop {
            // An answer that came in the last moment counts.
            let expired = deadline.has_passed();
            match sent.try_take(answer) {
                Some(Ok(len)) => {
                    let whole = usize::try_from(len).is_ok_and(|len| len >= answer.len());
                    let tail = answer.len().checked_sub(size::TAIL).and_then(|at| answer.get(at));
                    return Outcome::Answered(tail.copied().filter(|_| whole).unwrap_or(UNWRITTEN));
                }
                Some(Err(error)) => {
                    self.die(&error);
                    return Outcome::Lost;
                }
                None if expired => {
                    self.die(&Error::TimedOut);
                    return Outcome::Lost;
                }
                None => pause(&mut looks, deadline),
            }
        }
    }
}

/// Waits a moment: a short one at first.
pub(super) fn pause(looks: &mut u32, deadline: Deadline) {
    if *looks < LOOKS {
        *looks += 1;
        core::hint::spin_loop();
    } else {
        // Nothing announces what is waited for; a nap ends by itself.
        let _ = base::wait_until(Deadline::after(Duration::from_micros(20)).min(deadline), || false);
    }
}
