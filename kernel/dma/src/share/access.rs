//! Accesses of the CPU to a shared buffer: begun, and ended by a drop.

use super::{Conflict, Inner, SharedBuffer, State, Store, Users, count, never};
use crate::buffer::Spans;
use crate::error::BusyWith;
use crate::{Error, view};
use alloc::sync::Arc;
use base::Deadline;
use core::marker::PhantomData;

impl SharedBuffer {
    /// Lets the CPU access the buffer, to read or to write ([`CpuReads`], [`CpuWrites`]), until the result is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a device may write, a device is at work on what the CPU would write, another access of the CPU
    /// conflicts, or the buffer is being moved; [`Error::NotForCpu`] where the CPU has no mapping of it.
    pub fn cpu_access<A: CpuIntent>(&self) -> Result<CpuAccess<'_, A>, Error> {
        self.0.admit(CpuAccess::<A>::admit)?;
        self.0.cpu_access()
    }

    /// As [`SharedBuffer::cpu_access`], but waits for those who stand in the way.
    ///
    /// # Errors
    ///
    /// As there, with who stood in the way when `deadline` passed; [`Error::JobFailed`] where a device has not done what was to be
    /// awaited.
    pub fn cpu_access_by<A: CpuIntent>(&self, deadline: Deadline) -> Result<CpuAccess<'_, A>, Error> {
        self.0.admit_by(deadline, &never, CpuAccess::<A>::admit)?;
        self.0.cpu_access()
    }
}

impl Inner {
    /// The access of somebody who has been admitted.
    fn cpu_access<A: CpuIntent>(self: &Arc<Self>) -> Result<CpuAccess<'_, A>, Error> {
        let access = CpuAccess { buffer: self, intent: PhantomData };
        match access.store().span(0) {
            Some(_) => Ok(access),
            None => Err(Error::NotForCpu(self.name.clone())),
        }
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
    fn admit(state: &mut State) -> Result<(), Conflict> {
        admit(state, A::WRITES)
    }

    /// Whether it is an access of `buffer`.
    pub(crate) fn is_of(&self, buffer: &SharedBuffer) -> bool {
        Arc::ptr_eq(self.buffer, &buffer.0)
    }

    fn store(&self) -> &Store {
        self.buffer.store_of_user()
    }

    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        view::read(self.store(), offset, to)
    }
}

impl CpuAccess<'_, CpuWrites> {
    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), Error> {
        view::write(self.store(), offset, from)?;
        self.written(offset, from.len() as u64)
    }

    /// Lets devices see what was written to the `len` bytes at `offset`.
    pub(crate) fn written(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.buffer.written(offset, len)
    }
}

impl<A: CpuIntent> Drop for CpuAccess<'_, A> {
    fn drop(&mut self) {
        self.buffer.leave(|users| *counted(users, A::WRITES) -= 1);
    }
}

/// Lets an access of the CPU's in, by whatever mapping.
#[inline]
pub(super) fn admit(state: &mut State, writes: bool) -> Result<(), Conflict> {
    let users = &mut state.users;
    users.check_moving()?;
    if users.device_writers != 0 {
        return Err(BusyWith::DeviceWrites.into());
    }
    if users.cpu_writers != 0 {
        return Err(BusyWith::CpuWrites.into());
    }
    if writes && users.cpu_readers != 0 {
        return Err(BusyWith::CpuReads.into());
    }
    state.jobs.check(writes, None)?;
    Ok(count(counted(&mut state.users, writes))?)
}

/// Where accesses are counted.
#[inline]
pub(super) fn counted(users: &mut Users, writes: bool) -> &mut u32 {
    if writes { &mut users.cpu_writers } else { &mut users.cpu_readers }
}

impl Inner {
    /// Lets devices see what the CPU, whose access it is, has written to the `len` bytes at `offset`.
    pub(super) fn written(&self, offset: u64, len: u64) -> Result<(), Error> {
        if self.state.lock().users.unsnooping != 0 {
            crate::held::prepare::<crate::ToDevice, _>(self.store_of_user(), offset, len)?;
        }
        base::barrier::device_write();
        Ok(())
    }
}
