//! [`base::words`] by vectors: eight words an instruction.
//!
//! LD1 and ST1 of elements, because those of 64 bits are single-copy atomic each (DDI 0487, B2.2.1): a table walker sees each entry
//! as it was or as it is.

use base::words::{CHUNK, Chunk};
use core::arch::asm;
use core::sync::atomic::AtomicU64;

const _: () = assert!(size_of::<Chunk>() == 64 && CHUNK == 8 && size_of::<AtomicU64>() == 8);

macro_rules! joined {
    ($name:ident, $join:literal, $none:expr, $what:literal) => {
        #[doc = $what]
        #[inline(always)]
        pub fn $name(chunks: &[Chunk]) -> u64 {
            let joined: u64;
            // SAFETY: reads `chunks.len()` times 64 bytes from the slice's start, which are its words, each as an element of a
            // vector; of no chunk, nothing. Nothing is written but the registers named.
            unsafe {
                asm!(
                    "cbz    {count}, 4f",
                    "ld1    {{v4.2d, v5.2d, v6.2d, v7.2d}}, [{at}], #64",
                    "sub    {count}, {count}, #1",
                    "tbz    {count}, #0, 2f",
                    "ld1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
                    concat!($join, " v4.16b, v4.16b, v0.16b"),
                    concat!($join, " v5.16b, v5.16b, v1.16b"),
                    concat!($join, " v6.16b, v6.16b, v2.16b"),
                    concat!($join, " v7.16b, v7.16b, v3.16b"),
                    "2: lsr {count}, {count}, #1",
                    "cbz    {count}, 3f",
                    "1: ld1 {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
                    "ld1    {{v16.2d, v17.2d, v18.2d, v19.2d}}, [{at}], #64",
                    concat!($join, " v4.16b, v4.16b, v0.16b"),
                    concat!($join, " v5.16b, v5.16b, v1.16b"),
                    concat!($join, " v6.16b, v6.16b, v2.16b"),
                    concat!($join, " v7.16b, v7.16b, v3.16b"),
                    concat!($join, " v4.16b, v4.16b, v16.16b"),
                    concat!($join, " v5.16b, v5.16b, v17.16b"),
                    concat!($join, " v6.16b, v6.16b, v18.16b"),
                    concat!($join, " v7.16b, v7.16b, v19.16b"),
                    "sub    {count}, {count}, #1",
                    "cbnz   {count}, 1b",
                    concat!("3: ", $join, " v4.16b, v4.16b, v5.16b"),
                    concat!($join, " v6.16b, v6.16b, v7.16b"),
                    concat!($join, " v4.16b, v4.16b, v6.16b"),
                    "fmov   {joined}, d4",
                    "mov    {at}, v4.d[1]",
                    concat!($join, " {joined}, {joined}, {at}"),
                    "4:",
                    at = inout(reg) chunks.as_ptr() => _,
                    count = inout(reg) chunks.len() => _,
                    joined = inout(reg) $none => joined,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _,
                    out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v16") _, out("v17") _, out("v18") _, out("v19") _,
                    options(nostack, readonly, preserves_flags),
                );
            }
            joined
        }
    };
}

joined!(any, "orr", 0_u64, "The disjunction of all words.");
joined!(all, "and", u64::MAX, "The conjunction of all words.");

/// Stores `first` to the first word and to each after it `step` more.
#[inline(always)]
pub fn count_up(chunks: &[Chunk], first: u64, step: u64) {
    // SAFETY: writes `chunks.len()` times 64 bytes from the slice's start, which are its words and can be written through a shared
    // reference, each as an element of a vector; of no chunk, nothing.
    unsafe {
        asm!(
            "cbz    {count}, 4f",
            "fmov   d0, {first}",
            "add    {first}, {first}, {step}",
            "lsl    {step}, {step}, #1",
            "mov    v0.d[1], {first}",
            "dup    v16.2d, {step}",
            "shl    v17.2d, v16.2d, #2",
            "add    v1.2d, v0.2d, v16.2d",
            "add    v2.2d, v1.2d, v16.2d",
            "add    v3.2d, v2.2d, v16.2d",
            "tbz    {count}, #0, 2f",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "sub    {count}, {count}, #1",
            "cbz    {count}, 4f",
            "add    v0.2d, v0.2d, v17.2d",
            "add    v1.2d, v1.2d, v17.2d",
            "add    v2.2d, v2.2d, v17.2d",
            "add    v3.2d, v3.2d, v17.2d",
            "2: add v4.2d, v0.2d, v17.2d",
            "add    v5.2d, v1.2d, v17.2d",
            "add    v6.2d, v2.2d, v17.2d",
            "add    v7.2d, v3.2d, v17.2d",
            "shl    v17.2d, v17.2d, #1",
            "1: st1 {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "st1    {{v4.2d, v5.2d, v6.2d, v7.2d}}, [{at}], #64",
            "sub    {count}, {count}, #2",
            "cbz    {count}, 4f",
            "add    v0.2d, v0.2d, v17.2d",
            "add    v1.2d, v1.2d, v17.2d",
            "add    v2.2d, v2.2d, v17.2d",
            "add    v3.2d, v3.2d, v17.2d",
            "add    v4.2d, v4.2d, v17.2d",
            "add    v5.2d, v5.2d, v17.2d",
            "add    v6.2d, v6.2d, v17.2d",
            "add    v7.2d, v7.2d, v17.2d",
            "b      1b",
            "4:",
            at = inout(reg) chunks.as_ptr() => _,
            count = inout(reg) chunks.len() => _,
            first = inout(reg) first => _,
            step = inout(reg) step => _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _,
            out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v16") _, out("v17") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Stores 0 to all words.
#[inline(always)]
pub fn clear(chunks: &[Chunk]) {
    // SAFETY: as in `count_up`.
    unsafe {
        asm!(
            "cbz    {count}, 4f",
            "movi   v0.2d, #0",
            "movi   v1.2d, #0",
            "movi   v2.2d, #0",
            "movi   v3.2d, #0",
            "tbz    {count}, #0, 2f",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "sub    {count}, {count}, #1",
            "cbz    {count}, 4f",
            "2: tbz {count}, #1, 1f",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "sub    {count}, {count}, #2",
            "cbz    {count}, 4f",
            "1: st1 {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "st1    {{v0.2d, v1.2d, v2.2d, v3.2d}}, [{at}], #64",
            "sub    {count}, {count}, #4",
            "cbnz   {count}, 1b",
            "4:",
            at = inout(reg) chunks.as_ptr() => _,
            count = inout(reg) chunks.len() => _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _,
            options(nostack, preserves_flags),
        );
    }
}
