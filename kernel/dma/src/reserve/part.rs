//! Parts of memory, each of which can be lent, unlinked and had back by itself.
//!
//! # Invariants
//!
//! No byte of the whole is in two parts. Who has a part by value has all access to its bytes, and nobody else refers to them; nobody
//! refers to the whole but through parts. It is freed with its last part.

#![expect(unsafe_code, reason = "makes slices of the memory that it has for itself")]

use super::Linkable;
use crate::buffer::{Span, Spans, to_usize};
use crate::memory::DmaMemory;
use crate::{Buffer, Error, Rejected};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::fallible;
use core::fmt;
use core::ops::Range;
use core::slice;
use iommu::{PAGE_SIZE, PhysRange};

/// Some pages of a buffer, which others may have other pages of. Made of all of a buffer by [`Part::of`]; a link of it is mapped
/// page by page, and can be carved ([`Linked::carve`](super::Linked::carve)).
///
/// The memory goes back to where it came from when the last part of the buffer is dropped, or to who had it by
/// [`Part::into_whole`]. A part that is lost keeps it for ever.
pub struct Part<M> {
    whole: Arc<M>,
    offset: u64,
    len: u64,
    runs: Runs,
}

/// Physical runs without an allocation for one.
pub(super) enum Runs {
    One([PhysRange; 1]),
    Many(Vec<PhysRange>),
}

impl Runs {
    fn as_slice(&self) -> &[PhysRange] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }

    /// The bytes `range` of `runs`.
    fn cut(runs: &[PhysRange], range: &Range<u64>) -> Result<Self, Error> {
        let pieces = || {
            let mut at = 0;
            runs.iter().filter_map(move |run| {
                let (from, to) = (range.start.max(at), range.end.min(at + run.len()));
                let piece = to.checked_sub(from).filter(|len| *len != 0).and_then(|len| run.part(from - at, len));
                at += run.len();
                piece
            })
        };
        let mut first = pieces();
        match (first.next(), first.next()) {
            (None, _) => Ok(Self::Many(Vec::new())),
            (Some(one), None) => Ok(Self::One([one])),
            _ => {
                let mut many = Vec::new();
                many.try_reserve_exact(pieces().count())?;
                many.extend(pieces());
                Ok(Self::Many(many))
            }
        }
    }
}

impl<M: Linkable> Part<M> {
    /// Makes one part of all of `whole`.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives it back: [`Error::OutOfMemory`].
    pub fn of(whole: M) -> Result<Self, Rejected<M>> {
        let len = whole.spans_len();
        let runs = match Runs::cut(whole.spans_runs(), &(0..len)) {
            Ok(runs) => runs,
            Err(error) => return Err(Rejected { buffer: whole, error }),
        };
        match fallible::arc(whole) {
            // INVARIANT: nobody else has the whole.
            Ok(whole) => Ok(Self { whole, offset: 0, len, runs }),
            Err(buffer) => Err(Rejected { buffer, error: Error::OutOfMemory }),
        }
    }

    /// All of the memory, if this is the only part of it that there still is. (What was in parts that have been dropped belongs to
    /// nobody else.)
    ///
    /// # Errors
    ///
    /// The part, while there are others.
    pub fn into_whole(self) -> Result<M, Self> {
        let Self { whole, offset, len, runs } = self;
        Arc::try_unwrap(whole).map_err(|whole| Self { whole, offset, len, runs })
    }
}

impl<M: Spans> Part<M> {
    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where in the whole it begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The runs of its pieces at `ranges`, in bytes of the part.
    pub(super) fn cut<const N: usize>(&self, ranges: [Range<u64>; N]) -> Result<[Runs; N], Error> {
        let mut cut = [const { Runs::Many(Vec::new()) }; N];
        for (runs, range) in cut.iter_mut().zip(&ranges) {
            *runs = Runs::cut(self.runs.as_slice(), range)?;
        }
        Ok(cut)
    }

    /// The piece at `range`, whose runs were found by [`Part::cut`]. Whoever makes pieces makes them of all of the part, gives it up,
    /// and no two of the same bytes.
    pub(super) fn piece(&self, range: Range<u64>, runs: Runs) -> Self {
        // INVARIANT: the caller gives the part up for its pieces.
        Self {
            whole: self.whole.clone(),
            offset: self.offset + range.start,
            len: range.end.saturating_sub(range.start),
            runs,
        }
    }
}

impl<B: Buffer> Part<B> {
    /// Takes a part in two: its first `at` bytes, whole pages, and the rest.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives it back: [`Error::OutOfRange`] where one of the two would be empty, [`Error::BadSize`] for no whole pages,
    /// [`Error::OutOfMemory`].
    pub fn split(self, at: u64) -> Result<(Self, Self), Rejected<Self>> {
        let len = self.len;
        let cut = if at == 0 || at >= len {
            Err(Error::OutOfRange { offset: at, len: 0, size: len })
        } else if !at.is_multiple_of(PAGE_SIZE) {
            Err(Error::BadSize(at))
        } else {
            self.cut([0..at, at..len])
        };
        match cut {
            Ok([first, second]) => Ok((self.piece(0..at, first), self.piece(at..len, second))),
            Err(error) => Err(Rejected { buffer: self, error }),
        }
    }

    /// The memory, piece by piece.
    pub fn chunks(&self) -> impl Iterator<Item = &[u8]> {
        self.pieces().map(|Span { ptr, bytes }| {
            // SAFETY: initialized bytes that this part has alone (invariant); `&self` keeps it, and whoever could write them is
            // excluded meanwhile.
            unsafe { slice::from_raw_parts(ptr.as_ptr(), bytes) }
        })
    }

    /// The memory, piece by piece.
    pub fn chunks_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.pieces().map(|Span { ptr, bytes }| {
            // SAFETY: as for `chunks`; `&mut self` excludes everybody else, and no two pieces overlap.
            unsafe { slice::from_raw_parts_mut(ptr.as_ptr(), bytes) }
        })
    }

    fn pieces(&self) -> impl Iterator<Item = Span> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let span = self.span(at)?;
            at += span.bytes as u64;
            Some(span)
        })
    }
}

impl<B: Buffer> Buffer for Part<B> {}

impl<M> fmt::Debug for Part<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({:#x} bytes at {:#x})", self.len, self.offset)
    }
}

// SAFETY:
// - the runs are those of the part's bytes, whole pages of the whole's, and its spans the whole's, cut at the end of the part; the part
//   has them alone (invariant);
// - the whole is held by pointer, so that it does not move, and no reference is made here;
// - forgotten, it keeps the whole.
unsafe impl<M: Spans> Spans for Part<M> {
    fn spans_runs(&self) -> &[PhysRange] {
        self.runs.as_slice()
    }
    fn spans_len(&self) -> u64 {
        self.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let left = self.len.checked_sub(offset).filter(|left| *left != 0)?;
        let Span { ptr, bytes } = self.whole.span(self.offset + offset)?;
        Some(Span { ptr, bytes: bytes.min(to_usize(left)) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.whole.maintained_by()
    }
}
