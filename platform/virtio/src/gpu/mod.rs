//! The GPU device \[5.7\], in two dimensions: what shows a picture that lies in lent memory.
//!
//! # Who holds a picture's memory
//!
//! A device may keep using a resource's backing from `RESOURCE_ATTACH_BACKING` until it has confirmed `RESOURCE_DETACH_BACKING`
//! or `RESOURCE_UNREF` (implementations translate the addresses once, when they attach, so that a revocation alone would not
//! even be noticed). The loans therefore belong to a table that outlives every [`Resource`] and every future: they leave it when
//! the device has confirmed, or has been reset, and never otherwise.
//!
//! # Locking
//!
//! The table has one `IrqMutex`, which handlers do not take. Nothing is awaited, no loan is dropped and no other lock is taken
//! while it is held, but the heap's.

mod backing;
mod display;
mod exchange;
mod resource;
mod table;

pub use backing::{Backing, RowOrder};
pub use display::{DisplayInfo, Edid, MAX_DIMENSION, Mode};
pub use exchange::ResponseCode;
use resource::Claim;
pub use resource::{Presenting, Reading, Rect, Resource};

use crate::Error;
use crate::device::{ConfigHandler, Core, Vectors};
use crate::queue::{Queue, QueueOptions, QueueStats};
use crate::spec::device_type;
use crate::spec::gpu::{
    CONTROL_QUEUE, DISPLAY_INFO_SIZE, EVENT_DISPLAY, Format, MAX_SCANOUTS, RESP_EDID_SIZE, command, config, feature,
    response,
};
use crate::transport::{Transport, read_config};
use alloc::sync::Arc;
use base::Deadline;
use exchange::{Message, Shared};

/// The most commands in flight.
const DEPTH: u16 = 16;

/// Milliseconds that a device gets for a reset when the driver is dropped without having been shut down.
const DROP_RESET_MILLIS: u64 = 1_000;

/// How a GPU is driven.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Where it interrupts.
    pub vectors: Vectors,
}

/// A GPU. Dropping it resets the device.
pub struct Gpu {
    core: Core,
    shared: Arc<Shared>,
    scanouts: u32,
}

impl Gpu {
    /// Resets, negotiates and starts the GPU behind `transport`, whose bus master is `device`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the device; it has been reset again then.
    pub fn new(
        transport: Arc<dyn Transport>,
        device: dma::Device,
        options: &Options,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let mut core = Core::negotiate(transport, device, device_type::GPU, feature::EDID, deadline)?;
        let scanouts = read_config(&**core.transport(), deadline, |field| field(config::NUM_SCANOUTS))?;
        if scanouts == 0 || scanouts as usize > MAX_SCANOUTS {
            return Err(Error::BadConfig { field: "num_scanouts", value: scanouts.into() });
        }
        let queue = core.add_queue(
            CONTROL_QUEUE,
            &QueueOptions {
                size: DEPTH,
                header: backing::HEADER_MAX,
                response: RESP_EDID_SIZE,
                segments: usize::from(DEPTH),
                vector: options.vectors.queue,
                quiet: false,
            },
        )?;
        core.start(options.vectors.config)?;
        Ok(Self { core, shared: base::fallible::arc(Shared::new(queue)).map_err(|_| Error::OutOfMemory)?, scanouts })
    }

    /// What serves the control queue's interrupt.
    pub fn queue_handler(&self) -> Arc<Queue> {
        self.shared.queue().clone()
    }

    /// What serves the configuration interrupt.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`].
    pub fn config_handler(&self) -> Result<Arc<ConfigHandler>, Error> {
        self.core.config_handler()
    }

    /// The bus master: loans must be to this device.
    pub fn device(&self) -> &dma::Device {
        self.core.dma()
    }

    /// The number of scanouts.
    pub fn scanouts(&self) -> u32 {
        self.scanouts
    }

    /// Counters of the control queue.
    pub fn stats(&self) -> QueueStats {
        self.shared.queue().stats()
    }

    /// Whether displays have come, gone or changed their size since the last call (or the start).
    pub fn displays_changed(&self) -> bool {
        let transport = self.core.transport();
        let changed = transport.config_read(config::EVENTS_READ).is_some_and(|events| events & EVENT_DISPLAY != 0);
        if changed {
            transport.config_write(config::EVENTS_CLEAR, EVENT_DISPLAY);
        }
        changed
    }

    /// Asks for the sizes of the displays.
    ///
    /// # Errors
    ///
    /// Those of every command: [`Error::Gpu`], [`Error::BadResponse`], [`Error::ShortAnswer`], [`Error::QueueFull`], and why the
    /// queue is out of use.
    pub async fn display_info(&self) -> Result<DisplayInfo, Error> {
        let message = Message::new("GET_DISPLAY_INFO", command::GET_DISPLAY_INFO);
        let mut answer = [0; DISPLAY_INFO_SIZE];
        self.shared.exchange(&message, response::OK_DISPLAY_INFO, &mut answer).await?;
        Ok(DisplayInfo::parse(&answer, self.scanouts))
    }

    /// Asks for the EDID of a scanout's display.
    ///
    /// # Errors
    ///
    /// [`Error::NoEdid`], [`Error::NoSuchScanout`], [`Error::BadConfig`] for one that is longer than it can be, and those of
    /// every command (see [`Gpu::display_info`]).
    pub async fn edid(&self, scanout: u32) -> Result<Edid, Error> {
        if self.core.features() & feature::EDID == 0 {
            return Err(Error::NoEdid);
        }
        self.check_scanout(scanout)?;
        let mut message = Message::new("GET_EDID", command::GET_EDID);
        message.push(scanout)?.push(0)?;
        let mut answer = [0; RESP_EDID_SIZE];
        self.shared.exchange(&message, response::OK_EDID, &mut answer).await?;
        Edid::parse(&answer)
    }

    /// Makes a picture of `width` x `height` pixels whose rows lie, one after the other and without gaps, in `backing`.
    ///
    /// # Errors
    ///
    /// [`Error::BadSize`], [`Error::BackingTooSmall`], [`Error::TooManySegments`], [`Error::OutOfIds`], and those of every
    /// command (see [`Gpu::display_info`]). Where the device did not confirm that it lets go of the backing, its loans stay
    /// lent until it does (see [`Gpu::reclaim`]) or is reset.
    pub async fn create_resource(
        &self,
        width: u32,
        height: u32,
        format: Format,
        backing: Backing,
    ) -> Result<Resource, Error> {
        Resource::create(&self.shared, width, height, format, backing).await
    }

    /// Shows the part `rect` of a picture on a scanout.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchScanout`], [`Error::OutsidePicture`], and those of every command (see [`Gpu::display_info`]).
    pub async fn set_scanout(&self, scanout: u32, resource: &Resource, rect: Rect) -> Result<(), Error> {
        self.check_scanout(scanout)?;
        resource.show(scanout, rect).await
    }

    /// Shows nothing on a scanout.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchScanout`], and those of every command (see [`Gpu::display_info`]).
    pub async fn disable_scanout(&self, scanout: u32) -> Result<(), Error> {
        self.check_scanout(scanout)?;
        self.shared.disable_scanout(scanout).await
    }

    /// Destroys the resources whose handle was dropped, or whose destruction was not awaited to its end, and lets go of their
    /// loans. Returns how many.
    ///
    /// # Errors
    ///
    /// Those of every command (see [`Gpu::display_info`]); what has not been destroyed stays for another call.
    pub async fn reclaim(&self) -> Result<usize, Error> {
        let mut count = 0;
        while let Some(orphan) = Claim::orphan(&self.shared) {
            orphan.destroy().await?;
            count += 1;
        }
        Ok(count)
    }

    /// How many resources the device has or may have.
    pub fn resources(&self) -> usize {
        self.shared.table().lock().len()
    }

    /// Resets the device, fails outstanding commands, and lets go of the loans of every resource.
    ///
    /// # Errors
    ///
    /// [`Error::ResetTimedOut`]: what the device may still be using has been leaked.
    pub fn shut_down(mut self, deadline: Deadline) -> Result<(), Error> {
        self.stop(deadline)
    }

    fn stop(&mut self, deadline: Deadline) -> Result<(), Error> {
        let result = self.core.shut_down(deadline);
        let resources = self.shared.table().lock().close();
        match result {
            Ok(()) => drop(resources),
            Err(_) => {
                if !resources.is_empty() {
                    log::error!(
                        "{}: the memory of {} pictures stays lent for ever",
                        self.core.dma().name(),
                        resources.len()
                    );
                }
                core::mem::forget(resources);
            }
        }
        result
    }

    fn check_scanout(&self, scanout: u32) -> Result<(), Error> {
        if scanout < self.scanouts { Ok(()) } else { Err(Error::NoSuchScanout(scanout)) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // `stop` has logged what a failure means; after a `shut_down` there is nothing left to do.
        let _ = self.stop(Deadline::after_millis(DROP_RESET_MILLIS));
    }
}
