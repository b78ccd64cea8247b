//! What only time tells: several cores at once, and how long it takes from nothing to a first read.

use crate::maps::{ALL_MODES, IN_TURN, lapsing, map_in_turn};
use crate::measure::Each;
use crate::memory::adjacent;
use crate::run::About::Time;
use crate::run::{AT_ONCE, Benchmark, FIRST_READ};
use crate::stand::{Mode, Stand};
use base::{Deadline, IrqMutex, wait_until};
use core::hint::black_box;
use core::sync::atomic::{AtomicBool, Ordering};
use dma::{Bidirectional, Device};
use iommu::PAGE_SIZE;
use kernel::println;
use ktest::{Outcome, TestResult};
use virt::cores;

/// The benchmarks of this module.
pub const ALL: &[Benchmark] = &[
    Benchmark { name: "map4k_two_cores", about: Time, modes: ALL_MODES, run: two_cores },
    Benchmark { name: FIRST_READ, about: Time, modes: AT_ONCE, run: first_read },
];

/// The device of both cores, and how they end their mappings.
static DEVICE: IrqMutex<Option<(Device, Mode)>> = IrqMutex::new(None);
static FAILED: AtomicBool = AtomicBool::new(false);

/// Operations of each core in a batch. (Few of them are its buffers' first.)
const OPERATIONS: u32 = 16384;

fn map_and_unmap() -> TestResult {
    let Some((device, mode)) = DEVICE.lock().clone() else { return Ok(()) };
    if mode == Mode::Lazy {
        let mut lapsing = lapsing(&device, IN_TURN, PAGE_SIZE)?;
        for _ in 0..OPERATIONS {
            map_in_turn(&device, &mut lapsing)?;
        }
        return Ok(());
    }
    let mut buffer = adjacent(&device, PAGE_SIZE)?;
    for _ in 0..OPERATIONS {
        let mapped = device.map::<Bidirectional, _>(black_box(buffer))?;
        buffer = black_box(mapped.unmap()?);
    }
    Ok(())
}

/// One page each, mapped and unmapped by two cores for one device; and what the first core does alone, in the same machine and by the
/// same loop, because it is the ratio that counts.
fn two_cores(stand: &Stand) -> TestResult {
    if stand.cores < 2 {
        ktest::skip!("one core");
    }
    *DEVICE.lock() = Some((stand.device().clone(), stand.mode));
    let alone = stand.measure_batches("map4k_one_core", u64::from(OPERATIONS), map_and_unmap);
    let result = alone.and_then(|()| {
        let (before, syncs) = queue_accesses(stand);
        let result = both_cores(stand);
        let (after, all_syncs) = queue_accesses(stand);
        // What two cores have of each other, whatever the host's load does to the time.
        let each = Each { total: after - before, count: all_syncs - syncs };
        println!("map4k_two_cores: {each} accesses to the command queue's registers for each revocation");
        result
    });
    *DEVICE.lock() = None;
    result
}

/// Accesses to the registers of all command queues, and what was completed by them.
fn queue_accesses(stand: &Stand) -> (u64, u64) {
    let counted = stand.hardware.smmus().iter().map(|smmu| smmu.statistics());
    counted.fold((0, 0), |(accesses, syncs), smmu| (accesses + smmu.queue_accesses, syncs + smmu.syncs))
}

fn both_cores(stand: &Stand) -> TestResult {
    stand.measure_batches("map4k_two_cores", 2 * u64::from(OPERATIONS), || {
        cores::run_on(1, |_| FAILED.store(map_and_unmap().is_err(), Ordering::Release))?;
        map_and_unmap()?;
        wait_until(Deadline::after_millis(10_000), || cores::is_idle(1))?;
        if FAILED.load(Ordering::Acquire) {
            return Err(Outcome::failed(format_args!("the other core could not map")));
        }
        Ok(())
    })
}

/// One block of the disk. The time is for whoever started the machine to take, when this is said.
fn first_read(stand: &Stand) -> TestResult {
    let disk = stand.disk()?;
    let device = disk.master().device();
    let mut lane = disk.block().lane()?;
    lane.read(0, device.map::<dma::FromDevice, _>(adjacent(device, PAGE_SIZE)?)?, 0..PAGE_SIZE)?;
    lane.kick();
    lane.wait(1, Deadline::after_millis(10_000))?;
    let mut result = Ok(());
    lane.take(|mapped, outcome| result = outcome.and(mapped.unmap().map(drop).map_err(|_| virtio::Error::ShutDown)))?;
    result?;
    println!("##bench result {FIRST_READ} ns 0 0 0 0");
    Ok(())
}
