//! Drivers as the classes that the kernel's main job uses.

mod blk;
mod edu;
mod gpu;

pub use blk::BlockDisk;
pub use edu::EduStray;
pub use gpu::GpuScreen;

use crate::{Error, Master};
use alloc::string::ToString;
use alloc::sync::Arc;
use base::irq::Handler;
use pci::Msix;
use virtio::device::Vectors;

/// Milliseconds that a device gets to start or to stop.
pub(crate) const LIFECYCLE_MILLIS: u64 = 2_000;

/// A virtio error with the name of the device.
pub(crate) fn virtio(master: &Master, error: virtio::Error) -> Error {
    Error::Virtio { name: master.device().name().to_string(), error }
}

/// The MSI-X vectors of a virtio device: the first for its configuration, the second for its queue; a device with one has it
/// serve the queue.
pub(crate) struct Wiring {
    msix: Msix,
    pub vectors: Vectors,
}

impl Wiring {
    /// Enables MSI-X with all vectors masked.
    pub fn new(master: &Master) -> Result<Self, Error> {
        let pci = |error| Error::Pci { name: master.device().name().to_string(), error };
        let msix = Msix::new(master.function().clone(), master.messages()).map_err(pci)?;
        let vectors = if msix.count() > 1 {
            Vectors { config: Some(0), queue: Some(1) }
        } else {
            Vectors { config: None, queue: Some(0) }
        };
        Ok(Self { msix, vectors })
    }

    /// Has the handlers serve the vectors. What came in before is served now.
    pub fn connect(&mut self, master: &Master, config: Arc<dyn Handler>, queue: Arc<dyn Handler>) -> Result<(), Error> {
        let pci = |error| Error::Pci { name: master.device().name().to_string(), error };
        if let Some(vector) = self.vectors.config {
            self.msix.connect(vector, config).map_err(pci)?;
        }
        if let Some(vector) = self.vectors.queue {
            self.msix.connect(vector, queue).map_err(pci)?;
        }
        Ok(())
    }
}
