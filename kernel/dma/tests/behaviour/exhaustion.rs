//! Whatever runs out, at whatever moment: an error, nothing lost, nothing left behind.

use core::sync::atomic::AtomicU64;
use dma::fakes::{FakeDevice, FakeSystem};
use dma::{Bidirectional, Error, FromDevice, Ladder, PageSet, SharedBuffer, ToDevice};

/// Runs `operation` with the n-th allocation failing, and with the n-th mapping failing, for every n, until it succeeds.
/// After each failure nothing may be left.
fn survives(system: &FakeSystem, device: &FakeDevice, mut operation: impl FnMut() -> Result<(), Error>) {
    let before = system.memory.live_allocations();
    let mut check = |fail: &dyn Fn(u64)| {
        for n in 0.. {
            fail(n);
            let result = operation();
            system.memory.heal();
            system.iommu.fail_map_after(u64::MAX);
            assert_eq!(system.memory.live_allocations(), before, "failure {n}");
            assert_eq!(device.device.stats().live_mappings, 0, "failure {n}");
            assert_eq!(system.memory.violations(), Vec::<String>::new(), "failure {n}");
            match result {
                Ok(()) => {
                    assert!(n > 0, "nothing failed");
                    break;
                }
                Err(Error::OutOfMemory | Error::Attributes(_)) => {}
                Err(other) => panic!("failure {n}: {other}"),
            }
        }
    };
    check(&|n| system.memory.fail_after(n));
    check(&|n| system.iommu.fail_map_after(n));
}

/// Caught: `PageSet::zeroed` that forgets the chunks it has when one fails.
#[test]
fn scattered_memory() {
    let system = FakeSystem::new();
    for n in 0..20 {
        system.memory.fail_after(n);
        let result = PageSet::zeroed(system.memory, 20 * 4096, Ladder::SINGLE_PAGES);
        assert_eq!(result.unwrap_err(), Error::OutOfMemory);
        system.memory.heal();
        assert_eq!(system.memory.live_allocations(), 0);
    }
}

/// Caught: `Translated::map` that keeps the address range when the space refuses.
#[test]
fn streaming_mappings() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = system.device("blk").unwrap();
        survives(&system, &blk, || {
            let set = PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES)?;
            let mapped = blk.device.map::<ToDevice, _>(set)?;
            let set = mapped.unmap()?;
            blk.device.map::<FromDevice, _>(set)?.unmap()?;
            Ok(())
        });
        // The one failure after which an address could be lost: afterwards all of the window is still there.
        let small = system.device_with("small", dma::Limits::address_bits(14)).unwrap();
        for _ in 0..10 {
            system.iommu.fail_map_after(0);
            let pages = small.device.pages(4096).unwrap();
            assert_eq!(small.device.map::<ToDevice, _>(pages).unwrap_err().error, Error::OutOfMemory);
        }
        let all: Vec<_> =
            (0..3).map(|_| small.device.map::<ToDevice, _>(small.device.pages(4096).unwrap()).unwrap()).collect();
        assert_eq!(all.len(), 3);
    }
}

/// Caught: `AttributedPages` that frees memory as another kind than it allocated.
#[test]
fn coherent_memory() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let net = system.device("net").unwrap();
        system.memory.fail_after(0);
        assert_eq!(net.device.coherent::<AtomicU64>().unwrap_err(), Error::OutOfMemory);
        system.memory.heal();
        assert_eq!((system.memory.live_allocations(), net.device.stats().live_mappings), (0, 0));
        system.iommu.fail_map_after(0);
        assert_eq!(net.device.coherent::<AtomicU64>().unwrap_err(), Error::OutOfMemory);
        assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
        drop(net.device.coherent::<AtomicU64>().unwrap());
        assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
    }
}

/// Caught: `attach` that leaves the device among the users when the mapping fails.
#[test]
fn shared_buffers() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let picture = SharedBuffer::new("picture", PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap());
    for n in 0..2 {
        system.iommu.fail_map_after(n);
        let attach = || Ok((picture.attach::<FromDevice>(&blk.device)?, picture.attach::<ToDevice>(&gpu.device)?));
        let result: Result<_, Error> = attach();
        assert_eq!(result.unwrap_err(), Error::OutOfMemory);
        assert_eq!(picture.users(), dma::Users::default());
    }
    picture.into_pages().unwrap();
}

#[test]
fn borrowed_memory() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut bytes = [3; 100];
    survives(&system, &blk, || blk.device.with_mapped::<Bidirectional, _>(&mut bytes, |_| ()));
    assert_eq!(bytes, [3; 100]);
}
