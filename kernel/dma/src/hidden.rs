//! Memory that the CPU has no mapping of: a device's own scratch space.

use crate::attributed::AttributedPages;
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::Cacheability;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Bidirectional, Device, Error};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, Prot};

/// Zeroed memory that only the device reaches: the pages have left the kernel's address space, so that nothing the CPU does by
/// mistake or by speculation touches them. Dropping it revokes the device's access; then the pages come back.
pub struct HiddenPages {
    held: Held<Bidirectional, AttributedPages>,
}

impl HiddenPages {
    pub(crate) fn new(device: &Device, bytes: u64, site: Site) -> Result<Self, Error> {
        let pages = AttributedPages::zeroed(device.memory(), device.coherent_request(bytes)?, Cacheability::Unmapped)?;
        let held = Held::lend_coherent(device, pages, Prot::empty(), site)?;
        Ok(Self { held })
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

lent_by_held!([] HiddenPages, Bidirectional, |this| this.held.memory().run().len());

impl fmt::Debug for HiddenPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HiddenPages({} at {})", self.device().name(), self.held.loan().range())
    }
}
