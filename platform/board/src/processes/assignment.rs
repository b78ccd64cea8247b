//! A PCI function in the hands of a process.
//!
//! The process gets the registers of memory BARs, by whole pages, and an address space of the device's in which it chooses the
//! addresses; or the device gets the process's. Configuration space stays with the kernel, and so does the BAR with the table of
//! interrupts: the kernel says where they go.
//!
//! # Interrupts
//!
//! By message where the function sends some and something takes them, else by wire, if the function has one. Each shuts a gate in
//! the function before the process is told, and the process has it opened again: a vector's mask, MSI as a whole, or the Interrupt
//! Disable of a wire, which others share and go on using. (A gate binds the function, not its DMA: a process that has its device write
//! to its doorbell gets the event again. It is its own, and costs what an interrupt costs.)
//!
//! A message is a store to a doorbell, which a process must not reach. In tables that a process shares with its device the doorbell is
//! there for privileged accesses only, and those of a PCIe device are not; so they are taken for privileged (STE.PRIVCFG). Where the
//! SMMU cannot do that, the device interrupts by its wire, which does not pass the SMMU, or not at all.
//!
//! # Coming to rest
//!
//! A device that goes from one process to the next must have forgotten the first: a transfer that was begun and is still under way
//! would reach the second's memory. So only devices that the kernel can bring to rest are given away: virtio devices by their
//! reset, edu, which has none, by waiting for the end of its transfer behind a blocked stream, and all others by the function-level
//! reset of PCI Express if they have one, which makes them forget everything, before the first process too. In between the function
//! is off the bus and its group blocked. One that does not come to rest stays so. What edu has in its buffer, 4 KiB of what its last
//! driver had it read, stays there: it is a test device, and has no way to forget it.
//!
//! # Locking
//!
//! The gate of an interrupt is written by its handler and by [`Assigned::acknowledge`]; each write is complete in itself (a word of
//! the table of MSI-X), or made under the function's own lock; that of a wire under the line's too.

use super::UserTables;
use crate::drivers::LIFECYCLE_MILLIS;
use crate::{Error, Hardware, Master};
use abi::{Mode, Signal};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::irq::Handler;
use base::{Deadline, fallible};
use dma::{Limits, OwnedAttachment, OwnedDomain};
use iommu::{IovaRange, PhysRange, Prot};
use pci::{Function, MessageGate, Msi, Msix, PciError, Wire};
use process::contract::{Extent, Kind};
use process::{Assigned, Event, RegisterWindow, Window, window};
use virtio::spec::feature;
use virtio::transport::{PciTransport, Transport, reset};

/// The registers of a BAR.
struct Registers(Window);

// SAFETY: a BAR keeps its place once it has one, `window` has found nobody else in its pages, and the function is isolated: what its
// registers make it do ends at what it was lent, and what they do to the one who writes them is that one's business.
unsafe impl Extent for Registers {
    fn runs(&self) -> &[PhysRange] {
        core::slice::from_ref(self.0.range())
    }
    fn len(&self) -> u64 {
        self.0.range().len()
    }
    fn kind(&self) -> Kind {
        Kind::Registers
    }
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), process::Error> {
        Err(process::Error::BadAddress { address: offset, len: to.len() as u64 })
    }
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), process::Error> {
        Err(process::Error::BadAddress { address: offset, len: from.len() as u64 })
    }
}

/// How a device is brought to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// By the reset of virtio, while it still masters the bus.
    Virtio,
    /// By waiting for the end of edu's transfer, when it does not any more.
    Edu,
    /// By the function-level reset, likewise.
    Function,
}

/// The vendor of virtio devices \[4.1.2\].
const VIRTIO: u16 = 0x1af4;

impl Rest {
    fn of(function: &Function) -> Option<Self> {
        match crate::hardware::kind(function) {
            Some("edu") => Some(Self::Edu),
            Some(_) => Some(Self::Virtio),
            None => function.has_reset().then_some(Self::Function),
        }
    }
}

/// Interrupts of a function.
enum Interrupts {
    Msi { _msi: Msi },
    Msix(Msix),
    Wire(Wire),
}

/// Checks that a device goes through the IOMMU before it. Virtio devices do if they offer to, and they do not wait to be asked: what
/// the process accepts of their features is all one.
fn obeys_iommu(function: &Arc<Function>) -> Result<(), virtio::Error> {
    let ids = function.ids();
    if ids.vendor != VIRTIO || !(0x1000..0x1080).contains(&ids.device) {
        return Ok(());
    }
    match PciTransport::new(function.clone())?.device_features() & feature::ACCESS_PLATFORM {
        0 => Err(virtio::Error::BypassesIommu),
        _ => Ok(()),
    }
}

/// What a running device has. Dropped in this order.
struct Running {
    interrupts: Option<Interrupts>,
    _attachment: OwnedAttachment,
    /// What the process fills: none if it is the process's own.
    domain: Option<OwnedDomain>,
    /// Whether its messages reach their doorbell.
    messages: bool,
}

/// A function that is put by for a process. It is stopped until the process opens it.
pub struct Assignment {
    running: Option<Running>,
    /// None after it was stopped.
    master: Option<Master>,
    name: Arc<str>,
    rest: Rest,
    reserved: Vec<IovaRange>,
    /// All other BARs of the machine.
    others: Vec<PhysRange>,
    event: Arc<Event>,
    gates: Vec<(u16, MessageGate)>,
    /// The process's tables, if the device may have them.
    tables: Option<Arc<UserTables>>,
}

impl Assignment {
    /// Puts `function` of host `host` by. Nobody else uses it.
    ///
    /// # Errors
    ///
    /// As [`Hardware::attach`]; [`Error::NotIsolated`] where no IOMMU translates for it, whatever the command line allows;
    /// [`Error::Virtio`] for a virtio device that would go around it;
    /// [`Error::Unsupported`] for a function that the kernel cannot bring to rest.
    pub fn new(hardware: &Hardware, host: usize, function: &Arc<Function>, limits: Limits) -> Result<Self, Error> {
        let rest = Rest::of(function).ok_or(Error::Unsupported("device, which it could not bring to rest"))?;
        let kind = crate::hardware::kind(function).unwrap_or("device");
        let master = hardware.attach(host, function, kind, limits, false)?;
        if !master.device().is_isolated() {
            return Err(Error::NotIsolated(master.device().name().to_string()));
        }
        // A program maintains no caches.
        if !master.device().is_coherent() {
            return Err(Error::Unsupported("device, which does not snoop, in the hands of a process"));
        }
        obeys_iommu(function).map_err(|error| Error::Virtio { name: master.device().name().to_string(), error })?;
        let mut reserved = Vec::new();
        if let Some(domain) = master.group().and_then(|group| group.domain()) {
            for region in domain.reserved() {
                reserved.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                reserved.push(region.range);
            }
        }
        let mut others = Vec::new();
        for (_, other) in hardware.functions() {
            for bar in other.bars().filter(|bar| bar.is_memory()) {
                let range = bar.phys.and_then(|phys| PhysRange::new(phys, bar.size));
                others.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                others.extend(range);
            }
        }
        Ok(Self {
            name: fallible::text(master.device().name()).ok_or(Error::OutOfMemory)?,
            running: None,
            master: Some(master),
            rest,
            reserved,
            others,
            event: fallible::arc(Event::default()).map_err(|_| Error::OutOfMemory)?,
            gates: Vec::new(),
            tables: None,
        })
    }

    /// Lets the device have the address space of the process that it is for, whose tables these are.
    #[must_use]
    pub fn sharing(mut self, tables: Arc<UserTables>) -> Self {
        self.tables = Some(tables);
        self
    }

    fn function(&self) -> Result<&Arc<Function>, process::Error> {
        self.master.as_ref().map(Master::function).ok_or(process::Error::NoSuchDevice("device any more"))
    }

    /// The function's BAR, and whether the table of interrupts lies in it.
    fn window(&self, bar: u8) -> Result<PhysRange, process::Error> {
        let none = || process::Error::NoSuchDevice("BAR");
        let found = self.function()?.memory_bar(bar).map_err(|_| none())?;
        found.phys.and_then(|phys| PhysRange::new(phys, found.size)).ok_or_else(none)
    }

    fn try_start(&mut self, mode: Mode) -> Result<Running, process::Error> {
        let master = self.master.as_ref().ok_or(process::Error::NoSuchDevice("device any more"))?;
        let device = master.device();
        let (domain, shared, messages) = match mode {
            Mode::Own => (OwnedDomain::new(device.name(), device)?, false, true),
            Mode::Shared => {
                let no = process::Error::Unsupported("the process's own table");
                let Some(tables) = &self.tables else { return Err(no) };
                let space = tables.space().cloned().ok_or(no)?;
                // The doorbell of interrupts is in it too, for privileged accesses.
                // SAFETY: only extents are mapped in it (contract of `process::contract`), which devices may access, and never where
                // the device has something reserved: the process's space keeps that free.
                (
                    unsafe { OwnedDomain::around(device.name(), device, space, Prot::PRIVILEGED) }?,
                    true,
                    tables.carry_messages(),
                )
            }
        };
        let attachment = domain.attach(device)?;
        if self.rest == Rest::Function {
            // Whatever firmware or the kernel has told it is not for the process.
            self.reset(master)?;
        }
        let running =
            Running { interrupts: None, _attachment: attachment, domain: (!shared).then_some(domain), messages };
        master.release().map_err(|error| self.failed(&error))?;
        Ok(running)
    }

    fn failed(&self, error: &dyn core::fmt::Display) -> process::Error {
        log::error!("{}: {error}", self.name);
        process::Error::Device
    }

    fn reset(&self, master: &Master) -> Result<(), process::Error> {
        master.function().reset(Deadline::after_millis(LIFECYCLE_MILLIS)).map_err(|error| self.failed(&error))
    }

    /// Brings the device to rest.
    fn quiet(&self, master: &Master) -> Result<(), process::Error> {
        let deadline = Deadline::after_millis(LIFECYCLE_MILLIS);
        // Before it is off the bus: a reset completes what is under way.
        let reset = match self.rest {
            Rest::Virtio => PciTransport::new(master.function().clone())
                .and_then(|transport| reset(&transport, deadline))
                .map_err(|error| self.failed(&error)),
            Rest::Edu | Rest::Function => Ok(()),
        };
        let arrested = master.arrest().map_err(|error| self.failed(&error));
        let drained = match self.rest {
            Rest::Virtio | Rest::Function => Ok(()),
            Rest::Edu => testdev::edu::drain(master.function(), deadline).map_err(|error| self.failed(&error)),
        };
        reset.and(arrested).and(drained)
    }
}

/// A handler that shuts the gate, where that is not done before it is called, and raises the event.
fn raise(event: &Arc<Event>, gate: Option<MessageGate>) -> Result<Arc<dyn Handler>, process::Error> {
    let event = event.clone();
    let handler = move || {
        if let Some(gate) = &gate {
            gate.set(false);
        }
        event.raise();
    };
    let handler = fallible::arc(handler).map_err(|_| process::Error::OutOfMemory)?;
    Ok(handler)
}

impl Assigned for Assignment {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self, offset: u16) -> u32 {
        self.function().map_or(u32::MAX, |function| function.read_config32(offset))
    }

    fn bar_size(&self, bar: u8) -> Result<u64, process::Error> {
        self.window(bar).map(PhysRange::len)
    }

    fn registers(&self, bar: u8) -> Result<Arc<dyn Extent>, process::Error> {
        let range = self.window(bar)?;
        let function = self.function()?;
        if pci::msix_bars(function).contains(&Some(bar)) {
            return Err(process::Error::Window { bar, why: "the table of interrupts is in it" });
        }
        // Itself once; whatever lies in its pages beside it is another's.
        let mut itself = false;
        let mut others =
            self.others.iter().copied().filter(|other| *other != range || core::mem::replace(&mut itself, true));
        let window = window(RegisterWindow { bar, range, others: &mut others })?;
        // Lets the function decode memory.
        function.bar_part(bar, 0, abi::PAGE).map_err(|error| self.failed(&error))?;
        let registers = fallible::arc(Registers(window)).map_err(|_| process::Error::OutOfMemory)?;
        Ok(registers)
    }

    fn start(&mut self, mode: Mode) -> Result<(), process::Error> {
        match self.try_start(mode) {
            Ok(running) => {
                self.running = Some(running);
                Ok(())
            }
            Err(error) => {
                if let Some(master) = &self.master {
                    // It never did anything; this is for the bus.
                    let _ = master.function().disable_bus_master();
                }
                Err(error)
            }
        }
    }

    fn stop(&mut self) -> Result<(), process::Error> {
        let Some(master) = self.master.take() else { return Ok(()) };
        let mut result = self.quiet(&master);
        // It is off the bus: none comes any more.
        self.gates.clear();
        if let Some(running) = &mut self.running {
            running.interrupts = None;
        }
        if self.rest == Rest::Function && result.is_ok() {
            result = self.reset(&master);
        }
        if result.is_err()
            && let Some(group) = master.group()
        {
            // In use for good, so that it stays blocked and is attached no more: what it has begun may still come.
            log::error!("{} did not come to rest, and is given to nobody any more", self.name);
            group.enter();
        }
        // The place in the owned domain (the group is blocked: it does not come back to its own), then the master.
        self.running = None;
        drop(master);
        result
    }

    fn domain(&self) -> Option<&OwnedDomain> {
        self.running.as_ref()?.domain.as_ref()
    }

    fn reserved(&self) -> &[IovaRange] {
        &self.reserved
    }

    fn connect(&mut self, vector: u16) -> Result<Signal, process::Error> {
        let master = self.master.as_ref().ok_or(process::Error::NoSuchDevice("device any more"))?;
        let (function, controller) = (master.function().clone(), master.messages());
        let running = self.running.as_mut().ok_or(process::Error::Unsupported("an interrupt of a stopped device"))?;
        if self.gates.iter().any(|(other, _)| *other == vector) {
            return Err(process::Error::Busy);
        }
        self.gates.try_reserve(1)?;
        let translate = |error: PciError| match error {
            PciError::NoVector { .. } => process::Error::NoSuchDevice("vector"),
            PciError::NoGate => process::Error::Unsupported("an interrupt that is not masked in its function"),
            PciError::OutOfMemory => process::Error::OutOfMemory,
            error => {
                log::error!("{:?}: {error}", function);
                process::Error::Device
            }
        };
        let by_message = running.messages && controller.has(function.requester_id(), 1);
        if running.interrupts.is_none() && by_message && pci::msix_bars(&function)[0].is_some() {
            let msix = Msix::new(function.clone(), controller.clone()).map_err(translate)?;
            running.interrupts = Some(Interrupts::Msix(msix));
        }
        if let Some(Interrupts::Msix(msix)) = &mut running.interrupts {
            let gate = msix.gate(vector).map_err(translate)?;
            msix.connect(vector, raise(&self.event, Some(gate.clone()))?).map_err(translate)?;
            self.gates.push((vector, gate));
            return Ok(Signal::Message);
        }
        // All others have one interrupt.
        if vector != 0 {
            return Err(process::Error::NoSuchDevice("vector"));
        }
        if running.interrupts.is_some() {
            return Err(process::Error::Busy);
        }
        if by_message && function.capability(pci::capability::MSI).is_some() {
            let gate = Msi::gate(&function).map_err(translate)?;
            let handler = raise(&self.event, Some(gate.clone()))?;
            let msi = Msi::new(function.clone(), controller, handler).map_err(translate)?;
            running.interrupts = Some(Interrupts::Msi { _msi: msi });
            self.gates.push((vector, gate));
            return Ok(Signal::Message);
        }
        let wire = master.connect_gated_wire(raise(&self.event, None)?).map_err(|error| match error {
            Error::NoInterrupt(_) => process::Error::Unsupported("an interrupt"),
            Error::OutOfMemory => process::Error::OutOfMemory,
            Error::Pci { error, .. } => translate(error),
            error => {
                log::error!("{error}");
                process::Error::Device
            }
        })?;
        running.interrupts = Some(Interrupts::Wire(wire));
        Ok(Signal::Wire)
    }

    fn event(&self) -> &Arc<Event> {
        &self.event
    }

    fn acknowledge(&mut self) {
        self.gates.iter().for_each(|(_, gate)| gate.set(true));
        if let Some(Interrupts::Wire(wire)) = self.running.as_ref().and_then(|running| running.interrupts.as_ref()) {
            wire.open();
        }
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        // It is logged.
        let _ = self.stop();
    }
}
