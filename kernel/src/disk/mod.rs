//! Where on a disk a file is: partition tables and FAT filesystems, read-only.
//!
//! Only *metadata* goes through this module (a [`SectorRead`] copies it with the processor). What it gives for a file is a
//! list of [`Extent`]s, so that whoever wants the contents has a device write them wherever they are to go.
//!
//! # The disk is not trusted
//!
//! Whatever is on the disk, every call ends with an answer or an [`Error`] that says what is wrong and where: counts are
//! bounded, chains are watched for cycles, and numbers are checked against the size of what they lie in. Checksums guard
//! against accidents only.
//!
//! # Locking
//!
//! None: the caller has the device for itself.
//!
//! UEFI Specification 2.10, chapter 5 (GPT, MBR); Microsoft FAT32 File System Specification 1.03.

#![forbid(unsafe_code)]

mod error;
mod fat;
mod gpt;
mod mbr;
mod reader;
mod table;

pub use error::{Error, GptFault};
pub use fat::{Entry, Fat, FatKind, File};
pub use reader::{Extent, ReadError, SectorRead};
pub use table::{Partition, Table, TableKind};

use alloc::string::String;

/// A file that was found, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// How the disk is divided.
    pub table: TableKind,
    /// The partition's number, from 1; 0 if the disk is not divided.
    pub partition: u32,
    /// The kind of filesystem.
    pub fat: FatKind,
    /// The file.
    pub file: File,
}

/// Looks for the file at `path` on all FAT filesystems of a disk, in the order of the partitions.
///
/// # Errors
///
/// If the disk cannot be read, its partition table is damaged, it has no FAT filesystem, or none of those has the file. A
/// damaged filesystem is reported if no other one has the file.
pub fn locate(device: &mut dyn SectorRead, path: &str) -> Result<Located, Error> {
    let table = Table::read(device)?;
    let (mut damage, mut found_one) = (None, false);
    for partition in &table.partitions {
        let mut fat = match Fat::open(device, partition) {
            Ok(Some(fat)) => fat,
            Ok(None) => continue,
            Err(error @ (Error::Read(_) | Error::OutOfMemory)) => return Err(error),
            Err(error) => {
                damage.get_or_insert(error);
                continue;
            }
        };
        found_one = true;
        match fat.find(device, path) {
            Ok(file) => {
                return Ok(Located { table: table.kind, partition: partition.number, fat: fat.kind(), file });
            }
            Err(Error::NotFound { .. }) => {}
            Err(error @ (Error::Read(_) | Error::OutOfMemory | Error::Path(_))) => return Err(error),
            Err(error) => _ = damage.get_or_insert(error),
        }
    }
    match damage {
        Some(error) => Err(error),
        None if found_one => Err(Error::NotFound { path: String::from(path) }),
        None => Err(Error::NoFilesystem { partitions: table.partitions.len() }),
    }
}
