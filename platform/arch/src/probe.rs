//! Accesses that are allowed to fault.
//!
//! For tests of the kernel's own protection, and for looking at addresses that may not be there.

use crate::esr::Esr;
use crate::exception::Frame;
use core::arch::{asm, global_asm};
use core::fmt;

global_asm!(include_str!("asm/probe.s"));

/// A fault that was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// What it was.
    pub esr: Esr,
    /// The address of the access.
    pub far: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {:#018x}", self.esr, self.far)
    }
}

/// A pair in `.ex_table`: an instruction that may fault, and where to go on.
#[repr(C)]
struct Fixup {
    from: u64,
    to: u64,
}

fn fixups() -> &'static [Fixup] {
    unsafe extern "C" {
        static __ex_table_start: Fixup;
        static __ex_table_end: Fixup;
    }
    let start = &raw const __ex_table_start;
    let len = ((&raw const __ex_table_end).addr() - start.addr()) / size_of::<Fixup>();
    // SAFETY: the linker script puts the table, an array of pairs of addresses, between the two symbols, in the image's constants.
    unsafe { core::slice::from_raw_parts(start, len) }
}

/// Sends a fault that was expected to its landing; false if it was not.
pub(crate) fn land(frame: &mut Frame) -> bool {
    // An instruction fetch that faults names its target; who called is in the link register.
    let from = if Esr(frame.esr).is_instruction_abort() && frame.elr == frame.far { frame.x[30] } else { frame.elr };
    let Some(fixup) = fixups().iter().find(|fixup| fixup.from == from) else {
        return false;
    };
    frame.elr = fixup.to;
    frame.x[0] = frame.esr;
    frame.x[1] = frame.far;
    true
}

fn outcome(esr: u64, far: u64) -> Result<(), Fault> {
    if esr == 0 { Ok(()) } else { Err(Fault { esr: Esr(esr), far }) }
}

macro_rules! probe {
    ($read:ident = $read_asm:ident, $write:ident = $write_asm:ident, $type:ty) => {
        #[doc = concat!("Reads the `", stringify!($type), "` at virtual address `address`.")]
        ///
        /// # Safety
        ///
        /// Reading it, if something is there, changes nothing that matters: it may be a device.
        ///
        /// # Errors
        ///
        /// The fault, if the access faulted.
        pub unsafe fn $read(address: u64) -> Result<$type, Fault> {
            let (esr, far, value): (u64, u64, u64);
            // SAFETY: a load whose fault is caught; the caller answers for what it reads.
            unsafe {
                asm!(concat!("bl ", stringify!($read_asm)), inout("x0") address => esr, out("x1") far, out("x2") value,
                     out("x30") _, options(nostack));
            }
            outcome(esr, far).map(|()| value as $type)
        }

        #[doc = concat!("Writes the `", stringify!($type), "` at virtual address `address`.")]
        ///
        /// # Safety
        ///
        /// If the write succeeds, it hits nothing that Rust code owns.
        ///
        /// # Errors
        ///
        /// The fault, if the access faulted.
        pub unsafe fn $write(address: u64, value: $type) -> Result<(), Fault> {
            let (esr, far): (u64, u64);
            // SAFETY: a store whose fault is caught; the caller answers for where it goes.
            unsafe {
                asm!(concat!("bl ", stringify!($write_asm)), inout("x0") address => esr,
                     inout("x1") u64::from(value) => far, out("x30") _, options(nostack));
            }
            outcome(esr, far)
        }
    };
}

probe!(read8 = probe_read8, write8 = probe_write8, u8);
probe!(read32 = probe_read32, write32 = probe_write32, u32);
probe!(read64 = probe_read64, write64 = probe_write64, u64);

/// Calls the function at virtual address `address`.
///
/// # Safety
///
/// What lies there, if it can be executed, is a function without parameters that follows AAPCS64.
///
/// # Errors
///
/// The fault, if fetching its first instruction faulted.
pub unsafe fn call(address: u64) -> Result<(), Fault> {
    let (esr, far): (u64, u64);
    // SAFETY: the caller answers for what runs; `probe_call` is a function by the C rules.
    unsafe { asm!("bl probe_call", inout("x0") address => esr, out("x1") far, clobber_abi("C")) };
    outcome(esr, far)
}
