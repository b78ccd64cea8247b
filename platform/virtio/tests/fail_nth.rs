//! The drivers with the n-th allocation failing, for every n until none fails: bring-up, requests, removal. An error each time,
//! nothing leaked, nothing left mapped, and the device can be started again. Heap, DMA memory and tables count as one; an
//! allocation that could not fail would end this process.
//!
//! Caught: `Core::add_queue`, `Core::start`, `Gpu::new` and `Backing::list` with an `Arc::new`.

use base::failing::{self, Failing};
use base::{Deadline, block_on, fallible};
use dma::fakes::{FakeSystem, Hardware};
use dma::{Bidirectional, Ladder, Mapped, PageSet};
use std::sync::Arc;
use virtio::Error;
use virtio::blk::{Block, Options as BlockOptions};
use virtio::device::Vectors;
use virtio::fakes::{FakeDevice, MemoryDisk, MemoryDisplay};
use virtio::gpu::{Backing, Gpu, Options as GpuOptions};
use virtio::spec::gpu::Format;

#[global_allocator]
static FAILING: Failing = Failing;

type Loan = Mapped<Bidirectional, PageSet>;

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

fn vectors() -> Vectors {
    Vectors { config: Some(0), queue: Some(1) }
}

fn lend(device: &dma::Device, bytes: u64) -> Result<Arc<Loan>, Error> {
    let pages = device.page_set(bytes, Ladder::SINGLE_PAGES).map_err(Error::from)?;
    let mapped = device.map::<Bidirectional, _>(pages).map_err(|rejected| Error::from(rejected.error))?;
    fallible::arc(mapped).map_err(|_| Error::OutOfMemory)
}

fn done<T>(result: Result<T, base::TimedOut>) -> Result<T, Error> {
    result.map_err(|_| Error::TimedOut)
}

/// Runs `operation` until nothing fails any more; says how many allocations there were.
fn survives(
    system: &FakeSystem,
    host: &dma::fakes::FakeDevice,
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
        assert_eq!(system.memory.live_allocations(), frames, "failure {n} leaks memory: {result:?}");
        assert_eq!(host.device.stats().live_mappings, 0, "failure {n} leaves a mapping: {result:?}");
        assert_eq!(system.memory.violations(), Vec::<String>::new(), "failure {n}");
        match result {
            Ok(()) => {
                assert_eq!(failing::heap(), heap, "the heap has grown");
                if !failed {
                    return n;
                }
            }
            Err(error) => {
                assert!(failed, "{error} although nothing failed");
                let text = error.to_string();
                assert!(text.contains("memory"), "failure {n}: {text}");
                drop((error, text));
                assert_eq!(failing::heap(), heap, "failure {n} leaks heap");
            }
        }
    }
    unreachable!()
}

#[test]
fn a_disk_from_its_start_to_its_end() {
    let system = FakeSystem::new();
    let host = system.device("disk").unwrap();
    let disk = MemoryDisk::new(64);
    let device = FakeDevice::new(disk.registers(), disk.clone(), Arc::new(host.master.clone()));
    let count = survives(&system, &host, || {
        let options = BlockOptions { depth: 16, vectors: vectors(), ..BlockOptions::default() };
        let block = Block::new(device.clone(), host.device.clone(), &options, soon())?;
        let result = (|| {
            {
                let (config, queue) = (block.config_handler()?, block.queue_handler());
                // The interrupt controller's own allocations are its own.
                let _hardware = Hardware::enter();
                device.connect(0, config);
                device.connect(1, queue);
            }
            let loan = lend(&host.device, 8192)?;
            done(block_on(soon(), block.write(0, &loan, 0..8192)?))??;
            done(block_on(soon(), block.flush()?))??;
            done(block_on(soon(), block.read(8, &loan, 512..4096)?))??;
            done(block_on(soon(), block.id()?))??;
            let (one, two) = {
                let mut batch = block.batch();
                (batch.read(0, &loan, 0..512)?, batch.read(1, &loan, 512..1024)?)
            };
            done(block_on(soon(), one))??;
            done(block_on(soon(), two))??;
            Ok(())
        })();
        device.disconnect();
        block.shut_down(soon())?;
        result
    });
    assert!(count > 20, "only {count} allocations");
}

#[test]
fn a_screen_from_its_start_to_its_end() {
    let system = FakeSystem::new();
    let host = system.device("gpu").unwrap();
    let display = MemoryDisplay::new(640, 480);
    let device = FakeDevice::new(display.registers(), display.clone(), Arc::new(host.master.clone()));
    let count = survives(&system, &host, || {
        let gpu = Gpu::new(device.clone(), host.device.clone(), &GpuOptions { vectors: vectors() }, soon())?;
        let result = (|| {
            {
                let (config, queue) = (gpu.config_handler()?, gpu.queue_handler());
                let _hardware = Hardware::enter();
                device.connect(0, config);
                device.connect(1, queue);
            }
            let loan = lend(&host.device, 64 * 64 * 4)?;
            let mut backing = Backing::new();
            for row in 0..64 {
                backing.push(&loan, row * 256..(row + 1) * 256)?;
            }
            done(block_on(soon(), async {
                gpu.display_info().await?;
                let resource = gpu.create_resource(64, 64, Format::B8G8R8X8, backing).await?;
                gpu.set_scanout(0, &resource, resource.rect()).await?;
                resource.present(resource.rect()).await?;
                resource.destroy().await
            }))?
        })();
        device.disconnect();
        gpu.shut_down(soon())?;
        result
    });
    assert!(count > 20, "only {count} allocations");
}
