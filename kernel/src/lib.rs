//! The kernel's policy: machine description, memory, devices and the main job.
//!
//! Knows no hardware: what it needs of a board it asks for through traits.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod class;
pub mod cmdline;
pub mod demo;
pub mod disk;
pub mod faults;
pub mod log;
pub mod machine;
pub mod mm;
pub mod picture;
pub mod strictness;
