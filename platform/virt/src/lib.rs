//! The QEMU virt board.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

#[cfg(target_os = "none")]
pub mod cores;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
pub mod pl011;
#[cfg(target_os = "none")]
mod start;

#[cfg(target_os = "none")]
#[doc(hidden)]
pub use arch::boot::BootInfo;
#[cfg(target_os = "none")]
pub use start::{Boot, Error, start};

/// Makes `$main`, a `fn(&'static virt::Boot) -> u32`, what the image runs once the machine is up; its result is the exit status.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        // SAFETY: `arch` declares the symbol with this signature and calls it once; it is defined only here.
        #[unsafe(no_mangle)]
        fn __sluice_entry(boot: $crate::BootInfo) -> ! {
            $crate::start(boot, $main)
        }
    };
}
