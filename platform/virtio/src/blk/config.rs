//! What a disk says of itself, and whether that can be.

use crate::Error;
use crate::queue::MAX_PIECE;
use crate::spec::blk::{SECTOR_SIZE, config, feature};
use crate::transport::{Transport, read_config};
use base::Deadline;

/// The largest block size that is believed, in bytes.
pub const MAX_BLOCK_SIZE: u32 = 64 * 1024;

/// A disk's size and limits, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in sectors of 512 bytes; as bytes it fits 64 bits.
    pub sectors: u64,
    /// Bytes of a block: a power of two, at least 512. Transfers consist of whole blocks.
    pub block_size: u32,
    /// Bytes of the largest piece of memory in a request, at least 512.
    pub max_segment: u32,
    /// The most pieces of memory in a request, at least 1.
    pub max_segments: u32,
    /// Whether it takes no writes.
    pub read_only: bool,
    /// Whether it has a volatile cache, so that writes are durable only after a flush.
    pub flush: bool,
}

/// Reads and judges the configuration.
pub(super) fn read(transport: &dyn Transport, features: u64, deadline: Deadline) -> Result<Geometry, Error> {
    let has = |bit| features & bit != 0;
    read_config(transport, deadline, |field| {
        let low = u64::from(field(config::CAPACITY)?);
        let sectors = low | u64::from(field(config::CAPACITY + 4)?) << 32;
        if sectors.checked_mul(SECTOR_SIZE).is_none() {
            return Err(Error::BadConfig { field: "capacity", value: sectors });
        }
        let block_size = if has(feature::BLK_SIZE) { field(config::BLK_SIZE)? } else { SECTOR_SIZE as u32 };
        if !block_size.is_power_of_two() || !(SECTOR_SIZE as u32..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(Error::BadConfig { field: "blk_size", value: block_size.into() });
        }
        let max_segment = if has(feature::SIZE_MAX) { field(config::SIZE_MAX)? } else { MAX_PIECE };
        if u64::from(max_segment) < SECTOR_SIZE {
            return Err(Error::BadConfig { field: "size_max", value: max_segment.into() });
        }
        // Without the field, one segment is all that a device must take.
        let max_segments = if has(feature::SEG_MAX) { field(config::SEG_MAX)? } else { 1 };
        if max_segments == 0 {
            return Err(Error::BadConfig { field: "seg_max", value: 0 });
        }
        let (read_only, flush) = (has(feature::RO), has(feature::FLUSH));
        Ok(Geometry { sectors, block_size, max_segment, max_segments, read_only, flush })
    })
}
