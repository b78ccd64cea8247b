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
use pci::{Msix, PciError, Wire};
use virtio::device::{ConfigHandler, Vectors, Wired};
use virtio::transport::PciTransport;

/// Milliseconds that a device gets to start or to stop.
pub(crate) const LIFECYCLE_MILLIS: u64 = 2_000;

/// A virtio error with the name of the device.
pub(crate) fn virtio(master: &Master, error: virtio::Error) -> Error {
    Error::Virtio { name: master.device().name().to_string(), error }
}

/// How a device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// By message.
    Message,
    /// By wire.
    Wire,
}

/// How a virtio device interrupts: by its MSI-X vectors, the first for its configuration, the second for its queue (a device with one
/// has it serve the queue), or by wire where it has none or nothing takes its messages.
pub(crate) struct Wiring {
    means: Means,
    pub vectors: Vectors,
}

enum Means {
    Messages(Msix),
    Wire(Option<Wire>),
}

impl Wiring {
    /// Decides how, and enables MSI-X with all vectors masked if it is by message.
    pub fn new(master: &Master) -> Result<Self, Error> {
        let by_wire = Self { means: Means::Wire(None), vectors: Vectors::default() };
        let messages = master.messages();
        if !messages.has(master.function().requester_id(), 2) {
            return Ok(by_wire);
        }
        let msix = match Msix::new(master.function().clone(), messages) {
            Ok(msix) => msix,
            // Some have no vectors.
            Err(PciError::NoCapability(_)) => return Ok(by_wire),
            Err(error) => return Err(Error::Pci { name: master.device().name().to_string(), error }),
        };
        let vectors = if msix.count() > 1 {
            Vectors { config: Some(0), queue: Some(1) }
        } else {
            Vectors { config: None, queue: Some(0) }
        };
        Ok(Self { means: Means::Messages(msix), vectors })
    }

    /// Has the handlers serve the device. What came in before is served now.
    pub fn connect(
        &mut self,
        master: &Master,
        transport: &Arc<PciTransport>,
        config: Arc<ConfigHandler>,
        queue: Arc<dyn Handler>,
    ) -> Result<(), Error> {
        let pci = |error| Error::Pci { name: master.device().name().to_string(), error };
        match &mut self.means {
            Means::Messages(msix) => {
                if let Some(vector) = self.vectors.config {
                    msix.connect(vector, config).map_err(pci)?;
                }
                if let Some(vector) = self.vectors.queue {
                    msix.connect(vector, queue).map_err(pci)?;
                }
            }
            Means::Wire(wire) => {
                *wire = Some(master.connect_wire(Arc::new(Wired::new(transport.clone(), config, queue)))?);
            }
        }
        Ok(())
    }

    /// How the device interrupts.
    pub fn signal(&self) -> Signal {
        match self.means {
            Means::Messages(_) => Signal::Message,
            Means::Wire(_) => Signal::Wire,
        }
    }

    /// The wire, where the device has one in use.
    pub fn wire(&self) -> Option<&Wire> {
        match &self.means {
            Means::Messages(_) => None,
            Means::Wire(wire) => wire.as_ref(),
        }
    }
}
