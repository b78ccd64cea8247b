//! What each core has for itself.
//!
//! TPIDR_EL1 holds the core's logical index; everything else is an array over indices. Set by the entry code before the first
//! Rust instruction, and never changed.

use crate::layout;
use base::cpu::MAX_CPUS;
use core::arch::asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

/// The stacks of a core. The layout is known to the assembly: 64 bytes, in this order.
#[repr(C, align(64))]
pub(crate) struct Stacks {
    pub(crate) main: AtomicU64,
    pub(crate) exception: AtomicU64,
    pub(crate) emergency: AtomicU64,
    /// Not 0 while the emergency stack is in use.
    pub(crate) busy: AtomicU64,
    _scratch: [AtomicU64; 4],
}

impl Stacks {
    const fn new() -> Self {
        Self {
            main: AtomicU64::new(0),
            exception: AtomicU64::new(0),
            emergency: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            _scratch: [const { AtomicU64::new(0) }; 4],
        }
    }

    /// Tells the core's entry code and exception vectors where its stacks end.
    pub(crate) fn set(&self, main: u64, exception: u64, emergency: u64) {
        self.main.store(main, Ordering::Release);
        self.exception.store(exception, Ordering::Release);
        self.emergency.store(emergency, Ordering::Release);
    }

    /// The stacks, each as a range of addresses; empty before they are set.
    pub(crate) fn ranges(&self) -> [Range<u64>; 3] {
        let range = |top: &AtomicU64, size: usize| {
            let top = top.load(Ordering::Acquire);
            top.saturating_sub(size as u64)..top
        };
        [
            range(&self.main, layout::MAIN_STACK),
            range(&self.exception, layout::EXCEPTION_STACK),
            range(&self.emergency, layout::EMERGENCY_STACK),
        ]
    }
}

const _: () = assert!(size_of::<Stacks>() == 64);

#[unsafe(no_mangle)]
static STACKS: [Stacks; MAX_CPUS] = [const { Stacks::new() }; MAX_CPUS];

/// The logical index of this core.
#[inline(always)]
pub(crate) fn index() -> usize {
    let index: usize;
    // SAFETY: the register holds what the entry code put there; reading it changes nothing.
    unsafe { asm!("mrs {}, tpidr_el1", out(reg) index, options(nomem, nostack, preserves_flags, pure)) };
    // The entry code starts no core beyond the arrays: this bound costs one instruction and makes every use of it safe.
    index & (MAX_CPUS - 1)
}

/// The stacks of core `index`.
pub(crate) fn stacks(index: usize) -> &'static Stacks {
    &STACKS[index]
}

/// The affinity fields of this core's MPIDR_EL1, in place: what names it to firmware and to the interrupt controller.
pub fn mpidr() -> u64 {
    let mpidr: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, mpidr_el1", out(reg) mpidr, options(nomem, nostack, preserves_flags, pure)) };
    mpidr & 0xff_00ff_ffff
}
