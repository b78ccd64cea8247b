//! The processor: the only assembly of the house.
//!
//! Everything that is an instruction or a system register is here; on a host only what does not need one is built.
//!
//! # From reset to the board's code
//!
//! `asm/entry.s` leaves EL3 or EL2 if it was entered there (see `el3`), makes tables that map the image twice (at its physical address and
//! in the upper half), starts the MMU, zeroes `.bss` and calls `boot`'s first function: no Rust instruction runs with the MMU off. The
//! board then reads the device tree, calls `boot::finish_tables`, and starts the other cores with `smp::start`.
//!
//! # Stacks
//!
//! A core has three, each with an unmapped page below: the main one (SP_EL0), the one on which exceptions are taken (SP_EL1), and
//! an emergency one for faults of handlers. So an overflow of the main stack is reported like any other fault. While a process
//! runs at EL0, SP_EL0 is the process's, and the main stack's pointer waits on the exception stack (see `user`).

#![no_std]

#[cfg(test)]
extern crate std;

pub mod backtrace;
pub mod esr;
pub mod layout;
pub mod mmio;
pub mod mmu;

#[cfg(target_os = "none")]
pub mod boot;
#[cfg(target_os = "none")]
mod bytes;
#[cfg(target_os = "none")]
pub mod cache;
#[cfg(target_os = "none")]
pub mod el3;
#[cfg(target_os = "none")]
pub mod exception;
#[cfg(target_os = "none")]
pub mod exit;
#[cfg(target_os = "none")]
mod hooks;
#[cfg(target_os = "none")]
pub mod irq;
#[cfg(target_os = "none")]
mod percore;
#[cfg(target_os = "none")]
pub mod pmu;
#[cfg(target_os = "none")]
pub mod probe;
#[cfg(target_os = "none")]
pub mod psci;
#[cfg(target_os = "none")]
pub mod smp;
#[cfg(target_os = "none")]
pub mod timer;
#[cfg(target_os = "none")]
pub mod user;
#[cfg(target_os = "none")]
mod words;

#[cfg(target_os = "none")]
pub use hooks::{allow_wfi, set_kick};
#[cfg(target_os = "none")]
pub use percore::mpidr;
