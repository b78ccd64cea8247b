//! Reading a disk's tables and directories: small pieces, copied out by the processor.

use super::{BlockDevice, Failure, Piece};
use crate::disk::{ReadError, SectorRead};
use alloc::sync::Arc;
use base::Deadline;
use core::time::Duration;
use dma::{CpuReads, FromDevice, Ladder, SharedBuffer};

/// Bytes of the buffer, unless a block is larger.
const BUFFER: u64 = 4096;

/// A disk as [`disk`](crate::disk) reads it. The disk has the buffer only while it fills it.
pub struct Metadata<'a> {
    disk: &'a dyn BlockDevice,
    buffer: SharedBuffer,
    patience: Duration,
    copied: u64,
    failure: Option<Failure>,
}

impl<'a> Metadata<'a> {
    /// Gets a buffer for `disk`. Each read may take as long as `patience`.
    ///
    /// # Errors
    ///
    /// If there is no memory for the buffer.
    pub fn new(disk: &'a dyn BlockDevice, patience: Duration) -> Result<Self, Failure> {
        let pages = disk.device().page_set(BUFFER.max(disk.block_size().into()), Ladder::SINGLE_PAGES)?;
        Ok(Self { disk, buffer: SharedBuffer::new("metadata", pages), patience, copied: 0, failure: None })
    }

    /// Gives the bytes copied by the processor so far.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Gives what was wrong when a read failed last, once.
    pub fn take_failure(&mut self) -> Option<Failure> {
        self.failure.take()
    }

    /// Reads into the buffer, and copies from there.
    fn fill(&self, first: u64, to: &mut [u8]) -> Result<(), Failure> {
        let blocks = to.len() as u64 / u64::from(self.disk.block_size());
        let attachment = Arc::new(self.buffer.attach::<FromDevice>(self.disk.device())?);
        self.disk.read(&[Piece { first, blocks, offset: 0 }], &attachment, Deadline::after(self.patience))?;
        match Arc::into_inner(attachment) {
            Some(attachment) => attachment.detach()?,
            None => return Err("the driver still has the buffer of a read that is over".into()),
        }
        self.buffer.cpu_access::<CpuReads>()?.read_at(0, to)?;
        Ok(())
    }
}

impl SectorRead for Metadata<'_> {
    fn sector_size(&self) -> usize {
        self.disk.block_size() as usize
    }

    fn sectors(&self) -> u64 {
        self.disk.blocks()
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let block = self.sector_size().max(1);
        if !buf.len().is_multiple_of(block) {
            self.failure = Some("a read that is not of whole blocks".into());
            return Err(ReadError { lba });
        }
        // Whole blocks, as many as the buffer has room for.
        let room = (self.buffer.len() as usize / block).max(1) * block;
        let mut at = lba;
        for part in buf.chunks_mut(room) {
            self.fill(at, part).map_err(|failure| {
                self.failure = Some(failure);
                ReadError { lba: at }
            })?;
            self.copied += part.len() as u64;
            at += (part.len() / block) as u64;
        }
        Ok(())
    }
}
