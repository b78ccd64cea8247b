//! A virtio device in software, for tests: it behaves well, or badly in every way that a driver must survive.
//!
//! The device reaches memory only through a [`Bus`], which is to permit what the IOMMU of the test permits: an access to memory
//! that is not lent fails and is counted. It runs when it is told to ([`FakeDevice::run`]), when it is notified, or in a thread
//! of its own.

mod chain;
mod device;
mod disk;
mod display;
mod iommu;

pub use chain::{Chain, DeviceQueue};
pub use device::{Behaviour, FakeDevice, Registers};
pub use disk::MemoryDisk;
pub use display::MemoryDisplay;
pub use iommu::{Asked, MemoryIommu};

use ::iommu::Iova;

/// What a device reaches.
pub trait Bus: Send + Sync {
    /// Reads `bytes.len()` bytes at `iova`, or returns `false` where that is not lent for reading.
    fn read(&self, iova: Iova, bytes: &mut [u8]) -> bool;
    /// Writes, or returns `false` where that is not lent for writing.
    fn write(&self, iova: Iova, bytes: &[u8]) -> bool;
}

/// What a device does with a request.
pub trait Model: Send {
    /// Carries out the request on `queue` and returns how many bytes it wrote.
    fn execute(&mut self, queue: u16, chain: &Chain, bus: &dyn Bus) -> u32;
    /// Whether requests on `queue` are buffers that the device keeps until it has something to put into them.
    fn holds(&self, queue: u16) -> bool {
        let _ = queue;
        false
    }
    /// Forgets everything: the device was reset.
    fn reset(&mut self) {}
}

impl Bus for dma::fakes::FakeBusMaster {
    fn read(&self, iova: Iova, bytes: &mut [u8]) -> bool {
        Self::read(self, iova, bytes).is_ok()
    }

    fn write(&self, iova: Iova, bytes: &[u8]) -> bool {
        Self::write(self, iova, bytes).is_ok()
    }
}
