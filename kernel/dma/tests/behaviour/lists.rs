//! Scatter lists: one range of addresses, and as few segments as the device's limits allow.

use dma::fakes::{FakeDevice, FakeMemoryConfig, FakeSystem};
use dma::{
    Bidirectional, BusWindow, Device, DirectConfig, Error, FromDevice, Gather, Ladder, Lent, Limits, MappedList,
    PageSet, Pages, ScatterList, Segment, ToDevice, slice,
};
use iommu::{Iova, PhysAddr, PhysRange, RevokeError};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const UNIT: u64 = 512;

fn pages(device: &Device, count: u64) -> Pages {
    device.pages(count * PAGE).unwrap()
}

fn list(of: &FakeDevice, parts: &[(u64, u64, u64)]) -> ScatterList<Pages> {
    let mut list = of.device.scatter_list(parts.len()).unwrap();
    for &(count, offset, len) in parts {
        list.push_part(pages(&of.device, count), offset, len).unwrap();
    }
    list
}

fn lengths(mapped: &impl Lent) -> Vec<u64> {
    slice(mapped, 0, mapped.len()).unwrap().map(|segment| segment.len).collect()
}

/// Caught: a mapping for each part (16 of them), and extents that are not merged (16 segments).
#[test]
fn whole_pages_from_anywhere_are_one_segment_one_mapping_and_one_revocation() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let scattered = list(&blk, &[(1, 0, PAGE); 16]);
    assert_eq!(scattered.buffers().flat_map(Pages::phys_runs).count(), 16, "nothing touches");
    let mapped = blk.device.map_list::<FromDevice, _>(scattered).unwrap();
    assert_eq!(lengths(&mapped), [16 * PAGE]);
    assert_eq!(system.iommu.maps(), 1);
    let start = mapped.segments()[0].iova;
    for part in 0..16_u64 {
        blk.master.write(start.checked_add(part * PAGE).unwrap(), &[part as u8]).unwrap();
    }
    let back = mapped.unmap().unwrap();
    assert_eq!(system.iommu.revocations(), 1);
    assert!(blk.master.write(start, b"late").is_err());
    assert_eq!(back.buffers().map(|pages| pages.as_slice()[0]).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
    assert_eq!(back.into_buffers().count(), 16);
    assert_eq!(system.memory.live_allocations(), 0);
    assert!(system.memory.violations().is_empty());
}

#[test]
fn limits_cut_segments_where_they_must() {
    let system = FakeSystem::new();
    let long = |limits| {
        let blk = system.device_with("blk", limits).unwrap();
        let mapped = blk.device.map_list::<ToDevice, _>(list(&blk, &[(16, 0, 16 * PAGE); 16])).unwrap();
        mapped.coalesced().collect::<Vec<Segment>>()
    };
    let max = long(Limits { max_segment: 64 << 10, ..Limits::NONE });
    assert_eq!(max.iter().map(|segment| segment.len).collect::<Vec<_>>(), [64 << 10; 16]);
    let boundary = long(Limits { boundary: Some(1 << 19), ..Limits::NONE });
    assert_eq!(boundary.iter().map(|segment| segment.len).collect::<Vec<_>>(), [1 << 19; 2]);
    // A list no longer than the boundary is placed where it does not cross it.
    assert_eq!(long(Limits { boundary: Some(1 << 32), ..Limits::NONE }).len(), 1);
    // What follows a segment of the greatest length is still aligned.
    let aligned = long(Limits { max_segment: 0xffff, min_align: 16, ..Limits::NONE });
    assert!(aligned.iter().all(|segment| segment.iova.is_aligned(16)));
}

#[test]
fn the_first_part_may_begin_and_the_last_may_end_inside_a_page_and_those_between_begin_anew() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let whole = blk.device.map_list::<ToDevice, _>(list(&blk, &[(1, 1024, 3072), (1, 0, PAGE), (1, 0, 100)])).unwrap();
    assert_eq!(lengths(&whole), [3072 + PAGE + 100]);
    assert_eq!(whole.segments()[0].iova.get() % PAGE, 1024);
    let split = blk.device.map_list::<ToDevice, _>(list(&blk, &[(1, 0, PAGE), (1, 1024, 3072), (1, 0, 5)])).unwrap();
    assert_eq!(lengths(&split), [PAGE, 3072 + 5]);
    let short = blk.device.map_list::<ToDevice, _>(list(&blk, &[(1, 0, 100), (1, 0, PAGE)])).unwrap();
    assert_eq!(lengths(&short), [100, PAGE]);
    // A part of a buffer lends the pages that it lies in, and not the others.
    let part = blk.device.map_list::<Bidirectional, _>(list(&blk, &[(4, PAGE + 10, PAGE)])).unwrap();
    let at = part.segments()[0].iova;
    assert_eq!((part.len(), at.get() % PAGE), (PAGE, 10));
    blk.master.write(at.align_down(PAGE), b"first page").unwrap();
    assert!(blk.master.write(Iova::new(at.align_down(PAGE).get() + 2 * PAGE), b"third page").is_err());
    assert!(blk.master.write(Iova::new(at.align_down(PAGE).get() - 1), b"x").is_err());
}

#[test]
fn parts_that_are_not_inside_their_buffer_and_empty_lists_are_refused() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut list = blk.device.scatter_list::<Pages>(4).unwrap();
    for (offset, len) in [(0, PAGE + 1), (PAGE, 1), (1, PAGE), (u64::MAX, 2)] {
        let rejected = list.push_part(pages(&blk.device, 1), offset, len).unwrap_err();
        assert_eq!(rejected.error, Error::OutOfRange { offset, len, size: PAGE });
    }
    assert_eq!(list.push_part(pages(&blk.device, 1), 0, 0).unwrap_err().error, Error::BadSize(0));
    assert!(list.is_empty());
    assert_eq!(blk.device.map_list::<ToDevice, _>(list).unwrap_err().error, Error::BadSize(0));
    assert!(matches!(ScatterList::<Pages>::new(1, 100), Err(Error::BadSize(100))));
}

#[test]
fn parts_that_do_not_meet_the_alignment_are_refused_with_the_list() {
    let system = FakeSystem::new();
    let blk = system.device_with("blk", Limits { min_align: 64, ..Limits::NONE }).unwrap();
    assert!(blk.device.map_list::<ToDevice, _>(list(&blk, &[(1, 64, PAGE - 64), (1, 0, 10)])).is_ok());
    for parts in [&[(1, 32, 64)][..], &[(1, 0, PAGE), (1, 100, 8)]] {
        let rejected = blk.device.map_list::<ToDevice, _>(list(&blk, parts)).unwrap_err();
        assert!(matches!(rejected.error, Error::Misaligned { .. }));
        assert_eq!(rejected.buffer.count(), parts.len());
    }
}

/// Caught: `sync` and views that take an offset of the list for one of its pages.
#[test]
fn views_and_syncs_count_the_bytes_of_the_parts() {
    let system = FakeSystem::non_coherent();
    let blk = system.device("blk").unwrap();
    let mut parts = list(&blk, &[(1, 4000, 96), (2, 100, 200), (1, 0, 50)]);
    let data: Vec<u8> = (0..346_u32).map(|byte| byte as u8).collect();
    parts.write_at(0, &data).unwrap();
    let mapped = blk.device.map_list::<Bidirectional, _>(parts).unwrap();
    let mut seen = Vec::new();
    for segment in mapped.coalesced() {
        let mut bytes = vec![0; segment.len as usize];
        blk.master.read(segment.iova, &mut bytes).unwrap();
        seen.extend(bytes);
    }
    assert_eq!(seen, data);

    // The device writes across two parts; the CPU sees it where it syncs, and nowhere else.
    let across: Vec<Segment> = slice(&mapped, 90, 12).unwrap().collect();
    assert_eq!(across.iter().map(|segment| segment.len).collect::<Vec<_>>(), [6, 6]);
    across.iter().for_each(|segment| blk.master.write(segment.iova, &[0xee; 6]).unwrap());
    let look = |at: u64| {
        let mut bytes = [0; 12];
        mapped.view().read(at, &mut bytes).unwrap();
        bytes
    };
    assert_eq!(look(90), data[90..102]);
    mapped.sync_for_cpu(90, 12).unwrap();
    assert_eq!(look(90), [0xee; 12]);

    mapped.view().write(300, b"from the CPU").unwrap();
    let there: Vec<Segment> = slice(&mapped, 300, 12).unwrap().collect();
    let mut bytes = [0; 12];
    blk.master.read(there[0].iova, &mut bytes).unwrap();
    assert_eq!(bytes, data[300..312]);
    mapped.sync_for_device(300, 12).unwrap();
    blk.master.read(there[0].iova, &mut bytes).unwrap();
    assert_eq!(&bytes, b"from the CPU");

    for (offset, len) in [(0, 347), (346, 1), (u64::MAX, 1)] {
        let error = Error::OutOfRange { offset, len, size: 346 };
        assert_eq!(mapped.sync_for_cpu(offset, len), Err(error.clone()));
        assert_eq!(mapped.sync_for_device(offset, len), Err(error.clone()));
        assert_eq!(slice(&mapped, offset, len).unwrap_err(), error);
    }
    let mut after = [0; 12];
    mapped.unmap().unwrap().read_at(300, &mut after).unwrap();
    assert_eq!(&after, b"from the CPU");
}

#[test]
fn a_list_whose_revocation_fails_is_quarantined() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map_list::<FromDevice, _>(list(&blk, &[(1, 0, PAGE); 3])).unwrap();
    let at = mapped.segments()[0].iova;
    blk.master.write(at, b"cached").unwrap();
    system.iommu.wedge(true);
    let lost = mapped.unmap().unwrap_err();
    assert_eq!((lost.range.len(), lost.cause), (3 * PAGE, RevokeError::TimedOut));
    blk.master.write(at, b"late").unwrap();
    assert_eq!((blk.device.stats().quarantined_pages, system.memory.live_allocations()), (3, 3));
    assert!(system.memory.violations().is_empty());
}

#[test]
fn lists_end_together_and_can_be_mapped_again() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut gather = Gather::<MappedList<ToDevice, Pages>, 4>::new();
    for _ in 0..3 {
        gather.push(blk.device.map_list(list(&blk, &[(1, 0, PAGE), (1, 8, 8)])).unwrap()).unwrap();
    }
    let back: Vec<_> = gather.finish().map(Result::unwrap).collect();
    assert_eq!(system.iommu.revocations(), 1);
    for list in back {
        let again = blk.device.map_list::<ToDevice, _>(list).unwrap();
        assert_eq!(lengths(&again), [PAGE, 8]);
    }
    assert_eq!((system.memory.live_allocations(), blk.device.stats().live_mappings), (0, 0));
}

/// The addresses of all units of a list, one after another.
fn units(parts: &[(u64, u64, u64)], address: impl Fn(usize, u64) -> u64) -> Vec<u64> {
    let units = |(index, &(_, offset, len)): (usize, &(u64, u64, u64))| {
        (offset..offset + len).step_by(UNIT as usize).map(move |at| (index, at)).collect::<Vec<_>>()
    };
    parts.iter().enumerate().flat_map(units).map(|(index, at)| address(index, at)).collect()
}

/// Whether one segment may be these units.
fn legal(units: &[u64], limits: &Limits) -> bool {
    let (first, last) = (units[0], units[units.len() - 1]);
    units.windows(2).all(|pair| pair[0] + UNIT == pair[1])
        && units.len() as u64 * UNIT <= limits.max_segment
        && limits.boundary.is_none_or(|boundary| first / boundary == (last + UNIT - 1) / boundary)
}

/// Each segment as long as it can be, unit by unit.
fn greedy(units: &[u64], limits: &Limits) -> Vec<Segment> {
    let (mut segments, mut from) = (Vec::new(), 0);
    while from < units.len() {
        let mut to = from + 1;
        while to < units.len() && legal(&units[from..=to], limits) {
            to += 1;
        }
        segments.push(Segment { iova: Iova::new(units[from]), len: (to - from) as u64 * UNIT });
        from = to;
    }
    segments
}

/// The least number of segments that there can be, over all ways to cut.
fn fewest(units: &[u64], limits: &Limits) -> usize {
    let mut best = vec![usize::MAX; units.len() + 1];
    best[0] = 0;
    for to in 1..=units.len() {
        for from in (0..to).rev().take_while(|from| legal(&units[*from..to], limits)) {
            best[to] = best[to].min(best[from] + 1);
        }
    }
    best[units.len()]
}

/// Parts in units: pages of the buffer, offset, length.
fn parts() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
    let part = (1_u64..4).prop_flat_map(|pages| {
        let units = pages * PAGE / UNIT;
        prop_oneof![
            2 => Just((pages, 0, pages * PAGE)),
            1 => (0..units).prop_flat_map(move |offset| {
                (1..=units - offset).prop_map(move |len| (pages, offset * UNIT, len * UNIT))
            }),
        ]
    });
    proptest::collection::vec(part, 1..10)
}

fn limits() -> impl Strategy<Value = Limits> {
    let boundary = prop_oneof![Just(None), (12_u32..17).prop_map(|shift| Some(1_u64 << shift))];
    let max = prop_oneof![Just(u64::MAX), (1_u64..40).prop_map(|units| units * UNIT)];
    (boundary, max).prop_map(|(boundary, max_segment)| Limits { boundary, max_segment, ..Limits::NONE })
}

proptest! {
    /// Caught: cutting at the limit less one unit, merging across a gap, a boundary that is counted from the beginning of the list.
    #[test]
    fn segments_are_those_of_a_brute_force_reference(parts in parts(), limits in limits(), gap in any::<bool>()) {
        let gap = if gap { PAGE } else { 0 };
        let system = FakeSystem::with_memory(FakeMemoryConfig { gap, ..FakeMemoryConfig::default() });
        let blk = system.device_with("blk", limits).unwrap();
        let list = list(&blk, &parts);
        let phys: Vec<PhysAddr> = list.buffers().map(|pages| pages.phys_runs()[0].start()).collect();
        let mapped = blk.device.map_list::<ToDevice, _>(list).unwrap();
        // The pages of the parts, one after another.
        let mut starts = vec![mapped.segments()[0].iova.align_down(PAGE).get()];
        for &(_, offset, len) in &parts {
            starts.push(starts[starts.len() - 1] + ((offset + len).next_multiple_of(PAGE) - offset / PAGE * PAGE));
        }
        let units = units(&parts, |index, at| starts[index] + at - parts[index].1 / PAGE * PAGE);
        let segments: Vec<Segment> = mapped.coalesced().collect();
        prop_assert_eq!(&segments, &greedy(&units, &limits));
        prop_assert_eq!(segments.len(), fewest(&units, &limits));
        // And there is where the memory is.
        for (index, &(_, offset, _)) in parts.iter().enumerate() {
            let iova = Iova::new(starts[index] + offset % PAGE);
            let found = blk.domain.space().translate(iova).map(|(phys, _)| phys);
            prop_assert_eq!(found, phys[index].checked_add(offset));
        }
        // Any part of it is named as the same part of the units.
        let (from, to) = (units.len() / 3, units.len() - units.len() / 4);
        let part: Vec<Segment> = slice(&mapped, from as u64 * UNIT, (to - from) as u64 * UNIT).unwrap().collect();
        prop_assert_eq!(part, greedy(&units[from..to], &limits));
    }

    /// Where nothing translates: memory that touches is one segment, and windows cut it.
    #[test]
    fn direct_segments_are_those_of_a_brute_force_reference(
        parts in parts(),
        limits in limits(),
        touches in any::<bool>(),
        second in 0_u64..12,
    ) {
        let gap = if touches { 0 } else { PAGE };
        let system = FakeSystem::with_memory(FakeMemoryConfig { gap, ..FakeMemoryConfig::default() });
        let (start, end) = (0x4000_0000, 0x4000_0000 + second * PAGE);
        let range = |start, len| PhysRange::new(PhysAddr::new(start), len).unwrap();
        let windows = [
            BusWindow { memory: range(start, end - start), bus: Iova::new(0x10_0000) },
            BusWindow { memory: range(end, 1 << 30), bus: Iova::new(0x8000_0000) },
        ];
        let windows = if second == 0 { &windows[1..] } else { &windows };
        let bus = |phys: u64| if phys < end { phys - start + 0x10_0000 } else { phys - end + 0x8000_0000 };
        let config = DirectConfig { name: "direct", windows, limits, coherent: true, memory: system.memory };
        // SAFETY: the device does not exist.
        let direct = unsafe { Device::direct(config) }.unwrap();
        let mut list = direct.scatter_list(0).unwrap();
        let mut phys = Vec::new();
        for &(count, offset, len) in &parts {
            let buffer = Pages::zeroed(system.memory, count * PAGE).unwrap();
            phys.push(buffer.phys_runs()[0].start().get());
            list.push_part(buffer, offset, len).unwrap();
        }
        let mapped = direct.map_list::<ToDevice, _>(list).unwrap();
        let units = units(&parts, |index, at| bus(phys[index] + at));
        let segments: Vec<Segment> = mapped.coalesced().collect();
        prop_assert_eq!(&segments, &greedy(&units, &limits));
        prop_assert_eq!(segments.len(), fewest(&units, &limits));
    }
}

#[test]
fn lists_of_page_sets_are_lists_of_all_their_chunks() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let set = |bytes| PageSet::zeroed(system.memory, bytes, Ladder::SINGLE_PAGES).unwrap();
    let mut list = ScatterList::new(2, PAGE).unwrap();
    list.push_part(set(5 * PAGE), PAGE + 100, 3 * PAGE).unwrap();
    list.push(set(2 * PAGE)).unwrap();
    list.write_at(3 * PAGE - 2, b"across").unwrap();
    let mapped = blk.device.map_list::<ToDevice, _>(list).unwrap();
    assert_eq!(lengths(&mapped), [3 * PAGE, 2 * PAGE]);
    let mut seen = [0; 6];
    let mut at = 0;
    for segment in slice(&mapped, 3 * PAGE - 2, 6).unwrap() {
        blk.master.read(segment.iova, &mut seen[at..at + segment.len as usize]).unwrap();
        at += segment.len as usize;
    }
    assert_eq!(&seen, b"across");
}
