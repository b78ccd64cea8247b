//! The IOMMU-API: addresses, translation tables, IOVA allocation, domains and groups.
//!
//! Policy and data structures only; the hardware is behind the traits of [`contract`], which a driver such as the SMMUv3's
//! implements. The crate contains no `unsafe` block: [`contract`] alone *declares* unsafe traits and methods, because what
//! they promise is what every safe DMA interface above rests on.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod addr;
pub mod contract;
pub mod domain;
mod error;
mod fault;
pub mod group;
mod identity;
pub mod iova;
pub mod pgtable;
mod prot;
#[cfg(test)]
mod testing;

pub use addr::{Iova, IovaRange, PAGE_SIZE, PhysAddr, PhysRange, StreamId, VirtAddr};
pub use error::{AttachError, GeometryError, IovaError, MapError, OutOfMemory, RevokeError};
pub use fault::{Access, Fault, FaultReason, FaultSink};
pub use identity::{Bypass, IdentityCapability};
pub use prot::Prot;
