//! All of the machine's hardware, brought up in the order that keeps devices from memory.

use crate::bus::Bus;
use crate::containment::Containment;
use crate::drivers::LIFECYCLE_MILLIS;
use crate::masters::{Context, Known};
use crate::memory::{COHERENT, NON_COHERENT};
use crate::viommu::{self, Viommu};
use crate::{Error, Master, Treatment, interrupts, signals};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::mmio::Mmio;
use base::{Deadline, IrqMutex, Turn};
use core::sync::atomic::AtomicBool;
use dma::Limits;
use gic::Priority;
use iommu::contract::Iommu;
use iommu::group::Group;
use iommu::{Fault, FaultSink};
use kernel::faults::FaultLog;
use kernel::machine::{self, IommuRef, Machine};
use pci::Function;
use smmuv3::{Message, Messages, Smmu};
use spin::Once;

/// The machine at work.
pub struct Hardware {
    machine: &'static Machine,
    smmus: Vec<Smmu<Mmio>>,
    viommus: Vec<Viommu>,
    /// The SMMUs, then the virtio-iommus.
    iommus: Vec<Arc<dyn Iommu>>,
    buses: Vec<Bus>,
    faults: Arc<FaultLog>,
    containment: Arc<Containment>,
    groups: IrqMutex<Vec<Known>>,
    /// Whether a core is attaching a device, and has the list.
    attaching: AtomicBool,
}

impl Hardware {
    /// Brings up the interrupt controller, every SMMU, every PCIe host, and the IOMMUs that are PCI functions themselves. No device
    /// can reach memory when this returns: what is behind an IOMMU is blocked, and nothing but an IOMMU masters the bus.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub fn bring_up(machine: &'static Machine) -> Result<Self, Error> {
        interrupts::init(machine)?;
        let faults = Arc::new(FaultLog::new());
        arch::timer::set_deferred(alarm);
        dma::lazy::set_alarm(|after| arch::timer::defer(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX)));
        let containment = Containment::of(&faults);
        let mut smmus = Vec::new();
        let mut iommus: Vec<Arc<dyn Iommu>> = Vec::new();
        for description in &machine.smmus {
            let smmu = start(description, faults.clone())?;
            iommus.push(Arc::new(smmu.clone()));
            smmus.push(smmu);
        }
        SMMUS.call_once(|| smmus.clone());
        let mut buses = Vec::new();
        for (index, description) in machine.pcie.iter().enumerate() {
            buses.push(Bus::enumerate(index, description)?);
        }
        let mut viommus = Vec::new();
        for description in &machine.virtio_iommus {
            let viommu = viommu::start(machine, description, &buses, faults.clone(), serve_later)?;
            iommus.push(viommu.iommu().clone());
            viommus.push(viommu);
        }
        VIOMMUS.call_once(|| viommus.iter().map(|viommu| viommu.driver().events().clone()).collect());
        let (groups, attaching) = (IrqMutex::new(Vec::new()), AtomicBool::new(false));
        Ok(Self { machine, smmus, viommus, iommus, buses, faults, containment, groups, attaching })
    }

    /// What it was made from.
    pub fn machine(&self) -> &'static Machine {
        self.machine
    }

    /// The SMMUs, in the order of the device tree.
    pub fn smmus(&self) -> &[Smmu<Mmio>] {
        &self.smmus
    }

    /// The virtio-iommus, in the order of the device tree.
    pub fn viommus(&self) -> &[Viommu] {
        &self.viommus
    }

    /// All IOMMUs, of whatever kind.
    pub fn iommus(&self) -> &[Arc<dyn Iommu>] {
        &self.iommus
    }

    /// What the IOMMUs have stopped.
    pub fn faults(&self) -> &Arc<FaultLog> {
        &self.faults
    }

    /// Says what the DMA-API knows of a fault: which device, and what became of the address. `None` if no device in use has the
    /// stream.
    pub fn explain(&self, fault: &Fault) -> Option<String> {
        self.containment.explain(fault)
    }

    /// How often a device that did not stop faulting was taken off the bus.
    pub fn contained(&self) -> u64 {
        self.containment.count()
    }

    /// All PCI functions, with the index of their host.
    pub fn functions(&self) -> impl Iterator<Item = (usize, &Arc<Function>)> {
        self.buses.iter().flat_map(|bus| bus.host.functions().iter().map(|function| (bus.index, function)))
    }

    /// Gives a function an address space: a DMA domain of its group's own. It does not master the bus yet
    /// ([`Master::release`]).
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`] where no IOMMU translates for it, unless `allow_unprotected`; and others.
    pub fn attach(
        &self,
        host: usize,
        function: &Arc<Function>,
        kind: &str,
        limits: Limits,
        allow_unprotected: bool,
    ) -> Result<Master, Error> {
        self.attach_as(host, function, kind, limits, &Treatment { allow_unprotected, ..Treatment::default() })
    }

    /// The group of a function of host `host` that was attached before, to look at.
    pub fn group_of(&self, host: usize, function: &Function) -> Option<Arc<Group>> {
        let groups = self.groups.lock();
        let known = groups.iter().find(|known| known.host == host && known.name == function.group())?;
        Some(known.group.clone())
    }

    /// As [`Hardware::attach`], with a say in how the function is treated.
    ///
    /// # Errors
    ///
    /// As [`Hardware::attach`]; [`Error::Passthrough`] where the function is to be let through and cannot be.
    pub fn attach_as(
        &self,
        host: usize,
        function: &Arc<Function>,
        kind: &str,
        limits: Limits,
        treatment: &Treatment,
    ) -> Result<Master, Error> {
        let bus = self.buses.iter().find(|bus| bus.index == host).ok_or(Error::Missing("PCIe host"))?;
        let description = self.machine.pcie.get(host).ok_or(Error::Missing("PCIe host"))?;
        let name = format!("{kind} {}", function.bdf());
        // The list is taken out while the IOMMU is at work: no lock is held across its waits. Meanwhile it is this core's turn.
        let deadline = Deadline::after_millis(LIFECYCLE_MILLIS);
        let _turn = Turn::take(&self.attaching, deadline).map_err(|_| Error::Turn)?;
        let mut known = core::mem::take(&mut *self.groups.lock());
        let attached = Context {
            host_index: host,
            host: description,
            iommu: &|kind| self.iommu(kind),
            machine: self.machine,
            functions: bus.host.functions(),
            containment: &self.containment,
            signals: &bus.signals,
            treatment,
            known: &mut known,
        }
        .attach(function, &name, limits);
        self.groups.lock().append(&mut known);
        attached
    }
}

/// The SMMUs whose backlogs are served by the clock.
static SMMUS: Once<Vec<Smmu<Mmio>>> = Once::new();
/// And those of the virtio-iommus.
static VIOMMUS: Once<Vec<Arc<virtio::iommu::Events>>> = Once::new();

/// How long the kernel runs on between two looks at a flood, in nanoseconds.
const BETWEEN_LOOKS: u64 = 1_000_000;

/// What an IOMMU calls that cannot keep up with its faults.
fn serve_later() {
    arch::timer::defer(BETWEEN_LOOKS);
}

/// What the timer calls, whoever asked for it.
fn alarm() {
    dma::lazy::alarm_expired();
    serve_backlogs();
}

fn serve_backlogs() {
    if let Some(smmus) = SMMUS.get() {
        smmus.iter().for_each(Smmu::serve_backlog);
    }
    match VIOMMUS.get() {
        Some(viommus) => viommus.iter().for_each(|events| events.serve_backlog()),
        // They are still being started, the SMMUs perhaps too.
        None => serve_later(),
    }
}

/// Has an SMMU interrupt by message. Says whether it does.
fn connect_messages(
    smmu: &Smmu<Mmio>,
    parent: Option<(machine::MsiController, u32)>,
    name: &str,
) -> Result<bool, smmuv3::Error> {
    let source = parent.and_then(|(controller, device)| signals::source(controller, device));
    let (Some(source), Some(gic), true) = (source, interrupts::gic(), smmu.features().msi) else {
        return Ok(false);
    };
    let handlers = [smmu.event_handler(), smmu.error_handler(), smmu.page_request_handler()];
    let mut messages = Vec::new();
    let allocated = gic.allocate_msi(source, handlers.len(), 0).and_then(|list| {
        for (msi, handler) in list.into_iter().zip(handlers) {
            gic.enable_msi(&msi, handler)?;
            messages.push(Message { address: msi.doorbell().get(), data: msi.data() });
        }
        Ok(())
    });
    match (allocated, messages.as_slice()) {
        (Ok(()), &[events, errors, requests]) => {
            smmu.use_messages(&Messages { events, errors, page_requests: Some(requests) })?;
            Ok(true)
        }
        (result, _) => {
            // What was allocated stays so: it belongs to this SMMU alone.
            log::warn!("{name}: no interrupts by message ({result:?}); its wires are used");
            Ok(false)
        }
    }
}

impl Hardware {
    /// An IOMMU by its name in the machine's description.
    fn iommu(&self, which: IommuRef) -> Option<&Arc<dyn Iommu>> {
        match which {
            IommuRef::Smmu(index) => self.iommus.get(..self.smmus.len())?.get(index.0),
            IommuRef::Virtio(index) => self.iommus.get(self.smmus.len()..)?.get(index.0),
        }
    }
}

/// Starts one SMMU: everything behind it is blocked.
fn start(description: &machine::Smmu, faults: Arc<dyn FaultSink>) -> Result<Smmu<Mmio>, Error> {
    let registers = interrupts::map(&description.path, description.registers)?;
    let name = description.path.rsplit('/').next().unwrap_or("smmuv3").to_string();
    let memory = if description.coherent { &COHERENT } else { &NON_COHERENT };
    let config = smmuv3::Config { name: name.clone(), defer: Some(serve_later), ..smmuv3::Config::default() };
    let failed = |error| Error::Smmu { name: name.clone(), error };
    let smmu = Smmu::new(registers, memory, faults, config).map_err(failed)?;
    let by_message = connect_messages(&smmu, description.msi_parent, &name).map_err(failed)?;
    let wires = &description.interrupts;
    match (wires.eventq, wires.gerror, wires.combined) {
        _ if by_message => {}
        (_, _, Some(combined)) => interrupts::connect(combined, Priority::URGENT, smmu.combined_handler())?,
        (Some(events), Some(errors), None) => {
            interrupts::connect(events, Priority::URGENT, smmu.event_handler())?;
            interrupts::connect(errors, Priority::URGENT, smmu.error_handler())?;
            if let (Some(requests), true) = (wires.priq, smmu.features().pri) {
                interrupts::connect(requests, Priority::URGENT, smmu.page_request_handler())?;
            }
        }
        _ => log::warn!("{name}: its interrupts are not wired; faults are seen late"),
    }
    // What came in before the interrupts were connected.
    smmu.service();
    if !smmu.boot_window_closed() {
        log::warn!("{name}: cannot abort before it is enabled; until now devices could have reached any memory");
    }
    Ok(smmu)
}

/// A short name for what a function is.
pub(crate) fn kind(function: &Function) -> Option<&'static str> {
    let ids = function.ids();
    match (ids.vendor, ids.device) {
        (0x1af4, 0x1042) => Some("virtio-blk"),
        (0x1af4, 0x1050) => Some("virtio-gpu"),
        testdev::edu::ID => Some("edu"),
        _ => None,
    }
}

impl core::fmt::Debug for Hardware {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let iommus: Vec<String> = self.iommus.iter().map(|iommu| iommu.name().to_string()).collect();
        f.debug_struct("Hardware").field("iommus", &iommus).finish_non_exhaustive()
    }
}
