//! Owned, physically contiguous pages.
//!
//! # Invariants
//!
//! The pages belong to the object: from allocation to drop nobody else refers to them, except while a mapping owns the object,
//! and then nobody can reach it. They are held by pointer, never as a `Box` or a reference, so that moving the object asserts
//! nothing about memory that a device may be writing.

#![expect(unsafe_code, reason = "makes slices of memory that it owns by pointer")]

use crate::Error;
use crate::buffer::{Span, Spans, to_usize};
use crate::memory::{DmaMemory, PageRequest, RawPages};
use core::fmt;
use core::ptr::NonNull;
use core::slice;
use iommu::{OutOfMemory, PAGE_SIZE, PhysRange};

/// Physically contiguous memory. A plain slice while, and only while, no device has it.
pub struct Pages {
    chunk: Chunk,
}

impl Pages {
    /// Allocates at least `bytes` of zeroed memory, rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] for 0 bytes or a size that overflows.
    pub fn zeroed(memory: &'static dyn DmaMemory, bytes: u64) -> Result<Self, Error> {
        Self::allocate(memory, PageRequest::anywhere(round_up(bytes)?))
    }

    /// Allocates zeroed memory under constraints.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] where the request breaks the rules of [`PageRequest`].
    pub fn allocate(memory: &'static dyn DmaMemory, request: PageRequest) -> Result<Self, Error> {
        Ok(Self { chunk: Chunk::contiguous(memory, request)? })
    }

    /// The size in bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.chunk.run.len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.chunk.run.is_empty()
    }

    /// The memory.
    pub fn as_slice(&self) -> &[u8] {
        self.chunk.as_slice()
    }

    /// The memory.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.chunk.as_mut_slice()
    }

    /// The one physical run.
    pub fn phys_runs(&self) -> &[PhysRange] {
        slice::from_ref(&self.chunk.run)
    }

    pub(crate) fn into_chunk(self) -> Chunk {
        self.chunk
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pages({})", self.chunk.run)
    }
}

// SAFETY:
// - the run is the chunk's, which owns it, and the one span is the whole chunk from `offset` on;
// - the chunk is held by pointer, so it does not move, and no reference is made here;
// - the memory is freed by the drop of `Chunk` only.
unsafe impl Spans for Pages {
    #[inline]
    fn spans_runs(&self) -> &[PhysRange] {
        slice::from_ref(&self.chunk.run)
    }
    #[inline(always)]
    fn only_run(&self) -> Option<PhysRange> {
        Some(self.chunk.run)
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        self.chunk.run.len()
    }
    #[inline]
    fn span(&self, offset: u64) -> Option<Span> {
        self.chunk.span(offset)
    }
    #[inline]
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        Some(self.chunk.memory)
    }
}

/// One allocation, freed when dropped.
///
/// # Invariants
///
/// `ptr` and `run` describe one whole allocation of `memory`, cached write-back, whose bytes are initialized.
pub(crate) struct Chunk {
    ptr: NonNull<u8>,
    run: PhysRange,
    memory: &'static dyn DmaMemory,
}

// SAFETY: the chunk owns its memory, which any core may access, and hands out references only by the rules of `&` and `&mut`.
unsafe impl Send for Chunk {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// One of several: whoever cannot have this takes smaller ones.
    pub(crate) fn zeroed(memory: &'static dyn DmaMemory, request: PageRequest) -> Result<Self, Error> {
        check(request)?;
        Self::of(memory, memory.allocate(request)?)
    }

    /// All that is wanted in one piece.
    pub(crate) fn contiguous(memory: &'static dyn DmaMemory, request: PageRequest) -> Result<Self, Error> {
        check(request)?;
        Self::of(memory, memory.allocate_contiguous(request)?)
    }

    fn of(memory: &'static dyn DmaMemory, raw: RawPages) -> Result<Self, Error> {
        // SAFETY: the allocation is `raw.bytes` of writable memory at `raw.ptr` that nobody else uses (contract of DmaMemory).
        unsafe { memory.zero(raw.ptr, to_usize(raw.bytes)) };
        match PhysRange::new(raw.phys, raw.bytes) {
            // INVARIANT: one whole allocation, just zeroed.
            Some(run) => Ok(Self { ptr: raw.ptr, run, memory }),
            None => {
                // SAFETY: just allocated, of this object, and not kept.
                unsafe { memory.free(raw) };
                Err(OutOfMemory.into())
            }
        }
    }

    pub(crate) fn run(&self) -> PhysRange {
        self.run
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocation is `run.len()` initialized bytes that this object owns; `&self` keeps it, and everybody who
        // could write it (through `&mut self` or as a device, whose mapping would own this object) is excluded meanwhile.
        unsafe { slice::from_raw_parts(self.ptr.as_ptr(), to_usize(self.run.len())) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`, and `&mut self` excludes everybody else.
        unsafe { slice::from_raw_parts_mut(self.ptr.as_ptr(), to_usize(self.run.len())) }
    }

    #[inline]
    pub(crate) fn span(&self, offset: u64) -> Option<Span> {
        let bytes = self.run.len().checked_sub(offset).filter(|bytes| *bytes != 0)?;
        // SAFETY: `offset` is below the size of the allocation, so the pointer stays inside it.
        let ptr = unsafe { self.ptr.add(to_usize(offset)) };
        Some(Span { ptr, bytes: to_usize(bytes) })
    }

    pub(crate) fn memory(&self) -> &'static dyn DmaMemory {
        self.memory
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let raw = RawPages { phys: self.run.start(), ptr: self.ptr, bytes: self.run.len() };
        // SAFETY:
        // - one whole allocation of `memory`, cached write-back (invariant);
        // - references borrow this object, so none is left; a device that has the memory has a mapping that owns this object,
        //   and that drops it only after a successful revocation.
        unsafe { self.memory.free(raw) };
    }
}

fn check(request: PageRequest) -> Result<(), Error> {
    let PageRequest { bytes, align, .. } = request;
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || !align.is_power_of_two() || align < PAGE_SIZE {
        return Err(Error::BadSize(bytes));
    }
    Ok(())
}

/// `bytes` in whole pages.
pub(crate) fn round_up(bytes: u64) -> Result<u64, Error> {
    match bytes.checked_next_multiple_of(PAGE_SIZE) {
        Some(rounded) if rounded != 0 => Ok(rounded),
        _ => Err(Error::BadSize(bytes)),
    }
}
