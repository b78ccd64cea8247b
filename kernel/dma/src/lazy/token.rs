//! What a driver has of a mapping that has lapsed.

#![expect(unsafe_code, reason = "keeps memory until a revocation that covered many loans")]

use super::lapses::{Lapses, Place};
use super::{PERIOD, Strictness};
use crate::held::{Held, fetch};
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Buffer, Device, Direction};
use base::Deadline;
use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::panic::Location;
use core::ptr::{self, NonNull};
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
/// `lapses` are the device's, of the core on which the mapping lapsed, and `place` is in them. They live as long as the device, of which this
/// is a handle. The memory is that of the loan there, and is reached by nobody before its revocation has returned `Ok`.
struct Waits<B> {
    device: ManuallyDrop<Device>,
    lapses: NonNull<Lapses>,
    place: Place,
    memory: ManuallyDrop<B>,
}

// SAFETY: all that it is made of may be sent; the lapses are the device's, which may be used on any core.
unsafe impl<B: Send> Send for Waits<B> {}
// SAFETY: as above; the memory is not reached by shared reference.
unsafe impl<B: Sync> Sync for Waits<B> {}

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
        let device = &held.loan().device;
        if !held.loan().can_lapse() || (device.strictness() as u8) < least as u8 {
            return Err(held);
        }
        let lapses = match device.lazy().here() {
            Some(lapses) => NonNull::from(lapses),
            None => match device.lazy().first_here(device.is_coherent()) {
                Ok(lapses) => NonNull::from(lapses),
                Err(_) => return Err(held),
            },
        };
        // SAFETY: the device has the lapses for good, and the loan, or who takes it in, has the device.
        let lapses_here = unsafe { lapses.as_ref() };
        let Some(opening) = lapses_here.open() else { return Err(held) };
        // SAFETY: the memory is kept by hand (`ManuallyDrop`) until the loan's revocation has succeeded.
        let (loan, memory) = unsafe { held.into_parts() };
        let (device, lapsed) = loan.into_lapsed();
        let place = opening.push(lapsed, &device);
        // INVARIANT: the place that was just taken, in the lapses of that device.
        Ok(Waits { device: ManuallyDrop::new(device), lapses, place, memory: ManuallyDrop::new(memory) })
    }

    /// Whether a flush has covered it: [`Lapsing::try_take`] then has an answer.
    #[inline]
    pub fn is_over(&self) -> bool {
        match &self.progress {
            Progress::Waits(waits) => waits.lapses().is_over(waits.place),
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
            Progress::Waits(waits) if !waits.lapses().is_over(waits.place) => {
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
            let _ = waits.lapses().flush_to(waits.place, deadline);
        }
        self.try_take_another()
    }
}

impl<B> Waits<B> {
    #[inline(always)]
    fn lapses(&self) -> &Lapses {
        // SAFETY: the device has them for good, and this has the device (invariant).
        unsafe { self.lapses.as_ref() }
    }

    #[inline(always)]
    fn is_revoked(&self) -> bool {
        self.lapses().is_revoked(self.place)
    }
}

impl<B: Buffer> Waits<B> {
    /// The memory, after [`Waits::is_revoked`] has said so.
    #[inline(always)]
    fn yielded<D: Direction>(self) -> B {
        let coherent = self.lapses().coherent;
        let Self { device, memory, .. } = self;
        // The revocation has returned `Ok`: it is its owner's alone.
        let memory = ManuallyDrop::into_inner(memory);
        if !coherent {
            // The whole of the memory is always in range.
            let _ = fetch::<D, B>(&memory, 0, memory.spans_len());
        }
        if D::DEVICE_WRITES {
            base::barrier::device_read();
        }
        drop(ManuallyDrop::into_inner(device));
        memory
    }

    /// The report of what is over and was not revoked. The memory is never dropped.
    #[cold]
    fn lost(self) -> Quarantined {
        // It is on the list of what was lost.
        let none = (IovaRange::default(), Location::caller(), RevokeError::Dead);
        let (range, mapped_at, cause) = self.lapses().lost(self.place).unwrap_or(none);
        let device = ManuallyDrop::into_inner(self.device);
        Quarantined { device: device.shared_name().clone(), range, cause, mapped_at }
    }
}

impl<D: Direction, B: Buffer> Drop for Lapsing<D, B> {
    fn drop(&mut self) {
        let waits = match &mut self.progress {
            Progress::Waits(waits) => waits,
            // SAFETY: in `drop`, which runs once.
            Progress::Over(result) => return unsafe { ManuallyDrop::drop(result) },
        };
        // SAFETY: as above.
        let device = unsafe { ManuallyDrop::take(&mut waits.device) };
        // SAFETY: as above. It goes to the flush, or is kept below until the revocation has returned `Ok`.
        let memory = unsafe { ptr::read(&waits.memory) };
        let (lapses, place) = (waits.lapses(), waits.place);
        let left = match lapses.is_over(place) {
            true => Err(ManuallyDrop::into_inner(memory)),
            false => lapses.leave(place, ManuallyDrop::into_inner(memory)),
        };
        if let Err(memory) = left {
            let memory = ManuallyDrop::new(memory);
            // Over, or of a kind that cannot be left: then it is kept until it is over.
            let _ = lapses.flush_to(place, Deadline::after(PERIOD));
            if lapses.is_revoked(place) {
                drop(ManuallyDrop::into_inner(memory));
            }
        }
        drop(device);
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Lapsing<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.progress {
            Progress::Waits(waits) => write!(f, "Lapsing({}, {} bytes)", waits.device.name(), waits.memory.spans_len()),
            Progress::Over(_) => f.write_str("Lapsing(ended)"),
        }
    }
}
