//! The kernel's frames as memory for devices and for tables that hardware walks.

use arch::cache;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{AttributeError, Cacheability, DmaMemory, PageRequest, RawPages};
use iommu::contract::{TableBlock, TableMemory};
use iommu::{OutOfMemory, PAGE_SIZE, PhysAddr, PhysRange};
use kernel::mm::{self, Zone};

/// Frames of the kernel's allocator, in the linear map.
#[derive(Debug)]
pub struct KernelMemory {
    /// Whether walkers of tables look into the CPU's caches.
    coherent: bool,
}

/// For hardware that is coherent with the CPU's caches.
pub static COHERENT: KernelMemory = KernelMemory { coherent: true };
/// For hardware that is not: what it is to see is cleaned to memory.
pub static NON_COHERENT: KernelMemory = KernelMemory { coherent: false };

const FOUR_GIB: u64 = 1 << 32;

fn allocate(bytes: u64, align: u64, below: PhysAddr) -> Result<PhysRange, OutOfMemory> {
    let count = usize::try_from(bytes.div_ceil(PAGE_SIZE)).map_err(|_| OutOfMemory)?;
    let zone = if below.get() >= u64::MAX >> 16 { Zone::Any } else { Zone::Below4GiB };
    let fits = |range: &PhysRange| range.end().get() - 1 <= below.get();
    let first = mm::alloc_aligned(count, align.max(PAGE_SIZE), zone);
    let found = match first {
        // Between 4 GiB and no limit at all, memory above 4 GiB may do.
        Err(_) if zone == Zone::Below4GiB && below.get() >= FOUR_GIB => {
            mm::alloc_aligned(count, align.max(PAGE_SIZE), Zone::Any)
        }
        other => other,
    };
    let range = found.map_err(|_| OutOfMemory)?;
    if !fits(&range) {
        give_back(range);
        return Err(OutOfMemory);
    }
    Ok(range)
}

fn give_back(range: PhysRange) {
    // SAFETY: the callers own the range and use it no more; devices have been revoked, which is the contract of `dma`.
    if let Err(error) = unsafe { mm::free(range) } {
        log::error!("memory: {error}");
    }
}

fn pointer(phys: PhysAddr) -> Result<NonNull<u8>, OutOfMemory> {
    NonNull::new(mm::pointer(phys)).ok_or(OutOfMemory)
}

// SAFETY:
// - frames come from the kernel's allocator, which gives each to one owner only, and are mapped read-write in the linear map;
// - cache maintenance is by virtual address to the point of coherency, complete on return;
// - the alias never changes: `set_cacheability` refuses what the linear map is not.
unsafe impl DmaMemory for KernelMemory {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        let range = allocate(request.bytes, request.align, request.below)?;
        Ok(RawPages { phys: range.start(), ptr: pointer(range.start())?, bytes: range.len() })
    }

    unsafe fn free(&self, pages: RawPages) {
        if let Some(range) = PhysRange::new(pages.phys, pages.bytes) {
            give_back(range);
        }
    }

    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean(ptr.addr().get(), bytes) };
    }

    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        // Lines that straddle an end must not lose a neighbour's store. Cleaning before discarding costs little more and is
        // right for all of them.
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean_invalidate(ptr.addr().get(), bytes) };
    }

    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean_invalidate(ptr.addr().get(), bytes) };
    }

    unsafe fn set_cacheability(&self, pages: &RawPages, to: Cacheability) -> Result<NonNull<u8>, AttributeError> {
        match to {
            Cacheability::WriteBack => Ok(pages.ptr),
            _ => Err(AttributeError::Unsupported),
        }
    }
}

// SAFETY: frames come from the kernel's allocator, which gives each to one owner only; they are zeroed and cleaned before they
// are handed out, and cleaned or discarded by virtual address where the hardware does not snoop.
unsafe impl TableMemory for KernelMemory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let len = bytes as u64;
        let range = allocate(len, len, PhysAddr::new(u64::MAX))?;
        let pointer = pointer(range.start())?;
        // SAFETY: the frames are ours alone and mapped; all bytes of them.
        unsafe { pointer.write_bytes(0, range.len() as usize) };
        // SAFETY: aligned to a page, zeroed, ours until `free`, where the slice comes back and is used no more; all further
        // access is atomic.
        let words = unsafe { core::slice::from_raw_parts(pointer.cast::<AtomicU64>().as_ptr(), bytes / 8) };
        self.publish(words);
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(range.start(), words, self) })
    }

    fn free(&self, phys: PhysAddr, words: &'static [AtomicU64]) {
        let len = (size_of_val(words) as u64).next_multiple_of(PAGE_SIZE);
        if let Some(range) = PhysRange::new(phys, len) {
            give_back(range);
        }
    }

    fn publish(&self, words: &[AtomicU64]) {
        if !self.coherent {
            core::sync::atomic::fence(Ordering::SeqCst);
            // SAFETY: the words are mapped.
            unsafe { cache::clean(words.as_ptr().addr(), size_of_val(words)) };
        }
        base::barrier::publish();
    }

    fn observe(&self, words: &[AtomicU64]) {
        if !self.coherent {
            // The CPU never stores to words that hardware writes, so that cleaning writes nothing back over them.
            // SAFETY: the words are mapped.
            unsafe { cache::clean_invalidate(words.as_ptr().addr(), size_of_val(words)) };
        }
        base::barrier::device_read();
    }
}
