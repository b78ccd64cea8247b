//! One importer's use of a shared buffer, for as long as it has it.

#![expect(unsafe_code, reason = "promises that the shared memory is reached by atomics only; lends registers")]

use super::store::{Attributes, Store};
use super::{Inner, SharedBuffer, count};
use crate::buffer::{Span, Spans};
use crate::error::BusyWith;
use crate::gather::Parts;
use crate::held::Held;
use crate::lent::lent_by_held;
use crate::memory::{Cacheability, DmaMemory};
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Device, DeviceReads, DeviceWrites, Direction, Error};
use alloc::sync::Arc;
use core::fmt;
use core::panic::Location;
use iommu::{Iova, PhysRange, Prot};

impl SharedBuffer {
    /// Lends the buffer to `device`, besides those that have it already. It stays where it is meanwhile; who can do with less takes
    /// an [`Import`](super::Import).
    ///
    /// Where the device gets a copy, others see what it writes, and it sees what others write meanwhile, when the attachment
    /// is synced, and the former at its end. It is then the only one that may write.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while the CPU has an access that conflicts, another device may write and one of the two gets a copy, or the
    /// buffer is being moved; and as [`Device::map`].
    #[track_caller]
    pub fn attach<D: Direction>(&self, device: &Device) -> Result<Attachment<D>, Error> {
        self.attach_at(device, Location::caller())
    }

    pub(super) fn attach_at<D: Direction>(&self, device: &Device, site: Site) -> Result<Attachment<D>, Error> {
        let user = DeviceUser::enter::<D>(&self.0, !device.is_coherent())?;
        let held = match user.store() {
            Store::Pages(_) => Held::lend(device, user, site).map_err(|(_, error)| error),
            Store::Other { .. } => lend_other(device, user, site),
        };
        let mut held = held?;
        if D::DEVICE_WRITES && held.is_copy() {
            alone(&mut held)?;
        }
        Ok(Attachment { held })
    }
}

/// Lends what is not the kernel's own pages.
#[cold]
pub(super) fn lend_other<D: Direction, M: Spans + AsRef<DeviceUser>>(
    device: &Device,
    user: M,
    site: Site,
) -> Result<Held<D, M>, Error> {
    match user.as_ref().store().attributes() {
        // Nobody could copy it.
        Attributes::Memory(Cacheability::Unmapped) => Held::lend_coherent(device, user, Prot::empty(), site),
        Attributes::Memory(_) => Held::lend(device, user, site).map_err(|(_, error)| error),
        Attributes::Registers => {
            let (runs, len) = (user.spans_runs(), user.spans_len());
            // SAFETY: the range may be accessed in any way (promise of the exporter of registers); it goes into the `Held`, which gives
            // it up after the revocation only.
            let loan = unsafe { device.lend_peer(runs, len, D::PROT, site) }?;
            Ok(Held::of(loan, user))
        }
    }
}

/// Makes the writer, which has a copy, the only one.
#[cold]
pub(super) fn alone<D: Direction, M: Spans + AsMut<DeviceUser>>(held: &mut Held<D, M>) -> Result<(), Error> {
    held.memory_mut().as_mut().write_alone().inspect_err(|_| {
        // Others write the buffer itself.
        held.discard_copy();
    })
}

/// One device's use of a buffer: counted while it lives.
pub struct DeviceUser {
    buffer: Arc<Inner>,
    writes: bool,
    unsnooping: bool,
    /// It writes a copy.
    copied: bool,
}

impl AsMut<Self> for DeviceUser {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

impl AsRef<Self> for DeviceUser {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl DeviceUser {
    pub(crate) fn buffer(&self) -> &Arc<Inner> {
        &self.buffer
    }

    #[inline]
    pub(crate) fn store(&self) -> &Store {
        self.buffer.store_of_user()
    }

    /// Makes this writer the only one, because it writes a copy.
    fn write_alone(&mut self) -> Result<(), Error> {
        self.buffer.enter(|users| {
            if users.device_writers != 1 {
                return Err(BusyWith::DeviceWrites);
            }
            count(&mut users.copied_writers)
        })?;
        self.copied = true;
        Ok(())
    }

    #[inline]
    pub(crate) fn enter<D: Direction>(buffer: &Arc<Inner>, unsnooping: bool) -> Result<Self, Error> {
        buffer.enter(|users| {
            users.check_moving()?;
            if users.cpu_writers != 0 {
                return Err(BusyWith::CpuWrites);
            }
            if D::DEVICE_WRITES && users.cpu_readers != 0 {
                return Err(BusyWith::CpuReads);
            }
            if D::DEVICE_WRITES && users.copied_writers != 0 {
                return Err(BusyWith::DeviceWrites);
            }
            count(if D::DEVICE_WRITES { &mut users.device_writers } else { &mut users.device_readers })?;
            if unsnooping {
                // Of both kinds together there are fewer than a sum of 32 bits: each has a loan in memory.
                users.unsnooping = users.unsnooping.wrapping_add(1);
            }
            Ok(())
        })?;
        Ok(Self { buffer: buffer.clone(), writes: D::DEVICE_WRITES, unsnooping, copied: false })
    }
}

impl Drop for DeviceUser {
    #[inline]
    fn drop(&mut self) {
        self.buffer.leave(|users| {
            *(if self.writes { &mut users.device_writers } else { &mut users.device_readers }) -= 1;
            users.unsnooping = users.unsnooping.wrapping_sub(self.unsnooping.into());
            users.copied_writers -= u32::from(self.copied);
        });
    }
}

// SAFETY:
// - the memory belongs to the buffer, which this keeps alive and, being counted, where it is; spans and runs are the store's;
// - nobody makes references into it (invariant of Inner), so that several owners of this kind do not disturb each other;
// - forgotten, it keeps its count of the buffer for ever, and with it the memory.
unsafe impl Spans for DeviceUser {
    #[inline]
    fn spans_runs(&self) -> &[PhysRange] {
        self.store().spans_runs()
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        self.buffer.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        self.store().span(offset)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.store().maintained_by()
    }
    fn has_others(&self) -> bool {
        true
    }
}

/// A shared buffer that one device has, in direction `D`. [`Attachment::detach`] and dropping it revoke.
#[must_use = "dropping an attachment ends it"]
pub struct Attachment<D: Direction> {
    held: Held<D, DeviceUser>,
}

impl<D: Direction> Attachment<D> {
    /// The device's address of the first byte. All others follow it where [`Lent::segments`](crate::Lent::segments) is one segment.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// The buffer.
    pub fn buffer(&self) -> SharedBuffer {
        SharedBuffer(self.held.memory().buffer.clone())
    }

    /// Revokes the device's access.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the buffer never gives its pages back, and stays busy if the device may
    /// write.
    #[track_caller]
    pub fn detach(self) -> Result<(), Quarantined> {
        self.held.take_back(Location::caller()).map(drop)
    }
}

impl<D: DeviceWrites> Attachment<D> {
    /// Takes what this device has written so far to the `len` bytes at `offset` where everybody sees it. Between devices of
    /// which not all snoop the caches, before the other one reads. (The end of a [`Job`](super::Job) does it for all.)
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads> Attachment<D> {
    /// Lets this device see what was written so far to the `len` bytes at `offset`, by a device that snoops. (The beginning of a
    /// [`Job`](super::Job) does it for all.)
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_device(offset, len)
    }
}

impl<D: Direction> Parts for Attachment<D> {
    type Direction = D;
    type Memory = DeviceUser;
    fn into_held(self) -> Held<D, DeviceUser> {
        self.held
    }
}

lent_by_held!([D: Direction] Attachment<D>, D, |this| this.held.memory().spans_len(), shared);

impl<D: Direction> super::job::Synced for Attachment<D> {
    fn buffer(&self) -> &Arc<Inner> {
        self.held.memory().buffer()
    }
    fn fetch(&self) -> Result<(), Error> {
        synced(&self.held, D::DEVICE_WRITES, Held::sync_for_cpu)
    }
    fn supply(&self) -> Result<(), Error> {
        supplied(&self.held)
    }
}

/// Syncs all of a loan before its device is let loose. One that does not snoop is to find no line in the caches that is newer than
/// memory: neither where it reads, nor where it writes, as what another device left there would be written back over its bytes. A
/// copy has no such lines.
pub(crate) fn supplied<D: Direction, M: Spans>(held: &Held<D, M>) -> Result<(), Error> {
    synced(held, D::DEVICE_READS || !held.is_copy(), Held::sync_for_device)
}

/// Syncs all of a loan where that moves data.
pub(crate) fn synced<D: Direction, M: Spans>(
    held: &Held<D, M>,
    concerned: bool,
    sync: impl Fn(&Held<D, M>, u64, u64) -> Result<(), Error>,
) -> Result<(), Error> {
    let moves = concerned && (held.is_copy() || !held.loan().device.is_coherent());
    // Where it moves none, the barrier is all that is wanted of it.
    let len = if moves { held.memory().spans_len() } else { 0 };
    sync(held, 0, len)
}

impl<D: Direction> fmt::Debug for Attachment<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (loan, buffer) = (self.held.loan(), &self.held.memory().buffer);
        write!(f, "Attachment({} to {} at {}, {:?})", buffer.name, loan.device.name(), loan.range(), D::PROT)
    }
}
