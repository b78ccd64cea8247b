//! GICv2m: a page in which a device writes the number of the SPI that it wants to raise.
//!
//! Unlike an ITS, a frame does not know who writes: every device to which the page is mapped can raise every SPI of the frame. What
//! a device gains by it is that a handler of another's runs in vain; handlers look at what their device says, not at who called.
//!
//! # Locking
//!
//! One lock for who has which SPI: a leaf.
//!
//! A frame's SPIs need not be its alone: on QEMU's `virt` the wires of the SMMU are among them. What is enabled as a wire is no
//! message from then on.
//!
//! SBSA (DEN 0029), appendix "GICv2m architecture".

use crate::regs::Registers;
use crate::table::FIRST_SPI;
use crate::{GicError, Region};
use alloc::vec::Vec;
use base::IrqMutex;
use core::ops::Range;
use iommu::PhysAddr;

const MSI_TYPER: usize = 0x8;
/// The doorbell's offset in the frame.
const MSI_SETSPI: u64 = 0x40;

/// A frame as the device tree has it.
#[derive(Clone, Copy, Debug)]
pub struct FrameConfig {
    /// Its registers.
    pub region: Region,
    /// The interrupt ID of its first SPI, where that is not what the frame itself says.
    pub first: Option<u32>,
    /// The number of its SPIs, likewise.
    pub count: Option<u32>,
}

/// Who has an SPI.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Nobody,
    Message,
    Wire,
}

pub(crate) struct Frame {
    doorbell: PhysAddr,
    first: u32,
    owners: IrqMutex<Vec<Owner>>,
}

impl Frame {
    /// Takes a frame whose SPIs are among the interrupts below `limit`.
    pub fn new(
        regs: &dyn Registers,
        phys: PhysAddr,
        first: Option<u32>,
        count: Option<u32>,
        limit: u32,
    ) -> Result<Self, GicError> {
        let typer = regs.read32(MSI_TYPER);
        let (first, count) = (first.unwrap_or(typer >> 16 & 0x3ff), count.unwrap_or(typer & 0x3ff));
        let end = first.checked_add(count).filter(|end| first >= FIRST_SPI && count != 0 && *end <= limit);
        if end.is_none() {
            return Err(GicError::BadFrame { first, count });
        }
        let mut owners = Vec::new();
        owners.try_reserve_exact(count as usize).map_err(|_| GicError::OutOfMemory)?;
        owners.resize(count as usize, Owner::Nobody);
        let doorbell = phys.checked_add(MSI_SETSPI).ok_or(GicError::WindowTooSmall("MSI frame"))?;
        Ok(Self { doorbell, first, owners: IrqMutex::new(owners) })
    }

    /// Where devices write the SPI's interrupt ID to.
    pub fn doorbell(&self) -> PhysAddr {
        self.doorbell
    }

    /// How many SPIs are not given out.
    pub fn free(&self) -> usize {
        self.owners.lock().iter().filter(|owner| **owner == Owner::Nobody).count()
    }

    /// Takes `count` consecutive SPIs, the first aligned to their number rounded up to a power of two (as multiple-message MSI wants
    /// them).
    pub fn take(&self, count: usize) -> Result<Range<u32>, GicError> {
        let step = u32::try_from(count.next_power_of_two()).map_err(|_| GicError::NoSpi)?;
        let mut owners = self.owners.lock();
        let first = self.first.checked_next_multiple_of(step).ok_or(GicError::NoSpi)?;
        let mut at = (first - self.first) as usize;
        while let Some(run) = owners.get_mut(at..at.saturating_add(count)).filter(|run| !run.is_empty()) {
            if run.iter().all(|owner| *owner == Owner::Nobody) {
                run.fill(Owner::Message);
                let first = self.first + at as u32;
                return Ok(first..first + count as u32);
            }
            at += step as usize;
        }
        Err(GicError::NoSpi)
    }

    /// Gives a message's SPI back. Only after it was disabled.
    pub fn give_back(&self, id: u32) {
        let at = id.wrapping_sub(self.first) as usize;
        if let Some(owner) = self.owners.lock().get_mut(at) {
            *owner = Owner::Nobody;
        }
    }

    /// Gives an SPI to a wire, for good. Others than the frame's are none of its business.
    ///
    /// # Errors
    ///
    /// [`GicError::InUse`] where it is a message's.
    pub fn withdraw(&self, id: u32) -> Result<(), GicError> {
        let at = id.wrapping_sub(self.first) as usize;
        match self.owners.lock().get_mut(at) {
            Some(Owner::Message) => Err(GicError::InUse(id)),
            Some(owner) => {
                *owner = Owner::Wire;
                Ok(())
            }
            None => Ok(()),
        }
    }
}
