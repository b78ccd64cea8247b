//! The tables that the ITS keeps for itself: devices and collections (`GITS_BASERn`).

use crate::GicError;
use crate::regs::{Registers, write_table_register};
use iommu::contract::{TableBlock, TableMemory};

const VALID: u64 = 1 << 63;
const INNER_CACHE_SHIFT: u32 = 59;
const PAGE_SIZE_SHIFT: u32 = 8;
const ENTRY_SIZE_SHIFT: u32 = 48;
const MAX_PAGES: u64 = 256;

/// What a table is for; the `Type` field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Devices,
    Collections,
    Other,
}

/// The offset of `GITS_BASERn`.
pub(crate) const fn register(index: usize) -> usize {
    0x100 + 8 * index
}

/// Tells what a `GITS_BASERn` is for.
pub(crate) fn kind(value: u64) -> Kind {
    match value >> 56 & 7 {
        1 => Kind::Devices,
        4 => Kind::Collections,
        _ => Kind::Other,
    }
}

/// A table that the ITS has accepted.
pub(crate) struct Table {
    pub block: TableBlock,
    /// How many entries it has, at most those asked for.
    pub entries: u64,
    pub snoops: bool,
}

/// Gives the (disabled) ITS a flat table of up to `entries` entries: with the smallest page size that reaches, or the only one
/// that the hardware has.
pub(crate) fn install(
    regs: &dyn Registers,
    index: usize,
    entries: u64,
    memory: &'static dyn TableMemory,
) -> Result<Table, GicError> {
    let register = register(index);
    let name = if kind(regs.read64(register)) == Kind::Devices { "device" } else { "collection" };
    let entry = (regs.read64(register) >> ENTRY_SIZE_SHIFT & 0x1f) + 1;
    let fixed = regs.read64(register) & (7 << 56 | 0x1f << ENTRY_SIZE_SHIFT);
    let mut code = (0..2).find(|code| entries * entry <= MAX_PAGES * page_bytes(*code)).unwrap_or(2);
    // Each page size is tried at most once: the hardware may have one only, which reading back tells.
    for _ in 0..3 {
        let page = page_bytes(code);
        let bytes = (entries * entry).clamp(page, MAX_PAGES * page).next_power_of_two().min(MAX_PAGES * page);
        let block = memory.allocate(usize::try_from(bytes).map_err(|_| GicError::OutOfMemory)?)?;
        let address = address(block.phys().get(), code).ok_or(GicError::TableRejected(name))?;
        let value = VALID | fixed | address | u64::from(code) << PAGE_SIZE_SHIFT | (bytes / page - 1);
        let (kept, snoops) = write_table_register(regs, register, INNER_CACHE_SHIFT, value);
        let kept_code = (kept >> PAGE_SIZE_SHIFT & 3) as u8;
        if kept_code != code && kept_code < 3 {
            regs.write64(register, 0);
            code = kept_code;
            continue;
        }
        if (kept ^ value) & (VALID | 0x0000_ffff_ffff_f3ff) != 0 {
            regs.write64(register, 0);
            return Err(GicError::TableRejected(name));
        }
        return Ok(Table { block, entries: entries.min(bytes / entry), snoops });
    }
    Err(GicError::TableRejected(name))
}

const fn page_bytes(code: u8) -> u64 {
    match code {
        0 => 1 << 12,
        1 => 1 << 14,
        _ => 1 << 16,
    }
}

/// Spells a physical address as the register does: with 64 KiB pages, bits 51 to 48 are in bits 15 to 12.
fn address(phys: u64, code: u8) -> Option<u64> {
    if code == 2 {
        return (phys >> 52 == 0).then_some(phys & 0xffff_ffff_0000 | (phys >> 48 & 0xf) << 12);
    }
    (phys >> 48 == 0).then_some(phys)
}
