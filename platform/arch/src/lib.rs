//! The processor: the only assembly of the house.
//!
//! MMU, exceptions, barriers, cache maintenance, timer, SMP bring-up and the volatile MMIO accessor. Everything that is an
//! instruction or a system register is here; on a host only what does not need one is built.

#![no_std]

pub mod mmio;
