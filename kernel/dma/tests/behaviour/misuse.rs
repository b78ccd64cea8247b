//! Misuses that end in a typed error: what types alone could say only at the price of an API that nobody would want.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, Error, Limits, Segment, ToDevice, slice};
use iommu::Iova;

/// Misuse 9. Caught: `Held::sync_for_device` without the check of the range, on a device that snoops.
#[test]
fn a_sync_outside_the_mapping_is_refused() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = system.device("blk").unwrap();
        let mapped = blk.device.map::<Bidirectional, _>(blk.device.pages(4096).unwrap()).unwrap();
        for (offset, len) in [(0, 4097), (4096, 1), (4000, 97), (u64::MAX, 2)] {
            let refused = Err(Error::OutOfRange { offset, len, size: 4096 });
            assert_eq!(mapped.sync_for_cpu(offset, len), refused);
            assert_eq!(mapped.sync_for_device(offset, len), refused);
        }
    }
}

/// Misuse 16. Caught: `Limits::check_segment` without the comparison.
#[test]
fn a_segment_longer_than_the_device_takes_is_refused() {
    let system = FakeSystem::new();
    let odd = system.device_with("odd", Limits { max_segment: 4096, ..Limits::NONE }).unwrap();
    let mapped = odd.device.map::<ToDevice, _>(odd.device.pages(8192).unwrap()).unwrap();
    let whole = mapped.segments()[0];
    let refused = odd.device.limits().check_segment(whole);
    assert_eq!(refused, Err(Error::SegmentTooLong { len: 8192, max: 4096 }));
    // What is cut for the device is right.
    assert!(slice(&mapped, 0, 8192).unwrap().all(|piece| odd.device.limits().check_segment(piece).is_ok()));
    let nothing = Segment { iova: whole.iova, len: 0 };
    assert_eq!(odd.device.limits().check_segment(nothing), Err(Error::BadSize(0)));
}

/// Misuse 17.
#[test]
fn a_segment_across_the_devices_boundary_is_refused() {
    let limits = Limits { boundary: Some(0x1_0000), ..Limits::NONE };
    let segment = |iova, len| Segment { iova: Iova::new(iova), len };
    let across = segment(0xf000, 0x1001);
    let refused = Err(Error::AcrossBoundary { iova: across.iova, len: across.len, boundary: 0x1_0000 });
    assert_eq!(limits.check_segment(across), refused);
    assert_eq!(limits.check_segment(segment(0xf000, 0x1000)), Ok(()));
    assert_eq!(limits.check_segment(segment(0x1_0000, 0x1_0000)), Ok(()));
    assert!(limits.check_segment(segment(u64::MAX, 2)).is_err());
}
