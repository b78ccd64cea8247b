//! What owned memory has in common, as far as lending it is concerned.

#![expect(unsafe_code, reason = "declares what the lending of memory relies on")]

use crate::memory::DmaMemory;
use crate::{Error, Pages};
use core::ptr::NonNull;
use iommu::PhysRange;

/// Memory that can be lent to a device as a streaming mapping: [`Pages`] and [`PageSet`](crate::PageSet).
pub trait Buffer: Spans + Sized + 'static {
    /// The physical runs, one after another; neighbours have been merged.
    fn runs(&self) -> &[PhysRange] {
        Spans::spans_runs(self)
    }

    /// The size in bytes, a multiple of the page size.
    fn len(&self) -> u64 {
        Spans::spans_len(self)
    }

    /// Whether there is no byte. Never: memory is not allocated in sizes of 0.
    fn is_empty(&self) -> bool {
        Buffer::len(self) == 0
    }
}

impl Buffer for Pages {}
impl Buffer for crate::PageSet {}

/// Memory in pieces, as the CPU and as the bus see it. Seals [`Buffer`].
///
/// # Safety
///
/// - The runs are memory that the object owns, whole pages, in the order of the spans, and their sizes add up to the length (but
///   for [`Bytes`](crate::Bytes): the pages that have a byte of it, which it lends as it must).
///   Who has the object by value has all access to it: no reference to the memory exists but those borrowed from the object.
/// - Spans point to that memory: from the pointer on, so many bytes can be read and written for as long as the object lives,
///   and moving the object does not move them.
/// - None of the methods makes a reference to the memory.
/// - When the object is not dropped (it is forgotten), the memory stays allocated for ever.
pub unsafe trait Spans: Send + Sync {
    /// The physical runs.
    #[doc(hidden)]
    fn spans_runs(&self) -> &[PhysRange];
    /// The run, where there is only one, as a copy: what is not referred to can be in registers.
    #[doc(hidden)]
    #[inline(always)]
    fn only_run(&self) -> Option<PhysRange> {
        None
    }
    /// The bytes in the longest of the runs.
    #[doc(hidden)]
    #[inline]
    fn longest_run(&self) -> u64 {
        longest(self.spans_runs())
    }
    /// The size in bytes.
    #[doc(hidden)]
    fn spans_len(&self) -> u64;
    /// The contiguous piece that starts at byte `offset`, up to the end of its chunk.
    #[doc(hidden)]
    fn span(&self, offset: u64) -> Option<Span>;
    /// Who maintains the caches for it; `None` for memory that is not cached.
    #[doc(hidden)]
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory>;
    /// Whether others than the loan look at the memory while it is lent.
    #[doc(hidden)]
    fn has_others(&self) -> bool {
        false
    }
}

/// The runs of memory: of the one, where there is only one, a copy, so that the memory need not be referred to.
#[derive(Clone, Copy)]
pub(crate) enum Runs<'a> {
    One(PhysRange),
    All(&'a [PhysRange]),
}

impl<'a> Runs<'a> {
    #[inline(always)]
    pub(crate) fn of(memory: &'a impl Spans) -> Self {
        memory.only_run().map_or_else(|| Self::All(memory.spans_runs()), Self::One)
    }

    /// The run, if there is only one.
    #[inline(always)]
    pub(crate) fn only(self) -> Option<PhysRange> {
        match self {
            Self::One(run) | Self::All(&[run]) => Some(run),
            Self::All(_) => None,
        }
    }
}

/// The bytes in the longest of `runs`.
pub(crate) fn longest(runs: &[PhysRange]) -> u64 {
    runs.iter().map(|run| run.len()).max().unwrap_or(0)
}

/// A piece of memory that the CPU sees as one.
#[derive(Clone, Copy)]
pub struct Span {
    pub(crate) ptr: NonNull<u8>,
    pub(crate) bytes: usize,
}

/// The end of the `len` bytes at `offset`.
///
/// # Errors
///
/// [`Error::OutOfRange`] unless they are inside the memory.
#[inline]
pub(crate) fn check_range<M: Spans + ?Sized>(memory: &M, offset: u64, len: u64) -> Result<u64, Error> {
    let size = memory.spans_len();
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(end),
        _ => Err(Error::OutOfRange { offset, len, size }),
    }
}

/// Calls `f` with each contiguous piece of the `len` bytes at `offset`.
///
/// # Errors
///
/// [`Error::OutOfRange`], before the first call.
#[inline]
pub(crate) fn for_each_span<M: Spans + ?Sized>(
    memory: &M,
    offset: u64,
    len: u64,
    mut f: impl FnMut(Span),
) -> Result<(), Error> {
    let end = check_range(memory, offset, len)?;
    let mut at = offset;
    while at < end {
        let Some(span) = memory.span(at) else {
            return Err(Error::OutOfRange { offset, len, size: memory.spans_len() });
        };
        let bytes = span.bytes.min(to_usize(end - at));
        f(Span { ptr: span.ptr, bytes });
        at += bytes as u64;
    }
    Ok(())
}

const _: () = assert!(usize::BITS == 64, "a size in memory is converted without loss");

/// A size as the CPU counts it.
#[inline]
pub(crate) const fn to_usize(bytes: u64) -> usize {
    bytes as usize
}
