//! All cores at once.

use super::boot::on_other_cores;
use super::pattern;
use crate::Bench;
use base::IrqMutex;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{Bidirectional, Device, Ladder};
use ktest::{TestResult, expect, expect_eq, ktest};

static DEVICE: IrqMutex<Option<Device>> = IrqMutex::new(None);
static DONE: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Rounds on each core.
const ROUNDS: u32 = 200;

fn map_and_unmap(core: usize) {
    let Some(device) = DEVICE.lock().clone() else { return };
    for round in 0..ROUNDS {
        let len = 4096 << (round % 6);
        let bytes = pattern(core as u32 * 1000 + round, 256);
        let intact = (|| {
            let mut pages = device.page_set(len, Ladder::DEFAULT).ok()?;
            pages.write_at(0, &bytes).ok()?;
            let mapped = device.map::<Bidirectional, _>(pages).ok()?;
            let mut found = [0; 256];
            mapped.view().read(0, &mut found).ok()?;
            let pages = mapped.unmap().ok()?;
            let mut again = [0; 256];
            pages.read_at(0, &mut again).ok()?;
            Some(found[..] == bytes && again[..] == bytes)
        })();
        if intact != Some(true) {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
        DONE.fetch_add(1, Ordering::Relaxed);
    }
}

fn on_all_cores(bench: &Bench) -> TestResult {
    let edu = bench.edu_master(0)?;
    let before = edu.device().stats().live_mappings;
    for counter in [&DONE, &WRONG] {
        counter.store(0, Ordering::Relaxed);
    }
    *DEVICE.lock() = Some(edu.device().clone());
    on_other_cores(bench.cores, map_and_unmap)?;
    map_and_unmap(0);
    *DEVICE.lock() = None;
    expect_eq!(WRONG.load(Ordering::Relaxed), 0);
    expect_eq!(DONE.load(Ordering::Relaxed), u64::from(ROUNDS) * bench.cores as u64);
    expect_eq!(edu.device().stats().live_mappings, before);
    edu.arrest()?;
    Ok(())
}

ktest! {
    fn all_cores_map_and_unmap_for_one_device_at_once(bench) {
        on_all_cores(bench)?;
        expect!(!bench.hardware.smmus()[0].is_dead());
        Ok(())
    }
    machine: smp8
}

ktest! {
    fn all_cores_map_and_unmap_at_once_by_requests_to_a_virtio_iommu(bench) {
        on_all_cores(bench)?;
        expect!(!bench.hardware.viommus()[0].driver().is_dead());
        Ok(())
    }
    machine: viommu
}
