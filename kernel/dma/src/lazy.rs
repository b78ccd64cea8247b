//! Ending mappings lazily: cheap, and as exact as ending them strictly.
//!
//! [`Mapped::unmap_lazy`](crate::Mapped::unmap_lazy) hands the loan to the device's *lapses* and returns a token, [`Lapsing`]. The device may reach the memory
//! until a *flush* has revoked all that lapsed before it, with one completion; only then does the token yield the memory, and only
//! then is the address range given out again. There is no way to the memory in between: laziness is a type, not a mode in which
//! [`Mapped::unmap`](crate::Mapped::unmap) means less.
//!
//! Flushes happen by amount ([`COUNT`] mappings or [`BYTES`]), by time ([`PERIOD`] after the first, where the kernel has a clock for it), and on request
//! ([`Device::flush`], [`Lapsing::take`]). A token that is dropped leaves its memory to the flush.
//!
//! The table entries stay until the flush. Clearing them earlier would buy nothing: what the TLB holds it may keep until it is
//! invalidated, so that the memory must be treated as reachable in either case; and [`AddressSpace::revoke`] clears neighbours
//! in one go.
//!
//! [`AddressSpace::revoke`]: iommu::contract::AddressSpace::revoke
//!
//! # Invariants
//!
//! A loan that lapsed in generation `g` is over when `Lapses::flushed` has reached `g`: its revocation has returned `Ok` if
//! `g` is below `Lapses::failed`, otherwise its memory is in quarantine. Generations are flushed one after another.
//!
//! # After a failure
//!
//! The memory of the flush that failed, and what lapsed while it was failing, goes to quarantine by name. From then on the
//! device's mappings end strictly, each with an outcome of its own.
//!
//! # Locking
//!
//! One [`IrqMutex`] for each device, a leaf, held for one push; and one for the list of devices with lapses, under which the heap's
//! lock is taken. Neither is held while revoking or freeing. Flushes wait for the IOMMU and are not for handlers; the clock's
//! handler calls [`alarm_expired`], and a core that may wait does the work ([`base::deferred`]).

#![expect(unsafe_code, reason = "keeps memory until a revocation that covered many loans")]

use crate::device::Loan;
use crate::gather::merge;
use crate::held::{Held, fetch};
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::{Buffer, Device, Direction, Error};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::deferred::{self, Ticket};
use base::time::Duration;
use base::{Deadline, IrqMutex, fallible, wait_until};
use core::fmt;
use core::marker::PhantomData;
use core::mem::{self, ManuallyDrop, MaybeUninit};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use iommu::{IovaRange, RevokeError};
use spin::Once;

/// Mappings of a device that lapse before they are flushed.
pub const COUNT: usize = 128;
/// Bytes of a device that lapse before they are flushed.
pub const BYTES: u64 = 16 << 20;
/// The time that a mapping may have lapsed before it is flushed, unless [`set_period`] says otherwise.
pub const PERIOD: Duration = Duration::from_millis(10);

/// The period in nanoseconds.
static PERIOD_NOW: AtomicU64 = AtomicU64::new(PERIOD.as_nanos() as u64);

/// Sets the time that a mapping may have lapsed before it is flushed, for those that lapse from here on, where the kernel has a clock
/// for it ([`set_alarm`]).
pub fn set_period(period: Duration) {
    PERIOD_NOW.store(u64::try_from(period.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// How mappings of a device end that may end lazily.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Strictness {
    /// All at once, those of [`Mapped::unmap_lazy`](crate::Mapped::unmap_lazy) too.
    Always = 0,
    /// Lazily those whose driver says so.
    UnlessAsked = 1,
    /// Lazily also those of [`Mapped::unmap_relaxed`](crate::Mapped::unmap_relaxed): whatever a driver does not need back at once.
    Relaxed = 2,
}

impl Strictness {
    fn of(byte: u8) -> Self {
        match byte {
            0 => Self::Always,
            1 => Self::UnlessAsked,
            _ => Self::Relaxed,
        }
    }
}

/// The strictness of devices that are yet to be made.
static DEFAULT: AtomicU8 = AtomicU8::new(Strictness::UnlessAsked as u8);

/// Sets the strictness of all devices that are made from here on.
pub fn set_default_strictness(strictness: Strictness) {
    DEFAULT.store(strictness as u8, Ordering::Relaxed);
}

/// What a device keeps for its lapses.
pub(crate) struct Lazy {
    strictness: AtomicU8,
    lapses: Once<Arc<Lapses>>,
}

impl Lazy {
    pub(crate) fn new() -> Self {
        Self { strictness: AtomicU8::new(DEFAULT.load(Ordering::Relaxed)), lapses: Once::new() }
    }

    /// Flushes what has lapsed, unless somebody else is at it.
    pub(crate) fn flush(&self) {
        if let Some(lapses) = self.lapses.get() {
            lapses.flush();
        }
    }

    /// The lapses, made on first use.
    #[inline]
    fn lapses(&self, device: &Device) -> Result<&Arc<Lapses>, Error> {
        match self.lapses.get() {
            Some(lapses) => Ok(lapses),
            None => self.lapses.try_call_once(|| Lapses::new(device.shared_name().clone())),
        }
    }
}

impl Device {
    /// How its mappings end that may end lazily.
    pub fn strictness(&self) -> Strictness {
        Strictness::of(self.lazy().strictness.load(Ordering::Relaxed))
    }

    /// Sets how its mappings end that may end lazily. What has lapsed already is flushed in its time.
    pub fn set_strictness(&self, strictness: Strictness) {
        self.lazy().strictness.store(strictness as u8, Ordering::Relaxed);
    }

    /// Flushes what has lapsed before the call.
    ///
    /// # Errors
    ///
    /// [`base::TimedOut`] if another core was at it, and did not finish before `deadline`. (How the revocation went, the tokens say.)
    pub fn flush(&self, deadline: Deadline) -> Result<(), base::TimedOut> {
        self.lazy().lapses.get().map_or(Ok(()), |lapses| lapses.flush_to(lapses.newest(), deadline))
    }
}

/// What the kernel calls to be called back: see [`set_alarm`].
static ALARM: Once<fn(Duration)> = Once::new();
/// The work of [`alarm_expired`].
static TICKET: Once<Option<Ticket>> = Once::new();
/// All lapses, for the clock.
static ALL: IrqMutex<Vec<Weak<Lapses>>> = IrqMutex::new(Vec::new());

/// Gives the flushes by time their clock: `alarm` is called with the time after which [`alarm_expired`] is to be called. It may be
/// called on any core, also while the alarm is set already; then the earlier of the two holds. Only the first call counts.
pub fn set_alarm(alarm: fn(Duration)) {
    TICKET.call_once(|| deferred::register(flush_all));
    ALARM.call_once(|| alarm);
}

/// Has a core that may wait flush what has lapsed, of all devices. Safe to call from a handler.
pub fn alarm_expired() {
    if let Some(Some(ticket)) = TICKET.get() {
        ticket.raise();
    }
}

/// Flushes what has lapsed, of all devices.
pub fn flush_all() {
    for index in 0.. {
        // One at a time: flushing waits, and the list is locked only to find the next.
        let Some(next) = ALL.lock().get(index).map(Weak::upgrade) else { break };
        if let Some(lapses) = next {
            lapses.flush();
        }
    }
}

/// The lapses of one device.
pub(crate) struct Lapses {
    /// The device's name, for reports.
    name: Arc<str>,
    state: IrqMutex<State>,
    /// The newest generation that is over.
    flushed: AtomicU64,
    /// The first generation whose revocation failed.
    failed: AtomicU64,
}

struct State {
    /// The generation that loans lapse in at this moment.
    generation: u64,
    /// Its loans, and beside each the memory, if its token has left it here.
    loans: Vec<Loan>,
    orphans: Vec<Option<Erased>>,
    bytes: u64,
    /// The generation before is being flushed: by whom has its loans.
    flushing: bool,
    flushing_orphans: Vec<Option<Erased>>,
    /// Emptied, for the next generation.
    spare: Vec<Loan>,
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
    fn new(name: Arc<str>) -> Result<Arc<Self>, Error> {
        let state = State {
            generation: 1,
            loans: with_room()?,
            orphans: with_room()?,
            bytes: 0,
            flushing: false,
            flushing_orphans: with_room()?,
            spare: with_room()?,
            cause: RevokeError::Dead,
        };
        let (state, flushed, failed) = (IrqMutex::new(state), AtomicU64::new(0), AtomicU64::new(u64::MAX));
        let lapses = fallible::arc(Self { name, state, flushed, failed }).map_err(|_| Error::OutOfMemory)?;
        let mut all = ALL.lock();
        all.retain(|lapses| lapses.strong_count() != 0);
        all.try_reserve(1)?;
        all.push(Arc::downgrade(&lapses));
        Ok(lapses)
    }

    /// Takes a loan. Gives it back where there is no room, or after a failure.
    #[inline]
    fn push(&self, loan: Loan) -> Result<Place, Loan> {
        let len = loan.range().len();
        let mut state = self.state.lock();
        if state.loans.len() >= COUNT || self.failed.load(Ordering::Relaxed) != u64::MAX {
            return Err(loan);
        }
        let index = state.loans.len();
        let place = Place { generation: state.generation, index: index as u32 };
        // There is room for COUNT in each: nothing is allocated.
        state.loans.push(loan);
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
        Ok(place)
    }

    /// The generation in which something may have lapsed last.
    fn newest(&self) -> u64 {
        let state = self.state.lock();
        if state.loans.is_empty() { state.generation - 1 } else { state.generation }
    }

    #[inline]
    fn is_over(&self, place: Place) -> bool {
        self.flushed.load(Ordering::Acquire) >= place.generation
    }

    /// How the revocation of a generation that is over went.
    #[inline]
    fn outcome(&self, place: Place) -> Result<(), RevokeError> {
        if place.generation < self.failed.load(Ordering::Acquire) { Ok(()) } else { Err(self.state.lock().cause) }
    }

    /// Flushes until `generation` is over.
    fn flush_to(&self, generation: u64, deadline: Deadline) -> Result<(), base::TimedOut> {
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
    fn flush(&self) -> bool {
        let mut state = self.state.lock();
        if state.flushing {
            return false;
        }
        let Some(device) = state.loans.first().map(|loan| loan.device.clone()) else { return true };
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

        let outcome = before.and_then(|()| revoke(&loans));
        if let Err(cause) = outcome {
            let mut state = self.state.lock();
            state.cause = cause;
            self.failed.fetch_min(generation, Ordering::AcqRel);
        }
        for mut loan in loans.drain(..) {
            let site = loan.site;
            if let Err(cause) = loan.settle(outcome, site) {
                let device = loan.device.shared_name().clone();
                quarantine::add(&Quarantined { device, range: loan.range(), cause, mapped_at: loan.site });
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
        // Maybe the last handle of the device, whose address space the loans kept until here.
        drop(device);
        true
    }

    /// Leaves memory to the flush. Gives it back if that is over, or does not take memory of this kind.
    fn leave<M: Send + 'static>(&self, place: Place, memory: M) -> Result<(), M> {
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

/// Revokes the ranges of all `loans`, which are of one address space.
fn revoke(loans: &[Loan]) -> Result<(), RevokeError> {
    let Some(space) = loans.first().and_then(Loan::space) else { return Ok(()) };
    let mut ranges = [IovaRange::default(); COUNT];
    let ranges = ranges.get_mut(..loans.len()).unwrap_or_default();
    for (range, loan) in ranges.iter_mut().zip(loans) {
        *range = loan.range();
    }
    space.revoke(merge(ranges))
}

/// Where a loan has lapsed.
#[derive(Clone, Copy)]
struct Place {
    generation: u64,
    index: u32,
}

/// Bytes of the largest object that is left to a flush.
const ROOM: usize = 96;

/// An object of whatever type, in place. Dropping it drops the object.
///
/// # Invariants
///
/// `storage` holds an object that `drop` drops, and nothing else does.
struct Erased {
    storage: MaybeUninit<[u64; ROOM / 8]>,
    drop: unsafe fn(*mut ()),
}

// SAFETY: the object is `Send` (bound of `Erased::new`), and is reached by `&mut` only.
unsafe impl Send for Erased {}

impl Erased {
    /// Wraps `object`, or gives it back where it is too large.
    #[inline]
    fn new<M: Send + 'static>(object: M) -> Result<Self, M> {
        unsafe fn drop_as<M>(object: *mut ()) {
            // SAFETY: the invariant of Erased: it is an `M`, dropped once.
            unsafe { object.cast::<M>().drop_in_place() }
        }
        if size_of::<M>() > ROOM || align_of::<M>() > align_of::<u64>() {
            return Err(object);
        }
        let mut storage = MaybeUninit::<[u64; ROOM / 8]>::uninit();
        // SAFETY: size and alignment fit, as was just checked.
        unsafe { storage.as_mut_ptr().cast::<M>().write(object) };
        // INVARIANT: the object was moved here.
        Ok(Self { storage, drop: drop_as::<M> })
    }
}

impl Drop for Erased {
    fn drop(&mut self) {
        // SAFETY: the invariant; and in `drop`, which runs once.
        unsafe { (self.drop)(self.storage.as_mut_ptr().cast()) }
    }
}

const _: () = assert!(size_of::<crate::Pages>() <= ROOM && size_of::<crate::PageSet>() <= ROOM);

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
    lapses: Arc<Lapses>,
    place: Place,
    /// Dropped only when the place is over and its revocation has succeeded.
    memory: ManuallyDrop<B>,
    coherent: bool,
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
        let Ok(lapses) = device.lazy().lapses(device).cloned() else { return Err(held) };
        let coherent = device.is_coherent();
        let (range, mapped_at) = (held.loan().range(), held.loan().site);
        // SAFETY: the memory is kept by hand (`ManuallyDrop`) until the loan's revocation has succeeded, or put together with
        // the loan again.
        let (loan, memory) = unsafe { held.into_parts() };
        match lapses.push(loan) {
            Ok(place) => {
                let memory = ManuallyDrop::new(memory);
                Ok(Waits { lapses, place, memory, coherent, range, mapped_at })
            }
            // SAFETY: the two that were taken apart.
            Err(loan) => Err(unsafe { Held::from_parts(loan, memory) }),
        }
    }

    /// Whether a flush has covered it: [`Lapsing::try_take`] then has an answer.
    pub fn is_over(&self) -> bool {
        match &self.state {
            Some(Progress::Waits(waits)) => waits.lapses.is_over(waits.place),
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
            let _ = waits.lapses.flush_to(waits.place.generation, deadline);
        }
        self.try_take()
    }
}

impl<B: Buffer> Waits<B> {
    /// What becomes of the memory now that it is over.
    fn finish<D: Direction>(self) -> Result<B, Quarantined> {
        let Self { lapses, place, memory, coherent, range, mapped_at } = self;
        match lapses.outcome(place) {
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
            Err(cause) => Err(Quarantined { device: lapses.name.clone(), range, cause, mapped_at }),
        }
    }
}

impl<D: Direction, B: Buffer> Drop for Lapsing<D, B> {
    fn drop(&mut self) {
        let Some(Progress::Waits(waits)) = self.state.take() else { return };
        let Waits { lapses, place, memory, .. } = waits;
        let left = match lapses.is_over(place) {
            true => Err(ManuallyDrop::into_inner(memory)),
            false => lapses.leave(place, ManuallyDrop::into_inner(memory)),
        };
        let Err(memory) = left else { return };
        // Over, or of a kind that cannot be left: then it is kept until it is over.
        let over = lapses.flush_to(place.generation, Deadline::after(PERIOD));
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
            Some(Progress::Waits(waits)) => write!(f, "Lapsing({} at {})", waits.lapses.name, waits.range),
            _ => f.write_str("Lapsing(ended)"),
        }
    }
}
