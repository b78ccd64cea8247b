//! Claiming, publishing and following a queue that many cores fill at once and one piece of hardware empties.
//!
//! This is the part of the command queue that has to be right about atomics, without registers or memory: it is generic over
//! the atomic word, so that [`loom`](https://docs.rs/loom) can run it through every interleaving in this module's tests.
//!
//! # Positions
//!
//! Entries are numbered from 0 in 59 bits, so that "everything before position *p* has been consumed" is one comparison however
//! often the hardware's indexes wrap. Always `consumed <= told <= claimed <= consumed + entries`.
//!
//! # The word in which cores meet
//!
//! The next position to claim and, above it, the *bell* ([`BELL`]: who has it is at the hardware's registers, the only one) and what
//! keeps others from the short way ([`CROWD`], [`POSTED`], [`CLOSED`], [`LONG_WAY`]). Without any of these bits the hardware has been told of
//! everything before the position, and nobody is here.
//!
//! # The short way
//!
//! Where nobody is here, one exchange claims a run and takes the bell ([`Ring::claim_alone`]); the run is written, the hardware is told,
//! and one exchange gives the bell back ([`Ring::leave_alone`]). That fails if anybody has come meanwhile, or if what one has seen at
//! the registers has to be looked at twice ([`Ring::disturb`]), because each of these changes the word.
//!
//! # The way of a crowd
//!
//! 1. [`Ring::claim`] takes a run of free positions and says by [`CROWD`] that it did.
//! 2. The claimant writes its entries, which nobody else looks at.
//! 3. [`Ring::finish`] marks the run as written: one store, of the position after its end, in the place of its first entry. A
//!    place always holds the end of the latest run that began there, so a mark is of this time around exactly if it is greater
//!    than the position.
//! 4. Everybody waits for the end of his run to be consumed and looks at memory for it. [`Ring::turn`] says to whom nobody is
//!    at the registers that he shall go there: at once if he is the last of those who are expected ([`Company`]), else
//!    after a moment. He takes the bell ([`Ring::take_bell`]), tells of everything that is written without a gap, whosever
//!    ([`Ring::tell_written`]), looks how far the hardware is, for all ([`Ring::follow`]), and gives the bell back ([`Ring::leave`]).
//!
//! Nobody relies on another to come: whoever waits goes himself if nobody does. Nobody waits for commands of which nobody hears
//! ([`Ring::post`]); for them it is as with a doorbell: whoever leaves looks whether any were marked while he was there, and whoever has
//! marked some looks whether somebody is there, each after a fence.
//!
//! The claimant must not be interrupted between the first step and the third by something on its own core that waits for the
//! queue: what lies behind the gap would never be told to the hardware. Nor may who has the bell be, for whom all others wait.
//! Interrupts are masked for that long (see `cmdq.rs`).

use crate::bugs::{Bug, seeded};
use crate::company::Company;
use crate::spec::queue::QueueSize;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};
use iommu::OutOfMemory;

/// In the claim word: nothing can be claimed.
const CLOSED: u64 = 1 << 63;
/// Somebody is at the registers.
const BELL: u64 = 1 << 62;
/// Somebody else is here or was a moment ago, or something has not been told: the short way is shut.
const CROWD: u64 = 1 << 61;
/// Among what has not been told may be something that nobody waits for.
const POSTED: u64 = 1 << 60;
/// The short way is shut for good.
const LONG_WAY: u64 = 1 << 59;
/// The rest.
const POSITION: u64 = LONG_WAY - 1;

/// A 64-bit atomic: the processor's, or the model checker's.
pub(crate) trait Word {
    fn new(value: u64) -> Self;
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn compare_exchange(&self, old: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64>;
    fn fetch_max(&self, value: u64, order: Ordering) -> u64;
    fn fetch_or(&self, value: u64, order: Ordering) -> u64;
    fn fetch_and(&self, value: u64, order: Ordering) -> u64;
    /// A sequentially consistent fence.
    fn fence();
}

macro_rules! word {
    ($atomic:ty, $fence:path) => {
        impl $crate::ring::Word for $atomic {
            fn new(value: u64) -> Self {
                <$atomic>::new(value)
            }
            fn load(&self, order: Ordering) -> u64 {
                <$atomic>::load(self, order)
            }
            fn store(&self, value: u64, order: Ordering) {
                <$atomic>::store(self, value, order);
            }
            fn compare_exchange(&self, old: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
                <$atomic>::compare_exchange(self, old, new, success, failure)
            }
            fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
                <$atomic>::fetch_max(self, value, order)
            }
            fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
                <$atomic>::fetch_or(self, value, order)
            }
            fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
                <$atomic>::fetch_and(self, value, order)
            }
            fn fence() {
                $fence(Ordering::SeqCst);
            }
        }
    };
}

word!(core::sync::atomic::AtomicU64, core::sync::atomic::fence);

/// The queue takes nothing: see [`Ring::close`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// An index of the hardware's claims more than it was ever given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadIndex;

/// What is to be done by whoever waits for the end of his run to be consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing: somebody is at the registers, or there is nothing to be told because somebody writes before it.
    Wait,
    /// Nothing for a moment: others are expected, and one of them can go for all.
    Linger,
    /// To go to the registers. What was waited for has been told to the hardware if `told`.
    Go { told: bool },
}

/// The state of one queue.
pub(crate) struct Ring<W> {
    size: QueueSize,
    /// The bits of a position that are its place.
    places: u64,
    /// The next position to claim, and the bits above.
    claimed: W,
    /// The hardware has been told, or is just being told, of everything before this position. Changed by who has the bell.
    told: W,
    /// The hardware has consumed everything before this position, and perhaps more.
    consumed: W,
    company: Company<W>,
    /// For each place the end of the latest run that began there and was marked.
    marks: Vec<W>,
}

impl<W: Word> Ring<W> {
    /// Makes the state of an empty queue. Its short way can be used if `short_way`.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new(size: QueueSize, short_way: bool) -> Result<Self, OutOfMemory> {
        let mut marks = Vec::new();
        marks.try_reserve_exact(size.entries() as usize).map_err(|_| OutOfMemory)?;
        marks.extend((0..size.entries()).map(|_| W::new(0)));
        let zero = || W::new(0);
        let claimed = W::new(if short_way { 0 } else { LONG_WAY });
        let places = u64::from(size.entries() - 1);
        Ok(Self { size, places, claimed, told: zero(), consumed: zero(), company: Company::new(), marks })
    }

    /// The index register's value for a position.
    #[inline]
    pub fn index(&self, position: u64) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // The mask is meant: position and wrap bit.
        let low = position as u32;
        low & (self.size.mask() >> u32::from(seeded(Bug::WrapDropped)))
    }

    /// The place of a position.
    #[inline]
    pub fn slot(&self, position: u64) -> usize {
        (position & self.places) as usize
    }

    /// Claims up to `wanted` positions, as many as are free; an empty run if none is. Called with interrupts masked.
    ///
    /// # Errors
    ///
    /// [`Closed`].
    #[inline]
    pub fn claim(&self, wanted: u64) -> Result<Range<u64>, Closed> {
        self.claim_with(wanted, CROWD)
    }

    /// [`Self::claim`] for what nobody waits for: [`Self::ring`] has to be called after [`Self::finish`].
    ///
    /// # Errors
    ///
    /// [`Closed`].
    #[inline]
    pub fn post(&self, wanted: u64) -> Result<Range<u64>, Closed> {
        self.claim_with(wanted, CROWD | POSTED)
    }

    #[inline]
    fn claim_with(&self, wanted: u64, bits: u64) -> Result<Range<u64>, Closed> {
        let mut word = self.claimed.load(Relaxed);
        loop {
            if word & CLOSED != 0 {
                return Err(Closed);
            }
            let claimed = word & POSITION;
            // An older value than the truth makes the room smaller. Acquire: what was read from the places that have become
            // free was read before they are written again.
            let used = claimed.saturating_sub(self.consumed.load(Acquire));
            let used = if seeded(Bug::QueueOverfilled) { 0 } else { used };
            let count = wanted.min(u64::from(self.size.entries()).saturating_sub(used));
            if count == 0 {
                return Ok(claimed..claimed);
            }
            match self.claimed.compare_exchange(word, (word + count) | bits, Relaxed, Relaxed) {
                Ok(_) => return Ok(claimed..claimed + count),
                Err(now) => word = now,
            }
        }
    }

    /// The position that would be claimed next; with other bits above it if the short way is shut.
    #[inline(always)]
    pub fn next(&self) -> u64 {
        self.claimed.load(Relaxed)
    }

    /// Whether others are here, or were a moment ago.
    #[inline]
    pub fn is_crowded(&self) -> bool {
        self.claimed.load(Relaxed) & !POSITION != 0
    }

    /// Claims the `wanted` positions from `next` on ([`Self::next`]) and takes the bell, if nobody is here; `None` where somebody is, or
    /// there is no room for all. Called with interrupts masked, until [`Self::leave_alone`] or [`Self::leave`].
    ///
    /// The run needs no mark: marks are for others, who begin to look where the hardware has been told up to.
    #[inline(always)] // Into the few places that call it.
    pub fn claim_alone(&self, next: u64, wanted: u64) -> Option<Range<u64>> {
        let (end, entries) = (next.wrapping_add(wanted), self.places.wrapping_add(1));
        // As in `claim`. With any of the bits, this is beyond everything that is free; and what others have consumed since `next`
        // was looked at makes the difference large, but then the exchange would fail too.
        if end.wrapping_sub(self.consumed.load(Acquire)) > entries {
            return None;
        }
        // Acquire: what was done by who had the bell before is over.
        self.claimed.compare_exchange(next, end | BELL, Acquire, Relaxed).ok().map(|_| next..end)
    }

    /// Says that the hardware is about to be told of everything before `end`. By who has the bell.
    ///
    /// Before the hardware is told: an index that it shows of what somebody does not know of is not believed by him.
    #[inline(always)]
    pub fn telling(&self, end: u64) {
        self.told.store(end, Relaxed);
    }

    /// Gives the bell back that was taken for a run up to `end`, of which the hardware has been told. `false` if somebody has come, or
    /// something is wrong: then the bell has not been given back, and [`Self::leave`] has to be called.
    #[inline(always)]
    pub fn leave_alone(&self, end: u64) -> bool {
        self.claimed.compare_exchange(end | BELL, end, Release, Relaxed).is_ok()
    }

    /// Marks a claimed run as written.
    #[inline]
    pub fn finish(&self, run: Range<u64>) {
        if let Some(mark) = self.marks.get(self.slot(run.start)) {
            // Release: whoever sees the mark sees the entries.
            mark.store(run.end, Release);
        }
    }

    /// What is to be done by whoever waits for everything before `end` to be consumed, which has been marked.
    #[inline]
    pub fn turn(&self, end: u64) -> Turn {
        // Acquire: what was noted by who had the bell before is seen.
        if self.claimed.load(Acquire) & BELL != 0 {
            return Turn::Wait;
        }
        let told = self.told.load(Relaxed);
        if told >= end {
            return Turn::Go { told: true };
        }
        let (written, runs) = self.walk(told, &(0..0));
        if written < end {
            Turn::Wait
        } else if runs < self.company.expected() {
            Turn::Linger
        } else {
            Turn::Go { told: false }
        }
    }

    /// Takes the bell, if nobody has it. Called with interrupts masked, until [`Self::leave`].
    #[inline]
    pub fn take_bell(&self) -> bool {
        let mut word = self.claimed.load(Relaxed);
        while word & BELL == 0 {
            // Acquire: what was done by who had the bell before is over.
            match self.claimed.compare_exchange(word, word | BELL, Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
        false
    }

    /// Tells the hardware, by `tell` with the new index, of everything that is written without a gap. By who has the bell. Returns of
    /// how many runs, those within `own` being one.
    #[inline]
    pub fn tell_written(&self, own: &Range<u64>, tell: impl FnOnce(u32)) -> u64 {
        let (written, runs) = self.walk(self.told.load(Relaxed), own);
        if runs != 0 {
            self.telling(written);
            tell(self.index(written));
        }
        runs
    }

    /// How many runs have come behind what the hardware has been told of. By who has the bell, before anybody can know from what he
    /// notes that his run is over.
    #[inline]
    pub fn behind(&self) -> u64 {
        let (written, runs) = self.walk(self.told.load(Relaxed), &(0..0));
        // Whoever has not marked his run yet counts as one.
        runs + u64::from(self.claimed() != written)
    }

    /// Gives the bell back, after the hardware was told of `runs`, and `behind` came behind them. `false` if something has been marked
    /// meanwhile that nobody waits for: then [`Self::ring`] has to be called, with interrupts masked.
    pub fn leave(&self, runs: u64, behind: u64) -> bool {
        let told = self.told.load(Relaxed);
        let mut word = self.claimed.load(Relaxed);
        if runs != 0 {
            self.company.note(runs, behind);
        }
        let company = runs != 1 || behind != 0;
        loop {
            let bits = match word & POSITION == told {
                true if company => BELL | POSTED,
                true => BELL | POSTED | CROWD,
                false => BELL,
            };
            // Release: what was done by who has the bell is over.
            match self.claimed.compare_exchange(word, word & !bits, Release, Relaxed) {
                Ok(_) if word & POSTED == 0 || bits & POSTED != 0 => return true,
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        if seeded(Bug::PostedForgotten) {
            return true;
        }
        // Between "gone" and the look for a mark that came too late, of somebody who saw "at it"; pairs with the fence in `ring`.
        W::fence();
        self.walk(told, &(0..0)).0 == told
    }

    /// Tells the hardware of what has been posted; unless somebody is at it, who then does. Called with interrupts masked.
    #[inline]
    pub fn ring(&self, tell: impl Fn(u32)) {
        loop {
            // Between the caller's mark and the look at the bell; pairs with the fence in `leave`.
            W::fence();
            if !self.take_bell() {
                return;
            }
            let runs = self.tell_written(&(0..0), &tell);
            let behind = self.behind();
            if self.leave(runs, behind) {
                return;
            }
        }
    }

    /// Shuts the short way until somebody has gone the other: whoever is on it does not get to its end.
    pub fn disturb(&self) {
        self.claimed.fetch_or(CROWD, Relaxed);
    }

    /// The end of what is written without a gap from `position` on, and of how many runs that is, those within `own` being one.
    #[inline]
    fn walk(&self, mut position: u64, own: &Range<u64>) -> (u64, u64) {
        let (mut runs, mut counted) = (0, false);
        while let Some(mark) = self.marks.get(self.slot(position)) {
            let end = mark.load(Acquire);
            if end <= position {
                break;
            }
            let ours = own.contains(&position);
            runs += u64::from(!(ours && counted));
            counted |= ours;
            position = end;
        }
        (position, runs)
    }

    /// Everything before this position has been told to the hardware, or is just being.
    #[inline]
    pub fn told(&self) -> u64 {
        self.told.load(Relaxed)
    }

    /// The end of what has been marked behind what the hardware has been told of.
    #[cfg(test)]
    pub fn written(&self) -> u64 {
        self.walk(self.told(), &(0..0)).0
    }

    /// The position after the last claimed one.
    pub fn claimed(&self) -> u64 {
        self.claimed.load(Relaxed) & POSITION
    }

    /// Everything before this position is known to be consumed.
    #[inline]
    pub fn consumed(&self) -> u64 {
        self.consumed.load(Acquire)
    }

    /// Follows the hardware, whose index `read` reads now. `read` orders what follows after the reading.
    ///
    /// # Errors
    ///
    /// [`BadIndex`]: the index is believed in nothing.
    #[inline]
    pub fn follow(&self, read: impl FnOnce() -> u32) -> Result<u64, BadIndex> {
        // In this order, and acquired for it: an index read later than `consumed` is never behind it. If the queue went around since, the
        // distance comes out short by whole rounds, and what is then noted is true all the same.
        let consumed = self.consumed.load(Acquire);
        let index = read();
        let advanced = u64::from(self.size.distance(self.index(consumed), index));
        if advanced > self.told().saturating_sub(consumed) {
            // Others may have followed it further since `consumed` was looked at; then nothing is wrong with the index.
            return if self.consumed.load(Relaxed) == consumed { Err(BadIndex) } else { Ok(consumed) };
        }
        let now = consumed + advanced;
        if advanced != 0 {
            self.reached(now);
        }
        Ok(now)
    }

    /// Notes that everything before `position` has been consumed.
    #[inline]
    pub fn reached(&self, position: u64) {
        // Release: what was read from the places is over before a claim of them sees this.
        self.consumed.fetch_max(position, Release);
    }

    /// Lets nothing be claimed any more.
    pub fn close(&self) {
        self.claimed.fetch_or(CLOSED, Relaxed);
    }

    /// Undoes [`Self::close`].
    pub fn open(&self) {
        self.claimed.fetch_and(!CLOSED, Relaxed);
    }
}

#[cfg(test)]
mod tests;
