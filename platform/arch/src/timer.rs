//! The generic timer (DDI 0487, D12): CNTVCT_EL0 is the clock, the EL1 virtual timer a core's one alarm.
//!
//! Its interrupt only ends a WFI: nothing is done in the handler but to switch the timer off.

use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVCT_EL0};
use core::sync::atomic::{AtomicU64, Ordering};
use tock_registers::interfaces::{Readable, Writeable};

/// Nanoseconds per tick as a fraction of 2^32; 0 until first needed.
static SCALE: AtomicU64 = AtomicU64::new(0);

const NANOS: u64 = 1_000_000_000;

/// The counter's frequency in Hz.
pub fn frequency() -> u64 {
    // Firmware sets CNTFRQ; zero would be its fault, and must not become a division by zero here.
    CNTFRQ_EL0.get().max(1)
}

/// Reads the counter, not before earlier instructions.
#[inline]
pub fn ticks() -> u64 {
    barrier::isb(barrier::SY);
    CNTVCT_EL0.get()
}

#[inline]
fn scale() -> u64 {
    match SCALE.load(Ordering::Relaxed) {
        0 => {
            let scale = (NANOS << 32) / frequency();
            SCALE.store(scale, Ordering::Relaxed);
            scale
        }
        scale => scale,
    }
}

/// Nanoseconds since the counter started.
#[inline]
pub fn now() -> u64 {
    ((u128::from(ticks()) * u128::from(scale())) >> 32) as u64
}

/// Sets this core's alarm to the moment `deadline` in nanoseconds.
pub(crate) fn arm(deadline: u64) {
    // Rounded up, so that the clock has reached the deadline when the alarm goes off.
    let ticks = (u128::from(deadline) << 32).div_ceil(u128::from(scale()));
    CNTV_CVAL_EL0.set(u64::try_from(ticks).unwrap_or(u64::MAX));
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::SET + CNTV_CTL_EL0::IMASK::CLEAR);
    barrier::isb(barrier::SY);
}

/// Switches this core's alarm off, and with it the (level-sensitive) interrupt. The timer interrupt's whole handler.
pub fn disarm() {
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::CLEAR + CNTV_CTL_EL0::IMASK::SET);
    barrier::isb(barrier::SY);
}
