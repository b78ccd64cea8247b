//! QEMU's `iommu-testdev` (11.0 and later): writes a pattern through the IOMMU at once, and tells whether it got through.
//!
//! It shares its PCI ID with `pci-testdev`, which has more BARs and no DMA; it is told by its only BAR, 4 KiB of memory, and by
//! the lack of capabilities.

use crate::TestdevError;
use alloc::boxed::Box;
use alloc::sync::Arc;
use arch::mmio::Registers;
use base::IrqMutex;
use iommu::{Iova, PhysAddr};
use pci::Function;

/// PCI vendor and device ID, shared with `pci-testdev`.
pub const ID: (u16, u16) = (0x1b36, 0x0005);

/// The 32-bit word that the device writes over and over, little-endian.
pub const PATTERN: u32 = 0x1234_5678;

const REG_TRIGGER: usize = 0x00;
const REG_IOVA_LOW: usize = 0x04;
const REG_IOVA_HIGH: usize = 0x08;
const REG_LEN: usize = 0x0c;
const REG_RESULT: usize = 0x10;
const REG_DOORBELL: usize = 0x14;
const REG_ATTRIBUTES: usize = 0x18;
const REG_GPA_LOW: usize = 0x1c;
const REG_GPA_HIGH: usize = 0x20;

const REGISTERS: u64 = 0x1000;
const ARM: u32 = 1;
const DISARM: u32 = 0;
const RESULT_OK: u32 = 0;
const RESULT_WRITE_FAILED: u32 = 0xdead_0002;
const RESULT_MISMATCH: u32 = 0xdead_0004;

/// An iommu-testdev.
pub struct IommuTestdev {
    function: Arc<Function>,
    /// The registers; the lock makes one transfer's accesses one sequence.
    regs: IrqMutex<Box<dyn Registers>>,
}

impl IommuTestdev {
    /// Whether `function` is an iommu-testdev, and not a pci-testdev.
    pub fn matches(function: &Function) -> bool {
        let ids = function.ids();
        let mut bars = function.bars();
        let only_bar = bars.next().is_some_and(|bar| bar.index == 0 && bar.is_memory() && bar.size == REGISTERS);
        (ids.vendor, ids.device) == ID && only_bar && bars.next().is_none() && function.capabilities().is_empty()
    }

    /// Takes the device. Bus mastering is the caller's to enable.
    ///
    /// # Errors
    ///
    /// [`TestdevError::WrongDevice`], [`TestdevError::Pci`].
    pub fn new(function: Arc<Function>) -> Result<Self, TestdevError> {
        if !Self::matches(&function) {
            return Err(TestdevError::WrongDevice);
        }
        let regs = Box::new(function.bar(0)?);
        Ok(Self::with_registers(function, regs))
    }

    pub(crate) fn with_registers(function: Arc<Function>, regs: Box<dyn Registers>) -> Self {
        Self { function, regs: IrqMutex::new(regs) }
    }

    /// The PCI function.
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// Has the device write `len` bytes of [`PATTERN`] to `iova`, and then look, around the IOMMU, whether they are at `phys`.
    /// Both happen before this returns.
    ///
    /// # Errors
    ///
    /// [`TestdevError::Blocked`] if the IOMMU stopped the write; [`TestdevError::Mismatch`] if it went elsewhere (or `phys` is
    /// not one run of memory); [`TestdevError::Refused`] for everything else that the device does not do.
    pub fn write(&self, iova: Iova, len: u32, phys: PhysAddr) -> Result<(), TestdevError> {
        let regs = self.regs.lock();
        regs.write32(REG_IOVA_LOW, iova.get() as u32);
        regs.write32(REG_IOVA_HIGH, (iova.get() >> 32) as u32);
        regs.write32(REG_GPA_LOW, phys.get() as u32);
        regs.write32(REG_GPA_HIGH, (phys.get() >> 32) as u32);
        regs.write32(REG_LEN, len);
        regs.write32(REG_ATTRIBUTES, 0);
        regs.write32(REG_DOORBELL, ARM);
        base::barrier::publish();
        // Reading this register is what runs the transfer.
        let _run = regs.read32(REG_TRIGGER);
        let result = regs.read32(REG_RESULT);
        regs.write32(REG_DOORBELL, DISARM);
        base::barrier::device_read();
        match result {
            RESULT_OK => Ok(()),
            RESULT_WRITE_FAILED => Err(TestdevError::Blocked),
            RESULT_MISMATCH => Err(TestdevError::Mismatch),
            other => Err(TestdevError::Refused(other)),
        }
    }
}
