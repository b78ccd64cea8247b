//! The drivers against devices in software, honest and hostile, behind the DMA-API's fake IOMMU.

mod fences;
mod foreign;
mod gpu;
mod hostile;
mod lane;
mod negotiation;
mod order;
mod pci;
mod queue;
mod transfers;

use crate::Error;
use crate::blk::{Block, Options};
use crate::device::Vectors;
use crate::fakes::{FakeDevice, MemoryDisk, Registers};
use crate::spec::blk::SECTOR_SIZE;
use base::Deadline;
use dma::fakes::FakeSystem;
use dma::{Bidirectional, Ladder, Mapped, PageSet};
use std::sync::Arc;

/// A loan that disks may read and write.
pub type Loan = Mapped<Bidirectional, PageSet>;

/// Long enough for anything that is to happen.
pub fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

/// Long enough to show that something does not happen.
pub fn now() -> Deadline {
    Deadline::after_millis(0)
}

/// A machine with a disk.
pub struct Rig {
    pub system: FakeSystem,
    pub host: dma::fakes::FakeDevice,
    pub disk: MemoryDisk,
    pub device: Arc<FakeDevice>,
}

impl Rig {
    pub fn new(sectors: u64, change: impl FnOnce(&mut Registers)) -> Self {
        let system = FakeSystem::new();
        let host = system.device("disk").unwrap();
        let disk = MemoryDisk::new(sectors);
        let mut registers = disk.registers();
        change(&mut registers);
        let device = FakeDevice::new(registers, disk.clone(), Arc::new(host.master.clone()));
        Self { system, host, disk, device }
    }

    pub fn start(&self, depth: u16) -> Result<Block, Error> {
        let vectors = Vectors { config: Some(0), queue: Some(1) };
        let options = Options { depth, vectors, ..Options::default() };
        let block = Block::new(self.device.clone(), self.host.device.clone(), &options, Deadline::after_millis(20))?;
        self.device.connect(0, block.config_handler().unwrap());
        self.device.connect(1, block.queue_handler());
        Ok(block)
    }

    /// Lends zeroed, scattered pages to the disk.
    pub fn lend(&self, bytes: u64) -> Arc<Loan> {
        Arc::new(self.host.device.map(self.pages(bytes)).unwrap())
    }

    pub fn pages(&self, bytes: u64) -> PageSet {
        PageSet::zeroed(self.system.memory, bytes, Ladder::SINGLE_PAGES).unwrap()
    }

    /// Whether the disk still reaches the loan's first byte.
    pub fn reaches(&self, iova: iommu::Iova) -> bool {
        self.host.master.write(iova, &[0]).is_ok()
    }

    /// What must hold at the end of every test: the device touched nothing that it had not been lent.
    pub fn check(&self) {
        assert_eq!(self.system.memory.violations(), Vec::<String>::new());
    }
}

/// Ends a loan and returns its bytes.
pub fn take_back(loan: Arc<Loan>) -> Vec<u8> {
    let loan = Arc::try_unwrap(loan).expect("somebody else still holds the loan");
    let pages = loan.unmap().unwrap();
    let mut bytes = vec![0; pages.len() as usize];
    pages.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What a new disk holds from `sector` on.
pub fn expected(sector: u64, len: usize) -> Vec<u8> {
    (sector * SECTOR_SIZE..).take(len).map(MemoryDisk::pattern).collect()
}
