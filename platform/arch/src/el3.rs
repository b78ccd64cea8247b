//! What firmware would have done: where the image was entered at EL3, the secure state is set up from EL1.
//!
//! Only secure accesses can give interrupts to the normal world, and where the interrupt controller is the device tree says, which is
//! not read at EL3. So the entry code leaves something there that reads and writes words ([`SecureWords`]) until it is told to stop,
//! which it is before any device is let loose.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

global_asm!(include_str!("asm/el3.s"));

static OPEN: AtomicBool = AtomicBool::new(false);

/// Notes that the image was entered at EL3.
pub(crate) fn note_entry() {
    OPEN.store(true, Ordering::Release);
}

/// The right to read and write device registers as the secure state does. There is one, and dropping it is the end of it.
#[derive(Debug)]
pub struct SecureWords(());

impl SecureWords {
    /// Takes the right: `None` if the image was not entered at EL3, or the right is gone.
    pub fn take() -> Option<Self> {
        OPEN.swap(false, Ordering::AcqRel).then(|| Self(()))
    }

    /// Reads the word at physical address `address`, a multiple of 4.
    ///
    /// # Safety
    ///
    /// A device's register is there.
    pub unsafe fn read(&self, address: u64) -> u32 {
        // SAFETY: the right exists, so what entry.s has left at EL3 answers; it changes what is said here.
        (unsafe { call(0, address, 0) }) as u32
    }

    /// Writes the word at physical address `address`, a multiple of 4.
    ///
    /// # Safety
    ///
    /// A device's register is there, and nothing else drives the device.
    pub unsafe fn write(&self, address: u64, value: u32) {
        // SAFETY: as for `read`.
        unsafe { call(1, address, value) };
    }
}

impl Drop for SecureWords {
    fn drop(&mut self) {
        // SAFETY: as for `read`; no memory is touched.
        unsafe { call(2, 0, 0) };
    }
}

/// # Safety
///
/// EL3 is as entry.s has left it, and may access the word at `address`.
unsafe fn call(what: u64, address: u64, value: u32) -> u64 {
    let result;
    // SAFETY: el3.s changes no register but these, and the word that the caller answers for.
    unsafe {
        asm!("smc #0", inout("x0") what => result, in("x1") address, in("x2") u64::from(value), out("x3") _, options(nostack));
    }
    result
}
