//! Redistributors: each core's private interrupts, and the LPIs that are delivered to it.
//!
//! # Locking
//!
//! The registers of private interrupts are changed under `Gic`'s lock of private interrupts. Enabling LPIs is done once, by
//! the core itself.

use crate::distributor::revision;
use crate::regs::{Registers, poll, write_table_register};
use crate::{GicError, Trigger};
use alloc::boxed::Box;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use iommu::PhysAddr;

const CTLR: usize = 0x0;
const TYPER: usize = 0x8;
const WAKER: usize = 0x14;
const PROPBASER: usize = 0x70;
const PENDBASER: usize = 0x78;
const PIDR2: usize = 0xffe8;
const SGI_FRAME: usize = 0x1_0000;
const IGROUPR0: usize = SGI_FRAME + 0x80;
const ISENABLER0: usize = SGI_FRAME + 0x100;
const ICENABLER0: usize = SGI_FRAME + 0x180;
const ICPENDR0: usize = SGI_FRAME + 0x280;
const ICACTIVER0: usize = SGI_FRAME + 0x380;
const IPRIORITYR: usize = SGI_FRAME + 0x400;
const ICFGR1: usize = SGI_FRAME + 0xc04;

const CTLR_ENABLE_LPIS: u32 = 1 << 0;
const CTLR_WRITE_PENDING: u32 = 1 << 3;
const WAKER_SLEEP: u32 = 1 << 1;
const WAKER_CHILDREN_ASLEEP: u32 = 1 << 2;
const TYPER_LPIS: u64 = 1 << 0;
const TYPER_VIRTUAL_LPIS: u64 = 1 << 1;
const TYPER_LAST: u64 = 1 << 4;
const INNER_CACHE_SHIFT: u32 = 7;
const PENDING_TABLE_ZERO: u64 = 1 << 62;

/// Bytes of a redistributor's two frames; GICv4 adds two.
const FRAMES: usize = 0x2_0000;

/// One core's redistributor.
pub(crate) struct Redistributor {
    regs: Box<dyn Registers>,
    phys: PhysAddr,
    affinity: u32,
    number: u16,
    lpis: bool,
}

/// Finds the redistributors in a region that begins at `phys`.
pub(crate) fn find(region: Mmio, phys: PhysAddr, found: &mut Vec<Redistributor>) -> Result<(), GicError> {
    let mut offset = 0;
    while let Some(regs) = region.part(offset, FRAMES) {
        let revision = revision(regs.read32(PIDR2));
        if !matches!(revision, 3 | 4) {
            return Err(GicError::NotGicV3(revision));
        }
        let at = phys.checked_add(offset as u64).ok_or(GicError::WindowTooSmall("redistributor"))?;
        let typer = regs.read64(TYPER);
        found.try_reserve(1).map_err(|_| GicError::OutOfMemory)?;
        found.push(Redistributor::new(Box::new(regs), at));
        if typer & TYPER_LAST != 0 {
            break;
        }
        offset += if typer & TYPER_VIRTUAL_LPIS != 0 { 2 * FRAMES } else { FRAMES };
    }
    Ok(())
}

impl Redistributor {
    pub fn new(regs: Box<dyn Registers>, phys: PhysAddr) -> Self {
        let typer = regs.read64(TYPER);
        let (affinity, number) = ((typer >> 32) as u32, (typer >> 8) as u16);
        Self { regs, phys, affinity, number, lpis: typer & TYPER_LPIS != 0 }
    }

    pub fn affinity(&self) -> u32 {
        self.affinity
    }

    /// Where the registers are: one of the two ways in which an ITS names a redistributor.
    pub fn phys(&self) -> PhysAddr {
        self.phys
    }

    /// The processor number: the other way.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Wakes the redistributor and resets the private interrupts: disabled, idle, in group 1, at `priority`.
    pub fn init(&self, priority: u8) -> Result<(), GicError> {
        let waker = self.regs.read32(WAKER);
        self.regs.write32(WAKER, waker & !WAKER_SLEEP);
        poll("a redistributor did not wake", || self.regs.read32(WAKER) & WAKER_CHILDREN_ASLEEP == 0)?;
        self.regs.write32(ICENABLER0, u32::MAX);
        self.settle()?;
        self.regs.write32(ICPENDR0, u32::MAX);
        self.regs.write32(ICACTIVER0, u32::MAX);
        self.regs.write32(IGROUPR0, u32::MAX);
        for word in 0..8 {
            self.regs.write32(IPRIORITYR + 4 * word, u32::from_ne_bytes([priority; 4]));
        }
        self.settle()
    }

    fn settle(&self) -> Result<(), GicError> {
        poll("a redistributor did not take a write", || self.regs.read32(CTLR) & CTLR_WRITE_PENDING == 0)
    }

    /// Points the redistributor to the tables of LPIs and enables them. Returns whether it snoops the caches.
    ///
    /// `pending` is a zeroed table; `id_bits` the bits of interrupt ID that both tables cover.
    pub fn enable_lpis(&self, properties: PhysAddr, pending: PhysAddr, id_bits: u32) -> Result<bool, GicError> {
        if !self.lpis {
            return Err(GicError::Unsupported("LPIs"));
        }
        let control = self.regs.read32(CTLR);
        if control & CTLR_ENABLE_LPIS != 0 {
            // The tables cannot be changed while LPIs are enabled, and hardware need not let go of them once they were.
            self.regs.write32(CTLR, control & !CTLR_ENABLE_LPIS);
            self.settle()?;
            if self.regs.read32(CTLR) & CTLR_ENABLE_LPIS != 0 {
                return Err(GicError::Unsupported("a way to take LPIs over from firmware"));
            }
        }
        let value = properties.get() | u64::from(id_bits - 1);
        let (kept, snoops) = write_table_register(&*self.regs, PROPBASER, INNER_CACHE_SHIFT, value);
        if kept & 0x000f_ffff_ffff_f01f != value {
            return Err(GicError::TableRejected("LPI configuration"));
        }
        let value = pending.get() | PENDING_TABLE_ZERO;
        let (kept, pending_snoops) = write_table_register(&*self.regs, PENDBASER, INNER_CACHE_SHIFT, value);
        if kept & 0x000f_ffff_ffff_0000 != pending.get() {
            return Err(GicError::TableRejected("LPI pending"));
        }
        base::barrier::publish();
        self.regs.write32(CTLR, self.regs.read32(CTLR) | CTLR_ENABLE_LPIS);
        if self.regs.read32(CTLR) & CTLR_ENABLE_LPIS == 0 {
            return Err(GicError::Unsupported("LPIs"));
        }
        Ok(snoops && pending_snoops)
    }

    /// Configures and enables a private interrupt (`id` below 32). The caller holds the lock of private interrupts.
    pub fn enable(&self, id: u32, trigger: Trigger, priority: u8) {
        self.disable(id);
        let register = IPRIORITYR + (id as usize & 0x1c);
        let shift = 8 * (id & 3);
        let priorities = self.regs.read32(register);
        self.regs.write32(register, priorities & !(0xff << shift) | u32::from(priority) << shift);
        if id >= 16 {
            let bit = 2_u32 << (2 * (id - 16));
            let triggers = self.regs.read32(ICFGR1);
            let triggers = if trigger == Trigger::Edge { triggers | bit } else { triggers & !bit };
            self.regs.write32(ICFGR1, triggers);
        }
        self.regs.write32(ISENABLER0, 1 << id);
    }

    /// Disables a private interrupt (`id` below 32). A single write to a write-one-to-clear register: needs no lock.
    pub fn disable(&self, id: u32) {
        self.regs.write32(ICENABLER0, 1 << id);
    }
}
