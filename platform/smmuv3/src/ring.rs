//! Claiming, publishing and following a queue that many cores fill at once and one piece of hardware empties.
//!
//! This is the part of the command queue that has to be right about atomics, without registers or memory: it is generic over
//! the atomic word, so that [`loom`](https://docs.rs/loom) can run it through every interleaving in this module's tests.
//!
//! # Positions
//!
//! Entries are numbered from 0 in 63 bits, so that "everything before position *p* has been consumed" is one comparison however
//! often the hardware's indexes wrap. Always `consumed <= published <= claimed <= consumed + entries`.
//!
//! # How an entry comes to the hardware
//!
//! 1. [`Ring::claim`] takes a run of free positions: one compare-exchange of the claim word. Its top bit is [`CLOSED`].
//! 2. The claimant writes its entries, which nobody else looks at.
//! 3. [`Ring::finish`] marks the run as written: one store, of the position after its end, in the place of its first entry. A
//!    place always holds the end of the latest run that began there, so a mark is of this time around exactly if it is greater
//!    than the position.
//! 4. [`Ring::ring`] walks from mark to mark and tells the hardware about everything that is written without a gap.
//!    Whoever comes first does it for all; who finds somebody at it goes away. So the index register is written by one at
//!    a time and never goes back, and nobody waits for anybody here. Nothing is missed: a claimant makes its mark before it
//!    looks whether somebody is at it, and who was at it looks for another mark after it has said that it is done.
//!
//! The claimant must not be interrupted between the first step and the third by something on its own core that waits for the
//! queue: what lies behind the gap would never be told to the hardware. Interrupts are masked for that long (see `cmdq.rs`).

use crate::bugs::{Bug, seeded};
use crate::spec::queue::QueueSize;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};
use iommu::OutOfMemory;

/// In the claim word: nothing can be claimed.
const CLOSED: u64 = 1 << 63;
/// In the word of what is published: somebody walks and tells.
const RINGING: u64 = 1 << 63;

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

/// The state of one queue.
pub(crate) struct Ring<W> {
    size: QueueSize,
    /// The bits of a position that are its place.
    places: u64,
    /// The next position to claim, and [`CLOSED`].
    claimed: W,
    /// The hardware has been told, or is just being told, of everything before this position; and [`RINGING`].
    published: W,
    /// The hardware has consumed everything before this position, and perhaps more.
    consumed: W,
    /// For each place the end of the latest run that began there.
    marks: Vec<W>,
}

impl<W: Word> Ring<W> {
    /// Makes the state of an empty queue.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new(size: QueueSize) -> Result<Self, OutOfMemory> {
        let mut marks = Vec::new();
        marks.try_reserve_exact(size.entries() as usize).map_err(|_| OutOfMemory)?;
        marks.extend((0..size.entries()).map(|_| W::new(0)));
        let zero = || W::new(0);
        let places = u64::from(size.entries() - 1);
        Ok(Self { size, places, claimed: zero(), published: zero(), consumed: zero(), marks })
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

    /// Claims up to `wanted` positions, as many as are free; an empty run if none is.
    ///
    /// # Errors
    ///
    /// [`Closed`].
    #[inline]
    pub fn claim(&self, wanted: u64) -> Result<Range<u64>, Closed> {
        let mut claimed = self.claimed.load(Relaxed);
        loop {
            if claimed & CLOSED != 0 {
                return Err(Closed);
            }
            // An older value than the truth makes the room smaller. Acquire: what was read from the places that have become
            // free was read before they are written again.
            let used = claimed.saturating_sub(self.consumed.load(Acquire));
            let used = if seeded(Bug::QueueOverfilled) { 0 } else { used };
            let count = wanted.min(u64::from(self.size.entries()).saturating_sub(used));
            let end = claimed + count;
            if count == 0 {
                return Ok(claimed..end);
            }
            match self.claimed.compare_exchange(claimed, end, Relaxed, Relaxed) {
                Ok(_) => return Ok(claimed..end),
                Err(now) => claimed = now,
            }
        }
    }

    /// The position that would be claimed next; if the queue is closed, none that can be.
    #[inline]
    pub fn next(&self) -> u64 {
        self.claimed.load(Relaxed)
    }

    /// Claims the `wanted` positions from `next` on ([`Self::next`]), or none: `None` where there is no room for all, and where the
    /// queue is closed or another core claims at this moment.
    #[inline]
    pub fn claim_from(&self, next: u64, wanted: u64) -> Option<Range<u64>> {
        let (end, entries) = (next.wrapping_add(wanted), self.places.wrapping_add(1));
        // As in `claim`. Closed, the claim word is beyond everything that is free; and what others have consumed since `next` was
        // looked at makes the difference large, but then the exchange would fail too.
        if end.wrapping_sub(self.consumed.load(Acquire)) > entries {
            return None;
        }
        self.claimed.compare_exchange(next, end, Relaxed, Relaxed).ok().map(|_| next..end)
    }

    /// [`Self::claim_from`] the next position.
    #[inline]
    pub fn claim_all(&self, wanted: u64) -> Option<Range<u64>> {
        self.claim_from(self.next(), wanted)
    }

    /// Marks a claimed run as written.
    #[inline]
    pub fn finish(&self, run: Range<u64>) {
        if let Some(mark) = self.marks.get(self.slot(run.start)) {
            // Release: whoever sees the mark sees the entries.
            mark.store(run.end, Release);
        }
    }

    /// Tells the hardware, by `tell` with the new index, of everything that is written without a gap; unless somebody is at it,
    /// who then does. Called with interrupts masked.
    #[inline]
    pub fn ring(&self, tell: impl Fn(u32)) {
        loop {
            // Between the caller's mark and the look at the bell; pairs with the fence below.
            W::fence();
            let Some(told) = self.take_bell() else { return };
            let position = self.walk(told);
            if position != told {
                // Before the hardware is told. An index that it shows of them to somebody who does not know of it yet is not
                // believed; the next look finds both. Relaxed: nothing is read or written because of it.
                self.published.store(position | RINGING, Relaxed);
                tell(self.index(position));
            }
            self.published.store(position, Release);
            // Between "done" and the look for a mark that came too late for the walk, of somebody who saw "at it".
            W::fence();
            if self.walk(position) == position {
                return;
            }
        }
    }

    /// Takes the bell. Returns up to where the hardware has been told; `None` where somebody is at it.
    #[inline]
    fn take_bell(&self) -> Option<u64> {
        let mut told = self.published.load(Relaxed);
        while told & RINGING == 0 {
            match self.published.compare_exchange(told, told | RINGING, Acquire, Relaxed) {
                Ok(_) => return Some(told),
                Err(now) => told = now,
            }
        }
        None
    }

    /// Takes the bell to tell the hardware of `run`, where everything before it has been told and nobody is at it; the caller then
    /// tells it of [`Self::index`] of its end and calls [`Self::give_bell_back`]. Otherwise nothing has changed. Called with
    /// interrupts masked.
    ///
    /// Then the run needs no mark: marks are for others, who begin to look where the hardware has been told up to, which is
    /// behind it as soon as they can.
    #[inline(always)] // Into the few places that call it.
    pub fn take_bell_for(&self, run: &Range<u64>) -> bool {
        self.published.compare_exchange(run.start, run.end | RINGING, Acquire, Relaxed).is_ok()
    }

    /// Gives the bell back that was taken for a run up to `end`. Returns whether that is all there is to tell: else
    /// [`Self::ring_for_others`] has to be called, with interrupts still masked.
    ///
    /// Nobody looks for marks where nobody has claimed anything: a claim comes before the mark that would have to be found.
    #[inline(always)]
    pub fn give_bell_back(&self, end: u64) -> bool {
        self.published.store(end, Release);
        // As in `ring`.
        W::fence();
        self.claimed.load(Relaxed) == end
    }

    /// [`Self::finish`] and [`Self::ring`] of one run. Called with interrupts masked.
    #[inline]
    pub fn finish_and_ring(&self, run: Range<u64>, tell: impl Fn(u32)) {
        if !self.take_bell_for(&run) {
            return self.finish_and_ring_in_turn(run, tell);
        }
        tell(self.index(run.end));
        if !self.give_bell_back(run.end) {
            self.ring_for_others(run.end, tell);
        }
    }

    /// What [`Self::finish_and_ring`] does where others are at it, or their entries lie before.
    #[cold]
    #[inline(never)]
    pub fn finish_and_ring_in_turn(&self, run: Range<u64>, tell: impl Fn(u32)) {
        self.finish(run);
        self.ring(tell);
    }

    /// Tells of what has been written behind `position` by those who may have found the bell taken.
    #[cold]
    #[inline(never)]
    pub fn ring_for_others(&self, position: u64, tell: impl Fn(u32)) {
        if self.walk(position) != position {
            self.ring(tell);
        }
    }

    /// The end of what is written without a gap from `position` on.
    #[inline]
    fn walk(&self, mut position: u64) -> u64 {
        while let Some(mark) = self.marks.get(self.slot(position)) {
            let end = mark.load(Acquire);
            if end <= position {
                break;
            }
            position = end;
        }
        position
    }

    /// Everything before this position has been told to the hardware, or is just being.
    #[inline]
    pub fn published(&self) -> u64 {
        self.published.load(Relaxed) & !RINGING
    }

    /// The position after the last claimed one.
    pub fn claimed(&self) -> u64 {
        self.claimed.load(Relaxed) & !CLOSED
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
        // In this order, and acquired for it: an index read later than `consumed` is never behind it. If the queue went around since, the distance
        // comes out short by whole rounds, and what is then noted is true all the same.
        let consumed = self.consumed.load(Acquire);
        let index = read();
        let advanced = u64::from(self.size.distance(self.index(consumed), index));
        if advanced > self.published().saturating_sub(consumed) {
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
