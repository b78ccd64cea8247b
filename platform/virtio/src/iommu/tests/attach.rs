//! Attaching, replacing, blocking.

use super::{A, B, Rig, SPARE, id, iova, map, phys, space_with, started};
use crate::fakes::{Asked, Behaviour};
use crate::spec::iommu::status;
use ::iommu::AttachError;
use ::iommu::contract::Iommu;

#[test]
fn what_was_mapped_before_the_attachment_is_reached_after_it() {
    let (rig, driver) = started();
    let space = space_with(&driver, 0x8000_0000);
    assert!(rig.fake.domains().is_empty());
    driver.attach(id(A), &space).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1234), Some((0x8000_0234, 3)));
    assert_eq!(rig.fake.reach(A, 0x2000), None);
    assert_eq!(rig.fake.reach(B, 0x1234), None);
    // The same again is no change.
    let _ = rig.fake.log();
    driver.attach(id(A), &space).unwrap();
    assert_eq!(rig.fake.log(), []);
}

#[test]
fn a_replacement_has_no_moment_in_which_the_device_is_translated_by_neither() {
    let (rig, driver) = started();
    let (old, new) = (space_with(&driver, 0x8000_0000), space_with(&driver, 0x9000_0000));
    // More than one batch of them, so that a domain filled late would be seen half full.
    for page in 0..100 {
        map(&new, iova(0x10_0000 + page * 0x1000, 0x1000), &[phys(0x100_0000 + page * 0x2000, 0x1000)], super::RW)
            .unwrap();
    }
    driver.attach(id(A), &old).unwrap();
    rig.fake.watch(A, 0x1000);
    for _ in 0..3 {
        let _ = rig.fake.seen();
        driver.attach(id(A), &new).unwrap();
        let seen = rig.fake.seen();
        let turn = seen.iter().position(|seen| *seen == Some(0x9000_0000)).unwrap();
        assert!(seen[..turn].iter().all(|seen| *seen == Some(0x8000_0000)), "{seen:?}");
        assert!(seen[turn..].iter().all(|seen| *seen == Some(0x9000_0000)), "{seen:?}");
        assert_eq!(rig.fake.reach(A, 0x10_0000 + 99 * 0x1000), Some((0x100_0000 + 99 * 0x2000, 3)));
        assert_eq!(rig.fake.reach(SPARE, 0x1000), None, "the spare endpoint has been left in the domain");
        driver.attach(id(A), &old).unwrap();
    }
    assert_eq!(rig.fake.domains().len(), 1);
}

#[test]
fn without_a_spare_endpoint_a_replacement_is_refused_and_the_device_stays_where_it_is() {
    let rig = Rig::new(|_| {});
    let driver = rig.start_with(None).unwrap();
    let (old, new) = (space_with(&driver, 0x8000_0000), space_with(&driver, 0x9000_0000));
    driver.attach(id(A), &old).unwrap();
    assert!(matches!(driver.attach(id(A), &new), Err(AttachError::Unsupported(_))));
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
    // Blocked, it has nothing to lose.
    driver.block(id(A)).unwrap();
    driver.attach(id(A), &new).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x9000_0000, 3)));
    // And a domain that exists already can be had at any time.
    driver.attach(id(B), &old).unwrap();
    driver.attach(id(A), &old).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
}

#[test]
fn a_blocked_device_reaches_nothing_and_gets_everything_back() {
    let (rig, driver) = started();
    let space = space_with(&driver, 0x8000_0000);
    driver.attach(id(A), &space).unwrap();
    driver.block(id(A)).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), None);
    driver.block(id(A)).unwrap();
    // What is mapped and revoked meanwhile counts.
    map(&space, iova(0x5000, 0x1000), &[phys(0x5_0000, 0x1000)], super::RW).unwrap();
    space.revoke(&[iova(0x1000, 0x1000)]).unwrap();
    driver.attach(id(A), &space).unwrap();
    assert_eq!((rig.fake.reach(A, 0x1000), rig.fake.reach(A, 0x5000)), (None, Some((0x5_0000, 3))));
}

#[test]
fn devices_that_share_an_address_space_share_it_until_the_last_one_leaves() {
    let (rig, driver) = started();
    let space = space_with(&driver, 0x8000_0000);
    driver.attach(id(A), &space).unwrap();
    driver.attach(id(B), &space).unwrap();
    assert_eq!(rig.fake.domains().len(), 1);
    driver.block(id(A)).unwrap();
    map(&space, iova(0x5000, 0x1000), &[phys(0x5_0000, 0x1000)], super::RW).unwrap();
    assert_eq!((rig.fake.reach(B, 0x5000), rig.fake.reach(A, 0x5000)), (Some((0x5_0000, 3)), None));
    driver.block(id(B)).unwrap();
    assert!(rig.fake.domains().is_empty());
}

#[test]
fn an_endpoint_that_does_not_exist_and_a_space_of_another_iommu_are_refused() {
    let (rig, driver) = started();
    let (other_rig, other) = started();
    let space = space_with(&driver, 0x8000_0000);
    assert_eq!(driver.attach(id(99), &space), Err(AttachError::NoSuchStream(id(99))));
    assert_eq!(other.attach(id(A), &space), Err(AttachError::ForeignSpace));
    assert!(matches!(driver.attach(id(SPARE), &space), Err(AttachError::Unsupported(_))));
    assert!(rig.fake.domains().is_empty() && other_rig.fake.domains().is_empty());
    driver.attach(id(A), &space).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
}

#[test]
fn an_attachment_that_cannot_be_filled_is_undone() {
    let (rig, driver) = started();
    let (old, new) = (space_with(&driver, 0x8000_0000), space_with(&driver, 0x9000_0000));
    // For a blocked device: ATTACH is carried out, MAP is not.
    rig.fake.refuse(&[None, Some(status::NOMEM)]);
    assert_eq!(driver.attach(id(A), &old), Err(AttachError::OutOfMemory));
    assert_eq!(rig.fake.reach(A, 0x1000), None);
    assert!(rig.fake.domains().is_empty());
    driver.attach(id(A), &old).unwrap();
    // For one that has something: it keeps it.
    rig.fake.refuse(&[None, Some(status::NOMEM)]);
    assert_eq!(driver.attach(id(A), &new), Err(AttachError::OutOfMemory));
    rig.fake.refuse(&[None, None, Some(status::DEVERR)]);
    assert!(matches!(driver.attach(id(A), &new), Err(AttachError::Unsupported(_))));
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
    assert_eq!(rig.fake.domains().len(), 1);
    // The mappings are as they were.
    old.revoke(&[iova(0x1000, 0x1000)]).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), None);
    driver.attach(id(A), &new).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x9000_0000, 3)));
}

#[test]
fn a_lost_answer_to_an_attachment_keeps_both_spaces_in_doubt() {
    let (rig, driver) = started();
    let (old, new) = (space_with(&driver, 0x8000_0000), space_with(&driver, 0x9000_0000));
    driver.attach(id(A), &old).unwrap();
    // ATTACH spare, MAP, and the ATTACH of the device is carried out without an answer.
    rig.device.plan(&[Behaviour::Honest, Behaviour::Honest, Behaviour::Keep]);
    assert_eq!(driver.attach(id(A), &new), Err(AttachError::TimedOut));
    assert!(driver.is_dead());
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x9000_0000, 3)));
    // Neither can be shown to be out of reach.
    for space in [old, new] {
        assert_eq!(space.revoke(&[iova(0x1000, 0x1000)]), Err(::iommu::RevokeError::Dead));
    }
    assert_eq!(driver.attach(id(B), &space_with(&driver, 0x5000)), Err(AttachError::Dead));
    assert_eq!(driver.block(id(A)), Err(AttachError::Dead));
}

#[test]
fn a_device_that_may_be_attached_is_not_taken_for_blocked() {
    // The domain could be filled only in part, and the device not be taken out of it.
    let (rig, driver) = started();
    let space = space_with(&driver, 0x8000_0000);
    map(&space, iova(0x5000, 0x1000), &[phys(0x5_0000, 0x1000)], super::RW).unwrap();
    rig.fake.refuse(&[None, None, Some(status::NOMEM), Some(status::DEVERR)]);
    assert_eq!(driver.attach(id(A), &space), Err(AttachError::OutOfMemory));
    assert_eq!(rig.fake.reach(A, 0x1000), Some((0x8000_0000, 3)));
    driver.block(id(A)).unwrap();
    assert_eq!(rig.fake.reach(A, 0x1000), None);
    // It was carried out, and never answered.
    let (rig, driver) = started();
    rig.device.plan(&[Behaviour::Keep]);
    assert_eq!(driver.attach(id(A), &space_with(&driver, 0x8000_0000)), Err(AttachError::TimedOut));
    assert_eq!(driver.block(id(A)), Err(AttachError::Dead));
}

#[test]
fn identifiers_are_used_again_only_when_they_are_free_and_may_run_out() {
    let rig = Rig::new(|registers| {
        registers.config[crate::spec::iommu::config::DOMAIN_START..][..8].copy_from_slice(&[7, 0, 0, 0, 8, 0, 0, 0]);
    });
    let driver = rig.start().unwrap();
    let spaces = [0x8000_0000, 0x9000_0000, 0xa000_0000].map(|target| space_with(&driver, target));
    driver.attach(id(A), &spaces[0]).unwrap();
    driver.attach(id(B), &spaces[1]).unwrap();
    assert_eq!(driver.attach(id(A), &spaces[2]), Err(AttachError::NoIdentifier));
    driver.block(id(B)).unwrap();
    for _ in 0..5 {
        driver.attach(id(A), &spaces[2]).unwrap();
        driver.attach(id(A), &spaces[0]).unwrap();
    }
    let attached = rig.fake.log().into_iter().filter_map(|asked| match asked {
        Asked::Attach(domain, ..) => Some(domain),
        _ => None,
    });
    assert!(attached.into_iter().all(|domain| (7..=8).contains(&domain)));
}

#[test]
#[allow(unsafe_code)]
fn bypassing_is_asked_for_by_name_and_ends_with_the_next_attachment() {
    let (rig, driver) = started();
    // SAFETY: no device, no memory.
    unsafe { driver.bypass(id(A)) }.unwrap();
    assert_eq!(rig.fake.reach(A, 0x7000), Some((0x7000, 3)));
    assert_eq!(rig.fake.reach(B, 0x7000), None);
    driver.attach(id(A), &space_with(&driver, 0x8000_0000)).unwrap();
    assert_eq!((rig.fake.reach(A, 0x7000), rig.fake.reach(A, 0x1000)), (None, Some((0x8000_0000, 3))));
    // SAFETY: as above.
    unsafe { driver.bypass(id(A)) }.unwrap();
    driver.block(id(A)).unwrap();
    assert_eq!(rig.fake.reach(A, 0x7000), None);
}

/// The answer comes when the domain that it is about is gone, and another in its place that was filled without the mapping.
#[test]
fn a_mapping_that_is_overtaken_by_a_swap_is_made_in_the_new_domain() {
    let rig = Rig::new(|_| {});
    let driver = rig.start_patiently(Some(id(SPARE)), 10_000).unwrap();
    let (one, other) = (space_with(&driver, 0x8000_0000), driver.create().unwrap());
    driver.attach(id(A), &one).unwrap();
    let buffers = rig.device.kept();
    rig.device.plan(&[Behaviour::Keep]);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| map(&one, iova(0x5000, 0x1000), &[phys(0x5_0000, 0x1000)], super::RW));
        while rig.device.kept() == buffers {
            std::thread::yield_now();
        }
        driver.attach(id(A), &other).unwrap();
        driver.attach(id(A), &one).unwrap();
        assert_eq!(rig.fake.reach(A, 0x5000), None, "nobody has mapped it there yet");
        assert!(rig.device.release(buffers));
        thread.join().unwrap().unwrap();
    });
    assert_eq!((rig.fake.reach(A, 0x5000), rig.fake.reach(A, 0x1000)), (Some((0x5_0000, 3)), Some((0x8000_0000, 3))));
    one.revoke(&[iova(0x5000, 0x1000)]).unwrap();
    assert_eq!(rig.fake.reach(A, 0x5000), None);
}

/// The range is no device's any more although the domain that the request names does not exist.
#[test]
fn a_revocation_that_is_overtaken_by_a_swap_holds() {
    let rig = Rig::new(|_| {});
    let driver = rig.start_patiently(Some(id(SPARE)), 10_000).unwrap();
    let (one, other) = (space_with(&driver, 0x8000_0000), driver.create().unwrap());
    driver.attach(id(A), &one).unwrap();
    let buffers = rig.device.kept();
    rig.device.plan(&[Behaviour::Keep]);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| one.revoke(&[iova(0x1000, 0x1000)]));
        while rig.device.kept() == buffers {
            std::thread::yield_now();
        }
        driver.attach(id(A), &other).unwrap();
        driver.attach(id(A), &one).unwrap();
        assert!(rig.device.release(buffers));
        assert_eq!(thread.join().unwrap(), Ok(()));
    });
    assert_eq!(rig.fake.reach(A, 0x1000), None);
}

/// Threads that map and revoke while the space moves in and out of the device lose no mapping and leave none behind.
#[test]
fn mappings_made_while_the_space_is_swapped_are_all_there_and_those_revoked_are_not() {
    let (rig, driver) = started();
    let (one, other) = (driver.create().unwrap(), driver.create().unwrap());
    driver.attach(id(A), &one).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let one = &one;
            scope.spawn(move || {
                let base = 0x100_0000 * (thread + 1);
                for round in 0..300_u64 {
                    let at = iova(base + round * 0x1000, 0x1000);
                    map(one, at, &[phys(at.start().get() + (1 << 40), 0x1000)], super::RW).unwrap();
                    if round % 2 == 0 {
                        // A revocation may have to give up only if it is in the way of an attachment for too long.
                        one.revoke(&[at]).unwrap();
                    }
                }
            });
        }
        for _ in 0..60 {
            driver.attach(id(A), &other).unwrap();
            driver.attach(id(A), &one).unwrap();
        }
    });
    for thread in 0..3_u64 {
        for round in 0..300_u64 {
            let at = 0x100_0000 * (thread + 1) + round * 0x1000;
            let expected = (round % 2 == 1).then_some((at + (1 << 40), 3));
            assert_eq!(rig.fake.reach(A, at), expected, "thread {thread}, round {round}");
        }
    }
}
