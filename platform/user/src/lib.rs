//! What every program at EL0 is linked with: its start, its end, and system calls as functions.
//!
//! A program is a `no_main` binary with [`entry!`]. It is built for `aarch64-unknown-none`, as a static executable.

#![no_std]

#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
pub mod sys;

pub use abi;

/// Makes `$main`, a function of the program's three arguments that returns its exit code, the program.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        // SAFETY: the runtime declares the symbol with this signature, and calls it once.
        #[unsafe(no_mangle)]
        fn __user_main(arguments: [u64; 3]) -> u64 {
            $main(arguments)
        }
    };
}
