//! PSCI (DEN 0022): starting cores and switching off.

use core::sync::atomic::{AtomicU8, Ordering};
use smccc::{Hvc, Smc, psci};

/// How PSCI is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Conduit {
    /// HVC: the firmware is a hypervisor.
    Hvc = 1,
    /// SMC: the firmware is at EL3, or a hypervisor that traps SMC.
    Smc = 2,
}

static CONDUIT: AtomicU8 = AtomicU8::new(0);

/// Sets how PSCI is called on this machine. Before that no call is made.
pub fn set_conduit(conduit: Conduit) {
    CONDUIT.store(conduit as u8, Ordering::Release);
}

/// Whether PSCI can be called.
pub fn has_conduit() -> bool {
    CONDUIT.load(Ordering::Acquire) != 0
}

/// A PSCI call that did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine described no PSCI.
    #[error("the machine has no PSCI conduit")]
    NoConduit,
    /// The firmware refused.
    #[error("PSCI: {0}")]
    Refused(psci::Error),
}

/// Starts the core with affinity `mpidr` at physical address `entry` with `context` in x0.
///
/// # Errors
///
/// [`Error`]; nothing was started then.
pub(crate) fn cpu_on(mpidr: u64, entry: u64, context: u64) -> Result<(), Error> {
    let result = match CONDUIT.load(Ordering::Acquire) {
        1 => psci::cpu_on::<Hvc>(mpidr, entry, context),
        2 => psci::cpu_on::<Smc>(mpidr, entry, context),
        _ => return Err(Error::NoConduit),
    };
    result.map_err(Error::Refused)
}

/// Switches the machine off. Returns if that cannot be done.
pub(crate) fn system_off() {
    // A refusal has no other answer than to return.
    let _ = match CONDUIT.load(Ordering::Acquire) {
        1 => psci::system_off::<Hvc>(),
        2 => psci::system_off::<Smc>(),
        _ => return,
    };
}
