//! Devices in the hands of processes: drivers at EL0, what they reach, and what is left when they are killed.

use crate::bench::{Bench, soon};
use alloc::boxed::Box;
use alloc::sync::Arc;
use base::{Deadline, block_on, wait_until};
use board::{Assignment, End, UserProcess};
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{FromDevice, Ladder, Limits};
use iommu::StreamId;
use iommu::group::AttachmentState;
use ktest::{Outcome, expect, expect_eq, ktest};
use pci::Function;
use process::{Event, Quota};
use programs::{BLK, EDU};
use virt::cores;
use virtio::transport::{PciTransport, Transport};

/// What the driver of edu can be told to do.
mod edu {
    pub const THERE_AND_BACK: u64 = 0;
    pub const IN_THE_MIDDLE: u64 = 1;
    pub const SHARED: u64 = 2;
    pub const SHARED_UNMAPPED: u64 = 3;
    pub const REFUSALS: u64 = 4;
    pub const REACH: u64 = 5;
    pub const MASKED: u64 = 6;
    pub const TALK: u64 = 7;
    pub const IN_THE_MIDDLE_SHARED: u64 = 8;
    pub const BOTH: u64 = 9;
    /// What it ends with where all was well, and it interrupted by wire.
    pub const BY_WIRE: u64 = 100;
}

fn edu_function(bench: &Bench) -> Result<(usize, Arc<Function>), Outcome> {
    Ok(bench.function(testdev::edu::ID.0, testdev::edu::ID.1, 0)?)
}

/// A process that has edu.
fn with_edu(bench: &Bench, arguments: [u64; 3]) -> Result<UserProcess, Outcome> {
    let (host, function) = edu_function(bench)?;
    let mut process = UserProcess::new("edu driver", EDU, arguments, Quota::default())?;
    let device = Assignment::new(&bench.hardware, host, &function, Limits::NONE)?;
    process.process().assign(Box::new(device))?;
    Ok(process)
}

/// The stream of a function's transactions.
fn stream(bench: &Bench, host: usize, function: &Function) -> Result<StreamId, Outcome> {
    let host = bench.boot.machine.pcie.get(host).ok_or(board::Error::Missing("PCIe host"))?;
    let (_, stream) = host.stream_of(function.requester_id().get()).ok_or(board::Error::Missing("stream"))?;
    Ok(stream)
}

/// The device is off the bus, blocked, and nobody's: as it was left, for attaching it would change that.
fn is_quiet(bench: &Bench, function: &Arc<Function>, host: usize) -> Result<(), Outcome> {
    expect!(!function.is_bus_master(), "it masters the bus");
    let group = bench.hardware.group_of(host, function).ok_or(board::Error::Missing("group"))?;
    expect_eq!(group.current(), AttachmentState::Blocked);
    expect_eq!(group.users(), 0);
    Ok(())
}

/// Frames that are free after `job`, which is run until what is kept for good is there.
fn leaks_nothing(mut job: impl FnMut() -> Result<(), Outcome>) -> Result<(), Outcome> {
    for _ in 0..4 {
        job()?;
    }
    let before = kernel::mm::stats().free;
    job()?;
    expect_eq!(kernel::mm::stats().free, before, "frames free");
    expect_eq!(dma::quarantine::report().pages, 0);
    Ok(())
}

ktest! {
    /// Registers, interrupts as events, and addresses of its own choice; what it has taken back the device does not reach.
    fn a_driver_of_edu_at_el0_moves_bytes(bench) {
        let (host, function) = edu_function(bench)?;
        leaks_nothing(|| {
            let end = with_edu(bench, [edu::THERE_AND_BACK, 2048, 11])?.run(soon());
            expect_eq!(end, End::Exited(0));
            is_quiet(bench, &function, host)
        })
    }
}

ktest! {
    fn what_a_driver_may_not_do_has_a_code_each(bench) {
        let doorbell = board::gic().and_then(|gic| gic.doorbell(gic::Source::Its { device: 0 }).ok()).map_or(0, |doorbell| doorbell.get());
        let end = with_edu(bench, [edu::REFUSALS, 0, doorbell])?.run(soon());
        expect_eq!(end, End::Exited(0));
        Ok(())
    }
}

ktest! {
    /// The kernel's memory, another process's, an address that means something elsewhere: each is a fault of the device's stream,
    /// and memory stays as it is.
    fn a_device_in_the_hands_of_a_process_reaches_nothing_that_was_not_lent(bench) {
        let frame = kernel::mm::alloc_zeroed(1, kernel::mm::Zone::Any)?;
        let linear = kernel::mm::phys_to_virt(frame.start()).get();
        for address in [frame.start().get(), linear & 0xffff_ffff_ffff, 0x1000, 0x200_0000_0000] {
            let process = with_edu(bench, [edu::REACH, 64, address])?;
            let since = bench.watch();
            expect_eq!(process.run(soon()), End::Exited(0));
            let (host, function) = edu_function(bench)?;
            let stream = stream(bench, host, &function)?;
            expect!(bench.fault(&[stream], since).is_some(), "{address:#x}: no fault");
        }
        // SAFETY: reads a frame of ours.
        expect_eq!(unsafe { arch::probe::read64(linear) }, Ok(0));
        // SAFETY: nothing uses the frame.
        unsafe { kernel::mm::free(frame) }?;
        Ok(())
    }
}

ktest! {
    /// A driver that talks without end is told so; what it said last is reported.
    fn a_process_does_not_flood_the_log(_bench) {
        let mut process = UserProcess::new("edu driver", EDU, [edu::TALK, 0, 1000], Quota { lines: 4, ..Quota::default() })?;
        let (refused, last) = process.process().unsaid();
        expect_eq!((refused, last), (0, None));
        expect_eq!(process.run(soon()), End::Exited(abi::PANICKED));
        Ok(())
    }
}

static VICTIM: base::IrqMutex<Option<UserProcess>> = base::IrqMutex::new(None);
static ENDED: AtomicU64 = AtomicU64::new(0);

fn host(_core: usize) {
    let victim = VICTIM.lock().take();
    if let Some(victim) = victim {
        let end = victim.run(soon());
        ENDED.store(1 + u64::from(end != End::Killed), Ordering::SeqCst);
        base::notify();
    }
}

/// Runs `victim` on another core, waits until `begun`, and kills it.
fn kill(victim: UserProcess, mut begun: impl FnMut() -> bool) -> Result<(), Outcome> {
    ENDED.store(0, Ordering::SeqCst);
    let killer = victim.killer();
    *VICTIM.lock() = Some(victim);
    cores::run_on(1, host)?;
    let patience = soon();
    while !begun() {
        expect!(!patience.has_passed() && ENDED.load(Ordering::SeqCst) == 0, "it did not come so far");
        let _ = wait_until(Deadline::after_millis(1), || false);
    }
    killer.kill();
    wait_until(soon(), || ENDED.load(Ordering::SeqCst) != 0)?;
    expect_eq!(ENDED.load(Ordering::SeqCst), 1, "it was not killed");
    wait_until(soon(), || cores::is_idle(1))?;
    Ok(())
}

ktest! {
    /// Red when the handler does not shut the gate.
    fn an_interrupt_is_masked_until_it_is_acknowledged(bench) {
        expect_eq!(with_edu(bench, [edu::MASKED, 0, 0])?.run(soon()), End::Exited(0));
        Ok(())
    }
}

/// Where the one that is killed has its memory for the device, and the next one too.
const AT: u64 = 0x4000_0000;

ktest! {
    /// Killed while edu is writing to its memory: edu has come to rest when the next process has it, and does not write to what that
    /// one has lent at the same address. Red without the wait for the end of the transfer.
    fn a_driver_of_edu_that_is_killed_leaves_a_quiet_device(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let (host, function) = edu_function(bench)?;
        leaks_nothing(|| {
            let registers = function.bar_part(0, 0, 0x100)?;
            // Running, and to memory.
            kill(with_edu(bench, [edu::IN_THE_MIDDLE, 0, AT])?, || registers.read64(0x98) & 3 == 3)?;
            expect_eq!(registers.read64(0x98) & 1, 0, "a transfer is under way");
            is_quiet(bench, &function, host)?;
            let end = with_edu(bench, [edu::THERE_AND_BACK, 2048, 5])?.run(soon());
            expect_eq!(end, End::Exited(0));
            is_quiet(bench, &function, host)
        })
    }
}

ktest! {
    fn a_device_is_one_processs_at_a_time(bench) {
        let (host, function) = edu_function(bench)?;
        let first = with_edu(bench, [edu::THERE_AND_BACK, 64, 1])?;
        // A second master of the group: neither can then have a domain for itself.
        let second = Assignment::new(&bench.hardware, host, &function, Limits::NONE);
        let end = first.run(soon());
        expect!(second.is_err() || end != End::Exited(0), "{end}");
        drop(second);
        expect_eq!(with_edu(bench, [edu::THERE_AND_BACK, 64, 1])?.run(soon()), End::Exited(0));
        Ok(())
    }
}

/// What the driver of virtio-blk can be told to do.
mod blk {
    pub const WRITE_AND_READ: u64 = 0;
    pub const WITHOUT_END: u64 = 1;
    pub const DEAF: u64 = 2;
    pub const MASKED: u64 = 3;
}

fn with_blk(bench: &Bench, arguments: [u64; 3]) -> Result<UserProcess, Outcome> {
    let (host, function) = bench.function(0x1af4, 0x1042, 0)?;
    let mut process = UserProcess::new("blk driver", BLK, arguments, Quota::default())?;
    process.process().assign(Box::new(Assignment::new(&bench.hardware, host, &function, Limits::NONE)?))?;
    Ok(process)
}

/// The word that the driver writes at byte `offset`.
fn word(offset: u64, value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ offset
}

/// Bytes that the driver moves at once.
const BLK_BYTES: u64 = 8 * 4096;

/// Sectors of the disk that belong to tests.
fn scratch(bench: &Bench) -> Result<u64, Outcome> {
    let disk = bench.disk()?;
    let sectors = disk.block().geometry().sectors;
    disk.stop()?;
    Ok(sectors - 4096)
}

ktest! {
    /// What it has written the kernel's own driver reads.
    fn a_driver_of_virtio_blk_at_el0_writes_and_reads(bench) {
        let (host, function) = bench.function(0x1af4, 0x1042, 0)?;
        let sector = scratch(bench)?;
        let mut value = 100;
        leaks_nothing(|| {
            value += 1;
            expect_eq!(with_blk(bench, [blk::WRITE_AND_READ, sector, value])?.run(soon()), End::Exited(0));
            is_quiet(bench, &function, host)
        })?;
        let disk = bench.disk()?;
        let pages = disk.block().device().page_set(BLK_BYTES, Ladder::DEFAULT)?;
        let loan = Arc::new(disk.block().device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
        block_on(soon(), disk.block().read(sector, &loan, 0..BLK_BYTES)?)??;
        for offset in (0..BLK_BYTES).step_by(8) {
            expect_eq!(u64::from_le_bytes(loan.view().read_array(offset)?), word(offset, value), "{offset:#x}");
        }
        drop(loan);
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    /// Killed with requests in flight: the next driver, at EL0 or the kernel's own, finds a disk that works.
    fn a_driver_of_virtio_blk_that_is_killed_leaves_a_quiet_disk(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let (host, function) = bench.function(0x1af4, 0x1042, 0)?;
        let sector = scratch(bench)?;
        leaks_nothing(|| {
            let disk = PciTransport::new(function.clone())?;
            let since = bench.watch();
            let served = Arc::new(Event::default());
            let mut process = with_blk(bench, [blk::WITHOUT_END, sector, 0])?;
            process.process().put_event(served.clone())?;
            // There are eight requests at a time from the first one on.
            kill(process, || disk.status() & 4 != 0 && served.is_raised())?;
            expect_eq!(disk.status(), 0, "it was not reset");
            is_quiet(bench, &function, host)?;
            let stream = stream(bench, host, &function)?;
            expect!(!bench.has_faulted(&[stream], since), "it was still at work when its memory went");
            expect_eq!(with_blk(bench, [blk::WRITE_AND_READ, sector, 3])?.run(soon()), End::Exited(0));
            Ok(())
        })
    }
}

ktest! {
    /// A vector remembers. Red when the handler does not shut the gate.
    fn an_interrupt_that_comes_while_it_is_masked_is_not_lost(bench) {
        let sector = scratch(bench)?;
        expect_eq!(with_blk(bench, [blk::MASKED, sector, 0])?.run(soon()), End::Exited(0));
        Ok(())
    }
}

/// Interrupts by wire, which others share: the disks in slots 2, 6 and 10 have the same.
mod wires {
    use super::{BLK_BYTES, Bench, blk, host, is_quiet, kill, leaks_nothing, scratch, with_blk};
    use super::{ENDED, VICTIM};
    use crate::bench::soon;
    use alloc::sync::Arc;
    use base::{block_on, wait_until};
    use board::{BlockDisk, End, Signal};
    use core::sync::atomic::Ordering;
    use dma::{FromDevice, Ladder};
    use ktest::{Outcome, expect, expect_eq, ktest};
    use virt::cores;
    use virtio::transport::{PciTransport, Transport};

    /// A disk on the same wire, in the hands of the kernel.
    fn neighbour(bench: &Bench) -> Result<BlockDisk, Outcome> {
        let disk = bench.nth_disk(1)?;
        expect_eq!(disk.signal(), Signal::Wire);
        let own = bench.function(0x1af4, 0x1042, 0)?.1;
        let line = |slot| bench.boot.machine.pcie[0].intx.lookup(slot, 1);
        expect!(line(own.bdf().device()).is_some());
        expect_eq!(line(own.bdf().device()), line(disk.master().function().bdf().device()));
        Ok(disk)
    }

    fn read(disk: &BlockDisk, times: u64) -> Result<(), Outcome> {
        for _ in 0..times {
            let pages = disk.block().device().page_set(BLK_BYTES, Ladder::DEFAULT)?;
            let loan = Arc::new(disk.block().device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
            block_on(soon(), disk.block().read(0, &loan, 0..BLK_BYTES)?)??;
        }
        Ok(())
    }

    ktest! {
        /// Its driver reads the interrupt status at EL0; it is killed in the middle, and the next one finds a disk that works. Red
        /// where `Acknowledge` does not open the gate.
        fn a_driver_at_el0_has_its_wire_as_an_event_and_its_neighbours_have_theirs(bench) {
            if bench.cores < 2 {
                ktest::skip!("one core");
            }
            let (host, function) = bench.function(0x1af4, 0x1042, 0)?;
            let sector = scratch(bench)?;
            let other = neighbour(bench)?;
            let mut value = 40;
            leaks_nothing(|| {
                value += 1;
                expect_eq!(with_blk(bench, [blk::WRITE_AND_READ, sector, value])?.run(soon()), End::Exited(0));
                expect!(!function.may_use_wire());
                expect_eq!(with_blk(bench, [blk::MASKED, sector, 0])?.run(soon()), End::Exited(0));
                let disk = PciTransport::new(function.clone())?;
                let mut served = 0;
                kill(with_blk(bench, [blk::WITHOUT_END, sector, 0])?, || {
                    // While it is at work, on the other core.
                    served += u64::from(read(&other, 1).is_ok());
                    disk.status() & 4 != 0 && served > 20
                })?;
                expect_eq!(disk.status(), 0, "it was not reset");
                expect!(!function.may_use_wire(), "it may still use its wire");
                is_quiet(bench, &function, host)?;
                read(&other, 5)
            })?;
            expect_eq!(other.wire().and_then(|wire| wire.line().trouble()), None);
            other.stop()?;
            Ok(())
        }
        machine: intx
    }

    ktest! {
        /// A driver that never has its device take back its interrupt is told once for each `Acknowledge`. Its neighbours go on. Red
        /// without the gate: the process is told of nothing (its core does nothing but handle the interrupt), then cut off.
        fn a_device_that_goes_on_asserting_the_wire_interrupts_once_for_each_acknowledge(bench) {
            if bench.cores < 2 {
                ktest::skip!("one core");
            }
            let sector = scratch(bench)?;
            let other = neighbour(bench)?;
            ENDED.store(0, Ordering::SeqCst);
            *VICTIM.lock() = Some(with_blk(bench, [blk::DEAF, sector, 200])?);
            cores::run_on(1, host)?;
            while ENDED.load(Ordering::SeqCst) == 0 {
                read(&other, 1)?;
            }
            // It has ended by itself, with its code.
            expect_eq!(ENDED.load(Ordering::SeqCst), 2);
            wait_until(soon(), || cores::is_idle(1))?;
            expect_eq!(with_blk(bench, [blk::DEAF, sector, 20])?.run(soon()), End::Exited(0));
            read(&other, 5)?;
            expect_eq!(other.wire().and_then(|wire| wire.line().trouble()), None);
            other.stop()?;
            Ok(())
        }
        machine: intx
    }
}

/// Devices that the kernel knows nothing of but that they can be reset.
mod resets {
    use super::{Bench, is_quiet, kill, leaks_nothing, stream};
    use crate::bench::soon;
    use alloc::boxed::Box;
    use board::{Assignment, End, UserProcess};
    use dma::Limits;
    use ktest::{Outcome, expect, expect_eq, ktest};
    use process::Quota;
    use programs::NVME;

    const IDENTIFY: u64 = 0;
    const WITHOUT_END: u64 = 1;
    /// The controller's registers.
    const CONFIGURATION: usize = 0x14;
    const STATUS: usize = 0x1c;

    fn with_nvme(bench: &Bench, what: u64) -> Result<UserProcess, Outcome> {
        let (host, function) = bench.function(0x1b36, 0x0010, 0)?;
        let mut process = UserProcess::new("nvme driver", NVME, [what, 0, 0], Quota::default())?;
        process.process().assign(Box::new(Assignment::new(&bench.hardware, host, &function, Limits::NONE)?))?;
        Ok(process)
    }

    ktest! {
        /// Killed with commands under way, or at the end of its program, it leaves the controller as if it was just switched on, at the
        /// same addresses; the next driver looks for that too. Red without the reset.
        fn a_device_with_a_reset_forgets_one_process_before_the_next(bench) {
            if bench.cores < 2 {
                ktest::skip!("one core");
            }
            let (host, function) = bench.function(0x1b36, 0x0010, 0)?;
            let registers = function.bar_part(0, 0, 0x1000)?;
            let addresses = || [0x10, 0x14, 0x20].map(|offset| function.read_config32(offset));
            let before = addresses();
            let since = bench.watch();
            leaks_nothing(|| {
                expect_eq!(with_nvme(bench, IDENTIFY)?.run(soon()), End::Exited(0));
                expect_eq!([registers.read32(CONFIGURATION), registers.read32(STATUS)], [0, 0]);
                kill(with_nvme(bench, WITHOUT_END)?, || registers.read32(STATUS) & 1 == 1)?;
                expect_eq!([registers.read32(CONFIGURATION), registers.read32(STATUS)], [0, 0]);
                expect_eq!(addresses(), before);
                is_quiet(bench, &function, host)
            })?;
            let stream = stream(bench, host, &function)?;
            expect!(!bench.has_faulted(&[stream], since), "it was still at work when its memory went");
            Ok(())
        }
        machine: resets
    }
}

/// One table for a process and its device.
mod shared {
    use super::{Bench, edu, edu_function, is_quiet, kill, leaks_nothing, stream};
    use crate::bench::soon;
    use alloc::boxed::Box;
    use board::{Assignment, End, UserProcess, UserTables};
    use dma::Limits;
    use ktest::{Outcome, expect, expect_eq, ktest};
    use process::{MAPS, Quota};
    use programs::EDU;

    fn with_edu(bench: &Bench, arguments: [u64; 3]) -> Result<UserProcess, Outcome> {
        let (host, function) = edu_function(bench)?;
        let tables = UserTables::shared_with(&bench.hardware, host, &function)?;
        let mut process = UserProcess::in_tables(tables, "edu driver", EDU, arguments, Quota::default())?;
        let tables = process.tables().clone();
        let device = Assignment::new(&bench.hardware, host, &function, Limits::NONE)?.sharing(tables);
        process.process().assign(Box::new(device))?;
        Ok(process)
    }

    /// How edu ends there: its accesses are not privileged, and the doorbell is for nobody else. Where the SMMU does not take them
    /// for privileged it interrupts by wire.
    fn well(bench: &Bench) -> End {
        let overridden = bench.hardware.smmus().iter().all(|smmu| smmu.features().attr_perms_ovr);
        End::Exited(if overridden { 0 } else { edu::BY_WIRE })
    }

    ktest! {
        /// Memory from before the device was attached and from after it: nothing is lent, a pointer is enough. Red where messages are
        /// used whatever the SMMU can do (which works in this emulator, for which everything is privileged).
        fn a_pointer_means_the_same_to_a_process_and_its_device(bench) {
            let (host, function) = edu_function(bench)?;
            let since = bench.watch();
            leaks_nothing(|| {
                expect_eq!(with_edu(bench, [edu::SHARED, 2048, 9])?.run(soon()), well(bench));
                is_quiet(bench, &function, host)
            })?;
            let stream = stream(bench, host, &function)?;
            expect!(!bench.has_faulted(&[stream], since));
            Ok(())
        }
    }

    ktest! {
        /// What the process gives back is gone for the device too: a fault of its stream, at the process's address. Red when the
        /// device's address space is not revoked.
        fn what_a_process_gives_back_its_device_does_not_reach(bench) {
            let (host, function) = edu_function(bench)?;
            let since = bench.watch();
            expect_eq!(with_edu(bench, [edu::SHARED_UNMAPPED, 2048, 9])?.run(soon()), well(bench));
            let stream = stream(bench, host, &function)?;
            let noted = bench.fault(&[stream], since);
            expect!(
                noted.as_ref().is_some_and(|noted| noted.fault.iova.is_some_and(|iova| MAPS.contains(&iova.get()))),
                "{noted:?}"
            );
            Ok(())
        }
    }

    ktest! {
        /// Killed while edu is writing by the process's own pointer: it is at rest before that memory is anybody's again. Red without the
        /// wait for the end of the transfer.
        fn a_driver_that_is_killed_leaves_a_quiet_device_and_a_table_that_nobody_walks(bench) {
            if bench.cores < 2 {
                ktest::skip!("one core");
            }
            let (host, function) = edu_function(bench)?;
            leaks_nothing(|| {
                let registers = function.bar_part(0, 0, 0x100)?;
                kill(with_edu(bench, [edu::IN_THE_MIDDLE_SHARED, 0, 0])?, || registers.read64(0x98) & 3 == 3)?;
                expect_eq!(registers.read64(0x98) & 1, 0, "a transfer is under way");
                is_quiet(bench, &function, host)?;
                expect_eq!(with_edu(bench, [edu::SHARED, 2048, 5])?.run(soon()), well(bench));
                is_quiet(bench, &function, host)
            })
        }
    }

    ktest! {
        /// The second finds its doorbell where the first has it. Seen red: where that counted as a conflict.
        fn two_devices_have_one_processs_table(bench) {
            let (host, function) = edu_function(bench)?;
            let (next, second) = bench.function(testdev::edu::ID.0, testdev::edu::ID.1, 1)?;
            leaks_nothing(|| {
                let mut process = with_edu(bench, [edu::BOTH, 1024, 17])?;
                let tables = process.tables().clone();
                let device = Assignment::new(&bench.hardware, next, &second, Limits::NONE)?.sharing(tables);
                process.process().assign(Box::new(device))?;
                expect_eq!(process.run(soon()), End::Exited(0));
                is_quiet(bench, &function, host)?;
                is_quiet(bench, &second, next)
            })
        }
        machine: bridge
    }
}

/// Caught, each on the host's model too (`kernel/process/tests/behaviour/hostile.rs`): see there.
mod hostile {
    use super::{Bench, edu_function, is_quiet};
    use alloc::boxed::Box;
    use alloc::sync::Arc;
    use base::Deadline;
    use board::{Assignment, End, UserProcess, UserTables};
    use dma::{Ladder, Limits, OpenPages, PageSet, Users, vcm};
    use iommu::PAGE_SIZE;
    use ktest::{Outcome, expect, expect_eq, ktest};
    use process::Quota;
    use programs::HOSTILE;

    /// System calls of one run.
    const CALLS: u64 = 100_000;
    /// Milliseconds that they may take.
    const PATIENCE: u64 = 40_000;
    /// Different error codes that it must have seen for this to be a test.
    const CODES: u64 = 10;

    /// In the number of calls: its device goes by its own table.
    const SHARED: u64 = 1 << 63;

    fn run(bench: &Bench, calls: u64, seed: u64, secret: u64) -> Result<End, Outcome> {
        let (host, function) = edu_function(bench)?;
        let shared = calls & SHARED != 0;
        let tables = match shared {
            true => UserTables::shared_with(&bench.hardware, host, &function)?,
            false => UserTables::private()?,
        };
        let quota =
            Quota { pages: 128, regions: 32, handles: 8, loans: 16, tables: 1024, shared: 64 * PAGE_SIZE, lines: 100 };
        let mut process = UserProcess::in_tables(tables, "hostile", HOSTILE, [calls, seed, secret], quota)?;
        let mut device = Assignment::new(&bench.hardware, host, &function, Limits::NONE)?;
        if shared {
            device = device.sharing(process.tables().clone());
        }
        process.process().assign(Box::new(device))?;
        // What it has together with others: to write, and to read only.
        let memory = || OpenPages::zeroed(&board::COHERENT, 2 * PAGE_SIZE, Ladder::DEFAULT);
        let buffer = || Ok::<_, dma::Error>(vcm::fill("shared", &board::COHERENT, 6 * PAGE_SIZE, Ladder::DEFAULT)?.0);
        let (written, read) = (buffer()?, buffer()?);
        process.process().share(written.clone(), abi::READ | abi::WRITE)?;
        process.process().share(read.clone(), abi::READ)?;
        process.process().put_memory(Arc::new(memory()?), abi::READ | abi::WRITE)?;
        process.process().put_memory(Arc::new(memory()?), abi::READ)?;
        process.process().put_event(Arc::default())?;
        let end = process.run(Deadline::after_millis(PATIENCE));
        expect_eq!((written.users(), read.users()), (Users::default(), Users::default()));
        let read = read.into_pages().map_err(|_| Outcome::failed(format_args!("somebody has the buffer")))?;
        expect!(read.chunks().all(|chunk| chunk.iter().all(|byte| *byte == 0)), "what it may only read has changed");
        let written = written.into_pages().map_err(|_| Outcome::failed(format_args!("somebody has the buffer")))?;
        // It was a test: it has had its accesses.
        expect!(
            calls & !SHARED < CALLS || !written.chunks().all(|chunk| chunk.iter().all(|byte| *byte == 0)),
            "it wrote nothing"
        );
        Ok(end)
    }

    ktest! {
        /// The kernel's memory keeps its contents, and all that the process had comes back; its device finds nothing anywhere else.
        fn a_hundred_thousand_random_calls_change_nothing_outside_the_process(bench) {
            nothing_changes(bench, 0)
        }
    }

    ktest! {
        /// As above, with a device that reaches all that the process does, while the process takes it away under it.
        fn random_calls_of_a_process_whose_table_is_its_devices_change_nothing_outside_it(bench) {
            nothing_changes(bench, SHARED)
        }
    }

    fn nothing_changes(bench: &Bench, shared: u64) -> Result<(), Outcome> {
        let (host, function) = edu_function(bench)?;
        // What the kernel keeps for good is there after these.
        for seed in 1..4 {
            let end = run(bench, 2_000 | shared, seed, 0)?;
            expect!(matches!(end, End::Exited(_)), "{end}");
        }
        let mut canary = PageSet::zeroed(&board::COHERENT, 64 * PAGE_SIZE, dma::Ladder::DEFAULT)?;
        canary.chunks_mut().for_each(|chunk| chunk.fill(0xc5));
        let secret = canary.runs().first().map_or(0, |run| run.start().get());
        let free = kernel::mm::stats().free;
        let end = run(bench, CALLS | shared, 0x9e37_79b9, secret)?;
        expect!(matches!(end, End::Exited(codes) if codes >= CODES), "{end}");
        expect!(canary.chunks().all(|chunk| chunk.iter().all(|byte| *byte == 0xc5)), "the kernel's memory has changed");
        expect_eq!(kernel::mm::stats().free, free, "frames free");
        expect_eq!(dma::quarantine::report().pages, 0);
        is_quiet(bench, &function, host)
    }
}

ktest! {
    /// The SMMU would see none of its accesses, and its process would have all of memory. Seen red: without the look at what it offers.
    fn a_device_that_goes_around_the_iommu_is_given_to_nobody(bench) {
        let (host, function) = bench.function(0x1af4, 0x1042, 1)?;
        match Assignment::new(&bench.hardware, host, &function, Limits::NONE) {
            Err(board::Error::Virtio { error: virtio::Error::BypassesIommu, .. }) => Ok(()),
            Err(error) => Err(Outcome::failed(format_args!("{error}"))),
            Ok(_) => Err(Outcome::failed(format_args!("it was given away"))),
        }
    }
    machine: foreign
}
