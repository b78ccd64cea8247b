//! Where DMA memory comes from.
//!
//! The kernel's memory manager implements [`DmaMemory`] on the target; the `fakes` feature has one for hosts.
//!
//! There are two kinds of it. *Streaming* memory ([`DmaMemory::allocate`]) is ordinary memory, cached write-back: it is lent and
//! comes back. *Shared* memory ([`DmaMemory::allocate_as`]) is used by the CPU and a device at once, and says at its allocation how
//! the CPU reaches it: whoever gets memory that is not cached gets pages that have no other, cached alias, from the first moment
//! on until they are freed. A per-device carve-out is a source of shared memory.

#![expect(unsafe_code, reason = "declares the trait whose promises every owned page rests on")]

use core::ptr::NonNull;
use iommu::{OutOfMemory, PAGE_SIZE, PhysAddr};

/// What to allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// How much: a multiple of [`PAGE_SIZE`], not 0.
    pub bytes: u64,
    /// Alignment of the physical address: a power of two, at least [`PAGE_SIZE`].
    pub align: u64,
    /// The highest physical address that the last byte may have.
    pub below: PhysAddr,
}

impl PageRequest {
    /// `bytes` anywhere, aligned to a page.
    pub const fn anywhere(bytes: u64) -> Self {
        Self { bytes, align: PAGE_SIZE, below: PhysAddr::new(u64::MAX) }
    }
}

/// An allocation: physically contiguous pages and where the CPU reaches them.
#[derive(Debug)]
pub struct RawPages {
    /// The first physical address.
    pub phys: PhysAddr,
    /// The first byte as the CPU reaches it: the memory's own alias, never made from a reference or a `Box`.
    pub ptr: NonNull<u8>,
    /// The size, a multiple of [`PAGE_SIZE`].
    pub bytes: u64,
}

/// How the CPU's only alias of pages is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cacheability {
    /// Normal memory, write-back: as pages come from [`DmaMemory::allocate`].
    WriteBack,
    /// Normal memory, not cached. Stores may be merged on their way (write-combining) and are ordered by barriers. Of atomic
    /// accesses only loads and stores are sure to work: the architecture promises nothing of exclusives there.
    NonCacheable,
    /// Not mapped for the CPU at all.
    Unmapped,
}

/// Why there is no memory with these attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttributeError {
    /// No memory meets the constraints, or there is none for the translation tables of its alias.
    #[error("no memory that can be mapped so")]
    OutOfMemory,
    /// The memory cannot have these attributes.
    #[error("the memory cannot have these attributes")]
    Unsupported,
}

/// A source of DMA memory. Lives as long as the kernel; all methods may be called from several cores at once.
///
/// # Safety
///
/// - [`DmaMemory::allocate`] returns what was asked for: memory within the constraints, at `phys` on the CPU's bus and at `ptr`
///   for the CPU, readable and writable, that nobody else uses until it comes back through [`DmaMemory::free`].
/// - The cache maintenance methods do what they say before they return.
/// - [`DmaMemory::allocate_as`] returns what was asked for, likewise, and its alias is the only one. If it is not cacheable, no
///   line of the memory is in a cache.
pub unsafe trait DmaMemory: Send + Sync {
    /// Allocates physically contiguous pages of undefined contents, cached write-back.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] where no memory meets the constraints.
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory>;

    /// As [`DmaMemory::allocate`], for whoever cannot do with smaller pieces: may take from memory that is kept for such.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] where no memory meets the constraints.
    fn allocate_contiguous(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        self.allocate(request)
    }

    /// Takes pages back.
    ///
    /// # Safety
    ///
    /// `pages` came whole from [`DmaMemory::allocate`] or [`DmaMemory::allocate_contiguous`] of this object, and nobody uses
    /// them: no reference is left, and no device reaches them.
    unsafe fn free(&self, pages: RawPages);

    /// Allocates physically contiguous pages that the CPU reaches in this way only. Their contents are undefined; those of pages
    /// that are [`Unmapped`](Cacheability::Unmapped), whose pointer dangles, are zeros.
    ///
    /// # Errors
    ///
    /// See [`AttributeError`].
    fn allocate_as(&self, request: PageRequest, cacheability: Cacheability) -> Result<RawPages, AttributeError> {
        match cacheability {
            Cacheability::WriteBack => self.allocate_contiguous(request).map_err(|_| AttributeError::OutOfMemory),
            _ => Err(AttributeError::Unsupported),
        }
    }

    /// Takes pages back.
    ///
    /// # Safety
    ///
    /// `pages` came whole from [`DmaMemory::allocate_as`] of this object with this `cacheability`, and nobody uses them.
    unsafe fn free_as(&self, pages: RawPages, cacheability: Cacheability) {
        debug_assert_eq!(cacheability, Cacheability::WriteBack, "`allocate_as` gives out nothing else");
        // SAFETY: `allocate_as` took it from `allocate_contiguous`; the rest is the caller's promise.
        unsafe { self.free(pages) };
    }

    /// Fills the `bytes`, whole pages, from `ptr` with zeros.
    ///
    /// # Safety
    ///
    /// They are an allocation of this object's, or whole pages of one, that the CPU reaches at `ptr` and nobody else uses.
    unsafe fn zero(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { ptr.write_bytes(0, bytes) };
    }

    /// Writes dirty cache lines of the `bytes` from `ptr` back to the point of coherency.
    fn clean(&self, ptr: NonNull<u8>, bytes: usize);

    /// Discards the cache lines that lie wholly in the `bytes` from `ptr`, so that the next load sees memory. Lines that
    /// straddle an end are cleaned first: a neighbour's store is never lost.
    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize);

    /// Writes dirty cache lines of the `bytes` from `ptr` back and discards them all.
    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize);
}
