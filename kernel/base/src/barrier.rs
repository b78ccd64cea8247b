//! Barriers, by what they are for.
//!
//! Each is also a compiler barrier for all memory.

use crate::hooks::__private as hooks;

/// Makes every earlier store visible to table walkers and bus masters before any later access of this core, register writes
/// included (`DSB OSHST`). Use it between filling a translation table or a command and telling the hardware.
#[inline(always)]
pub fn publish() {
    hooks::barrier_publish();
}

/// Orders earlier loads and stores of memory before later stores, as seen by a device that shares the memory
/// (`DMB OSH`): a descriptor before the index that publishes it.
#[inline(always)]
pub fn device_write() {
    hooks::barrier_device_write();
}

/// Orders earlier loads before later loads and stores of memory that a device shares (`DMB OSHLD`): an index before the
/// entries that it publishes.
#[inline(always)]
pub fn device_read() {
    hooks::barrier_device_read();
}
