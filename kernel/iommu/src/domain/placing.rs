//! Saying what lies where, without an allocator of addresses: what keeps those apart who do so at the same time.
//!
//! What is *mapped* the tables know, and they refuse to map it again. What they cannot know is what is *under way*: a mapping that
//! has looked and not yet written, a revocation that has cleared and not yet invalidated. So there is
//!
//! - a *turn*: one maps at a time. It is held for the filling of tables, not for a wait. (Mapping is short; revocations, which
//!   are long, do not take it.)
//! - a word for each revocation under way. Who has mapped looks at them: where the addresses are those of a revocation that is not
//!   yet complete, the mapping counts as made only when that is, for until then a device may be sent to what was there before.
//! - a list of what was *lost*: ranges whose revocation failed. They are never used again.
//!
//! # Locking
//!
//! The turn is a lock that does not mask interrupts, with a deadline; not for interrupt handlers. The list of what was lost has an
//! [`IrqMutex`], a leaf but for the heap's, taken where there is such a thing only.

use crate::{IovaError, IovaRange};
use alloc::vec::Vec;
use base::{Deadline, IrqMutex, cpu};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicU64, fence};

/// Revocations that are under way at a time; more wait.
const SLOTS: usize = 4;

/// In the word of a revocation: there is one. The address is above, in the bits that are 0 in an address of a page; below is how
/// many zeroes are before the length, less one, in binary: the range is no longer than that says.
const USED: u64 = 1 << 11;
const ZEROES: u64 = 0x3f;
const ADDRESS: u64 = !0xfff;

/// Milliseconds that are waited for a turn, for a word, and for the revocation of others.
const WAIT_MILLIS: u64 = 2_000;

/// What is under way in a domain.
pub(super) struct Placing {
    turn: AtomicBool,
    revoking: [AtomicU64; SLOTS],
    any_lost: AtomicBool,
    lost: IrqMutex<Lost>,
}

/// What is never used again.
#[derive(Default)]
struct Lost {
    ranges: Vec<IovaRange>,
    /// There was no memory to note another.
    all: bool,
}

impl Placing {
    pub const fn new() -> Self {
        Self {
            turn: AtomicBool::new(false),
            revoking: [const { AtomicU64::new(0) }; SLOTS],
            any_lost: AtomicBool::new(false),
            lost: IrqMutex::new(Lost { ranges: Vec::new(), all: false }),
        }
    }

    /// Takes the turn, to map `range`.
    ///
    /// # Errors
    ///
    /// [`IovaError::InUse`] where part of it was lost, or the turn is not to be had.
    #[inline(always)]
    pub fn begin(&self, range: IovaRange) -> Result<Turn<'_>, IovaError> {
        if self.turn.compare_exchange(false, true, Acquire, Relaxed).is_err() {
            self.wait_for_turn(range)?;
        }
        let turn = Turn { placing: self };
        if self.any_lost.load(Acquire) && self.is_lost(range) {
            return Err(IovaError::InUse(range));
        }
        Ok(turn)
    }

    #[cold]
    #[inline(never)]
    fn wait_for_turn(&self, range: IovaRange) -> Result<(), IovaError> {
        let deadline = Deadline::after_millis(WAIT_MILLIS);
        while self.turn.compare_exchange_weak(false, true, Acquire, Relaxed).is_err() {
            if deadline.has_passed() {
                return Err(IovaError::InUse(range));
            }
            core::hint::spin_loop();
        }
        Ok(())
    }

    #[cold]
    fn is_lost(&self, range: IovaRange) -> bool {
        let lost = self.lost.lock();
        lost.all || lost.ranges.iter().any(|other| other.overlaps(range))
    }

    /// Notes that `range`, which the caller has mapped, is about to be revoked.
    #[inline(always)]
    pub fn revoke(&self, range: IovaRange) -> Revoking<'_> {
        let word = word(range);
        let mut slot = &self.revoking[cpu::index() % SLOTS];
        if slot.compare_exchange(0, word, Relaxed, Relaxed).is_err() {
            slot = self.wait_for_slot(word);
        }
        // Before anything is cleared: whoever sees that it is sees this, too. Pairs with the fence in `await_revocations`.
        fence(SeqCst);
        Revoking { placing: self, slot, range }
    }

    /// Another word for a revocation. There is always one in the end, for revocations have deadlines.
    #[cold]
    #[inline(never)]
    fn wait_for_slot(&self, word: u64) -> &AtomicU64 {
        loop {
            for slot in &self.revoking {
                if slot.compare_exchange(0, word, Relaxed, Relaxed).is_ok() {
                    return slot;
                }
            }
            core::hint::spin_loop();
        }
    }

    /// Waits for those revocations in `range` that are under way at this moment.
    #[inline(always)]
    fn await_revocations(&self, range: IovaRange) -> Result<(), IovaError> {
        // After the tables have been looked at.
        fence(SeqCst);
        // No words but zeroes have the sum zero: there are too few of them for what is below the addresses to.
        let sum = self.revoking.iter().fold(0_u64, |sum, slot| sum.wrapping_add(slot.load(Relaxed)));
        if sum == 0 { Ok(()) } else { self.await_revocations_in(range) }
    }

    #[cold]
    #[inline(never)]
    fn await_revocations_in(&self, range: IovaRange) -> Result<(), IovaError> {
        let deadline = Deadline::after_millis(WAIT_MILLIS);
        for slot in &self.revoking {
            let seen = slot.load(Acquire);
            // Another one in the same range is none of ours: what is mapped there now is the caller's.
            while overlaps(seen, range) && slot.load(Acquire) == seen {
                if deadline.has_passed() {
                    return Err(IovaError::InUse(range));
                }
                core::hint::spin_loop();
            }
        }
        // One of them may have failed.
        if self.any_lost.load(Acquire) && self.is_lost(range) {
            return Err(IovaError::InUse(range));
        }
        Ok(())
    }
}

/// The word of a revocation of `range`.
#[inline(always)]
fn word(range: IovaRange) -> u64 {
    let zeroes = range.len().wrapping_sub(1).leading_zeros();
    range.start().get() & ADDRESS | u64::from(zeroes) & ZEROES | USED
}

/// Whether a revocation may be in `range`.
fn overlaps(word: u64, range: IovaRange) -> bool {
    let start = word & ADDRESS;
    // How far it is to the last byte.
    let reach = u64::MAX >> (word & ZEROES);
    word & USED != 0 && start < range.end().get() && range.start().get() <= start.saturating_add(reach)
}

/// One maps at a time. Given back when dropped.
#[must_use = "others wait for the turn"]
pub struct Turn<'a> {
    placing: &'a Placing,
}

impl Turn<'_> {
    /// Gives the turn back, after `range` was mapped, and waits for revocations in it that are not yet complete.
    ///
    /// # Errors
    ///
    /// [`IovaError::InUse`]: a revocation there has failed, or takes too long. What was mapped has to be revoked.
    #[inline(always)]
    pub fn mapped(self, range: IovaRange) -> Result<(), IovaError> {
        let placing = self.placing;
        drop(self);
        placing.await_revocations(range)
    }
}

impl Drop for Turn<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.placing.turn.store(false, Release);
    }
}

/// A revocation that is under way. Where it is dropped without [`Revoking::succeeded`], its range is lost.
#[must_use = "the range is lost when this is dropped"]
pub struct Revoking<'a> {
    placing: &'a Placing,
    slot: &'a AtomicU64,
    range: IovaRange,
}

impl Revoking<'_> {
    /// The revocation is complete.
    #[inline(always)]
    pub fn succeeded(self) {
        self.slot.store(0, Release);
        core::mem::forget(self);
    }
}

impl Drop for Revoking<'_> {
    #[cold]
    fn drop(&mut self) {
        {
            let mut lost = self.placing.lost.lock();
            if lost.ranges.try_reserve(1).is_ok() {
                lost.ranges.push(self.range);
            } else {
                lost.all = true;
            }
        }
        self.placing.any_lost.store(true, Release);
        // Last: whoever finds the word free finds what was lost.
        self.slot.store(0, Release);
    }
}

/// Why `range` is none for a mapping in `window`, in pages of `page` bytes.
pub(super) fn refused(window: IovaRange, page: u64, range: IovaRange) -> Option<IovaError> {
    if range.is_empty() || !range.is_aligned(page) {
        return Some(IovaError::Misaligned(page));
    }
    (!window.covers(range)).then_some(IovaError::OutOfWindow(range))
}

#[cfg(test)]
mod tests;
