//! A request in flight, as a future.

use super::{Phase, Queue};
use crate::Error;
use alloc::sync::Arc;
use base::Deadline;
use core::task::{Context, Poll};

/// A request that the device has, or has returned.
///
/// Dropping it takes nothing away from the device: the queue keeps the loans until the device is done, and forgets the result.
pub struct Request {
    queue: Arc<Queue>,
    head: u16,
    taken: bool,
}

impl Request {
    pub(super) fn new(queue: Arc<Queue>, head: u16) -> Self {
        Self { queue, head, taken: false }
    }

    /// Polls for the result: how many bytes the device wrote, and the beginning of its answer in `response`.
    ///
    /// # Errors
    ///
    /// Why the queue is out of use; [`Error::AlreadyTaken`] after the result has been returned once.
    pub fn poll(&mut self, context: &mut Context<'_>, response: &mut [u8]) -> Poll<Result<u32, Error>> {
        if let Some(result) = self.try_take(response) {
            return Poll::Ready(result);
        }
        let listens = self.queue.state.lock().slots.listens(self.head, context.waker());
        if !listens {
            // Wakers are cloned and dropped without the lock: what that does is their executor's business.
            let waker = context.waker().clone();
            let stale = self.queue.state.lock().slots.listen(self.head, waker);
            drop(stale);
        }
        // It may have been returned between the look and the listening.
        match self.try_take(response) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        }
    }

    /// Sleeps until the result is there; then as [`Request::poll`].
    ///
    /// # Errors
    ///
    /// As [`Request::poll`], and [`Error::TimedOut`] at `deadline`: the request stays in flight and may be waited for again.
    pub fn wait(&mut self, deadline: Deadline, response: &mut [u8]) -> Result<u32, Error> {
        let (queue, head, taken) = (&*self.queue, self.head, self.taken);
        let ready = || {
            queue.drain();
            let state = queue.state.lock();
            taken || state.failure.is_some() || state.slots.phase(head) != Phase::InFlight
        };
        if base::wait_until(deadline, ready).is_err() {
            return Err(queue.timed_out());
        }
        self.try_take(response).unwrap_or(Err(Error::TimedOut))
    }

    /// Whether the device has returned the request, or never will.
    pub fn is_over(&self) -> bool {
        self.queue.drain();
        let state = self.queue.state.lock();
        self.taken || state.failure.is_some() || state.slots.phase(self.head) != Phase::InFlight
    }

    /// What tells others than whoever has the request that it is over, and how it went. `None` if its result has been taken.
    pub fn watch(&self) -> Option<Watch> {
        if self.taken {
            return None;
        }
        let generation = self.queue.state.lock().slots.watch(self.head);
        Some(Watch { queue: self.queue.clone(), head: self.head, generation })
    }

    /// The result if it is there, as [`Request::poll`] without a waker. Allocates nothing; for handlers too where the request has
    /// no loans.
    pub(crate) fn try_take(&mut self, response: &mut [u8]) -> Option<Result<u32, Error>> {
        if self.taken {
            return Some(Err(Error::AlreadyTaken));
        }
        self.queue.drain();
        let (result, (waker, ended)) = {
            let mut guard = self.queue.state.lock();
            let state = &mut *guard;
            match (state.slots.phase(self.head), state.failure) {
                (Phase::Done(len), _) => {
                    // A queue without its ring has been retired: the answer is gone with it.
                    let result = match &state.ring {
                        Some(ring) => {
                            ring.response(self.head, response);
                            Ok(len)
                        }
                        None => Err(Error::ShutDown),
                    };
                    (result, state.slots.abandon(self.head))
                }
                // The device still has it, and the queue keeps the loans.
                (_, Some(failure)) => (Err(failure.into()), state.slots.abandon(self.head)),
                _ => return None,
            }
        };
        self.taken = true;
        drop(waker);
        self.queue.let_go(ended);
        Some(result)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let (waker, ended) = self.queue.state.lock().slots.abandon(self.head);
        drop(waker);
        self.queue.let_go(ended);
    }
}

/// Looks at a request that somebody else has. There is something to be seen until the queue has dropped the request's loans, and while
/// it does.
pub struct Watch {
    queue: Arc<Queue>,
    head: u16,
    generation: u32,
}

impl Watch {
    /// As [`Request::is_over`] says, without taking the result: how many bytes the device wrote, and the beginning of its answer in
    /// `response`. `None` while the device has the request, and after the queue has dropped its loans. Allocates nothing and drops no
    /// loan.
    ///
    /// # Errors
    ///
    /// Why the queue is out of use: the device may still have the request.
    pub fn look(&self, response: &mut [u8]) -> Option<Result<u32, Error>> {
        self.queue.drain();
        let state = self.queue.state.lock();
        if state.slots.generation(self.head) != self.generation {
            // Whatever is there is another request. This one's loans have gone, or are going after a reset, and say so themselves.
            return None;
        }
        match (state.slots.phase(self.head), state.failure, &state.ring) {
            (Phase::Done(len), _, Some(ring)) => {
                ring.response(self.head, response);
                Some(Ok(len))
            }
            (_, Some(failure), _) => Some(Err(failure.into())),
            (Phase::InFlight, None, _) => None,
            _ => Some(Err(Error::ShutDown)),
        }
    }
}
