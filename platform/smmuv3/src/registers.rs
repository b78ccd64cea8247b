//! How the driver reaches the registers: memory-mapped on the target, the model on a host.

use arch::mmio::Mmio;

/// The register map of one SMMU, both pages. Offsets are those of [`crate::spec::registers`].
///
/// 64-bit accesses are made only to the 64-bit registers (STRTAB_BASE, CMDQ_BASE, EVENTQ_BASE and the `*_IRQ_CFG0`s).
/// Implementations order nothing: the driver publishes memory before it writes a register.
pub trait Registers: Send + Sync + 'static {
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

impl Registers for Mmio {
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
