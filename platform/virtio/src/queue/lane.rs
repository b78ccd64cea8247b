//! Requests in numbers: the loans lie in the lane by value, and what the device has returned is taken back many at a time.
//!
//! # Invariants
//!
//! The lane holds a request's loan from before the device can see its address until the queue has validated that the device has
//! returned it, or the device has been reset. A lane that is dropped before gives its store of loans to the queue, which keeps
//! it for as long; one that is forgotten leaks them.

use super::{Access, Chain, Interrupt, Part, Parts, Queue, WAKE_BATCH, check_loan, wake};
use crate::Error;
use crate::queue::ring::Ring;
use crate::queue::slots::{Returned, Shape, Slots};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::Deadline;
use core::ops::Range;
use core::task::Waker;
use dma::Lent;

/// How many returned requests are taken from the queue at a time.
const TAKE_BATCH: usize = 16;

/// Bytes of the answer of a lane's request.
const ANSWER: usize = 1;

/// What the device says of a request that it returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Bytes that it wrote, of those that it may write.
    pub written: u32,
    /// Bytes that it may write, its answer included.
    pub writable: u32,
    /// The first byte of its answer.
    pub status: u8,
}

/// A request of a lane, but for its loan. Its answer has one byte.
pub(crate) struct Item<const N: usize> {
    /// What the device reads first, in words as they lie in memory.
    pub header: [u64; N],
    /// Which bytes of the loan.
    pub range: Range<u64>,
    /// What the device does with them.
    pub access: Access,
    /// The most bytes in a piece, and the most pieces.
    pub limits: (u32, usize),
}

/// A way to a queue for requests that are all about one type of loan. See the module.
pub struct Lane<L: Lent> {
    queue: Arc<Queue>,
    id: u16,
    /// By head. In a box of its own, which goes to the queue if the lane is dropped with requests in flight.
    loans: Option<Box<Loans<L>>>,
    /// Requests that have been added and not been taken back.
    open: u16,
}

struct Loans<L>(Vec<Option<L>>);

impl<L: Lent> Lane<L> {
    /// Opens a lane. All that it ever allocates is allocated here.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::QueueFull`] where there are as many lanes as descriptors, and why the queue is out of use.
    pub(crate) fn new(queue: &Arc<Queue>) -> Result<Self, Error> {
        let mut loans = Vec::new();
        loans.try_reserve_exact(usize::from(queue.size)).map_err(|_| Error::OutOfMemory)?;
        loans.resize_with(usize::from(queue.size), || None);
        let loans = Some(Box::new(Loans(loans)));
        let mut state = queue.state.lock();
        if let Some(failure) = state.failure {
            return Err(failure.into());
        }
        let id = state.slots.open_lane()?;
        drop(state);
        Ok(Self { queue: queue.clone(), id, loans, open: 0 })
    }

    /// The queue.
    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Requests that have been added and not been taken back.
    pub fn in_flight(&self) -> usize {
        usize::from(self.open)
    }

    /// Hands one request to the device without telling it. Otherwise the loan comes back, with the reason.
    ///
    /// # Errors
    ///
    /// As [`Queue::add`] and [`check_loan`].
    #[inline]
    pub(crate) fn add<const N: usize>(&mut self, item: &Item<N>, loan: L) -> Result<(), (L, Error)> {
        let (count, data) = match pieces(&self.queue, item, &loan) {
            Ok(found) => found,
            Err(error) => return Err((loan, error)),
        };
        let bytes = item.range.end - item.range.start;
        // Used lengths have 32 bits, and a chain is not longer than that [2.7.4.2].
        let longest = u64::from(u32::MAX) - 8 * N as u64 - ANSWER as u64;
        if N == 0 || 8 * N > self.queue.header || self.queue.response < ANSWER || bytes > longest {
            return Err((loan, Error::TooLong));
        }
        let write = item.access == Access::Write;
        let writable = if write { bytes } else { 0 } + ANSWER as u64;
        let table = self.queue.indirect;

        let mut guard = self.queue.state.lock();
        let state = &mut *guard;
        if let Some(failure) = state.failure {
            drop(guard);
            return Err((loan, failure.into()));
        }
        let Some(ring) = &state.ring else {
            drop(guard);
            return Err((loan, Error::ShutDown));
        };
        // Header, pieces and answer are at most as many as the queue's size, see `Queue::new`; and so few words.
        let entries = count + 2;
        let chain = if table { 1 } else { entries as u16 };
        let shape = if table { Shape { header: N as u16, pieces: count as u16 } } else { Shape::NONE };
        let Some((head, shaped)) = state.slots.begin_in_lane(self.id, chain, writable as u32, shape) else {
            drop(guard);
            return Err((loan, Error::QueueFull));
        };
        if table {
            if !shaped {
                ring.shape(head, N, count);
            }
            ring.fill(head, item.header, data, write);
        } else {
            direct(
                Chain { head, header: &[], data, write, response: ANSWER, entries, table },
                item.header,
                ring,
                &state.slots,
            );
        }
        // Heads are below the queue's size, and so long is the store. Free slots have no loan: nothing is dropped here.
        if let Some(place) = self.loans.as_mut().and_then(|loans| loans.0.get_mut(usize::from(head))) {
            *place = Some(loan);
        }
        self.open += 1;
        state.publish(head);
        Ok(())
    }

    /// Sleeps until `count` requests are there to be taken back, or all that are in flight if those are fewer. The device is asked
    /// to interrupt only then.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], and why the queue is out of use.
    pub fn wait(&mut self, count: usize, deadline: Deadline) -> Result<(), Error> {
        // `open` is a `u16`.
        let wanted = count.min(self.in_flight()) as u16;
        let ready = || {
            self.queue.drain_and_ask(Interrupt::Lane(self.id, wanted));
            let state = self.queue.state.lock();
            state.slots.returned(self.id) >= wanted || state.failure.is_some()
        };
        if base::wait_until(deadline, ready).is_err() {
            return Err(self.queue.timed_out());
        }
        let state = self.queue.state.lock();
        match state.failure {
            Some(failure) if state.slots.returned(self.id) < wanted => Err(failure.into()),
            _ => Ok(()),
        }
    }

    /// Takes back what the device has returned, in the order in which it did: calls `each` with the loan and what the device says,
    /// or why it never will say anything. Returns how many there were. Does not sleep.
    ///
    /// # Errors
    ///
    /// Why the queue is out of use, if it is and nothing was returned. Loans of requests in flight stay until the device has been
    /// reset.
    #[inline]
    pub(crate) fn take(&mut self, mut each: impl FnMut(L, Result<Reply, Error>)) -> Result<usize, Error> {
        let mut total = 0;
        loop {
            let mut batch = [Returned::default(); TAKE_BATCH];
            let mut wakers = [const { None::<Waker> }; WAKE_BATCH];
            let (count, result, failure) = {
                let mut state = self.queue.state.lock();
                let result = if state.slots.returned(self.id) < TAKE_BATCH as u16 {
                    state.drain_or_fail(false, Interrupt::AsIs, &mut wakers)
                } else {
                    Ok(true)
                };
                (state.take_returned(self.id, &mut batch), result, state.failure)
            };
            wake(&mut wakers);
            if let Err(what) = result {
                self.queue.misbehaved(what);
            }
            for returned in batch.iter().take(count) {
                let place = self.loans.as_mut().and_then(|loans| loans.0.get_mut(usize::from(returned.head)));
                let Some(loan) = place.and_then(Option::take) else { continue };
                self.open -= 1;
                let (writable, status) = (returned.writable, returned.status);
                let reply = match returned.written {
                    Some(written) => Ok(Reply { written, writable, status }),
                    None => Err(Error::ShutDown),
                };
                each(loan, reply);
            }
            total += count;
            match failure {
                _ if count == TAKE_BATCH => {}
                Some(failure) if total == 0 => return Err(failure.into()),
                _ => return Ok(total),
            }
        }
    }
}

impl<L: Lent> Drop for Lane<L> {
    fn drop(&mut self) {
        if let Some(loans) = self.loans.take() {
            let store = self.queue.state.lock().slots.abandon_lane(self.id, loans);
            drop(store);
        }
    }
}

/// Writes a request where there are no indirect descriptors.
#[cold]
fn direct<const N: usize>(chain: Chain<'_, Data<'_>>, header: [u64; N], ring: &Ring, slots: &Slots) {
    let bytes = header.map(u64::to_ne_bytes);
    Chain { header: bytes.as_flattened(), ..chain }.write(ring, slots);
}

/// Whether `item` may have these bytes of `loan`, and in which pieces, how many.
#[inline]
fn pieces<'a, const N: usize, L: Lent>(queue: &Queue, item: &Item<N>, loan: &'a L) -> Result<(usize, Data<'a>), Error> {
    check_loan(loan, &queue.device, item.access, &item.range)?;
    let (max_piece, max_pieces) = (item.limits.0, item.limits.1.min(queue.max_data));
    if let (Some(part), 1..) = (Parts::single(loan, &item.range, max_piece), max_pieces) {
        return Ok((1, Data::One(Some(part))));
    }
    let parts = Parts::new(loan, &item.range, max_piece)?;
    let count = parts.clone().count();
    if count > max_pieces {
        return Err(Error::TooManySegments { count, max: max_pieces });
    }
    Ok((count, Data::Many(parts)))
}

/// The pieces of a request.
enum Data<'a> {
    One(Option<Part>),
    Many(Parts<'a>),
}

impl Iterator for Data<'_> {
    type Item = Part;

    #[inline]
    fn next(&mut self) -> Option<Part> {
        match self {
            Self::One(part) => part.take(),
            Self::Many(parts) => parts.next(),
        }
    }
}
