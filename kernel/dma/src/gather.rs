//! Ending many loans with one completion, strictly.
//!
//! Revoking a loan costs an invalidation and the wait for its completion, and most of that is the wait. A [`Gather`] collects
//! loans that are over at the same time; [`Gather::finish`] revokes all of them with one call for each address space, neighbouring
//! ranges as one, and only then gives the memory back. Nobody gets a page earlier than that: a gather is as strict as
//! [`Mapped::unmap`], and a revocation that fails quarantines, by name, all that it was to cover.
//!
//! Loans of one type go into a [`Gather`]. Loans of several types are each wrapped in an [`Ending`], and ended together with
//! [`end_together`]:
//!
//! ```
//! # #[cfg(feature = "fakes")] {
//! # let system = dma::fakes::FakeSystem::new();
//! # let fake = system.device("disk").unwrap();
//! # let device = &fake.device;
//! use dma::{Ending, FromDevice, ToDevice, end_together};
//!
//! let mut read = Ending::new(device.map::<FromDevice, _>(device.pages(4096)?)?);
//! let mut written = Ending::new(device.map::<ToDevice, _>(device.pages(8192)?)?);
//! end_together(&mut [&mut read, &mut written]);
//! # assert_eq!(system.iommu.revocations(), 1);
//! let (read, written) = (read.take()?, written.take()?);
//! # assert_eq!((read.len(), written.len()), (4096, 8192));
//! # }
//! # Ok::<(), dma::Error>(())
//! ```
//!
//! # Invariants
//!
//! A loan leaves [`Place::Held`] only after the revocation that covered it has returned, and with its outcome; or with the
//! whole place, and then [`Held`] revokes it.
//!
//! # Locking
//!
//! None of its own. Nothing here allocates.

#![expect(unsafe_code, reason = "takes memory back after a revocation that covered many loans")]

use crate::buffer::Spans;
use crate::device::Loan;
use crate::held::Held;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Attachment, Buffer, Direction, Mapped};
use core::fmt;
use core::mem;
use core::panic::Location;
use core::ptr;
use iommu::{IovaRange, RevokeError};

/// Ranges that [`end_together`] revokes at a time.
const TOGETHER: usize = 64;

/// A loan that ends by revocation: [`Mapped`] and [`Attachment`]. Only this crate implements it.
pub trait Endable: Parts {
    /// What its end gives back: the buffer of a mapping.
    type Back;
    #[doc(hidden)]
    fn back(memory: Self::Memory) -> Self::Back;
}

/// What a loan consists of. Seals [`Endable`].
pub trait Parts {
    #[doc(hidden)]
    type Direction: Direction;
    #[doc(hidden)]
    type Memory: Spans;
    #[doc(hidden)]
    fn into_held(self) -> Held<Self::Direction, Self::Memory>;
}

impl<D: Direction, B: Buffer> Parts for Mapped<D, B> {
    type Direction = D;
    type Memory = B;
    #[inline]
    fn into_held(self) -> Held<D, B> {
        Mapped::into_held(self)
    }
}

impl<D: Direction, B: Buffer> Endable for Mapped<D, B> {
    type Back = B;
    #[inline]
    fn back(memory: B) -> B {
        memory
    }
}

impl<D: Direction> Endable for Attachment<D> {
    type Back = ();
    #[inline]
    fn back(memory: Self::Memory) {
        drop(memory);
    }
}

/// A place for one loan.
enum Place<L: Endable> {
    Empty,
    Held(Held<L::Direction, L::Memory>),
    /// Revoked.
    Back(L::Memory),
    Lost(Quarantined),
}

impl<L: Endable> Place<L> {
    fn take(&mut self) -> Option<Result<L::Back, Quarantined>> {
        match mem::replace(self, Self::Empty) {
            Self::Back(memory) => Some(Ok(L::back(memory))),
            Self::Lost(lost) => Some(Err(lost)),
            // A drop of what is held revokes; nobody asks before the end.
            Self::Empty | Self::Held(_) => None,
        }
    }
}

/// Places as the revocation sees them.
pub trait Ends: sealed::Sealed {
    #[doc(hidden)]
    fn loan(&self) -> Option<&Loan>;
    /// # Safety
    ///
    /// As [`Held::settle`], for the loan that [`Ends::loan`] shows.
    #[doc(hidden)]
    unsafe fn settle(&mut self, outcome: Result<(), RevokeError>, site: Site);
}

mod sealed {
    pub trait Sealed {}
    impl<L: super::Endable> Sealed for super::Place<L> {}
    impl<L: super::Endable> Sealed for super::Ending<L> {}
    impl Sealed for &mut dyn super::Ends {}
}

impl<L: Endable> Ends for Place<L> {
    #[inline]
    fn loan(&self) -> Option<&Loan> {
        match self {
            Self::Held(held) => Some(held.loan()),
            _ => None,
        }
    }

    #[inline]
    unsafe fn settle(&mut self, outcome: Result<(), RevokeError>, site: Site) {
        if let Self::Held(held) = mem::replace(self, Self::Empty) {
            // SAFETY: the caller's promise.
            *self = match unsafe { held.settle(outcome, site) } {
                Ok(memory) => Self::Back(memory),
                Err(lost) => Self::Lost(lost),
            };
        }
    }
}

impl Ends for &mut dyn Ends {
    fn loan(&self) -> Option<&Loan> {
        (**self).loan()
    }

    unsafe fn settle(&mut self, outcome: Result<(), RevokeError>, site: Site) {
        // SAFETY: the caller's promise.
        unsafe { (**self).settle(outcome, site) }
    }
}

/// Up to `N` ranges.
struct Ranges<const N: usize> {
    ranges: [IovaRange; N],
    len: usize,
}

impl<const N: usize> Ranges<N> {
    fn new() -> Self {
        Self { ranges: [IovaRange::default(); N], len: 0 }
    }

    /// Adds a range, as part of the last one if they are neighbours. `false` where there is no room.
    #[inline]
    fn push(&mut self, range: IovaRange) -> bool {
        if let Some(last) = self.len.checked_sub(1).and_then(|last| self.ranges.get_mut(last))
            && let Some(both) = joined(*last, range)
        {
            *last = both;
            return true;
        }
        match self.ranges.get_mut(self.len) {
            Some(place) => {
                *place = range;
                self.len += 1;
                true
            }
            None => false,
        }
    }

    /// The ranges, neighbours as one.
    fn merged(&mut self) -> &[IovaRange] {
        let ranges = self.ranges.get_mut(..self.len).unwrap_or_default();
        merge(ranges)
    }
}

/// The two ranges as one, if they are neighbours.
#[inline]
fn joined(a: IovaRange, b: IovaRange) -> Option<IovaRange> {
    if a.end() == b.start() {
        IovaRange::between(a.start(), b.end())
    } else if b.end() == a.start() {
        IovaRange::between(b.start(), a.end())
    } else {
        None
    }
}

/// Sorts `ranges`, of which no two overlap, and makes neighbours one. Returns what is left of them.
pub(crate) fn merge(ranges: &mut [IovaRange]) -> &[IovaRange] {
    if !ranges.is_sorted_by_key(|range| range.start()) {
        ranges.sort_unstable_by_key(|range| range.start());
    }
    let mut kept = 0;
    for index in 1..ranges.len() {
        let next = ranges[index];
        match joined(ranges[kept], next) {
            Some(both) => ranges[kept] = both,
            None => {
                kept += 1;
                ranges[kept] = next;
            }
        }
    }
    let left = if ranges.is_empty() { 0 } else { kept + 1 };
    &ranges[..left]
}

/// Ends all loans in `places`: with one revocation for each address space, unless it has more than `N` separate ranges.
fn end_all<const N: usize, E: Ends>(places: &mut [E], site: Site) {
    while let Some(first) = places.iter().position(|place| place.loan().is_some()) {
        let Some(rest) = places.get_mut(first..) else { return };
        let Some(space) = rest.first().and_then(Ends::loan).map(Loan::space) else { return };
        let mut ranges = Ranges::<N>::new();
        let mut covered = rest.len();
        for (index, loan) in rest.iter().enumerate().filter_map(|(index, place)| Some((index, place.loan()?))) {
            if same(loan.space(), space) && !ranges.push(loan.range()) {
                covered = index;
                break;
            }
        }
        let outcome = space.map_or(Ok(()), |space| space.revoke(ranges.merged()));
        // The address of the space is kept, not the space: the last of its loans may be among those that end here. It is not
        // reused meanwhile for another one whose loans are in `rest`, as those keep theirs.
        let space = space.map(|space| ptr::from_ref(space).cast::<()>());
        for place in rest.iter_mut().take(covered) {
            let of = place.loan().map(|loan| loan.space().map(|space| ptr::from_ref(space).cast::<()>()));
            if of == Some(space) {
                // SAFETY: the loan is one of this address space among the first `covered`, so its range was pushed to those
                // of which `outcome` speaks; it was lent before, as it is in its place. Where there is no address space,
                // nothing is promised.
                unsafe { place.settle(outcome, site) };
            }
        }
    }
}

#[inline]
fn same(a: Option<&dyn iommu::contract::AddressSpace>, b: Option<&dyn iommu::contract::AddressSpace>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => ptr::addr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Loans of one type that end together: `N` at most at a time. Dropping it ends them.
#[must_use = "dropping a gather ends its loans"]
pub struct Gather<L: Endable, const N: usize> {
    places: [Place<L>; N],
    len: usize,
}

impl<L: Endable, const N: usize> Default for Gather<L, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<L: Endable, const N: usize> Gather<L, N> {
    /// Makes an empty one.
    pub const fn new() -> Self {
        Self { places: [const { Place::Empty }; N], len: 0 }
    }

    /// Adds a loan. Its device has it until [`Gather::finish`] or [`Gather::drain`].
    ///
    /// # Errors
    ///
    /// The loan, if there are `N` already.
    #[inline]
    pub fn push(&mut self, loan: L) -> Result<(), L> {
        match self.places.get_mut(self.len) {
            Some(place) => {
                *place = Place::Held(loan.into_held());
                self.len += 1;
                Ok(())
            }
            None => Err(loan),
        }
    }

    /// The number of loans in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no loan in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether there is no room for another loan.
    pub fn is_full(&self) -> bool {
        self.len == N
    }

    /// Ends all loans, and gives back what was lent, in the order in which the loans were added: for each, the memory, or
    /// [`Quarantined`] if its revocation failed.
    #[track_caller]
    pub fn finish(mut self) -> Finished<L, N> {
        self.end(Location::caller());
        Finished { gather: self, next: 0 }
    }

    /// As [`Gather::finish`], and the gather is empty afterwards, and can be used again.
    #[track_caller]
    pub fn drain(&mut self) -> Drain<'_, L> {
        self.end(Location::caller());
        let len = mem::take(&mut self.len);
        Drain { places: self.places.get_mut(..len).unwrap_or_default().iter_mut() }
    }

    fn end(&mut self, site: Site) {
        end_all::<N, _>(self.places.get_mut(..self.len).unwrap_or_default(), site);
    }
}

impl<L: Endable, const N: usize> Drop for Gather<L, N> {
    fn drop(&mut self) {
        if let Some(site) = self.places.iter().find_map(Ends::loan).map(|loan| loan.site) {
            self.end(site);
        }
    }
}

impl<L: Endable, const N: usize> fmt::Debug for Gather<L, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gather({} of {N})", self.len)
    }
}

/// What [`Gather::finish`] gives back. The memory that is not taken is freed.
#[must_use = "dropping it frees the memory"]
pub struct Finished<L: Endable, const N: usize> {
    gather: Gather<L, N>,
    next: usize,
}

impl<L: Endable, const N: usize> Iterator for Finished<L, N> {
    type Item = Result<L::Back, Quarantined>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let place = self.gather.places.get_mut(self.next)?;
        self.next += 1;
        place.take()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.gather.len.saturating_sub(self.next);
        (left, Some(left))
    }
}

impl<L: Endable, const N: usize> ExactSizeIterator for Finished<L, N> {}

/// What [`Gather::drain`] gives back. The memory that is not taken is freed.
#[must_use = "dropping it frees the memory"]
pub struct Drain<'a, L: Endable> {
    places: core::slice::IterMut<'a, Place<L>>,
}

impl<L: Endable> Iterator for Drain<'_, L> {
    type Item = Result<L::Back, Quarantined>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.places.next()?.take()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.places.size_hint()
    }
}

impl<L: Endable> ExactSizeIterator for Drain<'_, L> {}

impl<L: Endable> Drop for Drain<'_, L> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

/// A loan that is to end together with others, by [`end_together`]. Dropping it before ends it by itself.
#[must_use = "dropping it ends the loan"]
pub struct Ending<L: Endable> {
    place: Place<L>,
}

impl<L: Endable> Ending<L> {
    /// Wraps a loan. Its device has it until it ends.
    #[inline]
    pub fn new(loan: L) -> Self {
        Self { place: Place::Held(loan.into_held()) }
    }

    /// What was lent. A loan that has not ended yet is ended here, by itself.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed.
    #[track_caller]
    pub fn take(mut self) -> Result<L::Back, Quarantined> {
        match mem::replace(&mut self.place, Place::Empty) {
            Place::Held(held) => held.take_back(Location::caller()).map(L::back),
            Place::Back(memory) => Ok(L::back(memory)),
            Place::Lost(lost) => Err(lost),
            Place::Empty => unreachable!("a place is emptied by `take` alone, which consumes it"),
        }
    }
}

impl<L: Endable> Ends for Ending<L> {
    #[inline]
    fn loan(&self) -> Option<&Loan> {
        self.place.loan()
    }

    #[inline]
    unsafe fn settle(&mut self, outcome: Result<(), RevokeError>, site: Site) {
        // SAFETY: the caller's promise.
        unsafe { self.place.settle(outcome, site) }
    }
}

/// Ends loans of several types with one revocation for each address space (for each 64 separate ranges of it). What was lent is
/// then in the [`Ending`]s.
#[track_caller]
pub fn end_together(loans: &mut [&mut dyn Ends]) {
    end_all::<TOGETHER, _>(loans, Location::caller());
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use iommu::Iova;

    fn ranges(pages: &[(u64, u64)]) -> Vec<IovaRange> {
        pages.iter().map(|&(at, len)| IovaRange::new(Iova::new(at << 12), len << 12).unwrap()).collect()
    }

    #[test]
    fn neighbours_are_one_in_whatever_order_they_come() {
        for (input, expected) in [
            (&[][..], &[][..]),
            (&[(1, 1)], &[(1, 1)]),
            (&[(1, 1), (2, 1), (3, 2)], &[(1, 4)]),
            (&[(3, 2), (2, 1), (1, 1)], &[(1, 4)]),
            (&[(5, 1), (1, 1), (3, 1), (2, 1)], &[(1, 3), (5, 1)]),
            (&[(1, 1), (3, 1), (5, 1)], &[(1, 1), (3, 1), (5, 1)]),
        ] {
            assert_eq!(merge(&mut ranges(input)), ranges(expected));
        }
    }
}
