//! Coherent memory for a device that other address spaces see too: all of them at the same time, and all the time.
//!
//! A [`Coherent`](crate::Coherent) hands out references to its atomics, so that nobody but Rust code and the device may have it. Of
//! this memory there is no reference at all: the kernel copies in and out, and whoever maps it holds the object.

use super::Attributes;
use crate::attributed::AttributedPages;
use crate::buffer::Spans;
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::Cacheability;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Bidirectional, Device, Error, view};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, PhysRange, Prot};

/// Zeroed memory that a device, the kernel, and whoever maps its runs have at the same time: in one piece for all of them. Dropping it
/// revokes the device's access, and frees the memory; who maps it keeps it until no access by that mapping is possible any more.
///
/// # Invariants
///
/// Nobody makes a reference into the memory.
pub struct CoherentPages {
    held: Held<Bidirectional, AttributedPages>,
    cacheability: Cacheability,
}

impl CoherentPages {
    /// Allocates at least `bytes`, rounded up to pages: cached where the device snoops, else not.
    ///
    /// # Errors
    ///
    /// As [`Device::map`], and [`Error::Attributes`] where there is no memory of this kind.
    #[track_caller]
    pub fn new(device: &Device, bytes: u64) -> Result<Self, Error> {
        let cacheability = if device.is_coherent() { Cacheability::WriteBack } else { Cacheability::NonCacheable };
        Self::allocate(device, bytes, cacheability, Location::caller())
    }

    /// As [`CoherentPages::new`], but not cached, whatever the device does.
    ///
    /// # Errors
    ///
    /// As there.
    #[track_caller]
    pub fn not_cached(device: &Device, bytes: u64) -> Result<Self, Error> {
        Self::allocate(device, bytes, Cacheability::NonCacheable, Location::caller())
    }

    fn allocate(device: &Device, bytes: u64, cacheability: Cacheability, site: Site) -> Result<Self, Error> {
        let pages = AttributedPages::zeroed(device.memory(), device.coherent_request(bytes)?, cacheability)?;
        base::barrier::device_write();
        let held = Held::lend_coherent(device, pages, Prot::empty(), site)?;
        if held.loan().segments().len() != 1 {
            // Only where bus windows meet in the middle of it.
            let memory = held.memory().run();
            return Err(Error::Unreachable { device: device.shared_name().clone(), memory });
        }
        Ok(Self { held, cacheability })
    }

    /// The device's address of the first byte; all others follow it.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// Where it is: one run of whole pages.
    pub fn runs(&self) -> &[PhysRange] {
        self.held.memory().spans_runs()
    }

    /// How it is to be mapped: other attributes would see other bytes.
    pub fn attributes(&self) -> Attributes {
        Attributes::Memory(self.cacheability)
    }

    /// Copies the bytes from `offset` on to `to`, as they are by now.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        base::barrier::device_read();
        view::read(self.held.memory(), offset, to)
    }

    /// Copies `from` to the bytes from `offset` on: there before anything that is written after.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        view::write(self.held.memory(), offset, from)?;
        base::barrier::device_write();
        Ok(())
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

lent_by_held!([] CoherentPages, Bidirectional, |this| this.held.memory().run().len());

impl fmt::Debug for CoherentPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CoherentPages({} at {})", self.device().name(), self.held.loan().range())
    }
}
