//! R4, R5: the direction is the device's permission, and views copy only where the direction lets them.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, Error, FromDevice, Ladder, Lent, PageSet, ToDevice};
use iommu::FaultReason;
use std::sync::atomic::{AtomicBool, Ordering};

/// Caught: `ToDevice::PROT` with `WRITE` in it.
#[test]
fn a_device_cannot_write_what_was_lent_to_it_for_reading() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut pages = blk.device.pages(4096).unwrap();
    pages.as_mut_slice()[..5].copy_from_slice(b"hello");
    let mapped = blk.device.map::<ToDevice, _>(pages).unwrap();
    assert_eq!(blk.master.write(mapped.iova(), b"x").unwrap_err().reason, FaultReason::Permission);
    let mut seen = [0; 5];
    blk.master.read(mapped.iova(), &mut seen).unwrap();
    assert_eq!(&seen, b"hello");
    assert!(mapped.device_reads() && !mapped.device_writes());
    assert_eq!(&mapped.unmap().unwrap().as_slice()[..5], b"hello");
}

/// Caught: `FromDevice::PROT` with `READ` in it.
#[test]
fn a_device_cannot_read_what_was_lent_to_it_for_writing() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    assert_eq!(blk.master.read(mapped.iova(), &mut [0]).unwrap_err().reason, FaultReason::Permission);
    assert!(!mapped.device_reads() && mapped.device_writes());
}

#[test]
fn a_view_reaches_every_byte_across_chunks_and_none_beyond() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let set = PageSet::zeroed(system.memory, 3 * 4096, Ladder::SINGLE_PAGES).unwrap();
    let mapped = blk.device.map::<Bidirectional, _>(set).unwrap();
    let view = mapped.view();
    view.write(4090, b"over the edge").unwrap();
    let mut seen = [0; 13];
    blk.master.read(mapped.iova().checked_add(4090).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"over the edge");
    assert_eq!(&view.read_array::<4>(4099).unwrap(), b"edge");
    view.write(3 * 4096 - 1, b"!").unwrap();
    for (offset, len) in [(3 * 4096, 1), (3 * 4096 - 1, 2), (u64::MAX, 1), (0, 3 * 4096 + 1)] {
        let mut bytes = vec![0; len];
        let expected = Error::OutOfRange { offset, len: len as u64, size: 3 * 4096 };
        assert_eq!(view.read(offset, &mut bytes), Err(expected.clone()));
        assert_eq!(view.write(offset, &bytes), Err(expected.clone()));
        assert_eq!(mapped.sync_for_cpu(offset, len as u64), Err(expected.clone()));
        assert_eq!(mapped.sync_for_device(offset, len as u64), Err(expected));
    }
    view.read(3 * 4096, &mut []).unwrap();
}

/// Caught: `copy::load` and `copy::store` moving single bytes.
#[test]
fn an_aligned_field_is_never_seen_torn() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<Bidirectional, _>(blk.device.pages(4096).unwrap()).unwrap();
    let (view, stop) = (mapped.view(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                view.write(8, &[0xff; 8]).unwrap();
                view.write(8, &[0; 8]).unwrap();
            }
        });
        let mut torn = None;
        for _ in 0..200_000 {
            // Around the field as well: it lies in the middle of a longer copy.
            let seen = view.read_array::<20>(4).unwrap();
            let field = u64::from_ne_bytes(seen[4..12].try_into().unwrap());
            if field != 0 && field != u64::MAX {
                torn = Some(field);
            }
        }
        stop.store(true, Ordering::SeqCst);
        assert_eq!(torn, None);
    });
}
