//! From a PCI function to the interrupt controller: by message, through the ITS or a GICv2m frame, or by wire.
//!
//! A function that has vectors, and whose messages something takes, interrupts by message; all others by wire, if they have a pin
//! and the host bridge's `interrupt-map` knows where it leads. Wires are shared (`pci::Line`).
//!
//! # Locking
//!
//! One [`IrqMutex`] around the list of messages that are given out, and one around the list of lines: leaves, but for the heap. No
//! handler takes them.

use crate::{Error, interrupts};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use base::irq::Handler;
use gic::{IntId, Msi, Priority, Source};
use iommu::PhysAddr;
use kernel::machine::{IntxMap, MsiController as Controller, PcieHost, RidMap};
use pci::{Function, Line, LineControl, MsiController, MsiError, MsiMessage, RequesterId, Wire};

/// How the functions of one PCIe host interrupt.
pub(crate) struct Signals {
    map: RidMap<Controller>,
    intx: IntxMap,
    given: IrqMutex<Vec<Msi>>,
}

/// The lines that functions share, by interrupt ID; across hosts.
static LINES: IrqMutex<Vec<(u32, Arc<Line>)>> = IrqMutex::new(Vec::new());

struct Control(IntId);

impl LineControl for Control {
    fn mask(&self) {
        if let Some(gic) = interrupts::gic() {
            gic.mask(self.0);
        }
    }

    fn unmask(&self) {
        if let Some(Err(error)) = interrupts::gic().map(|gic| gic.unmask(self.0)) {
            log::error!("{error}");
        }
    }
}

/// What the interrupt controller calls the messages that `controller` takes from the device that it knows as `device`.
pub(crate) fn source(controller: Controller, device: u32) -> Option<Source> {
    match controller {
        // The driver serves the first ITS; devices of others interrupt by wire.
        Controller::Its(0) => Some(Source::Its { device }),
        Controller::Its(_) => None,
        Controller::V2m(index) => Some(Source::Frame(index)),
    }
}

impl Signals {
    /// Makes what serves the functions of `host`.
    pub fn new(host: &PcieHost) -> Arc<Self> {
        Arc::new(Self { map: host.msi_map.clone(), intx: host.intx.clone(), given: IrqMutex::new(Vec::new()) })
    }

    /// Who takes a function's messages.
    pub fn source(&self, requester: RequesterId) -> Option<Source> {
        let (controller, device) = self.map.lookup(requester.get())?;
        source(controller, device)
    }

    /// The register that a function's messages are written to.
    pub fn doorbell(&self, requester: RequesterId) -> Option<PhysAddr> {
        interrupts::gic()?.doorbell(self.source(requester)?).ok()
    }

    /// Has `handler` serve the wire of `function`, known to the log as `name`.
    pub fn wire(&self, function: &Arc<Function>, name: &str, handler: Arc<dyn Handler>) -> Result<Wire, Error> {
        let connected = self.line(function, name)?.connect(function, handler);
        connected.map_err(|error| Error::Pci { name: name.to_string(), error })
    }

    /// As [`Signals::wire`], behind the function's gate ([`Line::connect_gated`]).
    pub fn gated_wire(&self, function: &Arc<Function>, name: &str, handler: Arc<dyn Handler>) -> Result<Wire, Error> {
        let connected = self.line(function, name)?.connect_gated(function, handler);
        connected.map_err(|error| Error::Pci { name: name.to_string(), error })
    }

    /// The line that the wire of `function` leads to.
    fn line(&self, function: &Function, name: &str) -> Result<Arc<Line>, Error> {
        let place = function.wire().and_then(|(slot, pin)| self.intx.lookup(slot, pin.number()));
        let interrupt = place.ok_or_else(|| Error::NoInterrupt(name.to_string()))?;
        let known = || LINES.lock().iter().find(|(id, _)| *id == interrupt.intid).map(|(_, line)| line.clone());
        match known() {
            Some(line) => Ok(line),
            None => {
                // Devices are attached by one core.
                let (id, _) = interrupts::id(interrupt)?;
                let line = Arc::new(Line::new(Arc::new(Control(id))));
                let mut lines = LINES.lock();
                lines.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                lines.push((interrupt.intid, line.clone()));
                drop(lines);
                if let Err(error) = interrupts::connect(interrupt, Priority::NORMAL, line.clone()) {
                    LINES.lock().retain(|(id, _)| *id != interrupt.intid);
                    return Err(error);
                }
                Ok(line)
            }
        }
    }
}

fn failed(error: gic::GicError) -> MsiError {
    log::warn!("MSI: {error}");
    match error {
        gic::GicError::NoMsi => MsiError::NoController,
        gic::GicError::OutOfMemory | gic::GicError::NoSpi | gic::GicError::NoLpi => MsiError::Exhausted,
        _ => MsiError::Failed,
    }
}

impl MsiController for Signals {
    fn has(&self, requester: RequesterId, count: usize) -> bool {
        let (Some(gic), Some(source)) = (interrupts::gic(), self.source(requester)) else { return false };
        gic.can_allocate(source, count)
    }

    fn allocate(&self, requester: RequesterId, handler: Arc<dyn Handler>) -> Result<MsiMessage, MsiError> {
        let gic = interrupts::gic().ok_or(MsiError::NoController)?;
        let source = self.source(requester).ok_or(MsiError::NoController)?;
        let mut list = gic.allocate_msi(source, 1, 0).map_err(failed)?;
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
        let source = self.source(requester).ok_or(MsiError::NoController)?;
        let msi = {
            let mut given = self.given.lock();
            let found = given.iter().position(|msi| msi.source() == source && msi.data() == message.data);
            given.swap_remove(found.ok_or(MsiError::Unknown)?)
        };
        gic.free_msi(msi).map_err(failed)
    }
}
