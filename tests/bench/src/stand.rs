//! What every benchmark is handed: the machine at work, and its devices.

use alloc::sync::Arc;
use board::{BlockDisk, EduStray, Error, Hardware, Master, Treatment};
use dma::{Device, Limits};
use pci::Function;
use virt::{Boot, cores};

/// How a device's memory is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By an IOMMU, and what is taken back is out of reach before it is handed out.
    Strict,
    /// By an IOMMU, and what is taken back is handed out when a batch of it is out of reach.
    Lazy,
    /// Not at all: the IOMMU lets the device through.
    Direct,
}

/// The machine that is measured.
pub struct Stand {
    /// How its devices are protected.
    pub mode: Mode,
    /// Its hardware.
    pub hardware: Hardware,
    /// Cores that run.
    pub cores: usize,
    edu: EduStray,
}

impl Stand {
    /// Brings everything up, as the main job does, with one edu that masters the bus.
    pub fn bring_up(boot: &'static Boot, mode: Mode) -> Result<Self, Error> {
        let hardware = Hardware::bring_up(&boot.machine)?;
        let cores = cores::start_all(&boot.machine, board::init_core).map_err(|_| Error::Missing("other core"))?;
        let edu = EduStray::start(master(&hardware, mode, "edu", testdev::edu::ID, 0)?)?;
        Ok(Self { mode, hardware, cores, edu })
    }

    /// The device that mappings are made for.
    pub fn device(&self) -> &Device {
        self.edu.master().device()
    }

    /// Gives the device up, and says how many commands all SMMUs were given since they were started.
    pub fn finish(self) -> u64 {
        let Self { hardware, edu, .. } = self;
        if let Err(error) = edu.stop() {
            kernel::println!("error: {error}");
        }
        let smmus = hardware.smmus().to_vec();
        // The device's domain ends with it, which takes commands too.
        drop(hardware);
        smmus.iter().map(|smmu| smmu.statistics().commands).sum()
    }

    /// A second device, and who keeps it on the bus.
    pub fn second(&self) -> Result<EduStray, Error> {
        EduStray::start(master(&self.hardware, self.mode, "edu", testdev::edu::ID, 1)?)
    }

    /// The disk, started.
    pub fn disk(&self) -> Result<BlockDisk, Error> {
        BlockDisk::start(master(&self.hardware, self.mode, "virtio-blk", (0x1af4, 0x1042), 0)?)
    }
}

/// The `nth` function with these IDs, attached.
fn master(hardware: &Hardware, mode: Mode, kind: &str, ids: (u16, u16), nth: usize) -> Result<Master, Error> {
    let matches = |function: &Arc<Function>| (function.ids().vendor, function.ids().device) == ids;
    let mut found = hardware.functions().filter(|(_, function)| matches(function));
    let (host, function) = found.nth(nth).ok_or(Error::Missing("device of the benchmark"))?;
    // In the same machine, with the same IOMMU: told to let this device through.
    let treatment = Treatment { passthrough: mode == Mode::Direct, ..Treatment::default() };
    hardware.attach_as(host, &function.clone(), kind, Limits::NONE, &treatment)
}
