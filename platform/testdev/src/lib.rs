//! DMA on command: devices of QEMU that read and write where they are told, to show what an IOMMU lets through.
//!
//! Both take raw device addresses. What they reach is decided by their attachment alone, so a wrong address is safe to try: that
//! is what they are for.
//!
//! # Locking
//!
//! One caller at a time uses a device; see the modules.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod edu;
mod error;
pub mod iommu_testdev;

#[cfg(test)]
mod tests;

pub use edu::Edu;
pub use error::TestdevError;
pub use iommu_testdev::IommuTestdev;
