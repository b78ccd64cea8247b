//! Flushes by time. A test program of its own: the clock's flush is one of all devices.

use base::Deadline;
use dma::fakes::FakeSystem;
use dma::{FromDevice, lazy};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

static SET: AtomicU32 = AtomicU32::new(0);

fn alarm(after: Duration) {
    assert_eq!(after, lazy::PERIOD);
    SET.fetch_add(1, Ordering::SeqCst);
}

/// Caught: `push` that sets no alarm, and `alarm_expired` that raises nothing.
#[test]
fn the_first_mapping_that_lapses_sets_the_alarm_and_the_alarm_flushes_all_devices() {
    lazy::set_alarm(alarm);
    let system = FakeSystem::new();
    let (a, b) = (system.device("a").unwrap(), system.device("b").unwrap());
    let lapse = |device: &dma::Device| {
        let mapped = device.map::<FromDevice, _>(device.pages(4096).unwrap()).unwrap();
        mapped.unmap_lazy()
    };
    let elsewhere = std::thread::scope(|scope| scope.spawn(|| lapse(&a.device)).join().unwrap());
    let tokens = [lapse(&a.device), lapse(&a.device), lapse(&b.device), elsewhere];
    assert_eq!(SET.load(Ordering::SeqCst), 3, "once for each device and core");
    assert!(tokens.iter().all(|token| !token.is_over()));
    lazy::alarm_expired();
    // The work is done by a core that waits.
    base::wait_until(Deadline::after_millis(10_000), || tokens.iter().all(|token| token.is_over())).unwrap();
    assert_eq!(system.iommu.revocations(), 3);
    let next = lapse(&a.device);
    assert_eq!(SET.load(Ordering::SeqCst), 4);
    drop(next);
}
