//! Areas of a device's DMA domain.

#![expect(unsafe_code, reason = "passes the promises of a shared buffer's user on")]

use super::Area;
use super::sealed::{self, Place};
use crate::buffer::{Span, Spans};
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::share::{DeviceUser, Inner, Synced, supplied, synced};
use crate::site::Site;
use crate::{Attributes, Device, Direction, Error, SharedBuffer};
use alloc::sync::Arc;
use core::fmt;
use core::panic::Location;
use iommu::pgtable::Leaves;
use iommu::{Iova, IovaRange, PhysRange, Prot};

impl sealed::Space for Device {
    type Backed<D: Direction> = InDevice<D>;

    fn take(&self, place: Place, len: u64) -> Result<u64, Error> {
        let translated = self.translated()?;
        match place {
            Place::Aligned(align) => Ok(translated.reserve(len, align, self.limits())?.start().get()),
            Place::At(start) => {
                let range = IovaRange::new(Iova::new(start), len).ok_or(Error::BadSize(len))?;
                translated.reserve_at(range, self.limits())?;
                Ok(start)
            }
        }
    }

    fn give(&self, place: Place, start: u64, len: u64) {
        // It was taken so.
        let (Ok(translated), Some(range)) = (self.translated(), IovaRange::new(Iova::new(start), len)) else { return };
        match place {
            Place::Aligned(_) => translated.release(range),
            Place::At(_) => translated.release_fixed(range),
        }
    }

    fn back<D: Direction>(
        area: Area<Self>,
        buffer: &SharedBuffer,
        site: Site,
    ) -> Result<InDevice<D>, (Area<Self>, Error)> {
        let device = area.space.clone();
        if buffer.attributes() == Attributes::Registers {
            let what = "registers in an area of its addresses";
            return Err((area, Error::Unsupported { device: device.shared_name().clone(), what }));
        }
        let user = match DeviceUser::enter::<D>(buffer.inner(), !device.is_coherent()) {
            Ok(user) => user,
            Err(error) => return Err((area, error)),
        };
        let iova = Iova::new(area.start);
        match Held::lend_reserved(&device, iova, Link { user, area }, Prot::empty(), site) {
            Ok(held) => Ok(InDevice { held }),
            Err((link, error)) => Err((link.area, error)),
        }
    }

    fn leaves(&self, start: u64, len: u64) -> Option<Leaves> {
        self.translated().ok()?.space().leaves(IovaRange::new(Iova::new(start), len)?)
    }
}

/// A buffer and its addresses.
pub struct Link {
    // In the order of dropping.
    user: DeviceUser,
    area: Area<Device>,
}

// SAFETY: all are those of the buffer's user, by whose promises; forgotten, it forgets that.
unsafe impl Spans for Link {
    fn spans_runs(&self) -> &[PhysRange] {
        self.user.spans_runs()
    }
    fn spans_len(&self) -> u64 {
        self.user.spans_len()
    }
    fn span(&self, offset: u64) -> Option<Span> {
        self.user.span(offset)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.user.maintained_by()
    }
    fn has_others(&self) -> bool {
        true
    }
}

/// A buffer that a device has at addresses that were reserved, in direction `D`. [`InDevice::unmap`] and dropping it revoke.
#[must_use = "dropping a mapping ends it"]
pub struct InDevice<D: Direction> {
    held: Held<D, Link>,
}

impl<D: Direction> InDevice<D> {
    /// The device's address of the first byte; all others follow it.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// The leaves that map it; `None` where there are no tables to look at.
    pub fn leaves(&self) -> Option<Leaves> {
        self.held.memory().area.leaves()
    }

    /// Revokes the device's access, and gives the addresses back, with nothing behind them.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: addresses and memory are never used again.
    #[track_caller]
    pub fn unmap(self) -> Result<Area<Device>, Quarantined> {
        let Link { user, area } = self.held.take_back(Location::caller())?;
        drop(user);
        Ok(area)
    }
}

lent_by_held!([D: Direction] InDevice<D>, D, |this| this.held.memory().spans_len(), shared);

impl<D: Direction> Synced for InDevice<D> {
    fn buffer(&self) -> &Arc<Inner> {
        self.held.memory().user.buffer()
    }
    fn fetch(&self) -> Result<(), Error> {
        synced(&self.held, D::DEVICE_WRITES, Held::sync_for_cpu)
    }
    fn supply(&self) -> Result<(), Error> {
        supplied(&self.held)
    }
}

impl<D: Direction> fmt::Debug for InDevice<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InDevice({:?} to {}, {:?})", self.held.memory().area, self.device().name(), D::PROT)
    }
}
