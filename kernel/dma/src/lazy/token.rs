//! What a driver has of a mapping that has lapsed.

#![expect(unsafe_code, reason = "keeps memory until a revocation that covered many loans")]

use super::{PERIOD, Strictness};
use crate::berth::{Berth, Berths, array};
use crate::held::Held;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::words::by_words;
use crate::{Buffer, Direction};
use alloc::sync::Arc;
use base::Deadline;
use core::fmt;
use core::marker::PhantomData;
use core::mem::{self, ManuallyDrop};
use core::panic::Location;
use core::ptr;
use iommu::{IovaRange, RevokeError};

/// A mapping that has lapsed: its device may still reach the memory, which therefore nobody else has. Dropped, it leaves the
/// memory to the next flush, which frees it; forgotten, it leaks.
#[must_use = "dropping it leaves the memory to be freed by a flush"]
pub struct Lapsing<D: Direction, B: Buffer> {
    progress: Progress<B>,
    direction: PhantomData<D>,
}

/// Whoever consumes it takes the parts out.
enum Progress<B> {
    Waits(Waits<B>),
    /// It ended at once.
    Over(ManuallyDrop<Result<B, Quarantined>>),
}

/// # Invariants
///
/// The mapping lapsed in `berth`, after `lapses` others that have been revoked. The memory is that of the mapping, and is reached by nobody
/// before its revocation has returned `Ok`.
struct Waits<B> {
    berth: &'static Berth,
    lapses: u64,
    memory: ManuallyDrop<B>,
}

/// Why a [`Lapsing`] did not yield its memory.
pub enum Pending<D: Direction, B: Buffer> {
    /// Not yet: no flush has covered it.
    Still(Lapsing<D, B>),
    /// Never: the revocation failed.
    Lost(Quarantined),
}

impl<D: Direction, B: Buffer> fmt::Debug for Pending<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Still(lapsing) => f.debug_tuple("Still").field(lapsing).finish(),
            Self::Lost(lost) => f.debug_tuple("Lost").field(lost).finish(),
        }
    }
}

impl<D: Direction, B: Buffer> fmt::Display for Pending<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Still(_) => f.write_str("no flush has covered the mapping yet"),
            Self::Lost(lost) => fmt::Display::fmt(lost, f),
        }
    }
}

impl<D: Direction, B: Buffer> core::error::Error for Pending<D, B> {}

impl<D: Direction, B: Buffer> Lapsing<D, B> {
    /// Lets a mapping lapse, or ends it at once where the device does not allow laziness or there is no room.
    #[inline(always)]
    pub(crate) fn new(held: Held<D, B>, least: Strictness, site: Site) -> Self {
        match Self::lapse(held, least) {
            Ok(waits) => Self { progress: Progress::Waits(waits), direction: PhantomData },
            Err(held) => {
                // An object of its own, and a result too, which are not there on the quick way.
                let held = held;
                let ended = Self::at_once(held, site);
                Self { progress: Progress::Over(ManuallyDrop::new(ended)), direction: PhantomData }
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn at_once(held: Held<D, B>, site: Site) -> Result<B, Quarantined> {
        held.take_back(site)
    }

    #[inline(always)]
    fn lapse(held: Held<D, B>, least: Strictness) -> Result<Waits<B>, Held<D, B>> {
        let Some((berth, lapses)) = held.loan().lapse(least) else { return Err(held) };
        // SAFETY: the memory is kept by hand (`ManuallyDrop`) until the loan's revocation has succeeded.
        let (loan, memory) = unsafe { held.into_parts() };
        // The berth has all of it.
        mem::forget(loan);
        // INVARIANT: it has just lapsed there.
        Ok(Waits { berth, lapses, memory: ManuallyDrop::new(memory) })
    }

    /// Whether a flush has covered it: [`Lapsing::try_take`] then has an answer.
    #[inline]
    pub fn is_over(&self) -> bool {
        match &self.progress {
            Progress::Waits(waits) => waits.is_over(),
            Progress::Over(_) => true,
        }
    }

    /// The memory, if a flush has covered it.
    ///
    /// # Errors
    ///
    /// [`Pending::Still`] with the token, otherwise; [`Pending::Lost`] if the revocation failed.
    #[inline(always)]
    pub fn try_take(self) -> Result<B, Pending<D, B>> {
        match self.into_progress() {
            Progress::Waits(waits) if waits.is_revoked() => Ok(waits.yielded::<D>()),
            // A result of its own (see `new`).
            progress => match (Self { progress, direction: PhantomData }).try_take_another() {
                Ok(memory) => Ok(memory),
                Err(pending) => Err(pending),
            },
        }
    }

    /// The memory, after a flush if none has covered it.
    ///
    /// # Errors
    ///
    /// [`Pending::Lost`] if the revocation failed; [`Pending::Still`] if another core was flushing at `deadline`.
    #[inline(always)]
    pub fn take(self, deadline: Deadline) -> Result<B, Pending<D, B>> {
        match self.into_progress() {
            Progress::Waits(waits) if waits.is_revoked() => Ok(waits.yielded::<D>()),
            progress => match (Self { progress, direction: PhantomData }).take_another(deadline) {
                Ok(memory) => Ok(memory),
                Err(pending) => Err(pending),
            },
        }
    }

    /// By value, for whoever looks at it: what is referred to would be in memory.
    #[inline(always)]
    fn into_progress(self) -> Progress<B> {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped and not used afterwards.
        unsafe { ptr::read(&this.progress) }
    }

    #[cold]
    #[inline(never)]
    fn try_take_another(self) -> Result<B, Pending<D, B>> {
        match self.into_progress() {
            Progress::Waits(waits) if waits.is_revoked() => Ok(waits.yielded::<D>()),
            // (It may have been revoked since.)
            Progress::Waits(waits) if !waits.berth.is_lost() => {
                Err(Pending::Still(Self { progress: Progress::Waits(waits), direction: PhantomData }))
            }
            Progress::Waits(waits) => Err(Pending::Lost(waits.lost())),
            Progress::Over(result) => ManuallyDrop::into_inner(result).map_err(Pending::Lost),
        }
    }

    #[cold]
    #[inline(never)]
    fn take_another(self, deadline: Deadline) -> Result<B, Pending<D, B>> {
        if let Progress::Waits(waits) = &self.progress {
            // Whether that was in time is seen next.
            waits.flush(deadline);
        }
        self.try_take_another()
    }
}

impl<B> Waits<B> {
    #[inline(always)]
    fn is_revoked(&self) -> bool {
        self.berth.is_revoked(self.lapses)
    }

    fn is_over(&self) -> bool {
        self.is_revoked() || self.berth.is_lost()
    }

    fn berths(&self) -> Option<Arc<Berths>> {
        array::of(self.berth)?.owner()
    }

    /// Flushes until it is over, or there is no more time.
    #[cold]
    fn flush(&self, deadline: Deadline) {
        // Where there are none any more it is over.
        if let Some(berths) = self.berths() {
            let _ = berths.flush_to(self.berth, self.lapses, deadline);
        }
    }
}

impl<B: Buffer> Waits<B> {
    /// The memory, after [`Waits::is_revoked`] has said so.
    #[inline(always)]
    fn yielded<D: Direction>(self) -> B {
        // The revocation has returned `Ok`: it is its owner's alone. A device that has berths snoops.
        let memory = ManuallyDrop::into_inner(self.memory);
        if D::DEVICE_WRITES {
            base::barrier::device_read();
        }
        by_words(memory)
    }

    /// The report of what is over and was not revoked. The memory is never dropped.
    #[cold]
    fn lost(self) -> Quarantined {
        let lost = self.berths().and_then(|berths| berths.what_is_lost(self.berth));
        // What is lost keeps its device, which says what it was.
        lost.unwrap_or_else(|| Quarantined {
            device: Arc::default(),
            range: IovaRange::default(),
            cause: RevokeError::Dead,
            mapped_at: Location::caller(),
        })
    }
}

impl<D: Direction, B: Buffer> Drop for Lapsing<D, B> {
    fn drop(&mut self) {
        let waits = match &mut self.progress {
            Progress::Waits(waits) => waits,
            // SAFETY: in `drop`, which runs once.
            Progress::Over(result) => return unsafe { ManuallyDrop::drop(result) },
        };
        // SAFETY: as above. It goes to the flush, or is kept below until the revocation has returned `Ok`.
        let memory = unsafe { ManuallyDrop::take(&mut waits.memory) };
        if waits.is_revoked() {
            return drop(memory);
        }
        let left = match array::of(waits.berth) {
            Some(array) => array.orphans.leave(waits.berth, waits.lapses, memory),
            None => Err(memory),
        };
        if let Err(memory) = left {
            let memory = ManuallyDrop::new(memory);
            // Over, or of a kind that cannot be left, or too much: then it is kept until it is over.
            waits.flush(Deadline::after(PERIOD));
            if waits.is_revoked() {
                drop(ManuallyDrop::into_inner(memory));
            }
        }
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Lapsing<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.progress {
            Progress::Waits(waits) => write!(f, "Lapsing({} bytes)", waits.memory.spans_len()),
            Progress::Over(_) => f.write_str("Lapsing(ended)"),
        }
    }
}
