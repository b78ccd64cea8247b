//! Stacks that change between a look and an exchange.

use super::*;
use crate::fakes::{FakeDevice, FakeSystem};
use iommu::{IovaRange, PAGE_SIZE};

fn berths() -> Arc<Berths> {
    let FakeDevice { domain, .. } = FakeSystem::new().device("disk").unwrap();
    Berths::new(domain).unwrap()
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

/// Caught: a list of those that ended together which is put on a stack without what was there; one of several sizes; a closed stack.
#[test]
fn what_ends_together_is_ready_in_the_order_in_which_it_came_the_last_first() {
    let berths = berths();
    let pages = |berth: &Berth, pages: u64| {
        let range = berths.domain.iova().allocate(pages * PAGE_SIZE, PAGE_SIZE, Iova::new(u64::MAX)).unwrap();
        berth.entry.assign(range);
        berth.class.store(class(range.len()) as u32, Relaxed);
    };
    let sizes = [1, 1, 2, 1, 2, 2, 2];
    let taken = sizes.map(|_| berths.pop(&berths.vacant).unwrap());
    taken.iter().zip(sizes).for_each(|(berth, size)| pages(berth, size));
    let end = || {
        let mut ending = berths.end_many();
        taken.iter().for_each(|berth| ending.add(berth, berth.entry.start(), core::panic::Location::caller()));
    };
    let ready = |pages: u64| {
        let stack = berths.stack(pages * PAGE_SIZE);
        core::iter::from_fn(|| berths.pop(stack)).map(|berth| berth.number).collect::<Vec<_>>()
    };
    let numbers = |which: &[usize]| which.iter().map(|index| taken[*index].number).collect::<Vec<_>>();
    end();
    assert_eq!(ready(1), numbers(&[3, 1, 0]));
    assert_eq!(ready(2), numbers(&[6, 5, 4, 2]));
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
