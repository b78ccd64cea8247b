//! Constants and layouts, with the names of "Virtual I/O Device (VIRTIO) Version 1.2" (section numbers in brackets). Only
//! definitions; all multi-byte fields are little-endian.

pub mod blk;
pub mod gpu;
pub mod iommu;
pub mod pci;
pub mod queue;

/// Device types \[5\].
pub mod device_type {
    /// Block device.
    pub const BLOCK: u16 = 2;
    /// GPU device.
    pub const GPU: u16 = 16;
    /// IOMMU device.
    pub const IOMMU: u16 = 23;
}

/// The device status field \[2.1\].
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that it cannot recover from.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 128;
}

/// Feature bits that belong to no device type \[6\], as masks.
pub mod feature {
    /// Descriptors may refer to tables of descriptors \[2.7.5.3\].
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` \[2.7.7, 2.7.10\].
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device's accesses go the way of the platform's other bus masters: through the IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// The device needs the ordering that the platform's bus masters need (full barriers, which this driver always uses).
    pub const ORDER_PLATFORM: u64 = 1 << 36;
}
