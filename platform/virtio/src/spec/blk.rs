//! The block device \[5.2\].

/// Feature bits \[5.2.3\], as masks.
pub mod feature {
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The device takes flushes.
    pub const FLUSH: u64 = 1 << 9;
}

/// Byte offsets in the configuration \[5.2.4\].
pub mod config {
    /// Capacity in sectors of 512 bytes, 64 bits.
    pub const CAPACITY: usize = 0;
    /// Largest segment in bytes, 32 bits.
    pub const SIZE_MAX: usize = 8;
    /// Most segments of a request, 32 bits.
    pub const SEG_MAX: usize = 12;
    /// Block size in bytes, 32 bits.
    pub const BLK_SIZE: usize = 20;
}

/// Request types \[5.2.6\].
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Get the device's identification string.
    pub const GET_ID: u32 = 8;
}

/// Status bytes \[5.2.6\].
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// The device does not know this request.
    pub const UNSUPP: u8 = 2;
}

/// Bytes of a sector, whatever the block size.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of a request's header: type (32 bits), reserved (32), sector (64).
pub const HEADER_SIZE: usize = 16;
/// Bytes of the identification string.
pub const ID_SIZE: usize = 20;
