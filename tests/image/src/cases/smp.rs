//! All cores at once.

use super::boot::on_other_cores;
use super::pattern;
use crate::Bench;
use crate::bench::soon;
use alloc::collections::VecDeque;
use base::IrqMutex;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{Bidirectional, Device, Ladder, Lapsing, Pages, Pending};
use ktest::{TestResult, expect, expect_eq, ktest};

static DEVICE: IrqMutex<Option<Device>> = IrqMutex::new(None);
static DONE: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Rounds on each core.
const ROUNDS: u32 = 200;
/// The same where mappings lapse: cores meet in a few instructions.
const MANY_ROUNDS: u32 = 3000;

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

/// What has lapsed on whatever core, and of what the pages are full.
static LAPSED: IrqMutex<VecDeque<(Lapsing<Bidirectional, Pages>, u32)>> = IrqMutex::new(VecDeque::new());
/// So many of them wait to be taken: few enough that most are flushed by who takes them, on another core.
const WAITING: usize = 24;

/// The pages of whichever has waited longest, if enough do: taken, with a flush if that must be, and as they were.
fn taken(drops: bool) -> Option<Result<Pages, ()>> {
    let (lapsed, seed) = {
        let mut all = LAPSED.lock();
        if all.len() < WAITING {
            return None;
        }
        all.pop_front()?
    };
    if drops {
        // To the flush that it waits for.
        drop(lapsed);
        return None;
    }
    let pages = match lapsed.try_take() {
        Err(Pending::Still(lapsed)) => lapsed.take(soon()),
        result => result,
    };
    Some(pages.map_err(|_| ()).and_then(|pages| match pages.as_slice()[..256] == pattern(seed, 256) {
        true => Ok(pages),
        false => Err(()),
    }))
}

fn map_and_let_lapse(core: usize) {
    let Some(device) = DEVICE.lock().clone() else { return };
    for round in 0..MANY_ROUNDS {
        let seed = core as u32 * MANY_ROUNDS + round;
        let intact = (|| {
            let mut pages = match taken(round % 8 == 0) {
                Some(taken) => taken.ok()?,
                None => device.pages(4096).ok()?,
            };
            pages.as_mut_slice()[..256].copy_from_slice(&pattern(seed, 256));
            let mapped = device.map::<Bidirectional, _>(pages).ok()?;
            let mut found = [0; 256];
            mapped.view().read(0, &mut found).ok()?;
            let lapsed = mapped.unmap_lazy();
            LAPSED.lock().push_back((lapsed, seed));
            Some(found[..] == pattern(seed, 256))
        })();
        if intact != Some(true) {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
        DONE.fetch_add(1, Ordering::Relaxed);
    }
}

fn on_all_cores(bench: &Bench, rounds: u32, work: fn(usize)) -> TestResult {
    let edu = bench.edu_master(0)?;
    let before = edu.device().stats();
    for counter in [&DONE, &WRONG] {
        counter.store(0, Ordering::Relaxed);
    }
    *DEVICE.lock() = Some(edu.device().clone());
    LAPSED.lock().try_reserve(WAITING + bench.cores)?;
    on_other_cores(bench.cores, work)?;
    work(0);
    *DEVICE.lock() = None;
    let lapsed = core::mem::take(&mut *LAPSED.lock());
    drop(lapsed);
    edu.device().flush(soon()).map_err(|_| board::Error::Missing("flush in time"))?;
    expect_eq!(WRONG.load(Ordering::Relaxed), 0);
    expect_eq!(DONE.load(Ordering::Relaxed), u64::from(rounds) * bench.cores as u64);
    let after = edu.device().stats();
    expect_eq!(after.live_mappings, before.live_mappings);
    expect_eq!(after.quarantined_pages, before.quarantined_pages);
    edu.arrest()?;
    Ok(())
}

ktest! {
    fn all_cores_map_and_unmap_for_one_device_at_once(bench) {
        on_all_cores(bench, ROUNDS, map_and_unmap)?;
        expect!(!bench.hardware.smmus()[0].is_dead());
        Ok(())
    }
    machine: smp8
}

// Caught: a store in place of the exchange by which a mapping lapses, while another core takes what has lapsed there.
ktest! {
    fn all_cores_let_mappings_of_one_device_lapse_and_take_each_others_pages(bench) {
        on_all_cores(bench, MANY_ROUNDS, map_and_let_lapse)?;
        expect!(!bench.hardware.smmus()[0].is_dead());
        Ok(())
    }
    machine: smp8
}

ktest! {
    fn all_cores_map_and_unmap_at_once_by_requests_to_a_virtio_iommu(bench) {
        on_all_cores(bench, ROUNDS, map_and_unmap)?;
        expect!(!bench.hardware.viommus()[0].driver().is_dead());
        Ok(())
    }
    machine: viommu
}
