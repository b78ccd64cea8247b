//! Processes: what runs at EL0, what it may have, and what it may ask for.
//!
//! A [`Process`] is an address space ([`Space`]), a table of handles, and the devices that were assigned to it. It runs where
//! somebody runs it (the board enters EL0 and comes back with a system call); this crate decides what becomes of the call. It
//! knows no hardware: tables and devices are behind [`contract`] and [`Assigned`].
//!
//! # What holds, whatever a process does
//!
//! - It reaches its own regions and nothing else; so does a device of its, and only what was lent to it.
//! - What it shares with others it reaches within an access that has begun, and no longer: the memory leaves its tables before the
//!   access ends, however it ends.
//! - The kernel never follows a pointer of a process's. It looks the range up in the list of regions, checks the rights, and copies
//!   from or to the memory behind it by its own address.
//! - What is wrong with an argument is an [`abi::ErrorCode`], and then nothing has changed.
//! - It has no more memory, regions, handles and loans than its [`Quota`] says, and says no more in the log.
//! - When it ends, however it ends, its devices are stopped first, then everything that was lent is revoked, then its memory
//!   goes back. What cannot be revoked is never used again.
//!
//! # Locking
//!
//! None: a process is owned by whoever runs it. What others may touch meanwhile ([`Control`], [`Event`]) is atomic.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod contract;
mod device;
mod elf;
mod error;
mod event;
mod handles;
mod lines;
mod process;
mod shared;
mod space;
mod touched;

pub use device::{Assigned, RegisterWindow, Window, window};
pub use elf::{ElfError, Start};
pub use error::Error;
pub use event::Event;
pub use lines::REFILL;
pub use process::{Control, Next, Process, Quota};
pub use space::{MAPS, PROGRAM, STACK_TOP, Space, Whose};
