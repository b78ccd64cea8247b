//! Layouts of the SMMUv3 architecture (Arm IHI 0070): types and constants with the architecture's own names, no algorithms.
//!
//! Everything is little-endian, which is the only byte order that this driver programs (CR and descriptor words are written by
//! a little-endian processor).

#![forbid(unsafe_code)]

pub mod cd;
pub mod command;
pub mod event;
mod field;
pub mod page_request;
pub mod queue;
pub mod registers;
pub mod ste;

pub use field::Field;
