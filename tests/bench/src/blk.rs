//! The disk: a null one, whose data costs nothing, so that what is left is the way to it. 32 reads are in flight; what has been
//! returned is taken back together, and no page is anybody's before the revocation of all of them is complete.

use crate::memory::adjacent;
use crate::run::About::Device;
use crate::run::Benchmark;
use crate::stand::Stand;
use alloc::vec::Vec;
use base::Deadline;
use core::hint::black_box;
use dma::{Buffer, FromDevice, Gather, Mapped};
use iommu::PAGE_SIZE;
use ktest::{Outcome, TestResult};

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[
    Benchmark {
        name: "blk_4k_randread_qd32",
        about: Device,
        run: |stand| reads(stand, "blk_4k_randread_qd32", 64, |device| adjacent(device, PAGE_SIZE)),
    },
    Benchmark {
        name: "blk_1m_contiguous",
        about: Device,
        run: |stand| reads(stand, "blk_1m_contiguous", 4, |device| adjacent(device, 1 << 20)),
    },
];

/// Requests in flight.
const DEPTH: usize = 32;

/// Bytes of a virtio sector.
const SECTOR: u64 = 512;

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

/// Reads whole buffers of `make` from places all over the disk, `rounds` times the depth in a batch.
fn reads<B: Buffer>(
    stand: &Stand,
    name: &str,
    rounds: usize,
    make: impl Fn(&dma::Device) -> Result<B, Outcome>,
) -> TestResult {
    stand.not_lazy()?;
    let disk = stand.disk()?;
    let device = disk.master().device();
    let mut lane = disk.block().lane::<Mapped<FromDevice, B>>()?;
    let mut free = Vec::with_capacity(DEPTH);
    for _ in 0..DEPTH {
        free.push(make(device)?);
    }
    let bytes = free.first().map_or(PAGE_SIZE, Buffer::len);
    let places = disk.block().geometry().sectors * SECTOR / bytes;
    let mut over: Gather<Mapped<FromDevice, B>, DEPTH> = Gather::new();
    let (mut random, mut first_error) = (1_u64, None);
    let operations = rounds * DEPTH;
    stand.measure_batches(name, operations as u64, || {
        let mut done = 0;
        while done < operations {
            while let Some(buffer) = free.pop() {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mapped = device.map::<FromDevice, _>(black_box(buffer))?;
                lane.read((random >> 33) % places * (bytes / SECTOR), mapped, 0..bytes)?;
            }
            lane.kick();
            lane.wait(DEPTH / 2, soon())?;
            done += lane.take(|mapped, result| {
                if let Err(error) = result {
                    first_error = Some(error);
                }
                // There are no more than it has room for.
                drop(over.push(mapped));
            })?;
            for buffer in over.drain() {
                free.push(black_box(buffer?));
            }
        }
        first_error.take().map_or(Ok(()), |error| Err(error.into()))
    })?;
    // What is in flight after the last batch comes back, too.
    lane.wait(DEPTH, soon())?;
    lane.take(|mapped, _| drop(mapped))?;
    drop(lane);
    disk.stop()?;
    Ok(())
}
