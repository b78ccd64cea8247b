//! The other cores.

use crate::{exit, irq, layout, mmu, percore, pmu, psci};
use base::cpu::MAX_CPUS;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// A core that was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such index, or that of the first core.
    #[error("core {0} cannot be started")]
    BadIndex(usize),
    /// The core was started already.
    #[error("core {0} was started already")]
    Started(usize),
    /// Its stacks could not be mapped.
    #[error("core {index}: {error}")]
    Stacks {
        /// Which core.
        index: usize,
        /// Why not.
        error: mmu::MapError,
    },
    /// The firmware did not start it.
    #[error("core {index}: {error}")]
    Psci {
        /// Which core.
        index: usize,
        /// Why not.
        error: psci::Error,
    },
}

/// One bit for each index that was used.
static TAKEN: AtomicU64 = AtomicU64::new(1);
static STARTED: AtomicU64 = AtomicU64::new(1);
static ONLINE: AtomicU64 = AtomicU64::new(1);
static ENTRY: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// One bit for each core that runs.
pub fn online() -> u64 {
    ONLINE.load(Ordering::Acquire)
}

static STOP: AtomicU64 = AtomicU64::new(0);

/// Stops all cores but this one for good: each at its next interrupt, or when it next waits. For the kernel's end.
pub fn stop_others() {
    let me = 1 << percore::index();
    STOP.store(!me, Ordering::SeqCst);
    <crate::hooks::Hooks as base::Hooks>::kick(online() & !me);
}

/// Stops this core if another has ended the kernel.
#[inline]
pub(crate) fn stop_if_told() {
    if STOP.load(Ordering::Relaxed) >> percore::index() & 1 != 0 {
        exit::park();
    }
}

/// One bit for each core that firmware has agreed to start, and for the first.
pub fn started() -> u64 {
    STARTED.load(Ordering::Acquire)
}

/// Sets what cores that are started run: a function of their index, called with interrupts masked.
pub fn set_entry(entry: fn(usize) -> !) {
    ENTRY.store(entry as *mut (), Ordering::Release);
}

/// Starts the core with affinity `mpidr` as number `index`, which is 1 or more. It shows up in [`online`], then runs the function
/// of [`set_entry`].
///
/// `stacks` is the physical address of [`layout::CORE_STACKS`] bytes of memory, aligned to a page, which are given away for good.
///
/// # Errors
///
/// [`Error`]. The stacks' memory stays mapped, and lost, where the firmware refuses.
///
/// # Safety
///
/// Nothing uses the memory for the stacks any more.
pub unsafe fn start(index: usize, mpidr: u64, stacks: u64) -> Result<(), Error> {
    if index == 0 || index >= MAX_CPUS {
        return Err(Error::BadIndex(index));
    }
    if TAKEN.fetch_or(1 << index, Ordering::AcqRel) & 1 << index != 0 {
        return Err(Error::Started(index));
    }
    let [main, exception, emergency] =
        mmu::map_core_stacks(index, stacks).map_err(|error| Error::Stacks { index, error })?;
    percore::stacks(index).set(main, exception, emergency);
    unsafe extern "C" {
        static secondary_entry: u8;
    }
    let entry = mmu::image().start + ((&raw const secondary_entry).addr() as u64 - layout::image_start());
    base::barrier::publish();
    psci::cpu_on(mpidr, entry, index as u64).map_err(|error| Error::Psci { index, error })?;
    STARTED.fetch_or(1 << index, Ordering::AcqRel);
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn secondary_rust() -> ! {
    mmu::drop_identity();
    irq::enable_serror();
    pmu::start();
    let index = percore::index();
    ONLINE.fetch_or(1 << index, Ordering::AcqRel);
    let entry = ENTRY.load(Ordering::Acquire);
    if entry.is_null() {
        exit::park();
    }
    // SAFETY: the pointer is not null, so `set_entry` stored a function of this type there.
    let entry = unsafe { core::mem::transmute::<*mut (), fn(usize) -> !>(entry) };
    entry(index)
}
