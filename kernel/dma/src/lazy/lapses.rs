//! What has lapsed of one device on one core, and its flush. Invariants and locking: see the module above.

use super::erased::Erased;
use super::{ALARM, ALL, BYTES, COUNT, PERIOD_NOW, Strictness};
use crate::device::{Lapsed, Loan};
use crate::gather::merge;
use crate::quarantine::{self, Quarantined};
use crate::{Device, Error};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::Duration;
use base::{Deadline, IrqMutex, fallible, wait_until};
use core::mem;
use core::sync::atomic::{AtomicU64, Ordering};
use iommu::{IovaRange, RevokeError};

/// What has lapsed of one device on one core.
pub(crate) struct Lapses {
    core: u16,
    state: IrqMutex<State>,
    /// The newest generation that is over.
    flushed: AtomicU64,
    /// The first generation whose revocation failed.
    failed: AtomicU64,
}

struct State {
    /// The generation that loans lapse in at this moment.
    generation: u64,
    /// The device, while there are loans: it keeps the address space, for all of them.
    device: Option<Device>,
    /// Its loans, and beside each the memory, if its token has left it here.
    loans: Vec<Lapsed>,
    orphans: Vec<Option<Erased>>,
    bytes: u64,
    /// The generation before is being flushed: by whom has its loans.
    flushing: bool,
    flushing_orphans: Vec<Option<Erased>>,
    /// Emptied, for the next generation.
    spare: Vec<Lapsed>,
    /// Why a revocation failed.
    cause: RevokeError,
}

fn with_room<T>() -> Result<Vec<T>, Error> {
    let mut list = Vec::new();
    list.try_reserve_exact(COUNT)?;
    Ok(list)
}

impl Lapses {
    #[cold]
    pub(super) fn new(core: usize) -> Result<Arc<Self>, Error> {
        let state = State {
            generation: 1,
            device: None,
            loans: with_room()?,
            orphans: with_room()?,
            bytes: 0,
            flushing: false,
            flushing_orphans: with_room()?,
            spare: with_room()?,
            cause: RevokeError::Dead,
        };
        let (state, flushed, failed) = (IrqMutex::new(state), AtomicU64::new(0), AtomicU64::new(u64::MAX));
        let core = u16::try_from(core).map_err(|_| Error::OutOfMemory)?;
        let lapses = fallible::arc(Self { core, state, flushed, failed }).map_err(|_| Error::OutOfMemory)?;
        let mut all = ALL.lock();
        all.retain(|lapses| lapses.strong_count() != 0);
        all.try_reserve(1)?;
        all.push(Arc::downgrade(&lapses));
        Ok(lapses)
    }

    /// Takes a loan but for its handle of the device. Gives it back where there is no room, or after a failure.
    #[inline]
    pub(super) fn push(&self, loan: Loan) -> Result<(Place, Device), Loan> {
        let len = loan.range().len();
        let mut state = self.state.lock();
        if state.loans.len() >= COUNT || self.failed.load(Ordering::Relaxed) != u64::MAX {
            return Err(loan);
        }
        let index = state.loans.len();
        let place = Place { generation: state.generation, core: self.core, index: index as u16 };
        let (device, lapsed) = loan.into_lapsed()?;
        if index == 0 {
            state.device = Some(device.clone());
        }
        // There is room for COUNT in each: nothing is allocated.
        state.loans.push(lapsed);
        state.orphans.push(None);
        state.bytes += len;
        let due = index + 1 == COUNT || state.bytes >= BYTES;
        drop(state);
        if due {
            self.flush();
        } else if index == 0
            && let Some(alarm) = ALARM.get()
        {
            alarm(Duration::from_nanos(PERIOD_NOW.load(Ordering::Relaxed)));
        }
        Ok((place, device))
    }

    /// The generation in which something may have lapsed last.
    pub(super) fn newest(&self) -> u64 {
        let state = self.state.lock();
        if state.loans.is_empty() { state.generation - 1 } else { state.generation }
    }

    #[inline]
    pub(super) fn is_over(&self, place: Place) -> bool {
        self.flushed.load(Ordering::Acquire) >= place.generation
    }

    /// How the revocation of a generation that is over went.
    #[inline]
    pub(super) fn outcome(&self, place: Place) -> Result<(), RevokeError> {
        if place.generation < self.failed.load(Ordering::Acquire) { Ok(()) } else { Err(self.state.lock().cause) }
    }

    /// Flushes until `generation` is over.
    pub(super) fn flush_to(&self, generation: u64, deadline: Deadline) -> Result<(), base::TimedOut> {
        while self.flushed.load(Ordering::Acquire) < generation {
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
        let generation = state.generation;
        state.generation += 1;
        state.bytes = 0;
        let spare = mem::take(&mut state.spare);
        let mut loans = mem::replace(&mut state.loans, spare);
        {
            let State { orphans, flushing_orphans, .. } = &mut *state;
            mem::swap(orphans, flushing_orphans);
        }
        let before = if generation < self.failed.load(Ordering::Relaxed) { Ok(()) } else { Err(state.cause) };
        drop(state);

        let outcome = before.and_then(|()| revoke(&device, &loans));
        if let Err(cause) = outcome {
            let mut state = self.state.lock();
            state.cause = cause;
            self.failed.fetch_min(generation, Ordering::AcqRel);
            drop(state);
            device.set_strictness(Strictness::Always);
        }
        for lapsed in loans.drain(..) {
            if let Err(cause) = lapsed.settle(&device, outcome) {
                let (range, mapped_at) = (lapsed.range(), lapsed.site());
                quarantine::add(&Quarantined { device: device.shared_name().clone(), range, cause, mapped_at });
            }
        }

        let mut state = self.state.lock();
        // From here on tokens yield their memory, and none leaves it here any more.
        self.flushed.store(generation, Ordering::Release);
        let mut orphans = mem::take(&mut state.flushing_orphans);
        drop(state);
        for orphan in orphans.drain(..).flatten() {
            match outcome {
                // The generation's revocation has returned `Ok`: nobody reaches the memory.
                Ok(()) => drop(orphan),
                Err(_) => mem::forget(orphan),
            }
        }

        let mut state = self.state.lock();
        state.flushing_orphans = orphans;
        state.spare = loans;
        state.flushing = false;
        drop(state);
        base::notify();
        // Maybe the last handle of the device, which kept the address space of the loans until here.
        drop(device);
        true
    }

    /// Leaves memory to the flush. Gives it back if that is over, or does not take memory of this kind.
    pub(super) fn leave<M: Send + 'static>(&self, place: Place, memory: M) -> Result<(), M> {
        let mut state = self.state.lock();
        if self.is_over(place) {
            return Err(memory);
        }
        let of = if place.generation == state.generation { &mut state.orphans } else { &mut state.flushing_orphans };
        match of.get_mut(place.index as usize) {
            Some(slot) => {
                *slot = Some(Erased::new(memory)?);
                Ok(())
            }
            None => Err(memory),
        }
    }
}

/// Revokes the ranges of all `loans`, which are the device's.
fn revoke(device: &Device, loans: &[Lapsed]) -> Result<(), RevokeError> {
    let Some(space) = device.space() else { return Ok(()) };
    let mut ranges = [IovaRange::default(); COUNT];
    let ranges = ranges.get_mut(..loans.len()).unwrap_or_default();
    for (range, loan) in ranges.iter_mut().zip(loans) {
        *range = loan.range();
    }
    space.revoke(merge(ranges))
}

/// Where a loan has lapsed.
#[derive(Clone, Copy)]
pub(super) struct Place {
    generation: u64,
    core: u16,
    index: u16,
}

impl Place {
    /// On which core.
    #[inline]
    pub(super) fn core(self) -> usize {
        usize::from(self.core)
    }

    #[inline]
    pub(super) fn generation(self) -> u64 {
        self.generation
    }
}

const _: () = assert!(size_of::<Place>() == 16 && COUNT <= u16::MAX as usize);
