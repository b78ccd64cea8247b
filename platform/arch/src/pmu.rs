//! The performance monitors, as far as measurements need them: cycles and instructions.

use core::arch::asm;

/// Starts this core's cycle counter and its counter 0 for retired instructions, where there is a PMU.
pub(crate) fn start() {
    let features: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, id_aa64dfr0_el1", out(reg) features, options(nomem, nostack, preserves_flags, pure)) };
    if matches!(features >> 8 & 0xf, 0 | 0xf) {
        return;
    }
    // SAFETY: the registers exist. Counters count at EL1 and raise no interrupt; event 8 is INST_RETIRED; PMCR: enable, reset
    // both, 64-bit cycle counter.
    unsafe {
        asm!(
            "msr pmintenclr_el1, {all}",
            "msr pmccfiltr_el0, xzr",
            "msr pmevtyper0_el0, {event}",
            "msr pmcntenset_el0, {counters}",
            "msr pmcr_el0, {control}",
            "isb",
            all = in(reg) 0xffff_ffff_u64,
            event = in(reg) 8_u64,
            counters = in(reg) 0x8000_0001_u64,
            control = in(reg) 0x47_u64,
            options(nostack, preserves_flags),
        );
    }
}

/// Cycles and instructions of the calling core since it started; zeros without a PMU, and instructions only where it counts them
/// (32 bits, wrapping).
pub fn read() -> (u64, u32) {
    let features: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, id_aa64dfr0_el1", out(reg) features, options(nomem, nostack, preserves_flags, pure)) };
    if matches!(features >> 8 & 0xf, 0 | 0xf) {
        return (0, 0);
    }
    let (cycles, instructions): (u64, u64);
    // SAFETY: the registers exist, and reading them changes nothing.
    unsafe {
        asm!("isb", "mrs {}, pmccntr_el0", "mrs {}, pmevcntr0_el0", out(reg) cycles, out(reg) instructions,
             options(nostack, preserves_flags));
    }
    (cycles, instructions as u32)
}
