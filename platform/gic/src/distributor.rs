//! The distributor: the interrupts that all cores share.
//!
//! # Locking
//!
//! One lock guards the registers. Handlers take it (to silence an interrupt that nobody serves), so it masks interrupts.

#![allow(unsafe_code)] // Hands the register window to `arm-gic`.

use crate::regs::poll;
use crate::table::FIRST_SPI;
use crate::{GicError, Trigger};
use arch::mmio::Mmio;
use arm_gic::gicv3::GicDistributor;
use arm_gic::gicv3::registers::Gicd;
use arm_gic::{IntId, UniqueMmioPointer};
use base::IrqMutex;

const CTLR: usize = 0x0;
const TYPER: usize = 0x4;
const IGROUPR: usize = 0x80;
const ICENABLER: usize = 0x180;
const ICPENDR: usize = 0x280;
const ICACTIVER: usize = 0x380;
const PIDR2: usize = 0xffe8;

const CTLR_GROUP1: u32 = 1 << 1;
const CTLR_AFFINITY_ROUTING: u32 = 1 << 4;
const CTLR_WRITE_PENDING: u32 = 1 << 31;

pub(crate) struct Distributor {
    /// Whoever has the lock is the only one that accesses the registers.
    regs: IrqMutex<Mmio>,
    /// The first interrupt ID after the SPIs.
    limit: u32,
    /// Bits of interrupt ID; LPIs need 14.
    id_bits: u32,
    lpis: bool,
}

/// Reads the architecture revision from a Peripheral ID2 register.
pub(crate) const fn revision(pidr2: u32) -> u8 {
    (pidr2 >> 4 & 0xf) as u8
}

impl Distributor {
    /// Resets the distributor: all SPIs disabled, idle, in group 1; forwarding enabled with affinity routing.
    ///
    /// # Safety
    ///
    /// `window` is that of a GIC distributor, and nothing else accesses it from here on.
    pub unsafe fn new(window: Mmio) -> Result<Self, GicError> {
        if window.len() < size_of::<Gicd>() {
            return Err(GicError::WindowTooSmall("distributor"));
        }
        let revision = revision(window.read32(PIDR2));
        if !matches!(revision, 3 | 4) {
            return Err(GicError::NotGicV3(revision));
        }
        let settled = || window.read32(CTLR) & CTLR_WRITE_PENDING == 0;
        window.write32(CTLR, 0);
        poll("the distributor did not stop", settled)?;
        let typer = window.read32(TYPER);
        let limit = (32 * ((typer & 0x1f) + 1)).min(1020);
        for word in 1..(limit as usize).div_ceil(32) {
            window.write32(ICENABLER + 4 * word, u32::MAX);
            window.write32(ICPENDR + 4 * word, u32::MAX);
            window.write32(ICACTIVER + 4 * word, u32::MAX);
            window.write32(IGROUPR + 4 * word, u32::MAX);
        }
        poll("the distributor did not take a write", settled)?;
        window.write32(CTLR, CTLR_AFFINITY_ROUTING);
        poll("the distributor did not take a write", settled)?;
        window.write32(CTLR, CTLR_AFFINITY_ROUTING | CTLR_GROUP1);
        poll("the distributor did not start", settled)?;
        if window.read32(CTLR) & CTLR_AFFINITY_ROUTING == 0 {
            return Err(GicError::Unsupported("affinity routing"));
        }
        let id_bits = (typer >> 19 & 0x1f) + 1;
        Ok(Self { regs: IrqMutex::new(window), limit, id_bits, lpis: typer & 1 << 17 != 0 })
    }

    /// The first interrupt ID after the SPIs.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Bits of interrupt ID if LPIs are supported.
    pub fn lpi_id_bits(&self) -> Option<u32> {
        (self.lpis && self.id_bits >= 14).then_some(self.id_bits)
    }

    fn spi(&self, id: u32) -> Result<IntId, GicError> {
        let valid = (FIRST_SPI..self.limit).contains(&id);
        IntId::try_from(id).ok().filter(|_| valid).ok_or(GicError::NoSuchInterrupt(id))
    }

    /// Has `arm-gic` change the registers of an SPI.
    fn change(
        &self,
        id: u32,
        change: impl FnOnce(&mut GicDistributor<'_>, IntId) -> Result<(), arm_gic::gicv3::GicError>,
    ) -> Result<(), GicError> {
        let spi = self.spi(id)?;
        let window = self.regs.lock();
        // SAFETY:
        // - the window holds at least a `Gicd` (checked in `new`) and is mapped for ever (invariant of `Mmio`), page aligned;
        // - nothing else accesses it (caller of `new`) while the lock is held, and the pointer ends before that.
        let pointer = unsafe { UniqueMmioPointer::new(window.as_ptr().cast::<Gicd>()) };
        change(&mut GicDistributor::new(pointer), spi).map_err(|_| GicError::NoSuchInterrupt(id))
    }

    /// Configures and enables an SPI, and routes it to the core with `affinity`.
    pub fn enable(&self, id: u32, trigger: Trigger, priority: u8, affinity: u32) -> Result<(), GicError> {
        self.change(id, |regs, spi| {
            regs.enable_interrupt(spi, false)?;
            regs.set_trigger(spi, trigger)?;
            regs.set_interrupt_priority(spi, priority)?;
            regs.set_routing(spi, Some(mpidr(affinity)))?;
            regs.enable_interrupt(spi, true)
        })
    }

    /// Routes an SPI to the core with `affinity`.
    pub fn route(&self, id: u32, affinity: u32) -> Result<(), GicError> {
        self.change(id, |regs, spi| regs.set_routing(spi, Some(mpidr(affinity))))
    }

    /// Disables an SPI. May be called from a handler; it takes effect soon, not at once.
    pub fn disable(&self, id: u32) -> Result<(), GicError> {
        self.change(id, |regs, spi| regs.enable_interrupt(spi, false))
    }

    /// Enables an SPI that was configured before.
    pub fn unmask(&self, id: u32) -> Result<(), GicError> {
        self.change(id, |regs, spi| regs.enable_interrupt(spi, true))
    }

    /// Forgets that an SPI, which is disabled, is pending.
    pub fn forget(&self, id: u32) -> Result<(), GicError> {
        self.spi(id)?;
        self.regs.lock().write32(ICPENDR + 4 * (id / 32) as usize, 1 << (id % 32));
        Ok(())
    }
}

/// Spells an affinity as `MPIDR_EL1` and `GICD_IROUTER` do.
fn mpidr(affinity: u32) -> u64 {
    u64::from(affinity & 0xff_ffff) | u64::from(affinity >> 24) << 32
}
