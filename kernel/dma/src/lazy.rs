//! Ending mappings lazily: cheap, and as exact as ending them strictly.
//!
//! [`Mapped::unmap_lazy`](crate::Mapped::unmap_lazy) lets the mapping *lapse* and returns a token, [`Lapsing`]. The device may reach the
//! memory until a *flush* has revoked all that lapsed before it, with one completion; only then does the token yield the memory, and
//! only then is the address range given out again. There is no way to the memory in between: laziness is a type, not a mode in which
//! [`Mapped::unmap`](crate::Mapped::unmap) means less.
//!
//! What lapses is the range that is kept for the device's mappings of that size (`crate::berth`). A mapping that has none ends
//! at once: the first ones of a size, those of more than 2 MiB, at an address that its driver wanted, of a device that does not snoop or
//! that is lent copies, and all where a tracker records them.
//!
//! Each core has lapses of its own of each device, so that cores which end mappings at the same time have nothing to share. Flushes
//! happen by amount (when a core has [`COUNT`] mappings or [`BYTES`] of a device: a device has no more of them anywhere than so many
//! for each core that ends its mappings), by time ([`PERIOD`] after the first, where the kernel has a clock for it: those of all
//! cores), and on request ([`Device::flush`](crate::Device::flush), of all cores; [`Lapsing::take`], of the core on which the mapping
//! lapsed). A token may be taken or dropped on any core. One that is dropped leaves its memory to the flush.
//!
//! The table entries stay until the flush. Clearing them earlier would buy nothing: what the TLB holds it may keep until it is
//! invalidated, so that the memory must be treated as reachable in either case; and [`AddressSpace::revoke`] clears neighbours
//! in one go.
//!
//! [`AddressSpace::revoke`]: iommu::contract::AddressSpace::revoke
//!
//! # What it costs
//!
//! Nothing is allocated when a mapping lapses, and no lock is taken: its berth goes on the core's stack of what has lapsed, and the token
//! is the memory, the berth, and how many mappings have lapsed there before and been revoked; the mapping is over when these are more.
//! The token keeps no device: the berth does until the flush, and stays what it is after that. Ranges of neighbours are one for the
//! flush; it makes all of them ready for the next mappings by one exchange, in such an order that what lapses together next is in
//! order again.
//!
//! # After a failure
//!
//! The memory of the flush that failed goes to quarantine by name, and its berths are never used again. From then on
//! the device is [`Strictness::Always`]: its mappings end each with an outcome of its own.
//!
//! # Locking
//!
//! None to let a mapping lapse, nor to see whether it is over. One `IrqMutex` of each device for what dropped tokens have left
//! (`orphans`), which is not held while revoking or freeing. Flushes wait for the IOMMU and are not for handlers; the clock's handler
//! calls [`alarm_expired`], and a core that may wait does the work ([`base::deferred`]).

mod erased;
mod orphans;
mod token;

pub use token::{Lapsing, Pending};

use crate::berth::array;
use base::deferred::{self, Ticket};
use base::time::Duration;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
pub(crate) use orphans::Orphans;
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
    PERIODS.fetch_add(1, Ordering::Release);
}

/// Periods that there have been: an alarm that was set for another says nothing of the one there is.
static PERIODS: AtomicU32 = AtomicU32::new(1);

/// Which period it is, from 1.
pub(crate) fn period() -> u32 {
    // Acquire: it is the one that this says.
    PERIODS.load(Ordering::Acquire).max(1)
}

/// How mappings of a device end that may end lazily.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    #[inline(always)]
    pub(crate) fn of(byte: u8) -> Self {
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

pub(crate) fn default_strictness() -> Strictness {
    Strictness::of(DEFAULT.load(Ordering::Relaxed))
}

/// What the kernel calls to be called back: see [`set_alarm`].
static ALARM: Once<fn(Duration)> = Once::new();
/// The work of [`alarm_expired`].
static TICKET: Once<Option<Ticket>> = Once::new();

/// Gives the flushes by time their clock: `alarm` is called with the time after which [`alarm_expired`] is to be called. It may be
/// called on any core, also while the alarm is set already; then the earlier of the two holds. Only the first call counts.
pub fn set_alarm(alarm: fn(Duration)) {
    TICKET.call_once(|| deferred::register(flush_all));
    ALARM.call_once(|| alarm);
}

/// Something has lapsed, the first on its core. `false`: there is no clock.
pub(crate) fn set_off() -> bool {
    let Some(alarm) = ALARM.get() else { return false };
    alarm(Duration::from_nanos(PERIOD_NOW.load(Ordering::Relaxed)));
    true
}

/// Has a core that may wait flush what has lapsed, of all devices. Safe to call from a handler.
pub fn alarm_expired() {
    if let Some(Some(ticket)) = TICKET.get() {
        ticket.raise();
    }
}

/// Flushes what has lapsed, of all devices.
pub fn flush_all() {
    array::owners().for_each(|berths| berths.flush_in_time());
}
