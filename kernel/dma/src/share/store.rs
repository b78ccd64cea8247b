//! Whose memory a shared buffer is: exporters.

#![expect(unsafe_code, reason = "declares what an exporter promises, and passes it on to those that lend")]

use super::SharedBuffer;
use crate::attributed::AttributedPages;
use crate::buffer::{Span, Spans, to_usize};
use crate::memory::{Cacheability, DmaMemory, PageRequest};
use crate::{Error, PageSet, PeerRange};
use alloc::sync::Arc;
use base::fallible;
use core::ptr::NonNull;
use iommu::PhysRange;

/// What the memory of a shared buffer is to the CPU, and how whoever maps it is to map it: an alias with other attributes would
/// see other bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attributes {
    /// Memory, cached in this way.
    Memory(Cacheability),
    /// Registers or memory of a device: no CPU access through the buffer, and device attributes wherever it is mapped.
    Registers,
}

/// Who has the memory behind a [`SharedBuffer`]. [`PageSet`] is the exporter of the kernel's own pages, scattered or contiguous;
/// [`CarvedOut`] of memory outside the frame allocator; [`PeerRange`] of another device's window. The memory needs no page
/// structures: an exporter knows its extents, and that is all that importers get to see.
///
/// # Safety
///
/// - The runs are whole pages that the object has for itself, in order, the same for as long as it lives; no reference to them
///   exists, neither with the exporter nor elsewhere, and they are reached by atomics only.
/// - [`Exporter::bytes_at`] points to those of them from `offset` on, so many bytes, readable and writable by atomics for as long
///   as the object lives; it is `None` for all or for none of them.
/// - [`Exporter::attributes`] says how the CPU's alias is cached, and is `Registers` for what is not memory, of which the promises
///   of [`PeerRange::new`] hold.
/// - When the object is forgotten, all this holds for ever.
pub unsafe trait Exporter: Send + Sync + 'static {
    /// The physical extents, in the order of the buffer's bytes.
    fn runs(&self) -> &[PhysRange];
    /// What the memory is.
    fn attributes(&self) -> Attributes;
    /// Where the CPU reaches the bytes from `offset` on, and how many there are in one piece; `None` where it does not.
    fn bytes_at(&self, offset: u64) -> Option<(NonNull<u8>, usize)>;
    /// Who maintains the caches for it; `None` where nothing is cached.
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory>;
}

// SAFETY: the range is the object's, by the promise made to `PeerRange::new`, and the CPU sees no byte of it.
unsafe impl Exporter for PeerRange {
    fn runs(&self) -> &[PhysRange] {
        self.spans_runs()
    }
    fn attributes(&self) -> Attributes {
        Attributes::Registers
    }
    fn bytes_at(&self, _: u64) -> Option<(NonNull<u8>, usize)> {
        None
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        None
    }
}

/// Memory with attributes of its own from a source outside the frame allocator, such as a carve-out of the device tree. Freed
/// when dropped.
pub struct CarvedOut {
    pages: AttributedPages,
    cacheability: Cacheability,
}

impl CarvedOut {
    /// Allocates `bytes` of zeroed, contiguous memory of `memory`, which the CPU reaches as `cacheability` says.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::Attributes`], [`Error::BadSize`].
    pub fn allocate(memory: &'static dyn DmaMemory, bytes: u64, cacheability: Cacheability) -> Result<Self, Error> {
        let request = PageRequest::anywhere(crate::pages::round_up(bytes)?);
        Ok(Self { pages: AttributedPages::zeroed(memory, request, cacheability)?, cacheability })
    }
}

// SAFETY: the pages own their run, which does not change, and their one span is all of it where it is mapped.
unsafe impl Exporter for CarvedOut {
    fn runs(&self) -> &[PhysRange] {
        self.pages.spans_runs()
    }
    fn attributes(&self) -> Attributes {
        Attributes::Memory(self.cacheability)
    }
    fn bytes_at(&self, offset: u64) -> Option<(NonNull<u8>, usize)> {
        self.pages.span(offset).map(|span| (span.ptr, span.bytes))
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        (self.cacheability == Cacheability::WriteBack).then(|| self.pages.source())
    }
}

impl SharedBuffer {
    /// Makes a buffer of what `exporter` has. The `name` is for errors and reports.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], or [`Error::BadSize`] where it has nothing; the exporter is dropped.
    pub fn export<E: Exporter>(name: &str, exporter: E) -> Result<Self, Error> {
        let bytes = exporter.runs().iter().try_fold(0_u64, |sum, run| sum.checked_add(run.len()));
        let bytes = bytes.filter(|bytes| *bytes != 0).ok_or(Error::BadSize(0))?;
        let name = fallible::text(name).ok_or(Error::OutOfMemory)?;
        let exporter = fallible::arc(exporter).map_err(|_| Error::OutOfMemory)?;
        Self::of(name, Store::Other { exporter, bytes })
    }
}

/// The memory of a shared buffer.
pub enum Store {
    Pages(PageSet),
    Other { exporter: Arc<dyn Exporter>, bytes: u64 },
}

impl Store {
    pub(super) fn attributes(&self) -> Attributes {
        match self {
            Self::Pages(_) => Attributes::Memory(Cacheability::WriteBack),
            Self::Other { exporter, .. } => exporter.attributes(),
        }
    }
}

// SAFETY:
// - both kinds own the runs and spans that they name (contracts of Spans and of Exporter);
// - no reference is made here.
unsafe impl Spans for Store {
    #[inline]
    fn spans_runs(&self) -> &[PhysRange] {
        match self {
            Self::Pages(pages) => pages.spans_runs(),
            Self::Other { exporter, .. } => exporter.runs(),
        }
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        match self {
            Self::Pages(pages) => pages.spans_len(),
            Self::Other { bytes, .. } => *bytes,
        }
    }
    fn span(&self, offset: u64) -> Option<Span> {
        match self {
            Self::Pages(pages) => pages.span(offset),
            Self::Other { exporter, bytes } => {
                let left = bytes.checked_sub(offset).filter(|left| *left != 0)?;
                let (ptr, bytes) = exporter.bytes_at(offset)?;
                Some(Span { ptr, bytes: bytes.min(to_usize(left)) }).filter(|span| span.bytes != 0)
            }
        }
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        match self {
            Self::Pages(pages) => pages.maintained_by(),
            Self::Other { exporter, .. } => exporter.maintained_by(),
        }
    }
}
