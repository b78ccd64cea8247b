//! Mapping and revoking.

use super::{A, RW, id, iova, map, phys, space_with, started};
use crate::fakes::{Asked, Behaviour};
use crate::spec::iommu::status;
use ::iommu::contract::{AddressSpace, Iommu};
use ::iommu::{Iova, MapError, PhysAddr, Prot, RevokeError};
use std::sync::Arc;

/// An attached space, in which nothing is mapped.
fn attached(driver: &super::VirtioIommu) -> Arc<dyn AddressSpace> {
    let space = driver.create().unwrap();
    driver.attach(id(A), &space).unwrap();
    space
}

#[test]
fn after_a_revocation_the_device_reaches_nothing_there() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let runs = [phys(0x8000_0000, 0x2000), phys(0x9000_0000, 0x1000)];
    map(&space, iova(0x1000, 0x3000), &runs, RW).unwrap();
    assert_eq!(rig.fake.reach(A, 0x3fff), Some((0x9000_0fff, 3)));
    assert_eq!(space.translate(Iova::new(0x2fff)), Some((PhysAddr::new(0x8000_1fff), RW)));
    space.revoke(&[iova(0x1000, 0x3000)]).unwrap();
    for page in 0..5 {
        assert_eq!((rig.fake.reach(A, page << 12), space.translate(Iova::new(page << 12))), (None, None));
    }
    assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(RevokeError::NotMapped(Iova::new(0x1000))));
}

#[test]
fn permissions_are_those_that_were_asked_for() {
    let (rig, driver) = started();
    let space = attached(&driver);
    for (page, prot, flags) in [(1, Prot::READ, 1), (2, Prot::WRITE, 2), (3, RW | Prot::MMIO, 7)] {
        map(&space, iova(page << 12, 0x1000), &[phys(0x8000_0000, 0x1000)], prot).unwrap();
        assert_eq!(rig.fake.reach(A, page << 12), Some((0x8000_0000, flags)));
        assert_eq!(space.translate(Iova::new(page << 12)), Some((PhysAddr::new(0x8000_0000), prot)));
    }
}

#[test]
fn one_range_is_one_request_however_scattered_its_memory_and_runs_that_touch_are_one_mapping() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let runs: Vec<_> = (0..100).map(|page| phys(0x8000_0000 + page * 0x2000, 0x1000)).collect();
    map(&space, iova(0x10_0000, 100 << 12), &runs, RW).unwrap();
    let touching: Vec<_> = (0..8).map(|page| phys(0x9000_0000 + page * 0x1000, 0x1000)).collect();
    map(&space, iova(0x20_0000, 8 << 12), &touching, RW).unwrap();
    let maps = rig.fake.log().iter().filter(|asked| matches!(asked, Asked::Map(..))).count();
    assert_eq!(maps, 101);
    space.revoke(&[iova(0x10_0000, 100 << 12), iova(0x20_0000, 8 << 12)]).unwrap();
    assert_eq!(rig.fake.log().len(), 2);
}

#[test]
fn a_part_of_a_mapping_is_revoked_only_if_it_was_mapped_page_by_page() {
    let (rig, driver) = started();
    let space = attached(&driver);
    map(&space, iova(0x1000, 0x4000), &[phys(0x8000_0000, 0x4000)], RW).unwrap();
    assert_eq!(space.revoke(&[iova(0x2000, 0x1000)]), Err(RevokeError::SplitsBlock(Iova::new(0x1000))));
    assert_eq!(rig.fake.reach(A, 0x2000), Some((0x8000_1000, 3)));
    map(&space, iova(0x1_0000, 0x4000), &[phys(0x9000_0000, 0x4000)], RW | Prot::PAGEWISE).unwrap();
    space.revoke(&[iova(0x1_2000, 0x1000)]).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1_2000), None);
    assert_eq!(rig.fake.reach(A, 0x1_3000), Some((0x9000_3000, 3)));
    // A hole is reported, and the rest revoked.
    let hole = Err(RevokeError::NotMapped(Iova::new(0x1_2000)));
    assert_eq!(space.revoke(&[iova(0x1_0000, 0x4000)]), hole);
    assert_eq!(rig.fake.reach(A, 0x1_3000), None);
}

#[test]
fn what_cannot_be_mapped_is_refused_by_name() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let page = phys(0x8000_0000, 0x1000);
    let _ = rig.fake.log();
    map(&space, iova(0x1000, 0x2000), &[phys(0x7000_0000, 0x2000)], RW).unwrap();
    let tried = |at, runs: &[_], prot| map(&space, at, runs, prot).unwrap_err();
    assert_eq!(tried(iova(0x2000, 0x1000), &[page], RW), MapError::AlreadyMapped(Iova::new(0x2000)));
    assert_eq!(tried(iova(0, 0x2000), &[page, page], RW), MapError::AlreadyMapped(Iova::new(0x1000)));
    assert_eq!(tried(iova(0x5000, 0x1000), &[page], Prot::MMIO), MapError::BadProt);
    assert_eq!(tried(iova(0x5800, 0x1000), &[page], RW), MapError::Misaligned(0x1000));
    assert_eq!(tried(iova(0x5000, 0x1000), &[phys(0x8000_0800, 0x1000)], RW), MapError::Misaligned(0x1000));
    assert_eq!(tried(iova(1 << 48, 0x1000), &[page], RW), MapError::OutOfAperture(iova(1 << 48, 0x1000)));
    assert!(matches!(tried(iova(0x5000, 0x1000), &[phys(1 << 52, 0x1000)], RW), MapError::OutputTooLarge(_)));
    assert_eq!(tried(iova(0x5000, 0x2000), &[page], RW), MapError::LengthMismatch { iova: 0x2000, physical: 0x1000 });
    map(&space, iova(0x5000, 0), &[], RW).unwrap();
    assert_eq!(rig.fake.log().len(), 1, "only the one mapping has been asked for");
}

#[test]
fn a_mapping_that_is_refused_half_way_leaves_nothing() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let runs: Vec<_> = (0..5).map(|page| phys(0x8000_0000 + page * 0x2000, 0x1000)).collect();
    for (refused, error) in [(status::NOMEM, MapError::OutOfMemory), (status::RANGE, MapError::Refused)] {
        rig.fake.refuse(&[None, None, Some(refused)]);
        assert_eq!(map(&space, iova(0x1000, 0x5000), &runs, RW), Err(error));
        for page in 1..6 {
            assert_eq!((rig.fake.reach(A, page << 12), space.translate(Iova::new(page << 12))), (None, None));
        }
    }
    map(&space, iova(0x1000, 0x5000), &runs, RW).unwrap();
    assert_eq!(rig.fake.reach(A, 0x5000), Some((0x8000_8000, 3)));
}

/// The memory could not be given back: it may be mapped. Only a revocation decides.
#[test]
fn a_mapping_in_doubt_counts_as_made_and_its_revocation_fails() {
    for behaviour in [Behaviour::Keep, Behaviour::Swallow, Behaviour::WrongId(9999), Behaviour::NeedReset] {
        let (rig, driver) = started();
        let space = attached(&driver);
        rig.device.plan(&[behaviour]);
        assert_eq!(map(&space, iova(0x1000, 0x1000), &[phys(0x8000_0000, 0x1000)], RW), Ok(()), "{behaviour:?}");
        assert!(driver.is_dead());
        assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(RevokeError::Dead), "{behaviour:?}");
        // What the device has never been asked is certain.
        assert_eq!(map(&space, iova(0x5000, 0x1000), &[phys(0x8000_0000, 0x1000)], RW), Err(MapError::Dead));
    }
    // Half of it refused, and the half that was made cannot be unmapped.
    let (rig, driver) = started();
    let space = attached(&driver);
    rig.fake.refuse(&[None, Some(status::NOMEM), Some(status::DEVERR)]);
    let runs = [phys(0x8000_0000, 0x1000), phys(0x9000_0000, 0x1000)];
    assert_eq!(map(&space, iova(0x1000, 0x2000), &runs, RW), Ok(()));
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
    space.revoke(&[iova(0x1000, 0x2000)]).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), None);
}

#[test]
fn a_revocation_that_is_not_answered_with_success_is_none() {
    let cases = [
        (Behaviour::Swallow, RevokeError::TimedOut),
        (Behaviour::Keep, RevokeError::TimedOut),
        (Behaviour::WrongId(9999), RevokeError::TimedOut),
        (Behaviour::Jump(5), RevokeError::TimedOut),
        (Behaviour::NeedReset, RevokeError::TimedOut),
        // Returned, without having been carried out or with an answer that was never written.
        (Behaviour::Ignore(0), RevokeError::Dead),
        (Behaviour::Ignore(4), RevokeError::Dead),
        (Behaviour::Length(0), RevokeError::Dead),
    ];
    for (behaviour, error) in cases {
        let (rig, driver) = started();
        let space = attached(&driver);
        map(&space, iova(0x1000, 0x1000), &[phys(0x8000_0000, 0x1000)], RW).unwrap();
        rig.device.plan(&[behaviour]);
        assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(error), "{behaviour:?}");
        // It is still on record, so that nothing else is mapped there and a later revocation is not mistaken for a needless one.
        assert!(space.translate(Iova::new(0x1000)).is_some(), "{behaviour:?}");
    }
    for refused in [status::IOERR, status::DEVERR, status::INVAL, status::RANGE, status::NOENT, status::NOMEM, 0x77] {
        let (rig, driver) = started();
        let space = attached(&driver);
        for at in [0x1000, 0x5000] {
            map(&space, iova(at, 0x1000), &[phys(0x8000_0000 + at, 0x1000)], RW).unwrap();
        }
        rig.fake.refuse(&[Some(refused)]);
        assert_eq!(space.revoke(&[iova(0x1000, 0x1000), iova(0x5000, 0x1000)]), Err(RevokeError::Dead), "{refused}");
        assert_eq!(space.translate(Iova::new(0x5000)), None, "the other range was revoked");
        // Once the device does as it is told, so is this one.
        space.revoke(&[iova(0x1000, 0x1000)]).unwrap();
        assert_eq!(rig.fake.reach(A, 0x1000), None);
    }
}

#[test]
fn a_dead_device_is_not_waited_for_again() {
    let (rig, driver) = started();
    let space = attached(&driver);
    map(&space, iova(0x1000, 0x1000), &[phys(0x8000_0000, 0x1000)], RW).unwrap();
    rig.device.plan(&[Behaviour::Swallow]);
    assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(RevokeError::TimedOut));
    let _ = rig.fake.log();
    for _ in 0..10 {
        assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(RevokeError::Dead));
    }
    assert_eq!(rig.fake.log(), []);
}

#[test]
fn a_space_that_is_attached_to_nothing_is_mapped_and_revoked_without_the_device() {
    let (rig, driver) = started();
    let space = space_with(&driver, 0x8000_0000);
    assert_eq!(space.translate(Iova::new(0x1fff)), Some((PhysAddr::new(0x8000_0fff), RW)));
    space.revoke(&[iova(0x1000, 0x1000)]).unwrap();
    assert_eq!(rig.fake.log(), []);
    assert_eq!(space.revoke(&[iova(1 << 48, 0x1000)]), Err(RevokeError::OutOfAperture(iova(1 << 48, 0x1000))));
}
