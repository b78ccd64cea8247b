//! The SMMUv3: its driver, the layouts of the architecture, and an executable model of the hardware for host tests.
//!
//! - [`spec`]: what the architecture (Arm IHI 0070) lays down. Types and constants only.
//! - [`Smmu`]: the driver. It implements [`iommu::contract::Iommu`] and hands out address spaces that implement
//!   [`iommu::contract::AddressSpace`]; the contract of revocation is kept in `space.rs`.
//! - `model` (feature `model`): an SMMU in software, with registers, queues, caches and table walks, that caches all that the
//!   architecture lets it cache and reports what the driver must not do.
//!
//! - [`Smmu::create_with`]: stage 1, stage 2 or both, granule and size by [`Request`]; [`Fleet`]: one space for several SMMUs;
//!   [`Smmu::attach_substream`]: a space for a SubstreamID; [`Smmu::enable_ats`]: a device that caches translations.
//!
//! The driver reaches hardware only through [`Registers`] and [`iommu::contract::TableMemory`].
//!
//! # Locks
//!
//! All are [`base::IrqMutex`]es, none is held while waiting, and none is taken while another of this crate's is held:
//! what went wrong with the command queue, the event and PRI queues' read indexes, what is owed of page request answers,
//! IRQ_CTRL, the table of streams, the two identifier allocators, and each
//! space's list of streams with ATS. Issuing commands takes none (see `cmdq.rs`).

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod atc;
mod bugs;
mod cmdq;
mod company;
mod contexts;
mod counters;
mod descriptors;
pub mod entry;
mod error;
mod evtq;
mod features;
mod fleet;
mod ids;
mod inbox;
mod member;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod priq;
mod registers;
mod request;
mod ring;
mod service;
mod smmu;
mod space;
pub mod spec;
mod start;
mod streams;
mod strtab;
pub mod tlbi;

pub use cmdq::{CommandError, Completion};
pub use counters::Statistics;
pub use error::Error;
pub use evtq::fault;
pub use features::{Features, StallModel};
pub use fleet::Fleet;
pub use registers::{Offset, Register, Registers};
pub use request::{Request, Translation};
pub use service::{Message, Messages};
pub use smmu::Smmu;
pub use start::Config;
