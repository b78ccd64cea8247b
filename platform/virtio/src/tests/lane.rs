//! Transfers in numbers.
//!
//! Seen to fail: `a_broken_disk_gets_no_loan_back_before_its_reset` when a lane gives up its loans with the queue's failure,
//! `a_lane_that_is_dropped_leaves_its_loans_with_the_queue` when its store is dropped with it, and
//! `what_is_in_no_lane_still_interrupts_beside_a_lane` when the interrupt handler leaves `used_event` as it is in any case.

use super::*;
use crate::blk::Lane;
use crate::fakes::Behaviour;
use crate::spec::feature;
use proptest::prelude::*;

fn lend(rig: &Rig, bytes: u64) -> Loan {
    rig.host.device.map(rig.pages(bytes)).unwrap()
}

fn bytes_of(loan: Loan, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    loan.unmap().unwrap().read_at(0, &mut bytes).unwrap();
    bytes
}

/// Takes all that there is, with what became of it.
fn take(lane: &mut Lane<'_, Loan>) -> Vec<(Loan, Result<(), Error>)> {
    let mut taken = Vec::new();
    lane.take(|loan, result| taken.push((loan, result))).unwrap();
    taken
}

#[test]
fn many_reads_take_one_doorbell_and_one_interrupt() {
    for indirect in [0, feature::INDIRECT_DESC] {
        let rig = Rig::new(64, |registers| registers.features &= !indirect);
        let block = rig.start(64).unwrap();
        let mut lane = block.lane::<Loan>().unwrap();
        rig.device.set_eager(false);
        for round in 0..5 {
            for sector in 0..16 {
                lane.read(sector, lend(&rig, 1024), 0..512).unwrap();
            }
            let before = block.stats();
            lane.kick();
            assert_eq!(block.stats().kicks, before.kicks + 1);
            // The wait is what asks for the interrupt, and finds that nothing is there yet.
            assert_eq!(lane.wait(16, now()), Err(Error::TimedOut));
            assert_eq!(rig.device.run(usize::MAX), 16);
            assert_eq!(block.stats().interrupts, before.interrupts + 1, "round {round}");
            lane.wait(16, now()).unwrap();
            for (sector, (loan, result)) in (0..).zip(take(&mut lane)) {
                result.unwrap();
                assert_eq!(bytes_of(loan, 512), expected(sector, 512));
            }
            assert_eq!(lane.in_flight(), 0);
        }
        drop(lane);
        block.shut_down(soon()).unwrap();
        assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}

#[test]
fn writes_reach_the_disk_and_errors_their_own_request() {
    let rig = Rig::new(64, |_| ());
    let block = rig.start(16).unwrap();
    let mut lane = block.lane::<Loan>().unwrap();
    let mut pages = rig.pages(512);
    pages.write_at(0, &[0x5a; 512]).unwrap();
    lane.write(7, rig.host.device.map(pages).unwrap(), 0..512).unwrap();
    lane.kick();
    lane.wait(1, soon()).unwrap();
    let (_, result) = take(&mut lane).remove(0);
    result.unwrap();
    assert_eq!(rig.disk.bytes(7 * 512, 512), [0x5a; 512]);
    rig.device.plan(&[Behaviour::Length(3)]);
    lane.read(0, lend(&rig, 512), 0..512).unwrap();
    lane.read(1, lend(&rig, 512), 0..512).unwrap();
    lane.kick();
    lane.wait(2, soon()).unwrap();
    let results: Vec<_> = take(&mut lane).into_iter().map(|(_, result)| result).collect();
    assert_eq!(results, [Err(Error::ShortAnswer { expected: 513, found: 3 }), Ok(())]);
    rig.check();
}

#[test]
fn what_is_refused_comes_back_with_the_reason() {
    let rig = Rig::new(64, |_| ());
    let other = rig.system.device("other").unwrap();
    let block = rig.start(4).unwrap();
    let mut lane = block.lane::<Loan>().unwrap();
    let mut refused = |loan: Loan, sector, range| {
        let refused = lane.read(sector, loan, range).unwrap_err();
        drop(refused.loan.unmap().unwrap());
        refused.error
    };
    assert!(matches!(refused(lend(&rig, 512), 64, 0..512), Error::OutsideDisk { .. }));
    assert!(matches!(refused(lend(&rig, 512), 0, 0..100), Error::Misaligned { .. }));
    assert!(matches!(refused(lend(&rig, 512), 0, 0..0), Error::Misaligned { .. }));
    assert!(matches!(refused(lend(&rig, 4096), 0, 0..8192), Error::OutsideLoan { .. }));
    assert!(matches!(refused(other.device.map(rig.pages(512)).unwrap(), 0, 0..512), Error::ForeignDevice));
    rig.device.set_eager(false);
    for _ in 0..4 {
        lane.read(0, lend(&rig, 512), 0..512).unwrap();
    }
    assert_eq!(lane.read(0, lend(&rig, 512), 0..512).unwrap_err().error, Error::QueueFull);
    drop(lane);
    block.shut_down(soon()).unwrap();
    assert_eq!(rig.host.device.stats().live_mappings, 0);
    rig.check();
}

#[test]
fn a_lane_that_is_dropped_leaves_its_loans_with_the_queue() {
    let rig = Rig::new(64, |_| ());
    let block = rig.start(16).unwrap();
    let mut lane = block.lane::<Loan>().unwrap();
    rig.device.plan(&[Behaviour::Honest, Behaviour::Keep, Behaviour::Keep]);
    for sector in 0..3 {
        lane.read(sector, lend(&rig, 512), 0..512).unwrap();
    }
    lane.kick();
    drop(lane);
    assert_eq!(rig.host.device.stats().live_mappings - LIVE_OF_QUEUE, 3);
    rig.device.release(0);
    block.flush().unwrap().wait(soon()).unwrap();
    assert_eq!(rig.host.device.stats().live_mappings - LIVE_OF_QUEUE, 3, "one is still with the disk");
    rig.device.release(0);
    block.flush().unwrap().wait(soon()).unwrap();
    assert_eq!(rig.host.device.stats().live_mappings, LIVE_OF_QUEUE);
    let again = block.lane::<Loan>().unwrap();
    drop(again);
    block.shut_down(soon()).unwrap();
    assert_eq!(rig.host.device.stats().live_mappings, 0);
    rig.check();
}

/// What the queue of a disk has lent for itself: three areas, and the slots' memory.
const LIVE_OF_QUEUE: u64 = 4;

#[test]
fn a_broken_disk_gets_no_loan_back_before_its_reset() {
    for behaviour in [Behaviour::WrongId(9), Behaviour::Twice, Behaviour::Jump(100), Behaviour::NeedReset] {
        let rig = Rig::new(64, |_| ());
        let block = rig.start(16).unwrap();
        let mut lane = block.lane::<Loan>().unwrap();
        rig.device.plan(&[Behaviour::Keep, behaviour]);
        lane.read(0, lend(&rig, 512), 0..512).unwrap();
        lane.read(1, lend(&rig, 512), 0..512).unwrap();
        lane.kick();
        let error = lane.wait(2, soon()).unwrap_err();
        assert!(matches!(error, Error::DeviceMisbehaved { .. } | Error::NeedsReset), "{behaviour:?}: {error}");
        let mut came = 0;
        // A request that was returned properly before the rules were broken comes back; the other does not.
        drop(lane.take(|_, _| came += 1));
        assert_eq!(came, usize::from(behaviour == Behaviour::Twice), "{behaviour:?}");
        while rig.device.release(0) {}
        assert!(lane.take(|_, _| came += 10).is_err());
        assert!(came < 2);
        let refused = lane.read(2, lend(&rig, 512), 0..512).unwrap_err();
        assert_eq!(refused.error, error);
        drop(refused);
        assert_eq!(rig.host.device.stats().live_mappings - LIVE_OF_QUEUE, 2 - came as u64, "{behaviour:?}");
        drop(lane);
        assert_eq!(rig.host.device.stats().live_mappings - LIVE_OF_QUEUE, 2 - came as u64, "it is the queue's now");
        block.shut_down(soon()).unwrap();
        assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}

#[test]
fn what_is_in_no_lane_still_interrupts_beside_a_lane() {
    let rig = Rig::new(64, |_| ());
    let block = rig.start(64).unwrap();
    let mut lane = block.lane::<Loan>().unwrap();
    rig.device.set_eager(false);
    // Alone, the lane asks for silence until all of its requests are there.
    for sector in 0..8 {
        lane.read(sector, lend(&rig, 512), 0..512).unwrap();
    }
    lane.kick();
    assert_eq!(lane.wait(8, now()), Err(Error::TimedOut));
    let single = rig.lend(512);
    let transfer = block.read(9, &single, 0..512).unwrap();
    let before = block.stats().interrupts;
    rig.device.run(1);
    assert_eq!(block.stats().interrupts, before + 1);
    rig.device.run(usize::MAX);
    assert!(transfer.is_over());
    assert!(block.stats().interrupts >= before + 9);
    drop(transfer);
    take_back(single);
    assert_eq!(take(&mut lane).len(), 8);
    rig.check();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_lane_loses_and_mixes_up_nothing_in_whatever_order_a_disk_answers(
        steps in prop::collection::vec((0_u64..60, prop::bool::ANY, 0_usize..8), 1..60),
        indirect: bool,
        event_idx: bool,
    ) {
        let without = if indirect { 0 } else { feature::INDIRECT_DESC } | if event_idx { 0 } else { feature::EVENT_IDX };
        let rig = Rig::new(64, |registers| registers.features &= !without);
        let block = rig.start(16).unwrap();
        let mut lane = block.lane::<Loan>().unwrap();
        let mut sectors = std::collections::BTreeMap::new();
        let check = |lane: &mut Lane<'_, Loan>, sectors: &mut std::collections::BTreeMap<u64, u64>| {
            lane.take(|loan, result| {
                result.unwrap();
                let sector = sectors.remove(&loan.iova().get()).expect("a loan that was given");
                assert_eq!(bytes_of(loan, 1024), expected(sector, 1024));
            }).unwrap()
        };
        for (sector, keep, release) in steps {
            rig.device.plan(&[if keep { Behaviour::Keep } else { Behaviour::Honest }]);
            let loan = lend(&rig, 1024);
            let iova = loan.iova().get();
            match lane.read(sector, loan, 0..1024) {
                Ok(()) => drop(sectors.insert(iova, sector)),
                Err(refused) => {
                    prop_assert_eq!(&refused.error, &Error::QueueFull);
                    // The plan is for the request that was refused; have something else use it up.
                    while rig.device.release(0) {}
                    check(&mut lane, &mut sectors);
                    drop(block.flush().unwrap());
                    while rig.device.release(0) {}
                }
            }
            lane.kick();
            if release < 3 {
                rig.device.release(release);
                check(&mut lane, &mut sectors);
            }
        }
        while rig.device.release(0) {}
        lane.wait(usize::MAX, soon()).unwrap();
        check(&mut lane, &mut sectors);
        prop_assert!(sectors.is_empty());
        prop_assert_eq!(lane.in_flight(), 0);
        drop(lane);
        block.shut_down(soon()).unwrap();
        prop_assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}
