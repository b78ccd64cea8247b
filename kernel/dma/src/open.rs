//! Memory that others than Rust code use: a process at EL0, and devices that the process lends it to.
//!
//! # Invariants
//!
//! No reference to the memory exists, from the moment it is made to its end: the CPU copies in and out, as through a
//! [`View`](crate::View). So it may be mapped anywhere, any number of times, for as long as a handle of it is kept there.

#![expect(unsafe_code, reason = "promises that its parts are memory that nobody has a reference to")]

use crate::buffer::{Span, Spans};
use crate::memory::DmaMemory;
use crate::{Buffer, Error, Ladder, PageSet, view};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::fallible;
use core::fmt;
use iommu::{PAGE_SIZE, PhysRange};

/// Shared pages, or a part of them. Clones and parts keep all of the memory; it is freed with the last.
pub struct OpenPages {
    pages: Arc<PageSet>,
    offset: u64,
    len: u64,
    /// The runs of the part.
    runs: Vec<PhysRange>,
}

impl OpenPages {
    /// Allocates at least `bytes` of zeroed memory, rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// As [`PageSet::zeroed`].
    pub fn zeroed(memory: &'static dyn DmaMemory, bytes: u64, ladder: Ladder) -> Result<Self, Error> {
        Self::new(PageSet::zeroed(memory, bytes, ladder)?)
    }

    /// Opens `pages`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; the pages are freed.
    pub fn new(pages: PageSet) -> Result<Self, Error> {
        let len = pages.len();
        let pages = fallible::arc(pages).map_err(|_| Error::OutOfMemory)?;
        Self::cut(pages, 0, len)
    }

    /// The `len` bytes at `offset`, whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::BadSize`] for what is not whole pages; [`Error::OutOfMemory`].
    pub fn part(&self, offset: u64, len: u64) -> Result<Self, Error> {
        crate::buffer::check_range(self, offset, len)?;
        if len == 0 || (offset | len) & (PAGE_SIZE - 1) != 0 {
            return Err(Error::BadSize(len));
        }
        Self::cut(self.pages.clone(), self.offset + offset, len)
    }

    fn cut(pages: Arc<PageSet>, offset: u64, len: u64) -> Result<Self, Error> {
        let (mut runs, mut at) = (Vec::new(), 0);
        for run in pages.runs() {
            // What of the run is in the part.
            let (start, end) = (at.max(offset), (at + run.len()).min(offset + len));
            if let Some(part) = end.checked_sub(start).filter(|len| *len != 0).and_then(|len| run.part(start - at, len))
            {
                runs.try_reserve(1)?;
                runs.push(part);
            }
            at += run.len();
        }
        Ok(Self { pages, offset, len, runs })
    }

    /// The physical runs, one after another.
    pub fn runs(&self) -> &[PhysRange] {
        &self.runs
    }

    /// The size in bytes: whole pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes what the CPU's caches have of it back to memory: for instructions, which are fetched past the data cache.
    pub fn clean(&self) {
        let Some(memory) = self.maintained_by() else { return };
        // The whole of it is always in range.
        let _ = crate::buffer::for_each_span(self, 0, self.len, |span| memory.clean(span.ptr, span.bytes));
    }

    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        view::read(self, offset, to)
    }

    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        view::write(self, offset, from)
    }
}

impl fmt::Debug for OpenPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpenPages({} bytes at {} of {:?})", self.len, self.offset, self.pages)
    }
}

impl Buffer for OpenPages {}

// SAFETY:
// - the runs are those of the set, cut to the part, and the spans are the set's, from the part's offset on;
// - nobody has a reference to the memory (invariant): the set is reachable through this object alone, which makes none;
// - the memory is freed with the last handle of the set, and a handle that is forgotten keeps it.
unsafe impl Spans for OpenPages {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.runs
    }
    fn spans_len(&self) -> u64 {
        self.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let left = self.len.checked_sub(offset).filter(|left| *left != 0)?;
        let span = self.pages.span(self.offset + offset)?;
        Some(Span { ptr: span.ptr, bytes: span.bytes.min(crate::buffer::to_usize(left)) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.pages.maintained_by()
    }
    fn has_others(&self) -> bool {
        true
    }
}
