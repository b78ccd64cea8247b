//! What has lapsed of one device on one core, and its flush. Invariants and locking: see the module above.

use super::erased::Erased;
use super::{ALARM, ALL, BYTES, COUNT, PERIOD_NOW, Strictness};
use crate::device::Lapsed;
use crate::gather::merge;
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::{Device, Error};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::Duration;
use base::{Deadline, IrqMutex, IrqMutexGuard, fallible, wait_until};
use core::mem;
use core::sync::atomic::{AtomicU64, Ordering};
use iommu::{IovaRange, RevokeError};

/// What has lapsed of one device on one core.
pub(crate) struct Lapses {
    state: IrqMutex<State>,
    /// All places below are over.
    over: AtomicU64,
    /// All places below are over, and their revocation has returned `Ok`.
    revoked: AtomicU64,
    /// Whether the device snoops.
    pub(super) coherent: bool,
}

struct State {
    /// The first place of the generation that loans lapse in at this moment.
    first: Place,
    /// How many may: none after a failure.
    room: usize,
    bytes: u64,
    batch: Batch,
    /// The device, while there are loans: it keeps the address space, for all of them.
    device: Option<Device>,
    /// The generation before is being flushed: by whom has its loans.
    flushing: bool,
    flushing_orphans: Vec<Erased>,
    /// Emptied, for the next generation.
    spare: Batch,
    /// What failed, in the order of places.
    lost: Option<Lost>,
}

/// One generation.
#[derive(Default)]
struct Batch {
    loans: Vec<Lapsed>,
    /// Their address ranges. Those that lapsed one behind the other are one.
    ranges: Vec<IovaRange>,
    /// The memory that their tokens have left here.
    orphans: Vec<Erased>,
}

/// The generation whose revocation failed, and what lapsed meanwhile; there are no more.
struct Lost {
    first: Place,
    cause: RevokeError,
    generations: [Vec<Lapsed>; 2],
}

/// Where a loan has lapsed: the generation, and which of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place(u64);

impl Place {
    /// Bits that say which of a generation.
    const SHIFT: u32 = 8;

    const fn next_generation(self) -> Self {
        Self(((self.0 >> Self::SHIFT) + 1) << Self::SHIFT)
    }

    const fn generation(self) -> u64 {
        self.0 >> Self::SHIFT
    }

    const fn index(self) -> usize {
        (self.0 & ((1 << Self::SHIFT) - 1)) as usize
    }
}

const _: () = assert!(COUNT <= 1 << Place::SHIFT && size_of::<Lapsed>() == 32);

/// The ranges of a generation up to which it counts as being in order: sorting 128 loans costs more than the commands of a few ranges.
const IN_ORDER: usize = 8;

fn with_room<T>() -> Result<Vec<T>, Error> {
    let mut list = Vec::new();
    list.try_reserve_exact(COUNT)?;
    Ok(list)
}

impl Batch {
    fn with_room() -> Result<Self, Error> {
        Ok(Self { loans: with_room()?, ranges: with_room()?, orphans: with_room()? })
    }
}

/// Room for a loan among the lapses of this core, locked.
pub(super) struct Opening<'a> {
    lapses: &'a Lapses,
    state: IrqMutexGuard<'a, State>,
}

impl Opening<'_> {
    /// Takes a loan of `device` in.
    #[inline(always)]
    pub(super) fn push(self, loan: Lapsed, device: &Device) -> Place {
        let Self { lapses, mut state } = self;
        let index = state.batch.loans.len();
        if index == 0 {
            state.device = Some(device.clone());
        }
        let range = loan.range();
        let bytes = state.bytes.wrapping_add(range.len());
        state.bytes = bytes;
        // There is room for COUNT in each: nothing is allocated.
        let Batch { loans, ranges, .. } = &mut state.batch;
        loans.push(loan);
        match ranges.last_mut() {
            Some(last) if last.end() == range.start() => {
                // It does not pass the end: `range` does not.
                *last = IovaRange::new(last.start(), last.len().wrapping_add(range.len())).unwrap_or_default();
            }
            _ => ranges.push(range),
        }
        let place = Place(state.first.0.wrapping_add(index as u64));
        drop(state);
        let due = index + 1 == COUNT || bytes >= BYTES;
        if due || index == 0 {
            lapses.pushed(due);
        }
        place
    }
}

impl Lapses {
    #[cold]
    pub(super) fn new(coherent: bool) -> Result<Arc<Self>, Error> {
        let first = Place(0).next_generation();
        let state = State {
            first,
            room: COUNT,
            bytes: 0,
            batch: Batch::with_room()?,
            device: None,
            flushing: false,
            flushing_orphans: with_room()?,
            spare: Batch { orphans: Vec::new(), ..Batch::with_room()? },
            lost: None,
        };
        let (state, over, revoked) = (IrqMutex::new(state), AtomicU64::new(first.0), AtomicU64::new(first.0));
        let lapses = fallible::arc(Self { state, over, revoked, coherent }).map_err(|_| Error::OutOfMemory)?;
        let mut all = ALL.lock();
        all.retain(|lapses| lapses.strong_count() != 0);
        all.try_reserve(1)?;
        all.push(Arc::downgrade(&lapses));
        Ok(lapses)
    }

    /// Finds room for a loan; `None` where there is none, or after a failure.
    #[inline(always)]
    pub(super) fn open(&self) -> Option<Opening<'_>> {
        let state = self.state.lock();
        (state.batch.loans.len() < state.room).then_some(Opening { lapses: self, state })
    }

    /// What is to be done after the first loan, and after the one with which a flush is due.
    #[cold]
    #[inline(never)]
    fn pushed(&self, due: bool) {
        if due {
            self.flush();
        } else if let Some(alarm) = ALARM.get() {
            alarm(Duration::from_nanos(PERIOD_NOW.load(Ordering::Relaxed)));
        }
    }

    /// The last place in which something may have lapsed.
    pub(super) fn newest(&self) -> Place {
        let state = self.state.lock();
        // There is a generation before the first.
        Place(state.first.0 + state.batch.loans.len() as u64 - 1)
    }

    #[inline(always)]
    pub(super) fn is_over(&self, place: Place) -> bool {
        place.0 < self.over.load(Ordering::Acquire)
    }

    /// Whether the place is over, and its revocation has returned `Ok`.
    #[inline(always)]
    pub(super) fn is_revoked(&self, place: Place) -> bool {
        place.0 < self.revoked.load(Ordering::Acquire)
    }

    /// What lapsed in a place that is over and has not been revoked, and why not.
    #[cold]
    pub(super) fn lost(&self, place: Place) -> Option<(IovaRange, Site, RevokeError)> {
        let state = self.state.lock();
        let Lost { first, cause, generations } = state.lost.as_ref()?;
        let after = place.generation().checked_sub(first.generation())?;
        let loan = generations.get(usize::try_from(after).ok()?)?.get(place.index())?;
        Some((loan.range(), loan.site(), *cause))
    }

    /// Flushes until `place` is over.
    pub(super) fn flush_to(&self, place: Place, deadline: Deadline) -> Result<(), base::TimedOut> {
        while !self.is_over(place) {
            if !self.flush() {
                // Another core is at it.
                wait_until(deadline, || !self.state.lock().flushing)?;
            }
        }
        Ok(())
    }

    /// Flushes what has lapsed. `false` if another flush is under way: then nothing was done.
    #[cold]
    pub(super) fn flush(&self) -> bool {
        let mut state = self.state.lock();
        if state.flushing {
            return false;
        }
        let Some(device) = state.device.take() else { return true };
        state.flushing = true;
        state.first = state.first.next_generation();
        // All places of this generation are below.
        let end = state.first;
        state.bytes = 0;
        let spare = mem::take(&mut state.spare);
        let Batch { mut loans, mut ranges, orphans } = mem::replace(&mut state.batch, spare);
        // Tokens go on leaving memory to it.
        state.batch.orphans = mem::replace(&mut state.flushing_orphans, orphans);
        let before = state.lost.as_ref().map_or(Ok(()), |lost| Err(lost.cause));
        drop(state);

        let sorted = ranges.len() <= IN_ORDER;
        let outcome = before.and_then(|()| device.space().map_or(Ok(()), |space| space.revoke(merge(&mut ranges))));
        ranges.clear();
        match outcome {
            Ok(()) => {
                device.settle(&mut loans, sorted);
                loans.clear();
            }
            Err(cause) => loans = self.lose(&device, loans, end, cause),
        }

        let mut state = self.state.lock();
        // From here on tokens yield their memory, and none leaves it here any more.
        if outcome.is_ok() {
            self.revoked.store(end.0, Ordering::Release);
        }
        self.over.store(end.0, Ordering::Release);
        let mut orphans = mem::take(&mut state.flushing_orphans);
        drop(state);
        for orphan in orphans.drain(..) {
            match outcome {
                // The generation's revocation has returned `Ok`: nobody reaches the memory.
                Ok(()) => drop(orphan),
                Err(_) => mem::forget(orphan),
            }
        }

        let mut state = self.state.lock();
        state.flushing_orphans = orphans;
        state.spare = Batch { loans, ranges, orphans: Vec::new() };
        state.flushing = false;
        drop(state);
        base::notify();
        // Maybe the last handle of the device, which kept the address space of the loans until here.
        drop(device);
        true
    }

    /// Names what could not be revoked, and lets nothing lapse any more. `end` is the place behind the generation. Returns an empty list.
    #[cold]
    fn lose(&self, device: &Device, loans: Vec<Lapsed>, end: Place, cause: RevokeError) -> Vec<Lapsed> {
        for loan in &loans {
            device.lose_lapsed(loan);
            let (range, mapped_at) = (loan.range(), loan.site());
            quarantine::add(&Quarantined { device: device.shared_name().clone(), range, cause, mapped_at });
        }
        let mut state = self.state.lock();
        state.room = 0;
        let first = Place(end.0 - (1 << Place::SHIFT));
        let lost = state.lost.get_or_insert(Lost { first, cause, generations: [Vec::new(), Vec::new()] });
        let after = end.generation() - 1 - lost.first.generation();
        // There is one generation after the one that failed, at most.
        let left = match lost.generations.get_mut(after as usize) {
            Some(place) => mem::replace(place, loans),
            None => loans,
        };
        drop(state);
        device.set_strictness(Strictness::Always);
        left
    }

    /// Leaves memory to the flush. Gives it back if that is over, or does not take memory of this kind.
    pub(super) fn leave<M: Send + 'static>(&self, place: Place, memory: M) -> Result<(), M> {
        let mut state = self.state.lock();
        if self.is_over(place) {
            return Err(memory);
        }
        let State { first, batch, flushing_orphans, .. } = &mut *state;
        let orphans = if place >= *first { &mut batch.orphans } else { flushing_orphans };
        // There is room for one of each loan, so that nothing is allocated.
        if orphans.len() == orphans.capacity() {
            return Err(memory);
        }
        orphans.push(Erased::new(memory)?);
        Ok(())
    }
}
