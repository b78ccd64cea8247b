//! Every way through the DMA-API with the n-th allocation failing, for every n until none fails: an error each time, nothing
//! leaked, nothing left mapped. Heap, DMA memory, tables and address spaces count as one, in the order in which they are asked
//! for. An allocation that could not fail would end this process.
//!
//! Caught: `Device::new`, `OwnedDomain::new` and `SharedBuffer::try_new` with an `Arc::new`; `scoped::run` with one;
//! `PageSet::of` with `vec!`; `Translated::map` that keeps its addresses when the tables do not fit.

use core::sync::atomic::AtomicU64;
use dma::fakes::{FakeDevice, FakeSystem, Hardware};
use dma::{
    Bidirectional, Device, DeviceConfig, DirectConfig, Error, FromDevice, Gather, Ladder, Limits, Mapped, OwnedDomain,
    PageSet, Pages, SharedBuffer, ToDevice, tracker,
};
use iommu::{AttachError, Iova, IovaError};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;

thread_local! {
    /// Allocations until one fails, on this thread; `u64::MAX` for never.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    /// Bytes of the heap that this thread has and did not give back.
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

/// Whether the allocation that is being asked for fails.
fn fails() -> bool {
    match LEFT.get() {
        u64::MAX => false,
        0 => {
            LEFT.set(u64::MAX);
            true
        }
        left => {
            LEFT.set(left - 1);
            false
        }
    }
}

fn charge(bytes: usize, sign: i64) {
    if !Hardware::is_entered() {
        BYTES.set(BYTES.get() + sign * bytes as i64);
    }
}

struct Failing;

// SAFETY: everything is the system's allocator's, but for parked blocks, which came from here with their layout.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let parked = base::fallible::take(layout);
        if !parked.is_null() {
            return parked;
        }
        if !Hardware::is_entered() && fails() {
            return null_mut();
        }
        charge(layout.size(), 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        charge(layout.size(), -1);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
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
fn survives(
    what: &str,
    system: &FakeSystem,
    device: &FakeDevice,
    mut operation: impl FnMut() -> Result<(), Error>,
) -> u64 {
    Hardware::fail_when(fails);
    // Once without: caches of the address allocator and the like, which are kept.
    operation().unwrap();
    let frames = system.memory.live_allocations();
    for n in 0.. {
        let heap = BYTES.get();
        LEFT.set(n);
        let result = operation();
        let failed = LEFT.replace(u64::MAX) == u64::MAX;
        assert_eq!(system.memory.live_allocations(), frames, "{what}: failure {n} leaks memory");
        assert_eq!(device.device.stats().live_mappings, 0, "{what}: failure {n} leaves a mapping");
        assert_eq!(system.memory.violations(), Vec::<String>::new(), "{what}: failure {n}");
        match result {
            Ok(()) => {
                // What an error frees may have been allocated by the failing round itself; a round that succeeds is even.
                assert_eq!(BYTES.get(), heap, "{what}: the heap has grown");
                if !failed {
                    return n;
                }
            }
            Err(error) => {
                assert!(failed, "{what}: {error} although nothing failed");
                assert!(is_about_memory(&error), "{what}: failure {n}: {error}");
                assert_eq!(BYTES.get(), heap, "{what}: failure {n} leaks heap");
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

/// Devices come and go. With the tracker too: a record that cannot be made is no failure of the mapping.
#[test]
fn devices_survive_every_failure() {
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
