//! QEMU's `sbsa-ref` board: a server as Arm's Base System Architecture describes one, entered at EL3 from flash.
//!
//! The kernel image is the same as on every board. What a board adds is what its firmware would be, and this crate is that
//! firmware:
//!
//! - [`map`]: where things are;
//! - [`payload`]: what the flash holds beside the hand-over: the kernel image and its command line;
//! - [`tree`]: the device tree, made of [`map`] and of the little that the machine says about itself;
//! - the binary `sbsa-hand-over`: from reset to the kernel's first instruction, and PSCI after that.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod map;
pub mod payload;
pub mod tree;
