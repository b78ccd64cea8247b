//! A core that goes on without a wait. In a process of its own: elsewhere another test waits, and does the work first.

use base::deferred::{Ticket, catch_up, is_behind, register};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

static TICKET: OnceLock<Ticket> = OnceLock::new();
static BEGUN: AtomicU32 = AtomicU32::new(0);
static AT_WORK: AtomicBool = AtomicBool::new(false);

/// Is too early when it is begun first, and catches up itself, in which it must not be begun anew.
fn work() {
    assert!(!AT_WORK.swap(true, Ordering::SeqCst), "work inside work");
    if BEGUN.fetch_add(1, Ordering::SeqCst) == 0 {
        TICKET.get().unwrap().raise();
        assert!(!is_behind(), "there is nothing that it could do here");
        catch_up();
    }
    AT_WORK.store(false, Ordering::SeqCst);
}

/// Seen red: a core that does nothing when it catches up; one that begins work inside work; one
/// that is never behind; one that is behind what it is in the middle of.
#[test]
fn who_never_waits_does_what_was_announced_when_it_catches_up() {
    let begun = || BEGUN.load(Ordering::SeqCst);
    let ticket = *TICKET.get_or_init(|| register(work).unwrap());
    assert!(!is_behind());
    catch_up();
    assert_eq!(begun(), 0, "nothing was announced");
    // As a handler does, on whatever core.
    ticket.raise();
    std::thread::spawn(move || ticket.raise()).join().unwrap();
    assert!(is_behind());
    assert_eq!(begun(), 0, "announcing is not doing");
    catch_up();
    assert!(is_behind());
    assert_eq!(begun(), 1, "once for both");
    catch_up();
    assert!(!is_behind());
    assert_eq!(begun(), 2, "it was too early");
    catch_up();
    assert_eq!(begun(), 2);
}
