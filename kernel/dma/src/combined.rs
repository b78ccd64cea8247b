//! Memory that the CPU streams into and a device reads: frames, command streams.

use crate::attributed::AttributedPages;
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::Cacheability;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Device, Error, ToDevice, view};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, Prot};

/// Zeroed memory that the CPU writes, past its caches and with stores merged on the way, and the device reads. There is no reading
/// back, which would be slow. Dropping it revokes the device's access.
pub struct WriteCombined {
    held: Held<ToDevice, AttributedPages>,
}

impl WriteCombined {
    pub(crate) fn new(device: &Device, bytes: u64, site: Site) -> Result<Self, Error> {
        let pages =
            AttributedPages::zeroed(device.memory(), device.coherent_request(bytes)?, Cacheability::NonCacheable)?;
        base::barrier::device_write();
        let held = Held::lend_coherent(device, pages, Prot::empty(), site)?;
        Ok(Self { held })
    }

    /// Copies `from` to the bytes from `offset` on. The device is sure to see it only after [`WriteCombined::flush`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        view::write(self.held.memory(), offset, from)
    }

    /// Drains what is being merged: everything written before is in memory before anything that is written after, a doorbell
    /// included.
    pub fn flush(&self) {
        base::barrier::publish();
    }

    /// The device's address of the first byte.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// Revokes the device's access and frees the memory, as a drop does, but says if that failed.
    ///
    /// # Errors
    ///
    /// [`Quarantined`].
    #[track_caller]
    pub fn release(self) -> Result<(), Quarantined> {
        self.held.take_back(Location::caller()).map(drop)
    }
}

lent_by_held!([] WriteCombined, ToDevice, |this| this.held.memory().run().len());

impl fmt::Debug for WriteCombined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteCombined({} at {})", self.device().name(), self.held.loan().range())
    }
}
