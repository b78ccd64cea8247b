//! The driver against an IOMMU in software, honest and hostile.

mod attach;
mod events;
mod revoke;
mod start;
mod sync;

use super::{Config, VirtioIommu};
use crate::Error;
use crate::device::Vectors;
use crate::fakes::{FakeDevice, MemoryIommu, Registers};
use ::iommu::contract::{AddressSpace, Iommu};
use ::iommu::{Fault, FaultSink, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, StreamId};
use base::Deadline;
use base::time::Duration;
use dma::fakes::FakeSystem;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

/// Endpoints of the fake: the spare one, and two devices.
const SPARE: u32 = 0;
const A: u32 = 8;
const B: u32 = 16;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Keeps all faults.
#[derive(Default)]
struct Log(Mutex<Vec<Fault>>);

impl FaultSink for Log {
    fn fault(&self, fault: &Fault) {
        self.0.lock().unwrap().push(*fault);
    }
}

struct Rig {
    system: FakeSystem,
    fake: MemoryIommu,
    device: Arc<FakeDevice>,
    log: Arc<Log>,
    host: dma::fakes::FakeDevice,
}

impl Rig {
    fn new(change: impl FnOnce(&mut Registers)) -> Self {
        let system = FakeSystem::new();
        let host = system.device("virtio-iommu").unwrap();
        let fake = MemoryIommu::new(&[SPARE, A, B]);
        let mut registers = fake.registers();
        change(&mut registers);
        let device = FakeDevice::new(registers, fake.clone(), Arc::new(host.master.clone()));
        Self { system, fake, device, log: Arc::default(), host }
    }

    fn start_with(&self, spare: Option<StreamId>) -> Result<VirtioIommu, Error> {
        self.start_patiently(spare, 50)
    }

    fn start_patiently(&self, spare: Option<StreamId>, millis: u64) -> Result<VirtioIommu, Error> {
        self.start_as(spare, millis, self.log.clone(), None)
    }

    fn start_with_sink(&self, sink: Arc<dyn FaultSink>, defer: Option<fn()>) -> Result<VirtioIommu, Error> {
        self.start_as(Some(id(SPARE)), 50, sink, defer)
    }

    fn start_as(
        &self,
        spare: Option<StreamId>,
        millis: u64,
        sink: Arc<dyn FaultSink>,
        defer: Option<fn()>,
    ) -> Result<VirtioIommu, Error> {
        let config = Config {
            name: "viommu".into(),
            timeout: Duration::from_millis(millis),
            spare,
            vectors: Vectors { config: Some(0), queue: Some(1) },
            defer,
        };
        let (transport, dma) = (self.device.clone(), self.host.device.clone());
        let driver = VirtioIommu::new(transport, dma, sink, config, Deadline::after_millis(1_000))?;
        self.device.connect(0, driver.config_handler().unwrap());
        self.device.connect(1, driver.events().clone());
        let _ = self.fake.log();
        Ok(driver)
    }

    fn start(&self) -> Result<VirtioIommu, Error> {
        self.start_with(Some(id(SPARE)))
    }

    fn faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.log.0.lock().unwrap())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.system.memory.violations(), Vec::<String>::new());
        }
    }
}

/// A rig and a started driver.
fn started() -> (Rig, VirtioIommu) {
    let rig = Rig::new(|_| {});
    let driver = rig.start().unwrap();
    (rig, driver)
}

fn id(endpoint: u32) -> StreamId {
    StreamId::new(endpoint)
}

fn iova(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

fn phys(start: u64, len: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(start), len).unwrap()
}

/// Maps memory that exists in the fake's imagination only.
#[allow(unsafe_code)]
fn map(space: &Arc<dyn AddressSpace>, at: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
    // SAFETY: there is no such memory, and no such device.
    unsafe { space.map(at, runs, prot) }
}

/// An address space of `driver`'s with a page at 0x1000 mapped to `target`.
fn space_with(driver: &VirtioIommu, target: u64) -> Arc<dyn AddressSpace> {
    let space = driver.create().unwrap();
    map(&space, iova(0x1000, 0x1000), &[phys(target, 0x1000)], RW).unwrap();
    space
}
