//! Virtio over PCI \[4.1\].

/// PCI vendor of virtio devices \[4.1.2\].
pub const VENDOR_ID: u16 = 0x1af4;
/// A modern device's PCI device ID is this plus its virtio device type.
pub const DEVICE_ID_BASE: u16 = 0x1040;
/// The PCI capability ID of virtio's capabilities ("vendor-specific") \[4.1.4\].
pub const CAP_VENDOR: u8 = 0x09;

/// Byte offsets in `struct virtio_pci_cap` \[4.1.4\].
pub mod cap {
    /// `cap_len`: bytes of the capability.
    pub const LEN: u16 = 2;
    /// `cfg_type`: one of [`super::cfg_type`].
    pub const CFG_TYPE: u16 = 3;
    /// `bar`: which BAR.
    pub const BAR: u16 = 4;
    /// `offset`: where in the BAR.
    pub const OFFSET: u16 = 8;
    /// `length`: how much of the BAR.
    pub const LENGTH: u16 = 12;
    /// `notify_off_multiplier`, in the notification capability only.
    pub const NOTIFY_OFF_MULTIPLIER: u16 = 16;
    /// Bytes of `struct virtio_pci_cap`.
    pub const SIZE: u8 = 16;
    /// Bytes of `struct virtio_pci_notify_cap`.
    pub const NOTIFY_SIZE: u8 = 20;
}

/// `cfg_type` \[4.1.4\].
pub mod cfg_type {
    /// Common configuration.
    pub const COMMON: u8 = 1;
    /// Notifications.
    pub const NOTIFY: u8 = 2;
    /// ISR status.
    pub const ISR: u8 = 3;
    /// Device-specific configuration.
    pub const DEVICE: u8 = 4;
}

/// Bits of the ISR status \[4.1.4.5\].
pub mod isr {
    /// A queue has used entries.
    pub const QUEUE: u8 = 1;
    /// The configuration has changed.
    pub const CONFIG: u8 = 2;
}

/// Byte offsets in `struct virtio_pci_common_cfg` \[4.1.4.3\].
pub mod common {
    /// Which half of the device's features to read.
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    /// The selected half.
    pub const DEVICE_FEATURE: usize = 4;
    /// Which half of the driver's features to write.
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    /// The selected half.
    pub const DRIVER_FEATURE: usize = 12;
    /// MSI-X vector of configuration changes.
    pub const CONFIG_MSIX_VECTOR: usize = 16;
    /// Number of queues.
    pub const NUM_QUEUES: usize = 18;
    /// Device status.
    pub const DEVICE_STATUS: usize = 20;
    /// Changes with every change of the configuration.
    pub const CONFIG_GENERATION: usize = 21;
    /// Which queue the following fields are about.
    pub const QUEUE_SELECT: usize = 22;
    /// Entries of the queue.
    pub const QUEUE_SIZE: usize = 24;
    /// MSI-X vector of the queue.
    pub const QUEUE_MSIX_VECTOR: usize = 26;
    /// Whether the queue is on.
    pub const QUEUE_ENABLE: usize = 28;
    /// Where to notify the queue, in units of the multiplier.
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    /// Descriptor area, 64 bits.
    pub const QUEUE_DESC: usize = 32;
    /// Driver area (available ring), 64 bits.
    pub const QUEUE_DRIVER: usize = 40;
    /// Device area (used ring), 64 bits.
    pub const QUEUE_DEVICE: usize = 48;
    /// Bytes up to here; later versions append fields that this driver does not use.
    pub const SIZE: usize = 56;
}

/// No MSI-X vector; also what a device answers when it could not take one \[4.1.5.1.2\].
pub const NO_VECTOR: u16 = 0xffff;
