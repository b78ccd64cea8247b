//! Cores by logical index.

use crate::hooks::__private as hooks;
use core::marker::PhantomData;

/// The most cores that one image serves. A bit mask of cores is a `u64`.
pub const MAX_CPUS: usize = 64;

/// The logical index of the calling core, counted from 0 (the boot core) and below [`MAX_CPUS`].
#[inline]
pub fn index() -> usize {
    hooks::cpu_index()
}

/// Interrupts are masked on this core until this is dropped.
#[must_use = "interrupts come again when this is dropped"]
pub struct Masked {
    state: usize,
    /// It belongs to the core that made it.
    _here: PhantomData<*const ()>,
}

/// Masks interrupts on this core: as [`without_interrupts`], for code that is all in one place.
#[inline(always)]
pub fn mask_interrupts() -> Masked {
    Masked { state: hooks::irq_save(), _here: PhantomData }
}

impl Drop for Masked {
    #[inline(always)]
    fn drop(&mut self) {
        hooks::irq_restore(self.state);
    }
}

/// Runs `f` with interrupts masked on this core.
#[inline]
pub fn without_interrupts<R>(f: impl FnOnce() -> R) -> R {
    let state = hooks::irq_save();
    let result = f();
    hooks::irq_restore(state);
    result
}
