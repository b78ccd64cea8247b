//! Function-level reset (PCI Express Base, 6.6.2): the function forgets all that it was told, whatever it is.
//!
//! First the function is taken off the bus, and what it has under way is waited for: a completion that came afterwards could be taken
//! for one of a request of its next user's. Then it is reset, has [`RESET_MILLIS`] for itself, and answers again some time later. It
//! has lost its configuration space too: what this crate has written there, and what firmware has agreed on with the ports above it,
//! is written again.
//!
//! # Locking
//!
//! None while waiting. Nobody else uses the function meanwhile: its interrupts are disconnected before, its registers are not
//! accessed. Status of a shared wire may be read; the function asserts none.

use crate::bar;
use crate::caps::id;
use crate::config::{Command, reg};
use crate::{Function, PciError};
use base::{Deadline, wait_until};

/// Milliseconds that a function has for itself after it was told to reset.
pub const RESET_MILLIS: u64 = 100;

/// Milliseconds between two looks whether it answers again.
const LOOK_MILLIS: u64 = 5;

const DEVICE_CAPABILITIES: u16 = 0x04;
const FUNCTION_LEVEL_RESET: u32 = 1 << 28;
const DEVICE_CONTROL: u16 = 0x08;
const INITIATE_RESET: u16 = 1 << 15;
const DEVICE_CONTROL_2: u16 = 0x28;

impl Function {
    /// Whether the function has a reset of its own ([`Function::reset`]).
    pub fn has_reset(&self) -> bool {
        let express = self.capability(id::EXPRESS).filter(|_| !self.is_bridge());
        express.is_some_and(|express| {
            let can = self.read_config32(express.offset + DEVICE_CAPABILITIES);
            can != u32::MAX && can & FUNCTION_LEVEL_RESET != 0
        })
    }

    /// Resets the function. Then it has its addresses again, and decodes memory if it did before; it does not master the bus, and
    /// interrupts in no way. It has until `deadline` to answer, and at least [`RESET_MILLIS`].
    ///
    /// # Errors
    ///
    /// [`PciError::NoCapability`] for a function without a reset, of which nothing has changed;
    /// [`PciError::TransactionsPending`], and it is not reset, but off the bus; [`PciError::NotReady`] if it does not answer any more,
    /// or is another, and [`PciError::BarNotWritable`]: then it decodes nothing, and does not master the bus.
    pub fn reset(&self, deadline: Deadline) -> Result<(), PciError> {
        self.check()?;
        if !self.has_reset() {
            return Err(PciError::NoCapability("function-level reset"));
        }
        let express = self.capability(id::EXPRESS).ok_or(PciError::NoCapability("PCI Express"))?.offset;
        self.disable_bus_master()?;
        let config = &self.config;
        let memory = config.read16(reg::COMMAND) & Command::MEMORY.bits();
        // What ports above and functions below must agree about, such as the size of packets, is not ours to choose.
        let control = config.read16(express + DEVICE_CONTROL) & !INITIATE_RESET;
        let second = (config.read16(express + 2) & 0xf >= 2).then(|| config.read16(express + DEVICE_CONTROL_2));
        // Decodes nothing meanwhile, nor afterwards, until it has its addresses.
        config.write16(reg::COMMAND, Command::INTX_DISABLE.bits());
        config.write16(express + DEVICE_CONTROL, control | INITIATE_RESET);
        // Not accessed meanwhile.
        let _ = wait_until(Deadline::after_millis(RESET_MILLIS), || false);
        // All ones, or 1 where the root complex says that it was told to ask again.
        while config.read16(reg::VENDOR) != self.ids().vendor {
            if deadline.has_passed() {
                return Err(PciError::NotReady);
            }
            let _ = wait_until(Deadline::after_millis(LOOK_MILLIS).min(deadline), || false);
        }
        if config.read16(reg::DEVICE) != self.ids().device {
            return Err(PciError::NotReady);
        }
        // By our own list, not by what the function said before.
        for found in self.bars() {
            if let Some(address) = found.bus {
                bar::write(config, found, address)?;
            }
        }
        config.write16(express + DEVICE_CONTROL, control);
        if let Some(second) = second {
            config.write16(express + DEVICE_CONTROL_2, second);
        }
        config.write16(reg::COMMAND, Command::INTX_DISABLE.bits() | memory);
        Ok(())
    }
}

#[cfg(test)]
#[path = "reset_tests.rs"]
mod tests;
