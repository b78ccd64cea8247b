//! Reserved addresses, and memory linked into them.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{
    Assembled, Bidirectional, Bounce, BusWindow, Device, DirectConfig, Error, FromDevice, Gather, Lent, Limits, Linked,
    Pages, Placement, Policy, PoolSource, Reservation, ToDevice, slice,
};
use iommu::{FaultReason, Iova, IovaError};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const AT: Iova = Iova::new(0x1234_5000);

fn pages(of: &FakeDevice, count: u64) -> Pages {
    of.device.pages(count * PAGE).unwrap()
}

fn at(reservation: &Reservation, offset: u64) -> Iova {
    reservation.iova().checked_add(offset).unwrap()
}

#[test]
fn a_reservation_is_where_it_was_asked_for_and_maps_nothing() {
    let system = FakeSystem::new();
    let edu = system.device_with("edu", Limits::address_bits(32)).unwrap();
    let fixed = edu.device.reserve(4 * PAGE, Placement::At(AT)).unwrap();
    assert_eq!((fixed.iova(), fixed.len()), (AT, 4 * PAGE));
    let aligned = edu.device.reserve(4 * PAGE, Placement::Aligned(1 << 21)).unwrap();
    assert!(aligned.iova().is_aligned(1 << 21));
    let anywhere = edu.device.reserve(3 * PAGE, Placement::Anywhere).unwrap();
    for reservation in [&fixed, &aligned, &anywhere] {
        assert_eq!(edu.master.write(reservation.iova(), b"x").unwrap_err().reason, FaultReason::NotMapped);
    }
    assert_eq!(edu.device.stats().live_mappings, 0);
    let taken = edu.device.reserve(PAGE, Placement::At(at(&fixed, PAGE)));
    assert!(matches!(taken, Err(Error::Iova(IovaError::InUse(_)))));
    let beyond = edu.device.reserve(PAGE, Placement::At(Iova::new(1 << 32)));
    assert!(matches!(beyond, Err(Error::Iova(IovaError::OutOfWindow(_)))));
    assert!(matches!(edu.device.reserve(0, Placement::Anywhere), Err(Error::BadSize(0))));
    assert!(matches!(edu.device.reserve(100, Placement::Anywhere), Err(Error::Iova(IovaError::Misaligned(_)))));
    assert!(matches!(edu.device.reserve(PAGE, Placement::Aligned(3)), Err(Error::Iova(IovaError::Misaligned(_)))));
}

/// Caught: `Device::reserve` that gives the range back at once.
#[test]
fn neither_the_allocator_nor_map_at_hits_a_live_reservation() {
    let system = FakeSystem::new();
    let edu = system.device_with("edu", Limits::address_bits(24)).unwrap();
    let reservation = edu.device.reserve(1 << 23, Placement::Anywhere).unwrap();
    let inside = |iova: Iova| iova >= reservation.iova() && iova < at(&reservation, 1 << 23);
    let mut mapped = Vec::new();
    while let Ok(next) = edu.device.map::<ToDevice, _>(pages(&edu, 64)) {
        assert!(!inside(next.iova()));
        mapped.push(next);
    }
    assert!(!mapped.is_empty());
    let error = edu.device.map_at::<ToDevice, _>(at(&reservation, PAGE), pages(&edu, 1)).unwrap_err().error;
    assert!(matches!(error, Error::Iova(IovaError::InUse(_))));
    reservation.release().unwrap();
    assert!(edu.device.map::<ToDevice, _>(pages(&edu, 64)).is_ok());
}

/// Caught: a `Link` whose loan gives its range to the allocator (`Kind::Plain`), an unlink that does not revoke.
#[test]
fn what_is_linked_is_reached_at_its_offset_until_it_is_unlinked() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(8 * PAGE, Placement::At(AT)).unwrap();
    let first = reservation.link::<FromDevice, _>(0, pages(&edu, 2)).unwrap();
    let second = reservation.link::<Bidirectional, _>(6 * PAGE, pages(&edu, 1)).unwrap();
    assert_eq!((first.iova(), second.iova(), second.offset()), (AT, at(&reservation, 6 * PAGE), 6 * PAGE));
    assert_eq!(reservation.linked(), 3 * PAGE);
    edu.master.write(at(&reservation, PAGE - 2), b"across").unwrap();
    edu.master.write(second.iova(), b"second").unwrap();
    assert!(edu.master.write(at(&reservation, 2 * PAGE), b"gap").is_err());
    let mut back = [0; 6];
    second.view().read(0, &mut back).unwrap();
    assert_eq!(&back, b"second");
    let buffer = first.unlink().unwrap();
    assert_eq!(&buffer.as_slice()[PAGE as usize - 2..][..6], b"across");
    assert!(edu.master.write(AT, b"late").is_err());
    // The place is free again, for this reservation alone.
    let third = reservation.link::<ToDevice, _>(PAGE, pages(&edu, 1)).unwrap();
    assert!(edu.device.map_at::<ToDevice, _>(AT, pages(&edu, 1)).is_err());
    let reservation = reservation.release().unwrap_err();
    drop((second, third));
    assert_eq!((reservation.linked(), edu.device.stats().live_mappings), (0, 0));
    reservation.release().unwrap();
    assert!(edu.device.map_at::<ToDevice, _>(AT, pages(&edu, 8)).is_ok());
    drop(buffer);
    assert_eq!(system.memory.live_allocations(), 0);
    assert!(system.memory.violations().is_empty());
}

#[test]
fn links_outside_the_reservation_or_on_another_link_are_refused_with_their_buffer() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(4 * PAGE, Placement::Anywhere).unwrap();
    let _link = reservation.link::<ToDevice, _>(PAGE, pages(&edu, 2)).unwrap();
    for (offset, count) in [(4 * PAGE, 1), (3 * PAGE, 2), (u64::MAX - PAGE + 1, 1)] {
        let rejected = reservation.link::<ToDevice, _>(offset, pages(&edu, count)).unwrap_err();
        assert!(matches!(rejected.error, Error::OutOfRange { size, .. } if size == 4 * PAGE), "{rejected:?}");
        assert_eq!(rejected.buffer.len(), count * PAGE);
    }
    for (offset, count) in [(0, 2), (PAGE, 1), (2 * PAGE, 1), (2 * PAGE, 2), (0, 4)] {
        let rejected = reservation.link::<ToDevice, _>(offset, pages(&edu, count)).unwrap_err();
        assert!(matches!(rejected.error, Error::Linked(range) if range.start() == at(&reservation, PAGE)));
    }
    assert_eq!(reservation.linked(), 2 * PAGE);
    let empty = edu.device.reserve(4 * PAGE, Placement::Anywhere).unwrap();
    let rejected = empty.link::<ToDevice, _>(100, pages(&edu, 1)).unwrap_err();
    assert_eq!(rejected.error, Error::Map(iommu::MapError::Misaligned(PAGE)));
    assert_eq!(empty.linked(), 0);
}

/// Caught: `Reserved` released by the drop of the reservation itself.
#[test]
fn links_outlive_the_handle_of_their_reservation_and_keep_its_addresses() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(4 * PAGE, Placement::At(AT)).unwrap();
    let link = reservation.link::<FromDevice, _>(0, pages(&edu, 1)).unwrap();
    drop(reservation);
    edu.master.write(AT, b"mine").unwrap();
    assert!(edu.device.map_at::<ToDevice, _>(AT.checked_add(PAGE).unwrap(), pages(&edu, 1)).is_err());
    drop(link);
    assert!(edu.master.write(AT, b"late").is_err());
    assert!(edu.device.map_at::<ToDevice, _>(AT, pages(&edu, 1)).is_ok());
}

/// Links are never copied. Caught: `Device::lend_reserved` that does not look at what is to be copied.
#[test]
fn a_restricted_device_is_linked_its_pool_and_nothing_else() {
    let system = FakeSystem::new();
    let pool = crate::backends::restricted(&system, 1 << 20);
    for bounce in [Bounce::Restricted(pool), Bounce::Always(PoolSource::default())] {
        let own = matches!(bounce, Bounce::Restricted(_));
        let policy = Policy { bounce, trusted: false };
        let edu = system.device_with_policy("edu", Limits::NONE, policy).unwrap();
        let reservation = edu.device.reserve(2 * PAGE, Placement::Anywhere).unwrap();
        let foreign = Pages::zeroed(system.memory, PAGE).unwrap();
        let rejected = reservation.link::<Bidirectional, _>(0, foreign).unwrap_err();
        assert!(matches!(rejected.error, Error::Unreachable { .. }), "{rejected}");
        assert_eq!((reservation.linked(), rejected.buffer.len()), (0, PAGE));
        assert!(edu.master.read(reservation.iova(), &mut [0]).is_err());
        assert_eq!(reservation.link::<Bidirectional, _>(0, pages(&edu, 1)).is_ok(), own);
    }
}

/// A link may be as large as its reservation, and is still not it. Caught: a `Link` whose loan gives its range to the allocator
/// (`Kind::Plain`).
#[test]
fn the_end_of_a_link_of_all_addresses_gives_none_of_them_to_others() {
    let system = FakeSystem::new();
    let edu = system.device_with("edu", Limits::address_bits(16)).unwrap();
    for placement in [Placement::Anywhere, Placement::At(Iova::new(0x8000))] {
        let reservation = edu.device.reserve(2 * PAGE, placement).unwrap();
        drop(reservation.link::<ToDevice, _>(0, pages(&edu, 2)).unwrap());
        let others: Vec<_> = core::iter::from_fn(|| edu.device.map::<ToDevice, _>(pages(&edu, 1)).ok()).collect();
        assert_eq!(others.len(), 13);
        assert!(
            others.iter().all(|other| other.iova() < reservation.iova() || other.iova() >= at(&reservation, 2 * PAGE))
        );
        let taken = edu.device.map_at::<ToDevice, _>(reservation.iova(), pages(&edu, 1)).unwrap_err().error;
        assert!(matches!(taken, Error::Iova(IovaError::InUse(_))));
        reservation.release().unwrap();
    }
}

/// Caught: forgetting the buffer, but not the claim, of a link whose revocation failed: the place is then linked again.
#[test]
fn a_link_whose_revocation_fails_keeps_its_buffer_and_its_place() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(2 * PAGE, Placement::At(AT)).unwrap();
    let link = reservation.link::<FromDevice, _>(0, pages(&edu, 1)).unwrap();
    edu.master.write(AT, b"cached").unwrap();
    system.iommu.wedge(true);
    assert_eq!(link.unlink().unwrap_err().range.start(), AT);
    system.iommu.wedge(false);
    edu.master.write(AT, b"late").unwrap();
    assert!(matches!(reservation.link::<FromDevice, _>(0, pages(&edu, 1)).unwrap_err().error, Error::Linked(_)));
    drop(reservation.release().unwrap_err());
    assert!(edu.device.map_at::<ToDevice, _>(AT, pages(&edu, 1)).is_err());
    assert!(system.memory.violations().is_empty());
}

#[test]
fn many_links_end_with_one_completion_and_are_named_as_one() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
    let link = |offset| reservation.link::<ToDevice, _>(offset * PAGE, pages(&edu, 2)).unwrap();
    let whole = Assembled::new(vec![link(2), link(4), link(6)]).unwrap();
    assert_eq!((whole.len(), whole.segments().len()), (6 * PAGE, 1));
    let segment = slice(&whole, 2 * PAGE - 8, 16).unwrap().next().unwrap();
    assert_eq!((segment.iova, segment.len), (at(&reservation, 4 * PAGE - 8), 16));
    edu.master.read(segment.iova, &mut [0; 16]).unwrap();
    let mut gather = Gather::<Linked<ToDevice, Pages>, 4>::new();
    whole.into_links().into_iter().for_each(|link| gather.push(link).unwrap());
    assert!(gather.finish().all(|pages| pages.is_ok()));
    assert_eq!((system.iommu.revocations(), reservation.linked()), (1, 0));
    assert!(Assembled::new(vec![link(0), link(4)]).is_err(), "a gap");
    assert!(Assembled::new(vec![link(2), link(0)]).is_err(), "the wrong order");
    assert!(Assembled::<ToDevice, Pages>::new(Vec::new()).is_err());
}

#[test]
fn a_device_that_nothing_translates_for_has_no_addresses_to_reserve() {
    let system = FakeSystem::new();
    let windows = [BusWindow::identity()];
    let config =
        DirectConfig { name: "direct", windows: &windows, limits: Limits::NONE, coherent: true, memory: system.memory };
    // SAFETY: the device does not exist.
    let direct = unsafe { Device::direct(config) }.unwrap();
    assert!(matches!(direct.reserve(PAGE, Placement::Anywhere), Err(Error::NotIsolated(_))));
}

#[test]
fn caches_are_maintained_for_devices_that_do_not_snoop() {
    let system = FakeSystem::non_coherent();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(PAGE, Placement::Anywhere).unwrap();
    let mut buffer = pages(&edu, 1);
    buffer.as_mut_slice()[..4].copy_from_slice(b"data");
    let link = reservation.link::<Bidirectional, _>(0, buffer).unwrap();
    let mut seen = [0; 4];
    edu.master.read(link.iova(), &mut seen).unwrap();
    assert_eq!(&seen, b"data");
    edu.master.write(link.iova(), b"DATA").unwrap();
    assert_eq!(&link.unlink().unwrap().as_slice()[..4], b"DATA");
}

proptest! {
    /// Against a plain list of pages.
    #[test]
    fn links_are_where_a_list_of_pages_says(steps in proptest::collection::vec((0_u64..18, 1_u64..5, any::<bool>()), 1..60)) {
        let system = FakeSystem::new();
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(16 * PAGE, Placement::At(AT)).unwrap();
        let mut model = [None::<u64>; 16];
        let mut links = Vec::new();
        for (number, (page, count, link)) in (0..).zip(steps) {
            if link {
                let free = (page..page + count).all(|page| model.get(page as usize).is_some_and(Option::is_none));
                let linked = reservation.link::<Bidirectional, _>(page * PAGE, pages(&edu, count));
                prop_assert_eq!(linked.is_ok(), free);
                if let Ok(linked) = linked {
                    links.push((number, linked));
                    (page..page + count).for_each(|page| model[page as usize] = Some(number));
                }
            } else if !links.is_empty() {
                let (number, link) = links.swap_remove(page as usize % links.len());
                link.unlink().unwrap();
                model.iter_mut().filter(|owner| **owner == Some(number)).for_each(|owner| *owner = None);
            }
            for (page, owner) in (0..).zip(&model) {
                prop_assert_eq!(edu.master.write(at(&reservation, page * PAGE), b"x").is_ok(), owner.is_some());
            }
        }
        prop_assert!(system.memory.violations().is_empty());
    }
}
