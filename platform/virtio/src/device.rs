//! One device from reset to reset: negotiation, queues, failure, shutting down \[3\].
//!
//! # Invariants
//!
//! - The memory of a queue is not freed, and no loan that its device was told of is given back, before the device has finished
//!   a reset. A device that does not finish one keeps them for ever: they are leaked, and the log says so.
//!
//! # Locking
//!
//! None of its own.

use crate::queue::{Failure, Queue, QueueOptions};
use crate::spec::pci::isr;
use crate::spec::{feature, status};
use crate::transport::{self, Transport};
use crate::{Error, Misbehaviour};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::Deadline;
use base::fallible;
use base::irq::Handler;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Milliseconds that a device gets for a reset when the driver is dropped without having been shut down.
const DROP_RESET_MILLIS: u64 = 1_000;

/// The MSI-X vectors of a device with one queue in use. `None` is polling: requests are then found when they are polled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors {
    /// For configuration changes and failure of the device.
    pub config: Option<u16>,
    /// For the queue.
    pub queue: Option<u16>,
}

/// A started device.
pub(crate) struct Core {
    transport: Arc<dyn Transport>,
    dma: dma::Device,
    features: u64,
    queues: Vec<Arc<Queue>>,
    config: Option<Arc<ConfigHandler>>,
    down: bool,
}

impl Core {
    /// Resets the device and negotiates features \[3.1.1 steps 1 to 6\]: of those on offer, the ones in `wanted` and those that
    /// every driver here uses.
    ///
    /// # Errors
    ///
    /// [`Error::WrongDevice`], [`Error::ResetTimedOut`], [`Error::Legacy`], [`Error::BypassesIommu`],
    /// [`Error::FeaturesRefused`].
    pub fn negotiate(
        transport: Arc<dyn Transport>,
        dma: dma::Device,
        device_type: u16,
        wanted: u64,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let found = transport.device_type();
        if found != device_type {
            return Err(Error::WrongDevice { expected: device_type, found });
        }
        transport::reset(&*transport, deadline)?;
        // From here on an early return drops `core`, which resets the device again.
        let mut core = Self { transport, dma, features: 0, queues: Vec::new(), config: None, down: false };
        core.transport.set_status(status::ACKNOWLEDGE);
        core.transport.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let offered = core.transport.device_features();
        if offered & feature::VERSION_1 == 0 {
            return Err(core.give_up(Error::Legacy));
        }
        if offered & feature::ACCESS_PLATFORM == 0 && core.dma.is_isolated() {
            return Err(core.give_up(Error::BypassesIommu));
        }
        let always = feature::VERSION_1
            | feature::ACCESS_PLATFORM
            | feature::ORDER_PLATFORM
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX;
        core.features = offered & (always | wanted);
        core.transport.set_driver_features(core.features);
        let wish = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        core.transport.set_status(wish);
        if core.transport.status() & status::FEATURES_OK == 0 {
            let refused = Error::FeaturesRefused(core.features);
            return Err(core.give_up(refused));
        }
        Ok(core)
    }

    /// Tells the device that the driver will not drive it \[2.1\].
    fn give_up(&self, error: Error) -> Error {
        self.transport.set_status(self.transport.status() | status::FAILED);
        error
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The bus master.
    pub fn dma(&self) -> &dma::Device {
        &self.dma
    }

    /// The registers.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Makes queue number `index` and tells the device.
    ///
    /// # Errors
    ///
    /// See [`Queue::new`] and [`Transport::set_up_queue`].
    #[track_caller]
    pub fn add_queue(&mut self, index: u16, options: &QueueOptions) -> Result<Arc<Queue>, Error> {
        self.queues.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        let queue = Queue::new(&self.transport, &self.dma, index, self.features, options)?;
        let queue = fallible::arc(queue).map_err(|_| Error::OutOfMemory)?;
        // In the list first: should the device refuse half-way, the queue's memory stays until the device has been reset.
        self.queues.push(queue.clone());
        self.transport.set_up_queue(index, &queue.setup(options.vector))?;
        Ok(queue)
    }

    /// Starts the device \[3.1.1 step 8\]. All queues have been added.
    ///
    /// # Errors
    ///
    /// [`Error::NoVector`], [`Error::NeedsReset`], [`Error::OutOfMemory`].
    pub fn start(&mut self, config_vector: Option<u16>) -> Result<(), Error> {
        self.transport.set_config_vector(config_vector)?;
        let mut queues = Vec::new();
        queues.try_reserve_exact(self.queues.len()).map_err(|_| Error::OutOfMemory)?;
        queues.extend(self.queues.iter().cloned());
        let transport = self.transport.clone();
        let handler = ConfigHandler { transport, queues, changes: AtomicU32::new(0), off: AtomicBool::new(false) };
        self.config = Some(fallible::arc(handler).map_err(|_| Error::OutOfMemory)?);
        self.transport.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
        if transport::has_failed(&*self.transport) {
            return Err(Error::NeedsReset);
        }
        Ok(())
    }

    /// What serves the configuration interrupt.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`] before [`Core::start`].
    pub fn config_handler(&self) -> Result<Arc<ConfigHandler>, Error> {
        self.config.clone().ok_or(Error::ShutDown)
    }

    /// Resets the device, fails every request and lets go of every loan.
    ///
    /// # Errors
    ///
    /// [`Error::ResetTimedOut`]: queues and loans have been leaked, because the device may still be using them.
    pub fn shut_down(&mut self, deadline: Deadline) -> Result<(), Error> {
        if self.down {
            return Ok(());
        }
        if let Some(config) = &self.config {
            // A status of 0 is our own doing from here on.
            config.off.store(true, Ordering::SeqCst);
        }
        for queue in &self.queues {
            queue.fail(Failure::ShutDown);
        }
        self.down = true;
        match transport::reset(&*self.transport, deadline) {
            Ok(()) => {
                for queue in self.queues.drain(..) {
                    queue.retire();
                }
                Ok(())
            }
            Err(error) => {
                let loans: usize = self.queues.iter().map(|queue| queue.in_flight()).sum();
                log::error!(
                    "{}: {error}; its queues and the memory of {loans} requests stay lent for ever",
                    self.dma.name()
                );
                core::mem::forget(core::mem::take(&mut self.queues));
                Err(error)
            }
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // `shut_down` has logged what a failure means.
        let _ = self.shut_down(Deadline::after_millis(DROP_RESET_MILLIS));
    }
}

/// Serves the configuration interrupt: counts changes, and fails the queues when the device has failed.
pub struct ConfigHandler {
    transport: Arc<dyn Transport>,
    queues: Vec<Arc<Queue>>,
    changes: AtomicU32,
    off: AtomicBool,
}

impl ConfigHandler {
    /// How often the configuration has changed.
    pub fn changes(&self) -> u32 {
        self.changes.load(Ordering::Acquire)
    }

    /// Fails the queues if the device has stopped working, and says whether it has.
    pub fn check(&self) -> bool {
        if self.off.load(Ordering::SeqCst) || !transport::has_failed(&*self.transport) {
            return false;
        }
        for queue in &self.queues {
            queue.fail(Failure::NeedsReset);
        }
        true
    }
}

impl Handler for ConfigHandler {
    fn handle(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.check();
        base::notify();
    }
}

/// Serves the wired interrupt of a device without vectors \[4.1.5.3\]: asks it why, which takes the interrupt back.
pub struct Wired {
    transport: Arc<dyn Transport>,
    config: Arc<ConfigHandler>,
    queue: Arc<dyn Handler>,
}

impl Wired {
    /// Makes the handler of a device's configuration changes and its queues one.
    pub fn new(transport: Arc<dyn Transport>, config: Arc<ConfigHandler>, queue: Arc<dyn Handler>) -> Self {
        Self { transport, config, queue }
    }
}

impl Handler for Wired {
    fn handle(&self) {
        let why = self.transport.interrupt_status();
        if why & isr::CONFIG != 0 {
            self.config.handle();
        }
        if why & isr::QUEUE != 0 {
            self.queue.handle();
        }
    }
}

impl From<Misbehaviour> for Error {
    fn from(what: Misbehaviour) -> Self {
        Self::DeviceMisbehaved { what }
    }
}
