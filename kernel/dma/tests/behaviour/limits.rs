//! What a device can put on the bus, with an IOMMU and without.

use dma::fakes::{FakeMemory, FakeMemoryConfig, FakeSystem};
use dma::{
    BusWindow, Device, DirectConfig, Error, FromDevice, Ladder, Limits, PageSet, Pages, Segment, ToDevice, slice,
};
use iommu::{Iova, IovaError, PhysAddr, PhysRange};

fn direct(memory: &'static FakeMemory, windows: &[BusWindow], limits: Limits) -> Device {
    let config = DirectConfig { name: "legacy", windows, limits, coherent: true, memory };
    // SAFETY: there is no bus master at all.
    unsafe { Device::direct(config) }.unwrap()
}

fn memory_at(start: u64, gap: u64) -> &'static FakeMemory {
    let range = PhysRange::new(PhysAddr::new(start), 1 << 40).unwrap();
    FakeMemory::new(FakeMemoryConfig { range, gap, snooped: true })
}

fn window(memory: u64, len: u64, bus: u64) -> BusWindow {
    BusWindow { memory: PhysRange::new(PhysAddr::new(memory), len).unwrap(), bus: Iova::new(bus) }
}

/// Caught: `IovaAllocator::allocate` called with a limit of `u64::MAX`.
#[test]
fn no_address_is_beyond_the_devices_address_lines() {
    let system = FakeSystem::new();
    let old = system.device_with("old", Limits::address_bits(16)).unwrap();
    let mut kept = Vec::new();
    let error = loop {
        match old.device.map::<ToDevice, _>(old.device.pages(4096).unwrap()) {
            Ok(mapped) => {
                assert!(mapped.iova().get() != 0 && mapped.iova().get() + mapped.len() <= 0x1_0000);
                kept.push(mapped);
            }
            Err(rejected) => break rejected.error,
        }
    };
    // All of the 16 pages but page 0.
    assert_eq!(kept.len(), 15);
    assert!(matches!(error, Error::Iova(IovaError::NoSpace { .. })), "{error}");
    kept.pop();
    drop(old.device.map::<ToDevice, _>(old.device.pages(4096).unwrap()).unwrap());
}

/// Caught: `Slices::next` that ignores the longest segment, or the boundary.
#[test]
fn a_slice_is_cut_where_the_device_needs_it() {
    let system = FakeSystem::new();
    let limits = Limits { max_segment: 3000, boundary: Some(8192), ..Limits::NONE };
    let odd = system.device_with("odd", limits).unwrap();
    let mapped = odd.device.map::<ToDevice, _>(odd.device.pages(4 * 4096).unwrap()).unwrap();
    for (offset, len) in [(0, 16384), (1, 16383), (8191, 2), (5000, 7000), (16384, 0), (0, 1)] {
        let pieces: Vec<Segment> = slice(&mapped, offset, len).unwrap().collect();
        let mut at = mapped.iova().get() + offset;
        for piece in &pieces {
            assert_eq!(piece.iova.get(), at);
            assert!(piece.len > 0 && piece.len <= 3000);
            assert_eq!(at / 8192, (at + piece.len - 1) / 8192);
            at += piece.len;
        }
        assert_eq!(at, mapped.iova().get() + offset + len);
    }
    for (offset, len) in [(0, 16385), (16384, 1), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(slice(&mapped, offset, len).unwrap_err(), Error::OutOfRange { offset, len, size: 16384 });
    }
}

#[test]
fn what_fits_between_two_boundaries_does_not_cross_one() {
    let system = FakeSystem::new();
    let odd = system.device_with("odd", Limits { boundary: Some(1 << 16), ..Limits::NONE }).unwrap();
    let mut kept = Vec::new();
    for pages in [1, 3, 5, 16, 2, 7, 9, 15, 1, 12] {
        let set = PageSet::zeroed(system.memory, pages * 4096, Ladder::SINGLE_PAGES).unwrap();
        let mapped = odd.device.map::<ToDevice, _>(set).unwrap();
        assert_eq!(slice(&mapped, 0, mapped.len()).unwrap().count(), 1);
        kept.push(mapped);
    }
}

#[test]
fn mappings_are_aligned_as_the_device_and_large_leaves_need_it() {
    let system = FakeSystem::new();
    let odd = system.device_with("odd", Limits { min_align: 1 << 15, ..Limits::NONE }).unwrap();
    let small: Vec<_> =
        (0..4).map(|_| odd.device.map::<ToDevice, _>(odd.device.pages(4096).unwrap()).unwrap()).collect();
    assert!(small.iter().all(|mapped| mapped.iova().is_aligned(1 << 15)));
    let large = PageSet::zeroed(system.memory, 4 << 20, const { Ladder::new(&[2 << 20]).unwrap() }).unwrap();
    let large = odd.device.map::<ToDevice, _>(large).unwrap();
    assert!(large.iova().is_aligned(2 << 20));
}

#[test]
fn limits_that_contradict_themselves_are_refused() {
    let system = FakeSystem::new();
    for limits in [
        Limits { max_segment: 0, ..Limits::NONE },
        Limits { max_segments: 0, ..Limits::NONE },
        Limits { boundary: Some(3), ..Limits::NONE },
        Limits { boundary: Some(0), ..Limits::NONE },
        Limits { min_align: 0, ..Limits::NONE },
    ] {
        assert!(matches!(system.device_with("wrong", limits), Err(Error::BadLimits(_))));
    }
}

/// Caught: `Windows::segments` without the offset of the window.
#[test]
fn without_an_iommu_memory_at_2_gib_is_seen_at_1_gib_where_the_bus_shifts() {
    let memory = memory_at(0x8000_0000, 4096);
    let device = direct(memory, &[window(0x8000_0000, 0x4000_0000, 0x4000_0000)], Limits::NONE);
    assert!(!device.is_isolated());
    let pages = device.pages(8192).unwrap();
    assert_eq!(pages.phys_runs()[0].start(), PhysAddr::new(0x8000_0000));
    let mapped = device.map::<FromDevice, _>(pages).unwrap();
    assert_eq!(mapped.segments(), [Segment { iova: Iova::new(0x4000_0000), len: 8192 }]);
    mapped.unmap().unwrap();
    assert_eq!(device.stats().live_mappings, 0);
}

#[test]
fn without_an_iommu_scattered_memory_has_a_segment_for_each_run() {
    let memory = memory_at(0x8000_0000, 4096);
    let limits = Limits { max_segment: 1024, ..Limits::NONE };
    let device = direct(memory, &[BusWindow::identity()], limits);
    let set = device.page_set(3 * 4096, Ladder::SINGLE_PAGES).unwrap();
    let mapped = device.map::<ToDevice, _>(set).unwrap();
    let starts: Vec<u64> = mapped.segments().iter().map(|segment| segment.iova.get()).collect();
    assert_eq!(starts, [0x8000_0000, 0x8000_2000, 0x8000_4000]);
    assert_eq!(mapped.len(), 3 * 4096);
    let pieces: Vec<Segment> = slice(&mapped, 4000, 200).unwrap().collect();
    let expected =
        [Segment { iova: Iova::new(0x8000_0fa0), len: 96 }, Segment { iova: Iova::new(0x8000_2000), len: 104 }];
    assert_eq!(pieces, expected);
    assert_eq!(mapped.unmap().unwrap().runs().len(), 3);
}

/// Caught: `Windows::segments` without the look at the address lines.
#[test]
fn without_an_iommu_memory_that_the_device_cannot_reach_is_refused_and_comes_back() {
    let memory = memory_at(0xffff_f000, 0);
    let device = direct(memory, &[BusWindow::identity()], Limits::address_bits(32));
    let reachable = device.pages(4096).unwrap();
    device.map::<ToDevice, _>(reachable).unwrap().unmap().unwrap();
    assert_eq!(device.pages(4096).unwrap_err(), Error::OutOfMemory);
    let mut beyond = Pages::zeroed(memory, 4096).unwrap();
    beyond.as_mut_slice()[0] = 5;
    let rejected = device.map::<ToDevice, _>(beyond).unwrap_err();
    assert!(matches!(rejected.error, Error::Unreachable { .. }), "{rejected}");
    assert_eq!(rejected.buffer.as_slice()[0], 5);
}

#[test]
fn windows_that_are_not_whole_pages_or_overflow_are_refused() {
    let memory = memory_at(0x8000_0000, 0);
    for wrong in [window(0x8000_0800, 0x1000, 0), window(0x8000_0000, 0x1000, 0x10), window(0, 0x2000, !0xfff)] {
        let windows = [wrong];
        let config = DirectConfig { name: "x", windows: &windows, limits: Limits::NONE, coherent: true, memory };
        // SAFETY: there is no bus master at all.
        assert!(matches!(unsafe { Device::direct(config) }, Err(Error::BadWindow(_))));
    }
}
