//! Attaching, replacing and blocking.
//!
//! Seen red: no CFGI_STE, or for the wrong stream; no CMD_SYNC behind it; CFGI_STE with Leaf set for a new second-level table;
//! STE, L1STD, second level or CD not published; a wrong Span; the same ASID or VMID for two spaces; an ASID freed without an
//! invalidation; a space freed although its last invalidation failed, or although the change away from it was refused; a foreign
//! address space accepted; a change that failed leaving the stream attached, or taken for done when it is asked for again;
//! StreamIDs beyond the table; two changes of one stream at a time; a page for privileged transactions that is for all.

use super::super::Consumption;
use super::super::device::{Access, Stopped};
use super::*;
use crate::spec::command::opcode;
use crate::spec::event::EventKind;
use crate::{Request, Translation};
use iommu::AttachError;
use iommu::contract::TableMemory;

#[test]
fn an_attached_stream_reaches_what_was_mapped_and_nothing_else() {
    for traits in [Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL] {
        let rig = rig(traits);
        rig.model.eager([8, 9]);
        assert_eq!(rig.reads(8, 0x1000), None);
        let space = rig.attached(8);
        map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW).unwrap();
        assert_eq!(rig.reads(8, 0x1ffc), Some(RAM + 0xffc));
        assert_eq!(rig.reads(8, 0x2000), Some(RAM + PAGE));
        assert_eq!(rig.reads(8, 0x3000), None);
        assert_eq!(rig.reads(8, 0xfff), None);
        assert_eq!(rig.reads(9, 0x1000), None);
        assert_eq!(rig.smmu.attached_streams(), 1);
        rig.model.assert_clean();
    }
}

#[test]
fn a_page_lent_for_reading_cannot_be_written() {
    for traits in [Traits::NESTED, Traits::STAGE2] {
        let rig = rig(traits);
        let space = rig.attached(8);
        map(&space, iova(0x1000, PAGE), ram(0, PAGE), Prot::READ).unwrap();
        assert!(rig.model.device_read(id(8), Iova::new(0x1000), PAGE).is_ok());
        assert!(rig.model.device_write(id(8), Iova::new(0x1000), 4).is_err());
    }
}

#[test]
fn a_page_lent_to_privileged_transactions_is_out_of_reach_of_all_others() {
    for traits in [Traits::NESTED, Traits::MINIMAL, FULL] {
        let rig = rig(traits);
        let space = rig.attached(8);
        map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW | Prot::PRIVILEGED).unwrap();
        map(&space, iova(0x2000, PAGE), ram(PAGE, PAGE), Prot::READ | Prot::PRIVILEGED).unwrap();
        map(&space, iova(0x3000, PAGE), ram(2 * PAGE, PAGE), RW).unwrap();
        let tries = |page: u64, write, privileged| {
            let (stream, iova) = (id(8), Iova::new(page));
            rig.model.access(&Access { stream, substream: None, iova, len: 4, write, privileged })
        };
        // Privileged ones first, so that everything is cached.
        for privileged in [true, false] {
            for (page, write, allowed) in [
                (0x1000, false, privileged),
                (0x1000, true, privileged),
                (0x2000, false, privileged),
                (0x2000, true, false),
                (0x3000, false, true),
                (0x3000, true, true),
            ] {
                match tries(page, write, privileged) {
                    Ok(runs) => assert!(allowed && runs[0].start().get() == RAM + page - 0x1000, "{page:#x}"),
                    Err(Stopped::Recorded(event)) => {
                        assert!(!allowed, "{page:#x}: {event:?}");
                        let EventKind::FPermission { transaction, .. } = event.kind else { panic!("{event:?}") };
                        assert_eq!((transaction.privileged, transaction.read), (privileged, !write));
                        assert_eq!(transaction.input_addr, page);
                    }
                    Err(Stopped::Silently) => panic!("no record"),
                }
            }
        }
        // Nor does a device get it for keeping.
        if traits == FULL {
            rig.smmu.enable_ats(id(8)).unwrap();
            let granted = [0x1000, 0x2000, 0x3000].map(|page| rig.model.ats_request(id(8), None, Iova::new(page)));
            assert_eq!(granted, [false, false, true]);
        }
        rig.model.assert_clean();
    }
}

/// A doorbell in tables that a processor walks too: for the device, whose accesses are not privileged, and not for EL0.
#[test]
fn a_space_may_take_all_accesses_for_privileged_where_the_smmu_can() {
    const OVERRIDES: Traits = Traits { idr1: FULL.idr1 | 1 << 26, ..FULL };
    let request = Request { privileged: true, translation: Translation::Stage1, ..Request::default() };
    for traits in [FULL, Traits::NESTED, Traits::MINIMAL] {
        assert!(matches!(rig(traits).smmu.create_with(&request), Err(AttachError::Unsupported(_))));
    }
    let rig = rig(OVERRIDES);
    let stage2 = Request { translation: Translation::Stage2, ..request.clone() };
    assert!(matches!(rig.smmu.create_with(&stage2), Err(AttachError::Unsupported(_))));
    rig.model.eager([8, 9]);
    let (space, plain) = (rig.smmu.create_with(&request).unwrap(), rig.space());
    for space in [&space, &plain] {
        map(space, iova(0x1000, PAGE), ram(0, PAGE), RW | Prot::PRIVILEGED).unwrap();
        map(space, iova(0x2000, PAGE), ram(PAGE, PAGE), Prot::READ).unwrap();
    }
    rig.smmu.attach(id(8), &space).unwrap();
    rig.smmu.attach(id(9), &plain).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads(8, 0x2000)), (Some(RAM), Some(RAM + PAGE)));
    // Only what is privileged about it is overridden.
    assert!(rig.model.device_write(id(8), Iova::new(0x2000), 4).is_err());
    assert_eq!((rig.reads(9, 0x1000), rig.reads(9, 0x2000)), (None, Some(RAM + PAGE)));
    // There and back again: each stream has what its space says, whatever it had before.
    rig.smmu.attach(id(8), &plain).unwrap();
    assert_eq!(rig.reads(8, 0x1000), None);
    rig.smmu.attach(id(8), &space).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    // The STE speaks for all substreams, and an ATC does not ask each time.
    let mixed = rig.smmu.attach_substream(id(8), 5, &plain);
    assert!(matches!(mixed, Err(AttachError::Unsupported(_))), "{mixed:?}");
    rig.smmu.attach_substream(id(8), 5, &space).unwrap();
    assert_eq!(rig.reads_as(8, 5, 0x1000), Some(RAM));
    assert!(matches!(rig.smmu.enable_ats(id(8)), Err(AttachError::Unsupported(_))));
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.assert_clean();
}

#[test]
fn streams_that_share_a_space_see_the_same_and_streams_that_do_not_see_their_own() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8, 16, 24]);
    let shared = rig.attached(8);
    rig.smmu.attach(id(16), &shared).unwrap();
    let own = rig.attached(24);
    map(&shared, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    map(&own, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads(16, 0x1000)), (Some(RAM), Some(RAM)));
    assert_eq!(rig.reads(24, 0x1000), Some(RAM + PAGE));
    rig.model.assert_clean();
}

#[test]
fn a_blocked_stream_reaches_nothing_although_everything_was_cached() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.smmu.block(id(8)).unwrap();
    assert_eq!(rig.reads(8, 0x1000), None);
    rig.smmu.attach(id(8), &space).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.assert_clean();
}

#[test]
fn replacing_a_space_takes_one_store_and_one_sync() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let (a, b) = (rig.attached(8), rig.space());
    map(&a, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    map(&b, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.take_log();
    rig.smmu.attach(id(8), &b).unwrap();
    assert_eq!(rig.model.take_log(), [opcode::CFGI_STE as u8, opcode::SYNC as u8]);
    assert_eq!(rig.reads(8, 0x1000), Some(RAM + PAGE));
    rig.smmu.attach(id(8), &b).unwrap();
    assert_eq!(rig.model.take_log(), [], "attaching what is attached changes nothing");
    rig.model.assert_clean();
}

#[test]
fn bypass_is_untranslated_until_the_stream_is_blocked() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    bypass(&rig, 8);
    assert_eq!(rig.reads(8, 0x1234_5000), Some(0x1234_5000));
    let space = rig.space();
    rig.smmu.attach(id(8), &space).unwrap();
    assert_eq!(rig.reads(8, 0x1234_5000), None);
    bypass(&rig, 8);
    rig.smmu.block(id(8)).unwrap();
    assert_eq!(rig.reads(8, 0x1234_5000), None);
    rig.model.assert_clean();
}

#[test]
fn streams_at_the_edges_of_the_table_attach_and_those_beyond_do_not() {
    for (traits, last) in [(Traits::NESTED, 0xffff), (Traits::MINIMAL, 63)] {
        let rig = rig(traits);
        rig.model.eager([0, 1, last]);
        let space = rig.space();
        map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        for stream in [0, 1, last] {
            assert_eq!(rig.reads(stream, 0x1000), None);
            rig.smmu.attach(id(stream), &space).unwrap();
            assert_eq!(rig.reads(stream, 0x1000), Some(RAM));
        }
        for stream in [last + 1, u32::MAX] {
            assert_eq!(rig.smmu.attach(id(stream), &space), Err(AttachError::NoSuchStream(id(stream))));
        }
        rig.model.assert_clean();
    }
}

#[test]
fn a_second_level_table_that_cannot_be_had_is_an_error_that_changes_nothing() {
    let rig = rig(Traits::NESTED);
    let space = rig.space();
    rig.memory.allow(Some(0));
    assert_eq!(rig.smmu.attach(id(8), &space), Err(AttachError::OutOfMemory));
    assert!(matches!(rig.smmu.create(), Err(AttachError::OutOfMemory)));
    rig.memory.allow(None);
    rig.smmu.attach(id(8), &space).unwrap();
    rig.model.assert_clean();
}

#[test]
fn a_space_of_another_smmu_is_refused() {
    let (one, other) = (rig(Traits::NESTED), rig(Traits::NESTED));
    let space = other.space();
    assert_eq!(one.smmu.attach(id(8), &space), Err(AttachError::ForeignSpace));
}

#[test]
fn a_space_lives_as_long_as_a_stream_has_it_and_is_freed_after() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    let live = rig.memory.live();
    drop(space);
    assert_eq!(rig.memory.live(), live);
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.smmu.block(id(8)).unwrap();
    assert!(rig.memory.live() < live);
    assert_eq!(rig.reads(8, 0x1000), None);
    assert!(rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty());
    rig.model.assert_clean();
}

#[test]
fn an_asid_is_given_out_again_only_with_nothing_cached_under_it() {
    let rig = rig(Traits::MINIMAL);
    rig.model.eager([8]);
    for round in 0..600 {
        let space = rig.attached(8);
        assert_eq!(rig.reads(8, 0x1000), None, "round {round} sees another round's memory");
        map(&space, iova(0x1000, PAGE), ram(round * PAGE, PAGE), RW).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM + round * PAGE));
        rig.smmu.block(id(8)).unwrap();
    }
    rig.model.assert_clean();
}

#[test]
fn identifiers_run_out_with_an_error_and_come_back() {
    let rig = rig(Traits::MINIMAL);
    let spaces: Vec<_> = (0..255).map(|_| rig.space()).collect();
    assert!(matches!(rig.smmu.create(), Err(AttachError::NoIdentifier)));
    drop(spaces);
    let live = rig.memory.live();
    drop(rig.space());
    assert_eq!(rig.memory.live(), live);
}

#[test]
fn a_change_that_the_smmu_does_not_take_blocks_the_stream_and_frees_nothing() {
    let rig = rig_with(Traits::NESTED, hasty());
    let (old, new) = (rig.attached(8), rig.space());
    map(&old, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    map(&new, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    let live = rig.memory.live();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    assert_eq!(rig.smmu.attach(id(8), &new), Err(AttachError::TimedOut));
    drop((old, new));
    assert_eq!(rig.memory.live(), live, "the SMMU may still walk both");
    // The SMMU has not taken notice: it goes on with what it has cached. When it does, the stream is blocked.
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    assert_eq!(rig.reads(8, 0x1000), None);
    assert_eq!(rig.smmu.statistics().leaked_spaces, 2);
    let fresh = rig.attached(8);
    map(&fresh, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM + PAGE));
    rig.model.assert_clean();
}

#[test]
fn after_a_refused_invalidation_the_old_space_stays_in_memory_and_blocking_is_not_taken_for_done() {
    let rig = rig(Traits::NESTED);
    let (old, new) = (rig.attached(8), rig.space());
    map(&old, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
    assert_eq!(rig.smmu.attach(id(8), &new), Err(AttachError::Dead));
    drop((old, new));
    // The SMMU walks on through what it has cached, and finds no freed table.
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    assert_eq!(rig.reads(8, 0x5000), None);
    // The STE in memory aborts already, but the SMMU has not been told.
    rig.smmu.block(id(8)).unwrap();
    assert_eq!(rig.reads(8, 0x1000), None);
    rig.model.assert_clean();
}

#[test]
fn blocking_again_after_a_refused_invalidation_is_not_taken_for_done_although_the_ste_is_the_same() {
    let rig = rig(Traits::NESTED);
    bypass(&rig, 8);
    assert_eq!(rig.reads(8, 0x1000), Some(0x1000));
    rig.model.behave(|b| b.refuse = Some(opcode::CFGI_STE as u8));
    assert_eq!(rig.smmu.block(id(8)), Err(AttachError::Dead));
    assert_eq!(rig.reads(8, 0x1000), Some(0x1000), "the SMMU still has the old STE");
    rig.smmu.block(id(8)).unwrap();
    assert_eq!(rig.reads(8, 0x1000), None);
    rig.model.assert_clean();
}

#[test]
fn threads_that_change_one_stream_do_it_one_after_another() {
    for _ in 0..20 {
        let rig = rig(Traits::NESTED);
        rig.model.eager([8]);
        rig.model.behave(|b| b.consumption = Consumption::PerLook(1));
        let ready = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (rig, ready) = (&rig, &ready);
                scope.spawn(move || {
                    let space = rig.space();
                    map(&space, iova(0x1000, PAGE), ram(thread * PAGE, PAGE), RW).unwrap();
                    ready.wait();
                    for _ in 0..10 {
                        rig.smmu.attach(id(8), &space).unwrap();
                        if thread == 0 {
                            rig.smmu.block(id(8)).unwrap();
                        }
                    }
                });
            }
        });
        // Whichever space the stream has is the one that is still there.
        assert_eq!(rig.reads(8, 0x1000).is_some(), rig.smmu.attached_streams() == 1);
        rig.model.assert_clean();
    }
}

#[test]
fn a_space_whose_last_invalidation_fails_is_not_freed() {
    let rig = rig_with(Traits::NESTED, hasty());
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.smmu.block(id(8)).unwrap();
    let live = rig.memory.live();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    drop(space);
    assert_eq!(rig.memory.live(), live);
    assert_eq!(rig.smmu.statistics().leaked_spaces, 1);
}

#[test]
fn a_neighbour_of_an_attached_stream_is_blocked_without_an_event() {
    let rig = rig(Traits::NESTED);
    let _space = rig.attached(8);
    for neighbour in [0, 9, 255] {
        assert_eq!(rig.model.device_read(id(neighbour), Iova::new(0x1000), 4), Err(Stopped::Silently));
    }
    rig.model.assert_clean();
}

#[test]
fn a_lost_publication_is_noticed_by_the_smmu() {
    // The model itself: what is not published is not seen.
    let memory = ModelMemory::new();
    let block = memory.allocate(64).unwrap();
    block[0].store(7, core::sync::atomic::Ordering::Relaxed);
    assert_eq!(memory.read(block.phys().get()), Ok(0));
    block.publish(0, 1);
    assert_eq!(memory.read(block.phys().get()), Ok(7));
}
