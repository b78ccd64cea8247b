//! Runs of 64-bit words that hardware looks at: several at a time, where the processor can.
//!
//! Each word is loaded or stored by itself, as by a relaxed atomic access (an element of a vector that is aligned to its own size
//! is single-copy atomic: DDI 0487, B2.2.1); in which order they are is not said.

use crate::hooks::__private as hooks;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// Words that are looked at together.
pub type Chunk = [AtomicU64; CHUNK];

/// How many they are.
pub const CHUNK: usize = 8;

/// The disjunction of all `words`: 0 of none.
#[inline(always)]
pub fn any(words: &[AtomicU64]) -> u64 {
    let (chunks, rest) = words.as_chunks::<CHUNK>();
    rest.iter().fold(hooks::words_any(chunks), |all, word| all | word.load(Relaxed))
}

/// The conjunction of all `words`: all ones of none.
#[inline(always)]
pub fn all(words: &[AtomicU64]) -> u64 {
    let (chunks, rest) = words.as_chunks::<CHUNK>();
    rest.iter().fold(hooks::words_all(chunks), |all, word| all & word.load(Relaxed))
}

/// Stores `first` to the first of `words` and to each after it `step` more (wrapping).
#[inline(always)]
pub fn count_up(words: &[AtomicU64], first: u64, step: u64) {
    let (chunks, rest) = words.as_chunks::<CHUNK>();
    hooks::words_count_up(chunks, first, step);
    let mut value = first.wrapping_add(step.wrapping_mul((chunks.len() as u64).wrapping_mul(CHUNK as u64)));
    for word in rest {
        word.store(value, Relaxed);
        value = value.wrapping_add(step);
    }
}

/// Stores 0 to all `words`.
#[inline(always)]
pub fn clear(words: &[AtomicU64]) {
    let (chunks, rest) = words.as_chunks::<CHUNK>();
    hooks::words_clear(chunks);
    rest.iter().for_each(|word| word.store(0, Relaxed));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn words_are_counted_judged_and_cleared_one_for_one_whatever_their_number() {
        for count in 0..40 {
            let words: Vec<AtomicU64> = (0..count + 1).map(|_| AtomicU64::new(7)).collect();
            count_up(&words[..count], 100, 3);
            for (index, word) in words[..count].iter().enumerate() {
                assert_eq!(word.load(Relaxed), 100 + 3 * index as u64);
            }
            let expected = |start, join: fn(u64, u64) -> u64| (0..count as u64).map(|i| 100 + 3 * i).fold(start, join);
            assert_eq!(any(&words[..count]), expected(0, |a, b| a | b));
            assert_eq!(all(&words[..count]), expected(u64::MAX, |a, b| a & b));
            clear(&words[..count]);
            assert_eq!(any(&words[..count]), 0);
            assert_eq!(words[count].load(Relaxed), 7, "nothing behind them was touched");
        }
    }
}
