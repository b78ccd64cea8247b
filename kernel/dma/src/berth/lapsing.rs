//! Mappings that have lapsed: their berths, one above the other, until a flush revokes them all.
//!
//! # Invariants
//!
//! A berth that has lapsed is on its core's stack of them, or a flush has it. Its mapping is live until that has returned `Ok`; then
//! it is ready. One whose revocation failed is on no stack for ever: nobody has its range, and the device stays.
//!
//! # Locking
//!
//! None to let one lapse: a word with the uppermost, how many there are and of how many pages. They are taken off by a flush only, all at
//! once, so that nobody needs to know what changed in between. A flag says that a flush of this core's is under way; who finds it set
//! does not wait here.

#![expect(unsafe_code, reason = "tells the device of what is lost")]

use super::{Berth, Berths, CLOSED as READY_CLOSED, Number, PLACES, TOP};
use crate::device::SHARDS;
use crate::lazy;
use crate::quarantine::{self, Quarantined};
use alloc::sync::Arc;
use base::time::Stamp;
use base::{Deadline, cpu};
use core::panic::Location;
use core::ptr::{self, NonNull};
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use iommu::{Iova, IovaRange, PAGE_SIZE, RevokeError};

/// How many there are stands above the number of the uppermost; [`lazy::COUNT`] of them are a bit.
const ONE: u64 = TOP + 1;
const MANY: u64 = lazy::COUNT as u64 * ONE;
/// Their pages stand above that; [`lazy::BYTES`] of them, or more, are a bit, 32 above the other, so that one instruction asks for
/// both. (There are less than twice as many.)
const MANY_PAGES: u64 = MANY << 32;
const PAGES: u32 = MANY_PAGES.trailing_zeros() - (lazy::BYTES / PAGE_SIZE).trailing_zeros();
/// Nothing lapses here any more. With it goes [`MANY`]: who asks for that need not ask for this.
const CLOSED: u64 = MANY << 1 | MANY;
/// Nothing has lapsed: who asks for the above asks for this, too.
const IDLE: u64 = MANY_PAGES;

const _: () = assert!(MANY.is_power_of_two() && lazy::BYTES.is_power_of_two() && (1 << PAGES) > CLOSED);
const _: () = assert!(super::LONGEST < lazy::BYTES && PAGES >= PAGE_SHIFT);
/// Lengths of ranges that are berthed are multiples of that.
const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// Whether no more may lapse.
fn has_many(word: u64) -> bool {
    word & (MANY | MANY_PAGES) != 0 && word != IDLE
}

/// What has lapsed on a core.
pub(super) struct Lapsed {
    word: AtomicU64,
    /// A flush is under way.
    flushing: AtomicBool,
    /// Of which period the clock has been told ([`lazy::period`]), and has not called back; 0 if of none.
    alarmed: AtomicU32,
    order: Order,
}

impl Lapsed {
    pub(super) const fn new() -> Self {
        Self {
            word: AtomicU64::new(IDLE),
            flushing: AtomicBool::new(false),
            alarmed: AtomicU32::new(0),
            order: Order::new(),
        }
    }

    /// Has what lapses here flushed in time. After it has lapsed.
    fn set_alarm(&self) {
        // If the clock calls back after this, it finds what has lapsed: each of the two exchanges sees what came before the other.
        let period = lazy::period();
        if self.alarmed.swap(period, AcqRel) != period && !lazy::set_off() {
            // There is no clock yet.
            self.alarmed.store(0, Relaxed);
        }
    }

    fn is_flushing(&self) -> bool {
        self.flushing.load(Acquire)
    }
}

impl Berth {
    /// How often a mapping has lapsed here and been revoked. By who has the berth.
    #[inline(always)]
    fn lapses(&self) -> u64 {
        self.lapses.load(Relaxed)
    }

    /// Whether what lapsed here after `lapses` others has been revoked.
    #[inline(always)]
    pub(crate) fn is_revoked(&self, lapses: u64) -> bool {
        // Acquire: what the device has written is there.
        self.lapses.load(Acquire) != lapses
    }

    /// Takes note of the end of what lapsed here. By who has the berth.
    #[inline(always)]
    fn end_lapsed(&self, when: Stamp) {
        self.entry.end_lapsed(when);
        // Release: whoever sees this has the memory to himself.
        self.lapses.store(self.lapses().wrapping_add(1), Release);
    }

    /// For tests.
    #[cfg(test)]
    pub(crate) fn lapses_so_far(&self) -> u64 {
        self.lapses()
    }

    /// The core on which a mapping has lapsed here last.
    pub(crate) fn lapsed_on(&self) -> usize {
        // Acquire: see where it is stored.
        usize::from(self.core.load(Acquire))
    }

    /// For tests.
    #[cfg(test)]
    pub(crate) fn has_lapsed_on(&self, core: usize) {
        self.core.store(core as u8, Release);
    }

    /// For tests.
    #[cfg(test)]
    pub(crate) fn one_more_lapse(&self) {
        self.lapses.fetch_add(1, Release);
    }

    /// Whether the revocation of what lapsed here has failed.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Acquire)
    }
}

impl Berths {
    /// The word when one more has lapsed.
    #[inline(always)]
    fn above(word: u64, number: Number, len: u64) -> u64 {
        ((word & !TOP) | u64::from(number % PLACES as Number))
            .wrapping_add(ONE)
            .wrapping_add(len << (PAGES - PAGE_SHIFT))
    }

    /// Lets the mapping of a berth lapse, which is of that number and `len` bytes. The caller has it, and then has it no more, nor the
    /// device; or `None`, and he is to try [`Berths::lapse_slowly`]. Returns the berth, and what [`Berth::is_revoked`] is to be asked.
    #[inline(always)]
    pub(crate) fn lapse(&self, number: Number, len: u64) -> Option<(&'static Berth, u64)> {
        let berth = self.berth(number);
        let core = cpu::index() % SHARDS;
        let lapsed = &self.cores[core].lapsed;
        let lapses = berth.lapses();
        // Release: who sees this sees that what lapsed here before is over.
        berth.core.store(core as u8, Release);
        let word = lapsed.word.load(Relaxed);
        let new = Self::above(word, number, len);
        // The first sets the alarm, and the last is followed by a flush. (What is there is asked as well: one more may carry past what
        // says that it is closed.)
        if (word | new) & (MANY_PAGES | MANY) == 0 {
            berth.next.store((word & TOP) as u32, Relaxed);
            // Release: who takes it off finds it as it is.
            if lapsed.word.compare_exchange(word, new, Release, Relaxed).is_ok() {
                return Some((berth, lapses));
            }
        }
        None
    }

    /// [`Berths::lapse`] where that did not. `None` if nothing may lapse here.
    #[cold]
    #[inline(never)]
    pub(crate) fn lapse_slowly(self: &Arc<Self>, number: Number, len: u64) -> Option<(&'static Berth, u64)> {
        let berth = self.berth(number);
        let lapses = berth.lapses();
        // The berth keeps the device until it has lapsed.
        let this = Arc::clone(self);
        let core = berth.lapsed_on();
        let lapsed = this.lapsed(core);
        let mut word = lapsed.word.load(Relaxed);
        let new = loop {
            // Many: somebody else is flushing them, or will.
            if has_many(word) && (word & CLOSED == CLOSED || !this.flush_core(core)) {
                return None;
            }
            word = lapsed.word.load(Relaxed);
            if has_many(word) {
                return None;
            }
            berth.next.store((word & TOP) as u32, Relaxed);
            let new = Self::above(if word & TOP == 0 { 0 } else { word }, berth.number, len);
            // Release: as above.
            match lapsed.word.compare_exchange(word, new, Release, Relaxed) {
                Ok(_) => break new,
                Err(now) => word = now,
            }
        };
        if has_many(new) {
            this.flush_core(core);
        } else if word & TOP == 0 {
            lapsed.set_alarm();
        }
        Some((berth, lapses))
    }

    fn lapsed(&self, core: usize) -> &Lapsed {
        &self.cores[core % SHARDS].lapsed
    }

    /// As [`Berths::flush_all`], because it is time. What somebody else is flushing on a core may not be all there is now.
    pub(crate) fn flush_in_time(&self) {
        for core in 0..SHARDS {
            self.lapsed(core).alarmed.swap(0, AcqRel);
            if !self.flush_core(core) {
                self.lapsed(core).set_alarm();
            }
        }
    }

    /// Flushes what has lapsed on all cores, unless somebody else is at it.
    pub(crate) fn flush_all(&self) {
        for core in 0..SHARDS {
            self.flush_core(core);
        }
    }

    /// Flushes what has lapsed on all cores before the call.
    ///
    /// # Errors
    ///
    /// [`base::TimedOut`] if others were at it, and did not finish before `deadline`.
    pub(crate) fn flush_by(&self, deadline: Deadline) -> Result<(), base::TimedOut> {
        for core in 0..SHARDS {
            while !self.flush_core(core) {
                base::wait_until(deadline, || !self.lapsed(core).is_flushing())?;
            }
        }
        Ok(())
    }

    /// Flushes on the core on which a mapping has lapsed in a berth, until that is over.
    ///
    /// # Errors
    ///
    /// As [`Berths::flush_by`].
    pub(crate) fn flush_to(&self, berth: &Berth, lapses: u64, deadline: Deadline) -> Result<(), base::TimedOut> {
        let is_over = || berth.is_revoked(lapses) || berth.is_lost();
        let core = berth.lapsed_on();
        // A flush of one's own ends all that has lapsed there.
        while !is_over() && !self.flush_core(core) {
            base::wait_until(deadline, || is_over() || !self.lapsed(core).is_flushing())?;
        }
        Ok(())
    }

    /// For tests: closes without a flush, as another core does.
    #[cfg(test)]
    pub(super) fn close_lapsed_of_this_core(&self) {
        self.cores[cpu::index() % SHARDS].lapsed.word.fetch_or(CLOSED, Relaxed);
    }

    /// Lets nothing lapse any more, and flushes what has.
    pub(super) fn close_lapsed(&self) {
        for core in &self.cores {
            core.lapsed.word.fetch_or(CLOSED, Relaxed);
        }
        self.flush_all();
    }

    /// Flushes what has lapsed on a core. `false` if somebody else is at it. (How it went, the berths say.)
    fn flush_core(&self, core: usize) -> bool {
        let lapsed = self.lapsed(core);
        if lapsed.word.load(Relaxed) & TOP == 0 && !lapsed.is_flushing() {
            return true;
        }
        if lapsed.flushing.swap(true, Acquire) {
            return false;
        }
        // Acquire: the berths are as they were when they lapsed.
        let mut word = lapsed.word.load(Relaxed);
        let empty = |word: u64| if word & CLOSED == CLOSED { CLOSED } else { IDLE };
        while let Err(now) = lapsed.word.compare_exchange(word, empty(word), Acquire, Relaxed) {
            word = now;
        }
        if word & TOP != 0 {
            self.flush_from((word & TOP) as Number, core, &lapsed.order);
            self.rented.array.orphans.free(core);
        }
        lapsed.flushing.store(false, Release);
        base::notify();
        true
    }

    /// A stack's berths, from the one of this number down.
    fn downwards(&self, top: Number) -> impl Iterator<Item = &'static Berth> {
        let berths = self.rented.berths;
        // The next is known before anything is done with one.
        let mut next = top;
        let below = move || {
            let berth = (next != 0).then(|| &berths[next as usize % PLACES])?;
            next = berth.next.load(Relaxed);
            Some(berth)
        };
        core::iter::from_fn(below)
    }

    /// Revokes what is on a stack that is the caller's, and was a core's, with one completion.
    fn flush_from(&self, top: Number, core: usize, order: &Order) {
        let (mut few, expected) = (Ranges::<FEW>::new(), order.expected());
        if few.add(self.downwards(top)) && few.len <= expected {
            self.revoke_from(top, core, few.as_slice());
        } else {
            self.flush_many(top, core, expected, order);
        }
    }

    #[cold]
    fn flush_many(&self, mut top: Number, core: usize, expected: usize, order: &Order) {
        let mut ranges = Ranges::<{ lazy::COUNT }>::new();
        // There are no more than that (the word). What is not revoked is never taken for it.
        if !ranges.add(self.downwards(top)) {
            return self.lose_all(top, RevokeError::Dead);
        }
        if ranges.len > expected {
            top = self.put_in_order(top);
            ranges.len = 0;
            ranges.add(self.downwards(top));
            order.found(ranges.len);
        }
        self.revoke_from(top, core, ranges.as_slice());
    }

    #[inline]
    fn revoke_from(&self, top: Number, core: usize, ranges: &[IovaRange]) {
        match self.domain.space().revoke(ranges) {
            Ok(()) => self.end_all(top, core),
            Err(cause) => self.lose_all(top, cause),
        }
    }

    /// Links what is on a stack anew, by address. Returns the uppermost.
    #[cold]
    fn put_in_order(&self, top: Number) -> Number {
        let mut order: [Option<&Berth>; lazy::COUNT] = [None; lazy::COUNT];
        let mut count = 0;
        for (place, berth) in order.iter_mut().zip(self.downwards(top)) {
            *place = Some(berth);
            count += 1;
        }
        let order = order.get_mut(..count).unwrap_or_default();
        order.sort_unstable_by_key(|berth| berth.map(|berth| berth.entry.start()));
        // From the last up: the first is the uppermost.
        order.iter().rev().flatten().fold(0, |below, berth| {
            berth.next.store(below, Relaxed);
            berth.number
        })
    }

    /// Takes note of the end of what was revoked, and makes it ready on the core on which it lapsed, whoever flushed: those of one size that
    /// follow each other by one exchange.
    pub(super) fn end_all(&self, top: Number, core: usize) {
        let when = Stamp::now();
        let mut berths = self.downwards(top);
        let Some(mut first) = berths.next() else { return };
        let (mut last, mut class) = (first, first.class.load(Relaxed));
        first.end_lapsed(when);
        for berth in berths {
            // What is of one size is linked as it was.
            if berth.class.load(Relaxed) != class {
                self.put_all(first, last, core);
                (first, class) = (berth, berth.class.load(Relaxed));
            }
            last = berth;
            berth.end_lapsed(when);
        }
        self.put_all(first, last, core);
    }

    /// Makes berths ready on a core that are of one size, and linked.
    fn put_all(&self, top: &Berth, bottom: &Berth, core: usize) {
        let stack = self.stack_on(core, top);
        let mut word = stack.0.load(Relaxed);
        while word & READY_CLOSED == 0 {
            bottom.next.store((word & TOP) as u32, Relaxed);
            // Release: as in `push`.
            match stack.0.compare_exchange(word, (word & !TOP) | u64::from(top.number), Release, Relaxed) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
        for berth in self.downwards(top.number) {
            let last = ptr::eq(berth, bottom);
            self.put_back(berth);
            if last {
                return;
            }
        }
    }

    /// Names what could not be revoked, and lets nothing lapse any more.
    #[cold]
    fn lose_all(&self, top: Number, cause: RevokeError) {
        self.failed.call_once(|| cause);
        for core in &self.cores {
            core.lapsed.word.fetch_or(CLOSED, Relaxed);
        }
        for berth in self.downwards(top) {
            if let Some(lost) = self.what_is_lost(berth) {
                self.count_lost(lost.range);
                quarantine::add(&lost);
            }
            berth.lost.store(true, Release);
        }
    }

    /// Counts what could not be revoked. Its berth is out for ever, and so is the device there.
    fn count_lost(&self, range: IovaRange) {
        if let Some(body) = NonNull::new(self.body.load(Relaxed)) {
            // SAFETY: a berth that is out keeps it (invariant).
            unsafe { body.as_ref() }.has_lost(range);
        }
    }

    /// What is to be said of a berth whose range could not be revoked.
    #[cold]
    pub(crate) fn what_is_lost(&self, berth: &Berth) -> Option<Quarantined> {
        let live = berth.entry.live_mapping()?;
        let cause = self.failed.get().copied().unwrap_or(RevokeError::Dead);
        let mapped_at = live.site.unwrap_or_else(|| Location::caller());
        Some(Quarantined { device: self.name.clone(), range: live.range, cause, mapped_at })
    }
}

/// How many ranges a flush may have to revoke although its berths are in order. What has been put in order stays so, from flush to flush,
/// and doing it costs more than the commands of a few ranges: so it is done when there are more than that. By who flushes.
struct Order {
    ranges: AtomicU32,
    flushes: AtomicU32,
}

impl Order {
    /// Flushes after which all is found out anew.
    const KNOWN: u32 = 256;

    const fn new() -> Self {
        Self { ranges: AtomicU32::new(1), flushes: AtomicU32::new(0) }
    }

    fn expected(&self) -> usize {
        let flushes = self.flushes.load(Relaxed).wrapping_add(1) % Self::KNOWN;
        self.flushes.store(flushes, Relaxed);
        if flushes == 0 {
            self.ranges.store(1, Relaxed);
        }
        self.ranges.load(Relaxed) as usize
    }

    fn found(&self, ranges: usize) {
        let expected = self.ranges.load(Relaxed).max(ranges as u32);
        self.ranges.store(expected, Relaxed);
    }
}

/// Ranges of berths, those that are neighbours as one.
pub(super) struct Ranges<const N: usize> {
    all: [IovaRange; N],
    len: usize,
}

/// Ranges of a flush, mostly: what was in order stays so.
const FEW: usize = 8;

impl<const N: usize> Ranges<N> {
    pub(super) fn new() -> Self {
        Self { all: [IovaRange::default(); N], len: 0 }
    }

    /// Adds what comes one after another. `false` if there is no room: this is good for nothing then.
    #[inline(always)]
    pub(super) fn add(&mut self, berths: impl Iterator<Item = &'static Berth>) -> bool {
        let (mut start, mut end) = (0, 0);
        for berth in berths {
            // A range has an end.
            let first = berth.entry.start().get();
            let behind = first.wrapping_add(berth.entry.bytes());
            if first == end {
                end = behind;
            } else if behind == start {
                start = first;
            } else {
                if !self.push(start, end) {
                    return false;
                }
                (start, end) = (first, behind);
            }
        }
        self.push(start, end)
    }

    #[cold]
    fn push(&mut self, start: u64, end: u64) -> bool {
        let range = IovaRange::new(Iova::new(start), end.wrapping_sub(start)).unwrap_or_default();
        if range.is_empty() {
            return true;
        }
        let Some(place) = self.all.get_mut(self.len) else { return false };
        *place = range;
        self.len += 1;
        true
    }

    pub(super) fn as_slice(&self) -> &[IovaRange] {
        self.all.get(..self.len).unwrap_or_default()
    }
}
