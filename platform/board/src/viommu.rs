//! IOMMUs that are PCI functions themselves: virtio-iommu.
//!
//! Such an IOMMU is the first function to master the bus, and its own accesses are translated by nobody: the board vouches for
//! it, as it does for the walker of an SMMU. What it translates for is blocked once it runs, and masters the bus after that only.

use crate::bus::Bus;
use crate::drivers::{LIFECYCLE_MILLIS, Signal, Wiring, virtio};
use crate::masters::direct;
use crate::{COHERENT, Error, Master};
use ::virtio::iommu::{Config, VirtioIommu};
use ::virtio::transport::PciTransport;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use base::Deadline;
use dma::{Limits, Policy};
use iommu::contract::{AddressSpace, Iommu};
use iommu::{AttachError, FaultSink, Iova, IovaRange, PAGE_SIZE, PhysRange, Prot, StreamId};
use kernel::machine::{self, IommuRef, Machine, PcieHost, VirtioIommuIndex};
use pci::{Bdf, Function};

/// Base class and subclass of a host bridge.
const HOST_BRIDGE: u32 = 0x0600;

/// A started virtio-iommu.
pub struct Viommu {
    driver: Arc<VirtioIommu>,
    iommu: Arc<dyn Iommu>,
    _wiring: Wiring,
    _master: Master,
    /// What its own messages go through, where it translates for itself.
    _doorbell: Option<Arc<dyn AddressSpace>>,
}

impl Viommu {
    /// The driver itself.
    pub fn driver(&self) -> &Arc<VirtioIommu> {
        &self.driver
    }

    /// The same as an IOMMU.
    pub fn iommu(&self) -> &Arc<dyn Iommu> {
        &self.iommu
    }
}

/// Starts one virtio-iommu: everything behind it is blocked.
pub(crate) fn start(
    machine: &Machine,
    description: &machine::VirtioIommu,
    buses: &[Bus],
    faults: Arc<dyn FaultSink>,
    defer: fn(),
) -> Result<Viommu, Error> {
    let host = machine.pcie.get(description.host).ok_or(Error::Missing("PCIe host"))?;
    let bus = buses.iter().find(|bus| bus.index == description.host).ok_or(Error::Missing("PCIe host"))?;
    let [number, devfn] = description.rid.to_be_bytes();
    if number != host.buses.0 {
        // The numbers of the buses behind bridges are ours, not those of the firmware that wrote the tree.
        return Err(Error::Unsupported("virtio-iommu behind a PCI bridge"));
    }
    let place = Bdf::new(number, devfn >> 3, devfn & 7).ok_or(Error::Missing("virtio-iommu"))?;
    let function = bus.host.find(place).ok_or(Error::Missing("virtio-iommu where the device tree has it"))?;
    let name = description.path.rsplit('/').next().unwrap_or("virtio-iommu").to_string();
    let this = machine.virtio_iommus.iter().position(|other| other == description).unwrap_or_default();
    let this = IommuRef::Virtio(VirtioIommuIndex(this));

    // SAFETY: it is the machine's IOMMU, which is trusted to translate for all others, and so to keep to its own queues.
    let device = unsafe { direct(host, &name, Limits::NONE, None, Policy::default(), &COHERENT) };
    let device = device.map_err(|error| Error::Dma { name: name.clone(), error })?;
    // SAFETY: as above.
    let master = unsafe { Master::of_iommu(function, device, &bus.signals) };
    master.release()?;
    let own = StreamId::new(description.rid.into());
    let started = run(&master, name, spare(host, bus, this), faults, defer).and_then(|(driver, wiring)| {
        let by_message = wiring.signal() == Signal::Message;
        let doorbell = if by_message { own_messages(&driver, &master, host, this, own)? } else { None };
        Ok((doorbell, driver, wiring))
    });
    match started {
        Ok((doorbell, driver, wiring)) => {
            // What came in before the interrupts got through.
            driver.events().service();
            let driver = Arc::new(driver);
            Ok(Viommu { iommu: driver.clone(), driver, _wiring: wiring, _master: master, _doorbell: doorbell })
        }
        Err(error) => {
            if let Err(second) = master.arrest() {
                log::error!("{second}");
            }
            Err(error)
        }
    }
}

fn run(
    master: &Master,
    name: String,
    spare: Option<StreamId>,
    faults: Arc<dyn FaultSink>,
    defer: fn(),
) -> Result<(VirtioIommu, Wiring), Error> {
    let failed = |error| virtio(master, error);
    let function = master.function();
    let transport = Arc::new(PciTransport::new(function.clone()).map_err(failed)?);
    let mut wiring = Wiring::new(master)?;
    let config = Config { name, spare, vectors: wiring.vectors, defer: Some(defer), ..Config::default() };
    let deadline = Deadline::after_millis(LIFECYCLE_MILLIS);
    let driver =
        VirtioIommu::new(transport.clone(), master.device().clone(), faults, config, deadline).map_err(failed)?;
    match wiring.connect(master, &transport, driver.config_handler().map_err(failed)?, driver.events().clone()) {
        Err(Error::NoInterrupt(_)) => log::warn!("{}: it has no interrupt; faults are not seen", driver.name()),
        connected => connected?,
    }
    Ok((driver, wiring))
}

/// An endpoint that never masters the bus: the host bridge's own function, for which there is no driver.
fn spare(host: &PcieHost, bus: &Bus, this: IommuRef) -> Option<StreamId> {
    let is_bridge = |function: &&Arc<Function>| function.ids().class >> 8 == HOST_BRIDGE && !function.is_bus_master();
    let bridge = bus.host.functions().iter().find(is_bridge)?;
    let (iommu, stream) = host.stream_of(bridge.requester_id().get())?;
    (iommu == this).then_some(stream)
}

/// Lets the IOMMU's own messages through, where it is one of its own endpoints: to the doorbell, and nowhere else.
fn own_messages(
    driver: &VirtioIommu,
    master: &Master,
    host: &PcieHost,
    this: IommuRef,
    own: StreamId,
) -> Result<Option<Arc<dyn AddressSpace>>, Error> {
    let name = || driver.name().to_string();
    let other = host.iommu_map.entries.iter().any(|entry| {
        entry.target == this && own.get().checked_sub(entry.output).is_some_and(|offset| offset < entry.count)
    });
    let Some(doorbell) = master.doorbell().filter(|_| !other) else { return Ok(None) };
    let space = driver.create().map_err(|error| Error::Attach { name: name(), error })?;
    let page = driver.aperture().page_size().max(PAGE_SIZE);
    let phys = doorbell.align_down(page);
    let iova = IovaRange::new(Iova::new(phys.get()), page).unwrap_or_default();
    let run = PhysRange::new(phys, page).unwrap_or_default();
    // SAFETY: the page holds a doorbell register and no memory.
    unsafe { space.map(iova, &[run], Prot::WRITE | Prot::READ | Prot::MMIO) }
        .map_err(|error| Error::Doorbell { name: name(), error })?;
    match driver.attach(own, &space) {
        Ok(()) => Ok(Some(space)),
        // It goes around itself.
        Err(AttachError::NoSuchStream(_)) => Ok(None),
        Err(error) => Err(Error::Attach { name: name(), error }),
    }
}
