//! The generic timer (DDI 0487, D12): CNTVCT_EL0 is the clock, the EL1 virtual timer a core's one alarm.
//!
//! Its interrupt ends a WFI, and calls what was deferred ([`defer`]). The alarm is shared: it goes off at the earlier of the two.

use crate::{irq, percore};
use aarch64_cpu::asm::{barrier, wfe};
use aarch64_cpu::registers::{CNTFRQ_EL0, CNTKCTL_EL1, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVCT_EL0};
use base::cpu::MAX_CPUS;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use tock_registers::interfaces::{Readable, Writeable};

/// Nanoseconds per tick as a fraction of 2^32; 0 until first needed.
static SCALE: AtomicU64 = AtomicU64::new(0);

/// For each core the moment at which it makes the deferred call, in nanoseconds; [`NEVER`] if it does not.
static DUE: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(NEVER) }; MAX_CPUS];
const NEVER: u64 = u64::MAX;

/// What is called then.
static DEFERRED: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

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

/// Reads the counter, at some moment near this one: it may be read before earlier instructions.
#[inline(always)]
pub(crate) fn ticks_roughly() -> u64 {
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
    nanos(ticks())
}

/// Nanoseconds in `ticks` of the counter.
#[inline]
pub(crate) fn nanos(ticks: u64) -> u64 {
    ((u128::from(ticks) * u128::from(scale())) >> 32) as u64
}

/// Makes `call` what [`defer`] defers. It is called in the timer's interrupt handler: it neither allocates nor waits.
pub fn set_deferred(call: fn()) {
    DEFERRED.store(call as *mut (), Ordering::Release);
}

/// Has the function of [`set_deferred`] called on this core in `nanoseconds`, or earlier if that was asked for before. Safe to call
/// from handlers. The timer's interrupt must be connected to [`expired`].
pub fn defer(nanoseconds: u64) {
    let state = irq::save();
    if let Some(due) = DUE.get(percore::index()) {
        due.fetch_min(now().saturating_add(nanoseconds), Ordering::Relaxed);
    }
    // Whatever the alarm was set to, a core that is running has no use for it: who sleeps sets it anew.
    rearm();
    irq::restore(state);
}

/// The timer interrupt's handler: switches the alarm off, and makes the deferred call if it is due.
pub fn expired() {
    disarm();
    let Some(due) = DUE.get(percore::index()) else { return };
    if now() < due.load(Ordering::Relaxed) {
        return rearm();
    }
    due.store(NEVER, Ordering::Relaxed);
    let call = DEFERRED.load(Ordering::Acquire);
    if !call.is_null() {
        // SAFETY: the pointer is not null, so `set_deferred` stored a `fn()` there.
        let call = unsafe { core::mem::transmute::<*mut (), fn()>(call) };
        call();
    }
}

/// Sets the alarm to the deferred call, or switches it off if there is none. Interrupts are masked.
pub(crate) fn rearm() {
    match due() {
        NEVER => disarm(),
        _ => arm(NEVER),
    }
}

fn due() -> u64 {
    DUE.get(percore::index()).map_or(NEVER, |due| due.load(Ordering::Relaxed))
}

/// Waits for an event (WFE), about 100 us at the longest: this core's event stream, which is switched on if it is not, ends the
/// wait if nothing else does.
pub fn wait_for_event() {
    // An event every 2^(n + 1) ticks.
    let ticks = (frequency() / 10_000).max(2);
    let n = u64::from(ticks.ilog2() - 1).min(15);
    // Nothing in the register is known before it is written.
    let wanted = CNTKCTL_EL1::EVNTI.val(n) + CNTKCTL_EL1::EVNTEN::SET;
    if !CNTKCTL_EL1.matches_all(wanted) {
        CNTKCTL_EL1.write(wanted);
        barrier::isb(barrier::SY);
    }
    wfe();
}

/// Sets this core's alarm to the moment `deadline` in nanoseconds, or to that of the deferred call if that is earlier.
pub(crate) fn arm(deadline: u64) {
    let deadline = deadline.min(due());
    // Rounded up, so that the clock has reached the deadline when the alarm goes off.
    let ticks = (u128::from(deadline) << 32).div_ceil(u128::from(scale()));
    CNTV_CVAL_EL0.set(u64::try_from(ticks).unwrap_or(u64::MAX));
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::SET + CNTV_CTL_EL0::IMASK::CLEAR);
    barrier::isb(barrier::SY);
}

/// Switches this core's alarm off, and with it the (level-sensitive) interrupt.
pub fn disarm() {
    CNTV_CTL_EL0.write(CNTV_CTL_EL0::ENABLE::CLEAR + CNTV_CTL_EL0::IMASK::SET);
    barrier::isb(barrier::SY);
}
