//! Backtraces by frame pointers (AAPCS64, section 6.4.6: the frame pointer).
//!
//! A record is read only where it lies wholly on one of this core's stacks, above the one before it on the same stack or on a
//! stack nearer to the interrupted code, and counts only if it returns into the image's code. So a broken chain ends the walk, it
//! cannot fault or go round for ever.

#[cfg(any(test, target_os = "none"))]
use core::ops::Range;

/// The most frames a walk reports.
pub const MAX_FRAMES: usize = 48;

/// Calls `frame` with the address of each call instruction of the chain that starts at the record at `fp`.
///
/// `stacks` are where records may lie, in the order in which exceptions climb: a chain goes down in this list, never up. `read` gives
/// the two words at an address, which lies on a stack and is aligned.
#[cfg(any(test, target_os = "none"))]
fn walk(
    stacks: &[Range<u64>],
    code: &Range<u64>,
    mut fp: u64,
    read: impl Fn(u64) -> [u64; 2],
    mut frame: impl FnMut(u64),
) {
    let mut last: Option<(usize, u64)> = None;
    for _ in 0..MAX_FRAMES {
        let on = |range: &Range<u64>| fp >= range.start && range.end.saturating_sub(16) >= fp;
        let Some(stack) = stacks.iter().position(on).filter(|_| fp.is_multiple_of(8)) else {
            return;
        };
        if last.is_some_and(|(before, at)| stack > before || (stack == before && fp <= at)) {
            return;
        }
        last = Some((stack, fp));
        let [next, return_address] = read(fp);
        if !code.contains(&return_address) {
            return;
        }
        frame(return_address - 4);
        fp = next;
    }
}

/// Calls `frame` with the address of each call instruction that led to the calling code, innermost first.
#[cfg(target_os = "none")]
#[inline(always)]
pub fn here(frame: impl FnMut(u64)) {
    let fp: u64;
    // SAFETY: copies a register.
    unsafe { core::arch::asm!("mov {}, x29", out(reg) fp, options(nomem, nostack, preserves_flags)) };
    from(fp, frame);
}

/// Calls `frame` with the address of each call instruction of the chain that starts at the record at `fp`, innermost first. `fp` may
/// be anything.
#[cfg(target_os = "none")]
pub fn from(fp: u64, frame: impl FnMut(u64)) {
    let stacks = crate::percore::stacks(crate::percore::index()).ranges();
    let read = |at: u64| {
        let record = core::ptr::with_exposed_provenance::<[u64; 2]>(at as usize);
        // SAFETY: the 16 bytes lie on a stack of this core, which is mapped, and are aligned to 8; any value is an integer.
        unsafe { record.read_volatile() }
    };
    walk(&stacks, &crate::layout::text(), fp, read, frame);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Main, exception and emergency stack, and code.
    const STACKS: [Range<u64>; 3] = [0x1000..0x2000, 0x3000..0x4000, 0x5000..0x6000];
    const CODE: Range<u64> = 0x8000..0x9000;

    fn trace(fp: u64, records: &[(u64, u64, u64)]) -> Vec<u64> {
        let records: BTreeMap<u64, [u64; 2]> = records.iter().map(|&(at, next, pc)| (at, [next, pc])).collect();
        let mut found = Vec::new();
        // A read off the stacks panics: nothing is recorded there.
        walk(&STACKS, &CODE, fp, |at| records[&at], |pc| found.push(pc));
        found
    }

    #[test]
    fn a_chain_is_followed_from_a_handler_into_the_interrupted_code() {
        let chain = [(0x3f00, 0x3f80, 0x8104), (0x3f80, 0x1800, 0x8204), (0x1800, 0x1900, 0x8304), (0x1900, 0, 0)];
        assert_eq!(trace(0x3f00, &chain), [0x8100, 0x8200, 0x8300]);
    }

    #[test]
    fn a_chain_that_leaves_the_stacks_ends() {
        assert_eq!(trace(0x1800, &[(0x1800, 0x7000, 0x8104)]), [0x8100]);
        assert_eq!(trace(0x1800, &[(0x1800, 0x1ff8, 0x8104)]), [0x8100]);
        assert_eq!(trace(0x1800, &[(0x1800, u64::MAX, 0x8104)]), [0x8100]);
        assert_eq!(trace(0, &[]), []);
    }

    #[test]
    fn a_chain_that_turns_back_ends() {
        assert_eq!(trace(0x1800, &[(0x1800, 0x1800, 0x8104)]), [0x8100]);
        assert_eq!(trace(0x1800, &[(0x1800, 0x1900, 0x8104), (0x1900, 0x1800, 0x8204)]), [0x8100, 0x8200]);
        // Up to the exception stack and down again would go round for ever.
        assert_eq!(trace(0x1800, &[(0x1800, 0x3f00, 0x8104), (0x3f00, 0x1800, 0x8204)]), [0x8100]);
    }

    #[test]
    fn a_misaligned_record_and_a_return_to_nowhere_end_the_chain() {
        assert_eq!(trace(0x1804, &[]), []);
        assert_eq!(trace(0x1800, &[(0x1800, 0x1900, 0x1804), (0x1900, 0, 0x8104)]), []);
    }

    #[test]
    fn a_long_chain_is_cut() {
        let chain: Vec<_> = (0..100).map(|n| (0x1000 + n * 16, 0x1010 + n * 16, 0x8004)).collect();
        assert_eq!(trace(0x1000, &chain).len(), MAX_FRAMES);
    }
}
