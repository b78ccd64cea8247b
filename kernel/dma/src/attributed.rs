//! Pages that the CPU reaches in one way only: what coherent, write-combined and hidden memory is made of.

#![expect(unsafe_code, reason = "owns memory by pointer, and frees it")]

use crate::Error;
use crate::buffer::{Span, Spans, to_usize};
use crate::memory::{AttributeError, Cacheability, DmaMemory, PageRequest, RawPages};
use core::ptr::NonNull;
use iommu::{PAGE_SIZE, PhysRange};

/// One allocation of shared memory, freed when dropped.
///
/// # Invariants
///
/// `ptr` and `run` describe one whole allocation of `memory` with this `cacheability`; where it is mapped, `ptr` is its only alias
/// and its bytes are initialized.
pub(crate) struct AttributedPages {
    ptr: NonNull<u8>,
    run: [PhysRange; 1],
    memory: &'static dyn DmaMemory,
    cacheability: Cacheability,
}

// SAFETY: it owns the memory, which any core may access.
unsafe impl Send for AttributedPages {}
// SAFETY: as above; it hands out pointers only.
unsafe impl Sync for AttributedPages {}

impl AttributedPages {
    /// Allocates zeroed pages.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Attributes`] where `memory` has none of this kind; [`Error::BadSize`].
    pub(crate) fn zeroed(
        memory: &'static dyn DmaMemory,
        request: PageRequest,
        cacheability: Cacheability,
    ) -> Result<Self, Error> {
        if request.bytes == 0 || !request.bytes.is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadSize(request.bytes));
        }
        // Not by `map_err`: that moves the result as what it is made of, byte by byte.
        let raw = match memory.allocate_as(request, cacheability) {
            Ok(raw) => raw,
            Err(AttributeError::OutOfMemory) => return Err(Error::OutOfMemory),
            Err(other) => return Err(Error::Attributes(other)),
        };
        if cacheability != Cacheability::Unmapped {
            // SAFETY: just allocated, mapped, and nobody else's.
            unsafe { memory.zero(raw.ptr, to_usize(raw.bytes)) };
        }
        match PhysRange::new(raw.phys, raw.bytes) {
            // INVARIANT: one whole allocation, just zeroed.
            Some(run) => Ok(Self { ptr: raw.ptr, run: [run], memory, cacheability }),
            None => {
                // SAFETY: just allocated, of this object, and not kept.
                unsafe { memory.free_as(raw, cacheability) };
                Err(Error::OutOfMemory)
            }
        }
    }

    /// The first byte; dangling if the pages are not mapped.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.ptr
    }

    pub(crate) fn run(&self) -> PhysRange {
        let [run] = self.run;
        run
    }

    /// The memory that it came from.
    pub(crate) fn source(&self) -> &'static dyn DmaMemory {
        self.memory
    }
}

impl Drop for AttributedPages {
    fn drop(&mut self) {
        let raw = RawPages { phys: self.run().start(), ptr: self.ptr, bytes: self.run().len() };
        // SAFETY: one whole allocation with these attributes (invariant). References to it borrow this object or what owns it,
        // and a device that has it has a loan that owns this object, and drops it only after a successful revocation.
        unsafe { self.memory.free_as(raw, self.cacheability) };
    }
}

// SAFETY:
// - the run is the allocation, which the object owns, and the one span is all of it, where it is mapped;
// - held by pointer, no reference is made, and freed by the drop only.
unsafe impl Spans for AttributedPages {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.run
    }
    #[inline(always)]
    fn only_run(&self) -> Option<PhysRange> {
        Some(self.run())
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        self.run().len()
    }
    fn span(&self, offset: u64) -> Option<Span> {
        if self.cacheability == Cacheability::Unmapped {
            return None;
        }
        let bytes = self.run().len().checked_sub(offset).filter(|bytes| *bytes != 0)?;
        // SAFETY: below the size of the allocation.
        let ptr = unsafe { self.ptr.add(to_usize(offset)) };
        Some(Span { ptr, bytes: to_usize(bytes) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        // It is snooped, not cached, or out of the CPU's sight; accesses of atomics could not be bracketed by maintenance.
        None
    }
}
