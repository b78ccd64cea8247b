//! The kernel's policy: machine description, memory, devices and the main job.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod log;
pub mod mm;
