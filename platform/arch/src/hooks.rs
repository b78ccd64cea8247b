//! This processor, as `base` sees it.

use crate::{irq, percore, timer, words};
use aarch64_cpu::asm::{barrier, wfi};
use base::words::Chunk;
use core::arch::asm;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// One bit for each core whose timer and kick interrupts end a WFI.
static WFI_ENDS: AtomicU64 = AtomicU64::new(0);

static KICK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Makes `kick` the way to interrupt the cores whose bits are set in its argument: usually an SGI. Safe to call from handlers.
pub fn set_kick(kick: fn(u64)) {
    KICK.store(kick as *mut (), Ordering::Release);
}

/// Says that on the calling core the interrupt controller now forwards the virtual timer's and the kick's interrupts. Until then
/// the core waits by looking again and again, because nothing would end a WFI.
pub fn allow_wfi() {
    WFI_ENDS.fetch_or(1 << percore::index(), Ordering::Release);
}

pub(crate) struct Hooks;

// SAFETY:
// - `irq_save` sets DAIF.I and F in a statement that no memory access moves over; `irq_restore` writes back what it returned.
// - TPIDR_EL1 is set on entry, different on each core, bounded by `percore::index`, and never changed; nothing migrates.
// - The barriers are the instructions that `base::barrier` names, or stronger ones.
// - `words` accesses each word once, as an element of a vector.
unsafe impl base::Hooks for Hooks {
    #[inline(always)]
    fn irq_save() -> usize {
        irq::save()
    }

    #[inline(always)]
    fn irq_restore(state: usize) {
        irq::restore(state);
    }

    #[inline(always)]
    fn cpu_index() -> usize {
        percore::index()
    }

    #[inline]
    fn now() -> u64 {
        timer::now()
    }

    #[inline(always)]
    fn stamp() -> u64 {
        timer::ticks_roughly()
    }

    fn stamped(stamp: u64) -> u64 {
        timer::nanos(stamp)
    }

    fn sleep(deadline: u64) {
        crate::smp::stop_if_told();
        if WFI_ENDS.load(Ordering::Acquire) >> percore::index() & 1 == 0 {
            core::hint::spin_loop();
            return;
        }
        timer::arm(deadline);
        barrier::dsb(barrier::SY);
        wfi();
        timer::rearm();
    }

    fn kick(cores: u64) {
        let kick = KICK.load(Ordering::Acquire);
        if !kick.is_null() {
            // SAFETY: the pointer is not null, so `set_kick` stored a `fn(u64)` there.
            let kick = unsafe { core::mem::transmute::<*mut (), fn(u64)>(kick) };
            kick(cores);
        }
    }

    #[inline(always)]
    fn barrier_publish() {
        // SAFETY: a barrier.
        unsafe { asm!("dsb oshst", options(nostack, preserves_flags)) };
    }

    #[inline(always)]
    fn barrier_device_write() {
        // SAFETY: a barrier.
        unsafe { asm!("dmb osh", options(nostack, preserves_flags)) };
    }

    #[inline(always)]
    fn barrier_device_read() {
        // SAFETY: a barrier.
        unsafe { asm!("dmb oshld", options(nostack, preserves_flags)) };
    }

    #[inline]
    fn words_any(chunks: &[Chunk]) -> u64 {
        words::any(chunks)
    }

    #[inline]
    fn words_all(chunks: &[Chunk]) -> u64 {
        words::all(chunks)
    }

    #[inline]
    fn words_count_up(chunks: &[Chunk], first: u64, step: u64) {
        words::count_up(chunks, first, step);
    }

    #[inline]
    fn words_clear(chunks: &[Chunk]) {
        words::clear(chunks);
    }
}

base::provide_hooks!(Hooks);
