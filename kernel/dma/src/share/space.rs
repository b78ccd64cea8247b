//! Accesses of the CPU by mappings in address spaces other than the kernel's: what a process begins and ends.

use super::access::{admit, counted};
use super::{Attributes, Extents, SharedBuffer};
use crate::error::BusyWith;
use crate::{Cacheability, Error, view};
use base::Deadline;
use core::fmt;

/// An access of the CPU to a shared buffer from an address space of its own, and the memory to be mapped there meanwhile: as
/// [`CpuAccess`](super::CpuAccess) and [`Extents`](super::Extents) in one, counted as both at once, so that no move comes between. It
/// borrows nothing.
///
/// Whoever maps it drops it after no access by that mapping is possible any more. Forgetting it leaves the buffer busy, and its memory
/// where it is, for ever.
pub struct SpaceAccess {
    // Dropped last: until then it stays where it is.
    extents: Extents,
    writes: bool,
}

impl SharedBuffer {
    /// Begins an access from an address space that is not the kernel's, which reads, or `writes` too. Waits as
    /// [`SharedBuffer::cpu_access_by`] does, and not after `given_up` has become true: it is called with interrupts masked, neither waits
    /// nor allocates, and whoever makes it true calls [`base::notify`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn access_from_space(
        &self,
        writes: bool,
        deadline: Deadline,
        given_up: &dyn Fn() -> bool,
    ) -> Result<SpaceAccess, Error> {
        // What it is to the CPU does not change.
        if !matches!(self.attributes(), Attributes::Memory(Cacheability::WriteBack | Cacheability::NonCacheable)) {
            return Err(Error::NotForCpu(self.0.name.clone()));
        }
        self.0.admit_by(deadline, given_up, |state| {
            let spaces = state.users.spaces.checked_add(1).ok_or(BusyWith::TooMany)?;
            admit(state, writes)?;
            state.users.spaces = spaces;
            Ok(())
        })?;
        Ok(SpaceAccess { extents: Extents { buffer: self.0.clone() }, writes })
    }
}

impl SpaceAccess {
    /// What is to be mapped, and how.
    pub fn extents(&self) -> &Extents {
        &self.extents
    }

    /// Whether it may write.
    pub fn writes(&self) -> bool {
        self.writes
    }

    /// Copies the bytes from `offset` on to `to`, by the kernel's own mapping.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        view::read(self.extents.buffer.store_of_user(), offset, to)
    }

    /// Copies `from` to the bytes from `offset` on, by the kernel's own mapping.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], and [`Error::NotForCpu`] where the access only reads; nothing was copied.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        if !self.writes {
            return Err(Error::NotForCpu(self.extents.buffer.name.clone()));
        }
        view::write(self.extents.buffer.store_of_user(), offset, from)
    }
}

impl Drop for SpaceAccess {
    fn drop(&mut self) {
        if self.writes {
            // By the kernel's own alias: the caches know memory, not addresses. All of it is always in range.
            let _ = self.extents.buffer.written(0, self.extents.buffer.len);
        }
        self.extents.buffer.leave(|users| *counted(users, self.writes) -= 1);
    }
}

impl fmt::Debug for SpaceAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpaceAccess({}, {})", self.extents.buffer.name, if self.writes { "writes" } else { "reads" })
    }
}
