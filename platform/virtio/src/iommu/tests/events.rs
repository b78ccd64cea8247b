//! Events of the device, sensible and not.
//!
//! Seen red, of floods: the queue not looked at again after the last event was handed on; a share without end; nobody
//! asked to come back; the mark not set, not taken away, not looked at; the deferred call that does not serve; buffers not given
//! back; the first buffer looked at first, whoever is next.

use super::{A, B, RW, Rig, id, iova, map, phys, started};
use crate::fakes::FakeDevice;
use crate::spec::iommu::{fault, queue, size};
use ::iommu::contract::Iommu;
use ::iommu::{Access, Fault, FaultReason, FaultSink, Iova, Prot};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::vec::Vec;

std::thread_local! {
    /// Calls that were asked for and not made.
    static ASKED: Cell<u32> = const { Cell::new(0) };
}

/// A device that answers each event that is told with the next one.
#[derive(Default)]
struct Flood {
    device: OnceLock<Arc<FakeDevice>>,
    told: AtomicU64,
    left: AtomicU64,
}

impl FaultSink for Flood {
    fn fault(&self, _: &Fault) {
        self.told.fetch_add(1, Ordering::Relaxed);
        let another = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        if another {
            assert!(self.device.get().unwrap().deliver(queue::EVENT, &event(fault::R_DOMAIN, 0, B, 0), 24));
        }
    }
}

fn event(reason: u8, flags: u32, endpoint: u32, address: u64) -> [u8; size::FAULT] {
    let mut bytes = [0; size::FAULT];
    bytes[0] = reason;
    bytes[fault::FLAGS..][..4].copy_from_slice(&flags.to_le_bytes());
    bytes[fault::ENDPOINT..][..4].copy_from_slice(&endpoint.to_le_bytes());
    bytes[fault::ADDRESS..][..8].copy_from_slice(&address.to_le_bytes());
    bytes
}

#[test]
fn a_stopped_access_is_said_in_words() {
    let (rig, driver) = started();
    let space = driver.create().unwrap();
    map(&space, iova(0x1000, 0x1000), &[phys(0x8000_0000, 0x1000)], Prot::READ).unwrap();
    map(&space, iova(0x2000, 0x1000), &[phys(0x8000_0000, 0x1000)], RW).unwrap();
    driver.attach(id(A), &space).unwrap();
    let (address, read, write) =
        (fault::F_ADDRESS, fault::F_ADDRESS | fault::F_READ, fault::F_ADDRESS | fault::F_WRITE);
    let cases = [
        (event(fault::R_MAPPING, address, A, 0x5678), A, Some(0x5678), None, FaultReason::NotMapped),
        (event(fault::R_MAPPING, read, A, 0x5678), A, Some(0x5678), Some(Access::Read), FaultReason::NotMapped),
        (event(fault::R_MAPPING, write, A, 0x1004), A, Some(0x1004), Some(Access::Write), FaultReason::Permission),
        (event(fault::R_MAPPING, address, A, 0x1004), A, Some(0x1004), None, FaultReason::Permission),
        (event(fault::R_MAPPING, write, A, 0x2004), A, Some(0x2004), Some(Access::Write), FaultReason::NotMapped),
        (event(fault::R_DOMAIN, address, B, 0x1000), B, Some(0x1000), None, FaultReason::Blocked),
        (event(fault::R_UNKNOWN, 0, 77, 0x1000), 77, None, None, FaultReason::Blocked),
        (event(fault::R_UNKNOWN, 0, A, 0x1000), A, None, None, FaultReason::Other),
    ];
    for (bytes, stream, at, access, reason) in cases {
        assert!(rig.device.deliver(queue::EVENT, &bytes, size::FAULT as u32));
        let [Fault { stream: who, iova, access: what, reason: why, .. }] = rig.faults()[..] else { panic!("not one") };
        assert_eq!((who, iova, what, why), (id(stream), at.map(Iova::new), access, reason), "{bytes:?}");
    }
}

#[test]
fn a_flood_is_handed_on_whole_and_in_order_and_buffers_do_not_run_out() {
    let (rig, driver) = started();
    for round in 0..1000_u64 {
        let bytes = event(fault::R_MAPPING, fault::F_ADDRESS, A, round << 12);
        assert!(rig.device.deliver(queue::EVENT, &bytes, size::FAULT as u32), "no buffer in round {round}");
    }
    let faults = rig.faults();
    assert!(faults.iter().map(|fault| fault.iova).eq((0..1000).map(|round| Some(Iova::new(round << 12)))));
    assert_eq!(driver.events().counts(), (1000, 0));
}

#[test]
fn a_flood_is_served_a_share_at_a_time_and_nothing_of_it_is_left() {
    /// The event queue of the fake device.
    const BUFFERS: u64 = 16;
    const ENDLESS: u64 = 1_000_000;
    ASKED.set(0);
    let rig = Rig::new(|_| {});
    let flood = Arc::new(Flood::default());
    let driver = rig.start_with_sink(flood.clone(), Some(|| ASKED.set(ASKED.get() + 1))).unwrap();
    // Its interrupts are given by hand.
    rig.device.disconnect();
    let _ = flood.device.set(rig.device.clone());
    let events = driver.events();
    let one = || rig.device.deliver(queue::EVENT, &event(fault::R_DOMAIN, 0, B, 0), 24);
    let interrupt = || base::irq::Handler::handle(&**events);
    let told = || flood.told.load(Ordering::Relaxed);
    for round in 1..=3 {
        let before = told();
        flood.left.store(ENDLESS, Ordering::Relaxed);
        assert!(one());
        interrupt();
        let share = told() - before;
        assert_eq!(share, BUFFERS, "events in one interrupt");
        assert_eq!((ASKED.get(), events.floods()), (1, 2 * round - 1), "somebody comes back");
        for _ in 0..10 {
            interrupt();
        }
        assert_eq!(told() - before, share, "interrupts of a flood do nothing");
        // It goes on, and so do the calls, each with its share.
        ASKED.set(0);
        events.serve_backlog();
        assert_eq!(told() - before - share, BUFFERS);
        assert_eq!((ASKED.replace(0), events.floods()), (1, 2 * round));
        // It ends: one call finds the last event, and interrupts serve again.
        flood.left.store(0, Ordering::Relaxed);
        let before = told();
        events.serve_backlog();
        assert_eq!((ASKED.get(), told()), (0, before + 1));
        assert!(one());
        interrupt();
        assert_eq!((ASKED.get(), told()), (0, before + 2));
        // A call that nobody needs does nothing.
        events.serve_backlog();
        assert_eq!(told(), before + 2);
    }
    assert_eq!(events.counts(), (told(), 0));
}

#[test]
fn events_that_came_together_are_handed_on_in_the_order_in_which_they_came() {
    let (rig, driver) = started();
    rig.device.disconnect();
    // Not a divisor of the number of buffers, so that every buffer is once the first.
    for round in 0..50_u64 {
        for event_of_round in 0..7 {
            let bytes = event(fault::R_MAPPING, fault::F_ADDRESS, A, (round << 16) + (event_of_round << 12));
            assert!(rig.device.deliver(queue::EVENT, &bytes, size::FAULT as u32));
        }
        driver.events().service();
        let faults = rig.faults();
        let expected = (0..7).map(|number| Some(Iova::new((round << 16) + (number << 12))));
        assert!(faults.iter().map(|fault| fault.iova).eq(expected), "round {round}: {faults:?}");
    }
}

#[test]
fn events_that_make_no_sense_are_counted_and_do_no_harm() {
    let (rig, driver) = started();
    let good = event(fault::R_MAPPING, fault::F_ADDRESS, A, 0x1000);
    for (bytes, len) in [(good, 0), (good, 23), (event(9, u32::MAX, u32::MAX, u64::MAX), 24), ([0xff; size::FAULT], 24)]
    {
        assert!(rig.device.deliver(queue::EVENT, &bytes, len));
    }
    assert_eq!((rig.faults(), driver.events().counts()), (Vec::new(), (0, 4)));
    // A claim to have written more than fits is cut.
    assert!(rig.device.deliver(queue::EVENT, &good, u32::MAX));
    assert_eq!((rig.faults().len(), driver.events().counts()), (1, (1, 4)));
}

#[test]
fn the_wired_interrupt_is_served_by_reading_why() {
    let (rig, driver) = started();
    let wire = driver.wired_handler().unwrap();
    wire.handle();
    assert!(rig.faults().is_empty());
    // With the vectors' handlers gone only the wire is left.
    rig.device.disconnect();
    assert!(rig.device.deliver(queue::EVENT, &event(fault::R_DOMAIN, 0, B, 0), size::FAULT as u32));
    assert!(rig.faults().is_empty());
    wire.handle();
    assert_eq!(rig.faults().len(), 1);
}

#[test]
fn answers_to_requests_raise_no_interrupt() {
    let (rig, driver) = started();
    let _ = crate::transport::Transport::interrupt_status(&*rig.device);
    let space = driver.create().unwrap();
    driver.attach(id(A), &space).unwrap();
    for round in 0..200_u64 {
        map(&space, iova(round << 12, 0x1000), &[phys(0x8000_0000, 0x1000)], RW).unwrap();
    }
    assert_eq!(crate::transport::Transport::interrupt_status(&*rig.device), 0);
}
