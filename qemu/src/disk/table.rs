//! Partition tables around a volume, whole and damaged.

use super::SECTOR;
use anyhow::{Context, Result};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::{PartRecord, ProtectiveMBR};
use gpt::{GptConfig, partition_types};
use std::io::Cursor;

/// Partitions begin at multiples of this many sectors.
const ALIGNMENT: usize = 2048;
/// The size of the partition that holds no filesystem, in sectors.
const DECOY: usize = 512;

/// Wraps a volume in a GPT. With `decoy`, a partition that holds no filesystem stands before it.
pub fn gpt(volume: &[u8], decoy: bool) -> Result<Vec<u8>> {
    let sectors = volume.len().div_ceil(SECTOR);
    let total = 2 * ALIGNMENT + sectors.next_multiple_of(ALIGNMENT) + ALIGNMENT;
    let mut disk = Cursor::new(vec![0; total * SECTOR]);
    ProtectiveMBR::with_lb_size(u32::try_from(total - 1)?).overwrite_lba0(&mut disk).context("no protective MBR")?;
    let mut table = GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(disk, None)
        .context("no partition table")?;
    let alignment = Some(ALIGNMENT as u64);
    if decoy {
        table
            .add_partition("Nothing to see", (DECOY * SECTOR) as u64, partition_types::LINUX_FS, 0, alignment)
            .context("no room for a partition")?;
    }
    let number = table
        .add_partition("Sluice", (sectors * SECTOR) as u64, partition_types::BASIC, 0, alignment)
        .context("no room for a partition")?;
    let first = table.partitions().get(&number).context("the partition is gone")?.first_lba;
    let mut disk = table.write().context("the partition table cannot be written")?.into_inner();
    let begin = usize::try_from(first)? * SECTOR;
    disk.get_mut(begin..begin + volume.len()).context("the partition is too small")?.copy_from_slice(volume);
    Ok(disk)
}

/// Wraps a volume in an MBR with one FAT32 partition.
pub fn mbr(volume: &[u8]) -> Result<Vec<u8>> {
    let sectors = volume.len().div_ceil(SECTOR);
    let mut disk = vec![0; (ALIGNMENT + sectors) * SECTOR];
    let mut table = ProtectiveMBR::new();
    let mut record = PartRecord::zero();
    // FAT32 with LBA addresses.
    record.os_type = 0x0c;
    record.lb_start = u32::try_from(ALIGNMENT)?;
    record.lb_size = u32::try_from(sectors)?;
    table.set_partition(0, record).context("no room in the MBR")?;
    disk[..SECTOR].copy_from_slice(&table.to_bytes());
    disk[ALIGNMENT * SECTOR..][..volume.len()].copy_from_slice(volume);
    Ok(disk)
}

/// What is wrong with a GPT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// The primary header's checksum does not match; the backup is whole.
    PrimaryHeader,
    /// The primary table's entries do not match their checksum; the backup is whole.
    PrimaryEntries,
    /// Neither header's checksum matches.
    BothHeaders,
}

/// Damages a GPT.
pub fn damage(disk: &mut [u8], damage: Damage) {
    let last = disk.len() - SECTOR;
    // A bit of the disk's GUID: only the checksum tells.
    match damage {
        Damage::PrimaryHeader => disk[SECTOR + 56] ^= 1,
        Damage::PrimaryEntries => disk[2 * SECTOR + 32] ^= 1,
        Damage::BothHeaders => {
            disk[SECTOR + 56] ^= 1;
            disk[last + 56] ^= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Vec<u8> {
        (0..3 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b1) >> 11) as u8).collect()
    }

    #[test]
    fn a_gpt_leads_to_the_volume() {
        for decoy in [false, true] {
            let disk = gpt(&volume(), decoy).unwrap();
            let table = GptConfig::new().writable(false).open_from_device(Cursor::new(disk.clone())).unwrap();
            assert!(table.primary_header().is_ok() && table.backup_header().is_ok());
            let partition = table.partitions().values().find(|partition| partition.name == "Sluice").unwrap();
            let begin = partition.first_lba as usize * SECTOR;
            assert!(disk[begin..].starts_with(&volume()));
            assert_eq!(table.partitions().len(), if decoy { 2 } else { 1 });
            if decoy {
                assert!(table.partitions().values().any(|other| other.first_lba < partition.first_lba));
            }
        }
    }

    #[test]
    fn an_mbr_leads_to_the_volume() {
        let disk = mbr(&volume()).unwrap();
        let table = ProtectiveMBR::from_bytes(&disk[..SECTOR], LogicalBlockSize::Lb512).unwrap();
        let record = table.partition(0).unwrap();
        assert_eq!(record.os_type, 0x0c);
        assert!(disk[record.lb_start as usize * SECTOR..].starts_with(&volume()));
    }

    #[test]
    fn damage_is_seen_by_another_reader() {
        let whole = gpt(&volume(), false).unwrap();
        let open = |disk: Vec<u8>| {
            GptConfig::new().writable(false).only_valid_headers(true).open_from_device(Cursor::new(disk))
        };
        assert!(open(whole.clone()).is_ok());
        for kind in [Damage::PrimaryHeader, Damage::PrimaryEntries, Damage::BothHeaders] {
            let mut disk = whole.clone();
            damage(&mut disk, kind);
            assert!(open(disk).is_err(), "{kind:?}");
        }
        let mut disk = whole;
        damage(&mut disk, Damage::BothHeaders);
        assert!(GptConfig::new().writable(false).open_from_device(Cursor::new(disk)).is_err());
    }
}
