//! Backtraces by frame pointers (AAPCS64, section 6.4.6: the frame pointer).
//!
//! A record is read only where it lies wholly on one of this core's stacks, above the one before it on the same stack or on a
//! stack nearer to the interrupted code, and counts only if it returns into the image's code. So a broken chain ends the walk, it cannot fault or go round for ever.

use crate::{layout, percore};
use core::arch::asm;

/// The most frames a walk reports.
pub const MAX_FRAMES: usize = 48;

/// Calls `frame` with the address of each call instruction that led to the calling code, innermost first.
#[inline(always)]
pub fn here(frame: impl FnMut(u64)) {
    let fp: u64;
    // SAFETY: copies a register.
    unsafe { asm!("mov {}, x29", out(reg) fp, options(nomem, nostack, preserves_flags)) };
    from(fp, frame);
}

/// Calls `frame` with the address of each call instruction of the chain that starts at the record at `fp`, innermost first. `fp` may be anything.
pub fn from(fp: u64, mut frame: impl FnMut(u64)) {
    let ranges = percore::stacks(percore::index()).ranges();
    let mut fp = fp;
    // Stacks in the order in which exceptions climb: a chain goes down in this list, never up.
    let mut last: Option<(usize, u64)> = None;
    for _ in 0..MAX_FRAMES {
        if !fp.is_multiple_of(8) {
            return;
        }
        let Some(stack) = ranges.iter().position(|range| fp >= range.start && range.end.saturating_sub(16) >= fp)
        else {
            return;
        };
        if last.is_some_and(|(before, at)| stack > before || (stack == before && fp <= at)) {
            return;
        }
        last = Some((stack, fp));
        let record = core::ptr::with_exposed_provenance::<u64>(fp as usize);
        // SAFETY: the 8 bytes lie on a stack of this core, which is mapped, and are aligned; any value is a u64.
        let next = unsafe { record.read_volatile() };
        // SAFETY: the 16 bytes at `fp` lie on a stack of this core.
        let second = unsafe { record.add(1) };
        // SAFETY: as for the first half of the record.
        let return_address = unsafe { second.read_volatile() };
        if !layout::text().contains(&return_address) {
            return;
        }
        frame(return_address - 4);
        fp = next;
    }
}
