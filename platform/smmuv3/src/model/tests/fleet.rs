//! One space behind several SMMUs.
//!
//! Seen red: the second SMMU not invalidated; the second's failure not reported; the first's failure keeping the second from
//! being invalidated; ranges beyond those with hints forgotten.

use super::super::Consumption;
use super::*;
use crate::spec::command::opcode;
use crate::{Fleet, Request, Translation};
use iommu::pgtable::Granule;
use iommu::{AttachError, RevokeError};

/// SMMUs of these kinds with the same memory behind them.
fn fleet(traits: &[Traits], config: &Config) -> (&'static ModelMemory, Vec<Rig>, Fleet<Arc<Model>>) {
    let memory = ModelMemory::new();
    let rigs: Vec<Rig> = traits
        .iter()
        .map(|&traits| {
            let model = Model::new(traits, memory);
            let (smmu, log) = start(memory, &model, config.clone());
            Rig { memory, model, smmu: smmu.unwrap(), log }
        })
        .collect();
    let fleet = Fleet::new(rigs.iter().map(|rig| rig.smmu.clone()));
    (memory, rigs, fleet)
}

#[test]
fn a_domain_behind_two_smmus_is_the_same_to_both_and_revoked_from_both() {
    for pair in [[Traits::NESTED, Traits::NESTED], [FULL, Traits::MINIMAL], [Traits::OLD, FULL_NON_COHERENT]] {
        let (_, rigs, fleet) = fleet(&pair, &patient());
        let space = fleet.create(&Request::default()).unwrap();
        for (stream, rig) in [8, 9].into_iter().zip(&rigs) {
            rig.model.adversary(u64::from(stream), [stream]);
            rig.smmu.attach(id(stream), &space).unwrap();
        }
        map(&space, iova(0x1000, 3 * PAGE), ram(0, 3 * PAGE), RW).unwrap();
        assert_eq!((rigs[0].reads(8, 0x2000), rigs[1].reads(9, 0x2000)), (Some(RAM + PAGE), Some(RAM + PAGE)));
        space.revoke(&[iova(0x1000, 2 * PAGE)]).unwrap();
        for (stream, rig) in [8, 9].into_iter().zip(&rigs) {
            assert!(rig.model.paths_to(ram(0, 2 * PAGE), &[id(stream)]).is_empty());
            assert_eq!(rig.reads(stream, 0x3000), Some(RAM + 2 * PAGE));
        }
        // More ranges than have hints.
        let singles: Vec<_> = (0..20).map(|page| iova(0x10_0000 + 2 * page * PAGE, PAGE)).collect();
        for (page, &single) in (0..).zip(&singles) {
            map(&space, single, ram(0x10_0000 + page * PAGE, PAGE), RW).unwrap();
        }
        assert_eq!(
            (rigs[0].reads(8, 0x10_2000), rigs[1].reads(9, 0x10_2000)),
            (Some(RAM + 0x10_1000), Some(RAM + 0x10_1000))
        );
        space.revoke(&singles).unwrap();
        for (stream, rig) in [8, 9].into_iter().zip(&rigs) {
            assert!(rig.model.paths_to(ram(0x10_0000, 20 * PAGE), &[id(stream)]).is_empty());
            rig.smmu.block(id(stream)).unwrap();
        }
        drop(space);
        rigs.iter().for_each(|rig| rig.model.assert_clean());
    }
}

#[test]
fn a_revocation_that_one_smmu_does_not_complete_has_failed_and_the_others_are_invalidated_all_the_same() {
    for stuck in 0..3 {
        let (_, rigs, fleet) = fleet(&[Traits::NESTED; 3], &hasty());
        let space = fleet.create(&Request::default()).unwrap();
        for rig in &rigs {
            rig.smmu.attach(id(8), &space).unwrap();
        }
        map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        assert!(rigs.iter().all(|rig| rig.reads(8, 0x1000) == Some(RAM)));
        rigs[stuck].model.behave(|b| b.consumption = Consumption::Stuck);
        assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut));
        for (number, rig) in rigs.iter().enumerate() {
            assert_eq!(rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty(), number != stuck);
        }
        rigs[stuck].model.behave(|b| b.consumption = Consumption::Immediate);
        rigs[stuck].model.run();
        // What was refused to nobody in particular: the next revocation takes everything, everywhere.
        rigs.iter().for_each(|rig| drop(rig.model.take_log()));
        assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::NotMapped(Iova::new(0x1000))));
        for rig in &rigs {
            assert_eq!(rig.model.take_log(), [opcode::TLBI_NH_ASID as u8, opcode::SYNC as u8]);
        }
    }
}

#[test]
fn a_fleet_can_what_the_least_of_it_can() {
    let (_, rigs, fleet) = fleet(&[FULL, Traits::MINIMAL], &Config { input_bits: 48, ..patient() });
    let space = fleet.create(&Request::default()).unwrap();
    assert_eq!(space.aperture().output_max.get(), (1 << 40) - 1);
    let sixteen = fleet.create(&Request { granule: Some(Granule::K16), ..Request::default() });
    assert!(matches!(sixteen, Err(AttachError::Unsupported("a granule of this size"))));
    let two = fleet.create(&Request { translation: Translation::Stage2, ..Request::default() });
    assert!(matches!(two, Err(AttachError::Unsupported("stage 2"))));
    // A space of one is not known to the other; a fleet's is known to both.
    assert_eq!(rigs[1].smmu.attach(id(8), &rigs[0].space()), Err(AttachError::ForeignSpace));
    let (_, mixed, both) = self::fleet(&[Traits::STAGE2, Traits::OLD], &patient());
    assert!(matches!(both.create(&Request::default()), Err(AttachError::Unsupported(_))));
    let nobody: Fleet<Arc<Model>> = Fleet::new([]);
    assert!(nobody.create(&Request::default()).is_err());
    // The same one twice is once.
    let twice = Fleet::new([mixed[0].smmu.clone(), mixed[0].smmu.clone()]);
    assert_eq!(twice.smmus().len(), 1);
}

#[test]
fn identifiers_and_tables_come_back_from_every_smmu() {
    let traits = Traits { idr0: Traits::NESTED.idr0 & !(1 << 12), ..Traits::NESTED };
    let (memory, rigs, fleet) = fleet(&[traits, traits], &patient());
    // All of the second's: the fleet cannot have one, and takes none of the first's.
    let taken: Vec<_> = (0..255).map(|_| rigs[1].space()).collect();
    let live = memory.live();
    assert!(matches!(fleet.create(&Request::default()), Err(AttachError::NoIdentifier)));
    assert_eq!(memory.live(), live);
    drop(taken);
    let first: Vec<_> = (0..255).map(|_| rigs[0].space()).collect();
    assert_eq!(first.len(), 255);
}
