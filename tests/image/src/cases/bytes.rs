//! Copying and filling, which the processor's crate does itself: every length up to a few blocks, at every alignment, touches
//! its own bytes and no other. (With an end stored in the wrong place the image did not come as far as this.)

use super::pattern;
use alloc::vec;
use core::hint::black_box;
use ktest::{expect, ktest};

/// Longer than every special case.
const LONGEST: usize = 700;
const MARGIN: usize = 32;

ktest! {
    fn a_copy_is_the_bytes_and_nothing_else(_bench) {
        let from = pattern(7, LONGEST + 2 * MARGIN);
        for len in 0..LONGEST {
            for (source, target) in [(0, 0), (1, 0), (0, 3), (5, 11), (8, 8), (15, 1)] {
                let mut to = vec![0xee_u8; LONGEST + 2 * MARGIN];
                to[MARGIN + target..][..black_box(len)].copy_from_slice(&from[source..][..black_box(len)]);
                expect!(to[MARGIN + target..][..len] == from[source..][..len], "{len} bytes from {source} to {target}");
                let others = to[..MARGIN + target].iter().chain(&to[MARGIN + target + len..]);
                expect!(others.copied().all(|byte| byte == 0xee), "{len} bytes from {source} to {target}");
            }
        }
        Ok(())
    }
}

ktest! {
    fn a_fill_is_the_bytes_and_nothing_else(_bench) {
        for len in 0..LONGEST {
            for target in [0, 1, 7, 16] {
                let mut to = pattern(7, LONGEST + 2 * MARGIN);
                let before = to.clone();
                to[MARGIN + target..][..black_box(len)].fill(black_box(0xa5));
                let end = MARGIN + target + len;
                expect!(to[MARGIN + target..end].iter().all(|byte| *byte == 0xa5), "{len} bytes to {target}");
                expect!(to[..MARGIN + target] == before[..MARGIN + target] && to[end..] == before[end..], "{len}");
            }
        }
        Ok(())
    }
}
