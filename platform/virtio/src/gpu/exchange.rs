//! One command and its answer.

use super::backing::HEADER_MAX;
use super::table::Table;
use crate::Error;
use crate::queue::{self, Access, Command, Loans, Parts, Queue, Request};
use crate::spec::gpu::{CTRL_HDR_SIZE, FLAG_FENCE, command, response};
use alloc::sync::Arc;
use base::IrqMutex;
use core::fmt;
use core::future::poll_fn;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Context, Poll, ready};

/// The reason with which a GPU refuses a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseCode(pub u32);

impl fmt::Display for ResponseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            response::ERR_UNSPEC => "ERR_UNSPEC",
            response::ERR_OUT_OF_MEMORY => "ERR_OUT_OF_MEMORY",
            response::ERR_INVALID_SCANOUT_ID => "ERR_INVALID_SCANOUT_ID",
            response::ERR_INVALID_RESOURCE_ID => "ERR_INVALID_RESOURCE_ID",
            response::ERR_INVALID_CONTEXT_ID => "ERR_INVALID_CONTEXT_ID",
            response::ERR_INVALID_PARAMETER => "ERR_INVALID_PARAMETER",
            _ => "unknown error",
        };
        write!(f, "{name} ({:#x})", self.0)
    }
}

/// A command as the device reads it.
pub(super) struct Message {
    name: &'static str,
    bytes: [u8; HEADER_MAX],
    len: usize,
    fence: Option<u64>,
}

impl Message {
    /// A command of type `kind` with nothing behind its header.
    pub fn new(name: &'static str, kind: u32) -> Self {
        let mut bytes = [0; HEADER_MAX];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        Self { name, bytes, len: CTRL_HDR_SIZE, fence: None }
    }

    /// Appends 32 bits.
    ///
    /// # Errors
    ///
    /// [`Error::TooLong`].
    pub fn push(&mut self, value: u32) -> Result<&mut Self, Error> {
        let place = self.bytes.get_mut(self.len..self.len + 4).ok_or(Error::TooLong)?;
        place.copy_from_slice(&value.to_le_bytes());
        self.len += 4;
        Ok(self)
    }

    /// Appends 64 bits.
    ///
    /// # Errors
    ///
    /// [`Error::TooLong`].
    pub fn push64(&mut self, value: u64) -> Result<&mut Self, Error> {
        self.push(value as u32)?.push((value >> 32) as u32)
    }

    /// Asks for an answer only when the command is complete, marked with `fence`.
    pub fn fence(&mut self, fence: u64) -> &mut Self {
        self.bytes[4..8].copy_from_slice(&FLAG_FENCE.to_le_bytes());
        self.bytes[8..16].copy_from_slice(&fence.to_le_bytes());
        self.fence = Some(fence);
        self
    }
}

/// A command that the device has.
pub(super) struct Exchange {
    request: Request,
    name: &'static str,
    fence: Option<u64>,
}

impl Exchange {
    /// Waits for the answer, which must have type `expected` and fill `answer`.
    ///
    /// # Errors
    ///
    /// [`Error::Gpu`], [`Error::BadResponse`], [`Error::BadFence`], [`Error::ShortAnswer`], and why the queue is out of use.
    pub async fn finish(mut self, expected: u32, answer: &mut [u8]) -> Result<(), Error> {
        poll_fn(|context| self.poll(context, expected, answer)).await
    }

    /// As [`Exchange::finish`], for a future that is written by hand.
    pub fn poll(&mut self, context: &mut Context<'_>, expected: u32, answer: &mut [u8]) -> Poll<Result<(), Error>> {
        let len = ready!(self.request.poll(context, answer));
        Poll::Ready(len.and_then(|len| self.judge(len, expected, answer)))
    }

    /// What tells others that the device has returned the command. `None` if its answer has been taken.
    pub fn watch(&self) -> Option<queue::Watch> {
        self.request.watch()
    }

    fn judge(&self, len: u32, expected: u32, answer: &[u8]) -> Result<(), Error> {
        let (command, short) = (self.name, |need: usize| Error::ShortAnswer { expected: need as u32, found: len });
        if (len as usize) < CTRL_HDR_SIZE {
            return Err(short(CTRL_HDR_SIZE));
        }
        let found = field(answer, 0);
        if (response::ERR_UNSPEC..=response::ERR_INVALID_PARAMETER).contains(&found) {
            return Err(Error::Gpu { command, code: ResponseCode(found) });
        }
        if found != expected {
            return Err(Error::BadResponse { command, found });
        }
        if (len as usize) < answer.len() {
            return Err(short(answer.len()));
        }
        if let Some(expected) = self.fence {
            let marked = field(answer, 4) & FLAG_FENCE != 0;
            let found = if marked { u64::from(field(answer, 8)) | u64::from(field(answer, 12)) << 32 } else { 0 };
            if found != expected {
                return Err(Error::BadFence { expected, found });
            }
        }
        Ok(())
    }
}

/// Reads the 32 bits at byte `offset` of an answer; 0 behind its end.
pub(super) fn field(answer: &[u8], offset: usize) -> u32 {
    let bytes = answer.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// What the GPU, its resources and its futures share.
pub(super) struct Shared {
    queue: Arc<Queue>,
    table: IrqMutex<Table>,
    fence: AtomicU64,
}

impl Shared {
    pub fn new(queue: Arc<Queue>) -> Self {
        Self { queue, table: IrqMutex::new(Table::new()), fence: AtomicU64::new(0) }
    }

    pub fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    pub fn table(&self) -> &IrqMutex<Table> {
        &self.table
    }

    /// A fence that no earlier command had; never 0.
    pub fn next_fence(&self) -> u64 {
        self.fence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Hands a command to the device without ringing the doorbell. The device writes `answer` bytes.
    pub fn add(&self, message: &Message, data: Parts<'_>, loans: Loans, answer: usize) -> Result<Exchange, Error> {
        let Message { name, bytes, len, fence } = message;
        let header = bytes.get(..*len).ok_or(Error::TooLong)?;
        let request = self.queue.add(Command { header, data, access: Access::Read, response: answer, loans })?;
        Ok(Exchange { request, name, fence: *fence })
    }

    /// Sends a command without lent memory and waits for its answer.
    pub async fn exchange(&self, message: &Message, expected: u32, answer: &mut [u8]) -> Result<(), Error> {
        let exchange = self.add(message, Parts::none(), Loans::none(), answer.len())?;
        self.queue.kick();
        exchange.finish(expected, answer).await
    }

    /// Sends a command that is answered with success and no data.
    pub async fn order(&self, message: &Message) -> Result<(), Error> {
        self.exchange(message, response::OK_NODATA, &mut [0; CTRL_HDR_SIZE]).await
    }

    /// Shows nothing on `scanout`, which exists.
    pub async fn disable_scanout(&self, scanout: u32) -> Result<(), Error> {
        let mut message = Message::new("SET_SCANOUT", command::SET_SCANOUT);
        message.push64(0)?.push64(0)?.push(scanout)?.push(0)?;
        self.order(&message).await?;
        self.table.lock().shows(0, scanout);
        Ok(())
    }

    /// Takes resource `id` off the scanouts, detaches its backing and destroys it. Its loans leave the table as soon as the
    /// device has confirmed that it let go of them.
    ///
    /// # Errors
    ///
    /// The first that occurred. A refusal of one step does not keep the next ones from being tried.
    pub async fn destroy(&self, id: u32) -> Result<(), Error> {
        let mut first = Ok(());
        loop {
            // Not in the condition of the loop: the lock would be held across the wait.
            let scanout = self.table.lock().scanout_of(id);
            let Some(scanout) = scanout else { break };
            if let Err(error) = self.disable_scanout(scanout).await {
                first = Err(go_on(error)?);
                break;
            }
        }
        let mut message = Message::new("RESOURCE_DETACH_BACKING", command::RESOURCE_DETACH_BACKING);
        message.push(id)?.push(0)?;
        match self.order(&message).await {
            Ok(()) => {
                let holds = self.table.lock().detached(id);
                drop(holds);
            }
            Err(error) => first = first.and(Err(go_on(error)?)),
        }
        let mut message = Message::new("RESOURCE_UNREF", command::RESOURCE_UNREF);
        message.push(id)?.push(0)?;
        match self.order(&message).await {
            Ok(()) => {
                let entry = self.table.lock().remove(id);
                drop(entry);
                first
            }
            Err(error) => first.and(Err(error)),
        }
    }
}

/// `Ok` for an error after which the next step can still be tried: the device has refused, but it answers.
fn go_on(error: Error) -> Result<Error, Error> {
    match error {
        Error::Gpu { .. } => Ok(error),
        other => Err(other),
    }
}
