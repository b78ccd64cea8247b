//! This core's interrupt mask.

use core::arch::asm;

pub use crate::exception::set_irq_entry;

/// Masks interrupts and returns what the mask was.
#[inline(always)]
pub(crate) fn save() -> usize {
    let state: usize;
    // SAFETY: masking is always sound. Not `nomem`: no access may move to before it.
    unsafe { asm!("mrs {}, daif", "msr daifset, #3", out(reg) state, options(nostack, preserves_flags)) };
    state
}

/// Brings back a mask that [`save`] returned.
#[inline(always)]
pub(crate) fn restore(state: usize) {
    // SAFETY: only values of DAIF come here. Not `nomem`: no access may move to after it.
    unsafe { asm!("msr daif, {}", in(reg) state, options(nostack, preserves_flags)) };
}

/// Lets this core take interrupts. Called once on each core, when its interrupt controller is ready and an entry is set.
pub fn enable() {
    // SAFETY: the vectors are in place from before the first Rust instruction.
    unsafe { asm!("msr daifclr, #3", options(nostack, preserves_flags)) };
}

/// Lets this core take SErrors.
pub(crate) fn enable_serror() {
    // SAFETY: as for `enable`.
    unsafe { asm!("msr daifclr, #4", options(nostack, preserves_flags)) };
}

/// Whether this core takes interrupts now.
pub fn enabled() -> bool {
    let state: usize;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, daif", out(reg) state, options(nomem, nostack, preserves_flags)) };
    state & 0x80 == 0
}

/// Masks everything on this core, for good.
pub(crate) fn mask_all() {
    // SAFETY: masking is always sound.
    unsafe { asm!("msr daifset, #0xf", options(nostack, preserves_flags)) };
}
