//! The IOMMU device \[5.13\].

/// Feature bits \[5.13.3\], as masks.
pub mod feature {
    /// `input_range` limits the virtual addresses.
    pub const INPUT_RANGE: u64 = 1 << 0;
    /// `domain_range` limits the domain identifiers.
    pub const DOMAIN_RANGE: u64 = 1 << 1;
    /// `MAP` and `UNMAP` requests.
    pub const MAP_UNMAP: u64 = 1 << 2;
    /// Endpoints that are not attached bypass the IOMMU. (Not to be accepted: without it they are blocked.)
    pub const BYPASS: u64 = 1 << 3;
    /// `PROBE` requests.
    pub const PROBE: u64 = 1 << 4;
    /// The `MMIO` flag of mappings.
    pub const MMIO: u64 = 1 << 5;
    /// The `bypass` field of the configuration, and the `BYPASS` flag of `ATTACH`.
    pub const BYPASS_CONFIG: u64 = 1 << 6;
}

/// Virtqueues \[5.13.2\].
pub mod queue {
    /// Requests.
    pub const REQUEST: u16 = 0;
    /// Buffers for events.
    pub const EVENT: u16 = 1;
}

/// Byte offsets in `struct virtio_iommu_config` \[5.13.4\].
pub mod config {
    /// `page_size_mask`, 64 bits.
    pub const PAGE_SIZE_MASK: usize = 0;
    /// `input_range.start`, 64 bits.
    pub const INPUT_START: usize = 8;
    /// `input_range.end`, 64 bits, inclusive.
    pub const INPUT_END: usize = 16;
    /// `domain_range.start`, 32 bits.
    pub const DOMAIN_START: usize = 24;
    /// `domain_range.end`, 32 bits, inclusive.
    pub const DOMAIN_END: usize = 28;
    /// `probe_size`, 32 bits.
    pub const PROBE_SIZE: usize = 32;
    /// `bypass`, 8 bits.
    pub const BYPASS: usize = 36;
}

/// `type` of a request \[5.13.6\].
pub mod request {
    /// `VIRTIO_IOMMU_T_ATTACH`.
    pub const ATTACH: u8 = 1;
    /// `VIRTIO_IOMMU_T_DETACH`.
    pub const DETACH: u8 = 2;
    /// `VIRTIO_IOMMU_T_MAP`.
    pub const MAP: u8 = 3;
    /// `VIRTIO_IOMMU_T_UNMAP`.
    pub const UNMAP: u8 = 4;
    /// `VIRTIO_IOMMU_T_PROBE`.
    pub const PROBE: u8 = 5;
}

/// Bytes that the device reads of each request: `struct virtio_iommu_req_*` without its tail.
pub mod size {
    /// `ATTACH`: head, domain, endpoint, flags, reserved.
    pub const ATTACH: usize = 20;
    /// `DETACH`: head, domain, endpoint, reserved.
    pub const DETACH: usize = 20;
    /// `MAP`: head, domain, `virt_start`, `virt_end`, `phys_start`, flags.
    pub const MAP: usize = 36;
    /// `UNMAP`: head, domain, `virt_start`, `virt_end`, reserved.
    pub const UNMAP: usize = 28;
    /// `PROBE`: head, endpoint, reserved.
    pub const PROBE: usize = 72;
    /// The largest of them.
    pub const LARGEST: usize = PROBE;
    /// `struct virtio_iommu_req_tail`: status, reserved.
    pub const TAIL: usize = 4;
    /// `struct virtio_iommu_fault`.
    pub const FAULT: usize = 24;
}

/// `status` in the tail of a request \[5.13.6.2\].
pub mod status {
    /// All good.
    pub const OK: u8 = 0;
    /// `VIRTIO_IOMMU_S_IOERR`.
    pub const IOERR: u8 = 1;
    /// Unsupported request.
    pub const UNSUPP: u8 = 2;
    /// Internal device error.
    pub const DEVERR: u8 = 3;
    /// Invalid parameters.
    pub const INVAL: u8 = 4;
    /// Out of range.
    pub const RANGE: u8 = 5;
    /// No such domain or endpoint.
    pub const NOENT: u8 = 6;
    /// Bad address.
    pub const FAULT: u8 = 7;
    /// Insufficient resources.
    pub const NOMEM: u8 = 8;
}

/// `flags` of `ATTACH`: the domain does not translate.
pub const ATTACH_F_BYPASS: u32 = 1;

/// `flags` of `MAP` \[5.13.6.5\].
pub mod map_flag {
    /// Readable.
    pub const READ: u32 = 1;
    /// Writable.
    pub const WRITE: u32 = 2;
    /// Registers, not memory.
    pub const MMIO: u32 = 4;
}

/// Properties of an endpoint \[5.13.6.7\].
pub mod property {
    /// What of the type counts.
    pub const TYPE_MASK: u16 = 0xfff;
    /// The end of the list.
    pub const NONE: u16 = 0;
    /// A reserved region: head, subtype, three bytes, start, end (inclusive).
    pub const RESV_MEM: u16 = 1;
    /// Bytes of the head: type, length of what follows.
    pub const HEAD: usize = 4;
    /// Bytes of a reserved region after its head.
    pub const RESV_MEM_LEN: usize = 20;
    /// Subtype: must not be used.
    pub const RESV_MEM_RESERVED: u8 = 0;
    /// Subtype: writes become interrupts, without a mapping.
    pub const RESV_MEM_MSI: u8 = 1;
}

/// `struct virtio_iommu_fault` \[5.13.6.9\]: reason, three bytes, flags (32 bits), endpoint (32), reserved (32), address (64).
pub mod fault {
    /// No reason that has a name.
    pub const R_UNKNOWN: u8 = 0;
    /// The endpoint is not attached to a domain.
    pub const R_DOMAIN: u8 = 1;
    /// The address is not mapped, or not for this access.
    pub const R_MAPPING: u8 = 2;
    /// Byte offset of the flags.
    pub const FLAGS: usize = 4;
    /// Byte offset of the endpoint.
    pub const ENDPOINT: usize = 8;
    /// Byte offset of the address.
    pub const ADDRESS: usize = 16;
    /// The access was a read.
    pub const F_READ: u32 = 1;
    /// The access was a write.
    pub const F_WRITE: u32 = 2;
    /// `address` is valid.
    pub const F_ADDRESS: u32 = 1 << 8;
}
