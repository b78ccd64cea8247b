//! What a board can fail at.

use alloc::string::String;

/// Why the machine, or a device of it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The machine lacks something.
    #[error("the machine has no {0}")]
    Missing(&'static str),
    /// The machine has something that there is no driver for.
    #[error("there is no driver for this machine's {0}")]
    Unsupported(&'static str),
    /// Registers could not be mapped.
    #[error("{what}: its registers cannot be mapped: {error}")]
    Map {
        /// Whose.
        what: String,
        /// Why not.
        error: arch::mmu::MapError,
    },
    /// The interrupt controller.
    #[error("interrupt controller: {0}")]
    Gic(#[from] gic::GicError),
    /// An SMMU.
    #[error("{name}: {error}")]
    Smmu {
        /// Which.
        name: String,
        /// What it is.
        error: smmuv3::Error,
    },
    /// A process.
    #[error("process {name}: {error}")]
    Process {
        /// Which.
        name: String,
        /// What it is.
        error: process::Error,
    },
    /// A PCIe host or function.
    #[error("{name}: {error}")]
    Pci {
        /// Which.
        name: String,
        /// What it is.
        error: pci::PciError,
    },
    /// No IOMMU in the machine, or none that translates for a device.
    #[error(
        "no IOMMU translates for {0}, so nothing would keep it from any memory; \
         add an IOMMU (iommu=smmuv3) to the machine, or iommu.off=allow to the command line to run unprotected"
    )]
    NotIsolated(String),
    /// The machine has an IOMMU that leaves a device out.
    #[error(
        "the machine's IOMMU does not translate for {0}, which the iommu-map of its host bridge leaves out, so nothing would keep it \
         from any memory; start the machine without default-bus-bypass-iommu=on (or bypass_iommu=on of that host bridge), or add \
         iommu.off=allow to the command line to run unprotected"
    )]
    LeftOut(String),
    /// Another core has been attaching a device all the time.
    #[error("another core attaches a device, and does not get done")]
    Turn,
    /// A device has no way to interrupt.
    #[error(
        "{0} cannot interrupt: nothing takes its messages, and it has no wire that the host bridge's interrupt-map leads on; \
         add an MSI controller to the machine, or give the device a pin"
    )]
    NoInterrupt(String),
    /// A device was to be let through untranslated, and cannot be.
    #[error("{name} cannot be passed through: {why}")]
    Passthrough {
        /// Which.
        name: String,
        /// Why not.
        why: PassthroughError,
    },
    /// A device could not be attached to its address space.
    #[error("{name}: {error}")]
    Attach {
        /// Which.
        name: String,
        /// What the IOMMU said.
        error: iommu::AttachError,
    },
    /// The address space of a device could not be set up.
    #[error("{name}: {error}")]
    Space {
        /// Which.
        name: String,
        /// What it is.
        error: iommu::IovaError,
    },
    /// The doorbell could not be mapped.
    #[error("{name}: the interrupt doorbell cannot be mapped: {error}")]
    Doorbell {
        /// Which.
        name: String,
        /// What it is.
        error: iommu::MapError,
    },
    /// What firmware uses could not be kept mapped.
    #[error("{name}: what firmware has given it cannot be mapped: {error}")]
    Firmware {
        /// Which.
        name: String,
        /// What it is.
        error: iommu::MapError,
    },
    /// A device was contained, and not everybody has let go of its group.
    #[error("{0} has been contained: it, or another device that cannot be told from it, did not stop faulting")]
    Contained(String),
    /// A device's DMA side.
    #[error("{name}: {error}")]
    Dma {
        /// Which.
        name: String,
        /// What it is.
        error: dma::Error,
    },
    /// A virtio device.
    #[error("{name}: {error}")]
    Virtio {
        /// Which.
        name: String,
        /// What it is.
        error: virtio::Error,
    },
    /// A test device.
    #[error("{name}: {error}")]
    TestDevice {
        /// Which.
        name: String,
        /// What it is.
        error: testdev::TestdevError,
    },
    /// The command line.
    #[error("{0}")]
    CommandLine(#[from] kernel::cmdline::Error),
    /// No memory.
    #[error("out of memory")]
    OutOfMemory,
}

/// Why a device cannot be let through untranslated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PassthroughError {
    /// The IOMMU cannot tell it from others, which would be let through with it.
    #[error("the IOMMU cannot tell it from {0} other functions")]
    Shared(usize),
    /// It is in use already.
    #[error("it is in use")]
    InUse,
    /// The IOMMU.
    #[error("{0}")]
    Iommu(iommu::AttachError),
}
