//! Requests to a disk, as futures.

use crate::Error;
use crate::queue::{self, Request};
use crate::spec::blk::{ID_SIZE, status};
use base::Deadline;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, ready};

/// A read, write or flush that has been handed to the disk. Ready when the disk has returned it.
///
/// Dropping it does not take it back: the disk still carries it out, and the queue keeps the loan until it has.
#[must_use = "only the result says whether the transfer succeeded"]
pub struct Transfer {
    /// `None`: there was nothing to do.
    request: Option<Request>,
    /// Bytes of data that the device must have written if it claims success.
    written: u32,
}

impl Transfer {
    pub(super) fn new(request: Request, written: u32) -> Self {
        Self { request: Some(request), written }
    }

    pub(super) fn over() -> Self {
        Self { request: None, written: 0 }
    }

    /// Sleeps until the disk has returned the request.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Unsupported`], [`Error::BadStatus`], [`Error::ShortAnswer`]; [`Error::TimedOut`] at `deadline`
    /// (it stays in flight and may be waited for again); why the queue is out of use.
    pub fn wait(&mut self, deadline: Deadline) -> Result<(), Error> {
        let Some(request) = &mut self.request else { return Ok(()) };
        let mut answer = [0];
        let len = request.wait(deadline, &mut answer)?;
        judge(answer[0], len, self.written)
    }

    /// What tells others than whoever has the transfer that it is over, and how it went. `None` where there was nothing to do, or the
    /// result has been taken.
    pub fn watch(&self) -> Option<Watch> {
        Some(Watch { watch: self.request.as_ref()?.watch()?, written: self.written })
    }

    /// Whether the disk has returned the request, or never will: [`Transfer::wait`] would not sleep.
    pub fn is_over(&self) -> bool {
        self.request.as_ref().is_none_or(Request::is_over)
    }
}

/// Looks at a transfer that somebody else has: see [`queue::Watch`].
pub struct Watch {
    watch: queue::Watch,
    written: u32,
}

impl dma::Watch for Watch {
    fn outcome(&self) -> Option<bool> {
        let mut answer = [0];
        let len = self.watch.look(&mut answer)?;
        Some(len.and_then(|len| judge(answer[0], len, self.written)).is_ok())
    }
}

impl Future for Transfer {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let written = self.written;
        let Some(request) = &mut self.request else { return Poll::Ready(Ok(())) };
        let mut answer = [0];
        let len = ready!(request.poll(context, &mut answer));
        Poll::Ready(len.and_then(|len| judge(answer[0], len, written)))
    }
}

/// A question for the identification string. The result is the string's bytes, without the padding.
#[must_use = "the result is the only point of asking"]
pub struct DiskId(Request);

impl DiskId {
    pub(super) fn new(request: Request) -> Self {
        Self(request)
    }

    /// Sleeps until the disk has answered.
    ///
    /// # Errors
    ///
    /// As [`Transfer::wait`].
    pub fn wait(&mut self, deadline: Deadline) -> Result<[u8; ID_SIZE], Error> {
        let mut answer = [0; ID_SIZE + 1];
        let len = self.0.wait(deadline, &mut answer)?;
        id(&answer, len)
    }
}

impl Future for DiskId {
    type Output = Result<[u8; ID_SIZE], Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut answer = [0; ID_SIZE + 1];
        let len = ready!(self.0.poll(context, &mut answer));
        Poll::Ready(len.and_then(|len| id(&answer, len)))
    }
}

fn id(answer: &[u8; ID_SIZE + 1], len: u32) -> Result<[u8; ID_SIZE], Error> {
    let (text, state) = answer.split_at(ID_SIZE);
    judge(state.first().copied().unwrap_or(u8::MAX), len, ID_SIZE as u32)?;
    let mut id = [0; ID_SIZE];
    // Whatever follows the string's end is padding.
    for (to, from) in id.iter_mut().zip(text.iter().take_while(|byte| **byte != 0)) {
        *to = *from;
    }
    Ok(id)
}

/// What the status byte and the used length say of a request in which the device had to write `written` bytes and the status.
pub(super) fn judge(state: u8, len: u32, written: u32) -> Result<(), Error> {
    match state {
        status::OK if len <= written => Err(Error::ShortAnswer { expected: written.saturating_add(1), found: len }),
        status::OK => Ok(()),
        status::IOERR => Err(Error::Io),
        status::UNSUPP => Err(Error::Unsupported),
        other => Err(Error::BadStatus(other)),
    }
}
