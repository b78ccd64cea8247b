//! What all boards share: a machine description becomes interrupt controllers, IOMMUs, bus masters and drivers.
//!
//! The one place that sees everything, and therefore the one that vouches: which window of registers belongs to whom, which
//! streams a device uses, and (only where the command line says so) that a device may run without an IOMMU. Every `unsafe` here
//! is such a statement about the machine.
//!
//! # Order
//!
//! `Hardware::bring_up`: interrupts; then every SMMU, which blocks everything; then the PCIe hosts, whose devices cannot
//! master the bus yet; then the IOMMUs that are PCI functions (virtio-iommu), alone on the bus; a device gets an address space
//! (`Hardware::attach`) before it gets bus mastering, and both before its driver starts.
//!
//! # Locking
//!
//! The lists of messages given to devices and of shared lines (`signals`) have locks of their own, leaves, and so has the list of masters
//! in use (`containment`), and the list of restricted pools (`pools`). Everything else is set up by the first
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
mod options;
mod painter;
mod pools;
mod processes;
mod signals;
mod viommu;
mod virtual_memory;

pub use drivers::{BlockDisk, EduStray, GpuScreen, Signal};
pub use error::{Error, PassthroughError};
pub use hardware::Hardware;
pub use interrupts::{gic, init_core};
pub use job::{Operator, main_job};
pub use masters::{Master, Treatment};
pub use memory::{COHERENT, CarveOut, KernelMemory, NON_COHERENT, alias_stats, trim_aliases};
pub use options::{Options, Selection};
pub use painter::{Company, PainterError, ProcessPainter};
pub use processes::{Assignment, Crash, End, Killer, UserProcess, UserTables};
pub use viommu::Viommu;
pub use virtual_memory::KERNEL_SPACE;
