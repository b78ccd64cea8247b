//! A day's work: whether anything grows or slows down. Counted in steps of the tree, in chunks and in nodes, not in time.

use super::*;
use alloc::vec::Vec;

/// Operations of one simulated hour.
const HOUR: u64 = 40_000;
/// Ranges that are live at a time.
const LIVE: usize = 3_000;

/// A generator of numbers that needs no more than to be uneven.
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 >> 33
    }
}

/// What a disk, a network card and a display ask for: mostly pages, some rings, now and then a frame buffer.
fn size(dice: &mut Dice) -> u64 {
    match dice.throw() % 1000 {
        0..700 => 1,
        700..900 => 1 + dice.throw() % 16,
        900..980 => 1 + dice.throw() % 256,
        980..998 => 1 + dice.throw() % 1024,
        _ => 1 + dice.throw() % 8192,
    }
}

/// Red when a chunk that became vacant was not given back to the tree: nodes and chunks grew by the hour.
#[test]
fn a_day_of_mixed_sizes_ends_as_it_began() {
    let window = range(0, 1 << 36);
    let iova = IovaAllocator::new(window, PAGE).unwrap();
    let mut dice = Dice(1);
    let mut live: Vec<IovaRange> = Vec::new();
    let mut hours = Vec::new();
    for _ in 0..24 {
        iova.shared.lock().steps.set(0);
        let mut most = 0;
        for _ in 0..HOUR {
            if live.len() < LIVE {
                live.push(iova.allocate(size(&mut dice) * PAGE, PAGE, TOP).unwrap());
            } else {
                let which = dice.throw() as usize % live.len();
                iova.free(live.swap_remove(which)).unwrap();
            }
            most = most.max(live.len());
        }
        let tree = iova.shared.lock();
        hours.push((tree.steps.get(), tree.nodes(), tree.chunks));
    }
    // The first hour fills the space; from then on each is like the second, but for the dice.
    let (steps, nodes, chunks) = hours[1];
    for (hour, (s, n, c)) in hours.iter().enumerate().skip(2) {
        assert!(*s <= steps + steps / 4, "hour {hour}: {s} steps, {steps} in the second: {hours:?}");
        assert!(*n <= nodes + nodes / 2, "hour {hour}: memory for {n} nodes: {hours:?}");
        assert!(*c <= chunks + chunks / 2, "hour {hour}: {c} chunks: {hours:?}");
    }
    for range in live {
        iova.free(range).unwrap();
    }
    let all = window.len() - PAGE;
    assert_eq!(iova.allocate(all, PAGE, TOP).map(|range| range.len()), Ok(all));
}

/// An allocation fails only when nothing is free, whatever the caches hold.
#[test]
fn all_the_free_space_can_be_had_and_all_of_it_again() {
    let pages_of_window = 5 * CHUNK + 77;
    let iova = IovaAllocator::new(range(0, pages_of_window * PAGE), PAGE).unwrap();
    for (reserved, len) in [(3, 5), (CHUNK + 1, CHUNK), (4 * CHUNK - 1, 3)] {
        iova.reserve(pages(reserved, len)).unwrap();
    }
    let free = pages_of_window - 1 - (5 + CHUNK + 3);
    for sizes in [&[1_u64][..], &[512, 64, 7, 3, 1], &[300, 130, 1], &[2, 1]] {
        let mut had = Vec::new();
        for size in sizes {
            while let Ok(range) = iova.allocate(size * PAGE, PAGE, TOP) {
                had.push(range);
            }
        }
        assert_eq!(had.iter().map(|range| range.len() / PAGE).sum::<u64>(), free, "by {sizes:?}");
        had.into_iter().for_each(|range| iova.free(range).unwrap());
    }
}
