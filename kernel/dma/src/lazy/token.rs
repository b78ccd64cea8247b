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
use core::mem::{self, ManuallyDrop};
use core::ptr;
use iommu::{IovaRange, RevokeError};

/// A mapping that has lapsed: its device may still reach the memory, which therefore nobody else has. Dropped, it leaves the
/// memory to the next flush, which frees it; forgotten, it leaks.
#[must_use = "dropping it leaves the memory to be freed by a flush"]
pub struct Lapsing<D: Direction, B: Buffer> {
    /// `None` only in between, while it is being consumed.
    state: Option<Progress<B>>,
    direction: PhantomData<D>,
}

enum Progress<B> {
    /// It ended at once.
    Over(Result<B, Quarantined>),
    Waits(Waits<B>),
}

struct Waits<B> {
    /// Whose lapses the place is in.
    device: Device,
    place: Place,
    /// Dropped only when the place is over and its revocation has succeeded.
    memory: ManuallyDrop<B>,
    /// For the report.
    range: IovaRange,
    mapped_at: Site,
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
    #[inline]
    pub(crate) fn new(held: Held<D, B>, least: Strictness, site: Site) -> Self {
        let state = match Self::lapse(held, least) {
            Ok(waits) => Progress::Waits(waits),
            Err(held) => Progress::Over(held.take_back(site)),
        };
        Self { state: Some(state), direction: PhantomData }
    }

    #[inline]
    fn lapse(held: Held<D, B>, least: Strictness) -> Result<Waits<B>, Held<D, B>> {
        let device = &held.loan().device;
        // A copy is read back right after its revocation, by who ends the loan.
        if held.loan().space().is_none() || held.loan().copy().is_some() || (device.strictness() as u8) < least as u8 {
            return Err(held);
        }
        let Ok(lapses) = device.lazy().here().map(ptr::from_ref) else { return Err(held) };
        let (range, mapped_at) = (held.loan().range(), held.loan().site);
        // SAFETY: the memory is kept by hand (`ManuallyDrop`) until the loan's revocation has succeeded, or put together with
        // the loan again.
        let (loan, memory) = unsafe { held.into_parts() };
        // SAFETY: the device has the lapses for good, and the loan, or who takes it in, has the device.
        let lapses = unsafe { &*lapses };
        match lapses.push(loan) {
            Ok((place, device)) => {
                let memory = ManuallyDrop::new(memory);
                Ok(Waits { device, place, memory, range, mapped_at })
            }
            // SAFETY: the two that were taken apart.
            Err(loan) => Err(unsafe { Held::from_parts(loan, memory) }),
        }
    }

    /// Whether a flush has covered it: [`Lapsing::try_take`] then has an answer.
    pub fn is_over(&self) -> bool {
        match &self.state {
            Some(Progress::Waits(waits)) => waits.is_over(),
            _ => true,
        }
    }

    /// The memory, if a flush has covered it.
    ///
    /// # Errors
    ///
    /// [`Pending::Still`] with the token, otherwise; [`Pending::Lost`] if the revocation failed.
    #[inline]
    pub fn try_take(mut self) -> Result<B, Pending<D, B>> {
        if !self.is_over() {
            return Err(Pending::Still(self));
        }
        match self.state.take() {
            Some(Progress::Waits(waits)) => waits.finish::<D>().map_err(Pending::Lost),
            Some(Progress::Over(result)) => result.map_err(Pending::Lost),
            None => unreachable!("a token is emptied by what consumes it"),
        }
    }

    /// The memory, after a flush if none has covered it.
    ///
    /// # Errors
    ///
    /// [`Pending::Lost`] if the revocation failed; [`Pending::Still`] if another core was flushing at `deadline`.
    pub fn take(self, deadline: Deadline) -> Result<B, Pending<D, B>> {
        if let Some(Progress::Waits(waits)) = &self.state {
            // Whether that was in time is seen next.
            if let Some(lapses) = waits.lapses() {
                let _ = lapses.flush_to(waits.place.generation(), deadline);
            }
        }
        self.try_take()
    }
}

impl<B> Waits<B> {
    /// The lapses, which the device has had since before this was made.
    #[inline]
    fn lapses(&self) -> Option<&Lapses> {
        self.device.lazy().of(self.place.core())
    }

    #[inline]
    fn is_over(&self) -> bool {
        self.lapses().is_some_and(|lapses| lapses.is_over(self.place))
    }
}

impl<B: Buffer> Waits<B> {
    /// What becomes of the memory now that it is over.
    fn finish<D: Direction>(self) -> Result<B, Quarantined> {
        let outcome = self.lapses().map_or(Err(RevokeError::Dead), |lapses| lapses.outcome(self.place));
        let Self { memory, device, range, mapped_at, .. } = self;
        let coherent = device.is_coherent();
        match outcome {
            Ok(()) => {
                let memory = ManuallyDrop::into_inner(memory);
                let len = memory.spans_len();
                // The whole of the memory is always in range.
                let _ = if coherent { Ok(()) } else { fetch::<D, B>(&memory, 0, len) };
                if D::DEVICE_WRITES {
                    base::barrier::device_read();
                }
                Ok(memory)
            }
            // The memory is never dropped.
            Err(cause) => Err(Quarantined { device: device.shared_name().clone(), range, cause, mapped_at }),
        }
    }
}

impl<D: Direction, B: Buffer> Drop for Lapsing<D, B> {
    fn drop(&mut self) {
        let Some(Progress::Waits(waits)) = self.state.take() else { return };
        let Waits { device, place, memory, .. } = waits;
        // It has them: they took the loan in. (Otherwise the memory leaks, as what is in `ManuallyDrop` does.)
        let Some(lapses) = device.lazy().of(place.core()) else { return };
        let left = match lapses.is_over(place) {
            true => Err(ManuallyDrop::into_inner(memory)),
            false => lapses.leave(place, ManuallyDrop::into_inner(memory)),
        };
        let Err(memory) = left else { return };
        // Over, or of a kind that cannot be left: then it is kept until it is over.
        let over = lapses.flush_to(place.generation(), Deadline::after(PERIOD));
        if over.is_ok() && lapses.outcome(place).is_ok() {
            drop(memory);
        } else {
            mem::forget(memory);
        }
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Lapsing<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.state {
            Some(Progress::Waits(waits)) => write!(f, "Lapsing({} at {})", waits.device.name(), waits.range),
            _ => f.write_str("Lapsing(ended)"),
        }
    }
}
