//! What can go wrong with the interrupt controller.

use iommu::OutOfMemory;

/// Why the interrupt controller did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GicError {
    /// The registers are not those of a GICv3 or GICv4.
    #[error("the distributor is of architecture revision {0}, not 3 or 4")]
    NotGicV3(u8),
    /// The registers are not those of a GICv2.
    #[error("the distributor is of architecture revision {0}, not 2")]
    NotGicV2(u8),
    /// A register window is smaller than the architecture says.
    #[error("the {0} window is too small")]
    WindowTooSmall(&'static str),
    /// The hardware lacks something that this driver needs.
    #[error("the interrupt controller lacks {0}")]
    Unsupported(&'static str),
    /// A message frame claims SPIs that there are not.
    #[error("the message frame claims {count} interrupts from {first} on, which are not all shared interrupts")]
    BadFrame {
        /// The first interrupt ID.
        first: u32,
        /// How many.
        count: u32,
    },
    /// No redistributor belongs to the calling core.
    #[error("no redistributor has affinity {0:#010x}")]
    NoRedistributor(u32),
    /// The core has not called `init_core`.
    #[error("core {0} takes no interrupts yet")]
    CoreOffline(usize),
    /// There is no such interrupt.
    #[error("there is no interrupt {0}")]
    NoSuchInterrupt(u32),
    /// The interrupt has a handler already.
    #[error("interrupt {0} has a handler already")]
    InUse(u32),
    /// The machine has no ITS (or it does not do physical LPIs), and no message frame of that number.
    #[error("the machine has nothing that turns messages into interrupts")]
    NoMsi,
    /// The DeviceID is beyond what the ITS can tell apart.
    #[error("DeviceID {0:#x} is beyond the ITS's device table")]
    NoSuchDevice(u32),
    /// The device's interrupt translation table is full, or the request is larger than any.
    #[error("no EventID is free for DeviceID {0:#x}")]
    NoEvent(u32),
    /// All LPIs are in use.
    #[error("no LPI is free")]
    NoLpi,
    /// All SPIs of the message frame are in use.
    #[error("no interrupt of the message frame is free")]
    NoSpi,
    /// The hardware did not accept a table.
    #[error("the hardware did not accept the {0} table")]
    TableRejected(&'static str),
    /// The ITS stopped at a command, or reported nonsense; it takes no more.
    #[error("the ITS takes no more commands")]
    Dead,
    /// The hardware did not do something in time.
    #[error("timed out: {0}")]
    TimedOut(&'static str),
    /// No memory.
    #[error("out of memory")]
    OutOfMemory,
}

impl From<OutOfMemory> for GicError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}
