//! Caches, and several cores at once.

use super::*;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Barrier, Mutex, mpsc};
use std::thread;

/// Runs `work` as another core.
fn elsewhere<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join().unwrap())
}

#[test]
fn small_ranges_do_not_touch_the_tree() {
    let iova = IovaAllocator::new(range(0, 1 << 40), PAGE).unwrap();
    let mut live = Vec::new();
    for len in [1, 2, 3, 4, 7, 16, 33, 64] {
        live.push(iova.allocate(len * PAGE, PAGE, TOP).unwrap());
    }
    iova.shared.lock().steps.set(0);
    for _ in 0..400 {
        let one = iova.allocate(PAGE, PAGE, TOP).unwrap();
        let other = iova.allocate(3 * PAGE, 4 * PAGE, TOP).unwrap();
        elsewhere(|| iova.free(one)).unwrap();
        iova.free(other).unwrap();
    }
    assert_eq!(iova.shared.lock().steps.get(), 0);
}

#[test]
fn a_million_pages_are_had_and_given_back_in_few_steps_each() {
    const MANY: usize = 1_000_000;
    let iova = IovaAllocator::new(range(0, 1 << 48), PAGE).unwrap();
    let mut live = Vec::with_capacity(MANY);
    let mut most = 0;
    let mut counted = |operation: &mut dyn FnMut()| {
        iova.shared.lock().steps.set(0);
        operation();
        most = most.max(iova.shared.lock().steps.get());
    };
    for _ in 0..MANY {
        counted(&mut || live.push(iova.allocate(PAGE, PAGE, TOP).unwrap()));
    }
    // In an order that leaves holes everywhere.
    let order = (0..MANY).map(|n| n * 7919 % MANY);
    for n in order {
        counted(&mut || iova.free(live[n]).unwrap());
    }
    assert!(most <= 240, "{most} steps for one operation with a million ranges");
    assert_eq!(iova.allocate((1 << 48) - PAGE, PAGE, TOP), Ok(range(PAGE, (1 << 48) - PAGE)));
}

/// Red when caches were not dissolved: the second half of the pages was out of reach.
#[test]
fn what_other_cores_have_cached_is_reclaimed_before_an_allocation_fails() {
    let (first, count) = (1, 8 * CHUNK - 1);
    let iova = IovaAllocator::new(range(0, 8 * CHUNK * PAGE), PAGE).unwrap();
    let mut live: Vec<_> = [1, 3, 60, 16].map(|len| elsewhere(|| iova.allocate(len * PAGE, PAGE, TOP).unwrap())).into();
    assert_eq!(iova.shared.lock().chunks, 4);
    for _ in 0..count - (1 + 3 + 60 + 16) {
        live.push(iova.allocate(PAGE, PAGE, TOP).unwrap());
    }
    let full = IovaError::NoSpace { len: PAGE, align: PAGE, limit: TOP };
    assert_eq!(iova.allocate(PAGE, PAGE, TOP), Err(full));
    // What is freed is available again at once, wherever it was.
    for index in [0, 1, 2, 3, 100, 2000] {
        let range = live.swap_remove(index);
        elsewhere(|| iova.free(range)).unwrap();
        for _ in 0..range.len() / PAGE {
            live.push(iova.allocate(PAGE, PAGE, TOP).unwrap());
        }
        assert_eq!(iova.allocate(PAGE, PAGE, TOP), Err(full));
    }
    live.into_iter().for_each(|range| iova.free(range).unwrap());
    assert_eq!(iova.allocate(count * PAGE, PAGE, TOP), Ok(pages(first, count)));
}

/// Red when `Chunk::put` did not compare the pages in use.
#[test]
fn a_cached_range_is_freed_only_whole_and_once() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    let three = iova.allocate(3 * PAGE, PAGE, TOP).unwrap();
    let next = iova.allocate(3 * PAGE, PAGE, TOP).unwrap();
    assert!(iova.shared.lock().chunks == 1 && next.start().get() == three.start().get() + 4 * PAGE);
    let at = three.start().get();
    let wrong = [
        range(at, PAGE),
        range(at, 2 * PAGE),
        range(at, 4 * PAGE),
        range(at, 7 * PAGE),
        range(at + PAGE, 2 * PAGE),
        range(at + PAGE, 3 * PAGE),
        range(at + 3 * PAGE, PAGE),
        range(at + 8 * PAGE, 3 * PAGE),
        range(at, 3 * PAGE - 1),
        range(at + 1, 3 * PAGE),
        range(at, 0),
        range(at, 3 * PAGE + (256 * PAGE)),
    ];
    for range in wrong {
        assert_eq!(iova.free(range), Err(IovaError::NotAllocated(range)));
    }
    iova.free(three).unwrap();
    assert_eq!(iova.free(three), Err(IovaError::NotAllocated(three)));
    iova.free(next).unwrap();
}

#[test]
fn a_vacant_chunk_that_no_core_uses_goes_back_to_the_tree() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    let live: Vec<_> = (0..3 * CHUNK).map(|_| iova.allocate(PAGE, PAGE, TOP).unwrap()).collect();
    assert_eq!(iova.shared.lock().chunks, 3);
    live.into_iter().for_each(|range| iova.free(range).unwrap());
    assert!(iova.shared.lock().chunks <= 1, "only the one in use stays");
}

/// Red when `retire` did not look again, under the tree's lock, whether the chunk is still vacant and nobody's.
#[test]
fn a_chunk_that_was_taken_up_again_in_the_meantime_does_not_go_back() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    let live: Vec<_> = (0..CHUNK + 1).map(|_| iova.allocate(PAGE, PAGE, TOP).unwrap()).collect();
    // The first chunk has been left and has slots in use; the second is this core's, and vacant.
    iova.free(live[CHUNK as usize]).unwrap();
    for range in &live[..CHUNK as usize - 1] {
        iova.free(*range).unwrap();
    }
    (0..2).for_each(|number| iova.retire(number));
    assert_eq!(iova.shared.lock().chunks, 2);
    iova.free(live[CHUNK as usize - 1]).unwrap();
    assert_eq!(iova.shared.lock().chunks, 1);
}

#[test]
fn a_core_takes_up_a_chunk_that_another_has_left() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    let live: Vec<_> = (0..2 * CHUNK).map(|_| iova.allocate(PAGE, PAGE, TOP).unwrap()).collect();
    for range in live.iter().step_by(2) {
        iova.free(*range).unwrap();
    }
    let chunks = iova.shared.lock().chunks;
    elsewhere(|| (0..CHUNK / 4).for_each(|_| assert!(iova.allocate(PAGE, PAGE, TOP).is_ok())));
    assert_eq!((chunks, iova.shared.lock().chunks), (2, 2));
}

/// Red when a chunk was dissolved without the slots in use.
#[test]
fn cores_that_allocate_and_free_at_once_never_share_a_page() {
    const THREADS: u64 = 4;
    let total = 6 * CHUNK;
    let iova = IovaAllocator::new(range(0, total * PAGE), PAGE).unwrap();
    let owners: Vec<AtomicU32> = (0..total).map(|_| AtomicU32::new(0)).collect();
    let set = |range: IovaRange, from: u32, to: u32| {
        let first = range.start().get() / PAGE;
        for owner in &owners[first as usize..][..(range.len() / PAGE) as usize] {
            assert_eq!(owner.swap(to, Relaxed), from);
        }
    };
    let start = Barrier::new(THREADS as usize);
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| mpsc::channel::<IovaRange>()).unzip();
    let receivers: Vec<_> = receivers.into_iter().map(Mutex::new).collect();
    thread::scope(|scope| {
        for n in 0..THREADS {
            let (iova, set, start, receivers) = (&iova, &set, &start, &receivers);
            let neighbour = senders[(n as usize + 1) % THREADS as usize].clone();
            scope.spawn(move || {
                let me = n as u32 + 1;
                let mut live = Vec::new();
                start.wait();
                for round in 0..8000_u64 {
                    // Enough for the space to run out now and then, so that caches are dissolved under the others' feet.
                    let len = [1, 1, 2, 1, 3, 9, 1, 20, 70][((round * 7 + n) % 9) as usize];
                    if let Ok(range) = iova.allocate(len * PAGE, PAGE, TOP) {
                        set(range, 0, me);
                        live.push(range);
                    }
                    if live.len() > 60 || round % 3 == 0 && !live.is_empty() {
                        let range = live.swap_remove(round as usize % live.len());
                        set(range, me, 0);
                        if round % 2 == 0 { iova.free(range).unwrap() } else { neighbour.send(range).unwrap() }
                    }
                    let received = receivers[n as usize].lock().unwrap().try_recv();
                    if let Ok(range) = received {
                        iova.free(range).unwrap();
                    }
                }
                live.into_iter().for_each(|range| {
                    set(range, me, 0);
                    iova.free(range).unwrap();
                });
            });
        }
    });
    drop(senders);
    for receiver in &receivers {
        receiver.lock().unwrap().try_iter().for_each(|range| iova.free(range).unwrap());
    }
    assert_eq!(iova.allocate((total - 1) * PAGE, PAGE, TOP), Ok(pages(1, total - 1)), "all of it came back");
}

/// Ranges in the magazines of all cores.
fn in_magazines(iova: &IovaAllocator) -> usize {
    let all = iova.cores.iter().flat_map(|core| core.magazines.iter().filter_map(|cell| cell.get()));
    all.map(|magazine| magazine[0].lock().len()).sum()
}

fn recycle_all(iova: &IovaAllocator, ranges: impl IntoIterator<Item = IovaRange>) {
    ranges.into_iter().for_each(|range| iova.recycle(range).unwrap());
}

/// Red when ranges that come back together went to the floors below, and when they were kept in the order in which they came.
#[test]
fn what_comes_back_one_after_another_is_had_again_the_last_first_without_the_floors_below() {
    let iova = IovaAllocator::new(range(0, 1 << 40), PAGE).unwrap();
    for len in [1_u64, 2, 16, 33, 512] {
        let count = (4096 / len.next_power_of_two() as usize).min(100);
        let live: Vec<_> = (0..count).map(|_| iova.allocate(len * PAGE, PAGE, TOP).unwrap()).collect();
        iova.shared.lock().steps.set(0);
        recycle_all(&iova, live.iter().rev().copied());
        // To the caches it is as if nothing had come back.
        let chunks = iova.shared.lock().chunks;
        // The first is in front, and stays there.
        assert_eq!(in_magazines(&iova), count - 1, "of {len} pages");
        for range in live.last().into_iter().chain(&live[..count - 1]) {
            assert_eq!(iova.allocate(len * PAGE, PAGE, TOP), Ok(*range));
        }
        let tree = iova.shared.lock();
        assert_eq!((in_magazines(&iova), tree.chunks, tree.steps.get()), (0, chunks, 0));
    }
}

/// Red when each class was kept up to the same number.
#[test]
fn a_core_keeps_so_many_ranges_and_no_more_than_16_mib_of_a_class() {
    let iova = IovaAllocator::new(range(0, 1 << 40), PAGE).unwrap();
    for (len, most) in [(1, 128), (32, 128), (64, 64), (512, 8)] {
        let before = in_magazines(&iova);
        let live: Vec<_> = (0..200).map(|_| iova.allocate(len * PAGE, PAGE, TOP).unwrap()).collect();
        recycle_all(&iova, live);
        assert_eq!(in_magazines(&iova) - before, most, "of {len} pages");
    }
}

/// Red when only the newest was looked at, and when the oldest was taken.
#[test]
fn ranges_of_one_class_and_several_lengths_are_told_apart() {
    let iova = IovaAllocator::new(range(0, 1 << 40), PAGE).unwrap();
    let live: Vec<_> = (0..16).map(|n| iova.allocate((5 + n % 4) * PAGE, PAGE, TOP).unwrap()).collect();
    let too_long = iova.allocate(700 * PAGE, PAGE, TOP).unwrap();
    let in_front = iova.allocate(5 * PAGE, PAGE, TOP).unwrap();
    recycle_all(&iova, [in_front].into_iter().chain(live.iter().copied()));
    // One that is too long to be kept, and one that nobody has.
    assert_eq!(iova.recycle(too_long), Ok(()));
    assert_eq!(iova.recycle(pages(9_000_000, 600)), Err(IovaError::NotAllocated(pages(9_000_000, 600))));
    assert_eq!(in_magazines(&iova), 16);
    assert_eq!(iova.allocate(5 * PAGE, PAGE, TOP), Ok(in_front));
    // Not quite in the order in which they lie there.
    for n in (0..16_usize).rev().map(|n| n ^ 3) {
        assert_eq!(iova.allocate((5 + n as u64 % 4) * PAGE, PAGE, TOP), Ok(live[n]));
    }
    // An alignment and a limit that they do not have.
    recycle_all(&iova, live.iter().copied());
    let low = live.iter().map(|range| range.end().get()).min().unwrap();
    assert!(iova.allocate(5 * PAGE, PAGE, Iova::new(low - 2)).is_ok_and(|range| !live.contains(&range)));
    assert!(iova.allocate(5 * PAGE, 1 << 30, TOP).is_ok_and(|range| range.start().is_aligned(1 << 30)));
    assert_eq!(in_magazines(&iova), 15);
}

/// Red when what is kept was not given up.
#[test]
fn what_another_core_keeps_is_had_before_anything_fails() {
    let iova = IovaAllocator::new(range(0, 8 * PAGE), PAGE).unwrap();
    let live: Vec<_> = (1..8).map(|_| iova.allocate(PAGE, PAGE, TOP).unwrap()).collect();
    elsewhere(|| iova.recycle(live[2])).unwrap();
    assert_eq!(iova.allocate(PAGE, PAGE, TOP), Ok(live[2]));
    assert!(iova.allocate(PAGE, PAGE, TOP).is_err());
    elsewhere(|| iova.recycle(live[4])).unwrap();
    iova.recycle(live[5]).unwrap();
    let both = pages(5, 2);
    assert_eq!((live[4].start(), live[5].end()), (both.start(), both.end()));
    iova.reserve(both).unwrap();
    assert_eq!(iova.reserve(live[3]), Err(IovaError::InUse(live[3])));
}

#[test]
fn what_is_in_another_cores_magazines_is_had_before_anything_fails() {
    let iova = IovaAllocator::new(range(0, 64 * PAGE), PAGE).unwrap();
    let all = |len: u64| (0..63 / len).map(|_| iova.allocate(len * PAGE, PAGE, TOP).unwrap()).collect::<Vec<_>>();
    for len in [1, 3, 9] {
        let live = all(len);
        elsewhere(|| recycle_all(&iova, live.iter().copied()));
        assert_eq!(in_magazines(&iova), live.len() - 1);
        let again = all(len);
        assert_eq!(in_magazines(&iova), 0);
        again.into_iter().for_each(|range| iova.free(range).unwrap());
    }
    let live = all(1);
    elsewhere(|| recycle_all(&iova, live.iter().copied()));
    iova.reserve(pages(1, 63)).unwrap();
}

/// Red when what is kept was not given up before an allocation failed.
#[test]
fn cores_that_keep_and_take_never_have_the_same_range() {
    let iova = IovaAllocator::new(range(0, 64 * PAGE), PAGE).unwrap();
    let taken: Vec<_> = (0..64).map(|_| AtomicU32::new(0)).collect();
    let mark = |range: IovaRange, from, to| {
        for page in range.start().get() / PAGE..range.end().get() / PAGE {
            assert_eq!(taken[page as usize].swap(to, Relaxed), from, "page {page}");
        }
    };
    thread::scope(|scope| {
        for core in 0..4_u64 {
            let (iova, mark) = (&iova, &mark);
            scope.spawn(move || {
                for round in 0..4000 {
                    if round % 7 == 0 {
                        let many = (0..1 + round % 9).map_while(|_| iova.allocate(PAGE, PAGE, TOP).ok());
                        let many: Vec<_> = many.inspect(|range| mark(*range, 0, 1)).collect();
                        many.iter().for_each(|range| mark(*range, 1, 0));
                        recycle_all(iova, many);
                    }
                    // Now and then there is no room: what the others keep is given up under their hands.
                    let Ok(range) = iova.allocate((1 + (core + round) % 17) * PAGE, PAGE, TOP) else { continue };
                    mark(range, 0, 1);
                    mark(range, 1, 0);
                    if round % 5 == 0 { iova.free(range).unwrap() } else { iova.recycle(range).unwrap() }
                }
            });
        }
    });
    assert!(iova.allocate(63 * PAGE, PAGE, TOP).is_ok());
}
