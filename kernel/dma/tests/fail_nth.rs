//! Every way through the DMA-API with the n-th allocation failing, for every n until none fails: an error each time, nothing
//! leaked, nothing left mapped. Heap, DMA memory, tables and address spaces count as one, in the order in which they are asked
//! for. An allocation that could not fail would end this process.

use base::Deadline;
use base::failing::{self, Failing};
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use dma::fakes::{FakeDevice, FakeSystem};
use dma::hal::{ForeignHal, HasSlot};
use dma::{
    Assembled, Bidirectional, Bounce, BusWindow, Bytes, Cacheability, Carved, CarvedOut, CpuReads, Device,
    DeviceConfig, DirectConfig, DmaMemory, Error, FromDevice, Gather, Job, Ladder, Lent, Limits, Linked, Mapped,
    OwnedDomain, PageRequest, PageSet, Pages, Part, PeerRange, Placement, Policy, Pool, PoolSource, SharedBuffer,
    Stages, Strictness, ToDevice, Turn, tracker, vcm,
};
use iommu::{AttachError, Iova, IovaError, PhysAddr, PhysRange};
use std::sync::{Arc, Mutex, PoisonError};
use virtio_drivers::{BufferDirection, Hal};

/// One test at a time: there are lists for the whole system, and whoever lets go of something last frees it.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> impl Drop {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[global_allocator]
static FAILING: Failing = Failing;

fn is_about_memory(error: &Error) -> bool {
    matches!(
        error,
        Error::OutOfMemory
            | Error::Attributes(_)
            | Error::Iova(IovaError::OutOfMemory)
            | Error::Attach(AttachError::OutOfMemory)
    )
}

/// Runs `operation` until nothing fails any more. It leaves nothing behind, whether it succeeds or not. Says how many
/// allocations there were.
fn survives(what: &str, system: &FakeSystem, device: &FakeDevice, operation: impl FnMut() -> Result<(), Error>) -> u64 {
    survives_with(what, system, device, is_about_memory, operation)
}

/// As [`survives`], with a say in which errors there may be.
fn survives_with(
    what: &str,
    system: &FakeSystem,
    device: &FakeDevice,
    is_expected: fn(&Error) -> bool,
    mut operation: impl FnMut() -> Result<(), Error>,
) -> u64 {
    // Once without: caches of the address allocator and the like, which are kept.
    operation().unwrap();
    let frames = system.memory.live_allocations();
    for n in 0.. {
        let heap = failing::heap();
        failing::arm(n);
        let result = operation();
        let failed = failing::disarm();
        assert_eq!(system.memory.live_allocations(), frames, "{what}: failure {n} leaks memory");
        assert_eq!(device.device.stats().live_mappings, 0, "{what}: failure {n} leaves a mapping");
        assert_eq!(system.memory.violations(), Vec::<String>::new(), "{what}: failure {n}");
        match result {
            Ok(()) => {
                // What an error frees may have been allocated by the failing round itself; a round that succeeds is even.
                assert_eq!(failing::heap(), heap, "{what}: the heap has grown");
                if !failed {
                    return n;
                }
            }
            Err(error) => {
                assert!(failed, "{what}: {error} although nothing failed");
                assert!(is_expected(&error), "{what}: failure {n}: {error}");
                // It may name things.
                drop(error);
                assert_eq!(failing::heap(), heap, "{what}: failure {n} leaks heap");
            }
        }
    }
    unreachable!()
}

/// All addresses of the window are still there.
fn all_addresses_are_free(small: &FakeDevice) {
    let all: Vec<_> =
        (0..15).map(|_| small.device.map::<ToDevice, _>(small.device.pages(4096).unwrap()).unwrap()).collect();
    assert!(small.device.map::<ToDevice, _>(small.device.pages(4096).unwrap()).is_err());
    drop(all);
}

#[test]
fn every_operation_survives_every_failure() {
    let _alone = alone();
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = system.device_with("blk", Limits::address_bits(16)).unwrap();
        let device = &blk.device;
        let at = Iova::new(0x8000);
        let memory = system.memory;

        let count = survives("map", &system, &blk, || {
            device.map::<ToDevice, _>(device.pages(4096)?)?.unmap()?;
            let set = PageSet::zeroed(memory, 8 * 4096, Ladder::SINGLE_PAGES)?;
            device.map::<Bidirectional, _>(set)?.unmap()?;
            device.map::<FromDevice, _>(PageSet::of(device.pages(4096)?)?)?.unmap()?;
            Ok(())
        });
        assert!(count > 15, "only {count} allocations");
        all_addresses_are_free(&blk);

        survives("map_at", &system, &blk, || {
            device.map_at::<FromDevice, _>(at, device.pages(4096)?)?.unmap()?;
            Ok(())
        });
        all_addresses_are_free(&blk);

        // When coherent memory cannot be made cacheable again it is lost on purpose; that is another test.
        survives("coherent", &system, &blk, || {
            device.coherent::<AtomicU64>()?.release()?;
            device.coherent_slice::<AtomicU64>(1000)?.release()?;
            Ok(())
        });
        all_addresses_are_free(&blk);

        survives("borrowed", &system, &blk, || {
            let mut bytes = [7; 100];
            device.with_mapped::<Bidirectional, _>(&mut bytes, |_| ())
        });
        all_addresses_are_free(&blk);

        survives("share", &system, &blk, || {
            let pages = PageSet::zeroed(memory, 8192, Ladder::SINGLE_PAGES)?;
            let buffer = SharedBuffer::try_new("picture", pages)?;
            let one = buffer.attach::<ToDevice>(device)?;
            let two = buffer.attach::<FromDevice>(device)?;
            one.detach()?;
            two.detach()?;
            drop(buffer.into_pages());
            Ok(())
        });
        all_addresses_are_free(&blk);

        sharing(&system, &blk);
        all_addresses_are_free(&blk);

        survives("owned domain", &system, &blk, || {
            let domain = OwnedDomain::new("own", device)?;
            let placed = domain.map_owned::<ToDevice, _>(at, device.pages(4096)?)?;
            let attached = domain.attach(device)?;
            drop(attached);
            placed.unmap()?;
            Ok(())
        });
        all_addresses_are_free(&blk);

        survives("gather", &system, &blk, || {
            let mut gather = Gather::<Mapped<FromDevice, Pages>, 4>::new();
            for _ in 0..3 {
                // What was gathered ends with it when the next one fails.
                assert!(gather.push(device.map(device.pages(4096)?)?).is_ok());
            }
            for pages in gather.finish() {
                pages?;
            }
            Ok(())
        });
        all_addresses_are_free(&blk);

        survives("reports", &system, &blk, || {
            let mapped = device.map::<ToDevice, _>(device.pages(4096)?)?;
            let listed = tracker::report()?.count() != 0 && device.lendings()?.count() == 1;
            assert!(listed);
            mapped.unmap()?;
            Ok(())
        });
    }
}

/// Work on shared buffers, moves, exporters, pieces, and areas of addresses.
fn sharing(system: &FakeSystem, blk: &FakeDevice) {
    let (device, memory, now) = (&blk.device, system.memory, Deadline::after_millis(0));
    let pages = || PageSet::zeroed(memory, 8192, Ladder::SINGLE_PAGES);
    let count = survives("jobs", system, blk, || {
        let buffer = SharedBuffer::try_new("picture", pages()?)?;
        let loan = base::fallible::arc(buffer.attach::<FromDevice>(device)?).map_err(|_| Error::OutOfMemory)?;
        drop(Job::begin(&loan, now)?);
        let any: Arc<dyn Lent> = loan;
        drop(Turn::take(core::slice::from_ref(&any), now)?);
        assert_eq!(buffer.users().device_writers, 1);
        Ok(())
    });
    assert!(count > 10, "only {count} allocations");

    survives("move", system, blk, || {
        let buffer = SharedBuffer::try_new("picture", pages()?)?;
        let import = buffer.import::<ToDevice>(device, None)?;
        drop(import.map()?);
        drop(buffer.extents()?);
        let old = buffer.relocate(pages()?, now)?;
        assert!(!buffer.users().moving);
        drop(old);
        Ok(())
    });

    survives("carve-out", system, blk, || {
        let buffer = SharedBuffer::export("carved", CarvedOut::allocate(memory, 8192, Cacheability::NonCacheable)?)?;
        buffer.attach::<FromDevice>(device)?.detach()?;
        drop(buffer.cpu_access::<CpuReads>()?);
        Ok(())
    });

    survives("pieces", system, blk, || {
        let buffer = SharedBuffer::try_new("picture", pages()?)?;
        buffer.attach_pieces::<ToDevice>(device, [4096..4100, 0..10, 17..30].into_iter())?.detach()?;
        Ok(())
    });

    survives("areas", system, blk, || {
        let (buffer, chunks) = vcm::fill("virtual", memory, 8192, Ladder::SINGLE_PAGES)?;
        assert_eq!(chunks.count(), 2);
        let area = vcm::reserve(device, 8192, 4096)?;
        let backed = area.back::<ToDevice>(&buffer).map_err(|(_, error)| error)?;
        drop(backed.unmap()?);
        let domain = OwnedDomain::new("own", device)?;
        let area = vcm::reserve(&domain, 8192, 4096)?;
        drop(area.back::<FromDevice>(&buffer).map_err(|(_, error)| error)?.unmap()?);
        Ok(())
    });
}

/// Devices come and go. With the tracker too: a record that cannot be made is no failure of the mapping.
#[test]
fn devices_survive_every_failure() {
    let _alone = alone();
    let system = FakeSystem::new();
    let other = system.device("other").unwrap();
    let host = system.device("host").unwrap();
    for on in [false, true] {
        tracker::enable(on);
        survives("device", &system, &other, || {
            let config = DeviceConfig {
                name: "another",
                group: host.group.clone(),
                limits: Limits::NONE,
                coherent: true,
                memory: system.memory,
            };
            // SAFETY: the group's one bus master is the fake's, which the fake translates.
            let device = unsafe { Device::new(config) }?;
            device.map::<ToDevice, _>(device.pages(4096)?)?.unmap()?;
            assert_eq!(device.stats().live_mappings, 0);
            Ok(())
        });
        survives("direct device", &system, &other, || {
            let windows = [dma::BusWindow::identity()];
            let (limits, memory) = (Limits::NONE, system.memory);
            let config = DirectConfig { name: "direct", windows: &windows, limits, coherent: true, memory };
            // SAFETY: there is no such device.
            let device = unsafe { Device::direct(config) }?;
            device.map::<ToDevice, _>(PageSet::zeroed(memory, 8192, Ladder::SINGLE_PAGES)?)?.unmap()?;
            Ok(())
        });
    }
    tracker::enable(false);
}

/// Where there is no memory for a pool, the reason for wanting one is the error; and a pool is as large as there was memory for.
fn is_about_memory_or_reach(error: &Error) -> bool {
    is_about_memory(error) || matches!(error, Error::Unreachable { .. } | Error::PoolExhausted { .. })
}

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

fn both() -> [FakeSystem; 2] {
    [FakeSystem::new(), FakeSystem::non_coherent()]
}

/// Another device of the group of `host`: an operation that makes its device itself also makes what a device makes when it
/// first needs it.
fn another(system: &FakeSystem, host: &FakeDevice, bounce: Bounce) -> Result<Device, Error> {
    let (coherent, memory) = (system.memory.is_snooped(), system.memory);
    let config = DeviceConfig { name: "new", group: host.group.clone(), limits: Limits::NONE, coherent, memory };
    // SAFETY: the group's one bus master is the fake's, which the fake translates, and snoops as its memory says.
    unsafe { Device::with_policy(config, Policy { bounce, trusted: false }) }
}

/// What berths stand in is kept for the next device, so it may stay behind once, whole. Caught: berths that stay behind because there was
/// no memory for what goes with them.
#[cfg(not(feature = "track"))]
#[test]
fn of_a_device_that_cannot_be_made_berths_stay_behind_once() {
    const BERTHS: i64 = 512 * 128;
    let _alone = alone();
    let system = FakeSystem::new();
    let host = system.device("host").unwrap();
    let make = || another(&system, &host, Bounce::Never);
    let made = || {
        let heap = failing::heap();
        let device = make().unwrap();
        (device, failing::heap() - heap)
    };
    drop(made());
    // In berths that were left.
    let (device, bytes) = made();
    let mut devices = vec![device];
    // Until there are none.
    while {
        let (device, more) = made();
        devices.push(device);
        more < bytes + BERTHS
    } {}
    let mut left = Vec::new();
    for n in 0.. {
        let heap = failing::heap();
        failing::arm(n);
        let result = make();
        failing::disarm();
        let Err(error) = result else { break };
        assert!(is_about_memory(&error), "failure {n}: {error}");
        drop(error);
        if failing::heap() - heap >= BERTHS {
            left.push(n);
        }
    }
    assert_eq!(left.len(), 1, "{left:?}");
}

/// Caught: `ScatterList::add` without its `reserve`.
#[test]
fn lists_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let blk = system.device_with("blk", Limits::address_bits(16)).unwrap();
        let device = &blk.device;
        let count = survives("list", &system, &blk, || {
            // It grows: room was asked for one part.
            let mut list = device.scatter_list(1)?;
            for _ in 0..5 {
                list.push(device.pages(4096)?)?;
            }
            list.push_part(device.pages(8192)?, 100, 5000)?;
            let mapped = device.map_list::<Bidirectional, _>(list)?;
            mapped.sync_for_device(10, 5000)?;
            let list = mapped.unmap()?;
            let mapped = device.map_list::<ToDevice, _>(list)?;
            let mut gather = Gather::<_, 2>::new();
            assert!(gather.push(mapped).is_ok());
            for list in gather.finish() {
                assert_eq!(list?.into_buffers().count(), 6);
            }
            Ok(())
        });
        assert!(count > 10, "only {count} allocations");
        survives("list of sets", &system, &blk, || {
            let mut list = device.scatter_list(2)?;
            for _ in 0..2 {
                list.push(PageSet::zeroed(system.memory, 3 * 4096, Ladder::SINGLE_PAGES)?)?;
            }
            drop(device.map_list::<FromDevice, _>(list)?);
            Ok(())
        });
        all_addresses_are_free(&blk);
    }
}

/// A list that nothing translates has as many segments as it must.
#[test]
fn lists_of_direct_devices_survive_every_failure() {
    let _alone = alone();
    let system = FakeSystem::new();
    let host = system.device("host").unwrap();
    let (windows, memory) = ([BusWindow::identity()], system.memory);
    let config = DirectConfig { name: "direct", windows: &windows, limits: Limits::NONE, coherent: true, memory };
    // SAFETY: there is no such device.
    let direct = unsafe { Device::direct(config) }.unwrap();
    survives("direct list", &system, &host, || {
        let mut list = direct.scatter_list(3)?;
        for _ in 0..9 {
            list.push(direct.pages(4096)?)?;
        }
        let mapped = direct.map_list::<FromDevice, _>(list)?;
        assert_eq!(mapped.coalesced().count(), 9);
        mapped.unmap()?;
        Ok(())
    });
    assert_eq!(direct.stats().live_mappings, 0);
}

#[test]
fn lazy_ends_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let host = system.device_with("host", Limits::address_bits(16)).unwrap();
        let count = survives("lazy", &system, &host, || {
            let device = another(&system, &host, Bounce::Never)?;
            device.set_strictness(Strictness::Relaxed);
            let map = || -> Result<_, Error> {
                Ok((
                    device.map::<FromDevice, _>(device.pages(4096)?)?,
                    device.map::<ToDevice, _>(PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES)?)?,
                    device.map::<Bidirectional, _>(device.pages(4096)?)?,
                ))
            };
            // These leave ranges for those that lapse.
            drop(map()?);
            let (one, two, three) = map()?;
            // There is no error, and nothing is allocated.
            let (one, two) = (one.unmap_lazy(), two.unmap_lazy());
            let lapses = device.is_coherent() && !tracker::is_on();
            assert_eq!((one.is_over(), two.is_over()), (!lapses, !lapses));
            let three = three.unmap_lazy();
            drop(two);
            assert!(one.take(soon()).is_ok() && three.take(soon()).is_ok());
            assert!(device.flush(soon()).is_ok());
            assert_eq!(device.stats().live_mappings, 0);
            Ok(())
        });
        assert!(count > 10, "only {count} allocations");
        survives("flush", &system, &host, || {
            let lapse = || {
                drop(host.device.map::<FromDevice, _>(host.device.pages(4096)?)?.unmap_lazy());
                Ok(())
            };
            let result = (0..5).try_for_each(|_| lapse());
            assert!(host.device.flush(soon()).is_ok());
            result
        });
        all_addresses_are_free(&host);
    }
}

/// Caught: `Device::reserve` with an `Arc::new`.
#[test]
fn reservations_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let edu = system.device_with("edu", Limits::address_bits(16)).unwrap();
        let device = &edu.device;
        for placement in [Placement::Anywhere, Placement::Aligned(1 << 14), Placement::At(Iova::new(0x8000))] {
            let count = survives("reservation", &system, &edu, || {
                let reservation = device.reserve(4 * 4096, placement)?;
                let mut links: Vec<Linked<FromDevice, Pages>> = Vec::new();
                links.try_reserve(2)?;
                links.push(reservation.link(0, device.pages(4096)?)?);
                links.push(reservation.link(4096, device.pages(8192)?)?);
                let other = reservation.link::<ToDevice, _>(3 * 4096, device.pages(4096)?)?;
                let assembled = Assembled::new(links).map_err(|_| Error::BadSize(0))?;
                let mut gather = Gather::<_, 2>::new();
                for link in assembled.into_links() {
                    assert!(gather.push(link).is_ok());
                }
                for pages in gather.finish() {
                    pages?;
                }
                other.unlink()?;
                assert!(reservation.release().is_ok());
                Ok(())
            });
            assert!(count > 8, "only {count} allocations");
            all_addresses_are_free(&edu);
        }
    }
}

/// Caught: `Part::of` with an `Arc::new`; `Runs::cut` that allocates what it does not reserve.
#[test]
fn links_made_together_and_parts_of_them_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let edu = system.device_with("edu", Limits::address_bits(16)).unwrap();
        let device = &edu.device;
        let count = survives("staged", &system, &edu, || {
            let reservation = device.reserve(8 * 4096, Placement::Anywhere)?;
            // So that the list of claims grows where one is divided.
            let last = reservation.link::<ToDevice, _>(7 * 4096, device.pages(4096)?)?;
            let set = PageSet::zeroed(system.memory, 4 * 4096, Ladder::SINGLE_PAGES)?;
            let mut one = reservation.stage::<FromDevice, _>(0, Part::of(set)?)?;
            let mut two = reservation.stage::<ToDevice, _>(5 * 4096, device.pages(8192)?)?;
            reservation.sync::<&mut dyn Stages>(&mut [&mut one, &mut two])?;
            let whole = one.linked().map_err(|_| Error::BadSize(0))?;
            let Carved { before, part, after } = whole.carve(4096, 8192)?;
            let part = part.unlink()?;
            let (left, right) = part.split(4096)?;
            drop((before, left));
            if let Some(after) = after {
                after.unlink()?;
            }
            // The only one that is left.
            assert!(right.into_whole().is_ok());
            two.withdraw()?;
            last.unlink()?;
            assert!(reservation.release().is_ok());
            Ok(())
        });
        assert!(count > 15, "only {count} allocations");
        all_addresses_are_free(&edu);
    }
}

/// Caught: `Source::get` with an `Arc::new`.
#[test]
fn copies_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let host = system.device("host").unwrap();
        let memory = system.memory;
        let use_it = |device: &Device, pool: Option<&Pool>| {
            let result = (|| {
                let set = PageSet::zeroed(memory, 3 * 4096, Ladder::SINGLE_PAGES)?;
                device.map::<Bidirectional, _>(set)?.unmap()?;
                drop(device.map::<FromDevice, _>(Pages::zeroed(memory, 4096)?)?.unmap_lazy());
                device.with_mapped::<ToDevice, _>(&mut [7; 100], |_| ())?;
                // More than one run.
                let set = PageSet::zeroed(memory, 300 << 10, Ladder::DEFAULT)?;
                drop(device.map::<ToDevice, _>(set)?);
                let mut list = device.scatter_list(2)?;
                list.push_part(Pages::zeroed(memory, 8192)?, 100, 200)?;
                list.push(Pages::zeroed(memory, 4096)?)?;
                device.map_list::<Bidirectional, _>(list)?.unmap()?;
                let pages = PageSet::zeroed(memory, 8192, Ladder::SINGLE_PAGES)?;
                let buffer = SharedBuffer::try_new("shared", pages)?;
                let (reads, writes) = (buffer.attach::<ToDevice>(device)?, buffer.attach::<FromDevice>(device)?);
                writes.sync_for_cpu(0, 4096)?;
                reads.detach()?;
                writes.detach()?;
                Ok(())
            })();
            assert_eq!((device.stats().live_mappings, pool.map_or(0, Pool::used)), (0, 0), "{result:?}");
            result
        };
        let shared = Arc::new(Pool::new("shared", memory, 1 << 20, PhysAddr::new(u64::MAX)).unwrap());
        let raw = memory.allocate(PageRequest::anywhere(1 << 20)).unwrap();
        let range = PhysRange::new(raw.phys, raw.bytes).unwrap();
        // SAFETY: just allocated, and never freed.
        let carved = unsafe { Pool::carve_out("restricted", range, raw.ptr, memory) }.unwrap();
        let carved: &'static Pool = Box::leak(Box::new(carved));
        let own = || Bounce::Always(PoolSource::Own(1 << 20));

        survives_with("a pool of one's own", &system, &host, is_about_memory_or_reach, || {
            use_it(&another(&system, &host, own())?, None)
        });
        survives("a shared pool", &system, &host, || {
            let bounce = Bounce::Always(PoolSource::Shared(shared.clone()));
            use_it(&another(&system, &host, bounce)?, Some(&shared))
        });
        survives("a restricted pool", &system, &host, || {
            let device = another(&system, &host, Bounce::Restricted(carved))?;
            device.map::<ToDevice, _>(device.pages(4096)?)?.unmap()?;
            use_it(&device, Some(carved))
        });
        survives("a pool", &system, &host, || {
            Pool::new("pool", memory, 1 << 20, PhysAddr::new(u64::MAX)).map(drop)?;
            // SAFETY: as above; nobody uses the other pool meanwhile.
            unsafe { Pool::carve_out("again", range, raw.ptr, memory) }.map(drop)
        });
        // What a device cannot reach is copied to where it can: its bus has no memory but the pool's.
        let raw = memory.allocate(PageRequest::anywhere(1 << 20)).unwrap();
        let range = PhysRange::new(raw.phys, raw.bytes).unwrap();
        // SAFETY: just allocated, and never freed.
        let low = Arc::new(unsafe { Pool::carve_out("low", range, raw.ptr, memory) }.unwrap());
        let windows = [BusWindow { memory: range, bus: Iova::new(0) }];
        survives("needed", &system, &host, || {
            let bounce = Bounce::Needed(PoolSource::Shared(low.clone()));
            let (limits, coherent) = (Limits::NONE, system.memory.is_snooped());
            let config = DirectConfig { name: "narrow", windows: &windows, limits, coherent, memory };
            // SAFETY: there is no such device.
            let device = unsafe { Device::direct_with_policy(config, None, Policy { bounce, trusted: false }) }?;
            let far = Pages::zeroed(memory, 4096)?;
            let mapped = device.map::<FromDevice, _>(far)?;
            assert_eq!(device.copies(), 1);
            mapped.unmap()?;
            assert_eq!(low.used(), 0);
            Ok(())
        });
    }
}

/// Memory of every kind.
#[test]
fn every_kind_of_memory_survives_every_failure() {
    let _alone = alone();
    for system in both() {
        let blk = system.device_with("blk", Limits::address_bits(16)).unwrap();
        let device = &blk.device;
        let count = survives("kinds", &system, &blk, || {
            let mut ring = device.coherent_init_slice::<AtomicU64>(600)?;
            *ring[7].get_mut() = 7;
            let ring = ring.publish()?;
            let one = device.coherent_init::<[AtomicU64; 4]>()?.publish_privileged()?;
            let two = device.coherent_privileged::<AtomicU64>()?;
            let combined = device.write_combined(8192)?;
            combined.write(100, b"frame")?;
            let hidden = device.hidden(4096)?;
            let cached = device.non_coherent(4096)?;
            cached.sync_for_device(0, 10)?;
            ring.release()?;
            one.release()?;
            drop(two);
            combined.release()?;
            hidden.release()?;
            cached.unmap()?;
            Ok(())
        });
        assert!(count > 11, "only {count} allocations");
        all_addresses_are_free(&blk);
    }
}

/// Caught: `Bytes::cut` with an `Arc::new`.
#[test]
fn bytes_and_peers_survive_every_failure() {
    let _alone = alone();
    for system in both() {
        let host = system.device("host").unwrap();
        for trusted in [false, true] {
            let bounce = Bounce::Needed(PoolSource::Own(1 << 20));
            survives_with("bytes", &system, &host, is_about_memory_or_reach, || {
                let (coherent, memory) = (system.memory.is_snooped(), system.memory);
                let (group, limits) = (host.group.clone(), Limits::NONE);
                let config = DeviceConfig { name: "bytes", group, limits, coherent, memory };
                // SAFETY: the group's one bus master is the fake's; whom it may trust is the test's business.
                let device = unsafe { Device::with_policy(config, Policy { bounce: bounce.clone(), trusted }) }?;
                let mut parts = Bytes::cut(Pages::zeroed(memory, 8192)?, &[100, 5000, 300])?.into_iter();
                for part in parts.by_ref().take(2) {
                    let mapped = device.map_bytes::<Bidirectional>(part)?;
                    mapped.sync_for_cpu(0, 50)?;
                    mapped.unmap()?;
                }
                drop(parts.map(|part| device.map_bytes::<ToDevice>(part)));
                assert_eq!(device.stats().live_mappings, 0);
                Ok(())
            });
        }
        survives("peer", &system, &host, || {
            let range = PhysRange::new(PhysAddr::new(0x1000_0000), 8192).ok_or(Error::BadSize(0))?;
            // SAFETY: nobody uses the fake bus there.
            let peer = unsafe { PeerRange::new(range) }?;
            host.device.map_peer::<Bidirectional>(peer)?.unmap()?;
            Ok(())
        });
    }
}

/// A foreign driver is told of failures by addresses and null pointers; its report says which error it was. Caught: `Slot::remove`
/// that needs memory to keep what the driver still has.
#[test]
fn foreign_drivers_survive_every_failure() {
    let _alone = alone();
    dma::foreign_driver! { Blk }
    for system in both() {
        let blk = system.device_with("blk", Limits::address_bits(24)).unwrap();
        let count = survives("foreign", &system, &blk, || {
            Blk::slot().install(&blk.device)?;
            let mut buffer = [7; 100];
            let (ring, start) = ForeignHal::<Blk>::dma_alloc(2, BufferDirection::Both);
            let (left, left_start) = ForeignHal::<Blk>::dma_alloc(1, BufferDirection::DriverToDevice);
            let bytes = NonNull::from(&mut buffer[..]);
            // SAFETY: a buffer of ours, which nobody uses before it is unshared.
            let shared = unsafe { ForeignHal::<Blk>::share(bytes, BufferDirection::Both) };
            // SAFETY: as it was shared.
            unsafe { ForeignHal::<Blk>::unshare(shared, bytes, BufferDirection::Both) };
            if ring != 0 {
                // SAFETY: as it was allocated, and not used any more.
                assert_eq!(unsafe { ForeignHal::<Blk>::dma_dealloc(ring, start, 2) }, 0);
            }
            let report = Blk::slot().remove().ok_or(Error::SlotEmpty)?;
            assert_eq!((report.shares, report.misuses, report.quarantined), (0, 0, 0));
            if left != 0 {
                // Given back after its device was removed.
                // SAFETY: as it was allocated, and not used any more.
                assert_eq!(unsafe { ForeignHal::<Blk>::dma_dealloc(left, left_start, 1) }, 0);
            }
            assert_eq!(Blk::slot().report().misuses, 0);
            report.last_failure.map_or(Ok(()), Err)
        });
        assert!(count > 7, "only {count} allocations");
    }
}
