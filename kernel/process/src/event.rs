//! Something that happens and can be waited for: a device's interrupts.

use core::sync::atomic::{AtomicU64, Ordering};

/// Counts what has happened and was not yet taken.
#[derive(Debug, Default)]
pub struct Event(AtomicU64);

impl Event {
    /// It has happened. Called from interrupt handlers.
    pub fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        base::notify();
    }

    /// Whether it has.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::SeqCst) != 0
    }

    /// How often it has since this was asked last.
    pub fn take(&self) -> u64 {
        self.0.swap(0, Ordering::SeqCst)
    }
}
