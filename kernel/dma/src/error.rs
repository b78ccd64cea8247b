//! What can go wrong when memory is lent.

use crate::memory::AttributeError;
use crate::quarantine::Quarantined;
use alloc::collections::TryReserveError;
use alloc::sync::Arc;
use core::fmt;
use iommu::group::AttachmentState;
use iommu::{AttachError, Iova, IovaError, IovaRange, MapError, OutOfMemory, PhysRange, RevokeError};

/// Why a request of the DMA-API was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is not enough memory.
    #[error("out of memory")]
    OutOfMemory,
    /// Memory of this size cannot be had.
    #[error("no memory can have a size of {0:#x} bytes with this alignment")]
    BadSize(u64),
    /// The size or alignment of a type makes it unfit to be shared with a device.
    #[error("a type of {0} bytes with this alignment cannot be shared with a device")]
    BadLayout(usize),
    /// The limits of a device contradict themselves.
    #[error("the device's limits are wrong: {0}")]
    BadLimits(&'static str),
    /// A bus window is not aligned to pages, or passes the end of an address space.
    #[error("the bus window at {0} is not made of whole pages")]
    BadWindow(PhysRange),
    /// A range is not inside the memory.
    #[error("{len:#x} bytes at offset {offset:#x} are not inside {size:#x} bytes")]
    OutOfRange {
        /// Where the range begins.
        offset: u64,
        /// How long it is.
        len: u64,
        /// How much memory there is.
        size: u64,
    },
    /// The device is not attached to the domain of the DMA-API.
    #[error("{device} has no address space to map in: it is {state}")]
    NotAttached {
        /// Who.
        device: Arc<str>,
        /// What its group is attached to.
        state: AttachmentState,
    },
    /// The device is attached to a domain of its driver's own, which the DMA-API leaves alone.
    #[error("{0} is attached to a domain of its driver's own")]
    OwnedDomain(Arc<str>),
    /// The device cannot put out the address of this memory, and nothing translates for it.
    #[error("{device} cannot reach the physical memory {memory}")]
    Unreachable {
        /// Who.
        device: Arc<str>,
        /// What.
        memory: PhysRange,
    },
    /// The memory's address on the bus does not meet the device's alignment, and nothing translates for it.
    #[error("{device} needs more alignment than DMA address {address} has")]
    Misaligned {
        /// Who.
        device: Arc<str>,
        /// Where the memory is for the device.
        address: Iova,
    },
    /// The device needs a copy of the memory, and its pool has no room for one at present, or never for one of this size.
    #[error("the pool {pool} of {size:#x} bytes has no room for a copy of {len:#x} bytes")]
    PoolExhausted {
        /// The pool's name.
        pool: Arc<str>,
        /// How much was to be copied.
        len: u64,
        /// The size of the pool.
        size: u64,
    },
    /// A loan to one device was given to the driver of another.
    #[error("memory was lent to {lent_to}, not to {device}")]
    ForeignDevice {
        /// Who has the memory.
        lent_to: Arc<str>,
        /// Who was asked to use it.
        device: Arc<str>,
    },
    /// The buffer cannot be used so while somebody else uses it otherwise.
    #[error("{buffer} is busy: {by}")]
    Busy {
        /// Its name.
        buffer: Arc<str>,
        /// Who stands in the way.
        by: BusyWith,
    },
    /// A device has not done to the buffer what was to be awaited.
    #[error("what a device was doing to {0} has failed")]
    JobFailed(Arc<str>),
    /// The CPU has no mapping of the buffer.
    #[error("the CPU does not reach {0}")]
    NotForCpu(Arc<str>),
    /// The buffer's memory stays where it is.
    #[error("{0} cannot be moved")]
    Immovable(Arc<str>),
    /// The device still has the memory of a scoped mapping that has ended; what it wrote was not taken over.
    #[error("{0} has not given back the memory of a scoped mapping")]
    StillLent(Arc<str>),
    /// Nothing would keep the device from memory that it was not lent.
    #[error("{0} is behind no IOMMU")]
    NotIsolated(Arc<str>),
    /// No device address was free.
    #[error("no device address: {0}")]
    Iova(#[from] IovaError),
    /// The address space refused the mapping.
    #[error("cannot map: {0}")]
    Map(MapError),
    /// The state of the device's group could not be changed.
    #[error("cannot attach: {0}")]
    Attach(#[from] AttachError),
    /// A domain lacks what a device needs wherever it is attached, has what is another device's, or is for devices that treat
    /// the caches otherwise.
    #[error("the domain {domain} is not fit for {device}")]
    Unfit {
        /// The domain's name.
        domain: Arc<str>,
        /// Who.
        device: Arc<str>,
    },
    /// A revocation gave no guarantee.
    #[error("cannot revoke: {0}")]
    Revoke(RevokeError),
    /// There is no memory that the CPU could reach in the way asked for.
    #[error("no memory of this kind: {0}")]
    Attributes(#[from] AttributeError),
    /// Part of a reservation is in use by another link, which is there.
    #[error("something is linked at {0} already")]
    Linked(IovaRange),
    /// What is staged here is another reservation's.
    #[error("what is staged at {0} belongs to another reservation")]
    ForeignLink(IovaRange),
    /// What was asked for cannot be had for this device.
    #[error("{device} cannot have {what}")]
    Unsupported {
        /// Who.
        device: Arc<str>,
        /// What.
        what: &'static str,
    },
    /// A revocation failed; the memory is lost.
    #[error(transparent)]
    Quarantined(#[from] Quarantined),
    /// A segment is longer than the device takes.
    #[error("a segment of {len:#x} bytes is longer than the device's {max:#x}")]
    SegmentTooLong {
        /// Its length in bytes.
        len: u64,
        /// The device's limit.
        max: u64,
    },
    /// A segment crosses the device's boundary.
    #[error("{len:#x} bytes at {iova} cross a multiple of {boundary:#x}")]
    AcrossBoundary {
        /// Where the segment begins.
        iova: Iova,
        /// Its length in bytes.
        len: u64,
        /// The device's boundary.
        boundary: u64,
    },
    /// The slot of a foreign driver has a device already.
    #[error("the driver's slot is taken by {0}")]
    SlotTaken(Arc<str>),
    /// A foreign driver has more lent at a time than its slot has room for.
    #[error("a foreign driver has {0} pieces of memory lent at a time, and no more are kept account of")]
    TooMany(usize),
    /// A foreign driver asks for memory, and its slot has no device.
    #[error("the driver's slot has no device")]
    SlotEmpty,
}

/// What stands in the way of an access to a shared buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusyWith {
    /// A device may write.
    DeviceWrites,
    /// The CPU reads.
    CpuReads,
    /// The CPU writes.
    CpuWrites,
    /// A device is at work on it.
    AtWork,
    /// Somebody has it mapped.
    Mapped,
    /// It is being moved.
    Moving,
    /// More users than can be counted.
    TooMany,
}

impl fmt::Display for BusyWith {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceWrites => "a device may write it",
            Self::CpuReads => "the CPU reads it",
            Self::CpuWrites => "the CPU writes it",
            Self::AtWork => "a device is at work on it",
            Self::Mapped => "somebody has it mapped",
            Self::Moving => "it is being moved",
            Self::TooMany => "too many use it",
        })
    }
}

impl From<OutOfMemory> for Error {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl From<TryReserveError> for Error {
    fn from(_: TryReserveError) -> Self {
        Self::OutOfMemory
    }
}

impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        match error {
            MapError::OutOfMemory => Self::OutOfMemory,
            other => Self::Map(other),
        }
    }
}

/// A buffer that was not mapped comes back with the reason.
pub struct Rejected<B> {
    /// The buffer, as it was.
    pub buffer: B,
    /// The reason.
    pub error: Error,
}

impl<B> fmt::Debug for Rejected<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<B> fmt::Display for Rejected<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<B> core::error::Error for Rejected<B> {}

impl<B> From<Rejected<B>> for Error {
    fn from(rejected: Rejected<B>) -> Self {
        rejected.error
    }
}
