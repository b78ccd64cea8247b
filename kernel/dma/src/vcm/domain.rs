//! Areas of a domain that its owner fills.

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space")]

use super::Area;
use super::sealed::{self, Place};
use crate::buffer::Spans;
use crate::held;
use crate::quarantine::{self, Quarantined};
use crate::share::DeviceUser;
use crate::site::Site;
use crate::{Attributes, Direction, Error, OwnedDomain, SharedBuffer};
use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use iommu::pgtable::Leaves;
use iommu::{Iova, IovaRange, Prot};

impl sealed::Space for OwnedDomain {
    type Backed<D: Direction> = InDomain<D>;

    fn take(&self, place: Place, len: u64) -> Result<u64, Error> {
        let iova = self.domain().iova();
        match place {
            Place::Aligned(align) => {
                Ok(iova.allocate(len, align.max(iova.page_size()), Iova::new(u64::MAX))?.start().get())
            }
            Place::At(start) => {
                iova.reserve(IovaRange::new(Iova::new(start), len).ok_or(Error::BadSize(len))?)?;
                Ok(start)
            }
        }
    }

    fn give(&self, place: Place, start: u64, len: u64) {
        // It was taken so.
        let Some(range) = IovaRange::new(Iova::new(start), len) else { return };
        let given = match place {
            Place::Aligned(_) => self.domain().iova().free(range),
            Place::At(_) => self.domain().iova().release(range),
        };
        if let Err(error) = given {
            log::error!("{}: address range {range} is lost: {error}", self.name());
        }
    }

    fn back<D: Direction>(
        area: Area<Self>,
        buffer: &SharedBuffer,
        site: Site,
    ) -> Result<InDomain<D>, (Area<Self>, Error)> {
        match InDomain::<D>::map(&area, buffer) {
            Ok(user) => Ok(InDomain {
                area: ManuallyDrop::new(area),
                user: ManuallyDrop::new(user),
                site,
                direction: PhantomData,
            }),
            Err(error) => Err((area, error)),
        }
    }

    fn leaves(&self, start: u64, len: u64) -> Option<Leaves> {
        self.domain().space().leaves(IovaRange::new(Iova::new(start), len)?)
    }
}

/// A buffer in a domain, for all devices that are attached to it now or later, in direction `D`. [`InDomain::unmap`] and dropping it
/// revoke.
///
/// # Invariants
///
/// From its mapping until a revocation has succeeded the user is counted, and keeps the memory where it is.
#[must_use = "dropping a mapping ends it"]
pub struct InDomain<D: Direction> {
    area: ManuallyDrop<Area<OwnedDomain>>,
    user: ManuallyDrop<DeviceUser>,
    site: Site,
    direction: PhantomData<D>,
}

impl<D: Direction> InDomain<D> {
    fn map(area: &Area<OwnedDomain>, buffer: &SharedBuffer) -> Result<DeviceUser, Error> {
        let domain = &area.space;
        let range = IovaRange::new(Iova::new(area.start), area.len).ok_or(Error::BadSize(area.len))?;
        let user = DeviceUser::enter::<D>(buffer.inner(), !domain.is_coherent())?;
        let prot = match buffer.attributes() {
            Attributes::Registers => D::PROT | Prot::MMIO,
            Attributes::Memory(_) if domain.is_coherent() => D::PROT,
            Attributes::Memory(_) => {
                held::prepare::<D, _>(&user, 0, area.len)?;
                D::PROT | Prot::NON_COHERENT
            }
        };
        // SAFETY:
        // - the memory is the buffer's, into which nobody makes references; `user` goes into an `InDomain`, which lets go of it after
        //   a successful revocation only;
        // - whoever maps there without asking an area is refused, or refuses us: it is the domain that maps, one at a time.
        unsafe { domain.map(range, user.spans_runs(), prot) }?;
        Ok(user)
    }

    /// Where it is.
    pub fn range(&self) -> IovaRange {
        IovaRange::new(Iova::new(self.area.start), self.area.len).unwrap_or_default()
    }

    /// The leaves that map it; `None` where there are no tables to look at.
    pub fn leaves(&self) -> Option<Leaves> {
        self.area.leaves()
    }

    /// Revokes every device's access through this domain, and gives the addresses back, with nothing behind them.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: addresses and memory are never used again.
    pub fn unmap(self) -> Result<Area<OwnedDomain>, Quarantined> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used afterwards, and not dropped.
        unsafe { this.end() }
    }

    /// # Safety
    ///
    /// Called once; the object is not used afterwards, and not dropped.
    unsafe fn end(&mut self) -> Result<Area<OwnedDomain>, Quarantined> {
        let domain = self.area.space.clone();
        if let Err(cause) = domain.revoke(self.range()) {
            // Address space, addresses and memory stay.
            let lost =
                Quarantined { device: domain.shared_name().clone(), range: self.range(), cause, mapped_at: self.site };
            quarantine::add(&lost);
            return Err(lost);
        }
        if !domain.is_coherent() {
            // The whole of the memory is always in range.
            let _ = held::fetch::<D, _>(&*self.user, 0, self.area.len);
        }
        if D::DEVICE_WRITES {
            base::barrier::device_read();
        }
        // SAFETY: the caller's promise: dropped once.
        unsafe { ManuallyDrop::drop(&mut self.user) };
        // SAFETY: as above: taken once.
        Ok(unsafe { ManuallyDrop::take(&mut self.area) })
    }
}

impl<D: Direction> Drop for InDomain<D> {
    fn drop(&mut self) {
        // SAFETY: in `drop`, which runs once (`unmap` keeps it from running), and last.
        drop(unsafe { self.end() });
    }
}

impl<D: Direction> fmt::Debug for InDomain<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InDomain({} in {}, {:?})", self.range(), self.area.space.name(), D::PROT)
    }
}
