//! The waits for registers, and registers that say where a table is.

use crate::GicError;
pub(crate) use arch::mmio::Registers;
use base::Deadline;

/// How long the hardware may take for one step.
pub(crate) const STEP_MILLIS: u64 = 1_000;

/// Spins until `done`, for hardware that does not interrupt when it is.
///
/// # Errors
///
/// [`GicError::TimedOut`] with `what` after [`STEP_MILLIS`].
pub(crate) fn poll(what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), GicError> {
    let deadline = Deadline::after_millis(STEP_MILLIS);
    loop {
        let expired = deadline.has_passed();
        if done() {
            return Ok(());
        }
        if expired {
            return Err(GicError::TimedOut(what));
        }
        core::hint::spin_loop();
    }
}

/// Fields shared by the registers that tell where a table is: cacheability and shareability.
pub(crate) mod attr {
    /// Inner Shareable.
    pub const INNER_SHAREABLE: u64 = 1 << 10;
    pub const SHAREABILITY: u64 = 3 << 10;
    /// Normal, Inner Cacheable, read-allocate, write-allocate, write-back.
    pub const CACHEABLE: u64 = 7;
    pub const NON_CACHEABLE: u64 = 1;
    pub const MASK: u64 = 7;
}

/// Writes `value` with the best memory attributes that the hardware takes: Inner Shareable write-back, or, where it says that
/// it does not snoop, Non-cacheable. Returns what the register then holds and whether it snoops.
pub(crate) fn write_table_register(
    regs: &dyn Registers,
    offset: usize,
    inner_cache_shift: u32,
    value: u64,
) -> (u64, bool) {
    let cacheable = value | attr::INNER_SHAREABLE | attr::CACHEABLE << inner_cache_shift;
    regs.write64(offset, cacheable);
    let kept = regs.read64(offset);
    if kept & attr::SHAREABILITY != 0 {
        return (kept, true);
    }
    let plain = kept & !(attr::MASK << inner_cache_shift) | attr::NON_CACHEABLE << inner_cache_shift;
    regs.write64(offset, plain);
    (regs.read64(offset), false)
}
