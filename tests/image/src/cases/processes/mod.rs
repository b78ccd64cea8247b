//! Processes: what they can do, what ends them, and that nothing else notices.

mod announced;
mod assignment;
mod shared;

use crate::bench::soon;
use alloc::format;
use arch::user::Asid;
use base::{Deadline, Instant, wait_until};
use board::{Crash, End, Killer, UserProcess};
use core::sync::atomic::{AtomicU64, Ordering};
use ktest::{Outcome, expect, expect_eq, ktest};
use process::{Quota, STACK_TOP};
use programs::TRIAL;
use virt::cores;

/// What the program `trial` can be told to do: its first argument.
mod trial {
    pub const EXIT: u64 = 0;
    pub const MEMORY: u64 = 1;
    pub const LOAD: u64 = 2;
    pub const STORE: u64 = 3;
    pub const LOOP: u64 = 4;
    pub const JUMP: u64 = 5;
    pub const RECURSE: u64 = 6;
    pub const PANIC: u64 = 7;
    pub const REGISTERS: u64 = 8;
    pub const SLEEP: u64 = 9;
    pub const UNDEFINED: u64 = 10;
    pub const TRAPPED: u64 = 11;
    pub const DATA_AS_CODE: u64 = 12;
    pub const LEFTOVERS: u64 = 13;
    pub const THERE_AND_BACK: u64 = 14;
    pub const OUT_OF_TURN: u64 = 15;
    pub const HELD: u64 = 16;
    pub const ALIGNED: u64 = 17;
    pub const WATCHED: u64 = 18;
}

fn start(what: u64, value: u64, other: u64) -> Result<UserProcess, Outcome> {
    Ok(UserProcess::new("trial", TRIAL, [what, value, other], Quota::default())?)
}

fn run(what: u64, value: u64) -> Result<End, Outcome> {
    Ok(start(what, value, 0)?.run(soon()))
}

/// Runs what must crash.
fn crash(what: u64, value: u64) -> Result<Crash, Outcome> {
    match run(what, value)? {
        End::Crashed(crash) => Ok(crash),
        end => Err(Outcome::failed(format_args!("trial {what} {value:#x}: {end}"))),
    }
}

/// Frames and ASIDs in use.
fn used() -> (usize, u64) {
    (kernel::mm::stats().free, Asid::in_use())
}

/// Runs `job` until it has filled what is kept for good, then once more: nothing may be gone afterwards.
fn leaks_nothing(mut job: impl FnMut() -> Result<(), Outcome>) -> Result<(), Outcome> {
    for _ in 0..3 {
        job()?;
    }
    let before = used();
    job()?;
    expect_eq!(used(), before);
    Ok(())
}

ktest! {
    fn a_process_runs_and_exits(_bench) {
        leaks_nothing(|| {
            expect_eq!(run(trial::EXIT, 42)?, End::Exited(42));
            Ok(())
        })
    }
}

ktest! {
    /// Its data as the ELF says, memory that it asks for and gives back, time. At last it reads what it has given back. (That TLBs are
    /// told does not show here: this emulator empties them whenever TTBR0 gets another ASID.)
    fn a_process_has_its_memory_until_it_gives_it_back(_bench) {
        leaks_nothing(|| {
            let crash = crash(trial::MEMORY, 0)?;
            expect!(crash.esr.is_some_and(|esr| esr.is_translation_fault()), "{crash}");
            expect!(crash.far.is_some_and(|far| process::MAPS.contains(&far)), "{crash}");
            Ok(())
        })
    }
}

ktest! {
    fn a_process_reaches_nothing_of_the_kernels(_bench) {
        let frame = kernel::mm::alloc_zeroed(1, kernel::mm::Zone::Any)?;
        let linear = kernel::mm::phys_to_virt(frame.start()).get();
        let kernels = [
            0, 0x1000, arch::layout::text().start, arch::layout::rodata().start, linear, (&raw const SPUN).addr() as u64,
            frame.start().get(), !7, 1 << 47, 0xffff << 48,
        ];
        for address in kernels {
            for what in [trial::LOAD, trial::STORE, trial::JUMP] {
                let crash = crash(what, address)?;
                expect_eq!(crash.far, Some(address), "{what} {address:#x}: {crash}");
            }
        }
        // SAFETY: reads a frame of ours.
        expect_eq!(unsafe { arch::probe::read64(linear) }, Ok(0));
        // SAFETY: nothing uses the frame.
        unsafe { kernel::mm::free(frame) }?;
        Ok(())
    }
}

ktest! {
    /// The stack ends where nothing is mapped; neither data nor code is what the other is.
    fn a_crash_ends_the_process_only_and_says_where(_bench) {
        leaks_nothing(|| {
            let overflow = crash(trial::RECURSE, 1_000_000)?;
            expect!(overflow.far.is_some_and(|far| far < STACK_TOP - abi::STACK), "{overflow}");
            expect!(process::PROGRAM.contains(&overflow.pc) && process::PROGRAM.contains(&overflow.link), "{overflow}");
            let written = crash(trial::STORE, overflow.pc & !0xfff)?;
            expect!(written.esr.is_some_and(|esr| esr.is_permission_fault() && esr.is_write()), "{written}");
            let executed = crash(trial::DATA_AS_CODE, 0)?;
            expect!(executed.esr.is_some_and(|esr| esr.is_permission_fault() && esr.is_instruction_abort()), "{executed}");
            expect_eq!(crash(trial::UNDEFINED, 0)?.esr.map(|esr| esr.class()), Some(0));
            expect_eq!(run(trial::PANIC, 3)?, End::Exited(abi::PANICKED));
            Ok(())
        })
    }
}

ktest! {
    fn instructions_of_the_kernels_end_a_process(_bench) {
        for which in (0..11).filter(|which| *which != DEBUG_CHANNEL) {
            let crash = crash(trial::TRAPPED, which)?;
            // An access by address would say it.
            expect!(crash.far.is_none() || which == 10, "{which}: {crash}");
        }
        Ok(())
    }
}

/// The number of that instruction.
const DEBUG_CHANNEL: u64 = 9;

ktest! {
    /// Reading the status of the debug communication channel. (Seen trapped on QEMU 10.0.)
    fn the_debug_channel_is_not_a_processs(_bench) {
        match run(trial::TRAPPED, DEBUG_CHANNEL)? {
            End::Crashed(_) => Ok(()),
            End::Exited(0) => ktest::skip!("this emulator does not have the trap (MDSCR_EL1.TDCC)"),
            other => Err(Outcome::failed(format_args!("{other}"))),
        }
    }
}

/// One that EL1 cannot keep from EL0, and that EL2 and EL3 trap unless they are told not to: where they do and nobody is there, it
/// takes the core for ever.
fn pacga() -> Result<(), Outcome> {
    match run(trial::TRAPPED, 11)? {
        End::Exited(0) => Ok(()),
        End::Crashed(crash) if crash.esr.is_some_and(|esr| esr.class() == 0) => Ok(()),
        other => Err(Outcome::failed(format_args!("{other}"))),
    }
}

ktest! {
    fn an_instruction_of_pointer_authentication_ends_nothing_but_the_process(_bench) {
        pacga()
    }
}

ktest! {
    /// Seen red: HCR_EL2 without API, and no vectors at EL2 (the machine hung).
    fn an_instruction_of_pointer_authentication_does_not_hang_el2(_bench) {
        pacga()
    }
    machine: el2
}

ktest! {
    fn a_process_that_loops_ends_with_its_time(_bench) {
        leaks_nothing(|| {
            let begun = Instant::now();
            expect_eq!(start(trial::LOOP, 0, 0)?.run(Deadline::after_millis(30)), End::TimedOut);
            expect!(begun.elapsed() >= base::time::Duration::from_millis(30));
            expect_eq!(start(trial::SLEEP, u64::MAX, 0)?.run(Deadline::after_millis(30)), End::TimedOut);
            Ok(())
        })
    }
}

/// A process on another core, and what became of it.
static VICTIM: base::IrqMutex<Option<UserProcess>> = base::IrqMutex::new(None);
static ENDED: AtomicU64 = AtomicU64::new(0);
static SPUN: AtomicU64 = AtomicU64::new(0);

fn host(_core: usize) {
    let victim = VICTIM.lock().take();
    if let Some(victim) = victim {
        SPUN.fetch_add(1, Ordering::SeqCst);
        base::notify();
        let end = victim.run(soon());
        ENDED.store(1 + u64::from(end != End::Killed), Ordering::SeqCst);
        base::notify();
    }
}

/// Runs `what` on another core and kills it there.
fn kill_elsewhere(what: u64, value: u64) -> Result<(), Outcome> {
    ENDED.store(0, Ordering::SeqCst);
    SPUN.store(0, Ordering::SeqCst);
    let victim = start(what, value, 0)?;
    let killer: Killer = victim.killer();
    *VICTIM.lock() = Some(victim);
    cores::run_on(1, host)?;
    wait_until(soon(), || SPUN.load(Ordering::SeqCst) == 1)?;
    let _ = wait_until(Deadline::after_millis(5), || false);
    expect_eq!(ENDED.load(Ordering::SeqCst), 0, "it ended by itself");
    let begun = Instant::now();
    killer.kill();
    wait_until(soon(), || ENDED.load(Ordering::SeqCst) != 0)?;
    expect_eq!(ENDED.load(Ordering::SeqCst), 1);
    expect!(begun.elapsed() < base::time::Duration::from_millis(crate::bench::STEP / 2));
    wait_until(soon(), || cores::is_idle(1))?;
    Ok(())
}

ktest! {
    /// Red when the core is not interrupted: it then ends with its time, ten seconds later.
    fn a_process_on_another_core_can_be_killed_whatever_it_does(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        leaks_nothing(|| {
            kill_elsewhere(trial::LOOP, 0)?;
            kill_elsewhere(trial::SLEEP, u64::MAX)
        })
    }
}

ktest! {
    fn a_process_that_was_killed_before_it_ran_does_not_run(_bench) {
        let process = start(trial::EXIT, 1, 0)?;
        process.killer().kill();
        expect_eq!(process.run(soon()), End::Killed);
        Ok(())
    }
}

/// Two processes, one on each of two cores, each with values of its own in registers that the kernel uses too.
fn registers_elsewhere(_core: usize) {
    let end = start(trial::REGISTERS, 0x5555_5555_5555_5555, 20_000_000).map(|process| process.run(soon()));
    ENDED.store(1 + u64::from(!matches!(end, Ok(End::Exited(0)))), Ordering::SeqCst);
    base::notify();
}

ktest! {
    /// Red without one of the SIMD registers in what is set before a process goes on, and with what the vectors leave in
    /// TPIDRRO_EL0.
    fn registers_are_a_processs_own(bench) {
        ENDED.store(0, Ordering::SeqCst);
        if bench.cores > 1 {
            cores::run_on(1, registers_elsewhere)?;
        }
        expect_eq!(start(trial::REGISTERS, 0xaaaa_aaaa_0000_1111, 20_000_000)?.run(soon()), End::Exited(0));
        if bench.cores > 1 {
            wait_until(soon(), || ENDED.load(Ordering::SeqCst) != 0)?;
            expect_eq!(ENDED.load(Ordering::SeqCst), 1);
            wait_until(soon(), || cores::is_idle(1))?;
        }
        // What others have left in registers, and what the kernel keeps in scratch registers, is not for processes.
        // SAFETY: nothing is there.
        expect!(unsafe { arch::probe::read64(0xdead_0000) }.is_err());
        expect_eq!(run(trial::LEFTOVERS, 0)?, End::Exited(0));
        Ok(())
    }
}

ktest! {
    fn a_file_that_is_no_program_is_refused(_bench) {
        for len in [0, 16, 64, TRIAL.len() / 2] {
            let made = UserProcess::new("cut", &TRIAL[..len], [0; 3], Quota::default());
            expect!(made.is_err(), "{}", format!("{len} bytes"));
        }
        let small = Quota { pages: 8, ..Quota::default() };
        expect!(UserProcess::new("small", TRIAL, [0; 3], small).is_err());
        Ok(())
    }
}
