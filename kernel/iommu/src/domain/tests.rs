//! Tests of domains.

use super::*;
use crate::testing::FakeSpace;

const TOP: Iova = Iova::new(u64::MAX);
const PAGE: u64 = 4096;

fn range(start: u64, end: u64) -> IovaRange {
    IovaRange::between(Iova::new(start), Iova::new(end)).unwrap()
}

fn domain(start: u64, end: u64) -> Domain {
    Domain::new(DomainKind::Dma, FakeSpace::new(1, 40), range(start, end)).unwrap()
}

#[test]
fn the_window_is_what_the_bus_carries_and_the_hardware_translates() {
    assert_eq!(domain(0, 1 << 32).iova().window(), range(PAGE, 1 << 32));
    assert_eq!(domain(0x4000_0800, 1 << 50).iova().window(), range(0x4000_1000, 1 << 40));
    let beyond = range(1 << 40, 1 << 41);
    let error = Domain::new(DomainKind::Dma, FakeSpace::new(1, 40), beyond).unwrap_err();
    assert_eq!(error, IovaError::OutOfWindow(beyond));
}

/// Red when regions were only listed and not taken from the allocator.
#[test]
fn what_is_reserved_is_never_allocated_until_the_window_is_full() {
    let domain = domain(0, 64 * PAGE);
    let regions = [
        (range(0x3040, 0x3044), ReservedKind::MsiDoorbell),
        (range(0x3000, 0x8000), ReservedKind::PciWindow),
        (range(0, 0x2000), ReservedKind::Firmware),
        (range(0x1_0000, 0x1_0000), ReservedKind::Hole),
        (range(0x3_0000, u64::MAX), ReservedKind::Hole),
    ];
    for (region, kind) in regions {
        domain.reserve(region, kind).unwrap();
    }
    let mut allocated = 0;
    while let Ok(got) = domain.iova().allocate(PAGE, PAGE, TOP) {
        assert!(regions.iter().all(|(region, _)| !region.overlaps(got)), "{got}");
        allocated += 1;
    }
    assert_eq!(allocated, 0x30 - 2 - 5);
    let reserved: Vec<_> = domain.reserved().map(|reserved| reserved.kind).collect();
    use ReservedKind::{Firmware, Hole, MsiDoorbell, PciWindow};
    assert_eq!(reserved, [MsiDoorbell, PciWindow, Firmware, Hole]);
    assert_eq!(domain.reservation_of(Iova::new(0x3fff)), Some(MsiDoorbell), "whole pages");
    assert_eq!(domain.reservation_of(Iova::new(0x4000)), Some(PciWindow));
    assert_eq!(domain.reservation_of(Iova::new(0x8000)), None);
}

/// Red when `release` gave back ranges of every kind.
#[test]
fn what_is_reserved_cannot_be_released() {
    let domain = domain(0, 64 * PAGE);
    let region = range(0x3000, 0x5000);
    domain.reserve(region, ReservedKind::MsiDoorbell).unwrap();
    assert_eq!(domain.iova().release(region), Err(IovaError::NotAllocated(region)));
    assert_eq!(domain.iova().free(region), Err(IovaError::NotAllocated(region)));
    assert_eq!(domain.iova().reserve(region), Err(IovaError::InUse(region)));
}

/// Red when the pieces that had been withheld before the refusal were kept.
#[test]
fn a_region_with_a_live_allocation_in_it_is_refused_whole() {
    let domain = domain(0, 64 * PAGE);
    domain.reserve(range(0x6000, 0x7000), ReservedKind::MsiDoorbell).unwrap();
    let (first, taken) = (range(0x8000, 0x9000), range(0x9000, 0xa000));
    domain.iova().reserve(taken).unwrap();
    assert_eq!(
        domain.reserve(range(0x5000, 0xb000), ReservedKind::PciWindow),
        Err(IovaError::InUse(range(0x7000, 0xb000)))
    );
    assert_eq!(domain.reserved().count(), 1);
    domain.iova().reserve(range(0x5000, 0x6000)).unwrap();
    domain.iova().reserve(first).unwrap();
    domain.iova().release(range(0x5000, 0x6000)).unwrap();
    domain.iova().release(first).unwrap();
    domain.iova().release(taken).unwrap();
    domain.reserve(range(0x5000, 0xb000), ReservedKind::PciWindow).unwrap();
    assert_eq!(domain.iova().reserve(first), Err(IovaError::InUse(first)));
}

#[test]
fn a_domain_says_what_it_is() {
    let text = alloc::format!("{:?}", domain(0, 1 << 32));
    assert_eq!(text, "DMA domain (space 1, 0x1000..0x100000000)");
}

#[test]
fn an_owner_maps_where_nothing_is_reserved_and_nothing_is_reserved_once_it_does() {
    let domain = Domain::new(DomainKind::Owned, FakeSpace::new(1, 32), range(0, 1 << 32)).unwrap();
    let range = |start, len| IovaRange::new(Iova::new(start), len).unwrap();
    domain.reserve(range(0x8000_0000, 0x10_0000), ReservedKind::MsiDoorbell).unwrap();
    domain.reserve(range(0x1000_0000, 0x1000), ReservedKind::Hole).unwrap();
    let refused = |start, len| domain.begin_mapping(range(start, len)).err();
    for _ in 0..2 {
        assert_eq!(refused(0x7fff_f000, 0x2000), Some(IovaError::InUse(range(0x7fff_f000, 0x2000))));
        assert_eq!(refused(0x1000_0000, 0x1000), Some(IovaError::InUse(range(0x1000_0000, 0x1000))));
        assert_eq!(refused(0x1800, 0x1000), Some(IovaError::Misaligned(0x1000)));
        assert_eq!(refused(0x1000, 0), Some(IovaError::Misaligned(0x1000)));
        assert_eq!(refused(0, 0x1000), Some(IovaError::OutOfWindow(range(0, 0x1000))));
        assert_eq!(refused(0xffff_f000, 0x2000), Some(IovaError::OutOfWindow(range(0xffff_f000, 0x2000))));
        // The first is below the longest range, the others in it.
        for (start, len) in [(0x1000, 0x1000), (0x1000_1000, 0x1000), (0x4000_0000, 0x4000_0000), (0x9000_0000, 0x1000)]
        {
            domain.begin_mapping(range(start, len)).unwrap().mapped(range(start, len)).unwrap();
        }
    }
    let late = domain.reserve(range(0x5000_0000, 0x1000), ReservedKind::PciWindow);
    assert_eq!(late, Err(IovaError::InUse(range(0x5000_0000, 0x1000))));
}
