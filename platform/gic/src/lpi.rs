//! LPIs: the table of their configuration, which all redistributors read, and which of them are in use.
//!
//! # Locking
//!
//! Configuration bytes are changed atomically. `used` is a lock of its own, held for a search of the bitmap.

use crate::GicError;
use crate::table::FIRST_LPI;
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::Ordering;
use iommu::PhysAddr;
use iommu::contract::{TableBlock, TableMemory};

/// Bits of interrupt ID that are used at most: 8192 LPIs.
const MAX_ID_BITS: u32 = 14;

/// The architecture aligns pending tables to 64 KiB.
const PENDING_BYTES: usize = 1 << 16;

const ENABLE: u64 = 1;

pub(crate) struct Lpis {
    id_bits: u32,
    properties: TableBlock,
    used: IrqMutex<Vec<u64>>,
    /// One table per core, held for as long as the redistributors may use them: always.
    pending: IrqMutex<Vec<TableBlock>>,
}

impl Lpis {
    /// Makes the tables for LPIs of `priority`, all disabled.
    pub fn new(memory: &'static dyn TableMemory, id_bits: u32, priority: u8) -> Result<Self, GicError> {
        let id_bits = id_bits.min(MAX_ID_BITS);
        let count = (1_usize << id_bits) - FIRST_LPI as usize;
        let properties = memory.allocate(count)?;
        // Bit 1 is RES1.
        let byte = priority & 0xfc | 2;
        for word in properties.iter() {
            word.store(u64::from_le_bytes([byte; 8]), Ordering::Relaxed);
        }
        properties.publish(0, properties.len());
        let mut used = Vec::new();
        used.try_reserve_exact(count / 64).map_err(|_| GicError::OutOfMemory)?;
        used.resize(count / 64, 0);
        Ok(Self { id_bits, properties, used: IrqMutex::new(used), pending: IrqMutex::default() })
    }

    pub fn count(&self) -> u32 {
        (1 << self.id_bits) - FIRST_LPI
    }

    pub fn id_bits(&self) -> u32 {
        self.id_bits
    }

    pub fn properties(&self) -> PhysAddr {
        self.properties.phys()
    }

    /// Makes a core's pending table.
    pub fn new_pending_table(&self) -> Result<PhysAddr, GicError> {
        let table = self.properties.memory().allocate(PENDING_BYTES)?;
        let phys = table.phys();
        let mut pending = self.pending.lock();
        pending.try_reserve(1).map_err(|_| GicError::OutOfMemory)?;
        pending.push(table);
        Ok(phys)
    }

    /// Takes an LPI.
    pub fn take(&self) -> Result<u32, GicError> {
        let mut used = self.used.lock();
        for (index, word) in used.iter_mut().enumerate() {
            let bit = word.trailing_ones();
            if bit < 64 {
                *word |= 1 << bit;
                return Ok(FIRST_LPI + 64 * index as u32 + bit);
            }
        }
        Err(GicError::NoLpi)
    }

    /// Gives an LPI back. Only after the ITS has forgotten it.
    pub fn give_back(&self, lpi: u32) {
        let index = lpi.wrapping_sub(FIRST_LPI);
        if let Some(word) = self.used.lock().get_mut(index as usize / 64) {
            *word &= !(1 << (index % 64));
        }
    }

    /// Sets or clears an LPI's enable bit in memory. The redistributors see it after an INV or INVALL.
    pub fn set_enabled(&self, lpi: u32, enabled: bool) {
        let index = lpi.wrapping_sub(FIRST_LPI) as usize;
        let Some(word) = self.properties.get(index / 8) else { return };
        let bit = ENABLE << (8 * (index % 8));
        if enabled {
            word.fetch_or(bit.to_le(), Ordering::Relaxed);
        } else {
            word.fetch_and(!bit.to_le(), Ordering::Relaxed);
        }
        self.properties.publish(index / 8, index / 8 + 1);
    }
}
