//! The machine.

use abi::{Call, ErrorCode, Mode, Signal};
use base::Deadline;
use dma::fakes::{FakeBusMaster, FakeSystem};
use dma::{Device, OwnedAttachment, OwnedDomain};
use iommu::{IovaRange, MapError, PAGE_SIZE, PhysAddr, PhysRange, Prot, RevokeError};
use process::contract::{Extent, Kind, Tables};
use process::{Assigned, Error, Event, Next, Process, Quota};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Tables of a process: page by page.
#[derive(Default)]
pub struct FakeTables {
    pub pages: Mutex<BTreeMap<u64, (PhysAddr, Prot)>>,
    /// Every unmapping fails from now on.
    pub stuck: Mutex<bool>,
    /// Called before each unmapping.
    pub on_unmap: Mutex<Option<OnUnmap>>,
}

type OnUnmap = Box<dyn Fn(IovaRange) + Send>;

impl FakeTables {
    pub fn on_unmap(&self, f: impl Fn(IovaRange) + Send + 'static) {
        *self.on_unmap.lock().unwrap() = Some(Box::new(f));
    }

    /// What is mapped at `address`.
    pub fn at(&self, address: u64) -> Option<(PhysAddr, Prot)> {
        self.pages.lock().unwrap().get(&address).copied()
    }
}

// SAFETY: nobody walks them.
unsafe impl Tables for FakeTables {
    unsafe fn map(&self, range: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        assert_eq!(runs.iter().map(|run| run.len()).sum::<u64>(), range.len());
        let mut pages = self.pages.lock().unwrap();
        let mut at = range.start().get();
        for run in runs {
            for offset in (0..run.len()).step_by(PAGE_SIZE as usize) {
                let page = (run.start().checked_add(offset).unwrap(), prot);
                assert!(pages.insert(at, page).is_none(), "{at:#x} was mapped");
                at += PAGE_SIZE;
            }
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange) -> Result<(), RevokeError> {
        if *self.stuck.lock().unwrap() {
            return Err(RevokeError::TimedOut);
        }
        if let Some(f) = &*self.on_unmap.lock().unwrap() {
            f(range);
        }
        let mut pages = self.pages.lock().unwrap();
        for offset in (0..range.len()).step_by(PAGE_SIZE as usize) {
            assert!(pages.remove(&(range.start().get() + offset)).is_some(), "{range} was not mapped");
        }
        Ok(())
    }

    fn code_changed(&self) {}
}

/// Registers that nobody reads.
struct Registers(PhysRange);

// SAFETY: nobody walks the tables.
unsafe impl Extent for Registers {
    fn runs(&self) -> &[PhysRange] {
        std::slice::from_ref(&self.0)
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn kind(&self) -> Kind {
        Kind::Registers
    }
    fn read(&self, offset: u64, _: &mut [u8]) -> Result<(), Error> {
        Err(Error::BadAddress { address: offset, len: 0 })
    }
    fn write(&self, offset: u64, _: &[u8]) -> Result<(), Error> {
        Err(Error::BadAddress { address: offset, len: 0 })
    }
}

/// Where the one BAR lies, and what is set aside for the device.
pub const BAR: u64 = 0x1000_0000;
pub const DOORBELL: u64 = 0x0809_0000;

/// What has happened to a device.
#[derive(Default)]
pub struct Story {
    pub stopped: bool,
    pub domain: Option<OwnedDomain>,
}

/// A device that is put by.
pub struct FakeAssigned {
    device: Device,
    attachment: Option<OwnedAttachment>,
    domain: Option<OwnedDomain>,
    reserved: Vec<IovaRange>,
    event: Arc<Event>,
    story: Arc<Mutex<Story>>,
}

impl Assigned for FakeAssigned {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn config(&self, offset: u16) -> u32 {
        offset.into()
    }
    fn bar_size(&self, bar: u8) -> Result<u64, Error> {
        if bar == 0 { Ok(2 * PAGE_SIZE) } else { Err(Error::NoSuchDevice("BAR")) }
    }
    fn registers(&self, bar: u8) -> Result<std::sync::Arc<dyn Extent>, Error> {
        let len = self.bar_size(bar)?;
        Ok(Arc::new(Registers(PhysRange::new(PhysAddr::new(BAR), len).unwrap())))
    }
    fn start(&mut self, mode: Mode) -> Result<(), Error> {
        if mode == Mode::Shared {
            return Err(Error::Unsupported("one table"));
        }
        let domain = OwnedDomain::new("process", &self.device)?;
        self.attachment = Some(domain.attach(&self.device)?);
        self.story.lock().unwrap().domain = Some(domain.clone());
        self.domain = Some(domain);
        Ok(())
    }
    fn stop(&mut self) -> Result<(), Error> {
        self.story.lock().unwrap().stopped = true;
        self.story.lock().unwrap().domain = None;
        let removed = self.device.remove().map(drop);
        (self.attachment, self.domain) = (None, None);
        removed.map_err(Error::from)
    }
    fn domain(&self) -> Option<&OwnedDomain> {
        self.domain.as_ref()
    }
    fn reserved(&self) -> &[IovaRange] {
        &self.reserved
    }
    fn connect(&mut self, vector: u16) -> Result<Signal, Error> {
        if vector == 0 { Ok(Signal::Wire) } else { Err(Error::NoSuchDevice("vector")) }
    }
    fn event(&self) -> &Arc<Event> {
        &self.event
    }
    fn acknowledge(&mut self) {}
}

fn put_by(system: &FakeSystem) -> (FakeAssigned, FakeBusMaster) {
    let fake = system.device("device").unwrap();
    let doorbell = IovaRange::new(iommu::Iova::new(DOORBELL), PAGE_SIZE).unwrap();
    let assigned = FakeAssigned {
        device: fake.device,
        attachment: None,
        domain: None,
        reserved: vec![doorbell],
        event: Arc::default(),
        story: Arc::default(),
    };
    (assigned, fake.master)
}

/// A process with a device, and everything that can be looked at.
pub struct World {
    pub system: FakeSystem,
    pub tables: Arc<FakeTables>,
    pub process: Process,
    pub master: FakeBusMaster,
    pub story: Arc<Mutex<Story>>,
    pub event: Arc<Event>,
}

impl World {
    pub fn new(quota: Quota) -> Self {
        Self::on(FakeSystem::new(), quota)
    }

    /// On this machine.
    pub fn on(system: FakeSystem, quota: Quota) -> Self {
        let tables = Arc::new(FakeTables::default());
        let mut process = Process::new("test", tables.clone(), system.memory, quota).unwrap();
        let (assigned, master) = put_by(&system);
        let (story, event) = (assigned.story.clone(), assigned.event.clone());
        assert_eq!(process.assign(Box::new(assigned)).unwrap(), 0);
        Self { system, tables, process, master, story, event }
    }

    /// Puts one more device by, under the number that is returned.
    pub fn another_device(&mut self) -> u64 {
        let (assigned, _) = put_by(&self.system);
        self.process.assign(Box::new(assigned)).unwrap()
    }

    /// A call by number.
    pub fn raw(&mut self, number: u64, arguments: [u64; 6]) -> Result<u64, ErrorCode> {
        match self.process.call(number, arguments, Deadline::after_millis(0)) {
            Next::Return(0, value) => Ok(value),
            Next::Return(code, _) => Err(ErrorCode::from_number(code).expect("a code")),
            Next::Exit(_) => panic!("it has ended"),
        }
    }

    pub fn call<const N: usize>(&mut self, call: Call, arguments: [u64; N]) -> Result<u64, ErrorCode> {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&arguments);
        self.raw(call as u64, all)
    }

    pub fn open(&mut self) -> u64 {
        self.call(Call::Open, [0, Mode::Own as u64]).unwrap()
    }
}
