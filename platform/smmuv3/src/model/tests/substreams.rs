//! Substreams: tables of context descriptors, attaching and detaching by SubstreamID.
//!
//! Seen red: no CFGI_CD; L1CD not published; a live CD overwritten in place instead of switched; the old table freed before
//! CFGI_STE; a CD in another's place; S1DSS not following the default; SubstreamIDs beyond the table; a CD of a nested space
//! in a table whose STE has no stage 2 yet.

use super::*;
use crate::spec::command::opcode;
use crate::{Request, Translation};
use iommu::AttachError;

fn mapped(rig: &Rig, offset: u64) -> Arc<dyn AddressSpace> {
    let space = rig.space();
    map(&space, iova(0x1000, PAGE), ram(offset, PAGE), RW).unwrap();
    space
}

/// Linear because there is no other; two levels of 64; two levels of 1024.
fn shapes() -> [(Traits, Config, u32); 4] {
    let bits = |bits: u32| FULL.idr1 & !(0x1f << 6) | bits << 6;
    [
        (FULL, patient(), 255),
        (Traits { idr0: FULL.idr0 & !(1 << 19), ..FULL }, patient(), 255),
        (Traits { idr1: bits(20), ..FULL_NON_COHERENT }, Config { substream_bits: 20, ..patient() }, (1 << 20) - 1),
        (Traits { idr1: bits(4), ..FULL }, patient(), 15),
    ]
}

#[test]
fn each_substream_sees_its_own_space_and_the_others_see_nothing() {
    for (traits, config, last) in shapes() {
        let rig = rig_with(traits, config);
        rig.model.eager([8]);
        let (default, one, far) = (mapped(&rig, 0), mapped(&rig, PAGE), mapped(&rig, 2 * PAGE));
        rig.smmu.attach(id(8), &default).unwrap();
        rig.smmu.attach_substream(id(8), 1, &one).unwrap();
        // The SMMU may remember that there was no second level.
        assert_eq!(rig.reads_as(8, last, 0x1000), None);
        rig.smmu.attach_substream(id(8), last, &far).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        assert_eq!(rig.reads_as(8, 1, 0x1000), Some(RAM + PAGE));
        assert_eq!(rig.reads_as(8, last, 0x1000), Some(RAM + 2 * PAGE));
        assert_eq!(rig.reads_as(8, 2, 0x1000), None);
        assert_eq!(rig.reads_as(8, 0, 0x1000), None, "0 stands for none");
        assert_eq!(rig.reads_as(9, 1, 0x1000), None);
        one.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert_eq!(rig.reads_as(8, 1, 0x1000), None);
        assert!(rig.model.paths_to(ram(PAGE, PAGE), &[]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn there_is_no_place_for_zero_nor_beyond_the_table_nor_where_there_are_no_substreams() {
    for (traits, config, last) in shapes() {
        let rig = rig_with(traits, config);
        let space = mapped(&rig, 0);
        for wrong in [0, last + 1, u32::MAX] {
            let refused = rig.smmu.attach_substream(id(8), wrong, &space);
            assert_eq!(refused, Err(AttachError::NoSuchSubstream(wrong)));
        }
        rig.smmu.attach_substream(id(8), last, &space).unwrap();
        for wrong in [0, 1, last + 1] {
            assert_eq!(rig.smmu.detach_substream(id(8), wrong), Err(AttachError::NoSuchSubstream(wrong)));
        }
    }
    let rig = rig(Traits::NESTED);
    let refused = rig.smmu.attach_substream(id(8), 1, &rig.space());
    assert_eq!(refused, Err(AttachError::Unsupported("substreams")));
}

#[test]
fn a_detached_substream_reaches_nothing_and_its_space_is_let_go() {
    for seed in 0..20 {
        let rig = rig(FULL);
        let default = mapped(&rig, 0);
        rig.smmu.attach(id(8), &default).unwrap();
        let space = mapped(&rig, PAGE);
        rig.model.adversary(seed, [8]);
        rig.smmu.attach_substream(id(8), 5, &space).unwrap();
        assert_eq!(rig.reads_as(8, 5, 0x1000), Some(RAM + PAGE));
        rig.smmu.detach_substream(id(8), 5).unwrap();
        let live = rig.memory.live();
        drop(space);
        assert!(rig.memory.live() < live);
        assert_eq!(rig.reads_as(8, 5, 0x1000), None);
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        rig.smmu.block(id(8)).unwrap();
        rig.model.assert_clean();
    }
}

#[test]
fn a_new_substream_is_one_cd_and_a_replaced_one_is_one_store_for_all() {
    let rig = rig(FULL);
    rig.model.eager([8]);
    let (default, a, b) = (mapped(&rig, 0), mapped(&rig, PAGE), mapped(&rig, 2 * PAGE));
    rig.smmu.attach(id(8), &default).unwrap();
    let codes = |codes: &[u64]| codes.iter().map(|&code| code as u8).collect::<Vec<_>>();
    rig.model.take_log();
    // From one CD to a table of them: the STE's first word, while the device runs.
    rig.smmu.attach_substream(id(8), 1, &a).unwrap();
    assert_eq!(rig.model.take_log(), codes(&[opcode::CFGI_STE, opcode::SYNC]));
    let cd = codes(&[opcode::CFGI_CD, opcode::SYNC, opcode::CFGI_CD, opcode::SYNC]);
    rig.smmu.attach_substream(id(8), 2, &b).unwrap();
    assert_eq!(rig.model.take_log(), cd);
    rig.smmu.attach_substream(id(8), 2, &b).unwrap();
    assert_eq!(rig.model.take_log(), [], "attaching what is attached changes nothing");
    // Two words of a CD cannot change at once; a pointer to another table can.
    rig.smmu.attach_substream(id(8), 2, &a).unwrap();
    assert_eq!(rig.model.take_log(), codes(&[opcode::CFGI_STE, opcode::SYNC]));
    assert_eq!(rig.reads_as(8, 2, 0x1000), Some(RAM + PAGE));
    rig.smmu.attach(id(8), &b).unwrap();
    assert_eq!(rig.model.take_log(), codes(&[opcode::CFGI_STE, opcode::SYNC]));
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 1, 0x1000)), (Some(RAM + 2 * PAGE), Some(RAM + PAGE)));
    rig.smmu.detach_substream(id(8), 2).unwrap();
    assert_eq!(rig.model.take_log(), cd);
    rig.model.assert_clean();
}

#[test]
fn replacing_under_a_running_device_shows_it_the_old_or_the_new_and_never_neither() {
    for seed in 0..10 {
        let rig = rig(FULL);
        let (a, b) = (mapped(&rig, 0), mapped(&rig, PAGE));
        rig.smmu.attach(id(8), &a).unwrap();
        rig.smmu.attach_substream(id(8), 1, &a).unwrap();
        rig.model.adversary(seed, [8]);
        let done = core::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(core::sync::atomic::Ordering::Relaxed) {
                    for seen in [rig.reads(8, 0x1000), rig.reads_as(8, 1, 0x1000)] {
                        assert!(seen == Some(RAM) || seen == Some(RAM + PAGE), "{seen:x?}");
                    }
                }
            });
            for round in 0..20 {
                let next = if round % 2 == 0 { &b } else { &a };
                rig.smmu.attach_substream(id(8), 1, next).unwrap();
                rig.smmu.attach(id(8), next).unwrap();
                // Comings and goings beside it do no harm.
                rig.smmu.attach_substream(id(8), 200, &a).unwrap();
                rig.smmu.detach_substream(id(8), 200).unwrap();
            }
            done.store(true, core::sync::atomic::Ordering::Relaxed);
        });
        rig.model.assert_clean();
    }
}

#[test]
fn transactions_without_substream_keep_what_they_had() {
    let rig = rig(FULL);
    rig.model.eager([8, 16]);
    let space = mapped(&rig, 0);
    // Nothing:
    rig.smmu.attach_substream(id(8), 1, &space).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 1, 0x1000)), (None, Some(RAM)));
    // then a space:
    let default = mapped(&rig, PAGE);
    rig.smmu.attach(id(8), &default).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 1, 0x1000)), (Some(RAM + PAGE), Some(RAM)));
    // Bypass:
    bypass(&rig, 16);
    rig.smmu.attach_substream(id(16), 1, &space).unwrap();
    assert_eq!((rig.reads(16, 0x5000), rig.reads_as(16, 1, 0x1000)), (Some(0x5000), Some(RAM)));
    rig.smmu.attach(id(16), &default).unwrap();
    assert_eq!((rig.reads(16, 0x5000), rig.reads(16, 0x1000)), (None, Some(RAM + PAGE)));
    // And everything goes with the stream.
    for stream in [8, 16] {
        rig.smmu.block(id(stream)).unwrap();
        assert_eq!((rig.reads(stream, 0x1000), rig.reads_as(stream, 1, 0x1000)), (None, None));
    }
    rig.model.assert_clean();
}

#[test]
fn tables_of_context_descriptors_are_freed_when_the_smmu_has_let_go_of_them() {
    for seed in 0..20 {
        let rig = rig(FULL);
        let space = mapped(&rig, 0);
        let other = mapped(&rig, PAGE);
        rig.smmu.attach(id(8), &space).unwrap();
        rig.smmu.block(id(8)).unwrap();
        let live = rig.memory.live();
        rig.model.adversary(seed, [8]);
        for round in 0..10 {
            rig.smmu.attach_substream(id(8), 1 + round, &space).unwrap();
            rig.smmu.attach_substream(id(8), 1, &other).unwrap();
            rig.smmu.attach_substream(id(8), 1, &space).unwrap();
        }
        rig.smmu.block(id(8)).unwrap();
        assert_eq!(rig.memory.live(), live);
        rig.model.assert_clean();
    }
}

#[test]
fn a_change_of_a_cd_that_the_smmu_does_not_take_blocks_the_stream_and_frees_nothing() {
    let rig = rig_with(FULL, hasty());
    let (default, space) = (mapped(&rig, 0), mapped(&rig, PAGE));
    rig.smmu.attach(id(8), &default).unwrap();
    rig.smmu.attach_substream(id(8), 1, &space).unwrap();
    assert_eq!(rig.reads_as(8, 1, 0x1000), Some(RAM + PAGE));
    rig.model.behave(|b| b.refuse = Some(opcode::CFGI_CD as u8));
    assert_eq!(rig.smmu.detach_substream(id(8), 1), Err(AttachError::Dead));
    let live = rig.memory.live();
    drop((default, space));
    assert_eq!(rig.memory.live(), live, "the SMMU may still walk both");
    rig.smmu.block(id(8)).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 1, 0x1000)), (None, None));
    rig.model.assert_clean();
}

/// A stage 2 with the memory of the tables, and one page of RAM at [`BELOW`].
fn parent(rig: &Rig) -> Arc<dyn AddressSpace> {
    let tables = (0x1_0000_0000, 0x1000_0000);
    let parent = rig.asked(&Request { translation: Translation::Stage2, input_bits: Some(40), ..Request::default() });
    let run = PhysRange::new(PhysAddr::new(tables.0), tables.1).unwrap();
    map(&parent, iova(tables.0, tables.1), run, Prot::READ).unwrap();
    map(&parent, iova(BELOW, PAGE), ram(0, PAGE), RW).unwrap();
    parent
}

/// A stage 1 on top, which leads to [`BELOW`].
fn nested(rig: &Rig, parent: &Arc<dyn AddressSpace>) -> Arc<dyn AddressSpace> {
    let space = rig.asked(&Request { translation: Translation::Nested(parent.clone()), ..Request::default() });
    map(&space, iova(0x1000, PAGE), intermediate(), RW).unwrap();
    space
}

/// An intermediate address. What is there physically is nobody's.
const BELOW: u64 = 0x4000_0000;

fn intermediate() -> PhysRange {
    PhysRange::new(PhysAddr::new(BELOW), PAGE).unwrap()
}

#[test]
fn the_first_space_in_an_empty_table_is_never_found_without_its_stage_2() {
    for seed in 0..40 {
        let rig = rig(FULL);
        let (one, other) = (parent(&rig), parent(&rig));
        let spaces = [nested(&rig, &one), nested(&rig, &other), mapped(&rig, 0)];
        rig.model.adversary(seed, [8]);
        rig.model.behave(|b| b.acts = 16);
        for space in spaces.iter().chain(&spaces) {
            // The table stays, with nobody in it.
            rig.smmu.attach_substream(id(8), 1, space).unwrap();
            assert_eq!(rig.reads_as(8, 1, 0x1000), Some(RAM));
            rig.smmu.detach_substream(id(8), 1).unwrap();
            assert_eq!(rig.reads_as(8, 1, 0x1000), None);
            assert_eq!(rig.model.paths_to(intermediate(), &[id(8)]), [""; 0]);
        }
        // Nor is the first that is not numbered.
        rig.smmu.attach(id(8), &spaces[0]).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        assert_eq!(rig.model.paths_to(intermediate(), &[id(8)]), [""; 0]);
        for space in &spaces {
            space.revoke(&[iova(0x1000, PAGE)]).unwrap();
        }
        for below in [one, other] {
            below.revoke(&[iova(BELOW, PAGE)]).unwrap();
        }
        assert_eq!(rig.model.paths_to(ram(0, PAGE), &[id(8)]), [""; 0]);
        rig.smmu.block(id(8)).unwrap();
        rig.model.assert_clean();
    }
}

#[test]
fn substreams_share_one_parent_and_have_a_stage_1() {
    let rig = rig(FULL);
    rig.model.eager([8]);
    let (parent, nested) = (|| parent(&rig), |below: &Arc<dyn AddressSpace>| nested(&rig, below));
    let (one, other) = (parent(), parent());
    let (a, b) = (nested(&one), nested(&one));
    rig.smmu.attach(id(8), &a).unwrap();
    rig.smmu.attach_substream(id(8), 3, &b).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 3, 0x1000)), (Some(RAM), Some(RAM)));
    let elsewhere = "substreams over different parents";
    for stranger in [nested(&other), rig.space()] {
        assert_eq!(rig.smmu.attach_substream(id(8), 4, &stranger), Err(AttachError::Unsupported(elsewhere)));
    }
    let refused = rig.smmu.attach_substream(id(8), 4, &one);
    assert_eq!(refused, Err(AttachError::Unsupported("substreams of a stage 2 alone")));
    one.revoke(&[iova(BELOW, PAGE)]).unwrap();
    assert_eq!((rig.reads(8, 0x1000), rig.reads_as(8, 3, 0x1000)), (None, None));
    assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
    rig.model.assert_clean();
}

#[test]
fn memory_that_runs_out_changes_nothing() {
    let rig = rig(FULL);
    rig.model.eager([8]);
    let space = mapped(&rig, 0);
    rig.smmu.attach(id(8), &space).unwrap();
    let live = rig.memory.live();
    for allowance in 0..2 {
        rig.memory.allow(Some(allowance));
        assert_eq!(rig.smmu.attach_substream(id(8), 100, &space), Err(AttachError::OutOfMemory));
        assert_eq!(rig.memory.live(), live);
    }
    rig.memory.allow(None);
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.smmu.attach_substream(id(8), 100, &space).unwrap();
    assert_eq!(rig.reads_as(8, 100, 0x1000), Some(RAM));
}
