//! Streaming mappings: owned memory that a device has for a while (rule R3).

use crate::held::Held;
use crate::lazy::{Lapsing, Strictness};
use crate::lent::{Segment, lent_by_held};
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Buffer, Device, DeviceReads, DeviceWrites, Direction, Error, Rejected, View};
use core::fmt;
use core::panic::Location;
use iommu::Iova;

/// A buffer that a device has, in direction `D`. It exists exactly as long as the device has access: [`Mapped::unmap`] and
/// dropping it revoke, `mem::forget` leaks it.
#[must_use = "dropping a mapping ends it"]
pub struct Mapped<D: Direction, B: Buffer> {
    held: Held<D, B>,
}

impl<D: Direction, B: Buffer> Mapped<D, B> {
    #[inline(always)]
    pub(crate) fn new(device: &Device, buffer: B, site: Site) -> Result<Self, Rejected<B>> {
        match Held::lend(device, buffer, site) {
            Ok(held) => Ok(Self { held }),
            Err((buffer, error)) => Err(Rejected { buffer, error }),
        }
    }

    pub(crate) fn new_at(device: &Device, iova: Iova, buffer: B, site: Site) -> Result<Self, Rejected<B>> {
        match Held::lend_at(device, Some(iova), buffer, site) {
            Ok(held) => Ok(Self { held }),
            Err((buffer, error)) => Err(Rejected { buffer, error }),
        }
    }

    /// The device's address of the first byte. All others follow it where [`Lent::segments`](crate::Lent::segments) is one segment, as it
    /// always is behind an IOMMU.
    #[inline]
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// The size in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.held.memory().spans_len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// See [`Lent::segments`](crate::Lent::segments).
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        self.held.loan().segments()
    }

    /// Looks at the memory while the device has it. On a device that does not snoop the caches, call
    /// [`Mapped::sync_for_cpu`] before reading and [`Mapped::sync_for_device`] after writing.
    #[inline]
    pub fn view(&self) -> View<'_, D, B> {
        View::of(self.held.memory(), self.held.loan().copy())
    }

    /// Ends the mapping lazily: the result yields the buffer after a flush that covers it (see [`Lapsing`]). The mapping ends
    /// at once where the device's [`Strictness`] says so, where nothing translates, and where it has no range that is kept for it:
    /// [`lazy`](crate::lazy) says which have.
    #[inline(always)]
    #[track_caller]
    pub fn unmap_lazy(self) -> Lapsing<D, B> {
        Lapsing::new(self.held, Strictness::UnlessAsked, Location::caller())
    }

    /// Ends the mapping lazily if the device is [`Strictness::Relaxed`], otherwise at once. For drivers that do not need the
    /// buffer back soon and leave the choice to whoever runs the kernel.
    #[inline(always)]
    #[track_caller]
    pub fn unmap_relaxed(self) -> Lapsing<D, B> {
        Lapsing::new(self.held, Strictness::Relaxed, Location::caller())
    }

    #[inline]
    pub(crate) fn into_held(self) -> Held<D, B> {
        self.held
    }

    /// Revokes the device's access and gives the buffer back, with what the device wrote.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the buffer is lost.
    #[inline]
    #[track_caller]
    pub fn unmap(self) -> Result<B, Quarantined> {
        self.held.take_back(Location::caller())
    }
}

impl<D: DeviceWrites, B: Buffer> Mapped<D, B> {
    /// Lets the CPU see what the device has written so far to the `len` bytes at `offset`. On a device that does not snoop,
    /// what the CPU wrote there without a [`Mapped::sync_for_device`] may be lost.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads, B: Buffer> Mapped<D, B> {
    /// Lets the device see what the CPU has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_device(offset, len)
    }
}

lent_by_held!([D: Direction, B: Buffer] Mapped<D, B>, D, |this| Mapped::len(this));

impl<D: Direction, B: Buffer> fmt::Debug for Mapped<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loan = self.held.loan();
        write!(f, "Mapped({} at {}, {:?})", loan.device.name(), loan.range(), D::PROT)
    }
}
