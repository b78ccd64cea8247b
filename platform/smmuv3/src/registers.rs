//! How the driver reaches the registers: memory-mapped on the target, the model on a host.

use crate::spec::registers as reg;
use arch::mmio::{Mmio, Register32};

/// The register map of one SMMU, both pages. Offsets are those of [`crate::spec::registers`].
///
/// 64-bit accesses are made only to the 64-bit registers (STRTAB_BASE, CMDQ_BASE, EVENTQ_BASE and the `*_IRQ_CFG0`s).
/// Implementations order nothing: the driver publishes memory before it writes a register.
pub trait Registers: Send + Sync + 'static {
    /// One of the 32-bit registers, at hand.
    type Register: Register;

    /// Finds the 32-bit register at `offset`, which is then reached without looking again whether it is there.
    fn register(&self, offset: usize) -> Self::Register;
    /// Reads a 32-bit register.
    fn read32(&self, offset: usize) -> u32;
    /// Writes a 32-bit register.
    fn write32(&self, offset: usize, value: u32);
    /// Reads a 64-bit register.
    fn read64(&self, offset: usize) -> u64;
    /// Writes a 64-bit register.
    fn write64(&self, offset: usize, value: u64);
    /// Waits for the SMMU's event (CMD_SYNC with completion signal SEV), or for a bounded while. May return at any time.
    fn wait_for_event(&self) {
        core::hint::spin_loop();
    }
    /// Bytes that the map covers.
    fn size(&self) -> usize;
}

/// A 32-bit register; accesses are as those of [`Registers`].
pub trait Register: Send + Sync + 'static {
    /// Reads it.
    fn read(&self) -> u32;
    /// Writes it.
    fn write(&self, value: u32);
}

impl Register for Register32 {
    #[inline(always)]
    fn read(&self) -> u32 {
        Self::read(self)
    }
    #[inline(always)]
    fn write(&self, value: u32) {
        Self::write(self, value);
    }
}

/// A register of a map that nothing is gained for by looking for it beforehand.
#[derive(Debug)]
pub struct Offset<R> {
    /// The map.
    pub registers: R,
    /// Where in it.
    pub offset: usize,
}

impl<R: Registers> Register for Offset<R> {
    fn read(&self) -> u32 {
        self.registers.read32(self.offset)
    }
    fn write(&self, value: u32) {
        self.registers.write32(self.offset, value);
    }
}

/// The registers of the command queue that are used again and again.
pub(crate) struct Doorbell<R: Registers> {
    pub prod: R::Register,
    pub cons: R::Register,
}

impl<R: Registers> Doorbell<R> {
    pub fn new(registers: &R) -> Self {
        Self { prod: registers.register(reg::CMDQ_PROD), cons: registers.register(reg::CMDQ_CONS) }
    }
}

impl Registers for Mmio {
    type Register = Register32;

    fn register(&self, offset: usize) -> Register32 {
        self.register32(offset)
    }
    #[inline(always)]
    fn read32(&self, offset: usize) -> u32 {
        Self::read32(self, offset)
    }
    #[inline(always)]
    fn write32(&self, offset: usize, value: u32) {
        Self::write32(self, offset, value);
    }
    #[inline]
    fn read64(&self, offset: usize) -> u64 {
        Self::read64(self, offset)
    }
    #[inline]
    fn write64(&self, offset: usize, value: u64) {
        Self::write64(self, offset, value);
    }
    #[cfg(target_os = "none")]
    fn wait_for_event(&self) {
        arch::timer::wait_for_event();
    }
    fn size(&self) -> usize {
        self.len()
    }
}
