//! GUID partition tables.
//!
//! UEFI Specification 2.10, section 5.3.

use super::error::{Error, GptFault};
use super::reader::{SectorRead, Window};
use super::table::{Partition, push};
use alloc::{string::String, vec::Vec};
use gpt_disk_types::{Crc32, GptHeader, GptPartitionEntry};

const HEADER: usize = size_of::<GptHeader>();
const ENTRY: usize = size_of::<GptPartitionEntry>();
/// Most bytes of an array of entries (8192 of them).
const MAX_ARRAY: u64 = 1 << 20;

/// Either something is wrong with this copy of the table, or reading on makes no sense.
enum Failure {
    Table(GptFault),
    Disk(Error),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Disk(error.into())
    }
}

/// Reads the GPT, and says whether it is the backup. `None`: there is none (no signature anywhere, and `expected` is false).
pub(super) fn read(
    device: &mut dyn SectorRead,
    window: &mut Window,
    expected: bool,
) -> Result<Option<(bool, Vec<Partition>)>, Error> {
    let Some(last) = device.sectors().checked_sub(1).filter(|&last| last > 1) else {
        let too_small = GptFault::TooSmall;
        return if expected { Err(Error::Gpt { primary: too_small, backup: too_small }) } else { Ok(None) };
    };
    let primary = match copy(device, window, 1) {
        Ok(partitions) => return Ok(Some((false, partitions))),
        Err(Failure::Disk(error)) => return Err(error),
        Err(Failure::Table(fault)) => fault,
    };
    let backup = match copy(device, window, last) {
        // An old backup header at the end of a disk that has been given another table since does not count.
        Ok(partitions) if expected || primary != GptFault::Signature => return Ok(Some((true, partitions))),
        Ok(_) => return Ok(None),
        Err(Failure::Disk(error)) => return Err(error),
        Err(Failure::Table(fault)) => fault,
    };
    if !expected && primary == GptFault::Signature {
        return Ok(None);
    }
    Err(Error::Gpt { primary, backup })
}

/// Reads the copy of the table whose header is at sector `lba`.
fn copy(device: &mut dyn SectorRead, window: &mut Window, lba: u64) -> Result<Vec<Partition>, Failure> {
    let sector_size = device.sector_size();
    let mut sector = Vec::new();
    sector.try_reserve_exact(sector_size).map_err(|_| Error::OutOfMemory)?;
    sector.resize(sector_size, 0);
    window.read(device, lba * sector_size as u64, &mut sector)?;
    let header = header(&mut sector, lba, device.sectors()).map_err(Failure::Table)?;

    let (first, count) = (header.partition_entry_lba.to_u64(), header.number_of_partition_entries.to_u32());
    let size = header.size_of_partition_entry.to_u32();
    let fault = Failure::Table(GptFault::Array { first, count, size });
    let bytes = u64::from(count) * u64::from(size);
    let sectors = bytes.div_ceil(sector_size as u64);
    let inside = first.checked_add(sectors).is_some_and(|end| end <= device.sectors());
    // The header's sector must not be part of the array.
    let apart = lba < first || lba >= first.saturating_add(sectors);
    if count == 0 || (size as usize) < ENTRY || !size.is_power_of_two() || bytes > MAX_ARRAY || !inside || !apart {
        return Err(fault);
    }
    let mut array = Vec::new();
    array.try_reserve_exact(bytes as usize).map_err(|_| Error::OutOfMemory)?;
    array.resize(bytes as usize, 0);
    window.read(device, first * sector_size as u64, &mut array)?;
    let (sum, found) = (checksum(&array), header.partition_entry_array_crc32.0.to_u32());
    if sum != found {
        return Err(Failure::Table(GptFault::ArrayChecksum { expected: sum, found }));
    }

    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(array.chunks_exact(size as usize)) {
        let Some(Ok(entry)) = entry.get(..ENTRY).map(bytemuck::try_pod_read_unaligned::<GptPartitionEntry>) else {
            continue;
        };
        // (`is_used` would compare the type by reference to a packed field.)
        let kind = entry.partition_type_guid;
        if kind == gpt_disk_types::GptPartitionType::UNUSED {
            continue;
        }
        let (first, last) = (entry.starting_lba.to_u64(), entry.ending_lba.to_u64());
        let sectors = last.checked_sub(first).and_then(|sectors| sectors.checked_add(1)).unwrap_or(0);
        let usable = header.first_usable_lba.to_u64()..=header.last_usable_lba.to_u64();
        if sectors == 0 || !usable.contains(&first) || !usable.contains(&last) {
            return Err(Error::PartitionRange { number, first, sectors }.into());
        }
        let entry_name = entry.name;
        let mut name = String::new();
        // 36 UTF-16 code units at most.
        name.try_reserve_exact(3 * 36).map_err(|_| Error::OutOfMemory)?;
        name.extend(entry_name.chars());
        push(&mut partitions, Partition { number, first, sectors, name })?;
    }
    Ok(partitions)
}

/// Checks the header in `sector`, which is sector `lba` of `sectors`. (The checksum's field is cleared.)
fn header(sector: &mut [u8], lba: u64, sectors: u64) -> Result<GptHeader, GptFault> {
    let bytes = sector.get(..HEADER).ok_or(GptFault::TooSmall)?;
    let header: GptHeader = bytemuck::try_pod_read_unaligned(bytes).map_err(|_| GptFault::TooSmall)?;
    if !header.is_signature_valid() {
        return Err(GptFault::Signature);
    }
    let size = header.header_size.to_u32();
    if (size as usize) < HEADER || size as usize > sector.len() {
        return Err(GptFault::HeaderSize(size));
    }
    let found = header.header_crc32.0.to_u32();
    if let Some(field) = sector.get_mut(16..20) {
        field.fill(0);
    }
    let expected = checksum(sector.get(..size as usize).ok_or(GptFault::HeaderSize(size))?);
    if expected != found {
        return Err(GptFault::HeaderChecksum { expected, found });
    }
    if header.my_lba.to_u64() != lba {
        return Err(GptFault::Place(header.my_lba.to_u64()));
    }
    let (first, last) = (header.first_usable_lba.to_u64(), header.last_usable_lba.to_u64());
    if first > last || last >= sectors {
        return Err(GptFault::Usable(first, last));
    }
    Ok(header)
}

fn checksum(bytes: &[u8]) -> u32 {
    static CHECKSUM: crc::Crc<u32> = crc::Crc::<u32>::new(&Crc32::ALGORITHM);
    CHECKSUM.checksum(bytes)
}
