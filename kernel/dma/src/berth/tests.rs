//! Stacks that change between a look and an exchange.

use super::*;
use crate::fakes::{FakeDevice, FakeSystem};
use alloc::vec::Vec;
use iommu::{IovaRange, PAGE_SIZE};

fn berths() -> Arc<Berths> {
    let FakeDevice { domain, .. } = FakeSystem::new().device("disk").unwrap();
    Berths::new(domain, "disk".into()).unwrap()
}

/// Caught: an exchange that compares no more than which is the uppermost (no count of changes).
#[test]
fn a_stack_that_has_the_same_uppermost_again_is_not_the_same_stack() {
    let berths = berths();
    let vacant = &berths.vacant;
    let seen = berths.look(vacant).unwrap();
    let [first, second] = [(); 2].map(|()| berths.pop(vacant).unwrap());
    assert!(core::ptr::eq(first, seen.uppermost));
    // The second is somebody's, and the first is back.
    assert!(berths.push(vacant, first));
    assert!(!Berths::take_off(vacant, &seen), "the second would be on the stack again");
    assert!(core::ptr::eq(berths.pop(vacant).unwrap(), first));
    assert!(!core::ptr::eq(berths.pop(vacant).unwrap(), second));
}

/// Each once, in whatever order they come back.
#[test]
fn every_berth_is_on_the_stack_once() {
    let berths = berths();
    for _ in 0..2 {
        let mut all = Vec::new();
        while let Some(berth) = berths.pop(&berths.vacant) {
            all.push(berth);
        }
        let mut numbers: Vec<_> = all.iter().map(|berth| berth.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=COUNT as Number).collect::<Vec<_>>());
        all.into_iter().for_each(|berth| assert!(berths.push(&berths.vacant, berth)));
    }
}

/// Caught: what was ready before is lost; several sizes are put on one stack; a closed stack takes what is put there; what lapsed on another
/// core is ready here.
#[test]
fn what_ends_together_is_ready_in_its_order_above_what_was() {
    let (berths, core) = (berths(), cpu::index() + 1);
    let pages = |berth: &Berth, pages: u64| {
        let range = berths.domain.iova().allocate(pages * PAGE_SIZE, PAGE_SIZE, Iova::new(u64::MAX)).unwrap();
        berth.entry.assign(range);
        berth.class.store(class(range.len()) as u32, Relaxed);
    };
    let sizes = [1, 1, 2, 1, 2, 2, 2];
    let taken = sizes.map(|_| berths.pop(&berths.vacant).unwrap());
    taken.iter().zip(sizes).for_each(|(berth, size)| pages(berth, size));
    let end = || {
        let link = |below: Number, berth: &&Berth| {
            berth.next.store(below, Relaxed);
            berth.number
        };
        berths.end_all(taken.iter().rev().fold(0, link), core);
    };
    let ready = |pages: u64| {
        let stack = &berths.cores[core % SHARDS].ready[class(pages * PAGE_SIZE)];
        core::iter::from_fn(|| berths.pop(stack)).map(|berth| berth.number).collect::<Vec<_>>()
    };
    let numbers = |which: &[usize]| which.iter().map(|index| taken[*index].number).collect::<Vec<_>>();
    let lapses = taken.map(|berth| berth.lapses.load(Relaxed));
    end();
    assert_eq!(ready(1), numbers(&[3, 0, 1]));
    assert_eq!(ready(2), numbers(&[4, 5, 6, 2]));
    let once = |(berth, lapses): (&&Berth, u64)| berth.is_revoked(lapses) && !berth.is_revoked(lapses + 1);
    assert!(taken.iter().zip(lapses).all(once));
    berths.close();
    end();
    assert_eq!((ready(1), ready(2)), (vec![], vec![]));
    for berth in taken {
        let range = IovaRange::new(berth.entry.start(), berth.entry.bytes()).unwrap();
        assert!(berths.domain.iova().free(range).is_err(), "it has been given back");
    }
    let vacant = core::iter::from_fn(|| berths.pop(&berths.vacant)).count();
    assert_eq!(vacant, COUNT);
}

/// Caught: neighbours that are joined only as they go up, or as they go down; those of a full list.
#[test]
fn ranges_of_neighbours_are_one_whichever_way_they_go() {
    let berths = berths();
    let range = berths.domain.iova().allocate(16 * PAGE_SIZE, PAGE_SIZE, Iova::new(u64::MAX)).unwrap();
    let of = |pages: &[u64]| {
        let at = |page: &u64| {
            let berth = berths.berth(*page as Number + 1);
            let start = range.start().checked_add(page * PAGE_SIZE).unwrap();
            berth.entry.assign(IovaRange::new(start, PAGE_SIZE).unwrap());
            berth
        };
        let mut ranges = lapsing::Ranges::<2>::new();
        let fit = ranges.add(pages.iter().map(at));
        fit.then(|| ranges.as_slice().iter().map(|range| range.len() / PAGE_SIZE).collect::<Vec<_>>())
    };
    assert_eq!(of(&[3, 4, 5]), Some(vec![3]));
    assert_eq!(of(&[5, 4, 3]), Some(vec![3]));
    assert_eq!(of(&[4, 5, 3, 6, 9, 8]), Some(vec![4, 2]));
    assert_eq!(of(&[1, 3, 5]), None);
    assert_eq!(of(&[]), Some(vec![]));
}

/// Caught: a look at the word as it would be alone: one more than all but one that a closed stack has carries past what says that it is
/// closed.
#[test]
fn a_stack_that_was_closed_takes_nothing_however_many_are_there() {
    let berths = berths();
    for count in 0..crate::lazy::COUNT {
        let taken = berths.pop(&berths.vacant).unwrap().number;
        if count + 1 == crate::lazy::COUNT {
            berths.close_lapsed_of_this_core();
            assert!(berths.lapse(taken, PAGE_SIZE).is_none() && berths.lapse_slowly(taken, PAGE_SIZE).is_none());
            return;
        }
        assert!(berths.lapse(taken, PAGE_SIZE).or_else(|| berths.lapse_slowly(taken, PAGE_SIZE)).is_some());
    }
}

/// Caught: an array that is freed, or used again with what was in it; lapses that begin anew.
#[test]
fn a_berth_stays_what_it_is_when_its_device_is_gone() {
    let (berth, lapses) = {
        let berths = berths();
        let berth = berths.berth(berths.pop(&berths.vacant).unwrap().number);
        let range = berths.domain.iova().allocate(PAGE_SIZE, PAGE_SIZE, Iova::new(u64::MAX)).unwrap();
        berth.entry.assign(range);
        let lapses = berth.lapses.load(Relaxed);
        berth.next.store(0, Relaxed);
        berths.end_all(berth.number, cpu::index());
        (berth, lapses)
    };
    assert!(berth.is_revoked(lapses));
    // The array is some other device's, here or in another test, which knows nothing of what was there.
    for all in [(); 4].map(|()| berths()) {
        assert!(all.rented.berths.iter().all(|berth| berth.entry.ended_mapping().is_none() && berth.entry.uses() == 0));
        assert_eq!(core::iter::from_fn(|| all.pop(&all.vacant)).count(), COUNT);
    }
    assert!(berth.is_revoked(lapses));
}
