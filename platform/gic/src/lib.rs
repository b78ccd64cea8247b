//! GICv3 (IHI 0069): distributor, redistributors, CPU interface, and the ITS that turns messages into LPIs; GICv2 (IHI 0048); and
//! the frames of GICv2m, which turn messages into SPIs of either.
//!
//! A GICv3's CPU interface and the distributor's per-interrupt registers go through the crate `arm-gic`; bringing up
//! redistributors, LPIs and the ITS is done here, since every wait must end. Who uses a [`Gic`] does not see which one it is.
//!
//! # Interrupts
//!
//! Handlers run in IRQ context, with interrupts masked, on the core that took the interrupt: they neither allocate nor wait.
//! They are found in a table that is read without a lock. Priorities order what is pending; nothing preempts a handler. An
//! interrupt without a handler is counted and disabled, so it cannot storm.
//!
//! # Locking
//!
//! | lock | guards | taken by handlers |
//! |---|---|---|
//! | distributor | its registers | to disable an interrupt nobody serves |
//! | private | registers and settings of SGIs and PPIs | of a GICv2: when another core has changed the settings |
//! | frame | which SPIs of a message frame are given out | no |
//! | LPI bitmap | which LPIs are given out | no |
//! | ITS exclusive | what is mapped; waited for with a deadline, held across commands | no |
//! | ITS devices | tables by DeviceID; inside ITS exclusive | no |
//! | ITS queue | the write position | only if it is free |
//!
//! None but "ITS exclusive" is held across a wait; among the others, no two are held at once.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(not(target_os = "none"))]
extern crate std;

mod cpu;
mod distributor;
mod error;
mod frame;
#[allow(unsafe_code)] // `Gic::new` takes the registers on the caller's word.
mod gic;
mod its;
mod lpi;
mod redistributor;
mod regs;
pub mod security;
mod table;
mod v2;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod v2_tests;

pub use arm_gic::{IntId, Trigger};
pub use error::GicError;
pub use frame::FrameConfig;
pub use gic::{Gic, Msi, Priority, Region, Sgi, Source, Stray};

/// The interrupt ID of SPI number `number`, as device trees count them.
///
/// # Errors
///
/// [`GicError::NoSuchInterrupt`].
pub fn spi(number: u32) -> Result<IntId, GicError> {
    if number < IntId::MAX_SPI_COUNT { Ok(IntId::spi(number)) } else { Err(GicError::NoSuchInterrupt(number)) }
}

/// The interrupt ID of PPI number `number`, as device trees count them.
///
/// # Errors
///
/// [`GicError::NoSuchInterrupt`].
pub fn ppi(number: u32) -> Result<IntId, GicError> {
    if number < IntId::PPI_COUNT { Ok(IntId::ppi(number)) } else { Err(GicError::NoSuchInterrupt(number)) }
}
