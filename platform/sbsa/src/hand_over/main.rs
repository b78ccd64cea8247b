//! The hand-over: from reset at EL3 to the kernel's first instruction at EL2, and PSCI for the kernel after that.
//!
//! The first core lets the normal world have all interrupts, writes the board's device tree to the start of memory in place of
//! the machine's own, copies the kernel image from flash to 2 MiB above that and enters it, by the arm64 boot protocol. The other
//! cores wait until the kernel calls CPU_ON for them.
//!
//! What goes wrong before the kernel runs is said on the UART, and the machine is switched off.
//!
//! # Locking
//!
//! None: one word for each core says what it is, and whoever changes it does so atomically.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
extern crate alloc;
#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod heap;
#[cfg(target_os = "none")]
mod interrupts;
#[cfg(target_os = "none")]
mod last_words;
#[cfg(target_os = "none")]
mod psci;
#[cfg(target_os = "none")]
mod registers;
