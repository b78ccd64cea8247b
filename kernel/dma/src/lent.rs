//! Memory that one device has access to at this moment, as drivers see it.

use crate::share::Synced;
use crate::{Device, Error};
use alloc::vec::Vec;
use core::slice;
use iommu::Iova;

/// A run of the device's addresses, for a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub iova: Iova,
    /// How many bytes it has.
    pub len: u64,
}

/// Something that one device has access to for as long as the object lives: [`Mapped`](crate::Mapped),
/// [`Coherent`](crate::Coherent) and [`Attachment`](crate::Attachment). Only this crate implements it.
pub trait Lent: sealed::Sealed + Send + Sync + 'static {
    /// The device that it was lent to. Its addresses mean nothing to another: see [`Device::check_loan`].
    fn device(&self) -> &Device;
    /// The size in bytes.
    fn len(&self) -> u64;
    /// Whether there is no byte: never.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Where it is for the device: one segment where an IOMMU translates, otherwise one for each physical run. For
    /// descriptors take [`slice()`], which respects the device's limits.
    fn segments(&self) -> &[Segment];
    /// Whether the device may read it.
    fn device_reads(&self) -> bool;
    /// Whether the device may write it.
    fn device_writes(&self) -> bool;
    /// The shared buffer's side of it, if it has one.
    #[doc(hidden)]
    fn shared(&self) -> Option<SharedLoan<'_>> {
        None
    }
}

/// A loan of a shared buffer.
#[derive(Clone, Copy)]
pub struct SharedLoan<'a>(pub(crate) &'a dyn Synced);

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// Names the `len` bytes at byte `offset` of a loan in segments that the device can take: none longer than its limit, none
/// across its boundary.
///
/// # Errors
///
/// [`Error::OutOfRange`] where the loan has no such bytes.
pub fn slice(lent: &dyn Lent, offset: u64, len: u64) -> Result<Slices<'_>, Error> {
    let size = lent.len();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(Error::OutOfRange { offset, len, size });
    }
    Ok(cut(lent, offset, len))
}

/// All of a loan, as [`slice()`] cuts it.
pub(crate) fn whole(lent: &dyn Lent) -> Slices<'_> {
    cut(lent, 0, lent.len())
}

/// [`slice()`] of what is known to be there.
fn cut(lent: &dyn Lent, offset: u64, len: u64) -> Slices<'_> {
    let limits = lent.device().limits();
    // What follows a segment of the greatest length is aligned as its beginning was.
    let aligned = limits.max_segment & !(limits.min_align - 1);
    Slices {
        segments: lent.segments().iter(),
        current: Segment { iova: Iova::new(0), len: 0 },
        skip: offset,
        left: len,
        max: if aligned == 0 { limits.max_segment } else { aligned },
        boundary: limits.boundary,
    }
}

/// The segments that [`slice()`] cuts.
#[derive(Clone, Debug)]
pub struct Slices<'a> {
    segments: slice::Iter<'a, Segment>,
    /// What is left of the segment in hand.
    current: Segment,
    /// Bytes to pass over before the first.
    skip: u64,
    /// Bytes to name.
    left: u64,
    max: u64,
    boundary: Option<u64>,
}

impl Iterator for Slices<'_> {
    type Item = Segment;

    fn next(&mut self) -> Option<Segment> {
        if self.left == 0 {
            return None;
        }
        while self.current.len == 0 {
            let next = *self.segments.next()?;
            let skip = self.skip.min(next.len);
            self.skip -= skip;
            self.current = Segment { iova: next.iova.checked_add(skip)?, len: next.len - skip };
        }
        let mut len = self.current.len.min(self.left).min(self.max);
        if let Some(boundary) = self.boundary {
            len = len.min(boundary - (self.current.iova.get() & (boundary - 1)));
        }
        let piece = Segment { iova: self.current.iova, len };
        self.current = Segment { iova: piece.iova.checked_add(len)?, len: self.current.len - len };
        self.left -= len;
        Some(piece)
    }
}

/// Segments without an allocation for one.
#[derive(Debug)]
pub(crate) enum Segments {
    One(Segment),
    Many(Vec<Segment>),
}

impl Default for Segments {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl Segments {
    #[inline]
    pub(crate) fn as_slice(&self) -> &[Segment] {
        match self {
            Self::One(segment) => slice::from_ref(segment),
            Self::Many(segments) => segments,
        }
    }

    /// Keeps only the `len` bytes at `skip`.
    pub(crate) fn narrow(&mut self, skip: u64, len: u64) {
        let (mut skip, mut left) = (skip, len);
        let mut cut = |segment: &mut Segment| {
            let skipped = skip.min(segment.len);
            skip -= skipped;
            segment.iova = Iova::new(segment.iova.get() + skipped);
            segment.len = (segment.len - skipped).min(left);
            left -= segment.len;
            segment.len != 0
        };
        match self {
            Self::One(segment) => {
                cut(segment);
            }
            Self::Many(segments) => segments.retain_mut(cut),
        }
    }

    /// Adds a segment, as part of the last one where it continues it.
    pub(crate) fn push(&mut self, next: Segment) -> Result<(), Error> {
        let continues = |last: &Segment| last.iova.checked_add(last.len) == Some(next.iova);
        match self {
            Self::One(last) if continues(last) => last.len += next.len,
            Self::One(last) => {
                let mut segments = Vec::new();
                segments.try_reserve(2)?;
                segments.extend([*last, next]);
                *self = Self::Many(segments);
            }
            Self::Many(segments) if segments.is_empty() => *self = Self::One(next),
            Self::Many(segments) => match segments.last_mut() {
                Some(last) if continues(last) => last.len += next.len,
                _ => {
                    segments.try_reserve(1)?;
                    segments.push(next);
                }
            },
        }
        Ok(())
    }
}

/// Implements [`Lent`] for what has its memory and its loan in a field `held`: a [`Held`](crate::held::Held) of this direction, whose
/// segments are the loan's, of this length. With `shared`, it is a loan of a shared buffer too.
macro_rules! lent_by_held {
    ([$($generics:tt)*] $type:ty, $direction:ty, |$this:ident| $len:expr $(, $shared:ident)?) => {
        impl<$($generics)*> $crate::lent::sealed::Sealed for $type {}

        impl<$($generics)*> $crate::lent::Lent for $type {
            #[inline]
            fn device(&self) -> &$crate::Device {
                &self.held.loan().device
            }
            #[inline]
            fn len(&self) -> u64 {
                let $this = self;
                $len
            }
            #[inline]
            fn segments(&self) -> &[$crate::lent::Segment] {
                self.held.loan().segments()
            }
            #[inline]
            fn device_reads(&self) -> bool {
                <$direction as $crate::Direction>::DEVICE_READS
            }
            #[inline]
            fn device_writes(&self) -> bool {
                <$direction as $crate::Direction>::DEVICE_WRITES
            }
            $($crate::lent::lent_by_held!(@$shared);)?
        }
    };
    (@shared) => {
        fn shared(&self) -> Option<$crate::lent::SharedLoan<'_>> {
            Some($crate::lent::SharedLoan(self))
        }
    };
}

pub(crate) use lent_by_held;
