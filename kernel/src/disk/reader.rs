//! Reading small pieces of a disk through a window of a few sectors.

use super::error::Error;
use alloc::vec::Vec;

/// Reads whole sectors of a disk.
pub trait SectorRead {
    /// Gives the size of a sector in bytes.
    fn sector_size(&self) -> usize;

    /// Gives the number of sectors.
    fn sectors(&self) -> u64;

    /// Reads as many sectors as `buf` has room for (a whole number) from sector `lba` on.
    ///
    /// # Errors
    ///
    /// If the device fails, or there are no such sectors.
    fn read(&mut self, lba: u64, buf: &mut [u8]) -> Result<(), ReadError>;
}

/// A device did not give a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk could not read sector {lba}")]
pub struct ReadError {
    /// The first sector asked for.
    pub lba: u64,
}

/// Consecutive sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub lba: u64,
    /// Number of sectors, never 0.
    pub sectors: u64,
}

/// Bytes that a window has room for, unless a sector is larger.
const WINDOW: usize = 4096;

/// The sectors last read.
pub(super) struct Window {
    sector_size: usize,
    sectors: u64,
    /// First sector in `bytes`, if there is something in it.
    first: Option<u64>,
    bytes: Vec<u8>,
}

impl Window {
    /// Makes an empty window onto `device`.
    pub fn new(device: &dyn SectorRead) -> Result<Self, Error> {
        let (sector_size, sectors) = (device.sector_size(), device.sectors());
        if !sector_size.is_power_of_two() || !(512..=1 << 16).contains(&sector_size) {
            return Err(Error::SectorSize(sector_size));
        }
        // From here on, the byte offset of a sector that the disk has does not overflow.
        sectors.checked_mul(sector_size as u64).ok_or(Error::Capacity(sectors))?;
        let mut bytes = Vec::new();
        let size = WINDOW.max(sector_size);
        bytes.try_reserve_exact(size).map_err(|_| Error::OutOfMemory)?;
        bytes.resize(size, 0);
        Ok(Self { sector_size, sectors, first: None, bytes })
    }

    /// Copies what is at byte `offset` of the disk.
    pub fn read(&mut self, device: &mut dyn SectorRead, mut offset: u64, mut to: &mut [u8]) -> Result<(), Error> {
        while !to.is_empty() {
            let here = self.at(device, offset)?;
            let count = here.len().min(to.len());
            let (now, later) = to.split_at_mut(count);
            now.copy_from_slice(here.get(..count).ok_or(Error::OutOfMemory)?);
            to = later;
            offset += count as u64;
        }
        Ok(())
    }

    /// Gives what is at byte `offset` of the disk, at least one byte.
    fn at(&mut self, device: &mut dyn SectorRead, offset: u64) -> Result<&[u8], Error> {
        let lba = offset / self.sector_size as u64;
        if lba >= self.sectors {
            return Err(ReadError { lba }.into());
        }
        let in_window = (self.bytes.len() / self.sector_size) as u64;
        let first = lba - lba % in_window;
        let used = usize::try_from((self.sectors - first).min(in_window)).unwrap_or(1) * self.sector_size;
        let bytes = self.bytes.get_mut(..used).ok_or(ReadError { lba })?;
        if self.first != Some(first) {
            self.first = None;
            device.read(first, bytes)?;
            self.first = Some(first);
        }
        let start = offset - first * self.sector_size as u64;
        Ok(bytes.get(start as usize..).ok_or(ReadError { lba })?)
    }
}
