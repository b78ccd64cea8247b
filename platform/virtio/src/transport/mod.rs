//! What a bus offers to a virtio driver: registers, and nothing that knows a device type.

#[cfg(feature = "virtio-drivers")]
mod foreign;
mod pci;

#[cfg(feature = "virtio-drivers")]
pub use foreign::ForeignTransport;
pub use pci::PciTransport;

use crate::Error;
use crate::spec::status;
use base::Deadline;
use base::time::Duration;
use iommu::Iova;

/// Where a queue lies and how it interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSetup {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Descriptor area.
    pub descriptors: Iova,
    /// Driver area: the available ring.
    pub driver: Iova,
    /// Device area: the used ring.
    pub device: Iova,
    /// MSI-X vector, or none for a queue that is polled.
    pub vector: Option<u16>,
}

/// The registers of one virtio device \[4\].
///
/// Methods may be called from every core and from handlers. What they return is the device's word: callers check it.
pub trait Transport: Send + Sync {
    /// The virtio device type.
    fn device_type(&self) -> u16;
    /// The features on offer.
    fn device_features(&self) -> u64;
    /// Writes the features that the driver accepts.
    fn set_driver_features(&self, features: u64);
    /// Reads the device status.
    fn status(&self) -> u8;
    /// Writes the device status; 0 asks for a reset.
    fn set_status(&self, status: u8);
    /// The largest possible size of `queue`; 0 if there is no such queue.
    fn queue_size(&self, queue: u16) -> u16;
    /// Tells the device where `queue` lies and turns it on.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchQueue`], [`Error::BadNotifyOffset`], [`Error::NoVector`]; the queue is off then.
    fn set_up_queue(&self, queue: u16, setup: &QueueSetup) -> Result<(), Error>;
    /// Tells the device that `queue` has new entries. Does nothing for a queue that has not been set up.
    fn notify(&self, queue: u16);
    /// Sets the MSI-X vector of configuration changes.
    ///
    /// # Errors
    ///
    /// [`Error::NoVector`].
    fn set_config_vector(&self, vector: Option<u16>) -> Result<(), Error>;
    /// Says why the device interrupts by wire ([`isr`](crate::spec::pci::isr)), and ends that interrupt. 0 where it does not.
    fn interrupt_status(&self) -> u8;
    /// A number that differs when the configuration has changed.
    fn config_generation(&self) -> u8;
    /// Reads 32 bits of the configuration at byte `offset` (a multiple of 4), or `None` outside it.
    fn config_read(&self, offset: usize) -> Option<u32>;
    /// Writes 32 bits of the configuration at byte `offset` (a multiple of 4). Outside it, does nothing.
    fn config_write(&self, offset: usize, value: u32);
    /// Writes 8 bits of the configuration at byte `offset`. Outside it, does nothing.
    fn config_write8(&self, offset: usize, value: u8);
}

/// Resets the device and waits until it says that it has \[2.4, 4.1.4.3.1\]. When this returns `Ok` the device has forgotten its
/// queues and every request, and accesses no memory on their account.
///
/// # Errors
///
/// [`Error::ResetTimedOut`] at `deadline`: the device may still be using anything that it was given.
pub fn reset(transport: &dyn Transport, deadline: Deadline) -> Result<(), Error> {
    transport.set_status(0);
    loop {
        if transport.status() == 0 {
            return Ok(());
        }
        if deadline.has_passed() {
            return Err(Error::ResetTimedOut);
        }
        // A reset raises no interrupt: look again in a moment.
        let _ = base::wait_until(Deadline::after(Duration::from_micros(50)).min(deadline), || transport.status() == 0);
    }
}

/// Reads several fields of the configuration as they were at one moment.
///
/// `read` is called with a function that reads 32 bits at a byte offset; it is called again for as long as the generation
/// changes meanwhile.
///
/// # Errors
///
/// [`Error::ConfigUnstable`] when the generation kept changing until `deadline`; [`Error::BadConfig`] for a field outside the
/// configuration; what `read` returns.
pub fn read_config<R>(
    transport: &dyn Transport,
    deadline: Deadline,
    mut read: impl FnMut(&dyn Fn(usize) -> Result<u32, Error>) -> Result<R, Error>,
) -> Result<R, Error> {
    let field = |offset: usize| {
        transport
            .config_read(offset)
            .ok_or(Error::BadConfig { field: "a length that ends before byte", value: offset as u64 })
    };
    loop {
        let before = transport.config_generation();
        let value = read(&field);
        if transport.config_generation() == before {
            return value;
        }
        if deadline.has_passed() {
            return Err(Error::ConfigUnstable);
        }
    }
}

/// Whether the device has stopped working: it says so, or it has reset itself behind the driver's back.
pub fn has_failed(transport: &dyn Transport) -> bool {
    let now = transport.status();
    now & status::DEVICE_NEEDS_RESET != 0 || now & status::DRIVER_OK == 0
}
