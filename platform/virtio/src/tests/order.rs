//! Random programs: requests are submitted, returned, waited for and dropped in any order, by devices of any character.

use super::*;
use crate::blk::Transfer;
use crate::fakes::Behaviour;
use crate::spec::feature;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Step {
    /// Reads a sector; the device does this with it.
    Read(u64, Behaviour),
    /// The device returns one that it kept.
    Release(usize),
    /// Waits for one without patience.
    Wait(usize),
    /// Drops one.
    Drop(usize),
}

fn honest() -> impl Strategy<Value = Behaviour> {
    prop_oneof![Just(Behaviour::Honest), Just(Behaviour::Keep)]
}

pub fn any_behaviour() -> impl Strategy<Value = Behaviour> {
    prop_oneof![
        8 => honest(),
        1 => Just(Behaviour::Swallow),
        1 => (0_u32..20).prop_map(Behaviour::WrongId),
        1 => Just(Behaviour::Twice),
        1 => any::<u32>().prop_map(Behaviour::Length),
        1 => any::<u16>().prop_map(Behaviour::Jump),
        1 => any::<u32>().prop_map(Behaviour::Ignore),
        1 => Just(Behaviour::NeedReset),
        1 => Just(Behaviour::ResetItself),
        1 => Just(Behaviour::Scribble),
    ]
}

fn program(behaviour: impl Strategy<Value = Behaviour>) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0_u64..60, behaviour).prop_map(|(sector, behaviour)| Step::Read(sector, behaviour)),
        2 => any::<usize>().prop_map(Step::Release),
        2 => any::<usize>().prop_map(Step::Wait),
        1 => any::<usize>().prop_map(Step::Drop),
    ];
    proptest::collection::vec(step, 1..60)
}

struct Pending {
    sector: u64,
    loan: Arc<Loan>,
    transfer: Transfer,
}

fn remove(pending: &mut BTreeMap<u32, Pending>, index: usize) -> Option<Pending> {
    let key = *pending.keys().nth(index % pending.len().max(1))?;
    pending.remove(&key)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn an_honest_device_that_answers_in_any_order_loses_and_mixes_up_nothing(
        steps in program(honest()),
        indirect: bool,
        event_idx: bool,
    ) {
        let without = if indirect { 0 } else { feature::INDIRECT_DESC } | if event_idx { 0 } else { feature::EVENT_IDX };
        let rig = Rig::new(64, |registers| registers.features &= !without);
        let block = rig.start(8).unwrap();
        let mut pending = BTreeMap::new();
        for (number, step) in (0_u32..).zip(steps) {
            match step {
                Step::Read(sector, behaviour) => {
                    let loan = rig.lend(1024);
                    rig.device.plan(&[behaviour]);
                    match block.read(sector, &loan, 0..1024) {
                        Ok(transfer) => drop(pending.insert(number, Pending { sector, loan, transfer })),
                        Err(Error::QueueFull) => {
                            // The plan is for the request that was refused; have something else use it up.
                            while rig.device.release(0) {}
                            pending.values_mut().for_each(|one| one.transfer.wait(soon()).unwrap());
                            for (_, one) in core::mem::take(&mut pending) {
                                prop_assert_eq!(&take_back(one.loan)[..1024], &expected(one.sector, 1024)[..]);
                            }
                            drop(block.flush().unwrap());
                            while rig.device.release(0) {}
                        }
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Step::Release(index) => drop(rig.device.release(index)),
                Step::Wait(index) => if let Some(mut one) = remove(&mut pending, index) {
                    match one.transfer.wait(now()) {
                        Ok(()) => prop_assert_eq!(&take_back(one.loan)[..1024], &expected(one.sector, 1024)[..]),
                        Err(Error::TimedOut) => {
                            prop_assert_eq!(Arc::strong_count(&one.loan), 2);
                            pending.insert(number, one);
                        }
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                },
                Step::Drop(index) => drop(remove(&mut pending, index)),
            }
        }
        while rig.device.release(0) {}
        for (_, mut one) in pending {
            one.transfer.wait(soon()).unwrap();
            prop_assert_eq!(&take_back(one.loan)[..1024], &expected(one.sector, 1024)[..]);
        }
        block.flush().unwrap().wait(soon()).unwrap();
        let stats = block.stats();
        prop_assert_eq!(stats.submitted, stats.completed);
        block.shut_down(soon()).unwrap();
        prop_assert_eq!(rig.host.device.stats().live_mappings, 0);
        prop_assert_eq!(rig.system.iommu.faults(), []);
        rig.check();
    }

    #[test]
    fn a_hostile_device_gets_typed_errors_out_of_the_driver_and_no_loan_early(
        steps in program(any_behaviour()),
        indirect: bool,
    ) {
        let without = if indirect { 0 } else { feature::INDIRECT_DESC };
        let rig = Rig::new(64, |registers| registers.features &= !without);
        let block = rig.start(8).unwrap();
        let mut pending = BTreeMap::new();
        let mut loans = Vec::new();
        for (number, step) in (0_u32..).zip(steps) {
            match step {
                Step::Read(sector, behaviour) => {
                    let loan = rig.lend(1024);
                    rig.device.plan(&[behaviour]);
                    if let Ok(transfer) = block.read(sector, &loan, 0..1024) {
                        pending.insert(number, Pending { sector, loan, transfer });
                    } else {
                        prop_assert_eq!(Arc::strong_count(&loan), 1);
                    }
                }
                Step::Release(index) => drop(rig.device.release(index)),
                Step::Wait(index) => if let Some(mut one) = remove(&mut pending, index) {
                    let held = Arc::strong_count(&one.loan);
                    prop_assert_eq!(held, 2, "only taking the result ends the loan");
                    match one.transfer.wait(now()) {
                        Err(Error::TimedOut) => drop(pending.insert(number, one)),
                        _ => loans.push(one.loan),
                    }
                },
                Step::Drop(index) => if let Some(one) = remove(&mut pending, index) {
                    loans.push(one.loan);
                },
            }
        }
        for one in pending.values() {
            prop_assert_eq!(Arc::strong_count(&one.loan), 2);
        }
        block.shut_down(soon()).unwrap();
        for (_, mut one) in pending {
            prop_assert!(one.transfer.wait(now()).is_err() || one.sector < 64);
            loans.push(one.loan);
        }
        for loan in loans {
            take_back(loan);
        }
        prop_assert_eq!(rig.host.device.stats().live_mappings, 0);
        rig.check();
    }
}
