//! Sleeping until something has happened.
//!
//! A core that waits sleeps in WFI. Who changes what others may wait for (usually an interrupt handler) calls [`notify`]
//! afterwards, which interrupts the cores that sleep. No wake-up is lost: a sleeper announces itself *before* it looks at the
//! condition, a notifier looks for sleepers *after* it has changed it, and an interrupt that arrives between the look and the
//! WFI is pending and ends the WFI at once.

use crate::hooks::__private as hooks;
use crate::time::{Deadline, Instant};
use crate::{cpu, deferred};
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

/// One bit for each core that sleeps or is about to.
static SLEEPING: AtomicU64 = AtomicU64::new(0);

/// One bit for each core whose [`block_on`] has been woken and not yet polled.
static READY: AtomicU64 = AtomicU64::new(0);

/// The deadline of a wait passed before its condition held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("timed out")]
pub struct TimedOut;

/// Sleeps until `condition` holds.
///
/// `condition` is called with interrupts masked and must neither block nor allocate. The caller holds no lock. Work that
/// handlers have left ([`deferred`]) is done before sleeping.
///
/// # Errors
///
/// [`TimedOut`] when `deadline` passes first; the condition is looked at once more after that.
pub fn wait_until(deadline: Deadline, mut condition: impl FnMut() -> bool) -> Result<(), TimedOut> {
    let bit = 1_u64 << cpu::index();
    loop {
        deferred::run(bit);
        let state = hooks::irq_save();
        SLEEPING.fetch_or(bit, Ordering::SeqCst);
        let expired = Instant::now() >= deadline.instant();
        let holds = condition();
        if !holds && !expired && !deferred::is_due(bit) {
            hooks::sleep(deadline.instant().as_nanos());
        }
        SLEEPING.fetch_and(!bit, Ordering::SeqCst);
        hooks::irq_restore(state);
        if holds {
            return Ok(());
        }
        if expired {
            return Err(TimedOut);
        }
    }
}

/// Wakes every core that sleeps in [`wait_until`] or [`block_on`], so that it looks at its condition again. Safe to call from
/// an interrupt handler.
pub fn notify() {
    core::sync::atomic::fence(Ordering::SeqCst);
    let sleepers = SLEEPING.load(Ordering::SeqCst) & !(1_u64 << cpu::index());
    if sleepers != 0 {
        hooks::kick(sleepers);
    }
}

/// Runs `future` on this core, sleeping whenever it has nothing to do.
///
/// # Errors
///
/// [`TimedOut`] when `deadline` passes first; the future is then dropped.
pub fn block_on<F: Future>(deadline: Deadline, future: F) -> Result<F::Output, TimedOut> {
    let mut future = pin!(future);
    let core = cpu::index();
    let bit = 1_u64 << core;
    let waker = waker(core);
    let mut context = Context::from_waker(&waker);
    // A future that blocks on another one shares this core's bit with it. Whoever is outside looks once more.
    let _look_again = LookAgain(bit);
    loop {
        READY.fetch_and(!bit, Ordering::SeqCst);
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Ok(output);
        }
        wait_until(deadline, || READY.load(Ordering::SeqCst) & bit != 0)?;
    }
}

/// Leaves the core's bit set.
struct LookAgain(u64);

impl Drop for LookAgain {
    fn drop(&mut self) {
        READY.fetch_or(self.0, Ordering::SeqCst);
    }
}

/// A waker that needs no memory: its data is the index of the core to wake.
fn waker(core: usize) -> Waker {
    fn wake(data: *const ()) {
        READY.fetch_or(1_u64 << data.addr(), Ordering::SeqCst);
        notify();
    }
    static VTABLE: RawWakerVTable = RawWakerVTable::new(|data| RawWaker::new(data, &VTABLE), wake, wake, |_| {});
    let data = core::ptr::without_provenance(core);
    // SAFETY:
    // - the data is an integer below MAX_CPUS and never dereferenced, so cloning and dropping own nothing;
    // - all functions touch only atomics and may be called from any core and from handlers.
    unsafe { Waker::from_raw(RawWaker::new(data, &VTABLE)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicBool;
    use std::sync::Arc;

    #[test]
    fn a_wait_ends_when_its_condition_holds() {
        let flag = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(core::time::Duration::from_millis(5));
                flag.store(true, Ordering::SeqCst);
                notify();
            });
            assert_eq!(wait_until(Deadline::after_millis(5_000), || flag.load(Ordering::SeqCst)), Ok(()));
        });
    }

    #[test]
    fn a_wait_whose_condition_never_holds_times_out() {
        assert_eq!(wait_until(Deadline::after_millis(5), || false), Err(TimedOut));
    }

    #[test]
    fn a_condition_that_holds_after_the_deadline_still_counts() {
        assert_eq!(wait_until(Deadline::at(Instant::from_nanos(0)), || true), Ok(()));
    }

    #[test]
    fn a_blocked_future_is_polled_again_after_its_waker_fired_on_another_thread() {
        let shared = Arc::new((AtomicBool::new(false), std::sync::Mutex::new(None::<Waker>)));
        let other = shared.clone();
        let thread = std::thread::spawn(move || {
            loop {
                if let Some(waker) = other.1.lock().unwrap().take() {
                    other.0.store(true, Ordering::SeqCst);
                    waker.wake();
                    return;
                }
                std::thread::yield_now();
            }
        });
        let future = core::future::poll_fn(|context| {
            if shared.0.load(Ordering::SeqCst) {
                return Poll::Ready(7);
            }
            *shared.1.lock().unwrap() = Some(context.waker().clone());
            Poll::Pending
        });
        assert_eq!(block_on(Deadline::after_millis(5_000), future), Ok(7));
        thread.join().unwrap();
    }

    #[test]
    fn threads_that_live_at_the_same_time_do_not_share_an_index_however_many_have_come_and_gone() {
        for _ in 0..cpu::MAX_CPUS {
            std::thread::spawn(cpu::index).join().unwrap();
        }
        let barrier = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            let threads = [(); 8].map(|()| {
                scope.spawn(|| {
                    let index = cpu::index();
                    barrier.wait();
                    index
                })
            });
            let mut indices = threads.map(|thread| thread.join().unwrap());
            indices.sort_unstable();
            assert!(indices.windows(2).all(|pair| pair[0] != pair[1]), "{indices:?}");
        });
    }

    /// The inner `block_on` swallows the wake-up of the outer one; without the second look the outer would time out.
    #[test]
    fn a_future_that_blocks_on_another_does_not_lose_its_own_wake_up() {
        let mut polls = 0;
        let future = core::future::poll_fn(|context| {
            polls += 1;
            if polls == 2 {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            block_on(Deadline::after_millis(5_000), core::future::ready(())).unwrap();
            Poll::Pending
        });
        assert_eq!(block_on(Deadline::after_millis(2_000), future), Ok(()));
    }
}
