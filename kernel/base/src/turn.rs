//! A mark that one at a time has: for what takes long, or waits, where a lock must not be held.

use crate::{Deadline, TimedOut, notify, wait_until};
use core::sync::atomic::{AtomicBool, Ordering};

/// The turn of whoever has set a mark. It ends when this is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    /// Takes the turn, if nobody has it.
    pub fn try_take(mark: &'a AtomicBool) -> Option<Self> {
        mark.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok().map(|_| Self(mark))
    }

    /// Takes the turn, and sleeps until it can be had.
    ///
    /// # Errors
    ///
    /// [`TimedOut`] where another has it all the time.
    pub fn take(mark: &'a AtomicBool, deadline: Deadline) -> Result<Self, TimedOut> {
        let mut turn = None;
        wait_until(deadline, || {
            turn = Self::try_take(mark);
            turn.is_some()
        })?;
        turn.ok_or(TimedOut)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
        notify();
    }
}

#[cfg(test)]
mod tests {
    //! Seen red: a turn that is given to whoever asks; one that does not end.
    use super::*;
    use core::sync::atomic::AtomicU32;

    #[test]
    fn one_at_a_time_has_it_and_whoever_waits_has_it_next() {
        let (mark, inside, entered) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let turn = Turn::take(&mark, Deadline::after_millis(20_000)).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        assert!(Turn::try_take(&mark).is_none());
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        entered.fetch_add(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
        });
        assert_eq!(entered.load(Ordering::SeqCst), 80);
        let turn = Turn::try_take(&mark).unwrap();
        assert_eq!(Turn::take(&mark, Deadline::after_millis(5)).unwrap_err(), TimedOut);
        drop(turn);
        assert!(Turn::try_take(&mark).is_some());
    }
}
