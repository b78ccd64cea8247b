//! The GPU device \[5.7\].

/// Feature bits \[5.7.3\], as masks.
pub mod feature {
    /// The device tells EDIDs.
    pub const EDID: u64 = 1 << 1;
}

/// Byte offsets in the configuration \[5.7.4\].
pub mod config {
    /// Pending events.
    pub const EVENTS_READ: usize = 0;
    /// Write to clear events.
    pub const EVENTS_CLEAR: usize = 4;
    /// Number of scanouts, 1 to 16.
    pub const NUM_SCANOUTS: usize = 8;
}

/// Event: the display configuration has changed.
pub const EVENT_DISPLAY: u32 = 1;

/// Queue numbers \[5.7.2\].
pub const CONTROL_QUEUE: u16 = 0;

/// The most scanouts a device has.
pub const MAX_SCANOUTS: usize = 16;
/// The most entries of a backing that devices take (the limit of common implementations).
pub const MAX_BACKING_ENTRIES: usize = 16384;
/// Bytes of `struct virtio_gpu_ctrl_hdr`: type, flags, fence (64 bits), context, ring index, padding.
pub const CTRL_HDR_SIZE: usize = 24;
/// Bytes of `struct virtio_gpu_mem_entry`: address (64 bits), length, padding.
pub const MEM_ENTRY_SIZE: usize = 16;
/// Bytes of `struct virtio_gpu_resp_display_info`.
pub const DISPLAY_INFO_SIZE: usize = CTRL_HDR_SIZE + MAX_SCANOUTS * 24;
/// Bytes of the largest EDID.
pub const EDID_MAX: usize = 1024;
/// Bytes of `struct virtio_gpu_resp_edid`.
pub const RESP_EDID_SIZE: usize = CTRL_HDR_SIZE + 8 + EDID_MAX;

/// Header flag: the answer comes when the command is complete, and repeats the fence.
pub const FLAG_FENCE: u32 = 1;

/// Commands \[5.7.6.7\].
pub mod command {
    /// `VIRTIO_GPU_CMD_GET_DISPLAY_INFO`
    pub const GET_DISPLAY_INFO: u32 = 0x0100;
    /// `VIRTIO_GPU_CMD_RESOURCE_CREATE_2D`
    pub const RESOURCE_CREATE_2D: u32 = 0x0101;
    /// `VIRTIO_GPU_CMD_RESOURCE_UNREF`
    pub const RESOURCE_UNREF: u32 = 0x0102;
    /// `VIRTIO_GPU_CMD_SET_SCANOUT`
    pub const SET_SCANOUT: u32 = 0x0103;
    /// `VIRTIO_GPU_CMD_RESOURCE_FLUSH`
    pub const RESOURCE_FLUSH: u32 = 0x0104;
    /// `VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D`
    pub const TRANSFER_TO_HOST_2D: u32 = 0x0105;
    /// `VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING`
    pub const RESOURCE_ATTACH_BACKING: u32 = 0x0106;
    /// `VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING`
    pub const RESOURCE_DETACH_BACKING: u32 = 0x0107;
    /// `VIRTIO_GPU_CMD_GET_EDID`
    pub const GET_EDID: u32 = 0x010a;
}

/// Responses \[5.7.6.7\].
pub mod response {
    /// `VIRTIO_GPU_RESP_OK_NODATA`
    pub const OK_NODATA: u32 = 0x1100;
    /// `VIRTIO_GPU_RESP_OK_DISPLAY_INFO`
    pub const OK_DISPLAY_INFO: u32 = 0x1101;
    /// `VIRTIO_GPU_RESP_OK_EDID`
    pub const OK_EDID: u32 = 0x1104;
    /// `VIRTIO_GPU_RESP_ERR_UNSPEC`
    pub const ERR_UNSPEC: u32 = 0x1200;
    /// `VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY`
    pub const ERR_OUT_OF_MEMORY: u32 = 0x1201;
    /// `VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID`
    pub const ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
    /// `VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID`
    pub const ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
    /// `VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID`
    pub const ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
    /// `VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER`
    pub const ERR_INVALID_PARAMETER: u32 = 0x1205;
}

/// Pixel formats \[5.7.6.7\]; the name gives the order of the bytes in memory. All have four bytes a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Format {
    /// Blue, green, red, alpha.
    B8G8R8A8 = 1,
    /// Blue, green, red, ignored: what a 32-bit BMP holds.
    B8G8R8X8 = 2,
    /// Alpha, red, green, blue.
    A8R8G8B8 = 3,
    /// Ignored, red, green, blue.
    X8R8G8B8 = 4,
    /// Red, green, blue, alpha.
    R8G8B8A8 = 67,
    /// Ignored, blue, green, red.
    X8B8G8R8 = 68,
    /// Alpha, blue, green, red.
    A8B8G8R8 = 121,
    /// Red, green, blue, ignored.
    R8G8B8X8 = 134,
}

/// Bytes of a pixel in every [`Format`].
pub const BYTES_PER_PIXEL: u32 = 4;
