//! Configuration space: the seam to the hardware, and the ECAM that implements it.
//!
//! # Locking
//!
//! A single access needs no lock: ECAM turns every load and store into one transaction, from any core. What reads, changes
//! and writes a register takes the function's own lock (see [`crate::Function`]).

use crate::{Bdf, PciError};
use alloc::sync::Arc;
use arch::mmio::Mmio;
use core::ops::RangeInclusive;

/// Width of a configuration access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Half,
    /// 32 bits.
    Word,
}

impl Width {
    /// Bytes.
    pub const fn bytes(self) -> u16 {
        match self {
            Self::Byte => 1,
            Self::Half => 2,
            Self::Word => 4,
        }
    }

    /// All ones: what a read gives where nothing answers.
    pub const fn ones(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Half => 0xffff,
            Self::Word => u32::MAX,
        }
    }
}

/// Bytes of configuration space per function.
pub const CONFIG_SIZE: u16 = 4096;

/// Access to the configuration space of one PCI segment.
///
/// `offset` is a multiple of the width and below [`CONFIG_SIZE`]. Accesses may be made from several cores at once.
pub trait ConfigSpace: Send + Sync {
    /// Reads a register; all ones where no function answers.
    fn read(&self, bdf: Bdf, offset: u16, width: Width) -> u32;
    /// Writes a register; ignored where no function answers.
    fn write(&self, bdf: Bdf, offset: u16, width: Width, value: u32);
}

/// The Enhanced Configuration Access Mechanism: 4 KiB of MMIO per function, 1 MiB per bus, from the first bus on.
#[derive(Debug)]
pub struct Ecam {
    window: Mmio,
    buses: RangeInclusive<u8>,
}

impl Ecam {
    /// Takes the window, whose first byte belongs to function 00.0 of the first bus.
    ///
    /// # Errors
    ///
    /// [`PciError::BadEcam`] if the window does not hold all of `buses` or the range is empty.
    pub fn new(window: Mmio, buses: RangeInclusive<u8>) -> Result<Self, PciError> {
        let needed = buses.len() << 20;
        if buses.is_empty() || window.len() < needed {
            return Err(PciError::BadEcam { len: window.len(), first: *buses.start(), last: *buses.end() });
        }
        Ok(Self { window, buses })
    }

    fn at(&self, bdf: Bdf, offset: u16) -> Option<usize> {
        let bus = usize::from(bdf.bus().checked_sub(*self.buses.start())?);
        let known = bdf.bus() <= *self.buses.end();
        let devfn = usize::from(bdf.requester_id().get() & 0xff);
        known.then_some(bus << 20 | devfn << 12 | usize::from(offset))
    }
}

impl ConfigSpace for Ecam {
    fn read(&self, bdf: Bdf, offset: u16, width: Width) -> u32 {
        let Some(at) = self.at(bdf, offset) else { return width.ones() };
        match width {
            Width::Byte => self.window.read8(at).into(),
            Width::Half => self.window.read16(at).into(),
            Width::Word => self.window.read32(at),
        }
    }

    fn write(&self, bdf: Bdf, offset: u16, width: Width, value: u32) {
        let Some(at) = self.at(bdf, offset) else { return };
        match width {
            Width::Byte => self.window.write8(at, value as u8),
            Width::Half => self.window.write16(at, value as u16),
            Width::Word => self.window.write32(at, value),
        }
    }
}

/// The configuration space of one function. An access outside it or across a boundary reads as all ones and writes nothing:
/// offsets may come from the device itself.
#[derive(Clone)]
pub(crate) struct Config {
    space: Arc<dyn ConfigSpace>,
    bdf: Bdf,
}

impl Config {
    pub(crate) fn new(space: Arc<dyn ConfigSpace>, bdf: Bdf) -> Self {
        Self { space, bdf }
    }

    pub(crate) fn bdf(&self) -> Bdf {
        self.bdf
    }

    pub(crate) fn read(&self, offset: u16, width: Width) -> u32 {
        if offset >= CONFIG_SIZE || !offset.is_multiple_of(width.bytes()) {
            return width.ones();
        }
        self.space.read(self.bdf, offset, width) & width.ones()
    }

    pub(crate) fn write(&self, offset: u16, width: Width, value: u32) {
        if offset < CONFIG_SIZE && offset.is_multiple_of(width.bytes()) {
            self.space.write(self.bdf, offset, width, value);
        }
    }

    pub(crate) fn read8(&self, offset: u16) -> u8 {
        self.read(offset, Width::Byte) as u8
    }

    pub(crate) fn read16(&self, offset: u16) -> u16 {
        self.read(offset, Width::Half) as u16
    }

    pub(crate) fn read32(&self, offset: u16) -> u32 {
        self.read(offset, Width::Word)
    }

    pub(crate) fn write8(&self, offset: u16, value: u8) {
        self.write(offset, Width::Byte, value.into());
    }

    pub(crate) fn write16(&self, offset: u16, value: u16) {
        self.write(offset, Width::Half, value.into());
    }

    pub(crate) fn write32(&self, offset: u16, value: u32) {
        self.write(offset, Width::Word, value);
    }
}

/// Offsets of the registers that all headers or one of them have.
pub(crate) mod reg {
    pub const VENDOR: u16 = 0x00;
    pub const DEVICE: u16 = 0x02;
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const REVISION: u16 = 0x08;
    pub const HEADER_TYPE: u16 = 0x0e;
    pub const BAR0: u16 = 0x10;
    pub const PRIMARY_BUS: u16 = 0x18;
    pub const SECONDARY_BUS: u16 = 0x19;
    pub const SUBORDINATE_BUS: u16 = 0x1a;
    pub const IO_BASE: u16 = 0x1c;
    pub const IO_LIMIT: u16 = 0x1d;
    pub const MEMORY_BASE: u16 = 0x20;
    pub const MEMORY_LIMIT: u16 = 0x22;
    pub const PREFETCH_BASE: u16 = 0x24;
    pub const PREFETCH_LIMIT: u16 = 0x26;
    pub const PREFETCH_BASE_UPPER: u16 = 0x28;
    pub const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    pub const SUBSYSTEM: u16 = 0x2e;
    pub const ROM: u16 = 0x30;
    pub const IO_BASE_UPPER: u16 = 0x30;
    pub const IO_LIMIT_UPPER: u16 = 0x32;
    pub const CAPABILITIES: u16 = 0x34;
    pub const BRIDGE_ROM: u16 = 0x38;
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

bitflags::bitflags! {
    /// The Command register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Command: u16 {
        const IO = 1 << 0;
        const MEMORY = 1 << 1;
        const BUS_MASTER = 1 << 2;
        const INTX_DISABLE = 1 << 10;
        const _ = !0;
    }
}
