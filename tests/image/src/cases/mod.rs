//! The tests, by what they are about.

mod allocation;
mod berths;
mod boot;
mod bytes;
mod carried;
mod containment;
mod crowd;
mod disk;
mod far;
mod fence;
mod firmware;
mod foreign;
mod groups;
mod interrupts;
mod iommus;
mod lapses;
mod lists;
mod machine;
mod memory;
mod misuse;
mod narrow;
mod pan;
mod pcie;
mod processes;
mod removal;
mod reservations;
mod screen;
mod sharing;
mod show;
mod smp;
mod spaces;
mod translation;
mod vcm;
mod wires;
mod words;

use alloc::vec::Vec;

/// Bytes that differ from their neighbours, and between seeds.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}
