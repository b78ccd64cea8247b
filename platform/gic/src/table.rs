//! Who serves which interrupt: a table that is read without a lock and changed without stopping anybody.
//!
//! # How a handler goes away
//!
//! A core counts on entering and on leaving a handler; the count is odd in between. A handler is first taken out of the table,
//! and dropped once every core that was inside one at that moment has left it: whoever enters later finds the slot empty.
//!
//! # Invariants
//!
//! A non-null slot holds a pointer from `Box::into_raw`, owned by the table.

#![allow(unsafe_code)] // The slots are raw pointers so that a handler's core takes no lock.

use crate::GicError;
use crate::regs::poll;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::cpu::{self, MAX_CPUS};
use base::irq::Handler;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The first LPI.
pub(crate) const FIRST_LPI: u32 = 8192;

/// Interrupts below this are private to a core.
pub(crate) const FIRST_SPI: u32 = 32;

struct Slot(AtomicPtr<Arc<dyn Handler>>);

/// One core's count, on a cache line of its own.
#[repr(align(64))]
struct Count(AtomicU64);

/// The handlers of all interrupts. A private interrupt has one handler for all cores.
pub(crate) struct Table {
    low: Vec<Slot>,
    lpis: Vec<Slot>,
    counts: [Count; MAX_CPUS],
}

fn slots(count: u32) -> Result<Vec<Slot>, GicError> {
    let count = count as usize;
    let mut slots = Vec::new();
    slots.try_reserve_exact(count).map_err(|_| GicError::OutOfMemory)?;
    slots.resize_with(count, || Slot(AtomicPtr::new(ptr::null_mut())));
    Ok(slots)
}

impl Table {
    /// Makes an empty table for the interrupts below `low` and `lpis` LPIs.
    pub fn new(low: u32, lpis: u32) -> Result<Self, GicError> {
        Ok(Self { low: slots(low)?, lpis: slots(lpis)?, counts: [const { Count(AtomicU64::new(0)) }; MAX_CPUS] })
    }

    fn slot(&self, id: u32) -> Option<&Slot> {
        match id.checked_sub(FIRST_LPI) {
            Some(lpi) => self.lpis.get(lpi as usize),
            None => self.low.get(id as usize),
        }
    }

    /// Calls the handler of interrupt `id`; false if it has none. Called with interrupts masked.
    pub fn dispatch(&self, id: u32) -> bool {
        let Some(slot) = self.slot(id) else { return false };
        let Some(Count(count)) = self.counts.get(cpu::index()) else { return false };
        // Sequentially consistent with the exchange and the look at the count in `clear`: either it sees this core inside, or
        // this core sees the slot empty.
        count.fetch_add(1, Ordering::SeqCst);
        let handler = slot.0.load(Ordering::SeqCst);
        let found = !handler.is_null();
        if found {
            // SAFETY:
            // - non-null, so it came from `Box::into_raw` in `set` (invariant), properly aligned and initialised;
            // - not freed while this core's count is odd: `clear` waits for it after it emptied the slot.
            let handler = unsafe { &*handler };
            handler.handle();
        }
        count.fetch_add(1, Ordering::SeqCst);
        found
    }

    /// Gives interrupt `id` a handler.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`], [`GicError::InUse`].
    pub fn set(&self, id: u32, handler: Arc<dyn Handler>) -> Result<(), GicError> {
        let slot = self.slot(id).ok_or(GicError::NoSuchInterrupt(id))?;
        let handler = Box::into_raw(Box::new(handler));
        if slot.0.compare_exchange(ptr::null_mut(), handler, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            // SAFETY: it came from `Box::into_raw` above and was not published.
            drop(unsafe { Box::from_raw(handler) });
            return Err(GicError::InUse(id));
        }
        Ok(())
    }

    /// Takes the handler of interrupt `id` away, if it has one, and drops it once it runs nowhere. Not to be called from a
    /// handler.
    ///
    /// # Errors
    ///
    /// [`GicError::NoSuchInterrupt`]; [`GicError::TimedOut`] if some core did not leave a handler: the handler is not called
    /// for later interrupts, and never dropped.
    pub fn clear(&self, id: u32) -> Result<(), GicError> {
        let slot = self.slot(id).ok_or(GicError::NoSuchInterrupt(id))?;
        let handler = slot.0.swap(ptr::null_mut(), Ordering::SeqCst);
        if handler.is_null() {
            return Ok(());
        }
        for Count(count) in &self.counts {
            let seen = count.load(Ordering::SeqCst);
            if !seen.is_multiple_of(2) {
                poll("a handler did not return", || count.load(Ordering::SeqCst) != seen)?;
            }
        }
        // SAFETY:
        // - it came from `Box::into_raw` (invariant), and the exchange made this call its only owner;
        // - no core is inside a handler that it found through the slot before the exchange (just waited for), and after the
        //   exchange none finds it.
        drop(unsafe { Box::from_raw(handler) });
        Ok(())
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        for slot in self.low.iter().chain(&self.lpis) {
            let handler = slot.0.load(Ordering::SeqCst);
            if !handler.is_null() {
                // SAFETY: it came from `Box::into_raw` (invariant), and `&mut self` means that no core is in `dispatch`.
                drop(unsafe { Box::from_raw(handler) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::{AtomicBool, AtomicUsize};
    use std::thread;

    #[test]
    fn a_handler_is_called_for_its_interrupt_only_and_dropped_when_cleared() {
        let table = Table::new(64, 8).unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        for id in [33, FIRST_LPI + 7] {
            let seen = calls.clone();
            let handler = Arc::new(move || {
                seen.fetch_add(1, Ordering::SeqCst);
            });
            table.set(id, handler.clone()).unwrap();
            assert_eq!(table.set(id, Arc::new(|| {})), Err(GicError::InUse(id)));
            assert!(table.dispatch(id) && !table.dispatch(id - 1));
            assert_eq!(Arc::strong_count(&handler), 2);
            table.clear(id).unwrap();
            assert_eq!(Arc::strong_count(&handler), 1);
            assert!(!table.dispatch(id));
        }
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        for id in [64, 1023, FIRST_LPI + 8, u32::MAX] {
            assert!(!table.dispatch(id));
            assert_eq!(table.set(id, Arc::new(|| {})), Err(GicError::NoSuchInterrupt(id)));
        }
    }

    #[test]
    fn a_handler_that_runs_on_another_core_is_not_dropped_under_it() {
        struct Slow {
            inside: AtomicBool,
            leave: AtomicBool,
        }
        impl Handler for Slow {
            fn handle(&self) {
                self.inside.store(true, Ordering::SeqCst);
                while !self.leave.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
        }
        let table = Table::new(64, 0).unwrap();
        let slow = Arc::new(Slow { inside: AtomicBool::new(false), leave: AtomicBool::new(false) });
        table.set(40, slow.clone()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| table.dispatch(40));
            while !slow.inside.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            let clearing = scope.spawn(|| table.clear(40));
            // `clear` must not come back before the handler has: once the slot is empty it has begun to wait.
            while !table.slot(40).unwrap().0.load(Ordering::SeqCst).is_null() {
                thread::yield_now();
            }
            assert_eq!(Arc::strong_count(&slow), 2);
            slow.leave.store(true, Ordering::SeqCst);
            clearing.join().unwrap().unwrap();
            assert_eq!(Arc::strong_count(&slow), 1);
        });
    }

    #[test]
    fn handlers_come_and_go_while_interrupts_arrive() {
        let table = Table::new(64, 0).unwrap();
        let stop = AtomicBool::new(false);
        let alive = Arc::new(AtomicBool::new(true));
        struct Checked(Arc<AtomicBool>, AtomicBool);
        impl Handler for Checked {
            fn handle(&self) {
                assert!(!self.1.load(Ordering::SeqCst), "called after it was dropped");
                assert!(self.0.load(Ordering::SeqCst));
            }
        }
        impl Drop for Checked {
            fn drop(&mut self) {
                self.1.store(true, Ordering::SeqCst);
            }
        }
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        table.dispatch(50);
                    }
                });
            }
            for _ in 0..2_000 {
                table.set(50, Arc::new(Checked(alive.clone(), AtomicBool::new(false)))).unwrap();
                table.clear(50).unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
