//! Loans of a device as one core counts them: begun here, ended here.
//!
//! # Invariants
//!
//! A loan is begun in one tally of a device, and ended in one, whichever. Of a tally that is [closed](Tally::close_all) both words say so to
//! who adds to them, and what they were when that was said is in the result.

use super::Sums;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use iommu::PAGE_SIZE;

/// Beside the numbers: who adds has to speak up.
const CLOSED: u64 = 1;
/// The number of loans stands above that, their pages in the upper half: differences of such words are exact.
pub(crate) const ONE: u64 = CLOSED << 1;
const PAGES: u32 = 32;

/// Loans that began and that ended.
pub(crate) struct Tally {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Tally {
    pub(super) const fn new() -> Self {
        Self { begun: AtomicU64::new(0), ended: AtomicU64::new(0) }
    }

    /// What one loan of `len` bytes adds to either number. (A part of a page counts for nothing.)
    #[inline(always)]
    pub(crate) fn word(len: u64) -> u64 {
        Self::word_of_pages(len & !(PAGE_SIZE - 1))
    }

    /// The same for `len` bytes that are whole pages.
    #[inline(always)]
    pub(crate) fn word_of_pages(len: u64) -> u64 {
        debug_assert!(len.is_multiple_of(PAGE_SIZE), "{len:#x} bytes are no pages");
        ONE + (len << (PAGES - PAGE_SIZE.trailing_zeros()))
    }

    /// Takes note of a loan, whose [`Tally::word`] is `one`. `true`: the tally is closed.
    #[inline(always)]
    pub(crate) fn begin(&self, one: u64) -> bool {
        self.begun.fetch_add(one, Relaxed) & CLOSED != 0
    }

    /// Takes note of the end of a loan, whose [`Tally::word`] is `one`. `true`: the tally is closed.
    #[inline(always)]
    pub(crate) fn end(&self, one: u64) -> bool {
        self.ended.fetch_add(one, Release) & CLOSED != 0
    }

    /// Closes all tallies of a device. Returns how many loans there are, those aside that began or ended in a tally that was closed
    /// already. (Of a loan that began in one that was not and has ended in one that was, its end has been told; the other way about, its
    /// beginning has been, and the result is one less.)
    pub(super) fn close_all<'a>(tallies: impl Iterator<Item = &'a Self>) -> u64 {
        let close = |sum: u64, tally: &Self| {
            let begun = tally.begun.fetch_or(CLOSED, Relaxed);
            // Acquire: what was done for loans that have ended is over.
            sum.wrapping_add(begun).wrapping_sub(tally.ended.fetch_or(CLOSED, Acquire))
        };
        // A difference of the halves: negative where more have ended.
        let loans = (tallies.fold(0, close) as u32).cast_signed() >> 1;
        i64::from(loans).cast_unsigned()
    }

    /// Adds up. What comes and goes meanwhile is counted or not.
    pub(super) fn sums<'a, T: Iterator<Item = &'a Self>>(tallies: impl Fn() -> T) -> Sums {
        // Those that have ended first, of all cores: a loan that comes and goes in between then counts as live rather than as less
        // than nothing.
        let sum = |word: fn(&Self) -> &AtomicU64| {
            tallies().map(word).fold(0_u64, |sum, word| sum.wrapping_add(word.load(Acquire) & !CLOSED))
        };
        let ended = sum(|tally| &tally.ended);
        let begun = sum(|tally| &tally.begun);
        let live = begun.wrapping_sub(ended);
        let split = |word: u64| (u64::from(word as u32 / ONE as u32), (word >> PAGES) * PAGE_SIZE);
        let ((live, live_bytes), (total, total_bytes)) = (split(live), split(begun));
        Sums { live, live_bytes, total, total_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Caught: numbers without a sign; sums with what says that a tally is closed.
    #[test]
    fn what_is_there_when_the_tallies_are_closed_is_counted_whichever_is_closed_first() {
        let [first, second] = [Tally::new(), Tally::new()];
        let both = || [&first, &second].into_iter();
        let [one, two, three] = [1, 2, 3].map(|pages| Tally::word(pages * PAGE_SIZE));
        assert!(!first.begin(two) && !first.begin(one) && !second.end(one));
        // While they are being closed: one that ends where that has been done, and one that has begun there.
        let there = Tally::close_all([&first].into_iter());
        assert_eq!(there, 2);
        assert!(first.end(two) && first.begin(three) && !second.end(three));
        let all = there.wrapping_add(Tally::close_all([&second].into_iter()));
        // Told of: one less, and one more.
        assert_eq!(all, 0);
        let sums = Tally::sums(both);
        assert_eq!((sums.live, sums.live_bytes), (0, 0));
        assert_eq!((sums.total, sums.total_bytes), (3, 6 * PAGE_SIZE));
    }
}
