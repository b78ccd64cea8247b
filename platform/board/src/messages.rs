//! Interrupts by message, from the ITS to a PCI function.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the list of messages that are given out: a leaf.

use crate::interrupts;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use base::irq::Handler;
use gic::Msi;
use kernel::machine::{MsiController as Controller, RidMap};
use pci::{MsiController, MsiError, MsiMessage, RequesterId};

/// Gives messages to the functions of one PCIe host.
pub(crate) struct Messages {
    map: RidMap<Controller>,
    given: IrqMutex<Vec<Msi>>,
}

impl Messages {
    /// Makes the controller of a host whose `msi-map` is `map`.
    pub fn new(map: RidMap<Controller>) -> Arc<Self> {
        Arc::new(Self { map, given: IrqMutex::new(Vec::new()) })
    }

    /// The ITS's name for a function.
    fn device(&self, requester: RequesterId) -> Result<u32, MsiError> {
        match self.map.lookup(requester.get()) {
            // The driver serves the first ITS; a machine with more gives their devices no messages.
            Some((Controller::Its(0), device)) => Ok(device),
            _ => Err(MsiError::NoController),
        }
    }
}

fn failed(error: gic::GicError) -> MsiError {
    log::warn!("MSI: {error}");
    match error {
        gic::GicError::NoMsi => MsiError::NoController,
        gic::GicError::OutOfMemory => MsiError::Exhausted,
        _ => MsiError::Failed,
    }
}

impl MsiController for Messages {
    fn allocate(&self, requester: RequesterId, handler: Arc<dyn Handler>) -> Result<MsiMessage, MsiError> {
        let gic = interrupts::gic().ok_or(MsiError::NoController)?;
        let device = self.device(requester)?;
        let mut list = gic.allocate_msi(device, 1, 0).map_err(failed)?;
        let msi = list.pop().ok_or(MsiError::Exhausted)?;
        if let Err(error) = gic.enable_msi(&msi, handler) {
            // What the error was matters more than whether the message could be given back.
            let _ = gic.free_msi(msi);
            return Err(failed(error));
        }
        let message = MsiMessage { address: msi.doorbell().get(), data: msi.data() };
        let mut given = self.given.lock();
        if given.try_reserve(1).is_err() {
            drop(given);
            let _ = gic.free_msi(msi);
            return Err(MsiError::Exhausted);
        }
        given.push(msi);
        Ok(message)
    }

    fn free(&self, requester: RequesterId, message: MsiMessage) -> Result<(), MsiError> {
        let gic = interrupts::gic().ok_or(MsiError::NoController)?;
        let device = self.device(requester)?;
        let msi = {
            let mut given = self.given.lock();
            let found = given.iter().position(|msi| msi.device() == device && msi.data() == message.data);
            given.swap_remove(found.ok_or(MsiError::Unknown)?)
        };
        gic.free_msi(msi).map_err(failed)
    }
}
