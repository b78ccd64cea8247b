//! Address spaces by request: stages, granules, sizes, and stage 1 on top of stage 2.
//!
//! Seen red: NH_ALL left out when a parent revokes; no CMD_SYNC between S2_IPA and NH_ALL; VMID 0 in a nested space's
//! invalidations; the parent freed before the child; IPS not clamped to the parent's input; a granule that the SMMU lacks.

use super::super::Consumption;
use super::*;
use crate::spec::command::opcode;
use crate::{Request, Translation};
use iommu::pgtable::Granule;
use iommu::{AttachError, RevokeError};

/// Where the model's table memory begins, and as much of it as tests here use.
const TABLES: (u64, u64) = (0x1_0000_0000, 0x1000_0000);

fn of(translation: Translation) -> Request {
    // A parent takes all that its children put out.
    let input_bits = matches!(translation, Translation::Stage2).then_some(40);
    Request { translation, input_bits, ..Request::default() }
}

fn run_of(start: u64, len: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(start), len).unwrap()
}

/// A stage 2 with the table memory in it, 1:1 and for reading only.
fn parent(rig: &Rig) -> Arc<dyn AddressSpace> {
    let parent = rig.asked(&of(Translation::Stage2));
    map(&parent, iova(TABLES.0, TABLES.1), run_of(TABLES.0, TABLES.1), Prot::READ).unwrap();
    parent
}

#[test]
fn every_stage_that_the_smmu_has_is_made_and_no_other() {
    let stage = |translation| of(translation);
    for (traits, one, two) in
        [(Traits::NESTED, true, true), (Traits::OLD, true, false), (Traits::STAGE2, false, true), (FULL, true, true)]
    {
        let rig = rig(traits);
        rig.model.eager([8]);
        for (translation, there) in [(Translation::Stage1, one), (Translation::Stage2, two)] {
            match rig.smmu.create_with(&stage(translation)) {
                Ok(space) => {
                    assert!(there);
                    rig.smmu.attach(id(8), &space).unwrap();
                    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
                    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
                    space.revoke(&[iova(0x1000, PAGE)]).unwrap();
                    assert!(rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty());
                }
                Err(error) => assert!(!there && matches!(error, AttachError::Unsupported(_)), "{error}"),
            }
        }
        rig.model.assert_clean();
    }
}

#[test]
fn every_granule_translates_revokes_and_faults_at_its_own_page_size() {
    for traits in [FULL, FULL_NON_COHERENT] {
        for translation in [Translation::Stage1, Translation::Stage2] {
            for granule in [Granule::K4, Granule::K16, Granule::K64] {
                let rig = rig(traits);
                rig.model.eager([8]);
                let request = Request { granule: Some(granule), input_bits: Some(40), ..of(translation.clone()) };
                let space = rig.asked(&request);
                let page = space.aperture().page_size();
                assert_eq!(page, granule.size());
                assert_eq!(space.aperture().range.end().get(), 1 << 40);
                rig.smmu.attach(id(8), &space).unwrap();
                let at = iova(1 << 39, 3 * page);
                map(&space, at, ram(0, 3 * page), RW).unwrap();
                assert_eq!(rig.reads(8, (1 << 39) + 2 * page + 8), Some(RAM + 2 * page + 8));
                assert_eq!(rig.reads(8, (1 << 39) + 3 * page), None);
                let middle = iova((1 << 39) + page, page);
                space.revoke(&[middle]).unwrap();
                assert_eq!(rig.reads(8, (1 << 39) + page), None);
                assert!(rig.model.paths_to(ram(page, page), &[id(8)]).is_empty());
                assert_eq!(rig.reads(8, 1 << 39), Some(RAM));
                rig.model.assert_clean();
            }
        }
    }
}

#[test]
fn what_the_smmu_lacks_is_refused_by_name() {
    let rig = rig(Traits::MINIMAL);
    let refused = |request: Request| match rig.smmu.create_with(&request) {
        Err(AttachError::Unsupported(what)) => what,
        other => panic!("{:?}", other.map(|_| ())),
    };
    assert_eq!(refused(Request { granule: Some(Granule::K64), ..Request::default() }), "a granule of this size");
    assert_eq!(refused(Request { input_bits: Some(52), ..Request::default() }), "so many bits of device address");
    assert_eq!(refused(Request { input_bits: Some(20), ..Request::default() }), "translation tables of this size");
    assert_eq!(refused(of(Translation::Stage2)), "stage 2");
    assert_eq!(refused(of(Translation::Nested(rig.space()))), "nested translation");
}

#[test]
fn a_nested_space_reaches_what_both_stages_allow() {
    for traits in [FULL, FULL_NON_COHERENT, Traits::NESTED] {
        let rig = rig(traits);
        rig.model.adversary(7, [8]);
        let parent = parent(&rig);
        // Intermediate addresses that are not the physical ones.
        map(&parent, iova(0x4000_0000, 4 * PAGE), ram(0, 4 * PAGE), RW).unwrap();
        map(&parent, iova(0x4001_0000, PAGE), ram(0x10_0000, PAGE), Prot::READ).unwrap();
        let space = rig.asked(&of(Translation::Nested(parent.clone())));
        rig.smmu.attach(id(8), &space).unwrap();
        map(&space, iova(0x1000, 4 * PAGE), run_of(0x4000_0000, 4 * PAGE), RW).unwrap();
        map(&space, iova(0x8000, PAGE), run_of(0x4001_0000, PAGE), RW).unwrap();
        map(&space, iova(0x9000, PAGE), run_of(0x5000_0000, PAGE), RW).unwrap();
        assert_eq!((rig.reads(8, 0x1000), rig.reads(8, 0x2004)), (Some(RAM), Some(RAM + PAGE + 4)));
        assert_eq!(rig.reads(8, 0x8000), Some(RAM + 0x10_0000));
        assert!(rig.model.device_write(id(8), Iova::new(0x8000), 4).is_err(), "stage 2 allows reading only");
        assert_eq!(rig.reads(8, 0x9000), None, "nothing is behind that in stage 2");
        assert_eq!(rig.reads(8, 0x4000_0000), None, "an intermediate address is none of the device's");
        space.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert_eq!(rig.reads(8, 0x1000), None);
        assert_eq!(rig.reads(8, 0x2000), Some(RAM + PAGE));
        assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn what_a_parent_revokes_no_nested_space_reaches_although_both_stages_were_cached_as_one() {
    for seed in 0..40 {
        let rig = rig(FULL);
        let parent = parent(&rig);
        map(&parent, iova(0x4000_0000, 4 * PAGE), ram(0, 4 * PAGE), RW).unwrap();
        let spaces: Vec<_> = (0..2).map(|_| rig.asked(&of(Translation::Nested(parent.clone())))).collect();
        rig.model.adversary(seed, [8, 16]);
        for (stream, space) in [8, 16].into_iter().zip(&spaces) {
            rig.smmu.attach(id(stream), space).unwrap();
            map(space, iova(0x1000, 4 * PAGE), run_of(0x4000_0000, 4 * PAGE), RW).unwrap();
            assert_eq!(rig.reads(stream, 0x1000), Some(RAM));
        }
        parent.revoke(&[iova(0x4000_0000, PAGE)]).unwrap();
        let paths = rig.model.paths_to(ram(0, PAGE), &[]);
        assert!(paths.is_empty(), "seed {seed}: {paths:#?}");
        assert_eq!((rig.reads(8, 0x1000), rig.reads(16, 0x1000)), (None, None));
        assert_eq!((rig.reads(8, 0x2000), rig.reads(16, 0x2000)), (Some(RAM + PAGE), Some(RAM + PAGE)));
        rig.model.assert_clean();
    }
}

#[test]
fn the_commands_of_each_kind_of_space_are_those_of_its_kind() {
    let rig = rig(Traits::NESTED);
    let codes = |codes: &[u64]| codes.iter().map(|&code| code as u8).collect::<Vec<_>>();
    let revoked = |space: &Arc<dyn AddressSpace>| {
        map(space, iova(0x1000, PAGE), run_of(0x4000_0000, PAGE), RW).unwrap();
        rig.model.take_log();
        space.revoke(&[iova(0x1000, PAGE)]).unwrap();
        rig.model.take_log()
    };
    let stage1 = rig.asked(&of(Translation::Stage1));
    assert_eq!(revoked(&stage1), codes(&[opcode::TLBI_NH_VA, opcode::SYNC]));
    let parent = parent(&rig);
    assert_eq!(revoked(&parent), codes(&[opcode::TLBI_S2_IPA, opcode::SYNC]));
    let nested = rig.asked(&of(Translation::Nested(parent.clone())));
    assert_eq!(revoked(&nested), codes(&[opcode::TLBI_NH_VA, opcode::SYNC]));
    assert_eq!(revoked(&parent), codes(&[opcode::TLBI_S2_IPA, opcode::SYNC, opcode::TLBI_NH_ALL, opcode::SYNC]));
    rig.model.take_log();
    drop(nested);
    assert_eq!(rig.model.take_log(), codes(&[opcode::TLBI_NH_ASID, opcode::SYNC]));
    drop(parent);
    assert_eq!(rig.model.take_log(), codes(&[opcode::TLBI_S12_VMALL, opcode::SYNC]));
}

#[test]
fn a_parent_lives_as_long_as_a_nested_space_does() {
    let rig = rig(FULL);
    rig.model.adversary(3, [8]);
    let parent = parent(&rig);
    map(&parent, iova(0x4000_0000, PAGE), ram(0, PAGE), RW).unwrap();
    let live = rig.memory.live();
    let space = rig.asked(&of(Translation::Nested(parent.clone())));
    rig.smmu.attach(id(8), &space).unwrap();
    map(&space, iova(0x1000, PAGE), run_of(0x4000_0000, PAGE), RW).unwrap();
    drop((parent, space));
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.smmu.block(id(8)).unwrap();
    assert!(rig.memory.live() < live);
    assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
    rig.model.assert_clean();
}

#[test]
fn an_asid_under_a_parent_is_given_out_again_only_with_nothing_cached_under_it() {
    let traits = Traits { idr0: FULL.idr0 & !(1 << 12), ..FULL };
    let rig = rig(traits);
    rig.model.eager([8]);
    let parent = parent(&rig);
    map(&parent, iova(0x4000_0000, 0x1000 * PAGE), ram(0, 0x1000 * PAGE), RW).unwrap();
    for round in 0..300 {
        let space = rig.asked(&of(Translation::Nested(parent.clone())));
        rig.smmu.attach(id(8), &space).unwrap();
        assert_eq!(rig.reads(8, 0x1000), None, "round {round} sees another round's memory");
        map(&space, iova(0x1000, PAGE), run_of(0x4000_0000 + round * PAGE, PAGE), RW).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM + round * PAGE));
        rig.smmu.block(id(8)).unwrap();
    }
    rig.model.assert_clean();
}

#[test]
fn only_a_stage_2_of_the_same_smmu_that_maps_the_tables_is_a_parent() {
    let (rig, other) = (rig(FULL), rig(FULL));
    let nested = |parent| rig.smmu.create_with(&of(Translation::Nested(parent))).map(|_| ());
    assert_eq!(nested(other.asked(&of(Translation::Stage2))), Err(AttachError::ForeignSpace));
    assert_eq!(nested(rig.space()), Err(AttachError::Unsupported("a parent that is not a stage 2")));
    let empty = rig.asked(&of(Translation::Stage2));
    let what = "a parent that does not map the tables to themselves";
    assert_eq!(nested(empty.clone()), Err(AttachError::Unsupported(what)));
    // Elsewhere is not good enough.
    map(&empty, iova(TABLES.0, TABLES.1), ram(0, TABLES.1), RW).unwrap();
    assert_eq!(nested(empty), Err(AttachError::Unsupported(what)));
}

#[test]
fn a_stage_1_puts_out_no_more_than_its_parent_takes() {
    let rig = rig(FULL);
    let small = rig.asked(&Request { input_bits: Some(39), ..of(Translation::Stage2) });
    map(&small, iova(TABLES.0, TABLES.1), run_of(TABLES.0, TABLES.1), Prot::READ).unwrap();
    let space = rig.asked(&of(Translation::Nested(small)));
    // The architecture's sizes go from 36 to 40.
    assert_eq!(space.aperture().output_max.get(), (1 << 36) - 1);
    let beyond = map(&space, iova(0x1000, PAGE), run_of(1 << 36, PAGE), RW);
    assert!(matches!(beyond, Err(MapError::OutputTooLarge(_))), "{beyond:?}");
}

#[test]
fn a_parents_failed_revocation_is_made_up_for_by_the_next() {
    let rig = rig_with(FULL, hasty());
    let parent = parent(&rig);
    map(&parent, iova(0x4000_0000, 2 * PAGE), ram(0, 2 * PAGE), RW).unwrap();
    let space = rig.asked(&of(Translation::Nested(parent.clone())));
    rig.smmu.attach(id(8), &space).unwrap();
    map(&space, iova(0x1000, 2 * PAGE), run_of(0x4000_0000, 2 * PAGE), RW).unwrap();
    assert_eq!(rig.reads(8, 0x1000), Some(RAM));
    rig.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_ALL as u8));
    assert_eq!(parent.revoke(&[iova(0x4000_0000, PAGE)]), Err(RevokeError::Dead));
    assert_eq!(rig.reads(8, 0x1000), Some(RAM), "the combined translation is still cached");
    assert_eq!(parent.revoke(&[iova(0x4000_0000, PAGE)]), Err(RevokeError::NotMapped(Iova::new(0x4000_0000))));
    assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
}

#[test]
fn identifiers_of_both_kinds_run_out_with_an_error_and_come_back_clean() {
    // Eight bits of each.
    let traits = Traits { idr0: FULL.idr0 & !(1 << 12 | 1 << 18), ..FULL };
    for translation in [Translation::Stage1, Translation::Stage2] {
        let rig = rig(traits);
        rig.model.eager([8]);
        let request = of(translation);
        let mut spaces: Vec<_> = (0..255).map(|_| rig.asked(&request)).collect();
        assert!(matches!(rig.smmu.create_with(&request), Err(AttachError::NoIdentifier)));
        // The one that comes free was used, and what it was used for is not seen by the next.
        let used = spaces.swap_remove(100);
        rig.smmu.attach(id(8), &used).unwrap();
        map(&used, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        rig.smmu.block(id(8)).unwrap();
        drop(used);
        let next = rig.asked(&request);
        assert!(matches!(rig.smmu.create_with(&request), Err(AttachError::NoIdentifier)));
        rig.smmu.attach(id(8), &next).unwrap();
        assert_eq!(rig.reads(8, 0x1000), None);
        rig.model.assert_clean();
    }
}

#[test]
fn an_identifier_whose_invalidation_failed_is_never_given_out_again() {
    let traits = Traits { idr0: FULL.idr0 & !(1 << 12 | 1 << 18), ..FULL };
    let rig = rig_with(traits, hasty());
    let mut spaces: Vec<_> = (0..255).map(|_| rig.space()).collect();
    rig.model.behave(|b| b.consumption = Consumption::Stuck);
    spaces.pop();
    rig.model.behave(|b| b.consumption = Consumption::Immediate);
    rig.model.run();
    assert!(matches!(rig.smmu.create(), Err(AttachError::NoIdentifier)));
    spaces.pop();
    assert!(rig.smmu.create().is_ok());
    assert_eq!(rig.smmu.statistics().leaked_spaces, 1);
}

#[test]
fn a_space_that_cannot_be_made_leaves_nothing_behind() {
    for allowance in 0..3 {
        for translation in [Translation::Stage1, Translation::Stage2] {
            let rig = rig(FULL);
            let live = rig.memory.live();
            rig.memory.allow(Some(allowance));
            let made = rig.smmu.create_with(&of(translation));
            rig.memory.allow(None);
            if let Ok(made) = made {
                drop(made);
            }
            assert_eq!(rig.memory.live(), live);
            let all: Vec<_> = (0..300).map(|_| rig.space()).collect();
            assert_eq!(all.len(), 300);
        }
    }
}
