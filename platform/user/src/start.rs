//! The first and the last instructions.

use crate::sys;
use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;

global_asm!(
    ".section .text._start, \"ax\"",
    ".global _start",
    "_start:",
    "mov x29, xzr",
    "mov x30, xzr",
    "bl user_start",
    "brk #0",
);

unsafe extern "Rust" {
    fn __user_main(arguments: [u64; 3]) -> u64;
}

// SAFETY: only `_start` names it.
#[unsafe(no_mangle)]
extern "C" fn user_start(first: u64, second: u64, third: u64) -> ! {
    // SAFETY: `entry!` defines it with this signature.
    let code = unsafe { __user_main([first, second, third]) };
    sys::exit(code)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut line = sys::Line::default();
    // What does not fit is left out.
    let _ = write!(line, "{info}");
    line.end();
    sys::exit(abi::PANICKED)
}
