//! GICv2: a distributor and a CPU interface in memory (IHI 0048).
//!
//! What sets it apart: an SPI names the cores that may take it by a mask of eight bits, in which each core finds out its own; the
//! registers of SGIs and PPIs are banked, so that a core changes no other core's; and an SGI is ended with the number of the core
//! that sent it. Interrupts stay in group 0 where there is only one security state, and are in group 1 where firmware has put them
//! before it left the secure state: either way the one enable bit that this side sees is the right one.
//!
//! The crate `arm-gic` has a driver for it, too, which is not used: it wants to be the only one to touch the CPU interface, which
//! each core does without a lock; setting a priority zeroes those of three neighbours; it has no targets, and takes the sender in
//! IAR for a part of the interrupt ID.
//!
//! # Locking
//!
//! One lock for the distributor's registers that are read, changed and written: a leaf, which handlers do not take, as disabling is
//! one write and needs none. The CPU interface is the core's own.

use crate::regs::Registers;
use crate::table::FIRST_SPI;
use crate::{GicError, Trigger};
use alloc::boxed::Box;
use base::IrqMutex;

const CTLR: usize = 0x0;
const TYPER: usize = 0x4;
const IGROUPR: usize = 0x80;
const ISENABLER: usize = 0x100;
const ICENABLER: usize = 0x180;
const ICPENDR: usize = 0x280;
const ICACTIVER: usize = 0x380;
const IPRIORITYR: usize = 0x400;
const ITARGETSR: usize = 0x800;
const ICFGR: usize = 0xc00;
const SGIR: usize = 0xf00;
const PIDR2: usize = 0xfe8;

const INTERFACE_CTLR: usize = 0x0;
const INTERFACE_PMR: usize = 0x4;
const INTERFACE_BPR: usize = 0x8;
const INTERFACE_IAR: usize = 0xc;
const INTERFACE_EOIR: usize = 0x10;

const ENABLE: u32 = 1;
/// The interrupt ID in IAR; above it is who sent an SGI.
const ID: u32 = 0x3ff;

/// Bytes of registers that each of the two has at least.
pub(crate) const WINDOW: usize = 0x1000;

pub(crate) struct GicV2 {
    distributor: Box<dyn Registers>,
    interface: Box<dyn Registers>,
    /// The first interrupt ID after the SPIs.
    limit: u32,
    /// Guards what is read, changed and written.
    changing: IrqMutex<()>,
}

impl GicV2 {
    /// Resets the distributor: all SPIs disabled, idle, without a target; forwarding enabled.
    pub fn new(distributor: Box<dyn Registers>, interface: Box<dyn Registers>) -> Result<Self, GicError> {
        let revision = crate::distributor::revision(distributor.read32(PIDR2));
        if matches!(revision, 3 | 4) {
            return Err(GicError::NotGicV2(revision));
        }
        distributor.write32(CTLR, 0);
        let limit = (32 * ((distributor.read32(TYPER) & 0x1f) + 1)).min(1020);
        for word in 1..(limit as usize).div_ceil(32) {
            distributor.write32(ICENABLER + 4 * word, u32::MAX);
            distributor.write32(ICPENDR + 4 * word, u32::MAX);
            distributor.write32(ICACTIVER + 4 * word, u32::MAX);
            distributor.write32(IGROUPR + 4 * word, 0);
        }
        for word in FIRST_SPI as usize / 4..(limit as usize).div_ceil(4) {
            distributor.write32(ITARGETSR + 4 * word, 0);
        }
        distributor.write32(CTLR, ENABLE);
        Ok(Self { distributor, interface, limit, changing: IrqMutex::new(()) })
    }

    /// The first interrupt ID after the SPIs.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Lets the calling core take interrupts of every priority, with its private ones disabled, idle and of `priority`. Returns the
    /// core's bit in masks of targets.
    pub fn init_core(&self, priority: u8) -> Result<u8, GicError> {
        self.distributor.write32(ICENABLER, u32::MAX);
        self.distributor.write32(ICPENDR, u32::MAX);
        self.distributor.write32(ICACTIVER, u32::MAX);
        self.distributor.write32(IGROUPR, 0);
        for word in 0..8 {
            self.distributor.write32(IPRIORITYR + 4 * word, u32::from_ne_bytes([priority; 4]));
        }
        // The targets of private interrupts read as the core that asks; where there is only one core, as nobody.
        let read = (0..8).flat_map(|word| self.distributor.read32(ITARGETSR + 4 * word).to_ne_bytes());
        let own = match read.fold(0, |all, one| all | one) {
            0 => 1,
            own if own.is_power_of_two() => own,
            _ => return Err(GicError::Unsupported("one name for each core")),
        };
        self.interface.write32(INTERFACE_PMR, 0xff);
        self.interface.write32(INTERFACE_BPR, 0);
        self.interface.write32(INTERFACE_CTLR, ENABLE);
        Ok(own)
    }

    /// Changes the `bits` bits of interrupt `id`'s field in an array of such fields. The caller holds `changing`.
    fn set_field(&self, array: usize, bits: u32, id: u32, value: u32) {
        let fields = 32 / bits;
        let (register, shift) = (array + 4 * (id / fields) as usize, bits * (id % fields));
        let others = self.distributor.read32(register) & !(((1 << bits) - 1) << shift);
        self.distributor.write32(register, others | value << shift);
    }

    fn configure(&self, id: u32, trigger: Trigger, priority: u8, targets: Option<u8>) {
        let _changing = self.changing.lock();
        self.set_field(IPRIORITYR, 8, id, priority.into());
        // How SGIs are signalled is fixed.
        if id >= 16 {
            self.set_field(ICFGR, 2, id, if trigger == Trigger::Edge { 2 } else { 0 });
        }
        if let Some(targets) = targets {
            self.set_field(ITARGETSR, 8, id, targets.into());
        }
    }

    fn spi(&self, id: u32) -> Result<u32, GicError> {
        if (FIRST_SPI..self.limit).contains(&id) { Ok(id) } else { Err(GicError::NoSuchInterrupt(id)) }
    }

    /// Configures and enables an SPI, and has the core with the bit `target` take it.
    pub fn enable(&self, id: u32, trigger: Trigger, priority: u8, target: u8) -> Result<(), GicError> {
        let id = self.spi(id)?;
        self.silence(id);
        self.configure(id, trigger, priority, Some(target));
        self.unmask(id)
    }

    /// Enables an SPI that was configured before.
    pub fn unmask(&self, id: u32) -> Result<(), GicError> {
        let id = self.spi(id)?;
        self.distributor.write32(ISENABLER + 4 * (id / 32) as usize, 1 << (id % 32));
        Ok(())
    }

    /// Has the core with the bit `target` take an SPI.
    pub fn route(&self, id: u32, target: u8) -> Result<(), GicError> {
        let id = self.spi(id)?;
        let _changing = self.changing.lock();
        self.set_field(ITARGETSR, 8, id, target.into());
        Ok(())
    }

    /// Configures and enables a private interrupt (`id` below 32) of the calling core.
    pub fn enable_private(&self, id: u32, trigger: Trigger, priority: u8) {
        self.silence(id);
        self.configure(id, trigger, priority, None);
        self.distributor.write32(ISENABLER, 1 << id);
    }

    /// Disables an interrupt below [`Self::limit`]; a private one, of the calling core. May be called from a handler.
    pub fn silence(&self, id: u32) {
        if id < self.limit {
            self.distributor.write32(ICENABLER + 4 * (id / 32) as usize, 1 << (id % 32));
        }
    }

    /// Forgets that an SPI, which is disabled, is pending.
    pub fn forget(&self, id: u32) {
        if id < self.limit {
            self.distributor.write32(ICPENDR + 4 * (id / 32) as usize, 1 << (id % 32));
        }
    }

    /// Acknowledges the most urgent pending interrupt: what is read is what has to be given to [`Self::end`].
    pub fn acknowledge(&self) -> u32 {
        let taken = self.interface.read32(INTERFACE_IAR);
        // What the device wrote before it interrupted is seen by the handler.
        crate::cpu::finish();
        taken
    }

    /// The interrupt ID in what was acknowledged.
    pub const fn id(taken: u32) -> u32 {
        taken & ID
    }

    /// Ends an interrupt.
    pub fn end(&self, taken: u32) {
        // The handler's register writes, which silence a level-triggered device, come first.
        crate::cpu::finish();
        self.interface.write32(INTERFACE_EOIR, taken);
    }

    /// Sends software generated interrupt `sgi` (below 16) to the cores in `targets`.
    pub fn send_sgi(&self, sgi: u32, targets: u8) {
        // What was written before is seen by who takes the interrupt.
        base::barrier::publish();
        self.distributor.write32(SGIR, u32::from(targets) << 16 | sgi & 0xf);
    }
}
