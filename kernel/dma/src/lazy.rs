//! Ending mappings lazily: cheap, and as exact as ending them strictly.
//!
//! [`Mapped::unmap_lazy`](crate::Mapped::unmap_lazy) hands the loan to the device's *lapses* and returns a token, [`Lapsing`]. The device may reach the memory
//! until a *flush* has revoked all that lapsed before it, with one completion; only then does the token yield the memory, and only
//! then is the address range given out again. There is no way to the memory in between: laziness is a type, not a mode in which
//! [`Mapped::unmap`](crate::Mapped::unmap) means less.
//!
//! Each core has lapses of its own of each device, so that cores which end mappings at the same time have nothing to share. Flushes
//! happen by amount (when a core has [`COUNT`] mappings or [`BYTES`] of a device: a device has no more of them anywhere than so many
//! for each core that ends its mappings), by time ([`PERIOD`] after the first, where the kernel has a clock for it: those of all
//! cores), and on request ([`Device::flush`], of all cores; [`Lapsing::take`], of the core on which the mapping lapsed). A token
//! may be taken or dropped on any core. One that is dropped leaves its memory to the flush.
//!
//! The table entries stay until the flush. Clearing them earlier would buy nothing: what the TLB holds it may keep until it is
//! invalidated, so that the memory must be treated as reachable in either case; and [`AddressSpace::revoke`] clears neighbours
//! in one go.
//!
//! [`AddressSpace::revoke`]: iommu::contract::AddressSpace::revoke
//!
//! # Invariants
//!
//! Loans that lapse on a core have places, counted upwards; those between two flushes are a generation, which is flushed as one, after
//! the one before. A loan is over when the place is below `over` of its core's lapses; its revocation has returned `Ok` if it is below
//! `revoked` too, otherwise its memory is in quarantine.
//!
//! # What it costs
//!
//! Nothing is allocated when a mapping lapses: a core has room for [`COUNT`] loans of a device twice, from the first on. A loan that has
//! lapsed is four words there, written once; its token is the memory, the place, and a handle of the device. Ranges that lapse one
//! behind the other are one for the flush; it makes all of their ranges ready for the next mappings in one go
//! (`crate::berth`), in such an order that what lapses together next is in order again.
//!
//! # After a failure
//!
//! The memory of the flush that failed, and what lapsed on that core while it was failing, goes to quarantine by name. From then on
//! the device is [`Strictness::Always`]: its mappings end each with an outcome of its own.
//!
//! # Locking
//!
//! One [`IrqMutex`] for each core and device, a leaf, held for one push, by that core and by who flushes; and one for the list of devices
//! with lapses, under which the heap's lock is taken. Neither is held while revoking or freeing. Flushes wait for the IOMMU and are not for handlers; the clock's
//! handler calls [`alarm_expired`], and a core that may wait does the work ([`base::deferred`]).

mod erased;
mod lapses;
mod token;

pub use token::{Lapsing, Pending};

use crate::{Device, Error};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::deferred::{self, Ticket};
use base::time::Duration;
use base::{Deadline, IrqMutex, cpu};
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use lapses::Lapses;
use spin::Once;

/// Mappings of a device that lapse on a core before they are flushed.
pub const COUNT: usize = 128;
/// Bytes of a device that lapse on a core before they are flushed.
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
    /// Of each core, made when it first has some.
    cores: [Once<Arc<Lapses>>; cpu::MAX_CPUS],
}

impl Lazy {
    pub(crate) fn new() -> Self {
        let cores = [const { Once::new() }; cpu::MAX_CPUS];
        Self { strictness: AtomicU8::new(DEFAULT.load(Ordering::Relaxed)), cores }
    }

    /// Flushes what has lapsed, unless somebody else is at it.
    pub(crate) fn flush(&self) {
        self.all().for_each(|lapses| {
            lapses.flush();
        });
    }

    fn all(&self) -> impl Iterator<Item = &Lapses> {
        self.cores.iter().filter_map(Once::get).map(|lapses| &**lapses)
    }

    /// Those of this core, if it has had any.
    #[inline(always)]
    fn here(&self) -> Option<&Lapses> {
        self.cores.get(cpu::index())?.get().map(|lapses| &**lapses)
    }

    /// Makes those of this core.
    #[cold]
    fn first_here(&self, coherent: bool) -> Result<&Lapses, Error> {
        let place = self.cores.get(cpu::index()).ok_or(Error::OutOfMemory)?;
        place.try_call_once(|| Lapses::new(coherent)).map(|lapses| &**lapses)
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

    /// Flushes what has lapsed before the call, on all cores.
    ///
    /// # Errors
    ///
    /// [`base::TimedOut`] if another core was at it, and did not finish before `deadline`. (How the revocation went, the tokens say.)
    pub fn flush(&self, deadline: Deadline) -> Result<(), base::TimedOut> {
        self.lazy().all().try_for_each(|lapses| lapses.flush_to(lapses.newest(), deadline))
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
