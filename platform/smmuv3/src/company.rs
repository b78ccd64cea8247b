//! Whether it is worth waiting a moment for others before the hardware is told.
//!
//! A register access costs about what the rest of a revocation costs, or more, and several cores that make them at once hinder each
//! other. So where cores meet they share them: whoever has written its commands waits for a moment for those who were there the
//! last time, and one of them goes to the registers for all. This is group commit; what is known about who is there is one
//! number, how many runs of commands came together the last time.
//!
//! # When it is worth it
//!
//! Waiting never costs more than a bounded number of looks at memory ([`Config::linger`](crate::Config::linger)), which take
//! about as long as the registers do: if the others come, one access to each of the two registers is saved for every core but
//! one; if they do not, the loss is about what a meeting at the registers would have cost. Nobody waits for others who has met
//! nobody: the number is raised by meetings at the registers only. It falls to what really came as soon as somebody waited in
//! vain, and then the next meetings are let pass, more of them after each time in vain.
//!
//! # Locking
//!
//! Changed by whoever has the bell; read by all. What it says decides who waits and for how long, never whether something is complete.

use crate::ring::Word;
use core::sync::atomic::Ordering::Relaxed;

/// The most meetings that are let pass.
const WARY_MAX: u64 = 31;
/// Bits of each of three numbers: the runs that are expected, the meetings that are still to be let pass, and how many were the last
/// time.
const BITS: u32 = 20;

/// How many came together the last time.
pub(crate) struct Company<W>(W);

impl<W: Word> Company<W> {
    pub fn new() -> Self {
        Self(W::new(1))
    }

    /// Runs that are expected to come together.
    #[inline]
    pub fn expected(&self) -> u64 {
        self.0.load(Relaxed) & ((1 << BITS) - 1)
    }

    /// Notes that the hardware was told of `met` runs at once, and that before any of those could be known to be over `behind` more
    /// had come. By who has the bell.
    pub fn note(&self, met: u64, behind: u64) {
        let word = self.0.load(Relaxed);
        let (mut left, mut penalty) = (word >> BITS & ((1 << BITS) - 1), word >> (2 * BITS));
        if met < self.expected() {
            // Somebody waited in vain.
            penalty = (2 * penalty + 1).min(WARY_MAX);
            left = penalty;
        } else if met > 1 {
            (left, penalty) = (0, 0);
        }
        let mut expected = met;
        if behind != 0 {
            match left.checked_sub(1) {
                Some(fewer) => left = fewer,
                None => expected += behind,
            }
        }
        self.0.store(penalty << (2 * BITS) | left << BITS | expected.clamp(1, (1 << BITS) - 1), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    //! Seen red: an expectation that does not fall; meetings that are never let pass; a success that does not end that.
    use super::*;
    use alloc::vec::Vec;
    use core::sync::atomic::AtomicU64;

    fn company() -> Company<AtomicU64> {
        Company::new()
    }

    #[test]
    fn who_meets_nobody_waits_for_nobody() {
        let company = company();
        for _ in 0..100 {
            assert_eq!(company.expected(), 1);
            company.note(1, 0);
        }
    }

    #[test]
    fn those_who_met_are_expected_until_one_stays_away() {
        let company = company();
        company.note(1, 2);
        assert_eq!(company.expected(), 3);
        for _ in 0..10 {
            company.note(3, 0);
            assert_eq!(company.expected(), 3);
        }
        company.note(2, 0);
        assert_eq!(company.expected(), 2);
        company.note(1, 0);
        assert_eq!(company.expected(), 1);
    }

    #[test]
    fn whoever_waited_in_vain_lets_meetings_pass_more_of_them_each_time() {
        let company = company();
        let mut passed = Vec::new();
        for _ in 0..7 {
            let mut meetings = 0;
            while company.expected() == 1 {
                company.note(1, 1);
                meetings += 1;
            }
            passed.push(meetings - 1);
            company.note(1, 0);
        }
        assert_eq!(passed, [0, 1, 3, 7, 15, 31, 31]);
        // Two that came together make good for all of it.
        while company.expected() == 1 {
            company.note(1, 1);
        }
        company.note(2, 0);
        company.note(1, 0);
        company.note(1, 1);
        company.note(1, 1);
        assert_eq!(company.expected(), 2);
    }
}
