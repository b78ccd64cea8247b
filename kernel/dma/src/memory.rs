//! Where DMA memory comes from.
//!
//! The kernel's memory manager implements [`DmaMemory`] on the target; the `fakes` feature has one for hosts.

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

/// How the CPU's alias of pages is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cacheability {
    /// Normal memory, write-back: as pages come from [`DmaMemory::allocate`].
    WriteBack,
    /// Normal memory, not cached.
    NonCacheable,
    /// Not mapped for the CPU at all.
    Unmapped,
}

/// Why the attributes of pages were not changed. They are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttributeError {
    /// There is no memory for the translation tables of the new alias.
    #[error("no memory for the tables of the new alias")]
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
/// - After [`DmaMemory::set_cacheability`] returned a pointer, that alias is the only one, and no line of the memory is left
///   in a cache if it is not cacheable.
pub unsafe trait DmaMemory: Send + Sync {
    /// Allocates physically contiguous pages of undefined contents, cached write-back.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] where no memory meets the constraints.
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory>;

    /// Takes pages back.
    ///
    /// # Safety
    ///
    /// `pages` came whole from [`DmaMemory::allocate`] of this object, are cached write-back again at the pointer given here,
    /// and nobody uses them: no reference is left, and no device reaches them.
    unsafe fn free(&self, pages: RawPages);

    /// Writes dirty cache lines of the `bytes` from `ptr` back to the point of coherency.
    fn clean(&self, ptr: NonNull<u8>, bytes: usize);

    /// Discards the cache lines that lie wholly in the `bytes` from `ptr`, so that the next load sees memory. Lines that
    /// straddle an end are cleaned first: a neighbour's store is never lost.
    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize);

    /// Writes dirty cache lines of the `bytes` from `ptr` back and discards them all.
    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize);

    /// Changes how the CPU reaches pages: takes them out of their present alias and gives them another one, or the same
    /// address with other attributes. Returns the pointer that is valid from now on (dangling for
    /// [`Cacheability::Unmapped`]).
    ///
    /// # Errors
    ///
    /// See [`AttributeError`]; nothing has changed then.
    ///
    /// # Safety
    ///
    /// `pages` came whole from [`DmaMemory::allocate`] of this object, `pages.ptr` is the alias that is valid now, and no
    /// reference or pointer into that alias is used afterwards.
    unsafe fn set_cacheability(&self, pages: &RawPages, to: Cacheability) -> Result<NonNull<u8>, AttributeError>;
}
