//! The translation tables of processes.
//!
//! They are those of the crate `iommu`, whose format is the processor's too: stage 1, 4 KiB granule, 48 bits of address, the same
//! numbers for the same types of memory. So an IOMMU can walk them as well (see [`UserTables::shared_with`]); then a mapping that is
//! taken away is taken out of the TLBs of both, first of the IOMMU's, whose `revoke` clears the entries.

use crate::{COHERENT, Hardware};
use alloc::sync::Arc;
use arch::user::{Asid, Tables as Active};
use base::fallible;
use iommu::contract::AddressSpace;
use iommu::pgtable::{Geometry, Granule, Leaves, MAIR, PageTable, Stage};
use iommu::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError};
use kernel::machine::IommuRef;
use pci::Function;
use process::Error;
use process::contract::Tables;
use smmuv3::{Request, Translation};

/// Bits of address that a process has.
pub(super) const BITS: u8 = 48;

/// The tables of one process.
pub struct UserTables {
    // Dropped first: when the tables are freed, no TLB of a core has anything of them.
    asid: Asid,
    walked: Walked,
}

/// Whose tables they are.
enum Walked {
    /// Walked by processors alone.
    Private(Arc<PageTable>),
    /// Of an address space of an IOMMU's, whose root is here.
    Shared { space: Arc<dyn AddressSpace>, root: PhysAddr },
}

/// The same attributes have the same numbers wherever the tables are walked.
const _: () = assert!(arch::mmu::MAIR & 0xff_ffff == MAIR & 0xff_ffff);

impl UserTables {
    /// Makes tables that only processors walk.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Quota`] where all ASIDs are in use.
    pub fn private() -> Result<Arc<Self>, Error> {
        let geometry =
            Geometry::new(Granule::K4, Stage::One, BITS, BITS).map_err(|_| Error::Unsupported("a process"))?;
        // The walkers of processors snoop.
        let table = PageTable::new(geometry, &COHERENT).map_err(|_| Error::OutOfMemory)?;
        Self::of(Walked::Private(fallible::arc(table).map_err(|_| Error::OutOfMemory)?))
    }

    /// Makes tables that the SMMU of `function`, of host `host`, walks too: the device can have them as its address space.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where no SMMU translates for it, or one that does not walk such tables; [`Error::OutOfMemory`],
    /// [`Error::Quota`].
    pub fn shared_with(hardware: &Hardware, host: usize, function: &Function) -> Result<Arc<Self>, Error> {
        const NO: Error = Error::Unsupported("one table for a process and a device");
        let host = hardware.machine().pcie.get(host).ok_or(NO)?;
        let (which, _) = host.stream_of(function.requester_id().get()).ok_or(NO)?;
        let IommuRef::Smmu(index) = which else { return Err(NO) };
        let smmu = hardware.smmus().get(index.0).ok_or(NO)?;
        let mut request = Request::default();
        (request.granule, request.input_bits) = (Some(Granule::K4), Some(BITS));
        request.translation = Translation::Stage1;
        let space = smmu.create_with(&request).map_err(|error| match error {
            AttachError::OutOfMemory => Error::OutOfMemory,
            AttachError::NoIdentifier => Error::Quota("address spaces"),
            _ => NO,
        })?;
        let (root, geometry) = smmu.tables_of(&space).ok_or(NO)?;
        if geometry.granule() != Granule::K4 || geometry.input_bits() != BITS || geometry.stage() != Stage::One {
            return Err(NO);
        }
        Self::of(Walked::Shared { space, root })
    }

    fn of(walked: Walked) -> Result<Arc<Self>, Error> {
        let asid = Asid::allocate().ok_or(Error::Quota("address spaces"))?;
        fallible::arc(Self { asid, walked }).map_err(|_| Error::OutOfMemory)
    }

    fn root(&self) -> PhysAddr {
        match &self.walked {
            Walked::Private(table) => table.root(),
            Walked::Shared { root, .. } => *root,
        }
    }

    /// What is mapped at `address`, and how.
    pub fn translate(&self, address: u64) -> Option<(PhysAddr, Prot)> {
        match &self.walked {
            Walked::Private(table) => table.translate(Iova::new(address)),
            Walked::Shared { space, .. } => space.translate(Iova::new(address)),
        }
    }

    /// The address space that a device can be attached to, if there is one.
    pub(super) fn space(&self) -> Option<&Arc<dyn AddressSpace>> {
        match &self.walked {
            Walked::Private(_) => None,
            Walked::Shared { space, .. } => Some(space),
        }
    }

    /// What is needed to run in them.
    pub(super) fn active(&self) -> Active<'_> {
        Active { root: self.root().get(), asid: &self.asid }
    }
}

// SAFETY:
// - leaves are made by `PageTable` from what `map` was told;
// - `unmap` clears them and publishes that before they are removed from the TLBs of all cores, and awaits it; those of an IOMMU
//   were cleared by its `revoke`, which has kept the same contract for its own TLBs;
// - a process runs only in a call that holds the tables; dropping the ASID removes all that is tagged with it before it is used
//   again, and before the tables are freed.
unsafe impl Tables for UserTables {
    unsafe fn map(&self, range: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        match &self.walked {
            Walked::Private(table) => table.map(range, runs, prot),
            // SAFETY: the caller's promise; devices may access what processes may.
            Walked::Shared { space, .. } => unsafe { space.map(range, runs, prot) },
        }
    }

    fn unmap(&self, range: IovaRange) -> Result<(), RevokeError> {
        let result = match &self.walked {
            Walked::Private(table) => table.unmap(range).map(|unmapped| unmapped.missing),
            Walked::Shared { space, .. } => space.revoke(&[range]).map(|()| None),
        };
        // Whatever came of it: what has been cleared is gone for cores.
        self.asid.invalidate(range.start().get(), range.len());
        match result? {
            None => Ok(()),
            Some(missing) => Err(RevokeError::NotMapped(missing)),
        }
    }

    fn leaves(&self, range: IovaRange) -> Option<Leaves> {
        match &self.walked {
            Walked::Private(table) => Some(table.leaves(range)),
            Walked::Shared { space, .. } => space.leaves(range),
        }
    }

    fn code_changed(&self) {
        arch::cache::forget_instructions();
    }
}
