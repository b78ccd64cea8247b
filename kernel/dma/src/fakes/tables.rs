//! Translation tables on the heap, for address spaces that have real ones.

#![expect(unsafe_code, reason = "implements the unsafe trait of table memory")]

use super::Hardware;
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use alloc::sync::Arc;
use core::ptr::slice_from_raw_parts;
use core::sync::atomic::AtomicU64;
use iommu::contract::{TableBlock, TableMemory};
use iommu::pgtable::{Geometry, Granule, PageTable, Stage};
use iommu::{OutOfMemory, PhysAddr};

/// Bits of the addresses that go in and come out.
const ADDRESS_BITS: u8 = 48;

/// Makes tables in which nothing is mapped.
///
/// # Errors
///
/// [`OutOfMemory`], also where the allocation is the one that fails.
pub(super) fn make() -> Result<Arc<PageTable>, OutOfMemory> {
    let geometry = Geometry::new(Granule::K4, Stage::One, ADDRESS_BITS, ADDRESS_BITS).map_err(|_| OutOfMemory)?;
    // The kernel's, as a driver's objects are.
    base::fallible::arc(PageTable::new(geometry, &Heap)?).map_err(|_| OutOfMemory)
}

/// Memory for tables, which nothing walks but the fakes.
struct Heap;

fn layout(words: usize) -> Result<Layout, OutOfMemory> {
    Layout::from_size_align(words * 8, words * 8).map_err(|_| OutOfMemory)
}

// SAFETY: zeroed blocks of the heap, each its own and aligned to its size, named by addresses that lead nowhere; who walks them loads
// their words, for which a store is visible once a barrier has ordered it.
unsafe impl TableMemory for Heap {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        if bytes == 0 || Hardware::fails() {
            return Err(OutOfMemory);
        }
        let _hardware = Hardware::enter();
        let words = bytes / 8;
        // SAFETY: the layout has a size.
        let start = unsafe { alloc_zeroed(layout(words)?) }.cast::<AtomicU64>();
        if start.is_null() {
            return Err(OutOfMemory);
        }
        // SAFETY: just allocated, of this size and alignment, zeroed, and nobody else's until it comes back through `free`.
        let all = unsafe { &*slice_from_raw_parts(start, words) };
        let phys = PhysAddr::new(start.addr() as u64 & ((1 << ADDRESS_BITS) - 1));
        // SAFETY: as above.
        Ok(unsafe { TableBlock::new(phys, all, self) })
    }

    fn free(&self, _: PhysAddr, words: &'static [AtomicU64]) {
        let _hardware = Hardware::enter();
        if let Ok(layout) = layout(words.len()) {
            // SAFETY: a block of `allocate`, whole, that nobody uses any more.
            unsafe { dealloc(words.as_ptr().cast::<u8>().cast_mut(), layout) };
        }
    }

    fn publish(&self, _: &[AtomicU64]) {
        base::barrier::publish();
    }

    fn publishes_by_barrier(&self) -> bool {
        true
    }
}
