//! What the main job wants of devices, whatever drives them. A board implements these traits with its drivers.
//!
//! Memory goes in as [`dma::Attachment`]s of shared buffers: the type says which device has it and in which direction, and the
//! caller keeps the buffer, so that what one device wrote the next one shows without a copy.
//!
//! # Locking
//!
//! Calls wait for devices: no lock may be held across them. They take `&self`, from as many cores as like to.

#![forbid(unsafe_code)]

mod block;
mod display;
mod metadata;

pub use block::{BlockDevice, Piece, pieces};
pub use display::{Display, Mode, OnScreen, Showing};
pub use metadata::Metadata;

use alloc::boxed::Box;

/// Why a device did not do what it was asked: the driver's own error, which says what was wrong.
pub type Failure = Box<dyn core::error::Error + Send + Sync>;
