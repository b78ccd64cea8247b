//! How a disk is divided.

use super::error::Error;
use super::fat::is_fat;
use super::reader::{SectorRead, Window};
use super::{gpt, mbr};
use alloc::{string::String, vec::Vec};

/// How a disk is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// By a GPT; its primary header was good.
    Gpt,
    /// By a GPT whose primary header, or its entries, are damaged; the backup was good.
    GptBackup,
    /// By an MBR.
    Mbr,
    /// Not at all: one filesystem fills the disk.
    Whole,
}

/// A disk's partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// How the disk is divided.
    pub kind: TableKind,
    /// The partitions that are in use, all inside the disk, none overlapping another.
    pub partitions: Vec<Partition>,
}

/// Part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number in the table, from 1; 0 for the whole disk.
    pub number: u32,
    /// First sector.
    pub first: u64,
    /// Number of sectors, never 0.
    pub sectors: u64,
    /// Its name; empty where the table has none.
    pub name: String,
}

impl Table {
    /// Reads a disk's partition table: GPT, MBR, or the whole disk as one partition if it begins with a FAT filesystem.
    ///
    /// # Errors
    ///
    /// If the disk cannot be read, is blank, or its table is damaged.
    pub fn read(device: &mut dyn SectorRead) -> Result<Self, Error> {
        let mut window = Window::new(device)?;
        if device.sectors() == 0 {
            return Err(Error::NoSectors);
        }
        let mut sector = [0; 512];
        window.read(device, 0, &mut sector)?;
        let (record, fat) = (mbr::record(&sector), is_fat(&sector));
        let protective = record.as_ref().is_some_and(mbr::is_protective);
        if let Some((backup, partitions)) = gpt::read(device, &mut window, protective)? {
            let kind = if backup { TableKind::GptBackup } else { TableKind::Gpt };
            return Self::checked(device, kind, partitions);
        }
        match record {
            // Boot sectors and MBRs end in the same signature: what describes a filesystem is one.
            _ if fat => {
                let whole = Partition { number: 0, first: 0, sectors: device.sectors(), name: String::new() };
                Self::checked(device, TableKind::Whole, Vec::from([whole]))
            }
            Some(record) => {
                let partitions = mbr::partitions(device, &mut window, &record)?;
                Self::checked(device, TableKind::Mbr, partitions)
            }
            None => Err(Error::NoTable),
        }
    }

    fn checked(device: &dyn SectorRead, kind: TableKind, mut partitions: Vec<Partition>) -> Result<Self, Error> {
        for &Partition { number, first, sectors, .. } in &partitions {
            if sectors == 0 || first.checked_add(sectors).is_none_or(|end| end > device.sectors()) {
                return Err(Error::PartitionRange { number, first, sectors });
            }
        }
        partitions.sort_unstable_by_key(|partition| partition.first);
        for pair in partitions.windows(2) {
            if let [a, b] = pair
                && a.first + a.sectors > b.first
            {
                return Err(Error::PartitionOverlap(a.number, b.number));
            }
        }
        partitions.sort_unstable_by_key(|partition| partition.number);
        Ok(Self { kind, partitions })
    }
}

/// Appends a partition, or says that the heap is full.
pub(super) fn push<T>(list: &mut Vec<T>, item: T) -> Result<(), Error> {
    list.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
    list.push(item);
    Ok(())
}
