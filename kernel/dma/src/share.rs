//! Buffers that several devices have at once: a device-independent buffer, mapped for each importer in its own address space.
//!
//! Devices may use the buffer side by side; what orders them is the business of who starts them. Between devices and the CPU
//! there is a rule, and breaking it is an error, never a silent race: the CPU has no access while a device may write, and a
//! device gets no access that conflicts with one of the CPU's. The CPU may write while devices only read (a picture that is
//! being scanned out): by atomic copies, which a device sees whole or not at all, field by field.
//!
//! # Locking
//!
//! One [`IrqMutex`] for each buffer, a leaf: who uses the buffer. It is not held while mapping or revoking.

#![expect(unsafe_code, reason = "promises that the shared pages are reached by atomics only")]

use crate::buffer::{Span, Spans};
use crate::error::BusyWith;
use crate::gather::Parts;
use crate::held::Held;
use crate::lent::{Lent, Segment, sealed};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::{Device, DeviceReads, DeviceWrites, Direction, Error, PageSet, Rejected, view};
use alloc::sync::Arc;
use base::{IrqMutex, fallible};
use core::fmt;
use core::marker::PhantomData;
use core::panic::Location;
use iommu::{Iova, PhysRange};

/// Memory that several devices may have at once. Clones are the same buffer.
#[derive(Clone)]
pub struct SharedBuffer(Arc<Inner>);

/// # Invariants
///
/// Nobody makes a reference into `pages` (only [`SharedBuffer::into_pages`] takes them out, alone).
struct Inner {
    name: Arc<str>,
    pages: PageSet,
    users: IrqMutex<Users>,
}

/// Who uses a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Devices that may read, and no more.
    pub device_readers: u32,
    /// Devices that may write.
    pub device_writers: u32,
    /// Those among the writers that write a copy, which becomes the buffer's contents when they are done: one at most, and no
    /// other writer beside it.
    pub copied_writers: u32,
    /// Devices of either kind that do not snoop the caches.
    pub unsnooping: u32,
    /// Accesses of the CPU that read.
    pub cpu_readers: u32,
    /// Accesses of the CPU that write: one at most.
    pub cpu_writers: u32,
}

impl SharedBuffer {
    /// Makes `pages` shareable. The `name` is for errors and reports.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the pages back where there is no memory for the handle.
    pub fn try_new(name: &str, pages: PageSet) -> Result<Self, Rejected<PageSet>> {
        let Some(name) = fallible::text(name) else {
            return Err(Rejected { buffer: pages, error: Error::OutOfMemory });
        };
        match fallible::arc(Inner { name, pages, users: IrqMutex::default() }) {
            Ok(inner) => Ok(Self(inner)),
            Err(Inner { pages, .. }) => Err(Rejected { buffer: pages, error: Error::OutOfMemory }),
        }
    }

    /// As [`SharedBuffer::try_new`], for tests and the like: ends the program where there is no memory for the handle.
    pub fn new(name: &str, pages: PageSet) -> Self {
        Self(Arc::new(Inner { name: name.into(), pages, users: IrqMutex::default() }))
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The size in bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.0.pages.len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Who uses it at this moment.
    pub fn users(&self) -> Users {
        *self.0.users.lock()
    }

    /// Lends the buffer to `device`, besides those that have it already.
    ///
    /// Where the device gets a copy, others see what it writes, and it sees what others write meanwhile, when the attachment
    /// is synced, and the former at its end. It is then the only one that may write.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while the CPU has an access that conflicts, or another device may write and one of the two gets a copy;
    /// and as [`Device::map`].
    #[track_caller]
    pub fn attach<D: Direction>(&self, device: &Device) -> Result<Attachment<D>, Error> {
        let user = DeviceUser::enter::<D>(&self.0, !device.is_coherent())?;
        let mut held = Held::lend(device, user, Location::caller()).map_err(|(_, error)| error)?;
        if D::DEVICE_WRITES
            && held.is_copy()
            && let Err(error) = held.memory_mut().write_alone()
        {
            // Others write the buffer itself.
            held.discard_copy();
            return Err(error);
        }
        Ok(Attachment { held })
    }

    /// Lets the CPU access the buffer, to read or to write ([`CpuReads`], [`CpuWrites`]), until the result is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a device may write, or another access of the CPU conflicts.
    pub fn cpu_access<A: CpuIntent>(&self) -> Result<CpuAccess<'_, A>, Error> {
        self.0.enter(|users| {
            if users.device_writers != 0 {
                return Err(BusyWith::DeviceWrites);
            }
            if users.cpu_writers != 0 {
                return Err(BusyWith::CpuWrites);
            }
            if A::WRITES && users.cpu_readers != 0 {
                return Err(BusyWith::CpuReads);
            }
            count(if A::WRITES { &mut users.cpu_writers } else { &mut users.cpu_readers })
        })?;
        Ok(CpuAccess { buffer: &self.0, intent: PhantomData })
    }

    /// Gives the pages back when nobody else has the buffer: no attachment, and no clone.
    ///
    /// # Errors
    ///
    /// The buffer, while somebody has it. For ever, if the revocation of an attachment failed.
    pub fn into_pages(self) -> Result<PageSet, Self> {
        Arc::try_unwrap(self.0).map(|inner| inner.pages).map_err(Self)
    }
}

impl fmt::Debug for SharedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBuffer({}, {:?}, {:?})", self.0.name, self.0.pages, self.users())
    }
}

impl Inner {
    /// Lets somebody in, if `admit` finds a way to count them; otherwise nothing is changed.
    fn enter(&self, admit: impl FnOnce(&mut Users) -> Result<(), BusyWith>) -> Result<(), Error> {
        let admitted = {
            let mut users = self.users.lock();
            let mut counted = *users;
            admit(&mut counted).map(|()| *users = counted)
        };
        admitted.map_err(|by| Error::Busy { buffer: self.name.clone(), by })
    }
}

/// Counts one more user.
fn count(users: &mut u32) -> Result<(), BusyWith> {
    *users = users.checked_add(1).ok_or(BusyWith::TooMany)?;
    Ok(())
}

/// One device's use of a buffer: counted while it lives.
pub struct DeviceUser {
    buffer: Arc<Inner>,
    writes: bool,
    unsnooping: bool,
    /// It writes a copy.
    copied: bool,
}

impl DeviceUser {
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

    fn enter<D: Direction>(buffer: &Arc<Inner>, unsnooping: bool) -> Result<Self, Error> {
        buffer.enter(|users| {
            if users.cpu_writers != 0 {
                return Err(BusyWith::CpuWrites);
            }
            if D::DEVICE_WRITES && users.cpu_readers != 0 {
                return Err(BusyWith::CpuReads);
            }
            if D::DEVICE_WRITES && users.copied_writers != 0 {
                return Err(BusyWith::DeviceWrites);
            }
            if unsnooping {
                // Never more than there are devices, which are counted next.
                users.unsnooping = users.unsnooping.saturating_add(1);
            }
            count(if D::DEVICE_WRITES { &mut users.device_writers } else { &mut users.device_readers })
        })?;
        Ok(Self { buffer: buffer.clone(), writes: D::DEVICE_WRITES, unsnooping, copied: false })
    }
}

impl Drop for DeviceUser {
    fn drop(&mut self) {
        let mut users = self.buffer.users.lock();
        *(if self.writes { &mut users.device_writers } else { &mut users.device_readers }) -= 1;
        users.unsnooping -= u32::from(self.unsnooping);
        users.copied_writers -= u32::from(self.copied);
    }
}

// SAFETY:
// - the pages belong to the buffer, which this keeps alive, and their spans and runs are those of the set;
// - nobody makes references into them (invariant of Inner), so that several owners of this kind do not disturb each other;
// - forgotten, it keeps its count of the buffer for ever, and with it the pages.
unsafe impl Spans for DeviceUser {
    fn spans_runs(&self) -> &[PhysRange] {
        self.buffer.pages.spans_runs()
    }
    fn spans_len(&self) -> u64 {
        self.buffer.pages.spans_len()
    }
    fn span(&self, offset: u64) -> Option<Span> {
        self.buffer.pages.span(offset)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.buffer.pages.maintained_by()
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
    /// The device's address of the first byte. All others follow it where [`Lent::segments`] is one segment.
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
    /// which not all snoop the caches, before the other one reads.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads> Attachment<D> {
    /// Lets this device see what was written so far to the `len` bytes at `offset`, by a device that snoops.
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

impl<D: Direction> sealed::Sealed for Attachment<D> {}

impl<D: Direction> Lent for Attachment<D> {
    fn device(&self) -> &Device {
        &self.held.loan().device
    }
    fn len(&self) -> u64 {
        self.held.memory().spans_len()
    }
    fn segments(&self) -> &[Segment] {
        self.held.loan().segments()
    }
    fn device_reads(&self) -> bool {
        D::DEVICE_READS
    }
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
}

impl<D: Direction> fmt::Debug for Attachment<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (loan, buffer) = (self.held.loan(), &self.held.memory().buffer);
        write!(f, "Attachment({} to {} at {}, {:?})", buffer.name, loan.device.name(), loan.range(), D::PROT)
    }
}

/// What the CPU wants of a shared buffer: [`CpuReads`] or [`CpuWrites`].
pub trait CpuIntent: intent::Sealed {
    /// Whether it writes.
    const WRITES: bool;
}

/// The CPU reads.
pub struct CpuReads;

/// The CPU reads and writes.
pub struct CpuWrites;

impl CpuIntent for CpuReads {
    const WRITES: bool = false;
}
impl CpuIntent for CpuWrites {
    const WRITES: bool = true;
}

mod intent {
    pub trait Sealed {}
    impl Sealed for super::CpuReads {}
    impl Sealed for super::CpuWrites {}
}

/// An access of the CPU to a shared buffer. While it lives no device gets an access that conflicts. Forgetting it leaves the
/// buffer busy.
pub struct CpuAccess<'a, A: CpuIntent> {
    buffer: &'a Arc<Inner>,
    intent: PhantomData<A>,
}

impl<A: CpuIntent> CpuAccess<'_, A> {
    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        view::read(&self.buffer.pages, offset, to)
    }
}

impl CpuAccess<'_, CpuWrites> {
    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), Error> {
        view::write(&self.buffer.pages, offset, from)?;
        if self.buffer.users.lock().unsnooping != 0 {
            crate::held::prepare::<crate::ToDevice, _>(&self.buffer.pages, offset, from.len() as u64)?;
        }
        base::barrier::device_write();
        Ok(())
    }
}

impl<A: CpuIntent> Drop for CpuAccess<'_, A> {
    fn drop(&mut self) {
        let mut users = self.buffer.users.lock();
        *(if A::WRITES { &mut users.cpu_writers } else { &mut users.cpu_readers }) -= 1;
    }
}
