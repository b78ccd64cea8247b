//! The kernel image for QEMU's virt board.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(not(target_os = "none"))]
fn main() {}

#[cfg(target_os = "none")]
mod job;

#[cfg(target_os = "none")]
virt::entry!(job::main);
