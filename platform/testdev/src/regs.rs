//! Register access as a trait, so that tests can put a device behind it.

use arch::mmio::Mmio;

pub(crate) trait Registers: Send + Sync {
    fn read32(&self, offset: usize) -> u32;
    fn write32(&self, offset: usize, value: u32);
    fn read64(&self, offset: usize) -> u64;
    fn write64(&self, offset: usize, value: u64);
}

impl Registers for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        Mmio::read32(self, offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        Mmio::write32(self, offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        Mmio::read64(self, offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        Mmio::write64(self, offset, value);
    }
}
