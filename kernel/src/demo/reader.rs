//! Reading metadata: a few pages lent to the disk for good, copied out by the CPU.

use super::{Failure, STEP_MILLIS};
use crate::class::Disk;
use crate::disk::{ReadError, SectorRead};
use alloc::sync::Arc;
use base::{Deadline, block_on};
use core::fmt::Display;
use dma::{FromDevice, Mapped, Pages};

/// Bytes of the window. A filesystem asks for 4 KiB at most, or for one sector.
const WINDOW: u64 = 64 << 10;

/// Reads sectors of a disk by DMA into a window of its own, and copies them from there.
pub(super) struct Reader<'a, D> {
    disk: &'a D,
    window: Arc<Mapped<FromDevice, Pages>>,
    /// Bytes read so far.
    pub bytes: u64,
}

impl<'a, D: Disk> Reader<'a, D> {
    /// Lends a window to the disk.
    pub fn new(disk: &'a D) -> Result<Self, Failure> {
        let pages = disk.device().pages(WINDOW).map_err(Failure::dma)?;
        let window = disk.device().map(pages).map_err(|rejected| Failure::dma(rejected.error))?;
        Ok(Self { disk, window: Arc::new(window), bytes: 0 })
    }

    /// Takes the window back.
    pub fn finish(self) -> Result<u64, Failure> {
        match Arc::try_unwrap(self.window) {
            Ok(window) => window.unmap().map_err(Failure::dma)?,
            // A transfer that failed to end keeps its loan.
            Err(_) => return Err(Failure::disk("a transfer has not ended")),
        };
        Ok(self.bytes)
    }

    fn fetch(&mut self, lba: u64, len: u64) -> Result<(), ReadError> {
        let failed = |error: &dyn Display| {
            log::warn!("{}: block {lba}: {error}", self.disk.device().name());
            ReadError { lba }
        };
        let deadline = Deadline::after_millis(STEP_MILLIS);
        self.disk.wait_for_room(deadline).map_err(|error| failed(&error))?;
        let transfer = self.disk.read(lba, &self.window, 0..len).map_err(|error| failed(&error))?;
        block_on(deadline, transfer).map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }
}

impl<D: Disk> SectorRead for Reader<'_, D> {
    fn sector_size(&self) -> usize {
        self.disk.block_size() as usize
    }

    fn sectors(&self) -> u64 {
        self.disk.blocks()
    }

    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let failed = ReadError { lba };
        if buf.len() as u64 > WINDOW {
            return Err(failed);
        }
        self.fetch(lba, buf.len() as u64)?;
        self.window.sync_for_cpu(0, buf.len() as u64).map_err(|_| failed)?;
        self.window.view().read(0, buf).map_err(|_| failed)?;
        self.bytes += buf.len() as u64;
        Ok(())
    }
}
