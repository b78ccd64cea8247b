//! A host's allocator of which one allocation fails: for tests in which the n-th fails, for every n.
//!
//! A test program makes [`Failing`] its global allocator, arms it ([`arm`]) on the thread that it tests, and asks afterwards whether it
//! came to that ([`disarm`]). Memory that does not come from the heap asks [`fails`] for itself, so that all kinds are counted as
//! one. What plays hardware in a test allocates under [`Spared`].
//!
//! All of it is the calling thread's alone. There is no such module on a target.

use crate::fallible;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::ptr::null_mut;
use std::alloc::System;
use std::thread_local;

thread_local! {
    /// Allocations until one fails; `u64::MAX` for never.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    /// Bytes of the heap that were taken and not given back.
    static BYTES: Cell<i64> = const { Cell::new(0) };
    /// How deep in what is spared.
    static SPARED: Cell<u32> = const { Cell::new(0) };
}

/// Lets `n` allocations succeed, and the one after them fail, once.
pub fn arm(n: u64) {
    LEFT.set(n);
}

/// No more failures. Says whether there has been the one that was asked for.
pub fn disarm() -> bool {
    LEFT.replace(u64::MAX) == u64::MAX
}

/// Runs `f` without failures, and without counting.
pub fn unfailing<T>(f: impl FnOnce() -> T) -> T {
    let left = LEFT.replace(u64::MAX);
    let result = f();
    LEFT.set(left);
    result
}

/// Whether the allocation that is being asked for fails.
pub fn fails() -> bool {
    if SPARED.get() != 0 {
        return false;
    }
    match LEFT.get() {
        u64::MAX => false,
        0 => {
            LEFT.set(u64::MAX);
            true
        }
        left => {
            LEFT.set(left - 1);
            false
        }
    }
}

/// Bytes of the heap that this thread has taken and not given back, but for what was spared.
pub fn heap() -> i64 {
    BYTES.get()
}

fn charge(bytes: usize, sign: i64) {
    if SPARED.get() == 0 {
        // No allocation has more bytes than an `isize`.
        BYTES.set(BYTES.get() + sign * bytes as i64);
    }
}

/// While it lives, no allocation of this thread fails or is charged.
pub struct Spared(());

impl Spared {
    /// Begins.
    pub fn enter() -> Self {
        SPARED.set(SPARED.get() + 1);
        Self(())
    }
}

impl Drop for Spared {
    fn drop(&mut self) {
        SPARED.set(SPARED.get().saturating_sub(1));
    }
}

/// The system's allocator, of which one allocation may fail. Asks for parked blocks as an image's does ([`fallible::take`]).
pub struct Failing;

// SAFETY: everything is the system's allocator's, but for parked blocks, which came from here with their layout.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Where nothing is to fail they are left alone: threads of other tests share processors' numbers.
        if LEFT.get() != u64::MAX {
            let parked = fallible::take(layout);
            if !parked.is_null() {
                return parked;
            }
        }
        if fails() {
            return null_mut();
        }
        charge(layout.size(), 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        charge(layout.size(), -1);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}
