//! The seam between processes and the machine: what may be mapped, and the tables that are walked.

#![allow(unsafe_code)] // Declarations only: what is promised here is what safe code relies on.

use crate::Error;
use dma::{Attributes, Cacheability, CoherentPages, Lent, OpenPages, SpaceAccess};
use iommu::pgtable::Leaves;
use iommu::{IovaRange, MapError, PhysRange, Prot, RevokeError};

/// What an [`Extent`] is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory, cached.
    Memory,
    /// Memory that is not cached.
    Uncached,
    /// Registers of a device.
    Registers,
}

impl From<Attributes> for Kind {
    /// For what the CPU reaches at all.
    fn from(attributes: Attributes) -> Self {
        match attributes {
            Attributes::Memory(Cacheability::WriteBack) => Self::Memory,
            Attributes::Memory(_) => Self::Uncached,
            Attributes::Registers => Self::Registers,
        }
    }
}

/// Physical memory or registers that processes may have mapped: this is the seam for whatever is to be seen at EL0. It is held by
/// reference count from before it is mapped until it has been revoked.
///
/// # Safety
///
/// For as long as the object lives, what lies at its runs (whole pages) may be accessed by EL0 and by devices at any moment, as
/// far as [`Extent::writable`] says: Rust code has no reference to it, it is not used for anything else, and accesses do no harm
/// to anybody but those who have it.
pub unsafe trait Extent: Send + Sync {
    /// The physical runs, one after another.
    fn runs(&self) -> &[PhysRange];
    /// The size in bytes.
    fn len(&self) -> u64;
    /// Whether there is no byte: never.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// What it is.
    fn kind(&self) -> Kind;
    /// Whether it may be written.
    fn writable(&self) -> bool {
        true
    }
    /// The memory itself, where it can be lent to devices.
    fn pages(&self) -> Option<&OpenPages> {
        None
    }
    /// Copies the bytes from `offset` on to `to`, for the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`] outside it, and for what the kernel does not read on a process's behalf, such as registers.
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error>;
    /// Copies `from` to the bytes from `offset` on, for the kernel.
    ///
    /// # Errors
    ///
    /// As [`Extent::read`].
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;
}

/// The translation tables of one process, as the machine has them: stage 1, walked by cores at EL0, and where it is so by IOMMUs.
///
/// # Safety
///
/// - EL0 and devices reach through them only what [`Tables::map`] was told, with no more than the permissions it was told.
/// - `Ok` from [`Tables::unmap`] means that nobody does any more: entries cleared and visible to walkers, translations gone from
///   every TLB, of cores and of IOMMUs, and their completion awaited.
/// - When the object is dropped nobody walks the tables any more.
pub unsafe trait Tables: Send + Sync {
    /// Maps `range` to the `runs` one after another, all or nothing.
    ///
    /// # Errors
    ///
    /// See [`MapError`]; nothing is mapped after an error.
    ///
    /// # Safety
    ///
    /// Until [`Tables::unmap`] of the range returns `Ok`, or the tables are dropped, an [`Extent`] with these runs lives, and
    /// nobody else maps in `range` at the same time.
    unsafe fn map(&self, range: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError>;

    /// Takes the mapping of `range` away, a whole one.
    ///
    /// # Errors
    ///
    /// See [`RevokeError`]: nothing may be assumed of the range then.
    fn unmap(&self, range: IovaRange) -> Result<(), RevokeError>;

    /// The leaves that map `range`; `None` where nobody can tell.
    fn leaves(&self, range: IovaRange) -> Option<Leaves> {
        let _ = range;
        None
    }

    /// Has cores fetch instructions that were written a moment ago. They are in memory already.
    fn code_changed(&self);
}

// SAFETY: nobody has a reference to open pages, and they belong to those who have handles of them.
unsafe impl Extent for OpenPages {
    fn runs(&self) -> &[PhysRange] {
        OpenPages::runs(self)
    }
    fn len(&self) -> u64 {
        OpenPages::len(self)
    }
    fn kind(&self) -> Kind {
        Kind::Memory
    }
    fn pages(&self) -> Option<&OpenPages> {
        Some(self)
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        OpenPages::read(self, offset, to).map_err(|_| Error::BadAddress { address: offset, len: to.len() as u64 })
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        OpenPages::write(self, offset, from).map_err(|_| Error::BadAddress { address: offset, len: from.len() as u64 })
    }
}

// SAFETY:
// - nobody makes references into the memory of a shared buffer, and what devices and other accesses do with it meanwhile is ordered by
//   the access, which lasts as long as the object;
// - it is no access to memory that the CPU does not reach (contract of `SpaceAccess`).
unsafe impl Extent for SpaceAccess {
    fn runs(&self) -> &[PhysRange] {
        self.extents().runs()
    }
    fn len(&self) -> u64 {
        self.extents().len()
    }
    fn kind(&self) -> Kind {
        self.extents().attributes().into()
    }
    fn writable(&self) -> bool {
        self.writes()
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        self.read_at(offset, to).map_err(|_| Error::BadAddress { address: offset, len: to.len() as u64 })
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.write_at(offset, from).map_err(|_| Error::BadAddress { address: offset, len: from.len() as u64 })
    }
}

// SAFETY:
// - nobody makes references into the memory (its invariant), which the CPU reaches, and which the object owns;
// - the device has it for as long as the object lives, as the contract allows.
unsafe impl Extent for CoherentPages {
    fn runs(&self) -> &[PhysRange] {
        CoherentPages::runs(self)
    }
    fn len(&self) -> u64 {
        Lent::len(self)
    }
    fn kind(&self) -> Kind {
        self.attributes().into()
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        self.read_at(offset, to).map_err(|_| Error::BadAddress { address: offset, len: to.len() as u64 })
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.write_at(offset, from).map_err(|_| Error::BadAddress { address: offset, len: from.len() as u64 })
    }
}
