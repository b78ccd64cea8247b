//! The disk: a null one, whose data costs nothing, so that what is left is the way to it.

use crate::memory::adjacent;
use crate::run::About::Device;
use crate::run::Benchmark;
use crate::stand::Stand;
use alloc::vec::Vec;
use base::Deadline;
use core::hint::black_box;
use dma::{FromDevice, Gather, Mapped, Pages};
use iommu::PAGE_SIZE;
use ktest::TestResult;

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[Benchmark { name: "blk_4k_randread_qd32", about: Device, run: random }];

/// Requests in flight.
const DEPTH: usize = 32;

fn random(stand: &Stand) -> TestResult {
    stand.not_lazy()?;
    let disk = stand.disk()?;
    let device = disk.master().device().clone();
    let blocks = disk.block().geometry().sectors / 8;
    let mut lane = disk.block().lane::<Mapped<FromDevice, Pages>>()?;
    let mut free = Vec::with_capacity(DEPTH);
    for _ in 0..DEPTH {
        free.push(adjacent(&device, PAGE_SIZE)?);
    }
    let mut over: Gather<Mapped<FromDevice, Pages>, DEPTH> = Gather::new();
    let mut state = 1_u64;
    let operations = 64 * DEPTH;
    let mut first_error = None;
    stand.measure_batches("blk_4k_randread_qd32", operations as u64, || {
        let mut done = 0;
        while done < operations {
            while let Some(pages) = free.pop() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let mapped = device.map::<FromDevice, _>(black_box(pages))?;
                lane.read((state >> 33) % blocks * 8, mapped, 0..PAGE_SIZE)?;
            }
            lane.kick();
            lane.wait(DEPTH / 2, Deadline::after_millis(10_000))?;
            done += lane.take(|mapped, result| {
                if let Err(error) = result {
                    first_error = Some(error);
                }
                // There are no more than it has room for.
                drop(over.push(mapped));
            })?;
            for pages in over.drain() {
                free.push(black_box(pages?));
            }
        }
        first_error.take().map_or(Ok(()), |error| Err(error.into()))
    })?;
    // What is in flight after the last batch comes back, too.
    lane.wait(DEPTH, Deadline::after_millis(10_000))?;
    lane.take(|mapped, _| drop(mapped))?;
    drop(lane);
    disk.stop()?;
    Ok(())
}
