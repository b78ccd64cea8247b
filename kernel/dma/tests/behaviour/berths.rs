//! Address ranges that a device keeps for its next mapping: had again, given up when somebody needs them, and never two mappings' at once.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{Bidirectional, Device, Error, Fate, FromDevice, Ladder, Limits, Mapped, PageRequest, Pages, ToDevice};
use iommu::{Iova, IovaError, IovaRange, PAGE_SIZE};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Barrier, mpsc};
use std::thread;

/// Without and with tables in which leaves are anchored.
fn systems() -> [FakeSystem; 2] {
    [FakeSystem::new(), FakeSystem::with_tables()]
}

fn map(device: &Device, pages: u64) -> Mapped<Bidirectional, Pages> {
    device.map(device.pages(pages * PAGE_SIZE).unwrap()).unwrap()
}

/// Caught: a range that is not kept (the next mapping has another); one that is had again while it is mapped.
#[test]
fn a_mapping_has_the_range_again_that_the_last_one_of_its_size_had() {
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        for pages in [1, 3, 16, 256] {
            let first = map(&device, pages);
            let range = first.iova();
            first.unmap().unwrap();
            let (second, third) = (map(&device, pages), map(&device, pages));
            assert_eq!(second.iova(), range, "{pages} pages");
            assert_ne!(third.iova(), range);
            third.unmap().unwrap();
            second.unmap().unwrap();
            // The last one given back is the first to be had. (The tracker records by address, and nothing is kept beside it.)
            let fourth = map(&device, pages);
            assert!(fourth.iova() == range || dma::tracker::is_on());
        }
        assert_eq!(device.stats().live_mappings, 0);
        assert_eq!(device.stats().total_mappings, 16);
        assert_eq!(device.stats().total_bytes, 4 * 276 * PAGE_SIZE);
    }
}

/// As of a driver whose interrupts another core takes. Caught: ranges that are looked for where the mapping is made alone: all that there
/// can be are kept where mappings end, and each mapping has a new one.
#[test]
fn what_is_mapped_on_one_core_and_ends_on_another_has_its_range_again() {
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        let (begun, ends) = mpsc::channel::<Mapped<Bidirectional, Pages>>();
        let (ended, known) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                for mapped in ends {
                    mapped.unmap().unwrap();
                    ended.send(()).unwrap();
                }
            });
            let mut seen = BTreeSet::new();
            for _ in 0..1000 {
                let mapped = map(&device, 1);
                seen.insert(mapped.iova());
                begun.send(mapped).unwrap();
                known.recv().unwrap();
            }
            drop(begun);
            // One, but for those before it was known where they end.
            assert!(seen.len() <= 32 || dma::tracker::is_on(), "{}", seen.len());
        });
    }
}

/// Sizes that share a stack. Caught: another core's range that is of another length, and is lost when it does not suit.
#[test]
fn a_range_of_another_core_that_does_not_suit_is_had_by_who_it_suits() {
    if dma::tracker::is_on() {
        return;
    }
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        let range = thread::scope(|scope| {
            let once = || {
                let mapped = map(&device, 5);
                let range = mapped.iova();
                mapped.unmap().unwrap();
                range
            };
            scope.spawn(once).join().unwrap()
        });
        let longer: Vec<_> = (0..32).map(|_| map(&device, 6)).collect();
        assert!(longer.iter().all(|mapped| mapped.iova() != range));
        let same: Vec<_> = (0..32).map(|_| map(&device, 5)).collect();
        assert_eq!(same.iter().filter(|mapped| mapped.iova() == range).count(), 1);
    }
}

/// Sizes that share a stack: 5 to 8 pages. Caught: a range that is had by a mapping of another length; one that is lost when the
/// uppermost does not suit.
#[test]
fn a_range_below_others_of_other_lengths_is_found() {
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        let ranges = |device: &Device| {
            let mapped: Vec<_> = (5..=8).map(|pages| map(device, pages)).collect();
            let ranges: Vec<_> = mapped.iter().map(|mapped| (mapped.iova(), mapped.len())).collect();
            mapped.into_iter().for_each(|mapped| drop(mapped.unmap().unwrap()));
            ranges
        };
        let first = ranges(&device);
        for _ in 0..3 {
            assert_eq!(ranges(&device), first);
        }
    }
}

/// Caught: ranges that are not given up when the domain has none left (each of these is refused).
#[test]
fn what_is_kept_is_given_up_when_an_address_is_needed() {
    for system in systems() {
        // 63 pages of addresses.
        let FakeDevice { device, domain, .. } = system.device_with("small", Limits::address_bits(18)).unwrap();
        let fill = |pages: u64| {
            let mut all = Vec::new();
            loop {
                match device.map::<ToDevice, _>(device.pages(pages * PAGE_SIZE).unwrap()) {
                    Ok(mapped) => all.push(mapped),
                    Err(rejected) => {
                        assert!(matches!(rejected.error, Error::Iova(IovaError::NoSpace { .. })), "{}", rejected.error);
                        return all;
                    }
                }
            }
        };
        for pages in [1, 4, 2, 16, 1, 3] {
            let all = fill(pages);
            // Page 0 is never given out; three pages have the slots of four.
            assert_eq!(all.len() as u64, 64 / pages.next_power_of_two() - 1, "{pages} pages");
            drop(all);
        }
        // Somewhere that is kept, for somebody who wants it exactly there; for another user of the domain.
        let kept = map(&device, 1).iova();
        drop(device.map_at::<ToDevice, _>(kept, device.pages(PAGE_SIZE).unwrap()).unwrap());
        drop(map(&device, 1));
        let range = IovaRange::new(kept, PAGE_SIZE).unwrap();
        domain.iova().reserve(range).unwrap();
        assert_ne!(map(&device, 1).iova(), kept);
        domain.iova().release(range).unwrap();
    }
}

/// Caught: a device that keeps its ranges when it is gone, or out of use.
#[test]
fn nothing_is_kept_for_a_device_that_is_gone() {
    for system in systems() {
        for shut_down in [false, true] {
            let FakeDevice { device, domain, .. } = system.device("disk").unwrap();
            let mapped = map(&device, 1);
            let range = IovaRange::new(mapped.iova(), PAGE_SIZE).unwrap();
            drop(mapped);
            let live = map(&device, 1);
            assert_eq!(live.iova(), range.start());
            let other = map(&device, 2);
            let other_range = IovaRange::new(other.iova(), 2 * PAGE_SIZE).unwrap();
            drop(other);
            if shut_down {
                device.shut_down().unwrap();
            } else {
                drop(device);
            }
            let free = |range| {
                let free = domain.iova().free(range);
                assert_eq!(free, Err(IovaError::NotAllocated(range)), "it has been given back");
            };
            if shut_down {
                free(other_range);
            }
            // What ends later is not kept either.
            drop(live);
            free(range);
            assert!(domain.iova().free(other_range).is_err());
        }
    }
}

/// Caught: a mapping that the record of its berth does not say; a fate that is the one before the last.
#[test]
fn the_record_of_a_kept_range_is_that_of_its_last_mapping() {
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        drop(map(&device, 1));
        for _ in 0..3 {
            let line = line!() + 1;
            let mapped = device.map::<FromDevice, _>(device.pages(PAGE_SIZE).unwrap()).unwrap();
            let iova = mapped.iova();
            let Fate::Live { mapped_at: Some(site), .. } = device.explain(iova).fate else {
                panic!("{}", device.explain(iova))
            };
            assert_eq!(site.line(), line);
            let unmapped = line!() + 1;
            mapped.unmap().unwrap();
            let Fate::Ended { mapped_at: Some(site), unmapped_at: Some(end), .. } = device.explain(iova).fate else {
                panic!("{}", device.explain(iova))
            };
            assert_eq!((site.line(), end.line()), (line, unmapped));
        }
        let lent = map(&device, 1);
        assert_eq!(device.lendings().unwrap().count(), 1);
        assert_eq!(device.stats().live_bytes, PAGE_SIZE);
        drop(lent);
        assert_eq!(device.lendings().unwrap().count(), 0);
    }
}

/// Caught: a range that is ready again although its revocation has failed.
#[test]
fn a_range_whose_revocation_failed_is_never_had_again() {
    for system in systems() {
        let FakeDevice { device, .. } = system.device("disk").unwrap();
        drop(map(&device, 1));
        let mapped = map(&device, 1);
        let lost = mapped.iova();
        system.iommu.wedge(true);
        mapped.unmap().unwrap_err();
        system.iommu.wedge(false);
        let mut all = Vec::new();
        for _ in 0..600 {
            let mapped = map(&device, 1);
            assert_ne!(mapped.iova(), lost);
            all.push(mapped);
        }
        all.into_iter().for_each(|mapped| drop(mapped.unmap().unwrap()));
        assert_eq!((device.stats().live_mappings, device.stats().quarantined_pages), (1, 1));
    }
}

/// Each of more mappings than there are berths. Caught: a mapping that ends without a vacant berth and keeps its address all the same.
#[test]
fn more_ranges_than_berths_are_kept_or_given_back() {
    for system in systems() {
        let FakeDevice { device, domain, .. } = system.device("disk").unwrap();
        let all: Vec<_> = (0..1500).map(|_| map(&device, 1)).collect();
        let ranges: BTreeSet<_> = all.iter().map(Mapped::iova).collect();
        assert_eq!(ranges.len(), 1500);
        all.into_iter().for_each(|mapped| drop(mapped.unmap().unwrap()));
        let all: Vec<_> = (0..511).map(|_| map(&device, 1)).collect();
        drop(all);
        // Others of another size take their berths over.
        for _ in 0..2 {
            let other: Vec<_> = (0..700).map(|_| map(&device, 2)).collect();
            assert_eq!(other.iter().map(Mapped::iova).collect::<BTreeSet<_>>().len(), 700);
        }
        assert_eq!(device.stats().total_mappings, 1500 + 511 + 1400);
        assert_eq!(device.stats().total_bytes, (1500 + 511 + 2800) * PAGE_SIZE);
        drop(device);
        let whole = domain.iova().window();
        domain.iova().reserve(whole).unwrap();
    }
}

/// Caught: two cores that take the same berth off a stack (an exchange that compares its uppermost only).
#[test]
fn no_range_is_two_mappings_at_once_whoever_takes_and_gives_up() {
    for system in systems() {
        // All addresses are taken again and again, so that what is kept is given up while it is taken.
        let FakeDevice { device, .. } = system.device_with("small", Limits::address_bits(17)).unwrap();
        let (device, barrier) = (&device, Barrier::new(4));
        let live = std::sync::Mutex::new(BTreeSet::new());
        thread::scope(|scope| {
            for core in 0..4_u64 {
                let (live, barrier) = (&live, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    let mut held = Vec::new();
                    for round in 0..3000_u64 {
                        if (round * 7 + core) % 5 < 3 && held.len() < 12 {
                            let buffer = device.pages((1 + round % 2) * PAGE_SIZE).unwrap();
                            if let Ok(mapped) = device.map::<ToDevice, _>(buffer) {
                                let pages =
                                    (0..mapped.len() / PAGE_SIZE).map(|page| mapped.iova().get() + page * PAGE_SIZE);
                                for page in pages {
                                    assert!(live.lock().unwrap().insert(page), "{page:#x} is lent twice");
                                }
                                held.push(mapped);
                            }
                        } else if let Some(mapped) = held.pop() {
                            for page in 0..mapped.len() / PAGE_SIZE {
                                live.lock().unwrap().remove(&(mapped.iova().get() + page * PAGE_SIZE));
                            }
                            mapped.unmap().unwrap();
                        }
                    }
                    for mapped in held {
                        for page in 0..mapped.len() / PAGE_SIZE {
                            live.lock().unwrap().remove(&(mapped.iova().get() + page * PAGE_SIZE));
                        }
                    }
                });
            }
        });
        assert_eq!(device.stats().live_mappings, 0);
    }
}

/// Caught: the limit of coherent memory left out of account.
#[test]
fn a_kept_range_beyond_the_limit_of_coherent_memory_is_not_had_for_it() {
    for system in systems() {
        let limits = Limits { coherent_mask: (1 << 16) - 1, ..Limits::NONE };
        let FakeDevice { device, .. } = system.device_with("narrow", limits).unwrap();
        let low: Vec<_> = (0..15).map(|_| device.coherent::<AtomicU64>().unwrap()).collect();
        let high = map(&device, 1);
        assert!(high.iova() >= Iova::new(1 << 16));
        drop(high);
        assert!(matches!(device.coherent::<AtomicU64>(), Err(Error::Iova(IovaError::NoSpace { .. }))));
        drop(low);
        drop(device.coherent::<AtomicU64>().unwrap());
    }
}

/// Caught: memory of a device that does not snoop, lent without its caches being seen to.
#[test]
fn nothing_is_kept_for_a_device_that_is_special() {
    let system = FakeSystem::non_coherent();
    let FakeDevice { device, domain, .. } = system.device("disk").unwrap();
    let mapped = map(&device, 1);
    let range = IovaRange::new(mapped.iova(), PAGE_SIZE).unwrap();
    drop(mapped);
    assert_eq!(domain.iova().free(range), Err(IovaError::NotAllocated(range)));
}

/// What the device reaches, in each kind of leaf. Caught: a leaf that stays after the mapping's end; one that lets the device write what
/// it was lent to read; a buffer in several runs mapped by the leaf of its range; tables linked where blocks are put.
#[test]
fn a_device_reaches_what_is_mapped_at_a_kept_range_and_no_longer_than_it_is() {
    let system = FakeSystem::with_tables();
    let FakeDevice { device, master, domain, .. } = system.device("disk").unwrap();
    for pages in [1, 16, 512] {
        let request = PageRequest { align: pages * PAGE_SIZE, ..PageRequest::anywhere(pages * PAGE_SIZE) };
        for round in 0..3_u8 {
            let mut buffer = Pages::allocate(device.memory(), request).unwrap();
            buffer.as_mut_slice()[17] = round;
            let mapped = device.map::<ToDevice, _>(buffer).unwrap();
            let range = IovaRange::new(mapped.iova(), mapped.len()).unwrap();
            let leaves = domain.space().leaves(range).unwrap();
            // (Beside the tracker nothing is kept: a block's range may have been had by pieces.)
            if pages != 512 || !dma::tracker::is_on() {
                assert_eq!(
                    (leaves.count(), leaves.contiguous),
                    if pages == 16 { (16, 16) } else { (1, 0) },
                    "{pages} pages"
                );
            }
            let (mut byte, last) = ([0xff], Iova::new(mapped.iova().get() + mapped.len() - 1));
            master.read(Iova::new(mapped.iova().get() + 17), &mut byte).unwrap();
            assert_eq!(byte, [round]);
            master.read(last, &mut byte).unwrap();
            assert!(master.write(mapped.iova(), &[1]).is_err(), "it was lent to be read");
            let iova = mapped.iova();
            mapped.unmap().unwrap();
            assert!(master.read(iova, &mut byte).is_err() && master.read(last, &mut byte).is_err());
            // The same range, for memory in pieces; but no block's.
            let holes: Vec<_> = (0..2 * pages).map(|_| device.pages(PAGE_SIZE).unwrap()).collect();
            let _kept: Vec<_> = holes.into_iter().step_by(2).collect();
            let pieces = device.page_set(pages * PAGE_SIZE, Ladder::SINGLE_PAGES).unwrap();
            assert!(pages == 1 || pieces.runs().len() > 1, "it is in pieces");
            let mapped = device.map::<FromDevice, _>(pieces).unwrap();
            assert!((mapped.iova() == iova) == (pages != 512) || dma::tracker::is_on(), "{pages} pages");
            let last = Iova::new(mapped.iova().get() + mapped.len() - 1);
            master.write(last, &[7]).unwrap();
            let pieces = mapped.unmap().unwrap();
            pieces.read_at(pages * PAGE_SIZE - 1, &mut byte).unwrap();
            assert_eq!(byte, [7]);
            assert!(master.write(last, &[8]).is_err());
        }
    }
    assert_eq!(system.memory.violations(), Vec::<String>::new());
}

/// Caught: a berth that is nobody's after its mapping has failed.
#[test]
fn a_mapping_that_fails_leaves_its_range_ready() {
    let system = FakeSystem::new();
    let FakeDevice { device, .. } = system.device("disk").unwrap();
    let range = map(&device, 1).iova();
    system.iommu.fail_map_after(0);
    let rejected = device.map::<ToDevice, _>(device.pages(PAGE_SIZE).unwrap()).unwrap_err();
    assert!(matches!(rejected.error, Error::OutOfMemory));
    assert!(map(&device, 1).iova() == range && device.stats().live_mappings == 0);
}
