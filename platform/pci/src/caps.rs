//! Walking the two lists of capabilities, bounded whatever the device says.

use crate::PciError;
use crate::config::{CONFIG_SIZE, Config, reg};
use alloc::vec::Vec;

/// Capability IDs (PCI Code and ID Assignment Specification).
pub mod id {
    /// Message Signaled Interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor-specific: virtio describes its registers with these.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Extended: Access Control Services.
    pub const EXTENDED_ACS: u16 = 0x000d;
    /// Extended: Address Translation Services.
    pub const EXTENDED_ATS: u16 = 0x000f;
}

/// A capability in the first 256 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is; see [`id`].
    pub id: u8,
    /// Where it begins.
    pub offset: u16,
}

/// A capability in the extended space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is; see [`id`].
    pub id: u16,
    /// Its version.
    pub version: u8,
    /// Where it begins.
    pub offset: u16,
}

const STATUS_HAS_LIST: u16 = 1 << 4;
const LIST_START: u16 = 0x40;
const EXTENDED_START: u16 = 0x100;

/// Walks the list in the first 256 bytes.
///
/// # Errors
///
/// [`PciError::BadCapabilityList`] if the list points into the header or comes back to where it was;
/// [`PciError::OutOfMemory`].
pub(crate) fn walk(config: &Config) -> Result<Vec<Capability>, PciError> {
    let mut found = Vec::new();
    if config.read16(reg::STATUS) & STATUS_HAS_LIST == 0 {
        return Ok(found);
    }
    let mut seen = 0_u64;
    let mut offset = u16::from(config.read8(reg::CAPABILITIES) & !3);
    while offset != 0 {
        let bit = 1_u64 << (offset / 4);
        if offset < LIST_START || seen & bit != 0 {
            return Err(PciError::BadCapabilityList(offset));
        }
        seen |= bit;
        found.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
        found.push(Capability { id: config.read8(offset), offset });
        offset = u16::from(config.read8(offset + 1) & !3);
    }
    Ok(found)
}

/// Walks the list in the extended space of a PCI Express function.
///
/// # Errors
///
/// As [`walk`].
pub(crate) fn walk_extended(config: &Config) -> Result<Vec<ExtendedCapability>, PciError> {
    let mut found = Vec::new();
    let mut seen = [0_u64; 16];
    let mut offset = EXTENDED_START;
    loop {
        let header = config.read32(offset);
        // Nothing answers here, or an empty list: conventional functions and QEMU's root bus.
        if header == 0 || header == u32::MAX {
            return Ok(found);
        }
        let index = usize::from(offset / 4);
        let Some(word) = seen.get_mut(index / 64) else { return Err(PciError::BadCapabilityList(offset)) };
        if *word & 1 << (index % 64) != 0 {
            return Err(PciError::BadCapabilityList(offset));
        }
        *word |= 1 << (index % 64);
        found.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
        found.push(ExtendedCapability { id: header as u16, version: (header >> 16 & 0xf) as u8, offset });
        offset = (header >> 20) as u16 & !3;
        match offset {
            0 => return Ok(found),
            EXTENDED_START..CONFIG_SIZE => {}
            _ => return Err(PciError::BadCapabilityList(offset)),
        }
    }
}

/// What kind of port a PCI Express function is, from its PCI Express Capabilities register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortType {
    /// Endpoint, legacy endpoint or one integrated in the root complex.
    Endpoint,
    /// Root port.
    RootPort,
    /// Upstream port of a switch.
    Upstream,
    /// Downstream port of a switch.
    Downstream,
    /// Bridge from PCI Express to conventional PCI.
    ToPci,
    /// Bridge from conventional PCI to PCI Express.
    FromPci,
    /// Anything else.
    Other,
}

impl PortType {
    pub(crate) fn read(config: &Config, express: u16) -> Self {
        match config.read16(express + 2) >> 4 & 0xf {
            0 | 1 | 9 => Self::Endpoint,
            4 => Self::RootPort,
            5 => Self::Upstream,
            6 => Self::Downstream,
            7 => Self::ToPci,
            8 => Self::FromPci,
            _ => Self::Other,
        }
    }

    /// Whether a link leads down from this port, on which only device 0 can be.
    pub(crate) const fn has_link_below(self) -> bool {
        matches!(self, Self::RootPort | Self::Downstream)
    }
}
