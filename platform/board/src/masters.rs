//! From a PCI function to a bus master that can be let loose.
//!
//! A function gets a group (with all others that the IOMMU cannot tell or keep apart from it), the group a default DMA domain,
//! the domain its reserved regions, what firmware uses, and the MSI doorbell. Only then is there a [`Master`], and only a
//! [`Master`] lets a function master the bus.
//!
//! A function that the command line lets through (`iommu.passthrough`) is attached untranslated instead, if it is alone in its
//! group: it is then as unprotected as without an IOMMU, and the report says so.
//!
//! The functions of a group share its domain. Each that is in use is a user of the group, which is blocked when the last one is
//! given up; one that is arrested before is off the bus, and that is all that can be done about it alone.

use crate::containment::{Containment, Registration};
use crate::pools;
use crate::signals::Signals;
use crate::{Error, PassthroughError};
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::irq::Handler;
use dma::{
    Bounce, BusWindow, Device, DeviceConfig, DirectConfig, DmaMemory, Limits, PeerRange, Policy, Pool, PoolSource,
};
use iommu::contract::Iommu;
use iommu::domain::{Domain, DomainKind, ReservedKind};
use iommu::group::{AttachmentState, Group};
use iommu::{Iova, IovaRange, PAGE_SIZE, PhysAddr, PhysRange, Prot, StreamId};
use kernel::machine::{FirmwareRegion, IommuRef, Machine, PcieHost, WindowKind};
use pci::{Attached, Bdf, Function, RequesterId};

/// How a device is treated: what the command line and the device tree say of it.
#[derive(Clone, Debug, Default)]
pub struct Treatment {
    /// It runs even where no IOMMU translates for it.
    pub allow_unprotected: bool,
    /// Its IOMMU lets it through untranslated.
    pub passthrough: bool,
    /// It gets copies of all its buffers.
    pub bounce: bool,
    /// It may see what shares a page with its buffers.
    pub trusted: bool,
    /// The only memory that it may use.
    pub restricted: Option<&'static Pool>,
}

impl Treatment {
    fn policy(&self) -> Policy {
        let bounce = match self.restricted {
            Some(pool) => Bounce::Restricted(pool),
            None if self.bounce => Bounce::Always(PoolSource::default()),
            None => Bounce::default(),
        };
        Policy { trusted: self.trusted, bounce }
    }
}

/// A PCI function with its place in an address space.
pub struct Master {
    function: Arc<Function>,
    device: Device,
    group: Option<Arc<Group>>,
    covered: Vec<RequesterId>,
    signals: Arc<Signals>,
    /// For containment, while the function is in use.
    _registration: Option<Registration>,
}

impl Master {
    /// The master of an IOMMU that is a PCI function itself: nothing translates for it.
    ///
    /// # Safety
    ///
    /// `device` is that function, and the caller vouches for it: it accesses no memory but what its driver tells it to.
    pub(crate) unsafe fn of_iommu(function: &Arc<Function>, device: Device, signals: &Arc<Signals>) -> Self {
        let covered = function.requester_ids().collect();
        Self { function: function.clone(), device, group: None, covered, signals: signals.clone(), _registration: None }
    }

    /// The function.
    pub fn function(&self) -> &Arc<Function> {
        &self.function
    }

    /// The DMA-API's handle.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its group; none without an IOMMU.
    pub fn group(&self) -> Option<&Arc<Group>> {
        self.group.as_ref()
    }

    /// The StreamIDs of its transactions.
    pub fn streams(&self) -> &[StreamId] {
        self.group.as_ref().map_or(&[], |group| group.streams())
    }

    /// Who gives it interrupts by message.
    pub fn messages(&self) -> Arc<dyn pci::MsiController> {
        self.signals.clone()
    }

    /// The register that the function writes its messages to; `None` where nothing takes them.
    pub fn doorbell(&self) -> Option<PhysAddr> {
        self.signals.doorbell(self.function.requester_id())
    }

    /// Has `handler` serve the function's wire, which is shared. The handler has to make the function take its interrupt back, and
    /// is called only while the function says that it interrupts.
    ///
    /// # Errors
    ///
    /// [`Error::NoInterrupt`] if it has none, or it leads nowhere; [`Error::Pci`] if its line has been masked.
    pub fn connect_wire(&self, handler: Arc<dyn Handler>) -> Result<pci::Wire, Error> {
        self.signals.wire(&self.function, self.device.name(), handler)
    }

    /// As [`Master::connect_wire`], for a handler that only says that there was an interrupt: the function's gate is shut before it is
    /// called, until [`pci::Wire::open`].
    ///
    /// # Errors
    ///
    /// As there; [`Error::Pci`] if the function has no gate.
    pub fn connect_gated_wire(&self, handler: Arc<dyn Handler>) -> Result<pci::Wire, Error> {
        self.signals.gated_wire(&self.function, self.device.name(), handler)
    }

    /// The function's memory BAR `index`, to be lent to other devices. The function has to be isolated: its registers, whatever
    /// is written there, then make it reach no more than it was lent.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`]; [`Error::Pci`] where there is no such BAR; [`Error::Dma`] where it is not made of whole pages.
    pub fn peer_range(&self, index: u8) -> Result<PeerRange, Error> {
        if !self.device.is_isolated() {
            return Err(Error::NotIsolated(self.device.name().to_string()));
        }
        let bar = self.function.memory_bar(index).map_err(|error| self.pci(error))?;
        let range = bar.phys.and_then(|phys| PhysRange::new(phys, bar.size));
        let range = range.ok_or_else(|| self.pci(pci::PciError::NoBar(index)))?;
        // SAFETY: a BAR keeps its place once it has one; and its function is isolated, as has been looked at: what its registers
        // make it do ends at what it was lent.
        unsafe { PeerRange::new(range) }.map_err(|error| Error::Dma { name: self.device.name().to_string(), error })
    }

    /// Lets the function master the bus.
    ///
    /// # Errors
    ///
    /// [`Error::Contained`] where its group has been blocked since it was attached; [`Error::Pci`].
    pub fn release(&self) -> Result<(), Error> {
        let blocked =
            |group: &Arc<Group>| matches!(group.current(), AttachmentState::Blocked | AttachmentState::Stranded);
        if self.group.as_ref().is_some_and(blocked) {
            return Err(Error::Contained(self.device.name().to_string()));
        }
        self.function.enable_bus_master(self).map_err(|error| self.pci(error))
    }

    /// Takes the function off the bus, and blocks its group unless another function of it is in use; the latter also where the
    /// function does not come to rest. What is still lent to it is named on the console: it is out of the device's reach, and
    /// comes back when whoever has the loan ends it.
    ///
    /// # Errors
    ///
    /// [`Error::Pci`], [`Error::Dma`].
    pub fn arrest(&self) -> Result<(), Error> {
        let rested = self.function.disable_bus_master().map_err(|error| self.pci(error));
        let blocked = match self.device.remove() {
            // What is lent could not be listed, and is blocked all the same.
            Ok(_) | Err(dma::Error::OutOfMemory) => Ok(()),
            Err(error) => Err(error),
        };
        blocked.map_err(|error| Error::Dma { name: self.device.name().to_string(), error }).and(rested)
    }

    fn pci(&self, error: pci::PciError) -> Error {
        Error::Pci { name: self.device.name().to_string(), error }
    }
}

// SAFETY:
// - `covered` are the requester IDs whose streams are in the master's group, which is attached to an address space before the
//   master is made (or the command line has allowed this device to go untranslated, or has its IOMMU let it through, or it is
//   the IOMMU itself, for which the board has vouched);
// - a group is never let out of the IOMMU's hands: it changes between address spaces and being blocked.
unsafe impl Attached for Master {
    fn covers(&self, requester: RequesterId) -> bool {
        self.covered.contains(&requester)
    }
}

/// A group that exists already, by the name that its functions share.
pub(crate) struct Known {
    pub host: usize,
    pub name: Bdf,
    pub group: Arc<Group>,
    /// Its default domain, kept for the time when no function of the group is in use.
    pub domain: Arc<Domain>,
}

/// What is needed to attach a function.
pub(crate) struct Context<'a> {
    pub host_index: usize,
    pub host: &'a PcieHost,
    pub iommu: &'a dyn Fn(IommuRef) -> Option<&'a Arc<dyn Iommu>>,
    pub machine: &'a Machine,
    /// All functions of the host.
    pub functions: &'a [Arc<Function>],
    pub containment: &'a Arc<Containment>,
    pub signals: &'a Arc<Signals>,
    pub treatment: &'a Treatment,
    pub known: &'a mut Vec<Known>,
}

impl Context<'_> {
    /// Makes the master of `function`.
    pub fn attach(&mut self, function: &Arc<Function>, name: &str, limits: Limits) -> Result<Master, Error> {
        let mut covered = Vec::new();
        covered.extend(function.requester_ids());
        let restricted = pools::restricted(self.machine, self.host_index, &self.way(function))?;
        let policy =
            Treatment { restricted: self.treatment.restricted.or(restricted), ..self.treatment.clone() }.policy();
        let streams = self.streams(function, name)?;
        let memory = crate::memory::of_function(self.machine, self.host_index, &self.way(function))
            .map_err(|_| Error::OutOfMemory)?;
        let (device, group) = match streams {
            Some((which, streams)) if self.treatment.passthrough => {
                let iommu = (self.iommu)(which).ok_or(Error::Missing("IOMMU"))?;
                let group = self.passed_through(iommu, function, streams, name)?;
                (self.unprotected(name, limits, Some(group.clone()), policy, memory), Some(group))
            }
            Some((which, streams)) => {
                let iommu = (self.iommu)(which).ok_or(Error::Missing("IOMMU"))?;
                let group = self.group(iommu, function, streams, name)?;
                let config =
                    DeviceConfig { name, group: group.clone(), limits, coherent: self.host.dma_coherent, memory };
                // SAFETY:
                // - the group holds the streams of every requester ID of every function that the IOMMU cannot tell or keep
                //   apart from this one, by the host's `iommu-map`, and is attached;
                // - the host's `dma-coherent` says that its devices snoop;
                // - whoever started the kernel is answerable for the devices that they trust.
                let device = unsafe { Device::with_policy(config, policy) };
                (device, Some(group))
            }
            None if self.treatment.allow_unprotected => (self.unprotected(name, limits, None, policy, memory), None),
            None if self.machine.smmus.is_empty() && self.machine.virtio_iommus.is_empty() => {
                return Err(Error::NotIsolated(String::from(name)));
            }
            None => return Err(Error::LeftOut(String::from(name))),
        };
        let device = device.map_err(|error| Error::Dma { name: String::from(name), error })?;
        let registration =
            group.as_ref().map(|group| self.containment.register(function, &device, group)).transpose()?;
        let signals = self.signals.clone();
        Ok(Master { function: function.clone(), device, group, covered, signals, _registration: registration })
    }

    /// All functions of the group that `function` is in, itself included, without bridges.
    fn members(&self, function: &Function) -> impl Iterator<Item = &'_ Arc<Function>> {
        let group = function.group();
        self.functions.iter().filter(move |other| other.group() == group && !other.is_bridge())
    }

    /// Device and function numbers from the first root bus to `function`.
    fn way(&self, function: &Function) -> Vec<(u8, u8)> {
        let mut way = Vec::new();
        let mut next = Some(function);
        let mut bus = self.host.buses.0;
        while let Some(function) = next {
            way.push((function.bdf().device(), function.bdf().function()));
            bus = function.bdf().bus();
            next = function.parent().map(|parent| &**parent);
        }
        if bus != self.host.buses.0 {
            // The tree has no nodes for what is on another root: its places must not be taken for those of the first.
            way.push((u8::MAX, u8::MAX));
        }
        way.reverse();
        way
    }

    /// Where the functions of `function`'s group write their messages to.
    fn doorbells(&self, function: &Function) -> Result<Vec<PhysAddr>, Error> {
        let mut found: Vec<PhysAddr> = Vec::new();
        for member in self.members(function) {
            if let Some(doorbell) = self.signals.doorbell(member.requester_id())
                && !found.contains(&doorbell)
            {
                found.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                found.push(doorbell);
            }
        }
        Ok(found)
    }

    /// The IOMMU and the streams of a function and of all others in its group. None if no IOMMU translates for it.
    fn streams(&self, function: &Function, name: &str) -> Result<Option<(IommuRef, Vec<StreamId>)>, Error> {
        let mut found: Option<(IommuRef, Vec<StreamId>)> = None;
        let mut untranslated = false;
        for requester in self.members(function).flat_map(|member| member.requester_ids()) {
            match (self.host.stream_of(requester.get()), &mut found) {
                (None, _) => untranslated = true,
                (Some((iommu, stream)), None) => found = Some((iommu, Vec::from([stream]))),
                (Some((iommu, stream)), Some((first, streams))) if iommu == *first => {
                    if !streams.contains(&stream) {
                        streams.push(stream);
                    }
                }
                _ => return Err(Error::NotIsolated(String::from(name))),
            }
        }
        match found {
            Some(_) if untranslated => Err(Error::NotIsolated(String::from(name))),
            found => Ok(found),
        }
    }

    fn unprotected(
        &self,
        name: &str,
        limits: Limits,
        group: Option<Arc<Group>>,
        policy: Policy,
        memory: &'static dyn DmaMemory,
    ) -> Result<Device, dma::Error> {
        // SAFETY: whoever started the kernel has said that this device may run unprotected, and is answerable for it.
        unsafe { direct(self.host, name, limits, group, policy, memory) }
    }

    /// The group of a function that is let through untranslated.
    fn passed_through(
        &mut self,
        iommu: &Arc<dyn Iommu>,
        function: &Arc<Function>,
        streams: Vec<StreamId>,
        name: &str,
    ) -> Result<Arc<Group>, Error> {
        let failed = |why| Error::Passthrough { name: String::from(name), why };
        let others = self.members(function).count().saturating_sub(1);
        if others != 0 {
            return Err(failed(PassthroughError::Shared(others)));
        }
        let group = self.group(iommu, function, streams, name)?;
        if group.users() != 0 {
            return Err(failed(PassthroughError::InUse));
        }
        // SAFETY: whoever started the kernel has said that this device may run unprotected, and is answerable for it. It is alone
        // in its group.
        let capability = unsafe { dma::vouch() };
        if let Err(error) = group.attach_identity(capability) {
            // Where it was, nothing is mapped for it; but it is nobody's.
            let blocked = group.block().err();
            return Err(failed(PassthroughError::Iommu(blocked.unwrap_or(error))));
        }
        Ok(group)
    }

    /// The group of a function, attached to its default domain.
    fn group(
        &mut self,
        iommu: &Arc<dyn Iommu>,
        function: &Arc<Function>,
        streams: Vec<StreamId>,
        name: &str,
    ) -> Result<Arc<Group>, Error> {
        let mine = |known: &&Known| known.host == self.host_index && known.name == function.group();
        let attach = |error| Error::Attach { name: String::from(name), error };
        if let Some(known) = self.known.iter().find(mine) {
            if known.group.current() == AttachmentState::Blocked {
                if known.group.users() != 0 {
                    return Err(Error::Contained(String::from(name)));
                }
                known.group.attach_default(known.domain.clone()).map_err(attach)?;
            }
            return Ok(known.group.clone());
        }
        let domain = Arc::new(self.domain(iommu, function, &streams, name)?);
        let group = Arc::new(Group::new(iommu.clone(), streams));
        self.known.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        let known =
            Known { host: self.host_index, name: function.group(), group: group.clone(), domain: domain.clone() };
        self.known.push(known);
        group.attach_default(domain).map_err(attach)?;
        Ok(group)
    }

    /// A default domain: the doorbell, what firmware uses, and nothing else.
    fn domain(
        &self,
        iommu: &Arc<dyn Iommu>,
        function: &Function,
        streams: &[StreamId],
        name: &str,
    ) -> Result<Domain, Error> {
        let space = |error| Error::Space { name: String::from(name), error };
        let hardware = iommu.create().map_err(|error| Error::Attach { name: String::from(name), error })?;
        let aperture = hardware.aperture();
        let window = self.host.carried().unwrap_or(aperture.range);
        let domain = Domain::new(DomainKind::Dma, hardware, window).map_err(space)?;
        for hole in self.host.not_carried().map_err(|_| Error::OutOfMemory)? {
            domain.reserve(hole, ReservedKind::Hole).map_err(space)?;
        }
        for window in &self.host.windows {
            let bus = IovaRange::new(Iova::new(window.pci), window.cpu.len());
            let Some(bus) = bus.filter(|bus| window.kind != WindowKind::Io && aperture.range.overlaps(*bus)) else {
                continue;
            };
            domain.reserve(bus, ReservedKind::PciWindow).map_err(space)?;
        }
        let mut doorbells = self.doorbells(function)?;
        for stream in streams {
            for region in iommu.reserved(*stream).map_err(|error| Error::Attach { name: String::from(name), error })? {
                if region.kind == ReservedKind::MsiDoorbell {
                    // Messages do not pass the IOMMU there.
                    doorbells.retain(|doorbell| !region.range.contains(Iova::new(doorbell.get())));
                }
                // Another stream of the group may have said so.
                if !domain.reserved().any(|reserved| reserved.kind == region.kind && reserved.range == region.range) {
                    domain.reserve(region.range, region.kind).map_err(space)?;
                }
            }
        }
        for doorbell in doorbells {
            let page = aperture.page_size().max(PAGE_SIZE);
            let phys = doorbell.align_down(page);
            let iova = IovaRange::new(Iova::new(phys.get()), page).unwrap_or_default();
            if domain.reserved().any(|reserved| reserved.kind == ReservedKind::MsiDoorbell && reserved.range == iova) {
                continue;
            }
            domain.reserve(iova, ReservedKind::MsiDoorbell).map_err(space)?;
            let run = PhysRange::new(phys, page).unwrap_or_default();
            // SAFETY: the page holds a doorbell register and no memory. What a device can do there is to raise the interrupts that
            // were allocated to it, since an ITS knows it by its DeviceID; or, at a GICv2m frame, which does not, any of those of the
            // frame: a handler of another device's then runs for nothing, and looks at what its own device says.
            unsafe { domain.space().map(iova, &[run], Prot::WRITE | Prot::READ | Prot::MMIO) }
                .map_err(|error| Error::Doorbell { name: String::from(name), error })?;
        }
        for member in self.members(function) {
            for region in self.machine.firmware_regions(self.host_index, &self.way(member)) {
                firmware(&domain, region, name)?;
            }
        }
        Ok(domain)
    }
}

/// A device of `host`'s that nothing translates for, with memory of its own or the kernel's.
///
/// # Safety
///
/// The caller vouches for the device: it accesses no memory but what its driver tells it to.
pub(crate) unsafe fn direct(
    host: &PcieHost,
    name: &str,
    limits: Limits,
    group: Option<Arc<Group>>,
    policy: Policy,
    memory: &'static dyn DmaMemory,
) -> Result<Device, dma::Error> {
    let mut windows = Vec::new();
    match &host.dma_ranges {
        None => windows.push(BusWindow::identity()),
        Some(ranges) => windows.extend(ranges.iter().map(|range| BusWindow { memory: range.cpu, bus: range.dma })),
    }
    let config = DirectConfig { name, windows: &windows, limits, coherent: host.dma_coherent, memory };
    // SAFETY: the caller's promise; the windows and the coherence are the device tree's.
    unsafe { Device::direct_with_policy(config, group, policy) }
}

/// Reserves what firmware uses, and keeps it mapped where it is memory one to one.
fn firmware(domain: &Domain, region: FirmwareRegion, name: &str) -> Result<(), Error> {
    let space = |error| Error::Space { name: String::from(name), error };
    let page = domain.space().aperture().page_size().max(PAGE_SIZE);
    let start = region.iova.start().align_down(page);
    let Some(iova) = region.iova.end().align_up(page).and_then(|end| IovaRange::between(start, end)) else {
        return Ok(());
    };
    if domain.reserved().any(|reserved| reserved.kind == ReservedKind::Firmware && reserved.range == iova) {
        // Another function of the group has said so.
        return Ok(());
    }
    domain.reserve(iova, ReservedKind::Firmware).map_err(space)?;
    let Some(memory) = region.memory else { return Ok(()) };
    let run = PhysRange::new(memory.start().align_down(page), iova.len()).unwrap_or_default();
    // SAFETY: the device tree has given this memory to the device, and memory management never gives it to anybody else:
    // reserved memory is left out of it, in whole pages.
    unsafe { domain.space().map(iova, &[run], Prot::READ | Prot::WRITE) }
        .map_err(|error| Error::Firmware { name: String::from(name), error })
}
