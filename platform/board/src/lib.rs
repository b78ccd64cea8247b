//! What all boards share: a machine description becomes interrupt controllers, IOMMUs, bus masters and drivers.
//!
//! The one place that sees everything, and therefore the one that vouches: which window of registers belongs to whom, which
//! streams a device uses, and (only where the command line says so) that a device may run without an IOMMU. Every `unsafe` here
//! is such a statement about the machine.
//!
//! # Order
//!
//! `Hardware::bring_up`: interrupts; then every SMMU, which blocks everything; then the PCIe hosts, whose devices cannot
//! master the bus yet; then the IOMMUs that are PCI functions (virtio-iommu), alone on the bus; a device gets an address space (`Hardware::attach`) before it gets bus mastering, and both before its
//! driver starts.
//!
//! # Locking
//!
//! The list of messages given to devices (`messages`) has a lock of its own, a leaf, and so has the list of masters in use
//! (`containment`). Everything else is set up by the first
//! core and not changed afterwards.

#![no_std]
#![cfg(target_os = "none")]

extern crate alloc;

mod bus;
mod containment;
mod drivers;
mod error;
mod hardware;
mod interrupts;
mod job;
mod masters;
mod memory;
mod messages;
mod options;
mod strictness;
mod viommu;

pub use drivers::{BlockDisk, EduStray, GpuScreen};
pub use error::Error;
pub use hardware::Hardware;
pub use interrupts::{gic, init_core};
pub use job::{Operator, main_job};
pub use masters::Master;
pub use memory::{COHERENT, NON_COHERENT};
pub use options::Options;
pub use strictness::Strict;
pub use viommu::Viommu;
