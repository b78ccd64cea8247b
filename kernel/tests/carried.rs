//! Which DMA addresses a bus carries, by `dma-ranges`.
//!
//! Seen red: ranges taken in the order of the tree; a hole begun at the end of the range before it although an earlier one reaches
//! further; the hull of the first and the last range of the tree; the upper end one range short; no holes.

use iommu::{Iova, IovaRange, PhysAddr, PhysRange};
use kernel::machine::{DmaRange, IntxMap, PcieHost, RidMap};

const PAGE: u64 = 4096;

fn host(dma_ranges: Option<Vec<DmaRange>>) -> PcieHost {
    PcieHost {
        path: "/pcie".into(),
        ecam: PhysRange::default(),
        buses: (0, 255),
        domain: 0,
        windows: Vec::new(),
        dma_ranges,
        dma_coherent: true,
        intx: IntxMap::default(),
        memory_regions: Vec::new(),
        iommu_map: RidMap { mask: 0, entries: Vec::new() },
        msi_map: RidMap { mask: 0, entries: Vec::new() },
    }
}

fn range(dma: u64, len: u64) -> DmaRange {
    DmaRange { dma: Iova::new(dma), cpu: PhysRange::new(PhysAddr::new(0x8000_0000), len).unwrap() }
}

fn iova(start: u64, end: u64) -> IovaRange {
    IovaRange::between(Iova::new(start), Iova::new(end)).unwrap()
}

/// What an allocator is left with.
fn usable(host: &PcieHost, address: u64) -> bool {
    let address = Iova::new(address);
    let hull = host.carried().is_none_or(|hull| hull.contains(address));
    hull && !host.not_carried().unwrap().iter().any(|hole| hole.contains(address))
}

#[test]
fn a_bus_without_ranges_carries_all() {
    let host = host(None);
    assert_eq!((host.carried(), host.not_carried().unwrap()), (None, vec![]));
}

#[test]
fn what_lies_between_ranges_in_any_order_is_a_hole() {
    let ranges = vec![range(0x8000, 0x1000), range(0x1000, 0x1000), range(0x4000, 0x2000), range(0x6000, 0x1000)];
    let host = host(Some(ranges));
    assert_eq!(host.carried(), Some(iova(0x1000, 0x9000)));
    assert_eq!(host.not_carried().unwrap(), [iova(0x2000, 0x4000), iova(0x7000, 0x8000)]);
}

#[test]
fn exactly_the_pages_that_are_carried_can_be_used_whichever_they_are() {
    // Every set of pages out of ten, as ranges of one page and of as many as possible, forwards and backwards.
    for set in 1_u64..1 << 10 {
        let carried = |page: u64| set >> page & 1 == 1;
        let single: Vec<_> = (0..10).filter(|&page| carried(page)).map(|page| range(page * PAGE, PAGE)).collect();
        let mut joined: Vec<DmaRange> = Vec::new();
        for page in (0..10).filter(|&page| carried(page)) {
            match joined.last_mut() {
                Some(last) if last.dma.get() + last.cpu.len() == page * PAGE => {
                    *last = range(last.dma.get(), last.cpu.len() + PAGE);
                }
                _ => joined.push(range(page * PAGE, PAGE)),
            }
        }
        for ranges in [single, joined] {
            let backwards = ranges.iter().rev().copied().collect();
            for ranges in [ranges, backwards] {
                let host = host(Some(ranges));
                for page in 0..12 {
                    for address in [page * PAGE, (page + 1) * PAGE - 1] {
                        assert_eq!(usable(&host, address), carried(page), "{set:#b}: page {page}");
                    }
                }
            }
        }
    }
}

#[test]
fn ranges_of_which_one_lies_in_another_leave_no_hole_in_it() {
    let host = host(Some(vec![range(0x1000, 0x8000), range(0x2000, 0x1000), range(0xa000, 0x1000)]));
    assert_eq!(host.carried(), Some(iova(0x1000, 0xb000)));
    assert_eq!(host.not_carried().unwrap(), [iova(0x9000, 0xa000)]);
}

#[test]
fn where_nothing_can_be_carried_nothing_is_usable() {
    // A range beyond the end of the address space; none at all.
    for ranges in [vec![range(u64::MAX - 0xfff, 0x2000)], vec![]] {
        let host = host(Some(ranges));
        assert!([0, 0x1000, 1 << 40, u64::MAX].iter().all(|&address| !usable(&host, address)));
    }
}
