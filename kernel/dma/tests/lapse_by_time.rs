//! Flushes by time. A test program of its own: the clock's flush is one of all devices.

#![cfg(not(feature = "track"))] // Beside the tracker everything ends at once.

use base::Deadline;
use dma::fakes::FakeSystem;
use dma::{FromDevice, lazy};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

static SET: AtomicU32 = AtomicU32::new(0);

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

fn alarm(after: Duration) {
    assert_eq!(after, lazy::PERIOD);
    SET.fetch_add(1, Ordering::SeqCst);
}

/// Caught: no alarm, one for each flush, none after the first, none for another period, none where the clock calls during a flush;
/// `alarm_expired` that raises nothing.
#[test]
fn the_first_mapping_that_lapses_sets_the_alarm_and_the_alarm_flushes_all_devices() {
    let system = FakeSystem::new();
    let (a, b) = (system.device("a").unwrap(), system.device("b").unwrap());
    let map = |device: &dma::Device| device.map::<FromDevice, _>(device.pages(4096).unwrap()).unwrap();
    let lapse = |device: &dma::Device| {
        // The first two of a core end at once: they leave ranges for those that lapse.
        drop((map(device), map(device)));
        map(device).unmap_lazy()
    };
    // Without a clock somebody has to ask for it.
    let early = lapse(&a.device);
    assert!(!early.is_over());
    lazy::flush_all();
    assert!(early.is_over());
    let early = lapse(&a.device);
    a.device.flush(soon()).unwrap();
    drop(early);
    lazy::set_alarm(alarm);

    let elsewhere = std::thread::scope(|scope| scope.spawn(|| lapse(&a.device)).join().unwrap());
    let tokens = [lapse(&a.device), lapse(&a.device), lapse(&b.device), elsewhere];
    assert_eq!(SET.load(Ordering::SeqCst), 3, "once for each device and core");
    let start = system.iommu.revocations();
    assert!(tokens.iter().all(|token| !token.is_over()));
    lazy::alarm_expired();
    // The work is done by a core that waits.
    base::wait_until(soon(), || tokens.iter().all(|token| token.is_over())).unwrap();
    assert_eq!(system.iommu.revocations() - start, 3);
    let next = lapse(&a.device);
    assert_eq!(SET.load(Ordering::SeqCst), 4);
    drop(next);

    // The clock has not called back: what lapses after another flush is in time.
    a.device.flush(soon()).unwrap();
    let next = lapse(&a.device);
    assert_eq!(SET.load(Ordering::SeqCst), 4);

    // For another period it is told anew.
    a.device.flush(soon()).unwrap();
    lazy::set_period(lazy::PERIOD);
    drop((next, lapse(&a.device)));
    assert_eq!(SET.swap(4, Ordering::SeqCst), 5);
    a.device.flush(soon()).unwrap();
    let next = lapse(&a.device);
    assert_eq!(SET.load(Ordering::SeqCst), 4);

    // It calls while another flush is under way, which may have begun before the last one lapsed.
    let late = Arc::new(Mutex::new(None));
    let (of, kept) = (a.device.clone(), late.clone());
    system.iommu.on_revoke(move |_| {
        let mut kept = kept.lock().unwrap();
        if kept.is_none() {
            *kept = Some(map(&of).unmap_lazy());
            lazy::flush_all();
        }
    });
    a.device.flush(soon()).unwrap();
    let late = late.lock().unwrap().take().unwrap();
    assert!(next.is_over() && !late.is_over());
    assert_eq!(SET.load(Ordering::SeqCst), 5);
    lazy::flush_all();
    assert!(late.is_over());
}
