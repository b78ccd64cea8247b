//! The kernel's own address space, its cores and its clock.

use base::{Deadline, Instant, TimedOut, wait_until};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use ktest::{expect, expect_eq, ktest};
use virt::cores;

ktest! {
    fn the_kernels_code_cannot_be_written(_bench) {
        let address = arch::layout::text().start;
        // SAFETY: reads the kernel's own code.
        let before = unsafe { arch::probe::read32(address) }?;
        // SAFETY: the same value is written, should the write succeed.
        let fault = unsafe { arch::probe::write32(address, before) };
        expect!(fault.is_err_and(|fault| fault.far == address));
        Ok(())
    }
}

ktest! {
    fn constants_can_be_neither_written_nor_executed(_bench) {
        let address = arch::layout::rodata().start;
        // SAFETY: reads the kernel's own constants.
        let before = unsafe { arch::probe::read32(address) }?;
        // SAFETY: the same value is written, should the write succeed.
        expect!(unsafe { arch::probe::write32(address, before) }.is_err());
        // SAFETY: if this were executable the test has failed, and the panic that follows says so.
        expect!(unsafe { arch::probe::call(address) }.is_err());
        Ok(())
    }
}

ktest! {
    /// The instruction is a `ret`: it would come back if the page could be executed.
    fn data_cannot_be_executed(_bench) {
        static RET: AtomicU64 = AtomicU64::new(0xd65f_03c0);
        let address = (&raw const RET).addr() as u64;
        // SAFETY: a function without parameters that returns at once, should it be executable.
        expect!(unsafe { arch::probe::call(address) }.is_err());
        let frame = kernel::mm::alloc_zeroed(1, kernel::mm::Zone::Any)?;
        let linear = kernel::mm::phys_to_virt(frame.start()).get();
        // SAFETY: the frame is ours; zeros are no instruction, so this could only end in an exception that names it.
        expect!(unsafe { arch::probe::write32(linear, 0xd65f_03c0) }.is_ok());
        // SAFETY: a function without parameters that returns at once, should it be executable.
        expect!(unsafe { arch::probe::call(linear) }.is_err());
        // SAFETY: nothing uses the frame.
        unsafe { kernel::mm::free(frame) }?;
        Ok(())
    }
}

ktest! {
    fn address_zero_is_not_mapped(_bench) {
        // SAFETY: nothing is there to be changed by a read.
        expect!(unsafe { arch::probe::read8(0) }.is_err_and(|fault| fault.far == 0));
        Ok(())
    }
}

ktest! {
    fn a_wait_sleeps_until_its_deadline_and_no_longer_than_it_must(_bench) {
        let start = Instant::now();
        expect_eq!(wait_until(Deadline::after_millis(20), || false), Err(TimedOut));
        let slept = start.elapsed();
        expect!(slept >= Duration::from_millis(20), "{slept:?}");
        Ok(())
    }
}

/// Runs `job` on all other cores, and waits until all have finished.
pub(super) fn on_other_cores(cores: usize, job: fn(usize)) -> Result<(), ktest::Outcome> {
    for core in 1..cores {
        cores::run_on(core, job)?;
    }
    wait_until(super::super::bench::soon(), || (1..cores).all(cores::is_idle))?;
    Ok(())
}

static SEEN: AtomicU64 = AtomicU64::new(0);

ktest! {
    fn every_core_runs_and_knows_its_index(bench) {
        expect_eq!(bench.cores, bench.boot.machine.cpus.len());
        SEEN.store(1, Ordering::SeqCst);
        on_other_cores(bench.cores, |core| {
            if base::cpu::index() == core {
                SEEN.fetch_or(1 << core, Ordering::SeqCst);
            }
        })?;
        expect_eq!(SEEN.load(Ordering::SeqCst), (1 << bench.cores) - 1);
        Ok(())
    }
    machine: smp8
}

static FLAG: AtomicU64 = AtomicU64::new(0);

ktest! {
    /// The sleeper's own timer is minutes away: only the other core's interrupt can wake it.
    fn a_core_that_sleeps_is_woken_by_another(bench) {
        if bench.cores < 2 {
            return Err(ktest::Outcome::skipped(format_args!("one core")));
        }
        FLAG.store(0, Ordering::SeqCst);
        cores::run_on(1, |_| {
            // Asleep by now, or not yet: both must work.
            let _ = wait_until(Deadline::after_millis(5), || false);
            FLAG.store(1, Ordering::SeqCst);
            base::notify();
        })?;
        let start = Instant::now();
        expect_eq!(wait_until(Deadline::after_millis(300_000), || FLAG.load(Ordering::SeqCst) == 1), Ok(()));
        expect!(start.elapsed() < Duration::from_secs(60));
        wait_until(super::super::bench::soon(), || cores::is_idle(1))?;
        Ok(())
    }
}

ktest! {
    fn the_kernel_entered_at_el2_runs_as_if_entered_at_el1(bench) {
        expect_eq!(bench.boot.entered_at, 2);
        expect_eq!(wait_until(Deadline::after_millis(1), || false), Err(TimedOut));
        Ok(())
    }
    machine: el2
}
