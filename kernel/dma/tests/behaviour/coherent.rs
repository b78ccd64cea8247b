//! Memory that the CPU and a device share without synchronization.

use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use dma::fakes::FakeSystem;
use dma::{DeviceShared, Error, Lent};
use iommu::FaultReason;

#[repr(C)]
struct Ring {
    flags: AtomicU16,
    index: AtomicU16,
    entries: [AtomicU64; 700],
}

// SAFETY: atomics only, and any bits are a value.
unsafe impl DeviceShared for Ring {}

#[test]
fn both_sides_see_what_the_other_stores() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let ring = net.device.coherent::<Ring>().unwrap();
    assert_eq!(Lent::len(&ring), size_of::<Ring>() as u64);
    assert!(ring.entries.iter().all(|entry| entry.load(Ordering::Relaxed) == 0));
    ring.index.store(7, Ordering::Release);
    let mut index = [0; 2];
    net.master.read(ring.iova_of(&ring.index).unwrap(), &mut index).unwrap();
    assert_eq!(u16::from_ne_bytes(index), 7);
    let entry = ring.iova_of(&ring.entries[699]).unwrap();
    assert_eq!(entry, ring.iova_at(8 + 699 * 8).unwrap());
    net.master.write(entry, &99_u64.to_ne_bytes()).unwrap();
    assert_eq!(ring.entries[699].load(Ordering::Acquire), 99);
    assert!(ring.flags.load(Ordering::Relaxed) == 0);
}

/// Caught: `Held` without its `Drop`.
#[test]
fn it_is_revoked_and_freed_when_it_is_dropped() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let ring = net.device.coherent::<Ring>().unwrap();
    let iova = ring.iova();
    net.master.write(iova, b"x").unwrap();
    drop(ring);
    assert_eq!(net.master.write(iova, b"x").unwrap_err().reason, FaultReason::NotMapped);
    assert_eq!(system.memory.live_allocations(), 0);
    let again = net.device.coherent::<Ring>().unwrap();
    again.release().unwrap();
    assert_eq!((system.memory.live_allocations(), net.device.stats().live_mappings), (0, 0));
}

/// Caught: `Held::end` that drops the memory when the revocation failed.
#[test]
fn a_revocation_that_fails_keeps_its_pages() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let ring = net.device.coherent::<Ring>().unwrap();
    let iova = ring.iova();
    net.master.write(iova, b"x").unwrap();
    system.iommu.wedge(true);
    ring.release().unwrap_err();
    system.iommu.wedge(false);
    net.master.write(iova, b"x").unwrap();
    assert_eq!((system.memory.violations().len(), system.memory.live_allocations()), (0, 1));
}

#[test]
fn addresses_of_what_is_not_part_of_it_are_errors() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let ring = net.device.coherent_slice::<AtomicU16>(3).unwrap();
    assert_eq!(ring.len(), 3);
    assert!(ring.iova_at(5).is_ok());
    assert!(matches!(ring.iova_at(6), Err(Error::OutOfRange { .. })));
    let elsewhere = 5_u32;
    assert!(matches!(ring.iova_of(&elsewhere), Err(Error::OutOfRange { .. })));
    assert!(matches!(net.device.coherent_slice::<AtomicU16>(0), Err(Error::BadLayout(_))));
    assert!(net.device.coherent_slice::<AtomicU64>(usize::MAX).is_err());
}
