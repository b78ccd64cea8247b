//! Handles and counts of several cores.

use super::*;
use crate::fakes::{FakeDevice, FakeSystem};
use crate::{FromDevice, Lent};
use alloc::vec::Vec;
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

/// Caught: a loan that counts with its owner's handles; a comparison of what is counted in place of the device; a shard that keeps
/// nothing alive but itself does not compile.
#[test]
fn loans_of_several_cores_count_apart_and_each_keeps_the_device() {
    let FakeDevice { device, group, .. } = FakeSystem::new().device("disk").unwrap();
    let inner = Arc::downgrade(&device.0.inner);
    let mut loans = loans::<4>(&device);
    for (core, loan) in &loans {
        assert!(loan.device() == &device && device.check_loan(loan).is_ok());
        match &device.0.others[core % SHARDS] {
            // At least: other tests' threads may have the same core's number before and after.
            Some(own) => assert!(Arc::strong_count(own) >= 2 && Arc::ptr_eq(own, &loan.device().0)),
            None => assert!(Arc::ptr_eq(&device.0, &loan.device().0)),
        }
    }
    assert_eq!(device.stats().live_mappings, 4);
    drop(device);
    loans.truncate(1);
    assert_ne!(inner.strong_count(), 0);
    // A loan's handle of whatever core is as good as any for another loan.
    let handle = loans[0].1.device().clone();
    drop(loans);
    let another = handle.map::<FromDevice, _>(handle.pages(PAGE_SIZE).unwrap()).unwrap();
    drop(handle);
    assert!(inner.strong_count() != 0 && group.current() == AttachmentState::Default);
    drop(another);
    assert_eq!((inner.strong_count(), group.current()), (0, AttachmentState::Blocked));
}

/// Caught: sums of the first core alone.
#[test]
fn what_begins_on_one_core_and_ends_on_another_is_counted_once() {
    let system = FakeSystem::new();
    let windows = [BusWindow::identity()];
    let config =
        DirectConfig { name: "dma", windows: &windows, limits: Limits::NONE, coherent: true, memory: system.memory };
    // SAFETY: there is no such device, and so nothing that accesses memory.
    let device = unsafe { Device::direct(config) }.unwrap();
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
