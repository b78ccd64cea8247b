//! Cores by logical index.

use crate::hooks::__private as hooks;

/// The most cores that one image serves. A bit mask of cores is a `u64`.
pub const MAX_CPUS: usize = 64;

/// The logical index of the calling core, counted from 0 (the boot core) and below [`MAX_CPUS`].
#[inline]
pub fn index() -> usize {
    hooks::cpu_index()
}

/// Runs `f` with interrupts masked on this core.
#[inline]
pub fn without_interrupts<R>(f: impl FnOnce() -> R) -> R {
    let state = hooks::irq_save();
    let result = f();
    hooks::irq_restore(state);
    result
}
