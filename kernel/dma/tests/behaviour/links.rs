//! Many links with one sync, parts of links, and what lies on the bus: made, reached and revoked exactly as far as was said.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{
    Assembled, Bidirectional, Bounce, Carved, Ending, Error, FromDevice, Gather, Ladder, Lent, Limits, Linked,
    NotLinked, PageSet, Pages, Part, PeerRange, Placement, Policy, PoolSource, Reservation, Staged, Stages, ToDevice,
    end_together, quarantine,
};
use iommu::group::AttachmentState;
use iommu::{Iova, MapError, PhysAddr, PhysRange, Prot, RevokeError};
use proptest::prelude::*;

const PAGE: u64 = 4096;
const AT: Iova = Iova::new(0x1234_5000);

fn pages(of: &FakeDevice, count: u64) -> Pages {
    of.device.pages(count * PAGE).unwrap()
}

fn scattered(system: &FakeSystem, count: u64) -> PageSet {
    PageSet::zeroed(system.memory, count * PAGE, Ladder::SINGLE_PAGES).unwrap()
}

fn at(reservation: &Reservation, page: u64) -> Iova {
    reservation.iova().checked_add(page * PAGE).unwrap()
}

/// Which of the first `count` pages of the reservation the device can write.
fn reached(edu: &FakeDevice, reservation: &Reservation, count: u64) -> Vec<u64> {
    (0..count).filter(|page| edu.master.write(at(reservation, *page), b"x").is_ok()).collect()
}

fn machines() -> impl Iterator<Item = FakeSystem> {
    [(true, true), (true, false), (false, true), (false, false)].into_iter().map(|(snooped, caching)| {
        let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
        system.iommu.caching(caching);
        system
    })
}

/// Caught: a `Reservation::sync` without `AddressSpace::sync` (an IOMMU that remembers absences finds none), and one with a sync for
/// each (four completions); one without `prepare` (the device that does not snoop reads old memory).
#[test]
fn links_of_several_types_are_made_with_one_completion_and_none_is_reached_before() {
    for system in machines() {
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(16 * PAGE, Placement::At(AT)).unwrap();
        let mut source = pages(&edu, 1);
        source.as_mut_slice()[..6].copy_from_slice(b"source");
        let mut source: Staged<ToDevice, Pages> = reservation.stage(0, source).unwrap();
        let mut target: Staged<FromDevice, PageSet> = reservation.stage(2 * PAGE, scattered(&system, 3)).unwrap();
        let mut both: Staged<Bidirectional, Pages> = reservation.stage(5 * PAGE, pages(&edu, 2)).unwrap();
        let mut part: Staged<FromDevice, Part<Pages>> =
            reservation.stage(10 * PAGE, Part::of(pages(&edu, 2)).unwrap()).unwrap();
        assert_eq!(reached(&edu, &reservation, 16), []);
        assert!(edu.master.read(AT, &mut [0; 6]).is_err());
        assert_eq!((edu.device.stats().live_mappings, reservation.linked(), system.iommu.syncs()), (0, 8 * PAGE, 0));

        let all: &mut [&mut dyn Stages] = &mut [&mut source, &mut target, &mut both, &mut part];
        reservation.sync(all).unwrap();
        assert_eq!((edu.device.stats().live_mappings, system.iommu.syncs(), system.iommu.revocations()), (4, 1, 0));
        // Once more changes nothing.
        reservation.sync(all).unwrap();
        assert_eq!(system.iommu.maps(), 4);
        let (source, target, both) = (source.linked().unwrap(), target.linked().unwrap(), both.linked().unwrap());
        assert_eq!([source.iova(), target.iova(), both.iova()], [AT, at(&reservation, 2), at(&reservation, 5)]);
        let mut seen = [0; 6];
        edu.master.read(source.iova(), &mut seen).unwrap();
        assert_eq!(&seen, b"source");
        assert_eq!(reached(&edu, &reservation, 16), [2, 3, 4, 5, 6, 10, 11]);
        edu.master.write(at(&reservation, 4), b"last").unwrap();
        let mut back = [0; 4];
        target.unlink().unwrap().read_at(2 * PAGE, &mut back).unwrap();
        assert_eq!(&back, b"last");
        drop((source, both, part));
        assert_eq!((reached(&edu, &reservation, 16), reservation.linked()), (vec![], 0));
        assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}

/// Caught: `Claim::new` that does not see what is there; `Reservation::sync` that takes another reservation's.
#[test]
fn what_is_staged_has_its_place_and_no_other_reservation_syncs_it() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let one = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
    let other = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
    let mut staged = [one.stage::<ToDevice, _>(PAGE, pages(&edu, 2)).unwrap()];
    for (offset, count) in [(0, 2), (PAGE, 1), (2 * PAGE, 3)] {
        let rejected = one.stage::<ToDevice, _>(offset, pages(&edu, count)).unwrap_err();
        assert!(matches!(rejected.error, Error::Linked(range) if range.start() == at(&one, 1)));
        assert!(matches!(one.link::<ToDevice, _>(offset, rejected.buffer).unwrap_err().error, Error::Linked(_)));
    }
    let beyond = one.stage::<ToDevice, _>(7 * PAGE, pages(&edu, 2)).unwrap_err();
    assert!(matches!(beyond.error, Error::OutOfRange { .. }));
    let crooked = one.stage::<ToDevice, _>(100, pages(&edu, 1)).unwrap_err();
    assert_eq!(crooked.error, Error::Map(MapError::Misaligned(PAGE)));
    assert!(matches!(other.sync(&mut staged), Err(Error::ForeignLink(range)) if range.start() == at(&one, 1)));
    assert_eq!(reached(&edu, &one, 8), []);
    let [staged] = staged;
    let NotLinked::Waiting(staged) = staged.linked().unwrap_err() else { panic!() };
    assert_eq!((staged.withdraw().unwrap().len(), one.linked()), (2 * PAGE, 0));
    drop(one.stage::<ToDevice, _>(0, pages(&edu, 8)).unwrap());
    assert_eq!((one.linked(), system.iommu.maps()), (0, 0));
    one.release().unwrap();
}

/// Caught: a failed sync that does not revoke what it had mapped.
#[test]
fn a_sync_that_fails_links_nothing_and_can_be_made_again() {
    for system in machines() {
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
        let mut staged: Vec<_> =
            (0..4).map(|i| reservation.stage::<FromDevice, _>(2 * i * PAGE, pages(&edu, 1)).unwrap()).collect();
        system.iommu.fail_map_after(2);
        assert_eq!(reservation.sync(&mut staged), Err(Error::OutOfMemory));
        assert_eq!((reached(&edu, &reservation, 8), system.iommu.revocations()), (vec![], 1));
        system.iommu.fail_sync();
        assert_eq!(reservation.sync(&mut staged), Err(Error::Map(MapError::Refused)));
        assert_eq!((reached(&edu, &reservation, 8), system.iommu.revocations()), (vec![], 2));
        assert_eq!((edu.device.stats().live_mappings, edu.device.stats().quarantined_pages), (0, 0));
        reservation.sync(&mut staged).unwrap();
        assert_eq!(reached(&edu, &reservation, 8), [0, 2, 4, 6]);
        assert!(staged.into_iter().all(|staged| staged.linked().unwrap().unlink().is_ok()));
        assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}

/// Caught: a failed sync that gives back what it could not revoke, and one that gives up what it never mapped.
#[test]
fn what_a_failed_sync_cannot_take_back_is_in_quarantine_and_the_rest_is_not() {
    let system = FakeSystem::new();
    let edu = system.device("staged-edu").unwrap();
    let reservation = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
    let mut staged: Vec<_> =
        (0..4).map(|i| reservation.stage::<FromDevice, _>(i * PAGE, pages(&edu, 1)).unwrap()).collect();
    system.iommu.fail_map_after(3);
    system.iommu.wedge(true);
    assert_eq!(reservation.sync(&mut staged), Err(Error::OutOfMemory));
    let lost: Vec<_> = staged
        .into_iter()
        .map(|staged| match staged.linked() {
            Err(NotLinked::Lost(lost)) => {
                assert_eq!(lost.cause, RevokeError::TimedOut);
                true
            }
            Err(NotLinked::Waiting(staged)) => {
                assert!(staged.withdraw().is_ok());
                false
            }
            Ok(linked) => panic!("{linked:?}"),
        })
        .collect();
    assert_eq!(lost, [true, true, true, false]);
    assert_eq!((edu.device.stats().quarantined_pages, system.memory.live_allocations()), (3, 3));
    assert_eq!(quarantine::report().names.iter().filter(|name| &*name.device == "staged-edu").count(), 3);
    // Their places are never anybody's again.
    assert_eq!(reservation.linked(), 3 * PAGE);
    system.iommu.wedge(false);
    assert!(matches!(reservation.link::<ToDevice, _>(PAGE, pages(&edu, 1)).unwrap_err().error, Error::Linked(_)));
    assert!(reservation.release().is_err());
}

/// Caught: `Part` without `PAGEWISE` (the IOMMU refuses to cut a mapping, and the page is lost); `Part::span` that does not add its
/// offset; runs and loans that are not cut, and a claim that is not.
#[test]
fn a_part_of_a_link_is_unlinked_and_the_rest_stays() {
    for system in machines() {
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(8 * PAGE, Placement::At(AT)).unwrap();
        let whole = Part::of(pages(&edu, 6)).unwrap();
        let link: Linked<Bidirectional, Part<Pages>> = reservation.link(PAGE, whole).unwrap();
        for page in 1..7 {
            edu.master.write(at(&reservation, page), &[page as u8; 8]).unwrap();
        }
        let Carved { before, part, after } = link.carve(2 * PAGE, PAGE).unwrap();
        let (before, after) = (before.unwrap(), after.unwrap());
        assert_eq!([before.iova(), part.iova(), after.iova()], [1, 3, 4].map(|page| at(&reservation, page)));
        assert_eq!([before.len(), part.len(), after.len()], [2 * PAGE, PAGE, 3 * PAGE]);
        assert_eq!([before.offset(), part.offset(), after.offset()], [PAGE, 3 * PAGE, 4 * PAGE]);
        // The device notices nothing of it.
        assert_eq!(reached(&edu, &reservation, 8), [1, 2, 3, 4, 5, 6]);
        assert_eq!((system.iommu.revocations(), edu.device.stats().live_mappings), (0, 3));
        for page in 1..7 {
            edu.master.write(at(&reservation, page), &[page as u8; 8]).unwrap();
        }
        let mut mine = part.unlink().unwrap();
        assert_eq!((mine.offset(), mine.len(), system.iommu.revocations()), (2 * PAGE, PAGE, 1));
        assert_eq!(mine.chunks().map(<[u8]>::len).sum::<usize>(), 4096);
        assert_eq!(mine.chunks().next().unwrap()[..8], [3; 8]);
        assert_eq!(reached(&edu, &reservation, 8), [1, 2, 4, 5, 6]);
        assert_eq!((reservation.linked(), edu.device.stats().live_mappings), (5 * PAGE, 2));
        // It is the driver's: to write, and to lend again, here or elsewhere.
        mine.chunks_mut().for_each(|chunk| chunk.fill(0x77));
        assert!(edu.master.write(at(&reservation, 3), b"late").is_err());
        let elsewhere = edu.device.map::<ToDevice, _>(mine).unwrap();
        let mut seen = [0; 4];
        edu.master.read(elsewhere.iova(), &mut seen).unwrap();
        assert_eq!(seen, [0x77; 4]);
        let mine = elsewhere.unmap().unwrap();
        let again = reservation.link::<FromDevice, _>(3 * PAGE, mine).unwrap();
        edu.master.write(again.iova(), b"again").unwrap();
        // What is to be read of the whole is in its place.
        let mut parts = vec![before.unlink().unwrap(), after.unlink().unwrap(), again.unlink().unwrap()];
        assert_eq!((reached(&edu, &reservation, 8), reservation.linked()), (vec![], 0));
        let last = parts.pop().unwrap();
        let last = last.into_whole().unwrap_err();
        drop(parts);
        let whole = last.into_whole().unwrap();
        let first_bytes: Vec<_> = whole.as_slice().chunks(4096).map(|page| page[0]).collect();
        assert_eq!(first_bytes, [b'x', b'x', b'a', b'x', b'x', b'x']);
        drop(whole);
        reservation.release().unwrap();
        assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}

/// Caught: parts that keep their device no more than the one did: it would be for ever, or not long enough.
#[test]
fn parts_of_a_link_keep_the_device_until_the_last_has_gone() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let system = FakeSystem::new();
        let FakeDevice { device, group, .. } = system.device("edu").unwrap();
        let reservation = device.reserve(16 * PAGE, Placement::At(AT)).unwrap();
        let whole = Part::of(device.pages(4 * PAGE).unwrap()).unwrap();
        let link: Linked<FromDevice, Part<Pages>> = reservation.link(0, whole).unwrap();
        let Carved { before, part, after } = link.carve(PAGE, 2 * PAGE).unwrap();
        drop((device, reservation));
        let mut parts = [before, Some(part), after];
        for which in order {
            assert_eq!(group.current(), AttachmentState::Default);
            drop(parts[which].take().unwrap());
        }
        assert_eq!((group.current(), system.memory.live_allocations()), (AttachmentState::Blocked, 0));
    }
}

/// Caught: `carve` that takes an offset inside a page.
#[test]
fn what_is_no_part_of_a_link_is_not_carved_out_of_it() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(4 * PAGE, Placement::Anywhere).unwrap();
    let mut link: Linked<FromDevice, Part<Pages>> = reservation.link(0, Part::of(pages(&edu, 4)).unwrap()).unwrap();
    for (offset, len) in [(0, 0), (100, PAGE), (0, 100), (4 * PAGE, PAGE), (PAGE, 4 * PAGE), (u64::MAX - 4095, PAGE)] {
        let rejected = link.carve(offset, len).unwrap_err();
        assert!(matches!(rejected.error, Error::OutOfRange { .. } | Error::BadSize(_)), "{:?}", rejected.error);
        link = rejected.buffer;
    }
    assert_eq!((reached(&edu, &reservation, 4).len(), edu.device.stats().live_mappings), (4, 1));
    let Carved { before: None, part, after: None } = link.carve(0, 4 * PAGE).unwrap() else { panic!() };
    let Carved { before: None, part, after: Some(_after) } = part.carve(0, PAGE).unwrap() else { panic!() };
    drop(part);
    assert_eq!(reached(&edu, &reservation, 4), [1, 2, 3]);
}

/// Caught: `Loan::split` whose second loan is where the first is.
#[test]
fn parts_and_links_end_with_one_completion_and_neighbours_as_one_range() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(16 * PAGE, Placement::Anywhere).unwrap();
    let set: Linked<FromDevice, Part<PageSet>> = reservation.link(0, Part::of(scattered(&system, 8)).unwrap()).unwrap();
    let other: Linked<ToDevice, Pages> = reservation.link(9 * PAGE, pages(&edu, 1)).unwrap();
    let Carved { before, part: middle, after } = set.carve(2 * PAGE, 3 * PAGE).unwrap();
    let (before, after) = (before.unwrap(), after.unwrap());
    let (mut a, mut b, mut c) = (Ending::new(before), Ending::new(after), Ending::new(other));
    end_together(&mut [&mut a, &mut b, &mut c]);
    assert_eq!(system.iommu.revocations(), 1);
    assert_eq!(reached(&edu, &reservation, 16), [2, 3, 4]);
    assert_eq!([a.take().unwrap().len(), b.take().unwrap().len()], [2 * PAGE, 3 * PAGE]);
    assert_eq!(c.take().unwrap().len(), PAGE);
    let Carved { before: Some(left), part, after: Some(right) } = middle.carve(PAGE, PAGE).unwrap() else { panic!() };
    let mut gather = Gather::<_, 2>::new();
    gather.push(left).unwrap();
    gather.push(right).unwrap();
    assert!(gather.finish().all(|part| part.unwrap().len() == PAGE));
    assert_eq!((system.iommu.revocations(), reached(&edu, &reservation, 16)), (2, vec![3]));
    let whole = part.unlink().unwrap().into_whole().unwrap();
    assert_eq!(whole.len(), 8 * PAGE);
}

/// Caught: `Part` without `PAGEWISE`; a claim that is not shortened when it is divided.
#[test]
fn a_part_that_cannot_be_revoked_is_lost_alone_and_keeps_the_whole() {
    let system = FakeSystem::new();
    let edu = system.device("parts-edu").unwrap();
    let reservation = edu.device.reserve(4 * PAGE, Placement::Anywhere).unwrap();
    let link: Linked<FromDevice, Part<Pages>> = reservation.link(0, Part::of(pages(&edu, 3)).unwrap()).unwrap();
    assert_eq!(reached(&edu, &reservation, 3).len(), 3);
    let Carved { before: Some(before), part, after: Some(after) } = link.carve(PAGE, PAGE).unwrap() else { panic!() };
    system.iommu.wedge(true);
    let lost = part.unlink().unwrap_err();
    assert_eq!((lost.range.start(), lost.range.len(), lost.cause), (at(&reservation, 1), PAGE, RevokeError::TimedOut));
    system.iommu.wedge(false);
    // The others are had back; what the device may reach for ever is not freed with them.
    let (before, after) = (before.unlink().unwrap(), after.unlink().unwrap());
    drop(before);
    assert!(after.into_whole().is_err());
    edu.master.write(at(&reservation, 1), b"late").unwrap();
    assert_eq!((system.memory.live_allocations(), system.memory.violations()), (1, Vec::new()));
    assert_eq!((edu.device.stats().quarantined_pages, reservation.linked()), (1, PAGE));
    assert!(reservation.release().is_err());
}

#[test]
fn memory_is_taken_in_parts_without_a_device() {
    let system = FakeSystem::new();
    let mut set = scattered(&system, 4);
    for (page, byte) in (0..4).zip(1_u8..) {
        set.write_at(page * PAGE, &[byte; 4096]).unwrap();
    }
    let part = Part::of(set).unwrap();
    let mut part = part;
    for at in [0, 100, 4 * PAGE, 5 * PAGE] {
        part = part.split(at).unwrap_err().buffer;
    }
    let (first, mut second) = part.split(PAGE).unwrap();
    second.chunks_mut().for_each(|chunk| chunk[0] = 9);
    assert_eq!(first.chunks().map(|chunk| chunk[0]).collect::<Vec<_>>(), [1]);
    assert_eq!(second.chunks().map(|chunk| (chunk[0], chunk[1])).collect::<Vec<_>>(), [(9, 2), (9, 3), (9, 4)]);
    drop(first);
    assert_eq!(second.into_whole().unwrap().len(), 4 * PAGE);
}

/// Something on the bus that is no memory.
fn registers(count: u64) -> PeerRange {
    let range = PhysRange::new(PhysAddr::new(0x1000_0000), count * PAGE).unwrap();
    // SAFETY: nobody uses the fake bus there.
    unsafe { PeerRange::new(range) }.unwrap()
}

/// Caught: `PeerRange` that is linked as memory (no `MMIO`, and `NON_COHERENT` where the device does not snoop).
#[test]
fn what_lies_on_the_bus_is_linked_beside_memory_whole_and_in_parts() {
    for system in machines() {
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(8 * PAGE, Placement::At(AT)).unwrap();
        let memory = reservation.link::<ToDevice, _>(0, pages(&edu, 1)).unwrap();
        let peer = reservation.link::<Bidirectional, _>(PAGE, registers(2)).unwrap();
        let translated = |page| edu.domain.space().translate(at(&reservation, page));
        let (to, prot) = translated(2).unwrap();
        assert_eq!((to.get(), prot), (0x1000_1000, Prot::READ | Prot::WRITE | Prot::MMIO));
        assert!(!translated(0).unwrap().1.contains(Prot::MMIO));
        assert_eq!((peer.len(), peer.iova(), reservation.linked()), (2 * PAGE, at(&reservation, 1), 3 * PAGE));
        assert!(matches!(reservation.link::<ToDevice, _>(2 * PAGE, registers(1)).unwrap_err().error, Error::Linked(_)));
        let mut staged = [reservation.stage::<FromDevice, _>(4 * PAGE, Part::of(registers(3)).unwrap()).unwrap()];
        reservation.sync(&mut staged).unwrap();
        let [staged] = staged;
        let Carved { before, part, after } = staged.linked().unwrap().carve(PAGE, PAGE).unwrap();
        assert_eq!(translated(5).unwrap(), (PhysAddr::new(0x1000_1000), Prot::WRITE | Prot::MMIO));
        assert_eq!(part.unlink().unwrap().len(), PAGE);
        assert!(translated(4).is_some() && translated(5).is_none() && translated(6).is_some());
        assert_eq!(peer.unlink().unwrap().range().start().get(), 0x1000_0000);
        assert!(translated(1).is_none() && translated(2).is_none());
        drop((memory, before, after));
        reservation.release().unwrap();
        assert_eq!((edu.device.stats().live_mappings, system.memory.violations()), (0, Vec::new()));
    }
}

#[test]
fn a_restricted_device_is_linked_nothing_on_the_bus_and_one_with_copies_is() {
    let system = FakeSystem::new();
    let pool = crate::backends::restricted(&system, 1 << 20);
    for bounce in [Bounce::Restricted(pool), Bounce::Always(PoolSource::default())] {
        let restricted = matches!(bounce, Bounce::Restricted(_));
        let policy = Policy { bounce, trusted: false };
        let edu = system.device_with_policy("edu", Limits::NONE, policy).unwrap();
        let reservation = edu.device.reserve(4 * PAGE, Placement::Anywhere).unwrap();
        let mut staged = [reservation.stage::<ToDevice, _>(2 * PAGE, registers(1)).unwrap()];
        match reservation.link::<ToDevice, _>(0, registers(1)) {
            Err(rejected) => assert!(restricted && matches!(rejected.error, Error::Unreachable { .. })),
            Ok(_) => assert!(!restricted),
        }
        assert_eq!(reservation.sync(&mut staged).is_err(), restricted);
        // Memory would have to be copied, and links are not.
        let memory = Pages::zeroed(system.memory, PAGE).unwrap();
        let mut staged = [reservation.stage::<ToDevice, _>(3 * PAGE, memory).unwrap()];
        assert!(matches!(reservation.sync(&mut staged), Err(Error::Unreachable { .. })));
    }
}

#[test]
fn links_and_parts_that_follow_one_another_are_named_as_one() {
    let system = FakeSystem::new();
    let edu = system.device("edu").unwrap();
    let reservation = edu.device.reserve(8 * PAGE, Placement::Anywhere).unwrap();
    let mut staged: Vec<_> = (0..3)
        .map(|i| reservation.stage::<FromDevice, _>(2 * i * PAGE, Part::of(pages(&edu, 2)).unwrap()).unwrap())
        .collect();
    reservation.sync(&mut staged).unwrap();
    let mut links: Vec<_> = staged.into_iter().map(|staged| staged.linked().unwrap()).collect();
    let Carved { part, after, .. } = links.remove(0).carve(0, PAGE).unwrap();
    drop(part);
    links.insert(0, after.unwrap());
    let assembled = Assembled::new(links).unwrap();
    assert_eq!((assembled.segments()[0].iova, assembled.len()), (at(&reservation, 1), 5 * PAGE));
    edu.device.check_loan(&assembled).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against an array of pages: whatever is staged, synced, linked, carved and unlinked, the device reaches what is linked, in the
    /// right order, and nothing else.
    #[test]
    fn the_device_reaches_exactly_what_is_linked(steps in proptest::collection::vec((0..5_u8, 0..16_u64, 1..6_u64), 1..60)) {
        let system = FakeSystem::new();
        system.iommu.caching(true);
        let edu = system.device("edu").unwrap();
        let reservation = edu.device.reserve(16 * PAGE, Placement::Anywhere).unwrap();
        let mut model = [None; 16];
        let (mut links, mut staged) = (Vec::new(), Vec::new());
        let mut number = 0_u8;
        for (what, page, len) in steps {
            match what {
                0 | 1 => {
                    number += 1;
                    let mut whole = Part::of(pages(&edu, len)).unwrap();
                    whole.chunks_mut().flat_map(|chunk| chunk.chunks_mut(4096)).zip(0..).for_each(|(bytes, i): (_, u8)| {
                        bytes[..2].copy_from_slice(&[number, i]);
                    });
                    let free = (page..page + len).all(|page| matches!(model.get(page as usize), Some(None)))
                        && staged.iter().all(|(_, at, count): &(Staged<Bidirectional, _>, _, _)| page >= at + count || at >= &(page + len));
                    if what == 0 {
                        let link = reservation.link::<Bidirectional, _>(page * PAGE, whole);
                        prop_assert_eq!(link.is_ok(), free);
                        if let Ok(link) = link {
                            links.push(link);
                            for i in 0..len {
                                model[(page + i) as usize] = Some([number, i as u8]);
                            }
                        }
                    } else {
                        let waiting = reservation.stage::<Bidirectional, _>(page * PAGE, whole);
                        prop_assert_eq!(waiting.is_ok(), free);
                        if let Ok(waiting) = waiting {
                            staged.push((waiting, page, len));
                        }
                    }
                }
                2 => {
                    let mut all = std::mem::take(&mut staged);
                    let mut list: Vec<&mut dyn Stages> = all.iter_mut().map(|(staged, _, _)| staged as &mut dyn Stages).collect();
                    reservation.sync(&mut list).unwrap();
                    for (staged, page, len) in all {
                        let link = staged.linked().unwrap();
                        for i in 0..len {
                            let mut bytes = [0; 2];
                            link.view().read(i * PAGE, &mut bytes).unwrap();
                            model[(page + i) as usize] = Some(bytes);
                        }
                        links.push(link);
                    }
                }
                3 if !links.is_empty() => {
                    let link = links.swap_remove(page as usize % links.len());
                    let (first, count) = (link.offset() / PAGE, link.len() / PAGE);
                    let skip = (len - 1).min(count - 1);
                    let take = (page % 3 + 1).min(count - skip);
                    let Carved { before, part, after } = link.carve(skip * PAGE, take * PAGE).unwrap();
                    links.extend(before);
                    links.extend(after);
                    prop_assert_eq!(part.unlink().unwrap().len(), take * PAGE);
                    model[(first + skip) as usize..][..take as usize].fill(None);
                }
                _ if !links.is_empty() => {
                    let link = links.swap_remove(page as usize % links.len());
                    let (first, count) = ((link.offset() / PAGE) as usize, (link.len() / PAGE) as usize);
                    drop(link);
                    model[first..first + count].fill(None);
                }
                _ => (),
            }
            for (page, expected) in (0..).zip(&model) {
                let mut bytes = [0; 2];
                let seen = edu.master.read(at(&reservation, page), &mut bytes).ok().map(|()| bytes);
                prop_assert_eq!(seen, *expected, "page {}", page);
            }
            let waiting: u64 = staged.iter().map(|(_, _, len)| len * PAGE).sum();
            prop_assert_eq!(reservation.linked(), model.iter().flatten().count() as u64 * PAGE + waiting);
        }
        drop((links, staged));
        prop_assert!(reservation.release().is_ok());
        prop_assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}
