//! Many mappings that the device is told of by one sync.

use super::{A, RW, id, iova, phys, space_with, started};
use crate::fakes::{Asked, Behaviour};
use crate::spec::iommu::status;
use ::iommu::contract::{AddressSpace, Iommu};
use ::iommu::{IovaRange, MapError, PhysRange, Prot, RevokeError};
use std::sync::Arc;
use std::vec::Vec;

/// Records a mapping of memory that exists in the fake's imagination only.
#[allow(unsafe_code)]
fn record(space: &Arc<dyn AddressSpace>, at: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
    // SAFETY: there is no such memory, and no such device.
    unsafe { space.map_unsynced(at, runs, prot) }
}

fn attached(driver: &super::VirtioIommu) -> Arc<dyn AddressSpace> {
    let space = driver.create().unwrap();
    driver.attach(id(A), &space).unwrap();
    space
}

/// Mappings of one page each, with a gap behind each, and their ranges.
fn recorded(space: &Arc<dyn AddressSpace>, count: u64) -> Vec<IovaRange> {
    let at = |i| iova(0x10_0000 + i * 0x2000, 0x1000);
    for i in 0..count {
        record(space, at(i), &[phys(0x8000_0000 + i * 0x2000, 0x1000)], RW).unwrap();
    }
    (0..count).map(at).collect()
}

fn reached(rig: &super::Rig, ranges: &[IovaRange]) -> usize {
    ranges.iter().filter(|range| rig.fake.reach(A, range.start().get()).is_some()).count()
}

/// Caught: `map_unsynced` that asks the device; a `sync` that asks one by one (32 notifications).
#[test]
fn the_device_is_told_by_the_sync_and_notified_once() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let _ = rig.fake.log();
    let ranges = recorded(&space, 32);
    assert_eq!((rig.fake.log(), reached(&rig, &ranges)), (Vec::new(), 0));
    let before = rig.device.notified();
    space.sync(&ranges).unwrap();
    assert_eq!((reached(&rig, &ranges), rig.device.notified() - before), (32, 1));
    assert_eq!(rig.fake.reach(A, 0x10_2000 + 0x123), Some((0x8000_2123, 3)));
    assert_eq!(rig.fake.log().iter().filter(|asked| matches!(asked, Asked::Map(..))).count(), 32);
    // Nothing is left to tell.
    space.sync(&ranges).unwrap();
    assert_eq!(rig.fake.log(), []);
    space.revoke(&ranges).unwrap();
    assert_eq!(reached(&rig, &ranges), 0);
}

/// Caught: `tell` that forgets what is beyond its first chunk.
#[test]
fn a_sync_of_more_than_fit_the_queue_tells_all_and_only_what_it_names() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let ranges = recorded(&space, 100);
    let (named, others) = ranges.split_at(90);
    space.sync(named).unwrap();
    assert_eq!((reached(&rig, named), reached(&rig, others)), (90, 0));
    space.sync(&ranges).unwrap();
    assert_eq!(reached(&rig, others), 10);
}

/// Caught: `revoke` that asks about what the device was never told (with a dead channel it would fail).
#[test]
fn what_was_never_told_is_revoked_without_asking() {
    let (rig, driver) = started();
    let space = attached(&driver);
    let ranges = recorded(&space, 4);
    let _ = rig.fake.log();
    assert_eq!(
        record(&space, ranges[1], &[phys(0x9000_0000, 0x1000)], RW),
        Err(MapError::AlreadyMapped(ranges[1].start()))
    );
    space.revoke(&ranges).unwrap();
    assert_eq!(rig.fake.log(), []);
    assert_eq!(space.revoke(&ranges[..1]), Err(RevokeError::NotMapped(ranges[0].start())));
    space.sync(&ranges).unwrap();
    assert_eq!((rig.fake.log(), reached(&rig, &ranges)), (Vec::new(), 0));
}

/// Caught: a failed `tell` that leaves its records `Unsynced`: the revocation would not ask, and the first page stay reachable.
#[test]
fn a_sync_that_is_refused_is_undone_by_a_revocation() {
    let (rig, driver) = started();
    let space = attached(&driver);
    for (refused, error) in [(status::NOMEM, MapError::OutOfMemory), (status::RANGE, MapError::Refused)] {
        let ranges = recorded(&space, 5);
        rig.fake.refuse(&[None, None, Some(refused)]);
        assert_eq!(space.sync(&ranges), Err(error));
        space.revoke(&ranges).unwrap();
        assert_eq!(reached(&rig, &ranges), 0);
    }
    let ranges = recorded(&space, 5);
    space.sync(&ranges).unwrap();
    assert_eq!(reached(&rig, &ranges), 5);
}

/// Caught: a lost `MAP` that counts as never made.
#[test]
fn a_sync_in_doubt_fails_and_so_does_its_revocation() {
    for behaviour in [Behaviour::Keep, Behaviour::Swallow, Behaviour::NeedReset] {
        let (rig, driver) = started();
        let space = attached(&driver);
        let ranges = recorded(&space, 2);
        rig.device.plan(&[behaviour]);
        assert_eq!(space.sync(&ranges), Err(MapError::Dead), "{behaviour:?}");
        assert_eq!(space.revoke(&ranges), Err(RevokeError::Dead), "{behaviour:?}");
    }
}

#[test]
fn what_is_recorded_before_the_device_has_the_domain_is_there_after_the_sync_and_the_attachment() {
    let (rig, driver) = started();
    let space = driver.create().unwrap();
    let ranges = recorded(&space, 3);
    space.sync(&ranges[..2]).unwrap();
    driver.attach(id(A), &space).unwrap();
    assert_eq!(reached(&rig, &ranges), 2);
    space.sync(&ranges).unwrap();
    assert_eq!(reached(&rig, &ranges), 3);
    // The domain goes and comes again, with all that was told.
    let other = space_with(&driver, 0x9000_0000);
    driver.attach(id(A), &other).unwrap();
    let more = iova(0x7000, 0x3000);
    record(&space, more, &[phys(0xa000_0000, 0x3000)], RW | Prot::PAGEWISE).unwrap();
    driver.attach(id(A), &space).unwrap();
    assert_eq!((reached(&rig, &ranges), reached(&rig, &[more])), (3, 0));
    space.sync(&[more]).unwrap();
    space.revoke(&[iova(0x8000, 0x1000)]).unwrap();
    assert_eq!((rig.fake.reach(A, 0x8000), rig.fake.reach(A, 0x9001)), (None, Some((0xa000_2001, 3))));
}
