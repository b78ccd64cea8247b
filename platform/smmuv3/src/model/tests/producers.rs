//! Many producers, every way of completion, and errors in between.
//!
//! Seen red: the message's tag of another position; the message not believed; the message believed alone (a timeout when it is
//! lost); a CMD_ATC_INV that was not answered forgotten, and taken for everybody's; Service Failure Mode looked for in the
//! interrupt only; the queue not opened again (a timeout); opened although the SMMU had failed; the position of a refused command
//! one too high, and one too low; no bell when a dead queue revives.

use super::super::Consumption;
use super::*;
use crate::Completion;
use crate::spec::command::{Command, TlbiRange, opcode};
use crate::spec::registers::{Gerror, idr0};
use core::sync::atomic::{AtomicU32, Ordering};
use iommu::RevokeError;
use std::string::ToString;
use std::thread;

const THREADS: u32 = 8;

fn with_message(traits: Traits) -> Traits {
    Traits { idr0: traits.idr0 | idr0::MSI.mask() as u32, ..traits }
}

fn with_event(traits: Traits) -> Traits {
    Traits { idr0: traits.idr0 | idr0::SEV.mask() as u32, ..traits }
}

/// A queue of eight commands.
fn short(traits: Traits) -> Traits {
    Traits { idr1: traits.idr1 & !(0x1f << 21) | 3 << 21, ..traits }
}

fn with_ats(traits: Traits) -> Traits {
    Traits { idr0: traits.idr0 | idr0::ATS.mask() as u32, ..traits }
}

/// Maps and revokes on `THREADS` threads at once, and says how many revocations failed. With `errors`, the SMMU is made to refuse
/// the next invalidation, and to abort reads, before each revocation of the first thread.
fn hammer(rig: &Rig, rounds: u64, errors: bool) -> u32 {
    let failures = AtomicU32::new(0);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let failures = &failures;
            scope.spawn(move || {
                let space = rig.attached(thread);
                for round in 0..rounds {
                    let page = u64::from(thread) * 10_000 + round * 20;
                    let at = 0x10_0000 + (round % 8) * 0x10_0000;
                    let len = (1 + round % 13) * PAGE;
                    map(&space, iova(at, len), ram(page * PAGE, len), RW | Prot::PAGEWISE).unwrap();
                    assert_eq!(rig.reads(thread, at), Some(RAM + page * PAGE));
                    if errors && thread == 0 {
                        rig.model.behave(|b| {
                            b.refuse = Some(opcode::TLBI_NH_VA as u8);
                            b.abort_fetches = 2;
                        });
                    }
                    match space.revoke(&[iova(at, len)]) {
                        Ok(()) => assert_eq!(rig.reads(thread, at), None),
                        Err(RevokeError::Dead) if errors => {
                            failures.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    failures.into_inner()
}

#[test]
fn the_best_way_of_completion_that_there_is_is_used() {
    let nested = Traits::NESTED;
    let incoherent = |traits: Traits| Traits { idr0: traits.idr0 & !(idr0::COHACC.mask() as u32), ..traits };
    for (traits, completion) in [
        (nested, Completion::Poll),
        (with_event(nested), Completion::Event),
        (with_message(nested), Completion::Message),
        (with_message(with_event(nested)), Completion::Message),
        (with_message(incoherent(nested)), Completion::Poll),
        (with_message(with_event(incoherent(nested))), Completion::Event),
    ] {
        assert_eq!(rig(traits).smmu.completion(), completion);
    }
}

#[test]
fn eight_producers_on_a_queue_of_eight_commands_all_get_through() {
    for traits in [Traits::NESTED, with_message(Traits::NESTED), with_event(Traits::NESTED), Traits::MINIMAL] {
        for consumption in [Consumption::Immediate, Consumption::PerLook(1)] {
            let rig = rig(short(traits));
            rig.model.behave(|b| b.consumption = consumption);
            hammer(&rig, 40, false);
            rig.model.assert_clean();
        }
    }
}

#[test]
fn a_message_that_is_lost_costs_time_and_nothing_else() {
    let rig = rig(with_message(Traits::NESTED));
    rig.model.behave(|b| b.lose_messages = true);
    hammer(&rig, 20, false);
    rig.interrupt();
    assert!(rig.smmu.statistics().other_global_errors > 0, "it is counted");
    rig.model.assert_clean();
}

#[test]
fn a_completion_by_message_needs_no_look_at_the_registers() {
    let rig = rig(with_message(Traits::NESTED));
    let space = rig.attached(8);
    // CMDQ_CONS is frozen, the memory tells the truth.
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    let now = rig.model.state.lock().regs.cmdq_cons;
    rig.model.behave(|b| b.lie = Some(now));
    for _ in 0..50 {
        space.revoke(&[iova(0x1000, PAGE)]).unwrap();
        map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    }
    rig.model.behave(|b| b.lie = None);
    assert_eq!(rig.smmu.statistics().sync_timeouts, 0);
    rig.model.assert_clean();
}

#[test]
fn errors_at_commands_of_many_producers_fail_as_many_batches_and_no_more() {
    for traits in [short(Traits::NESTED), with_message(Traits::NESTED)] {
        for consumption in [Consumption::Immediate, Consumption::PerLook(2)] {
            let rig = rig(traits);
            rig.model.behave(|b| b.consumption = consumption);
            let failures = hammer(&rig, 40, true);
            let statistics = rig.smmu.statistics();
            assert!(failures > 0, "nothing was refused");
            assert!(u64::from(failures) <= statistics.refused_commands, "{failures} batches failed: {statistics}");
            assert!(statistics.command_fetch_aborts > 0 && !rig.smmu.is_dead());
            let error = rig.smmu.latest_command_error().unwrap().to_string();
            assert!(error.contains("CMD_") && error.contains("CERROR_"), "{error}");
            rig.model.assert_clean();
        }
    }
}

#[test]
fn an_unanswered_atc_invalidation_fails_those_who_asked_for_one_and_nobody_else() {
    let rig = rig(with_ats(Traits::NESTED));
    let batch = |ats: bool| {
        let mut batch = rig.smmu.shared().batch();
        batch.push(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true }).unwrap();
        if ats {
            batch.push(Command::AtcInv { sid: 8, ssid: None, addr: 0, log2: 0 }).unwrap();
        }
        batch.complete()
    };
    for _ in 0..20 {
        rig.model.behave(|b| b.atc_timeouts = 1);
        assert_eq!(batch(false), Ok(()), "there is no CMD_ATC_INV to wait for");
        assert_eq!(batch(true), Err(Error::CommandRefused));
        assert_eq!(batch(true), Ok(()), "the queue goes on");
    }
    // Another's CMD_SYNC finds it first: the other's batch is complete, the one that is still open is not.
    let mut open = rig.smmu.shared().batch();
    for _ in 0..9 {
        open.push(Command::AtcInv { sid: 8, ssid: None, addr: 0, log2: 0 }).unwrap();
    }
    rig.model.behave(|b| b.atc_timeouts = 1);
    assert_eq!(batch(false), Ok(()));
    assert_eq!(open.complete(), Err(Error::CommandRefused));
    assert_eq!(rig.smmu.statistics().unanswered_atc_invalidations, 21);
    assert!(rig.smmu.latest_command_error().unwrap().to_string().contains("CERROR_ATC_INV_SYNC"));
    rig.model.assert_clean();
}

#[test]
fn service_failure_mode_ends_a_wait_at_once_though_no_interrupt_comes() {
    let rig = rig(Traits::NESTED);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    thread::scope(|scope| {
        // Were it not noticed, this would wait for a minute.
        let waiter = scope.spawn(|| space.revoke(&[iova(0x1000, PAGE)]));
        rig.model.raise(Gerror::SFM_ERR);
        assert_eq!(waiter.join().unwrap(), Err(RevokeError::Dead));
    });
    assert!(rig.smmu.is_dead());
    rig.interrupt();
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::Dead), "for good");
    assert_eq!(rig.smmu.statistics().service_failures, 1);
}

#[test]
fn after_a_timeout_everything_is_refused_until_the_late_commands_are_consumed() {
    for traits in [Traits::NESTED, with_message(Traits::NESTED), with_event(Traits::NESTED), short(Traits::NESTED)] {
        let rig = rig_with(traits, hasty());
        let spaces: Vec<_> = (0..4).map(|stream| rig.attached(stream)).collect();
        for space in &spaces {
            map(space, iova(0x1000, 16 * PAGE), ram(0, 16 * PAGE), RW | Prot::PAGEWISE).unwrap();
        }
        for round in 0..3 {
            rig.model.behave(|b| b.consumption = Consumption::Stuck);
            thread::scope(|scope| {
                for space in &spaces {
                    scope.spawn(move || {
                        let revoked = space.revoke(&[iova(0x1000, 16 * PAGE)]);
                        assert!(matches!(revoked, Err(RevokeError::TimedOut | RevokeError::Dead)), "{revoked:?}");
                    });
                }
            });
            assert!(rig.smmu.is_dead());
            assert_eq!(spaces[0].revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::Dead), "at once");
            rig.model.behave(|b| b.consumption = Consumption::Immediate);
            rig.model.run();
            assert!(!rig.smmu.is_dead(), "round {round}");
            for space in &spaces {
                let revoked = space.revoke(&[iova(0x1000, 16 * PAGE)]);
                assert!(matches!(revoked, Ok(()) | Err(RevokeError::NotMapped(_))), "{revoked:?}");
                map(space, iova(0x1000, 16 * PAGE), ram(0, 16 * PAGE), RW | Prot::PAGEWISE).unwrap();
            }
        }
        rig.model.assert_clean();
    }
}

#[test]
fn a_queue_that_was_given_up_stays_shut_when_the_smmu_has_failed_since() {
    let rig = rig_with(Traits::NESTED, hasty());
    let space = rig.attached(8);
    map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW | Prot::PAGEWISE).unwrap();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut));
    rig.model.raise(Gerror::SFM_ERR);
    rig.interrupt();
    // Acknowledged, so that no register tells of it any more; and what was waited for is consumed after all.
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    assert!(rig.smmu.is_dead());
    assert_eq!(space.revoke(&[iova(0x2000, PAGE)]), Err(RevokeError::Dead));
}

#[test]
fn the_place_of_a_refused_command_is_known_exactly() {
    let rig = rig(Traits::NESTED);
    let batch = || {
        let mut batch = rig.smmu.shared().batch();
        batch.push(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true }).unwrap();
        batch.complete()
    };
    for _ in 0..3 {
        assert_eq!(batch(), Ok(()));
        rig.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
        assert_eq!(batch(), Err(Error::CommandRefused), "the first command behind another's batch");
    }
    // The last of eight that are in the queue already, before another's batch.
    let mut open = rig.smmu.shared().batch();
    for _ in 0..7 {
        open.push(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true }).unwrap();
    }
    for _ in 0..2 {
        open.push(Command::CfgiSte { sid: 8, leaf: true }).unwrap();
    }
    rig.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
    assert_eq!(batch(), Ok(()), "nothing of it was refused");
    assert_eq!(open.complete(), Err(Error::CommandRefused));
    assert_eq!((batch(), rig.smmu.statistics().refused_commands), (Ok(()), 4));
    rig.model.assert_clean();
}

#[test]
fn what_was_written_and_never_told_is_told_when_the_queue_revives() {
    let rig = rig(Traits::NESTED);
    let mut open = rig.smmu.shared().batch();
    for _ in 0..9 {
        open.push(Command::TlbiNhVa { vmid: 0, asid: 1, addr: 0, range: TlbiRange::SINGLE, leaf: true }).unwrap();
    }
    // Eight of them are in the queue, without a bell. Somebody for whom it was full too long takes them for lost.
    let shared = rig.smmu.shared();
    shared.commands.abandon();
    assert_eq!(open.complete(), Ok(()));
    rig.model.assert_clean();
}
