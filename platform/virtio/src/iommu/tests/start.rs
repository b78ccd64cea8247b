//! Starting: what is refused, and that nothing is let through.

use super::{A, Rig, started};
use crate::Error;
use crate::fakes::Behaviour;
use crate::spec::iommu::{config, feature};
use crate::transport::Transport;
use ::iommu::contract::Iommu;

#[test]
fn the_device_is_made_to_block_what_is_attached_to_nothing() {
    let (rig, driver) = started();
    assert_eq!(rig.device.config_read(config::BYPASS), Some(0));
    assert_eq!(rig.device.accepted() & feature::BYPASS, 0);
    assert_eq!(rig.fake.reach(A, 0x1000), None);
    assert!(driver.features().to_string().contains("bypass off"));
}

#[test]
fn a_device_that_goes_on_bypassing_is_refused() {
    let rig = Rig::new(|registers| registers.read_only = true);
    assert_eq!(rig.start().unwrap_err(), Error::BypassStuck(1));
    // Without the field the driver's word is that it does not accept the feature.
    let rig = Rig::new(|registers| {
        registers.features &= !feature::BYPASS_CONFIG;
        registers.read_only = true;
    });
    rig.start().unwrap();
    assert_eq!(rig.device.accepted() & feature::BYPASS, 0);
}

#[test]
fn a_device_that_cannot_map_is_refused() {
    let rig = Rig::new(|registers| registers.features &= !feature::MAP_UNMAP);
    assert_eq!(rig.start().unwrap_err(), Error::MissingFeature("VIRTIO_IOMMU_F_MAP_UNMAP"));
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_name() {
    let cases: [(&str, usize, &[u8]); 5] = [
        ("page_size_mask", config::PAGE_SIZE_MASK, &[0; 8]),
        ("page_size_mask", config::PAGE_SIZE_MASK, &[0, 0, 0, 0, 0, 0, 0, 0x80]),
        ("input_range.end", config::INPUT_END, &[0; 8]),
        ("domain_range.end", config::DOMAIN_START, &[2, 0, 0, 0, 1, 0, 0, 0]),
        ("probe_size", config::PROBE_SIZE, &[0, 0, 0, 1]),
    ];
    for (name, at, bytes) in cases {
        let rig = Rig::new(|registers| registers.config[at..at + bytes.len()].copy_from_slice(bytes));
        match rig.start() {
            Err(Error::BadConfig { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let rig = Rig::new(|registers| registers.config.truncate(20));
    assert!(matches!(rig.start(), Err(Error::BadConfig { .. })));
}

#[test]
fn the_aperture_is_what_the_device_says_within_reason() {
    let rig = Rig::new(|registers| {
        registers.config[config::PAGE_SIZE_MASK..][..8].copy_from_slice(&0x8001_0000_u64.to_le_bytes());
        registers.config[config::INPUT_START..][..8].copy_from_slice(&0x1234_u64.to_le_bytes());
        registers.config[config::INPUT_END..][..8].copy_from_slice(&0xffff_ffff_u64.to_le_bytes());
    });
    let aperture = rig.start().unwrap().aperture();
    assert_eq!((aperture.page_size(), aperture.range), (0x1_0000, super::iova(0x1_0000, 0xffff_0000)));
    let (_rig, driver) = started();
    assert_eq!((driver.aperture().page_size(), driver.aperture().range), (0x1000, super::iova(0, 1 << 48)));
}

#[test]
fn a_device_that_does_not_answer_is_refused_in_time() {
    let rig = Rig::new(|_| {});
    rig.device.plan(&[Behaviour::Swallow]);
    assert_eq!(rig.start().unwrap_err(), Error::TimedOut);
    let rig = Rig::new(|_| {});
    rig.device.plan(&[Behaviour::NeedReset]);
    assert_eq!(rig.start().unwrap_err(), Error::NeedsReset);
}

#[test]
fn reserved_regions_are_those_the_device_tells_of() {
    use ::iommu::domain::{Reserved, ReservedKind};
    let (rig, driver) = started();
    assert_eq!(driver.reserved(super::id(A)), Ok(Vec::new()));
    rig.fake.reserve(1, 0x809_0000, 0x809_ffff);
    rig.fake.reserve(0, 0x1000, 0x1fff);
    let expected = [
        Reserved { range: super::iova(0x809_0000, 0x1_0000), kind: ReservedKind::MsiDoorbell },
        Reserved { range: super::iova(0x1000, 0x1000), kind: ReservedKind::Firmware },
    ];
    assert_eq!(driver.reserved(super::id(A)).unwrap(), expected);
    assert_eq!(driver.reserved(super::id(77)), Err(::iommu::AttachError::NoSuchStream(super::id(77))));
    // A region that ends before it starts is none.
    rig.fake.reserve(0, 0x5000, 0x4000);
    assert_eq!(driver.reserved(super::id(A)).unwrap(), expected[..2]);
}
