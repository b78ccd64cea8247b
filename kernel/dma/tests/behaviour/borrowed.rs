//! Borrowed memory: lent as a copy, while a closure runs.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, Error, FromDevice, Lent, ToDevice};

#[test]
fn the_device_sees_a_copy_and_what_it_writes_comes_back() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut bytes = *b"a question";
    let loan = blk
        .device
        .with_mapped::<Bidirectional, _>(&mut bytes, |scoped| {
            let mut seen = [0; 10];
            let segment = scoped.segments().next().unwrap();
            assert_eq!((segment.len, scoped.segments().count()), (10, 1));
            blk.master.read(segment.iova, &mut seen).unwrap();
            assert_eq!(&seen, b"a question");
            blk.master.write(segment.iova, b"the answer").unwrap();
            segment.iova
        })
        .unwrap();
    assert_eq!(&bytes, b"the answer");
    assert!(blk.master.read(loan, &mut [0]).is_err());
    assert_eq!(system.memory.live_allocations(), 0);
}

#[test]
fn what_the_device_does_not_write_stays_and_what_it_reads_only_does_not_change() {
    let system = FakeSystem::non_coherent();
    let blk = system.device("blk").unwrap();
    let mut bytes = [7; 5000];
    blk.device
        .with_mapped::<FromDevice, _>(&mut bytes, |scoped| {
            blk.master.write(scoped.loan().iova(), b"short").unwrap();
            let mut seen = [0; 5];
            scoped.read(0, &mut seen).unwrap();
            assert_eq!(&seen, b"short");
        })
        .unwrap();
    assert_eq!(&bytes[..5], b"short");
    assert!(bytes[5..].iter().all(|byte| *byte == 7));
    blk.device
        .with_mapped::<ToDevice, _>(&mut bytes, |scoped| {
            scoped.write(0, b"other").unwrap();
            let mut seen = [0; 5];
            blk.master.read(scoped.loan().iova(), &mut seen).unwrap();
            assert_eq!(&seen, b"other");
        })
        .unwrap();
    assert_eq!(&bytes[..5], b"short");
}

/// Caught: `Chunk::zeroed` that does not zero (the rest of the page then shows what was there).
#[test]
fn neighbours_of_the_borrowed_bytes_are_not_shown_to_the_device() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut around = [0x55_u8; 3 * 4096];
    let middle = &mut around[100..200];
    blk.device
        .with_mapped::<ToDevice, _>(middle, |scoped| {
            let mut page = [0; 4096];
            blk.master.read(scoped.loan().iova(), &mut page).unwrap();
            assert!(page[..100].iter().all(|byte| *byte == 0x55) && page[100..].iter().all(|byte| *byte == 0));
        })
        .unwrap();
}

/// Caught: `scoped::run` that copies back before it knows that the device has finished.
#[test]
fn a_queue_that_keeps_the_loan_beyond_the_closure_keeps_the_copy_only() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut bytes = [1; 16];
    let mut in_flight = None;
    let result = blk.device.with_mapped::<FromDevice, _>(&mut bytes, |scoped| {
        blk.master.write(scoped.loan().iova(), &[8; 16]).unwrap();
        in_flight = Some(scoped.loan().clone());
    });
    assert!(matches!(result, Err(Error::StillLent(_))));
    let kept = in_flight.unwrap();
    blk.master.write(kept.iova(), &[9; 16]).unwrap();
    assert_eq!(bytes, [1; 16]);
    assert_eq!(kept.device().stats().live_mappings, 1);
    drop(kept);
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

#[test]
fn a_revocation_that_fails_leaves_the_borrowed_bytes_alone() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut bytes = [1; 16];
    let mut iova = None;
    let result = blk.device.with_mapped::<FromDevice, _>(&mut bytes, |scoped| {
        blk.master.write(scoped.loan().iova(), b"x").unwrap();
        system.iommu.wedge(true);
        iova = Some(scoped.loan().iova());
    });
    assert!(matches!(result, Err(Error::Quarantined(_))));
    system.iommu.wedge(false);
    blk.master.write(iova.unwrap(), &[9; 16]).unwrap();
    assert_eq!((bytes, system.memory.violations().len()), ([1; 16], 0));
}

#[test]
fn nothing_borrowed_is_an_error() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    assert_eq!(blk.device.with_mapped::<ToDevice, _>(&mut [], |_| ()), Err(Error::BadSize(0)));
}
