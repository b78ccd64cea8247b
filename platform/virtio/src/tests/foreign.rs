//! Foreign drivers over this crate's registers: what they do not look after themselves, and devices that do not play along.

use super::Rig;
use crate::Error;
use crate::fakes::{Behaviour, MemoryDisk};
use crate::spec::{feature, status};
use crate::transport::ForeignTransport;
use dma::hal::{ForeignHal, HasSlot};
use std::vec;
use virtio_drivers::Error as ForeignError;
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::Transport as _;

type Disk<S> = VirtIOBlk<ForeignHal<S>, ForeignTransport>;

fn transport(rig: &Rig) -> Result<ForeignTransport, Error> {
    ForeignTransport::new(rig.device.clone(), "disk")
}

fn start<S: HasSlot>(rig: &Rig) -> Result<Disk<S>, ForeignError> {
    S::slot().install(&rig.host.device).unwrap();
    Disk::new(transport(rig).unwrap())
}

/// Ends a test in which nothing may be left.
fn check<S: HasSlot>(rig: &Rig) {
    let report = S::slot().remove().unwrap();
    assert_eq!((report.shares, report.rings, report.failures, report.misuses), (0, 0, 0, 0), "{report}");
    assert_eq!((rig.system.memory.live_allocations(), rig.host.device.stats().live_mappings), (0, 0));
    rig.check();
}

/// Caught: `write_driver_features` that passes on what the driver asks for, and no more; a transport that is dropped without a reset.
#[test]
fn a_foreign_block_driver_works_behind_the_iommu_which_it_has_never_heard_of() {
    dma::foreign_driver! { Blk }
    let rig = Rig::new(64, |_| {});
    let mut disk = start::<Blk>(&rig).unwrap();
    assert_ne!(rig.device.accepted() & feature::ACCESS_PLATFORM, 0);
    assert_eq!(disk.capacity(), 64);
    let mut sectors = vec![0; 3 * SECTOR_SIZE];
    disk.read_blocks(2, &mut sectors).unwrap();
    let pattern = |offset: usize| MemoryDisk::pattern(offset as u64);
    assert!(sectors.iter().enumerate().all(|(at, byte)| *byte == pattern(2 * SECTOR_SIZE + at)));
    disk.write_blocks(40, &[0xa5; SECTOR_SIZE]).unwrap();
    disk.flush().unwrap();
    disk.read_blocks(40, &mut sectors[..SECTOR_SIZE]).unwrap();
    assert_eq!(sectors[..SECTOR_SIZE], [0xa5; SECTOR_SIZE]);
    drop(disk);
    // The device was reset before its rings went.
    assert_eq!(rig.device.status_log().last(), Some(&0));
    check::<Blk>(&rig);
}

#[test]
fn a_device_that_would_go_around_the_iommu_gets_no_foreign_driver() {
    let refused = |change: fn(&mut crate::fakes::Registers)| transport(&Rig::new(8, change)).unwrap_err();
    assert!(matches!(refused(|device| device.features &= !feature::ACCESS_PLATFORM), Error::BypassesIommu));
    assert!(matches!(refused(|device| device.features &= !feature::VERSION_1), Error::Legacy));
    assert!(matches!(refused(|device| device.device_type = 99), Error::WrongDevice { found: 99, .. }));
}

/// Caught: a transport that does not look whether `FEATURES_OK` stayed.
#[test]
fn a_device_that_refuses_its_features_is_not_started() {
    dma::foreign_driver! { Blk }
    let rig = Rig::new(8, |device| device.insists_on |= 1 << 40);
    assert_eq!(start::<Blk>(&rig).err(), Some(ForeignError::InvalidParam));
    assert!(rig.device.status_log().contains(&(status::ACKNOWLEDGE | status::DRIVER | status::FAILED)));
    assert!(rig.device.status_log().iter().all(|written| written & status::DRIVER_OK == 0));
    check::<Blk>(&rig);
}

#[test]
fn a_device_that_never_comes_to_rest_makes_its_driver_fail_instead_of_waiting() {
    dma::foreign_driver! { Restless Unresetting Small }
    let rig = Rig::new(8, |device| device.restless = true);
    assert_eq!(start::<Restless>(&rig).err(), Some(ForeignError::NotReady));
    check::<Restless>(&rig);
    let rig = Rig::new(8, |device| {
        device.resets = false;
        device.claims_status = Some(status::DRIVER);
    });
    assert_eq!(start::<Unresetting>(&rig).err(), Some(ForeignError::InvalidParam));
    check::<Unresetting>(&rig);
    // Nor does it read a configuration that is not there.
    let rig = Rig::new(8, |device| device.config.truncate(4));
    assert_eq!(start::<Small>(&rig).err(), Some(ForeignError::ConfigSpaceTooSmall));
    check::<Small>(&rig);
}

#[test]
fn a_configuration_is_read_and_written_in_fields_of_any_size() {
    let rig = Rig::new(8, |device| device.config[..8].copy_from_slice(&0x1234_5678_9abc_u64.to_le_bytes()));
    let mut transport = transport(&rig).unwrap();
    assert_eq!(transport.read_config_space::<u64>(0), Ok(0x1234_5678_9abc));
    assert_eq!(transport.read_config_space::<u16>(2), Ok(0x5678));
    assert_eq!(transport.read_config_space::<[u8; 3]>(3), Ok([0x56, 0x34, 0x12]));
    assert_eq!(transport.read_config_space::<u32>(64), Err(ForeignError::ConfigSpaceTooSmall));
    assert_eq!(transport.read_config_space::<u64>(60), Err(ForeignError::ConfigSpaceTooSmall));
    assert_eq!(transport.read_config_space::<u8>(usize::MAX), Err(ForeignError::ConfigSpaceTooSmall));
    transport.write_config_space(8, 0x0102_0304_u32).unwrap();
    transport.write_config_space(13, 0x77_u8).unwrap();
    assert_eq!(transport.read_config_space::<u64>(8), Ok(0x77fe_0102_0304));
    assert_eq!(transport.write_config_space(64, 1_u8), Err(ForeignError::ConfigSpaceTooSmall));
}

#[test]
#[expect(unsafe_code, reason = "the calls that do not block are unsafe")]
fn a_share_that_fails_makes_the_device_fault_and_nothing_else() {
    dma::foreign_driver! { Blk }
    let rig = Rig::new(8, |_| {});
    let mut disk = start::<Blk>(&rig).unwrap();
    let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
    let mut buffer = [7; SECTOR_SIZE];
    rig.device.plan(&[Behaviour::Honest]);
    // Header and buffer: the second has no place. The table and the status do.
    rig.system.iommu.fail_map_after(1);
    // SAFETY: all three outlive the driver.
    let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut buffer, &mut response) }.unwrap();
    rig.system.iommu.fail_map_after(u64::MAX);
    let failures = Blk::slot().report().failures;
    assert!(failures > 0);
    assert!(!rig.system.iommu.faults().is_empty());
    if disk.peek_used() == Some(token) {
        // SAFETY: the same that were submitted.
        let result = unsafe { disk.complete_read_blocks(token, &request, &mut buffer, &mut response) };
        assert!(result.is_err());
    }
    assert_eq!(buffer, [7; SECTOR_SIZE]);
    drop(disk);
    let report = Blk::slot().remove().unwrap();
    assert_eq!((report.rings, report.misuses), (0, 0), "{report}");
    assert_eq!((rig.system.memory.live_allocations(), rig.host.device.stats().live_mappings), (0, 0));
    rig.check();
}
