//! Devices that are not what they should be, from reset to start.

use super::*;
use crate::spec::blk::{config, feature as blk};
use crate::spec::{feature, status};

fn refused(change: impl FnOnce(&mut Registers)) -> Error {
    let rig = Rig::new(64, change);
    let error = rig.start(16).map(drop).unwrap_err();
    assert_eq!(rig.host.device.stats().live_mappings, 0, "after {error}");
    assert_eq!(rig.host.device.stats().quarantined_pages, 0);
    rig.check();
    error
}

#[test]
fn only_what_is_offered_and_used_is_accepted() {
    let rig = Rig::new(64, |registers| {
        registers.features = u64::MAX;
        registers.config[config::SIZE_MAX..][..4].copy_from_slice(&65536_u32.to_le_bytes());
    });
    let _block = rig.start(16).unwrap();
    let ours = feature::VERSION_1
        | feature::ACCESS_PLATFORM
        | feature::ORDER_PLATFORM
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | blk::SIZE_MAX
        | blk::SEG_MAX
        | blk::RO
        | blk::BLK_SIZE
        | blk::FLUSH;
    assert_eq!(rig.device.accepted(), ours);
}

#[test]
fn the_status_is_raised_step_by_step() {
    let rig = Rig::new(64, |_| {});
    let _block = rig.start(16).unwrap();
    assert_eq!(rig.device.status_log(), [0, 1, 3, 11, 15]);
}

#[test]
fn a_legacy_device_is_refused() {
    assert_eq!(refused(|registers| registers.features &= !feature::VERSION_1), Error::Legacy);
}

#[test]
fn a_device_that_would_go_around_the_iommu_is_refused_and_told_so() {
    let rig = Rig::new(64, |registers| registers.features &= !feature::ACCESS_PLATFORM);
    assert_eq!(rig.start(16).map(drop), Err(Error::BypassesIommu));
    assert!(rig.device.status_log().iter().any(|value| value & status::FAILED != 0));
    assert_eq!(rig.device.accepted(), 0);
}

#[test]
fn a_device_that_takes_features_ok_back_is_refused() {
    let error = refused(|registers| registers.insists_on |= 1 << 60);
    assert!(matches!(error, Error::FeaturesRefused(_)), "{error}");
}

#[test]
fn a_device_of_another_type_is_refused() {
    assert_eq!(refused(|registers| registers.device_type = 1), Error::WrongDevice { expected: 2, found: 1 });
}

#[test]
fn a_device_whose_reset_never_ends_is_refused() {
    assert_eq!(refused(|registers| registers.claims_status = Some(0x40)), Error::ResetTimedOut);
}

#[test]
fn a_device_that_never_leaves_reset_is_refused() {
    let error = refused(|registers| registers.claims_status = Some(0));
    assert!(matches!(error, Error::FeaturesRefused(_)), "{error}");
}

#[test]
fn impossible_queues_are_refused() {
    assert_eq!(refused(|registers| registers.queues.clear()), Error::NoSuchQueue(0));
    assert_eq!(refused(|registers| registers.queues[0] = 0), Error::NoSuchQueue(0));
    assert_eq!(refused(|registers| registers.queues[0] = 2), Error::BadQueueSize { queue: 0, size: 2 });
    assert_eq!(refused(|registers| registers.queues[0] = 40_000), Error::BadQueueSize { queue: 0, size: 16 });
}

#[test]
fn a_queue_size_that_is_no_power_of_two_is_rounded_down() {
    let rig = Rig::new(64, |registers| registers.queues[0] = 13);
    assert_eq!(rig.start(16).unwrap().queue_handler().size(), 8);
}

#[test]
fn vectors_that_the_device_does_not_take_are_refused() {
    assert_eq!(refused(|registers| registers.vectors = 1), Error::NoVector(1));
    assert_eq!(refused(|registers| registers.vectors = 0), Error::NoVector(1));
}

#[test]
fn a_configuration_that_never_rests_is_refused() {
    assert_eq!(refused(|registers| registers.restless = true), Error::ConfigUnstable);
}

#[test]
fn a_configuration_that_changes_while_it_is_read_is_read_again() {
    let rig = Rig::new(64, |registers| registers.changes_once_after = Some(2));
    assert_eq!(rig.start(16).unwrap().geometry().sectors, 64);
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    fn field(offset: usize, value: u32) -> impl FnOnce(&mut Registers) {
        move |registers| {
            registers.features |= blk::SIZE_MAX;
            registers.config[config::SIZE_MAX..][..4].copy_from_slice(&4096_u32.to_le_bytes());
            registers.config[offset..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
    for value in [0, 1, 256, 513, 1 << 17, u32::MAX] {
        let bad = Error::BadConfig { field: "blk_size", value: value.into() };
        assert_eq!(refused(field(config::BLK_SIZE, value)), bad);
    }
    for value in [0, 511] {
        let bad = Error::BadConfig { field: "size_max", value: value.into() };
        assert_eq!(refused(field(config::SIZE_MAX, value)), bad);
    }
    assert_eq!(refused(field(config::SEG_MAX, 0)), Error::BadConfig { field: "seg_max", value: 0 });
    let error = refused(field(config::CAPACITY + 4, u32::MAX));
    assert!(matches!(error, Error::BadConfig { field: "capacity", .. }), "{error}");
    let error = refused(|registers| registers.config.truncate(4));
    assert!(matches!(error, Error::BadConfig { value: 4, .. }), "{error}");
}

#[test]
fn running_out_of_memory_at_any_point_is_an_error_that_leaves_nothing_behind() {
    for operations in 0..64 {
        let rig = Rig::new(64, |_| {});
        rig.system.memory.fail_after(operations);
        let result = rig.start(16).map(drop);
        rig.system.memory.heal();
        assert_eq!(rig.host.device.stats().live_mappings, 0);
        match result {
            Ok(()) => {
                assert!(operations >= 4, "four areas are allocated, {operations} failed");
                return;
            }
            Err(error) => assert_eq!(error, Error::Dma(dma::Error::OutOfMemory)),
        }
    }
    panic!("it never succeeds");
}
