//! Ending: by semihosting, which hands the host an exit status, or by PSCI.

use crate::psci;
use aarch64_cpu::asm::wfe;
use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

static SEMIHOSTING: AtomicBool = AtomicBool::new(true);

/// Chooses how [`exit`] tries to end: by semihosting first (the default, so that a failure before the board is known has a
/// status), or by PSCI alone. Where no debugger serves semihosting, the call is undefined, caught, and PSCI follows.
pub fn use_semihosting(yes: bool) {
    SEMIHOSTING.store(yes, Ordering::Release);
}

/// A semihosting call. Where nobody serves it, it does nothing.
fn call(operation: u64, parameter: *const u8) {
    // SAFETY: the operations used here read what `parameter` points to, and no more; if the instruction is undefined, the exception
    // handler continues after it with x0 and x1 changed.
    unsafe {
        asm!("bl semihosting_call", inout("x0") operation => _, inout("x1") parameter => _, out("x30") _, options(nostack));
    }
}

/// Prints `text` on the debugger's console, if one serves semihosting and it is in use: for text that has no other place to go.
pub fn semihosting_print(text: &str) {
    if SEMIHOSTING.load(Ordering::Acquire) {
        for byte in text.bytes() {
            // SYS_WRITEC
            call(3, &raw const byte);
        }
    }
}

/// Ends the kernel with `status` (0 is success). PSCI cannot hand over a status.
pub fn exit(status: u32) -> ! {
    crate::irq::mask_all();
    if SEMIHOSTING.load(Ordering::Acquire) {
        // ADP_Stopped_ApplicationExit, and the status.
        let block = [0x20026_u64, u64::from(status)];
        // SYS_EXIT_EXTENDED, or SYS_EXIT, which older debuggers know.
        for operation in [0x20, 0x18] {
            call(operation, block.as_ptr().cast());
        }
    }
    psci::system_off();
    park()
}

/// Stops this core for good, with everything masked.
pub fn park() -> ! {
    crate::irq::mask_all();
    loop {
        wfe();
    }
}
