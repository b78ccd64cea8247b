//! Base address registers: finding out what they are, and writing them.

use crate::PciError;
use crate::config::{Config, reg};
use iommu::PhysAddr;

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory.
    Memory {
        /// Takes a 64-bit address (and the next BAR's place).
        wide: bool,
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number; a 64-bit BAR has the lower of its two.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes; a power of two.
    pub size: u64,
    /// The address on the PCI bus, once assigned.
    pub bus: Option<u64>,
    /// The address on the CPU's physical bus, once assigned.
    pub phys: Option<PhysAddr>,
}

impl Bar {
    /// Whether the BAR decodes memory.
    pub const fn is_memory(&self) -> bool {
        matches!(self.kind, BarKind::Memory { .. })
    }

    pub(crate) const fn is_wide(&self) -> bool {
        matches!(self.kind, BarKind::Memory { wide: true, .. })
    }

    pub(crate) const fn is_prefetchable(&self) -> bool {
        matches!(self.kind, BarKind::Memory { prefetchable: true, .. })
    }
}

/// A function's BARs by number.
pub(crate) type Bars = [Option<Bar>; 6];

const MEMORY_TYPE: u32 = 3 << 1;
const MEMORY_TYPE_64: u32 = 2 << 1;
const PREFETCHABLE: u32 = 1 << 3;
const IO_SPACE: u32 = 1;

fn offset(index: u8) -> u16 {
    reg::BAR0 + 4 * u16::from(index)
}

/// Writes all ones to a register and tells what stuck, leaving the register as it was.
fn probe(config: &Config, offset: u16) -> (u32, u32) {
    let original = config.read32(offset);
    config.write32(offset, u32::MAX);
    let mask = config.read32(offset);
    config.write32(offset, original);
    (original, mask)
}

/// Finds out the first `count` BARs of a function whose decoding is disabled.
///
/// # Errors
///
/// [`PciError::BadBar`] for what no BAR can be: a size that is not a power of two, a reserved type, a 64-bit BAR without its
/// second half.
pub(crate) fn discover(config: &Config, count: u8) -> Result<Bars, PciError> {
    let mut bars = Bars::default();
    let mut index = 0;
    while index < count {
        let bar = discover_one(config, index, count)?;
        let wide = bar.as_ref().is_some_and(Bar::is_wide);
        if let Some(slot) = bars.get_mut(usize::from(index)) {
            *slot = bar;
        }
        index += if wide { 2 } else { 1 };
    }
    Ok(bars)
}

fn discover_one(config: &Config, index: u8, count: u8) -> Result<Option<Bar>, PciError> {
    let bad = PciError::BadBar(index);
    let (original, low) = probe(config, offset(index));
    if low == 0 {
        return Ok(None);
    }
    let (kind, mask) = if low & IO_SPACE != 0 {
        let mask = low & !3;
        // A device may decode only 16 bits of I/O address.
        let mask = if mask & 0xffff_0000 == 0 { mask | 0xffff_0000 } else { mask };
        (BarKind::Io, u64::from(mask) | !u64::from(u32::MAX))
    } else {
        let prefetchable = low & PREFETCHABLE != 0;
        let mask = u64::from(low & !0xf);
        match low & MEMORY_TYPE {
            0 => (BarKind::Memory { wide: false, prefetchable }, mask | !u64::from(u32::MAX)),
            MEMORY_TYPE_64 if index + 1 < count => {
                let (_, high) = probe(config, offset(index + 1));
                (BarKind::Memory { wide: true, prefetchable }, mask | u64::from(high) << 32)
            }
            _ => return Err(bad),
        }
    };
    // The bits that tell the type cannot be written; where they change, nothing else can be believed either.
    let type_bits = if kind == BarKind::Io { IO_SPACE } else { 0xf };
    if (original ^ low) & type_bits != 0 {
        return Err(bad);
    }
    let size = (!mask).wrapping_add(1);
    if !size.is_power_of_two() || (kind == BarKind::Io && size > 0x1_0000) {
        return Err(bad);
    }
    Ok(Some(Bar { index, kind, size, bus: None, phys: None }))
}

/// Writes a BAR's bus address and looks whether it stayed.
///
/// # Errors
///
/// [`PciError::BarNotWritable`].
pub(crate) fn write(config: &Config, bar: &Bar, address: u64) -> Result<(), PciError> {
    let low_mask = if bar.is_memory() { !0xf } else { !3 };
    let low = offset(bar.index);
    config.write32(low, address as u32);
    let mut kept = u64::from(config.read32(low) & low_mask);
    if bar.is_wide() {
        config.write32(low + 4, (address >> 32) as u32);
        kept |= u64::from(config.read32(low + 4)) << 32;
    }
    if kept == address { Ok(()) } else { Err(PciError::BarNotWritable(bar.index)) }
}
