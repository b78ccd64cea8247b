//! The kernel's addresses for scattered memory in one piece.

use arch::layout;
use arch::mmu::{self, MapError, Use};
use dma::vcm::CpuSpace;
use dma::{Attributes, Cacheability, Error};
use iommu::iova::IovaAllocator;
use iommu::pgtable::Leaves;
use iommu::{Iova, IovaError, IovaRange, PAGE_SIZE, PhysRange};
use spin::Once;

/// The kernel's own addresses, for [`dma::vcm`].
pub struct KernelSpace {
    /// Of distances from the beginning of that part of the address space; made when it is needed first.
    addresses: Once<IovaAllocator>,
}

/// The one there is.
pub static KERNEL_SPACE: KernelSpace = KernelSpace { addresses: Once::new() };

impl KernelSpace {
    fn addresses(&self) -> Result<&IovaAllocator, IovaError> {
        self.addresses.try_call_once(|| {
            let window = IovaRange::new(Iova::new(0), layout::VIRTUAL_LEN).unwrap_or_default();
            IovaAllocator::new(window, PAGE_SIZE)
        })
    }
}

// SAFETY:
// - addresses are given out once until they come back;
// - `mmu` maps and unmaps what it says, with an invalidation for all cores that it awaits; ordinary memory is in the linear map
//   with the same attributes, what is not cached has left it and has an alias like this.
unsafe impl CpuSpace for KernelSpace {
    fn reserve(&self, len: u64, align: u64) -> Result<u64, Error> {
        let range = self.addresses()?.allocate(len, align.max(PAGE_SIZE), Iova::new(u64::MAX))?;
        Ok(layout::VIRTUAL_BASE + range.start().get())
    }

    fn release(&self, start: u64, len: u64) {
        let range = start.checked_sub(layout::VIRTUAL_BASE).and_then(|at| IovaRange::new(Iova::new(at), len));
        if let (Some(range), Ok(addresses)) = (range, self.addresses())
            && let Err(error) = addresses.free(range)
        {
            log::error!("kernel addresses {start:#x} are lost: {error}");
        }
    }

    unsafe fn map(&self, start: u64, runs: &[PhysRange], attributes: Attributes) -> Result<(), Error> {
        let purpose = match attributes {
            Attributes::Memory(Cacheability::WriteBack) => Use::Data,
            Attributes::Memory(Cacheability::NonCacheable) => Use::Uncached,
            // Out of the kernel's sight on purpose, or not memory.
            _ => return Err(Error::BadSize(0)),
        };
        let runs = runs.iter().map(|run| run.start().get()..run.end().get());
        // SAFETY: the same attributes as elsewhere, see above; the caller has reserved the range, and nothing is mapped there.
        unsafe { mmu::map_virtual(start, runs, purpose) }.map_err(|error| match error {
            MapError::NoTables => Error::OutOfMemory,
            error => {
                log::error!("kernel addresses {start:#x}: {error}");
                Error::BadSize(0)
            }
        })
    }

    unsafe fn unmap(&self, start: u64, len: u64) -> bool {
        // SAFETY: the caller's promise.
        unsafe { mmu::unmap_virtual(start, len) }.is_ok()
    }

    fn leaves(&self, start: u64, len: u64) -> Option<Leaves> {
        let mut leaves = Leaves::default();
        mmu::virtual_leaves(start, len, |size, contiguous| leaves.add(size, contiguous));
        Some(leaves)
    }
}
