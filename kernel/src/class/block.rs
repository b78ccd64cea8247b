//! Disks.

use super::Failure;
use crate::disk::Extent;
use alloc::{sync::Arc, vec::Vec};
use base::Deadline;
use dma::{Attachment, FromDevice};

/// A disk that can be read.
pub trait BlockDevice: Send + Sync {
    /// Gives the bus master that moves the bytes: what it is to write to has to be attached to it.
    fn device(&self) -> &dma::Device;

    /// Gives the size of a block in bytes, a power of two.
    fn block_size(&self) -> u32;

    /// Gives the number of blocks.
    fn blocks(&self) -> u64;

    /// Gives the most bytes that one request to the device moves; at least a block.
    fn max_transfer(&self) -> u64;

    /// Has the device write blocks into memory, and sleeps until all of them are there. Pieces larger than
    /// [`max_transfer`](Self::max_transfer) become several requests; requests are in flight together.
    ///
    /// # Errors
    ///
    /// The first failure, after which no request is outstanding any more: blocks outside the disk, pieces outside the memory,
    /// memory that another device has, what the device reports, or the deadline.
    fn read(&self, pieces: &[Piece], into: &Arc<Attachment<FromDevice>>, deadline: Deadline) -> Result<(), Failure>;
}

/// Blocks of a disk, and where in memory they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First block.
    pub first: u64,
    /// Number of blocks, at least 1.
    pub blocks: u64,
    /// Byte offset in the memory.
    pub offset: u64,
}

/// Lines up the extents of a file one after the other from byte 0 on; gives the pieces and the bytes they take.
///
/// `None`: the heap is full, or there are more bytes than can be counted.
pub fn pieces(extents: &[Extent], block_size: u32) -> Option<(Vec<Piece>, u64)> {
    let (mut pieces, mut offset) = (Vec::new(), 0u64);
    pieces.try_reserve_exact(extents.len()).ok()?;
    for &Extent { lba, sectors } in extents {
        pieces.push(Piece { first: lba, blocks: sectors, offset });
        offset = offset.checked_add(sectors.checked_mul(block_size.into())?)?;
    }
    Some((pieces, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_lined_up_without_gaps() {
        let extents = [Extent { lba: 100, sectors: 3 }, Extent { lba: 7, sectors: 1 }];
        let expected = [Piece { first: 100, blocks: 3, offset: 0 }, Piece { first: 7, blocks: 1, offset: 1536 }];
        assert_eq!(pieces(&extents, 512), Some((expected.to_vec(), 2048)));
        assert_eq!(pieces(&[Extent { lba: 0, sectors: u64::MAX }], 512), None);
    }
}
