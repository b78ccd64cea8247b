//! Events: told once, in words, and never lost without being counted.
//!
//! Seen red: EVENTQ_CONS not written; the queue not looked at again after EVENTQ_CONS was written; OVFLG not acknowledged; no
//! coalescing; coalescing by stream alone.

use super::super::Overflow;
use super::*;
use crate::Registers;
use crate::spec::registers::{self as reg};
use iommu::{Access, FaultReason};

#[test]
fn a_stopped_access_is_reported_with_who_where_what_and_why() {
    let rig = rig(Traits::NESTED);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), Prot::READ).unwrap();
    assert!(rig.model.device_read(id(8), Iova::new(0x5678), 4).is_err());
    assert!(rig.model.device_write(id(8), Iova::new(0x1004), 4).is_err());
    assert!(rig.model.device_write(id(0x1234), Iova::new(0x1004), 4).is_err());
    rig.interrupt();
    let fault = |stream, at: Option<u64>, access, reason, event| Fault {
        stream: id(stream),
        iova: at.map(Iova::new),
        access,
        reason,
        event,
    };
    assert_eq!(
        rig.log.take(),
        [
            fault(8, Some(0x5678), Some(Access::Read), FaultReason::NotMapped, "F_TRANSLATION"),
            fault(8, Some(0x1004), Some(Access::Write), FaultReason::Permission, "F_PERMISSION"),
            fault(0x1234, None, None, FaultReason::Blocked, "C_BAD_STREAMID"),
        ]
    );
    rig.model.assert_clean();
}

#[test]
fn a_thousand_records_of_one_dma_are_one_report() {
    let rig = rig(Traits::NESTED);
    let _space = rig.attached(8);
    rig.model.behave(|b| b.records = 100);
    for round in 0..5 {
        assert!(rig.model.device_read(id(8), Iova::new(0x5000 + round * 4), 4).is_err());
        assert!(rig.model.device_read(id(8), Iova::new(0x6000), 4).is_err());
        // 128 of the 200 records fit.
        rig.interrupt();
        assert_eq!(rig.log.take().len(), 2, "one for each page");
    }
    let statistics = rig.smmu.statistics();
    assert_eq!((statistics.events, statistics.coalesced_events), (5 * 128, 5 * 126));
    rig.model.assert_clean();
}

#[test]
fn an_overflow_is_counted_and_survived_however_it_is_told() {
    for overflow in [Overflow::Flag, Overflow::Abort] {
        let rig = rig(Traits::NESTED);
        let _space = rig.attached(8);
        for round in 1..=3 {
            rig.model.behave(|b| {
                b.records = 300;
                b.overflow = overflow;
            });
            assert!(rig.model.device_read(id(8), Iova::new(0x5000), 4).is_err());
            rig.interrupt();
            assert_eq!(rig.log.take().len(), 1);
            assert_eq!(rig.smmu.statistics().event_overflows, round);
            rig.model.behave(|b| b.records = 1);
            assert!(rig.model.device_read(id(8), Iova::new(0x7000), 4).is_err());
            rig.interrupt();
            assert_eq!(rig.log.take().len(), 1, "events are told again after the overflow");
        }
        rig.model.assert_clean();
    }
}

/// A sink that makes the device fault again while it is told of a fault: the queue is never seen empty by a handler that
/// looks once.
struct Again {
    model: Arc<Model>,
    left: Mutex<u32>,
}

impl FaultSink for Again {
    fn fault(&self, _: &Fault) {
        let mut left = self.left.lock().unwrap();
        if *left != 0 {
            *left -= 1;
            let _ = self.model.device_read(id(8), Iova::new(u64::from(*left) << 12), 4);
        }
    }
}

#[test]
fn events_that_arrive_while_others_are_served_are_not_left_behind() {
    for (count, backlog) in [(200, false), (100_000, false)] {
        let memory = ModelMemory::new();
        let model = Model::new(Traits::NESTED, memory);
        let sink = Arc::new(Again { model: Arc::clone(&model), left: Mutex::new(count) });
        let smmu = Smmu::new(Arc::clone(&model), memory, sink.clone(), patient()).unwrap();
        let space = smmu.create().unwrap();
        smmu.attach(id(8), &space).unwrap();
        let _ = model.device_read(id(8), Iova::new(0), 4);
        smmu.event_handler().handle();
        let empty = model.read32(reg::EVENTQ_PROD) == model.read32(reg::EVENTQ_CONS);
        assert_eq!((empty, smmu.has_backlog()), (!backlog, backlog));
        // The work of one call is bounded: a flood is cut off.
        let statistics = smmu.statistics();
        assert!(statistics.events <= 2 * 128 + 16 && statistics.events >= 200);
        model.assert_clean();
    }
}

#[test]
fn an_index_that_cannot_be_is_survived() {
    let rig = rig(Traits::NESTED);
    let _space = rig.attached(8);
    // The event queue's index runs away.
    rig.model.state.lock().regs.eventq_prod = 0xc5;
    rig.smmu.event_handler().handle();
    assert_eq!(rig.smmu.statistics().bad_indexes, 1);
    assert_eq!(rig.model.read32(reg::EVENTQ_CONS), 0xc5);
    assert!(rig.model.device_read(id(8), Iova::new(0x7000), 4).is_err());
    rig.interrupt();
    assert_eq!(rig.log.take().len(), 1);
}
