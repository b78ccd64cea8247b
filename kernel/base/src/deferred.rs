//! Work that handlers leave to somebody who may wait.
//!
//! A handler neither waits nor allocates. What it cannot do it announces with [`Ticket::raise`]; the next core that waits, or is
//! idle already, does it before it sleeps: there, by the rules of [`wait_until`](crate::wait_until), no lock is held.
//!
//! Work is done once for any number of announcements before it begins, and never inside other work. What is announced again
//! while it is being done may be done by another core at the same time. Work that finds it is too early announces itself again.
//! A wait may take longer than its deadline by what the work takes.

use core::sync::atomic::{AtomicU64, Ordering};
use spin::Once;

/// Kinds of work that there can be.
const KINDS: usize = 16;

static WORK: [Once<fn()>; KINDS] = [const { Once::new() }; KINDS];

/// One bit for each kind that is announced and not begun.
static PENDING: AtomicU64 = AtomicU64::new(0);

/// One bit for each core that is doing work.
static WORKING: AtomicU64 = AtomicU64::new(0);

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(usize);

/// Says what is to be done when the ticket is raised. `None` when there are too many kinds already. The same function gets the
/// same ticket.
pub fn register(work: fn()) -> Option<Ticket> {
    (0..).zip(&WORK).find(|(_, slot)| core::ptr::fn_addr_eq(*slot.call_once(|| work), work)).map(|(i, _)| Ticket(i))
}

impl Ticket {
    /// Has the work done, soon. Safe to call from a handler.
    pub fn raise(self) {
        PENDING.fetch_or(1 << self.0, Ordering::SeqCst);
        crate::notify();
    }
}

/// Does what has been announced, as a wait does before it sleeps: for a core that may go on for long without one. The caller holds no
/// lock.
pub fn catch_up() {
    run(1 << crate::cpu::index());
}

/// Whether [`catch_up`] would do something on this core. To be asked with interrupts masked, by who then goes on without a wait until an
/// interrupt comes: what a handler announces later comes with one.
pub fn is_behind() -> bool {
    is_due(1 << crate::cpu::index())
}

/// Whether this core has something to do before it sleeps.
pub(crate) fn is_due(core_bit: u64) -> bool {
    PENDING.load(Ordering::SeqCst) != 0 && WORKING.load(Ordering::Relaxed) & core_bit == 0
}

/// Does what has been announced. The caller holds no lock.
#[inline]
pub(crate) fn run(core_bit: u64) {
    if PENDING.load(Ordering::Relaxed) != 0 {
        run_pending(core_bit);
    }
}

#[cold]
fn run_pending(core_bit: u64) {
    if WORKING.fetch_or(core_bit, Ordering::SeqCst) & core_bit != 0 {
        return;
    }
    let pending = PENDING.swap(0, Ordering::SeqCst);
    for (_, slot) in (0_u32..).zip(&WORK).filter(|(kind, _)| pending >> kind & 1 != 0) {
        if let Some(work) = slot.get() {
            work();
        }
    }
    WORKING.fetch_and(!core_bit, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Deadline, wait_until};
    use core::cell::Cell;
    use core::sync::atomic::{AtomicBool, AtomicU32};

    static DONE: AtomicU32 = AtomicU32::new(0);
    static TOO_EARLY: AtomicBool = AtomicBool::new(true);
    static TICKET: Once<Ticket> = Once::new();

    std::thread_local! {
        static AT_WORK: Cell<bool> = const { Cell::new(false) };
    }

    /// Puts itself off once, and waits, in which it must not be begun anew.
    fn work() {
        assert!(!AT_WORK.replace(true), "work inside work");
        if TOO_EARLY.swap(false, Ordering::SeqCst) {
            TICKET.get().unwrap().raise();
            assert!(wait_until(Deadline::after_millis(1), || false).is_err());
        } else {
            DONE.fetch_add(1, Ordering::SeqCst);
        }
        AT_WORK.set(false);
    }

    /// Red when waiting did no work, and when work was begun inside work.
    #[test]
    fn work_is_done_by_who_waits_once_and_again_if_it_was_too_early() {
        let ticket = *TICKET.call_once(|| register(work).unwrap());
        assert_eq!(register(work), Some(ticket));
        std::thread::scope(|scope| {
            let waits = || wait_until(Deadline::after_millis(10_000), || DONE.load(Ordering::SeqCst) != 0);
            let waiter = scope.spawn(waits);
            std::thread::sleep(core::time::Duration::from_millis(5));
            ticket.raise();
            assert_eq!(waiter.join().unwrap(), Ok(()));
        });
        let _ = wait_until(Deadline::after_millis(20), || false);
        assert_eq!(DONE.load(Ordering::SeqCst), 1);
    }
}
