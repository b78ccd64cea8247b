//! The other cores: started by PSCI, then idle until they are given something to run.
//!
//! # Locking
//!
//! None: one atomic word for each core holds what it is to run.

use alloc::vec::Vec;
use arch::layout::CORE_STACKS;
use base::cpu::MAX_CPUS;
use base::{Deadline, wait_until};
use core::sync::atomic::{AtomicPtr, Ordering};
use core::time::Duration;
use kernel::machine::{Cpu, EnableMethod, Machine};
use kernel::mm::{self, Zone};

/// A core that did not come up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No memory for a list or for stacks.
    #[error("no memory for the stacks of another core: {0}")]
    Memory(mm::Error),
    /// The processor's part of it failed.
    #[error("{0}")]
    Start(arch::smp::Error),
    /// It was started, and never arrived.
    #[error("core {0} was started, but does not run")]
    Lost(usize),
    /// The core does not run, or is running something.
    #[error("core {0} has no time")]
    Busy(usize),
}

/// What a core is given to run: a function of its index.
pub type Job = fn(usize);

const IDLE: *mut () = core::ptr::null_mut();
static JOBS: [AtomicPtr<()>; MAX_CPUS] = [const { AtomicPtr::new(IDLE) }; MAX_CPUS];
static ON_START: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// How long a core may take from being started to running.
const PATIENCE: Duration = Duration::from_secs(5);

/// The MPIDR affinity of every core that this image serves, by logical index: the calling core first, which must be the first core.
///
/// # Errors
///
/// [`Error::Memory`].
pub fn affinities(machine: &Machine) -> Result<Vec<u64>, Error> {
    let first = arch::mpidr();
    let mut list = Vec::new();
    list.try_reserve(machine.cpus.len() + 1).map_err(|_| Error::Memory(mm::Error::TooLittle))?;
    list.push(first);
    let can = |cpu: &&Cpu| cpu.mpidr != first && cpu.enable == EnableMethod::Psci && arch::psci::has_conduit();
    let others = || machine.cpus.iter().filter(can);
    list.extend(others().map(|cpu| cpu.mpidr).take(MAX_CPUS - 1));
    let left_out = machine.cpus.len().saturating_sub(list.len());
    if left_out != 0 {
        log::warn!(
            "{left_out} of {} cores are not used: more than {MAX_CPUS}, or not to be started by PSCI",
            machine.cpus.len()
        );
    }
    Ok(list)
}

/// Starts all other cores. Each runs `on_start` with interrupts masked (its part of the interrupt controller is set up there), lets
/// interrupts in, and is idle. Returns how many cores run then. A core that does not come up is reported, and left out.
///
/// # Errors
///
/// [`Error::Memory`] if not even the list of cores could be made.
pub fn start_all(machine: &Machine, on_start: fn(usize)) -> Result<usize, Error> {
    ON_START.store(on_start as *mut (), Ordering::Release);
    arch::smp::set_entry(run);
    let affinities = affinities(machine)?;
    // All are told to start before any is waited for.
    for (index, &mpidr) in affinities.iter().enumerate().skip(1) {
        if let Err(error) = start(index, mpidr) {
            log::warn!("{error}");
        }
    }
    let started = arch::smp::started();
    let deadline = Deadline::after(PATIENCE);
    while arch::smp::online() & started != started && !deadline.has_passed() {
        core::hint::spin_loop();
    }
    let online = arch::smp::online();
    for index in (0..MAX_CPUS).filter(|index| (started & !online) >> index & 1 != 0) {
        log::warn!("{}", Error::Lost(index));
    }
    Ok(online.count_ones() as usize)
}

fn start(index: usize, mpidr: u64) -> Result<(), Error> {
    let stacks = mm::alloc(CORE_STACKS / arch::layout::PAGE_SIZE, Zone::Any).map_err(Error::Memory)?;
    // SAFETY: the frames are ours and given away for good: a core that was refused might still come.
    unsafe { arch::smp::start(index, mpidr, stacks.start().get()) }.map_err(Error::Start)
}

fn run(core: usize) -> ! {
    let on_start = ON_START.load(Ordering::Acquire);
    if !on_start.is_null() {
        // SAFETY: the pointer is not null, so `start_all` stored a function of this type there.
        let on_start = unsafe { core::mem::transmute::<*mut (), Job>(on_start) };
        on_start(core);
    }
    arch::irq::enable();
    let Some(slot) = JOBS.get(core) else {
        arch::exit::park();
    };
    loop {
        // An idle core looks now and then by itself, too, which costs nothing and needs no special case.
        let _ = wait_until(Deadline::after(Duration::from_secs(60)), || slot.load(Ordering::Acquire) != IDLE);
        let job = slot.load(Ordering::Acquire);
        if job != IDLE {
            // SAFETY: what is not IDLE was stored by `run_on`, from a function of this type.
            let job = unsafe { core::mem::transmute::<*mut (), Job>(job) };
            job(core);
            slot.store(IDLE, Ordering::Release);
            base::notify();
        }
    }
}

/// Lets any idle core but the first run `job` with its index. Says whether there was one.
pub fn run_anywhere(job: Job) -> bool {
    (1..MAX_CPUS).any(|core| run_on(core, job).is_ok())
}

/// Whether `core` runs and has nothing to do.
pub fn is_idle(core: usize) -> bool {
    core < MAX_CPUS
        && arch::smp::online() >> core & 1 != 0
        && JOBS.get(core).is_some_and(|slot| slot.load(Ordering::Acquire) == IDLE)
}

/// Lets the idle core `core`, which is not the first, run `job` with its index.
///
/// # Errors
///
/// [`Error::Busy`] if it does not run, or is not idle.
pub fn run_on(core: usize, job: Job) -> Result<(), Error> {
    let slot = JOBS.get(core).filter(|_| core != 0 && is_idle(core)).ok_or(Error::Busy(core))?;
    let job = job as *mut ();
    slot.compare_exchange(IDLE, job, Ordering::AcqRel, Ordering::Acquire).map_err(|_| Error::Busy(core))?;
    base::notify();
    Ok(())
}
