//! Kinds of memory: what each promises, on devices that snoop and on those that do not; what cannot be had is a typed error.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use dma::fakes::FakeSystem;
use dma::{
    AttributeError, BusWindow, Cacheability, Device, DirectConfig, Error, FromDevice, Ladder, Lent, Limits, Mapped,
    Pages,
};
use iommu::{FaultReason, PhysAddr};

/// Where the memory behind a loan is.
fn phys(system: &FakeSystem, fake: &dma::fakes::FakeDevice, lent: &dyn Lent) -> PhysAddr {
    let _ = system;
    fake.domain.space().translate(lent.segments()[0].iova).unwrap().0
}

fn both() -> [FakeSystem; 2] {
    [FakeSystem::new(), FakeSystem::non_coherent()]
}

fn clean(system: &FakeSystem) {
    assert_eq!((system.memory.violations(), system.memory.live_allocations()), (Vec::new(), 0));
}

/// Caught: `allocate` of coherent memory that always asks for cached pages: the device that does not snoop read zeros.
#[test]
fn coherent_memory_is_seen_by_devices_that_do_not_snoop_and_has_no_cached_alias() {
    for system in both() {
        let net = system.device("net").unwrap();
        let word = net.device.coherent::<AtomicU64>().unwrap();
        word.store(0x1234, Ordering::Relaxed);
        let mut seen = [0; 8];
        net.master.read(word.iova(), &mut seen).unwrap();
        assert_eq!(u64::from_ne_bytes(seen), 0x1234);
        net.master.write(word.iova(), &7_u64.to_ne_bytes()).unwrap();
        assert_eq!(word.load(Ordering::Relaxed), 7);
        let expected = if system.memory.is_snooped() { Cacheability::WriteBack } else { Cacheability::NonCacheable };
        assert_eq!(system.memory.cacheability_at(phys(&system, &net, &word)), Some(expected));
        drop(word);
        clean(&system);
    }
}

#[test]
fn what_is_not_published_is_plain_memory_that_no_device_reaches() {
    for system in both() {
        let net = system.device("net").unwrap();
        let mapped = net.device.stats().live_mappings;
        let mut ring = net.device.coherent_init_slice::<AtomicU32>(1500).unwrap();
        assert!(ring.iter_mut().all(|entry| *entry.get_mut() == 0));
        for (index, entry) in ring.iter_mut().enumerate() {
            *entry.get_mut() = index as u32;
        }
        assert_eq!(net.device.stats().live_mappings, mapped);
        let ring = ring.publish().unwrap();
        assert_eq!((ring.len(), net.device.stats().live_mappings), (1500, mapped + 1));
        let mut last = [0; 4];
        net.master.read(ring.iova_of(&ring[1499]).unwrap(), &mut last).unwrap();
        assert_eq!(u32::from_ne_bytes(last), 1499);
        drop(ring);
        let mut one = net.device.coherent_init::<[AtomicU32; 2]>().unwrap();
        *one[1].get_mut() = 9;
        drop(one);
        clean(&system);
    }
}

#[test]
fn what_cannot_be_published_is_freed() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let word = net.device.coherent_init::<AtomicU64>().unwrap();
    system.iommu.fail_map_after(0);
    assert!(matches!(word.publish(), Err(Error::OutOfMemory)));
    clean(&system);
    net.device.coherent::<AtomicU64>().unwrap();
}

/// Caught: `Prot::PRIVILEGED` left out by `lend_as`, and `expressed` that always says yes.
#[test]
fn privileged_memory_is_for_privileged_transactions_or_a_typed_error() {
    for system in both() {
        let net = system.device("net").unwrap();
        let word = net.device.coherent_privileged::<AtomicU64>().unwrap();
        let refused = net.master.read(word.iova(), &mut [0; 8]).unwrap_err();
        assert_eq!(refused.reason, FaultReason::Permission);
        net.master.privileged().write(word.iova(), &5_u64.to_ne_bytes()).unwrap();
        assert_eq!(word.load(Ordering::Relaxed), 5);
        drop(word);
        let kept = net.device.coherent_init::<AtomicU64>().unwrap().publish_privileged().unwrap();
        kept.release().unwrap();
        // A format that has no such bit.
        system.iommu.without_privileges(true);
        let error = net.device.coherent_privileged::<AtomicU64>().unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert_eq!(net.device.stats().live_mappings, 0);
        clean(&system);
    }
    let system = FakeSystem::new();
    let config = DirectConfig {
        name: "direct",
        windows: &[BusWindow::identity()],
        limits: Limits::NONE,
        coherent: true,
        memory: system.memory,
    };
    // SAFETY: there is no such device.
    let direct = unsafe { Device::direct(config) }.unwrap();
    assert!(matches!(direct.coherent_privileged::<AtomicU64>(), Err(Error::Unsupported { .. })));
    clean(&system);
}

#[test]
fn write_combined_memory_is_streamed_into_and_the_device_only_reads_it() {
    for system in both() {
        let gpu = system.device("gpu").unwrap();
        let frame = gpu.device.write_combined(5000).unwrap();
        assert_eq!((Lent::len(&frame), frame.device_reads(), frame.device_writes()), (8192, true, false));
        frame.write(4090, b"across the page").unwrap();
        frame.flush();
        let mut seen = [0xff; 17];
        gpu.master.read(frame.iova().checked_add(4089).unwrap(), &mut seen).unwrap();
        assert_eq!(&seen, b"\0across the page\0");
        assert!(matches!(frame.write(8190, b"abc"), Err(Error::OutOfRange { .. })));
        assert_eq!(gpu.master.write(frame.iova(), b"x").unwrap_err().reason, FaultReason::Permission);
        assert_eq!(system.memory.cacheability_at(phys(&system, &gpu, &frame)), Some(Cacheability::NonCacheable));
        let iova = frame.iova();
        frame.release().unwrap();
        assert_eq!(gpu.master.read(iova, &mut [0]).unwrap_err().reason, FaultReason::NotMapped);
        clean(&system);
    }
}

#[test]
fn hidden_memory_is_zeroed_the_devices_alone_and_comes_back() {
    for system in both() {
        let gpu = system.device("gpu").unwrap();
        let hidden = gpu.device.hidden(4096 * 3).unwrap();
        assert_eq!(system.memory.cacheability_at(phys(&system, &gpu, &hidden)), Some(Cacheability::Unmapped));
        let mut seen = [0xff; 64];
        gpu.master.read(hidden.iova(), &mut seen).unwrap();
        assert_eq!(seen, [0; 64]);
        gpu.master.write(hidden.iova(), b"scratch").unwrap();
        let iova = hidden.iova();
        drop(hidden);
        assert_eq!(gpu.master.read(iova, &mut seen).unwrap_err().reason, FaultReason::NotMapped);
        clean(&system);
    }
}

/// Caught: `free_as` in a drop that runs although the revocation failed.
#[test]
fn a_revocation_that_fails_keeps_the_pages_of_every_kind() {
    let system = FakeSystem::non_coherent();
    let gpu = system.device("gpu").unwrap();
    let (frame, hidden) = (gpu.device.write_combined(4096).unwrap(), gpu.device.hidden(4096).unwrap());
    let (word, cached) =
        (gpu.device.coherent_privileged::<AtomicU64>().unwrap(), gpu.device.non_coherent(4096).unwrap());
    // The device has used them all.
    for iova in [frame.iova(), hidden.iova(), word.iova(), cached.iova()] {
        gpu.master.privileged().read(iova, &mut [0]).unwrap();
    }
    system.iommu.wedge(true);
    frame.release().unwrap_err();
    hidden.release().unwrap_err();
    drop(word);
    cached.unmap().unwrap_err();
    system.iommu.wedge(false);
    assert_eq!((system.memory.violations(), system.memory.live_allocations()), (Vec::new(), 4));
}

#[test]
fn kinds_that_the_memory_does_not_have_are_typed_errors() {
    let system = FakeSystem::non_coherent();
    system.memory.only_cached(true);
    let gpu = system.device("gpu").unwrap();
    let unsupported = Error::Attributes(AttributeError::Unsupported);
    assert_eq!(gpu.device.write_combined(4096).unwrap_err(), unsupported);
    assert_eq!(gpu.device.hidden(4096).unwrap_err(), unsupported);
    assert_eq!(gpu.device.coherent::<AtomicU64>().unwrap_err(), unsupported);
    assert_eq!(gpu.device.coherent_init::<AtomicU64>().unwrap_err(), unsupported);
    gpu.device.non_coherent(4096).unwrap().unmap().unwrap();
    for bytes in [0, u64::MAX] {
        assert!(matches!(gpu.device.hidden(bytes), Err(Error::BadSize(_))));
        assert!(matches!(gpu.device.write_combined(bytes), Err(Error::BadSize(_))));
    }
    clean(&system);
}

/// Caught: `sync_for_cpu` and `sync_for_device` that do nothing.
#[test]
fn cached_memory_is_seen_by_the_other_side_after_a_sync() {
    let system = FakeSystem::non_coherent();
    let net = system.device("net").unwrap();
    let shared = net.device.non_coherent(4096).unwrap();
    shared.view().write(100, b"ping").unwrap();
    let mut seen = [0; 4];
    let at = shared.iova().checked_add(100).unwrap();
    net.master.read(at, &mut seen).unwrap();
    assert_ne!(&seen, b"ping", "the fake has caches");
    shared.sync_for_device(100, 4).unwrap();
    net.master.read(at, &mut seen).unwrap();
    assert_eq!(&seen, b"ping");
    net.master.write(at, b"pong").unwrap();
    assert_ne!(&shared.view().read_array::<4>(100).unwrap(), b"pong");
    shared.sync_for_cpu(100, 4).unwrap();
    assert_eq!(&shared.view().read_array::<4>(100).unwrap(), b"pong");
    drop(shared.unmap().unwrap());
    clean(&system);
}

#[test]
fn single_pages_are_single_and_contiguous_pages_are_one_run() {
    let system = FakeSystem::new();
    let net = system.device("net").unwrap();
    let set = net.device.page_set(64 << 10, Ladder::SINGLE_PAGES).unwrap();
    assert_eq!((set.runs().len(), set.runs()[0].len()), (16, 4096));
    let mapped: Mapped<FromDevice, Pages> = net.device.map(net.device.pages(64 << 10).unwrap()).unwrap();
    assert_eq!(mapped.unmap().unwrap().phys_runs().len(), 1);
}
