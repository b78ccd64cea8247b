//! The command queue: wrapping, filling up, errors, and producers in parallel.
//!
//! Seen red: a full queue overwritten; the wrap bit dropped; ERR not masked out of CMDQ_CONS; a refused command not replaced;
//! GERRORN not written; the positions of refused commands forgotten; a nonsensical index believed.

use super::super::Consumption;
use super::*;
use crate::spec::command::opcode;
use iommu::RevokeError;
use std::thread;

fn cycle(rig: &Rig, space: &Arc<dyn AddressSpace>, round: u64) -> Result<(), RevokeError> {
    let at = 0x10_0000 + (round % 64) * PAGE;
    map(space, iova(at, PAGE), ram(round * PAGE, PAGE), RW | Prot::PAGEWISE).unwrap();
    assert_eq!(rig.reads(8, at), Some(RAM + round * PAGE));
    space.revoke(&[iova(at, PAGE)])?;
    assert_eq!(rig.reads(8, at), None);
    Ok(())
}

#[test]
fn a_queue_of_eight_commands_serves_any_number_of_them() {
    for consumption in [Consumption::Immediate, Consumption::PerLook(1), Consumption::PerLook(3)] {
        let rig = rig(Traits::MINIMAL);
        rig.model.behave(|b| b.consumption = consumption);
        let space = rig.attached(8);
        for round in 0..100 {
            cycle(&rig, &space, round).unwrap();
        }
        // One batch of more commands than fit.
        let len = 100 * PAGE;
        map(&space, iova(0x20_0000, len), ram(0, len), RW | Prot::PAGEWISE).unwrap();
        space.revoke(&[iova(0x20_0000, len)]).unwrap();
        assert!(rig.model.paths_to(ram(0, len), &[id(8)]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn a_queue_that_stays_full_is_given_up_in_time() {
    let rig = rig_with(Traits::MINIMAL, hasty());
    let space = rig.attached(8);
    let len = 100 * PAGE;
    map(&space, iova(0x20_0000, len), ram(0, len), RW | Prot::PAGEWISE).unwrap();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    assert_eq!(space.revoke(&[iova(0x20_0000, len)]), Err(RevokeError::TimedOut));
    assert_eq!(space.translate(Iova::new(0x20_0000)), None, "the leaves are gone all the same");
    rig.model.assert_clean();
}

#[test]
fn a_refused_command_fails_its_own_batch_and_no_other() {
    for consumption in [Consumption::Immediate, Consumption::PerLook(1)] {
        let rig = rig(Traits::NESTED);
        rig.model.behave(|b| b.consumption = consumption);
        let space = rig.attached(8);
        for round in 0..30 {
            cycle(&rig, &space, 3 * round).unwrap();
            rig.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
            let at = 0x10_0000 + (3 * round + 1) % 64 * PAGE;
            map(&space, iova(at, PAGE), ram(PAGE, PAGE), RW | Prot::PAGEWISE).unwrap();
            assert_eq!(space.revoke(&[iova(at, PAGE)]), Err(RevokeError::Dead));
            cycle(&rig, &space, 3 * round + 2).unwrap();
        }
        assert_eq!(rig.smmu.statistics().refused_commands, 30);
        assert!(!rig.smmu.is_dead());
        rig.model.assert_clean();
    }
}

#[test]
fn a_refused_command_is_found_by_the_interrupt_too() {
    let rig = rig_with(Traits::NESTED, hasty());
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.model.behave(|b| {
        b.refuse = Some(opcode::TLBI_NH_VA as u8);
        b.consumption = Consumption::Stuck;
    });
    assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut));
    rig.model.run();
    assert!(rig.model.state.lock().interrupts.errors);
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.interrupt();
    assert!(!rig.smmu.is_dead());
    assert_eq!(rig.smmu.statistics().refused_commands, 1);
    rig.model.assert_clean();
}

#[test]
fn an_aborted_read_of_a_command_is_tried_again() {
    let rig = rig_with(Traits::NESTED, hasty());
    let space = rig.attached(8);
    rig.model.behave(|b| b.abort_fetches = 3);
    cycle(&rig, &space, 0).unwrap();
    assert_eq!(rig.smmu.statistics().command_fetch_aborts, 3);
    rig.model.behave(|b| b.abort_fetches = u32::MAX);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::Dead));
    assert!(rig.smmu.is_dead());
}

#[test]
fn an_index_that_cannot_be_is_not_believed() {
    let rig = rig_with(Traits::NESTED, hasty());
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    for lie in [0x1ff, 0xf_ffff] {
        rig.model.behave(|b| b.lie = Some(lie));
        assert!(space.revoke(&[iova(0x1000, PAGE)]).is_err(), "CMDQ_CONS {lie:#x} was believed");
    }
    assert!(rig.smmu.statistics().bad_indexes > 0);
}

#[test]
fn service_failure_mode_ends_all_promises() {
    let rig = rig(Traits::NESTED);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.model.raise(crate::spec::registers::Gerror::SFM_ERR);
    rig.interrupt();
    assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::Dead));
    rig.model.assert_clean();
}

#[test]
fn producers_in_parallel_each_get_what_they_asked_for() {
    for (traits, consumption) in [(Traits::NESTED, Consumption::Immediate), (Traits::MINIMAL, Consumption::PerLook(1))]
    {
        let rig = rig(traits);
        rig.model.behave(|b| b.consumption = consumption);
        thread::scope(|scope| {
            for thread in 0..4_u32 {
                let rig = &rig;
                scope.spawn(move || {
                    let space = rig.attached(thread);
                    for round in 0..50 {
                        let page = u64::from(thread) * 1000 + round;
                        let at = 0x10_0000 + (round % 8) * PAGE;
                        map(&space, iova(at, PAGE), ram(page * PAGE, PAGE), RW).unwrap();
                        assert_eq!(rig.reads(thread, at), Some(RAM + page * PAGE));
                        space.revoke(&[iova(at, PAGE)]).unwrap();
                        assert_eq!(rig.reads(thread, at), None);
                        if round % 10 == 9 {
                            rig.smmu.block(id(thread)).unwrap();
                            rig.smmu.attach(id(thread), &space).unwrap();
                        }
                    }
                });
            }
        });
        rig.model.assert_clean();
    }
}
