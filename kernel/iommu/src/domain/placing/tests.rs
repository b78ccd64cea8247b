//! Seen red: a revocation under way that is not waited for.

use super::*;
use crate::Iova;
use core::sync::atomic::AtomicBool;
use proptest::prelude::*;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

#[test]
fn one_maps_at_a_time() {
    let placing = Placing::new();
    let inside = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..2000 {
                    let turn = placing.begin(range(0x1000, 0x1000)).unwrap();
                    assert!(!inside.swap(true, SeqCst));
                    inside.store(false, SeqCst);
                    turn.mapped(range(0x1000, 0x1000)).unwrap();
                }
            });
        }
    });
}

#[test]
fn a_mapping_where_a_revocation_is_under_way_counts_when_that_is_complete() {
    let (placing, complete) = (Placing::new(), AtomicBool::new(false));
    let old = range(0x40_0000, 0x20_0000);
    let revoking = placing.revoke(old);
    thread::scope(|scope| {
        let (ready, is_ready) = mpsc::channel();
        let (placing, complete) = (&placing, &complete);
        scope.spawn(move || {
            // Beside it there is nothing to wait for.
            let beside = range(0x60_0000, 0x1000);
            placing.begin(beside).unwrap().mapped(beside).unwrap();
            assert!(!complete.load(SeqCst));
            let within = range(0x5f_f000, 0x1000);
            let turn = placing.begin(within).unwrap();
            ready.send(()).unwrap();
            turn.mapped(within).unwrap();
            assert!(complete.load(SeqCst), "it did not wait");
        });
        is_ready.recv().unwrap();
        // So that one which does not wait is seen not to; whoever does may take as long.
        thread::sleep(Duration::from_millis(20));
        complete.store(true, SeqCst);
        revoking.succeeded();
    });
}

#[test]
fn what_was_lost_is_never_used_again_and_the_rest_is() {
    let placing = Placing::new();
    let lost = range(0x2000, 0x2000);
    drop(placing.revoke(lost));
    assert_eq!(placing.begin(range(0x3000, 0x4000)).err(), Some(IovaError::InUse(range(0x3000, 0x4000))));
    let beside = range(0x4000, 0x1000);
    placing.begin(beside).unwrap().mapped(beside).unwrap();
    let again = range(0x4000, 0x1000);
    placing.revoke(again).succeeded();
    placing.begin(again).unwrap().mapped(again).unwrap();
}

#[test]
fn more_revocations_than_words_are_all_made() {
    let placing = Placing::new();
    let first: Vec<_> = (0..SLOTS as u64).map(|i| placing.revoke(range((i + 1) << 20, 0x1000))).collect();
    thread::scope(|scope| {
        let other = scope.spawn(|| placing.revoke(range(1 << 30, 0x1000)).succeeded());
        first.into_iter().for_each(Revoking::succeeded);
        other.join().unwrap();
    });
    assert!(placing.revoking.iter().all(|slot| slot.load(Relaxed) == 0));
}

proptest! {
    #[test]
    fn a_word_reaches_as_far_as_its_range_and_no_words_cancel_out(
        start in 1_u64..(1 << 40), pages in 1_u64..(1 << 30), at in 0_u64..(1 << 41), len in 1_u64..(1 << 20),
        words in prop::collection::vec((1_u64..(1 << 52), 1_u64..(1 << 40)), 0..=SLOTS),
    ) {
        let (mine, other) = (range(start << 12, pages << 12), range(at << 12, len << 12));
        if mine.overlaps(other) {
            prop_assert!(overlaps(word(mine), other));
        }
        prop_assert!(overlaps(word(mine), range(mine.end().get() - 0x1000, 0x1000)));
        let sum = words.iter().filter_map(|(start, pages)| IovaRange::new(Iova::new(start << 12), pages << 12));
        let (count, sum) = sum.fold((0, 0_u64), |(count, sum), range| (count + 1, sum.wrapping_add(word(range))));
        prop_assert_eq!(count == 0, sum == 0);
    }
}
