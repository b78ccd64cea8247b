//! What every test is handed: the machine at work, and devices by name.

use alloc::sync::Arc;
use base::{Deadline, Instant};
use board::{BlockDisk, EduStray, Error, GpuScreen, Hardware, Master};
use dma::Limits;
use iommu::StreamId;
use kernel::faults::Noted;
use pci::Function;
use virt::{Boot, cores};

/// Milliseconds that any one step of a test may take before it counts as failed.
pub const STEP: u64 = 10_000;

/// A deadline for one step.
pub fn soon() -> Deadline {
    Deadline::after_millis(STEP)
}

/// The machine that the tests run on.
pub struct Bench {
    /// How it was started.
    pub boot: &'static Boot,
    /// Its hardware.
    pub hardware: Hardware,
    /// Cores that run.
    pub cores: usize,
}

impl Bench {
    /// Brings everything up, as the main job does.
    pub fn bring_up(boot: &'static Boot) -> Result<Self, Error> {
        let hardware = Hardware::bring_up(&boot.machine)?;
        let cores = cores::start_all(&boot.machine, board::init_core).map_err(|_| Error::Missing("other core"))?;
        Ok(Self { boot, hardware, cores })
    }

    /// The `nth` function with these IDs, and the index of its host.
    pub fn function(&self, vendor: u16, device: u16, nth: usize) -> Result<(usize, Arc<Function>), Error> {
        let matches = |ids: pci::Ids| ids.vendor == vendor && ids.device == device;
        let mut found = self.hardware.functions().filter(|(_, function)| matches(function.ids()));
        found.nth(nth).map(|(host, function)| (host, function.clone())).ok_or(Error::Missing("device of the test"))
    }

    fn master(&self, kind: &str, vendor: u16, device: u16, nth: usize, limits: Limits) -> Result<Master, Error> {
        let (host, function) = self.function(vendor, device, nth)?;
        self.hardware.attach(host, &function, kind, limits, false)
    }

    /// The `nth` edu, attached but not let loose.
    pub fn edu_master(&self, nth: usize) -> Result<Master, Error> {
        self.master("edu", testdev::edu::ID.0, testdev::edu::ID.1, nth, Limits::NONE)
    }

    /// The first edu, started. Its address lines are not limited by the tests' machines.
    pub fn edu(&self) -> Result<EduStray, Error> {
        EduStray::start(self.edu_master(0)?)
    }

    /// The first disk, attached but not let loose.
    pub fn disk_master(&self) -> Result<Master, Error> {
        self.master("virtio-blk", 0x1af4, 0x1042, 0, Limits::NONE)
    }

    /// The first disk, started.
    pub fn disk(&self) -> Result<BlockDisk, Error> {
        BlockDisk::start(self.disk_master()?)
    }

    /// The `nth` disk, started.
    pub fn nth_disk(&self, nth: usize) -> Result<BlockDisk, Error> {
        BlockDisk::start(self.master("virtio-blk", 0x1af4, 0x1042, nth, Limits::NONE)?)
    }

    /// The first GPU, started.
    pub fn gpu(&self) -> Result<GpuScreen, Error> {
        self.nth_gpu(0)
    }

    /// The `nth` GPU, started.
    pub fn nth_gpu(&self, nth: usize) -> Result<GpuScreen, Error> {
        GpuScreen::start(self.master("virtio-gpu", 0x1af4, 0x1050, nth, Limits::NONE)?)
    }

    /// The moment from which on faults are of interest: what was kept before is forgotten.
    pub fn watch(&self) -> Instant {
        self.hardware.faults().forget();
        Instant::now()
    }

    /// The first fault of `streams` since `since`, awaited.
    pub fn fault(&self, streams: &[StreamId], since: Instant) -> Option<Noted> {
        self.hardware.faults().wait_for(streams, since, Deadline::after_millis(2_000))
    }

    /// Whether there was any fault of `streams` since `since`.
    pub fn has_faulted(&self, streams: &[StreamId], since: Instant) -> bool {
        self.hardware.faults().wait_for(streams, since, Deadline::after_millis(0)).is_some()
    }
}
