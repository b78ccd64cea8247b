//! Master boot records and the chain of extended boot records behind them.
//!
//! UEFI Specification 2.10, section 5.2.

use super::error::Error;
use super::reader::{SectorRead, Window};
use super::table::{Partition, push};
use alloc::{string::String, vec::Vec};
use gpt_disk_types::{MasterBootRecord, MbrPartitionRecord};

/// Most logical partitions followed.
const MAX_LOGICAL: u32 = 128;

/// Reads sector 0 as a master boot record, if it has the signature.
pub(super) fn record(sector: &[u8; 512]) -> Option<MasterBootRecord> {
    let record: MasterBootRecord = bytemuck::try_pod_read_unaligned(sector).ok()?;
    (record.signature == [0x55, 0xaa]).then_some(record)
}

/// Says whether this record only tells old tools to keep away from a GPT.
pub(super) fn is_protective(record: &MasterBootRecord) -> bool {
    record.partitions.iter().any(|partition| partition.os_indicator == 0xee)
}

fn is_extended(record: &MbrPartitionRecord) -> bool {
    matches!(record.os_indicator, 0x05 | 0x0f | 0x85)
}

fn range(record: &MbrPartitionRecord) -> (u64, u64) {
    (record.starting_lba.to_u32().into(), record.size_in_lba.to_u32().into())
}

/// Gives all partitions: 1 to 4 are primary, logical ones are counted from 5.
pub(super) fn partitions(
    device: &mut dyn SectorRead,
    window: &mut Window,
    record: &MasterBootRecord,
) -> Result<Vec<Partition>, Error> {
    let mut found = Vec::new();
    let mut extended = None;
    for (number, partition) in (1..).zip(&record.partitions) {
        let (first, sectors) = range(partition);
        match partition.os_indicator {
            0 => {}
            _ if is_extended(partition) => {
                if extended.replace((first, sectors)).is_some() || first == 0 {
                    return Err(Error::ExtendedChain(first));
                }
            }
            // First sector 0 would be the table itself.
            _ if first == 0 => return Err(Error::PartitionRange { number, first, sectors }),
            _ => push(&mut found, Partition { number, first, sectors, name: String::new() })?,
        }
    }
    if let Some((first, sectors)) = extended {
        logical(device, window, first, sectors, &mut found)?;
    }
    Ok(found)
}

/// Follows the chain of extended boot records from sector `start`. Each must lie behind the one before: no circles.
fn logical(
    device: &mut dyn SectorRead,
    window: &mut Window,
    start: u64,
    sectors: u64,
    found: &mut Vec<Partition>,
) -> Result<(), Error> {
    let end = start + sectors;
    let mut at = start;
    for number in 5..5 + MAX_LOGICAL {
        let broken = Error::ExtendedChain(at);
        let mut sector = [0; 512];
        let offset = at.checked_mul(device.sector_size() as u64).ok_or(Error::ExtendedChain(at))?;
        if at >= device.sectors() {
            return Err(broken);
        }
        window.read(device, offset, &mut sector)?;
        let Some(record) = record(&sector) else { return Err(broken) };
        let [partition, next, ..] = record.partitions;
        let (first, sectors) = range(&partition);
        if partition.os_indicator != 0 {
            // Counted from this record; the link to the next, from the first.
            let first = at + first;
            if first <= at || first + sectors > end {
                return Err(Error::PartitionRange { number, first, sectors });
            }
            push(found, Partition { number, first, sectors, name: String::new() })?;
        }
        if next.os_indicator == 0 {
            return Ok(());
        }
        let (link, _) = range(&next);
        if !is_extended(&next) || start + link <= at || start + link >= end {
            return Err(broken);
        }
        at = start + link;
    }
    Err(Error::ExtendedChain(at))
}
