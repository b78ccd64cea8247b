//! Runs of words that hardware looks at, which the processor's crate goes through by vectors: every number of them, every bit of each
//! one counts, and nothing behind them is touched. (Red with one vector joined twice in its
//! neighbour's place, and with one that is not counted on.)

use alloc::vec::Vec;
use base::words;
use core::hint::black_box;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use ktest::{expect, ktest};

/// More than every special case.
const MOST: usize = 70;

fn filled(value: u64) -> Vec<AtomicU64> {
    (0..MOST + 1).map(|_| AtomicU64::new(value)).collect()
}

ktest! {
    fn words_are_counted_up_and_cleared_and_no_other(_bench) {
        let (first, step) = (black_box(0x60_0000_0000_0fc3), black_box(0x1_0000_1000));
        for count in 0..MOST {
            let cells = filled(7);
            words::count_up(&cells[..black_box(count)], first, step);
            for (index, cell) in cells[..count].iter().enumerate() {
                expect!(cell.load(Relaxed) == first + step * index as u64, "word {index} of {count}");
            }
            expect!(cells[count].load(Relaxed) == 7, "behind {count}");
            words::clear(&cells[..black_box(count)]);
            expect!(cells[..count].iter().all(|cell| cell.load(Relaxed) == 0), "{count} cleared");
            expect!(cells[count].load(Relaxed) == 7, "behind {count} cleared");
        }
        Ok(())
    }
}

ktest! {
    fn every_word_counts_in_what_any_and_all_have(_bench) {
        let (none, full) = (filled(0), filled(u64::MAX));
        for count in 0..MOST {
            none[count].store(1, Relaxed);
            full[count].store(0, Relaxed);
            let (nothing, everything) = (words::any(&none[..black_box(count)]), words::all(&full[..black_box(count)]));
            expect!((nothing, everything) == (0, u64::MAX), "{count}: {nothing:#x}, {everything:#x}");
            none[count].store(0, Relaxed);
            full[count].store(u64::MAX, Relaxed);
            for index in 0..count {
                let bit = 1 << (index % 64);
                none[index].store(bit, Relaxed);
                full[index].store(!bit, Relaxed);
                let (any, all) = (words::any(&none[..black_box(count)]), words::all(&full[..black_box(count)]));
                expect!((any, all) == (bit, !bit), "word {index} of {count}: {any:#x}, {all:#x}");
                none[index].store(0, Relaxed);
                full[index].store(u64::MAX, Relaxed);
            }
        }
        Ok(())
    }
}
