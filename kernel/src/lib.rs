//! The kernel's policy: machine description, memory, devices and the main job.
//!
//! Knows no hardware: what it needs of a board it asks for through traits.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod cmdline;
pub mod disk;
pub mod log;
pub mod machine;
pub mod mm;
