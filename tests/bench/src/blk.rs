//! The disk: a null one, whose data costs nothing, so that what is left is the way to it.

use crate::memory::adjacent;
use crate::run::About::Device;
use crate::run::Benchmark;
use crate::stand::Stand;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::hint::black_box;
use dma::{FromDevice, Mapped, Pages};
use iommu::PAGE_SIZE;
use ktest::{Outcome, TestResult};

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[Benchmark { name: "blk_4k_randread_qd32", about: Device, run: random }];

/// Requests in flight.
const DEPTH: usize = 32;

fn random(stand: &Stand) -> TestResult {
    stand.not_lazy()?;
    let disk = stand.disk()?;
    let device = disk.master().device().clone();
    let mut free = Vec::new();
    for _ in 0..DEPTH {
        free.push(adjacent(&device, PAGE_SIZE)?);
    }
    let blocks = disk.block().geometry().sectors / 8;
    let mut state = 1_u64;
    stand.measure_batches("blk_4k_randread_qd32", 16 * DEPTH as u64, || {
        for _ in 0..16 {
            let mut flying = Vec::with_capacity(DEPTH);
            let mut batch = disk.block().batch();
            while let Some(pages) = free.pop() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let loan: Arc<Mapped<FromDevice, Pages>> = Arc::new(device.map(black_box(pages))?);
                flying.push((batch.read((state >> 33) % blocks * 8, &loan, 0..PAGE_SIZE)?, loan));
            }
            drop(batch);
            for (mut transfer, loan) in flying {
                transfer.wait(base::Deadline::after_millis(10_000))?;
                let mapped = Arc::try_unwrap(loan).map_err(|_| Outcome::failed(format_args!("still lent")))?;
                free.push(black_box(mapped.unmap()?));
            }
        }
        Ok(())
    })?;
    disk.stop()?;
    Ok(())
}
