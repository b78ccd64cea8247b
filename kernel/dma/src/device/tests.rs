//! Handles and counts of several cores.

use super::*;
use crate::buffer::Runs;
use crate::fakes::{FakeDevice, FakeSystem};
use crate::lent::Segment;
use crate::{FromDevice, Lent};
use alloc::sync::Weak;
use alloc::vec::Vec;
use base::cpu;
use std::sync::Barrier;
use std::thread;

/// A page lent to `device` by each of `N` threads that live at the same time, and so are cores of their own, with the core.
fn loans<const N: usize>(device: &Device) -> Vec<(usize, Mapped<FromDevice, Pages>)> {
    let barrier = Barrier::new(N);
    let lend = || {
        let mapped = device.map::<FromDevice, _>(device.pages(PAGE_SIZE).unwrap()).unwrap();
        barrier.wait();
        (cpu::index(), mapped)
    };
    thread::scope(|scope| {
        let threads = [(); N].map(|()| scope.spawn(lend));
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// What is there of a device: weakly, and its group.
fn disk() -> (Device, Weak<Records>, Arc<Group>) {
    let FakeDevice { device, group, .. } = FakeSystem::new().device("disk").unwrap();
    let records = Arc::downgrade(&device.0.records);
    (device, records, group)
}

fn page(device: &Device) -> Mapped<FromDevice, Pages> {
    device.map(device.pages(PAGE_SIZE).unwrap()).unwrap()
}

/// Caught: an owner more, or a hold more, for each loan that is made.
#[test]
fn loans_count_nothing_in_one_place_while_there_is_an_owner() {
    let (device, ..) = disk();
    drop(page(&device));
    let counts = || device.0.counts();
    let loans = loans::<4>(&device);
    // In a berth, and not.
    let more = [page(&device), page(&device)];
    assert_eq!(counts(), (1, 1));
    assert!(loans.iter().all(|(_, loan)| loan.device() == &device && device.check_loan(loan).is_ok()));
    let second = device.clone();
    assert_eq!(counts(), (2, 1));
    drop((loans, more, second));
    assert_eq!(counts(), (1, 1));
}

/// Each way in which a loan keeps its device: without a berth, in one, both on several cores; in each order of their ends.
///
/// Caught: a body that is left when its last owner goes, when the first loan ends, or never; loans in berths, or without, that are not
/// counted when it is closed, or all berths that are; tallies of the first core alone.
#[test]
fn loans_of_several_cores_each_keep_the_device() {
    for (berthed, rotate) in [(0, 0), (2, 0), (2, 3), (4, 1), (4, 5)] {
        let (device, records, group) = disk();
        let earlier: Vec<_> = (0..berthed).map(|_| page(&device)).collect();
        drop(earlier);
        let here: Vec<_> = (0..4).map(|_| page(&device)).collect();
        let mut loans: Vec<_> = loans::<4>(&device).into_iter().map(|(_, loan)| loan).chain(here).collect();
        loans.rotate_left(rotate);
        assert_eq!(device.stats().live_mappings, 8);
        drop(device);
        while loans.len() > 1 {
            // Some end on other cores.
            let loan = loans.pop();
            thread::scope(|scope| scope.spawn(|| drop(loan)).join().unwrap());
            assert_ne!(records.strong_count(), 0);
            assert_eq!(group.current(), AttachmentState::Default);
        }
        assert_eq!(loans[0].device().stats().live_mappings, 1);
        loans.clear();
        assert_eq!((records.strong_count(), group.current()), (0, AttachmentState::Blocked), "{berthed} {rotate}");
    }
}

/// Caught: an owner that comes back without a hold; a loan that begins in a closed tally without one; a body that is closed again.
#[test]
fn a_loans_handle_is_as_good_as_any_for_an_owner_and_for_another_loan() {
    let (device, records, group) = disk();
    drop(page(&device));
    let loans = [page(&device), page(&device)];
    drop(device);
    let handle = loans[0].device().clone();
    // Made beside loans that have been counted.
    let beside = page(loans[1].device());
    drop(loans);
    let another = page(&handle);
    drop((beside, handle));
    assert_ne!(records.strong_count(), 0);
    let handle = another.device().clone();
    drop(another);
    assert!(records.strong_count() != 0 && group.current() == AttachmentState::Default);
    let last = page(&handle);
    drop(handle);
    assert_ne!(records.strong_count(), 0);
    drop(last);
    assert_eq!((records.strong_count(), group.current()), (0, AttachmentState::Blocked));
}

/// Caught: a device that goes without a flush, which nobody would ask for any more; one where mappings lapse after that.
#[test]
fn what_has_lapsed_is_flushed_when_the_last_owner_goes_and_nothing_lapses_after_that() {
    let (device, records, group) = disk();
    drop([page(&device), page(&device)]);
    let [first, second] = [page(&device), page(&device)];
    let first = first.unmap_lazy();
    let lapses = !first.is_over();
    assert_eq!(lapses, !tracker::is_on());
    drop(device);
    assert!(first.is_over() && records.strong_count() != 0);
    assert!(second.unmap_lazy().is_over());
    assert_eq!((records.strong_count(), group.current()), (0, AttachmentState::Blocked));
    // The token needs no device.
    assert_eq!(first.try_take().unwrap().len(), PAGE_SIZE);
}

/// Caught: a loan of a device that nothing translates for which does not keep it.
#[test]
fn a_loan_keeps_a_device_that_nothing_translates_for() {
    let device = direct();
    let records = Arc::downgrade(&device.0.records);
    let loans = loans::<3>(&device);
    drop(device);
    for (_, loan) in loans {
        assert_ne!(records.strong_count(), 0);
        drop(loan);
    }
    assert_eq!(records.strong_count(), 0);
}

/// Threads that map, end and own while the others do: whoever is the last frees it, once.
///
/// Caught: a hold that is given up before the close has counted (no [`MANY`](super::body)).
#[test]
fn whoever_is_the_last_frees_the_device_once() {
    for _ in 0..200 {
        let (device, records, group) = disk();
        drop(page(&device));
        let barrier = Barrier::new(4);
        let spin = |own: Device, loan: Mapped<FromDevice, Pages>| {
            barrier.wait();
            let more = page(&own);
            drop(own);
            let again = more.device().clone();
            drop(loan);
            drop(page(&again));
            drop(again);
            drop(more);
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                let (own, loan) = (device.clone(), page(&device));
                let spin = &spin;
                scope.spawn(move || spin(own, loan));
            }
            drop(device);
        });
        assert_eq!((records.strong_count(), group.current()), (0, AttachmentState::Blocked));
    }
}

fn direct() -> Device {
    let system = FakeSystem::new();
    let windows = [BusWindow::identity()];
    let config =
        DirectConfig { name: "dma", windows: &windows, limits: Limits::NONE, coherent: true, memory: system.memory };
    // SAFETY: there is no such device, and so nothing that accesses memory.
    unsafe { Device::direct(config) }.unwrap()
}

/// Caught: a loan that is passed, and so has nothing that is freed at its end, when it has been narrowed.
#[test]
fn a_loan_that_is_narrowed_is_no_longer_passed() {
    if tracker::is_on() {
        // It records every loan.
        return;
    }
    let device = direct();
    let pages = device.pages(PAGE_SIZE).unwrap();
    let [run] = pages.phys_runs() else { panic!("one run") };
    let (site, reads) = (Location::caller(), Prot::READ);
    // SAFETY: there is no such device, and the pages outlive the loan.
    let lend = || unsafe { device.lend_quickly(Runs::One(*run), || 0, PAGE_SIZE, reads, |_| u64::MAX, site) };
    let mut loan = lend().unwrap_or_else(|_| panic!("nothing is special"));
    assert!(loan.is_passed());
    loan.narrow(Loan::room().unwrap(), 16, 32, None);
    assert!(!loan.is_passed() && loan.translated().is_none());
    let told = Segment { iova: Iova::new(run.start().get() + 16), len: 32 };
    assert_eq!((loan.segments(), device.stats().live_bytes), ([told].as_slice(), PAGE_SIZE));
    loan.finish(site);
    assert_eq!((device.stats().live_mappings, device.stats().live_bytes), (0, 0));
}

/// Caught: sums of the first core alone.
#[test]
fn what_begins_on_one_core_and_ends_on_another_is_counted_once() {
    let device = direct();
    let loans = loans::<4>(&device);
    let stats = device.stats();
    assert_eq!((stats.live_mappings, stats.live_bytes), (4, 4 * PAGE_SIZE));
    for (_, loan) in loans {
        loan.unmap().unwrap();
    }
    let stats = device.stats();
    assert_eq!((stats.live_mappings, stats.live_bytes), (0, 0));
    assert_eq!((stats.total_mappings, stats.total_bytes), (4, 4 * PAGE_SIZE));
}
