//! What can go wrong between a kernel and an IOMMU.

use crate::domain::DomainKind;
use crate::{Iova, IovaRange, StreamId};

/// Memory for a table or a queue could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory")]
pub struct OutOfMemory;

/// Why a mapping was not made. Nothing is mapped after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Part of the range is mapped already, at or after this address.
    #[error("IOVA {0} is mapped already")]
    AlreadyMapped(Iova),
    /// The range lies outside what the domain can translate.
    #[error("IOVA {0} is outside the domain's input range")]
    OutOfAperture(IovaRange),
    /// A physical address is beyond what the hardware can put out.
    #[error("physical address {0:#x} is beyond the IOMMU's output size")]
    OutputTooLarge(u64),
    /// Addresses or lengths are not multiples of the smallest page size.
    #[error("address or length is not a multiple of the page size {0:#x}")]
    Misaligned(u64),
    /// The mapping allows neither read nor write, or asks for what the format cannot express.
    #[error("the permissions cannot be expressed")]
    BadProt,
    /// The sum of the physical runs is not the length of the IOVA range.
    #[error("{physical:#x} bytes of memory for {iova:#x} bytes of IOVA")]
    LengthMismatch {
        /// Bytes of device address space.
        iova: u64,
        /// Bytes of physical memory.
        physical: u64,
    },
    /// No memory for a translation table.
    #[error("no memory for a translation table")]
    OutOfMemory,
    /// The IOMMU refuses the mapping, for a reason of its own.
    #[error("the IOMMU refuses the mapping")]
    Refused,
    /// The IOMMU has failed and takes no more commands.
    #[error("the IOMMU takes no more commands")]
    Dead,
}

impl From<OutOfMemory> for MapError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Why a revocation gave no guarantee. The pages must be treated as still reachable: quarantine them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RevokeError {
    /// The IOMMU did not complete the invalidation in time.
    #[error("the IOMMU did not complete an invalidation in time")]
    TimedOut,
    /// The IOMMU has failed and takes no more commands.
    #[error("the IOMMU takes no more commands")]
    Dead,
    /// Part of the range was not mapped, at or after this address. What was mapped has been revoked with the full guarantee.
    #[error("IOVA {0} was not mapped")]
    NotMapped(Iova),
    /// The range lies outside what the domain can translate; nothing was changed.
    #[error("IOVA {0} is outside the domain's input range")]
    OutOfAperture(IovaRange),
    /// The range cuts a block in two; nothing was changed.
    #[error("the range cuts the block mapping at IOVA {0}")]
    SplitsBlock(Iova),
}

/// Why a stream or a group was not attached or blocked. It is where it was before, unless the variant says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The IOMMU has no entry for this StreamID.
    #[error("StreamID {0} is beyond the stream table")]
    NoSuchStream(StreamId),
    /// The IOMMU has no place for this SubstreamID under the stream, or nothing is attached to it.
    #[error("there is no SubstreamID {0:#x}")]
    NoSuchSubstream(u32),
    /// The address space belongs to another IOMMU or another format.
    #[error("the address space does not belong to this IOMMU")]
    ForeignSpace,
    /// The IOMMU cannot provide this kind of address space.
    #[error("the IOMMU does not support {0}")]
    Unsupported(&'static str),
    /// No memory for a table.
    #[error("out of memory")]
    OutOfMemory,
    /// No free ASID or VMID.
    #[error("no address space identifier is free")]
    NoIdentifier,
    /// The IOMMU did not complete the change in time; the stream's entry is blocked as far as it could be.
    #[error("the IOMMU did not take the change in time")]
    TimedOut,
    /// The IOMMU has failed and takes no more commands.
    #[error("the IOMMU takes no more commands")]
    Dead,
    /// A driver owns the group: the default domain cannot be attached, nor another driver's.
    #[error("a driver owns the group")]
    Owned,
    /// No driver owns the group, or not with the domain that was named.
    #[error("the group is not owned with this domain")]
    NotOwned,
    /// So many bus masters of the group are in use: none of them can have it for itself.
    #[error("{0} bus masters of the group are in use")]
    Shared(usize),
    /// A domain of this kind cannot be attached in this way.
    #[error("a domain of kind {0} cannot be attached so")]
    WrongKind(DomainKind),
    /// The group is being changed at this moment, by another core.
    #[error("the group is being changed")]
    Busy,
    /// A change failed midway and could not be undone, because of this stream: all streams of the group were blocked as far
    /// as the IOMMU did it. Nothing but blocking the group is possible from here.
    #[error("the change could be neither completed nor undone for StreamID {0}")]
    Stranded(StreamId),
}

impl From<OutOfMemory> for AttachError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

/// Why a table of the asked shape does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GeometryError {
    /// The input size is not 32 to 48 bits.
    #[error("input size of {0} bits is not supported")]
    InputSize(u8),
    /// The output size is not 32 to 48 bits.
    #[error("output size of {0} bits is not supported")]
    OutputSize(u8),
    /// A stage 2 cannot have a larger input than output.
    #[error("stage 2 input of {input} bits exceeds the output of {output} bits")]
    InputExceedsOutput {
        /// Bits of input.
        input: u8,
        /// Bits of output.
        output: u8,
    },
}

/// Why device addresses were not reserved, allocated or given back. Nothing has been changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IovaError {
    /// No free range is long enough, with that alignment and below that limit.
    #[error("no {len:#x} bytes of device address space, aligned to {align:#x}, are free up to {limit}")]
    NoSpace {
        /// Bytes asked for.
        len: u64,
        /// Alignment asked for, in bytes.
        align: u64,
        /// The last address allowed.
        limit: Iova,
    },
    /// Part of the range is allocated or reserved.
    #[error("{0} is in use")]
    InUse(IovaRange),
    /// Exactly this range is not allocated (or, for a release, not reserved).
    #[error("{0} was not given out")]
    NotAllocated(IovaRange),
    /// The range is not inside the window, or the window holds no page.
    #[error("{0} is outside the window of device addresses")]
    OutOfWindow(IovaRange),
    /// An address or length is zero or not a multiple of the page size, or an alignment is not a power of two.
    #[error("address, length or alignment does not fit the page size {0:#x}")]
    Misaligned(u64),
    /// No memory for bookkeeping.
    #[error("out of memory")]
    OutOfMemory,
}

impl From<OutOfMemory> for IovaError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}
