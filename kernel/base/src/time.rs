//! Moments and time limits, in nanoseconds of the system's monotonic clock.

use crate::hooks::__private as hooks;
pub use core::time::Duration;

/// A moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The present moment.
    #[inline]
    pub fn now() -> Self {
        Self(hooks::now())
    }

    /// The moment `nanoseconds` after the clock's origin.
    pub const fn from_nanos(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds since the clock's origin (before the kernel's first instruction).
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time passed since this moment; zero if it lies ahead.
    pub fn elapsed(self) -> Duration {
        Self::now().since(self)
    }

    /// Time from `earlier` to this moment; zero if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// About the moment at which something happened, in the clock's own unit: for records that are written often and read hardly ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64);

impl Stamp {
    /// About the present moment.
    #[inline(always)]
    pub fn now() -> Self {
        Self(hooks::stamp())
    }

    /// The number that it is.
    #[inline(always)]
    pub const fn as_raw(self) -> u64 {
        self.0
    }

    /// What [`Stamp::as_raw`] said.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The moment.
    pub fn instant(self) -> Instant {
        Instant(hooks::stamped(self.0))
    }
}

/// The moment at which a wait gives up. Every wait has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// `duration` from now (saturating).
    pub fn after(duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(Instant(Instant::now().0.saturating_add(nanos)))
    }

    /// `milliseconds` from now.
    pub fn after_millis(milliseconds: u64) -> Self {
        Self::after(Duration::from_millis(milliseconds))
    }

    /// At `instant`.
    pub const fn at(instant: Instant) -> Self {
        Self(instant)
    }

    /// The moment itself.
    pub const fn instant(self) -> Instant {
        self.0
    }

    /// Whether the moment has passed.
    #[inline]
    pub fn has_passed(self) -> bool {
        Instant::now() >= self.0
    }
}
