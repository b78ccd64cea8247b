//! What can go wrong with a virtio device.

use crate::gpu::ResponseCode;

/// How a device broke the rules of its queue. The queue is then out of use until the device has been reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misbehaviour {
    /// The used ring's index moved by more than there are requests in flight.
    #[error("its used index moved by {moved} with {in_flight} requests in flight")]
    UsedIndexJumped {
        /// Entries that the index claims.
        moved: u16,
        /// Requests that the device had.
        in_flight: u16,
    },
    /// It returned a request that is not one.
    #[error("it returned descriptor {0}, which is not in the table")]
    NoSuchDescriptor(u32),
    /// It returned a request that it did not have, or not any more.
    #[error("it returned descriptor {0}, which it did not have")]
    NotInFlight(u16),
}

/// An error of a virtio device or its driver.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A capability that virtio over PCI needs is not there.
    #[error("the {0} capability is missing")]
    MissingCapability(&'static str),
    /// A capability is malformed.
    #[error("the {name} capability is malformed: {what}")]
    BadCapability {
        /// Which.
        name: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The function is not the virtio device that the driver is for.
    #[error("expected virtio device type {expected}, found {found}")]
    WrongDevice {
        /// The driver's type.
        expected: u16,
        /// The device's.
        found: u16,
    },
    /// The device does not offer `VIRTIO_F_VERSION_1`.
    #[error("the device is a legacy device")]
    Legacy,
    /// The device does not offer `VIRTIO_F_ACCESS_PLATFORM` although it is behind an IOMMU: its accesses would go around it.
    #[error("the device would go around the IOMMU (it does not offer VIRTIO_F_ACCESS_PLATFORM)")]
    BypassesIommu,
    /// The device took back `FEATURES_OK`.
    #[error("the device does not accept the features {0:#x}")]
    FeaturesRefused(u64),
    /// The device did not finish a reset in time.
    #[error("the device did not finish its reset in time")]
    ResetTimedOut,
    /// The device has no such queue.
    #[error("the device has no queue {0}")]
    NoSuchQueue(u16),
    /// The size of a queue is not possible.
    #[error("queue {queue} cannot have {size} entries")]
    BadQueueSize {
        /// Which.
        queue: u16,
        /// The device's or the driver's number.
        size: u16,
    },
    /// The notification register of a queue lies outside the notification window.
    #[error("the notification offset {offset} of queue {queue} is outside its window")]
    BadNotifyOffset {
        /// Which.
        queue: u16,
        /// The device's number.
        offset: u16,
    },
    /// The device did not take an MSI-X vector.
    #[error("the device did not take MSI-X vector {0}")]
    NoVector(u16),
    /// The configuration kept changing while it was read.
    #[error("the device's configuration does not come to rest")]
    ConfigUnstable,
    /// A field of the configuration makes no sense.
    #[error("the device's configuration has {field} = {value:#x}")]
    BadConfig {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// All descriptors are in use.
    #[error("the queue is full")]
    QueueFull,
    /// A request consists of more pieces than the device takes.
    #[error("the request has {count} segments, the device takes {max}")]
    TooManySegments {
        /// The request's.
        count: usize,
        /// The most.
        max: usize,
    },
    /// A request is longer than a device can be told.
    #[error("the request is longer than the device can be told")]
    TooLong,
    /// The memory is lent to another device.
    #[error("the memory is lent to another device")]
    ForeignDevice,
    /// The loan does not allow the device what the request needs.
    #[error("the loan does not let the device {0} the memory")]
    WrongDirection(&'static str),
    /// The range does not lie in the loan.
    #[error("bytes {offset:#x}+{len:#x} are not inside the loan of {loan:#x} bytes")]
    OutsideLoan {
        /// Where the range starts.
        offset: u64,
        /// Its length.
        len: u64,
        /// The loan's length.
        loan: u64,
    },
    /// The device broke the rules of its queue; the queue is out of use and keeps the loans until the device has been reset.
    #[error("the device misbehaved: {what}")]
    DeviceMisbehaved {
        /// How.
        what: Misbehaviour,
    },
    /// The device says that it needs a reset, or has reset itself.
    #[error("the device has failed and needs a reset")]
    NeedsReset,
    /// The driver has been shut down, or is being.
    #[error("the device has been shut down")]
    ShutDown,
    /// The deadline passed first. The request stays in flight.
    #[error("the device did not answer in time")]
    TimedOut,
    /// The result of this request has been taken before.
    #[error("the result of this request has been taken already")]
    AlreadyTaken,
    /// No memory for the driver's own bookkeeping.
    #[error("out of memory")]
    OutOfMemory,
    /// The DMA-API refused.
    #[error(transparent)]
    Dma(#[from] dma::Error),

    /// A write to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The sectors do not lie on the disk.
    #[error("sectors {sector}+{count} are not on the disk of {capacity} sectors")]
    OutsideDisk {
        /// The first.
        sector: u64,
        /// How many.
        count: u64,
        /// The disk's size.
        capacity: u64,
    },
    /// A transfer does not start at or consist of whole blocks.
    #[error("the transfer does not consist of whole blocks of {block} bytes")]
    Misaligned {
        /// Block size in bytes.
        block: u64,
    },
    /// The disk reports an I/O error.
    #[error("the disk reports an I/O error")]
    Io,
    /// The disk does not know the request.
    #[error("the disk does not support the request")]
    Unsupported,
    /// The disk reports a status that does not exist.
    #[error("the disk reports the unknown status {0:#x}")]
    BadStatus(u8),
    /// The device claims success, yet wrote less than that means.
    #[error("the device wrote {found} bytes where {expected} were due")]
    ShortAnswer {
        /// Due.
        expected: u32,
        /// Written.
        found: u32,
    },

    /// The GPU refused a command.
    #[error("the GPU refused {command}: {code}")]
    Gpu {
        /// Which.
        command: &'static str,
        /// Its answer.
        code: ResponseCode,
    },
    /// The GPU's answer does not belong to the command.
    #[error("the GPU answered {command} with {found:#x}, which is no answer to it")]
    BadResponse {
        /// Which.
        command: &'static str,
        /// The type of the answer.
        found: u32,
    },
    /// The GPU's answer does not repeat the fence.
    #[error("the GPU signalled fence {found} instead of {expected}")]
    BadFence {
        /// Asked for.
        expected: u64,
        /// In the answer; 0 if it was not marked as fenced at all.
        found: u64,
    },
    /// The GPU has no such scanout.
    #[error("the GPU has no scanout {0}")]
    NoSuchScanout(u32),
    /// The GPU has no EDID for us.
    #[error("the GPU does not tell EDIDs")]
    NoEdid,
    /// A picture's size makes no sense.
    #[error("{width}x{height} is not the size of a picture")]
    BadSize {
        /// Pixels of a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// A rectangle is not inside the picture.
    #[error("the rectangle is not inside the picture")]
    OutsidePicture,
    /// The backing has fewer bytes than the picture.
    #[error("the backing has {found:#x} bytes, the picture needs {needed:#x}")]
    BackingTooSmall {
        /// Needed.
        needed: u64,
        /// There.
        found: u64,
    },
    /// The device lacks a feature without which its driver cannot work.
    #[error("the device does not offer {0}")]
    MissingFeature(&'static str),
    /// The IOMMU goes on letting endpoints that are attached to nothing reach all of memory.
    #[error("the IOMMU cannot be made to block what is attached to nothing (its bypass field stays {0})")]
    BypassStuck(u8),

    /// All resource identifiers have been used.
    #[error("the GPU's resource identifiers are used up")]
    OutOfIds,
}
