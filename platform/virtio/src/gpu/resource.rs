//! A picture that the device knows.

use super::backing::Backing;
use super::display::MAX_DIMENSION;
use super::exchange::{Exchange, Message, Shared};
use crate::Error;
use crate::queue::{self, Loans, Parts};
use crate::spec::gpu::{BYTES_PER_PIXEL, CTRL_HDR_SIZE, Format, command, response};
use alloc::sync::Arc;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, ready};

/// A part of a picture, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Top edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

/// A resource with its backing.
///
/// Dropping it leaves the resource with the device and its memory lent, until [`super::Gpu::reclaim`] or the end of the driver:
/// only the device can say that it lets go. [`Resource::destroy`] asks it.
#[must_use]
pub struct Resource {
    claim: Claim,
    width: u32,
    height: u32,
    format: Format,
}

impl Resource {
    pub(super) async fn create(
        shared: &Arc<Shared>,
        width: u32,
        height: u32,
        format: Format,
        backing: Backing,
    ) -> Result<Self, Error> {
        if !(1..=MAX_DIMENSION).contains(&width) || !(1..=MAX_DIMENSION).contains(&height) {
            return Err(Error::BadSize { width, height });
        }
        let needed = u64::from(width) * u64::from(height) * u64::from(BYTES_PER_PIXEL);
        let found = backing.len();
        if found < needed {
            return Err(Error::BackingTooSmall { needed, found });
        }
        let list = backing.list(shared.queue().device())?;
        let inserted = shared.table().lock().insert(backing.into_holds());
        let id = inserted.map_err(|(error, _holds)| error)?;
        // From here on, giving up (or being dropped while waiting) leaves an orphan in the table.
        let claim = Claim { shared: shared.clone(), id, gone: false };
        let resource = Self { claim, width, height, format };

        let mut message = Message::new("RESOURCE_CREATE_2D", command::RESOURCE_CREATE_2D);
        message.push(id)?.push(format as u32)?.push(width)?.push(height)?;
        if let Err(error) = shared.order(&message).await {
            if let Error::Gpu { .. } = error {
                // Refused: the device has neither resource nor backing.
                resource.claim.remove();
            }
            return Err(error);
        }

        let mut message = Message::new("RESOURCE_ATTACH_BACKING", command::RESOURCE_ATTACH_BACKING);
        message.push(id)?.push(list.entries())?;
        let exchange = match list.memory() {
            None => {
                list.push_to(&mut message)?;
                shared.add(&message, Parts::none(), Loans::none(), CTRL_HDR_SIZE)?
            }
            Some(memory) => {
                let range = 0..list.bytes();
                let data = Parts::new(&**memory, &range, u32::MAX)?;
                shared.add(&message, data, Loans::one(memory.clone()), CTRL_HDR_SIZE)?
            }
        };
        shared.queue().kick();
        if let Err(error) = exchange.finish(response::OK_NODATA, &mut [0; CTRL_HDR_SIZE]).await {
            if let Error::Gpu { .. } = error {
                // Refused, but what it attached before it refused is known only after it has confirmed to have let go. If it
                // does not confirm, the resource stays an orphan; the error that matters is the first.
                let _ = resource.destroy().await;
            }
            return Err(error);
        }
        Ok(resource)
    }

    /// The device's name for it.
    pub fn id(&self) -> u32 {
        self.claim.id
    }

    /// Pixels of a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// How a pixel is laid out.
    pub fn format(&self) -> Format {
        self.format
    }

    /// All of it.
    pub fn rect(&self) -> Rect {
        Rect { x: 0, y: 0, width: self.width, height: self.height }
    }

    /// Makes the device read the part `rect` of the backing.
    ///
    /// # Errors
    ///
    /// [`Error::OutsidePicture`], [`Error::BadFence`], and those of every command (see [`super::Gpu::display_info`]).
    pub async fn transfer(&self, rect: Rect) -> Result<(), Error> {
        let message = self.transfer_message(rect)?;
        self.claim.shared.order(&message).await
    }

    /// Makes the part `rect` visible on the scanouts that show it.
    ///
    /// # Errors
    ///
    /// As [`Resource::transfer`].
    pub async fn flush(&self, rect: Rect) -> Result<(), Error> {
        let message = self.flush_message(rect)?;
        self.claim.shared.order(&message).await
    }

    /// [`Resource::transfer`] and [`Resource::flush`] with one doorbell. When it is over, the device has read the memory.
    ///
    /// # Errors
    ///
    /// As [`Resource::transfer`].
    pub async fn present(&self, rect: Rect) -> Result<(), Error> {
        self.begin_present(rect, Loans::none())?.await
    }

    /// [`Resource::present`], begun when this returns. `reading` is what the queue holds until the
    /// device has read the backing, whoever gives up waiting for it: the job of a shared buffer, if the backing is one.
    ///
    /// # Errors
    ///
    /// [`Error::OutsidePicture`], [`Error::QueueFull`], and why the queue is out of use; `reading` has been dropped then.
    pub fn begin_present(&self, rect: Rect, reading: Loans) -> Result<Presenting, Error> {
        let (transfer, flush) = (self.transfer_message(rect)?, self.flush_message(rect)?);
        let shared = &self.claim.shared;
        let transfer = shared.add(&transfer, Parts::none(), reading, CTRL_HDR_SIZE)?;
        let flush = shared.add(&flush, Parts::none(), Loans::none(), CTRL_HDR_SIZE);
        shared.queue().kick();
        Ok(Presenting { transfer: Some(transfer), flush: Some(flush) })
    }

    /// Takes the picture off the scanouts, detaches its backing and destroys it. When this is `Ok`, the driver holds none of the
    /// backing's loans any more.
    ///
    /// # Errors
    ///
    /// Those of every command (see [`super::Gpu::display_info`]). Loans of which the device has not confirmed that it let go
    /// stay lent; [`super::Gpu::reclaim`] tries again.
    pub async fn destroy(self) -> Result<(), Error> {
        self.claim.destroy().await
    }

    pub(super) async fn show(&self, scanout: u32, rect: Rect) -> Result<(), Error> {
        self.check(rect)?;
        let mut message = Message::new("SET_SCANOUT", command::SET_SCANOUT);
        push_rect(&mut message, rect)?.push(scanout)?.push(self.claim.id)?;
        self.claim.shared.table().lock().may_show(self.claim.id, scanout);
        self.claim.shared.order(&message).await?;
        self.claim.shared.table().lock().shows(self.claim.id, scanout);
        Ok(())
    }

    fn transfer_message(&self, rect: Rect) -> Result<Message, Error> {
        self.check(rect)?;
        let pixels = u64::from(rect.y) * u64::from(self.width) + u64::from(rect.x);
        let mut message = Message::new("TRANSFER_TO_HOST_2D", command::TRANSFER_TO_HOST_2D);
        push_rect(&mut message, rect)?.push64(pixels * u64::from(BYTES_PER_PIXEL))?.push(self.claim.id)?.push(0)?;
        message.fence(self.claim.shared.next_fence());
        Ok(message)
    }

    fn flush_message(&self, rect: Rect) -> Result<Message, Error> {
        self.check(rect)?;
        let mut message = Message::new("RESOURCE_FLUSH", command::RESOURCE_FLUSH);
        push_rect(&mut message, rect)?.push(self.claim.id)?.push(0)?;
        message.fence(self.claim.shared.next_fence());
        Ok(message)
    }

    fn check(&self, rect: Rect) -> Result<(), Error> {
        let fits = |start: u32, len: u32, all: u32| len != 0 && start.checked_add(len).is_some_and(|end| end <= all);
        if fits(rect.x, rect.width, self.width) && fits(rect.y, rect.height, self.height) {
            return Ok(());
        }
        Err(Error::OutsidePicture)
    }
}

/// A picture that is being read and made visible again. Ready when it is.
///
/// Dropping it does not stop the device.
#[must_use = "only the result says whether the picture is on the screen"]
pub struct Presenting {
    transfer: Option<Exchange>,
    flush: Option<Result<Exchange, Error>>,
}

impl Presenting {
    /// What tells others that the device has read the picture. `None` when that is known already.
    pub fn watch(&self) -> Option<Reading> {
        self.transfer.as_ref()?.watch().map(Reading)
    }
}

impl Future for Presenting {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut answer = [0; CTRL_HDR_SIZE];
        if let Some(transfer) = &mut self.transfer {
            ready!(transfer.poll(context, response::OK_NODATA, &mut answer))?;
            self.transfer = None;
        }
        match &mut self.flush {
            Some(Ok(flush)) => flush.poll(context, response::OK_NODATA, &mut answer),
            Some(Err(_)) | None => Poll::Ready(match self.flush.take() {
                Some(Err(error)) => Err(error),
                _ => Err(Error::AlreadyTaken),
            }),
        }
    }
}

/// Looks whether the device has read a picture: see [`queue::Watch`]. A refusal is an end as good as another; only where the queue
/// is out of use nobody knows what the device still does.
pub struct Reading(queue::Watch);

impl dma::Watch for Reading {
    fn outcome(&self) -> Option<bool> {
        self.0.look(&mut [0; CTRL_HDR_SIZE]).map(|end| end.is_ok())
    }
}

/// The right to command one resource, and the duty to destroy it: who drops it leaves an orphan in the table.
pub(super) struct Claim {
    shared: Arc<Shared>,
    id: u32,
    gone: bool,
}

impl Claim {
    /// Takes over an orphan, if there is one.
    pub fn orphan(shared: &Arc<Shared>) -> Option<Self> {
        let id = shared.table().lock().take_orphan()?;
        Some(Self { shared: shared.clone(), id, gone: false })
    }

    /// Destroys the resource.
    pub async fn destroy(mut self) -> Result<(), Error> {
        let result = self.shared.destroy(self.id).await;
        self.gone = result.is_ok();
        result
    }

    /// Takes the resource out of the table: the device has confirmed that it does not have it.
    fn remove(mut self) {
        let entry = self.shared.table().lock().remove(self.id);
        drop(entry);
        self.gone = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.gone {
            self.shared.table().lock().orphan(self.id);
        }
    }
}

fn push_rect(message: &mut Message, rect: Rect) -> Result<&mut Message, Error> {
    message.push(rect.x)?.push(rect.y)?.push(rect.width)?.push(rect.height)
}
