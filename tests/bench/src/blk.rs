//! The disk: a null one, whose data costs nothing, so that what is left is the way to it. 32 reads are in flight; what has been
//! returned is taken back together, and no page is anybody's before the revocation of all of them is complete.

use crate::memory::{adjacent, scattered};
use crate::run::About::Device;
use crate::run::{AT_ONCE, Benchmark};
use crate::stand::{Mode, Stand};
use alloc::vec::Vec;
use base::Deadline;
use core::hint::black_box;
use dma::{Endable, FromDevice, Gather, Lent};
use iommu::PAGE_SIZE;
use ktest::{Outcome, TestResult};

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[
    Benchmark {
        name: "blk_4k_randread_qd32",
        about: Device,
        modes: AT_ONCE,
        run: |stand| {
            let make = |device: &dma::Device| adjacent(device, PAGE_SIZE);
            reads(stand, "blk_4k_randread_qd32", PAGE_SIZE, 64, make, |device, pages| {
                Ok(device.map::<FromDevice, _>(pages)?)
            })
        },
    },
    Benchmark {
        name: "blk_1m_contiguous",
        about: Device,
        modes: AT_ONCE,
        run: |stand| {
            let make = |device: &dma::Device| adjacent(device, MIB);
            reads(stand, "blk_1m_contiguous", MIB, 4, make, |device, pages| Ok(device.map::<FromDevice, _>(pages)?))
        },
    },
    Benchmark {
        name: "blk_1m_scattered",
        about: Device,
        modes: AT_ONCE,
        run: |stand| {
            // Where nothing translates, each page is a segment of its own.
            let pages = MIB / PAGE_SIZE;
            if stand.mode == Mode::Direct && pages > SEGMENTS {
                ktest::skip!("a request of {pages} segments is more than a disk takes");
            }
            let make = |device: &dma::Device| scattered(device, MIB / PAGE_SIZE);
            reads(stand, "blk_1m_scattered", MIB, 4, make, |device, list| Ok(device.map_list::<FromDevice, _>(list)?))
        },
    },
];

const MIB: u64 = 1 << 20;

/// Requests in flight.
const DEPTH: usize = 32;

/// The most segments of a request: two descriptors of 256 are for header and status.
const SEGMENTS: u64 = 254;

/// Bytes of a virtio sector.
const SECTOR: u64 = 512;

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

/// Reads `bytes` at a time into what `make` makes and `map` lends, from places all over the disk, `rounds` times the depth in a
/// batch.
fn reads<B, L: Lent + Endable<Back = B>>(
    stand: &Stand,
    name: &str,
    bytes: u64,
    rounds: usize,
    make: impl Fn(&dma::Device) -> Result<B, Outcome>,
    map: impl Fn(&dma::Device, B) -> Result<L, Outcome>,
) -> TestResult {
    let disk = stand.disk()?;
    let device = disk.master().device();
    let mut lane = disk.block().lane::<L>()?;
    let mut free = Vec::with_capacity(DEPTH);
    for _ in 0..DEPTH {
        free.push(make(device)?);
    }
    let places = disk.block().geometry().sectors * SECTOR / bytes;
    let mut over: Gather<L, DEPTH> = Gather::new();
    let (mut random, mut first_error) = (1_u64, None);
    let operations = rounds * DEPTH;
    stand.measure_batches(name, operations as u64, || {
        let mut done = 0;
        while done < operations {
            while let Some(buffer) = free.pop() {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mapped = map(device, black_box(buffer))?;
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
