//! Copies to and from memory that a device may be using at the same moment.
//!
//! Each access is a single relaxed atomic of 1, 2, 4 or 8 bytes at its natural alignment: units of 8 in the middle, smaller
//! ones at the ends. A field that is naturally aligned is therefore never split: what is read of it is one value that was
//! there, and what the device sees of it is the old or the new value. Nothing is promised between fields, and the memory may
//! change between two accesses: a value that was checked is used from the copy, not read again.

#![expect(unsafe_code, reason = "accesses memory that it is handed by pointer")]

use crate::buffer::Span;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// The largest unit, 8 at most, that fits the alignment of `address` and the `left` bytes.
#[inline]
fn unit(address: usize, left: usize) -> usize {
    let aligned = 1 << address.trailing_zeros().min(3);
    let fits = 1 << left.ilog2().min(3);
    if aligned < fits { aligned } else { fits }
}

macro_rules! access {
    ($load:ident, $store:ident, $atomic:ty, $int:ty, $bytes:literal) => {
        /// # Safety
        ///
        /// `ptr` is aligned to the unit and valid for reads and writes of it; CPU accesses to the memory that may happen at the
        /// same time are atomic.
        #[inline(always)]
        unsafe fn $load(ptr: *mut u8) -> [u8; $bytes] {
            // SAFETY: as the caller promises.
            let cell = unsafe { <$atomic>::from_ptr(ptr.cast()) };
            cell.load(Ordering::Relaxed).to_ne_bytes()
        }

        /// # Safety
        ///
        /// As for the load.
        #[inline(always)]
        unsafe fn $store(ptr: *mut u8, value: [u8; $bytes]) {
            // SAFETY: as the caller promises.
            let cell = unsafe { <$atomic>::from_ptr(ptr.cast()) };
            cell.store(<$int>::from_ne_bytes(value), Ordering::Relaxed);
        }
    };
}

access!(load_1, store_1, AtomicU8, u8, 1);
access!(load_2, store_2, AtomicU16, u16, 2);
access!(load_4, store_4, AtomicU32, u32, 4);
access!(load_8, store_8, AtomicU64, u64, 8);

/// Copies from `span` to `to`. Copies the shorter of the two lengths.
///
/// # Safety
///
/// The span's memory stays valid meanwhile, and is read and written by the CPU through atomics only (by devices in any way).
pub(crate) unsafe fn load(span: Span, to: &mut [u8]) {
    let mut left = span.bytes.min(to.len());
    let mut from = span.ptr.as_ptr();
    let mut to = &mut to[..left];
    macro_rules! step {
        ($load:ident, $bytes:literal) => {{
            let Some((now, rest)) = to.split_first_chunk_mut::<$bytes>() else { return };
            // SAFETY: `unit` chose a size that fits the alignment and what is left of the span; the rest is the caller's promise.
            *now = unsafe { $load(from) };
            to = rest;
            from = from.wrapping_add($bytes);
            left -= $bytes;
        }};
    }
    while left != 0 {
        match unit(from.addr(), left) {
            8 => {
                while left >= 8 {
                    step!(load_8, 8);
                }
            }
            4 => step!(load_4, 4),
            2 => step!(load_2, 2),
            _ => step!(load_1, 1),
        }
    }
}

/// Copies `from` to `span`. Copies the shorter of the two lengths.
///
/// # Safety
///
/// As for [`load`].
pub(crate) unsafe fn store(span: Span, from: &[u8]) {
    let mut left = span.bytes.min(from.len());
    let mut to = span.ptr.as_ptr();
    let mut from = &from[..left];
    macro_rules! step {
        ($store:ident, $bytes:literal) => {{
            let Some((now, rest)) = from.split_first_chunk::<$bytes>() else { return };
            // SAFETY: `unit` chose a size that fits the alignment and what is left of the span; the rest is the caller's promise.
            unsafe { $store(to, *now) };
            from = rest;
            to = to.wrapping_add($bytes);
            left -= $bytes;
        }};
    }
    while left != 0 {
        match unit(to.addr(), left) {
            8 => {
                while left >= 8 {
                    step!(store_8, 8);
                }
            }
            4 => step!(store_4, 4),
            2 => step!(store_2, 2),
            _ => step!(store_1, 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use core::ptr::NonNull;

    #[test]
    fn every_offset_and_length_arrives_and_nothing_beside_it_changes() {
        for offset in 0..16 {
            for len in 0..40 {
                let mut memory = [0_u64; 8];
                let base = NonNull::from(&mut memory).cast::<u8>();
                // SAFETY: inside the array.
                let ptr = unsafe { base.add(offset) };
                let data: Vec<u8> = (1..=len as u8).collect();
                // SAFETY: the span lies in the array, which nobody else uses.
                unsafe { store(Span { ptr, bytes: len }, &data) };
                let mut back = vec![0xee; len];
                // SAFETY: as above.
                unsafe { load(Span { ptr, bytes: len }, &mut back) };
                assert_eq!(back, data);
                let all: Vec<u8> = memory.iter().flat_map(|word| word.to_ne_bytes()).collect();
                assert_eq!(&all[offset..offset + len], &data[..]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_naturally_aligned_field_lies_in_one_unit() {
        // For every copy and every field inside it there is no boundary between units in the middle of the field.
        for start in 0..16_usize {
            for len in 1..48_usize {
                let mut edges = std::collections::BTreeSet::new();
                let (mut at, mut left) = (start, len);
                while left != 0 {
                    edges.insert(at);
                    let bytes = unit(at, left);
                    (at, left) = (at + bytes, left - bytes);
                }
                for size in [2_usize, 4, 8] {
                    for field in (0..64).step_by(size).filter(|f| *f >= start && f + size <= start + len) {
                        assert!(
                            !(field + 1..field + size).any(|inside| edges.contains(&inside)),
                            "{start} {len} {field}"
                        );
                    }
                }
            }
        }
    }
}
