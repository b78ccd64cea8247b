//! virtio-blk as a disk, and as a device that strays.

use super::{LIFECYCLE_MILLIS, Signal, Wiring, virtio};
use crate::{Error, Master};
use ::virtio::blk::{Block, Options, Transfer};
use ::virtio::transport::PciTransport;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use base::Deadline;
use core::future::Future;
use core::ops::Range;
use core::pin::Pin;
use core::task::{Context, Poll};
use dma::{Device, Fence, Job, Lent};
use iommu::Iova;
use kernel::class::{Disk, Stray};
use pci::Wire;

/// Bytes of a virtio sector, whatever the block size.
const SECTOR: u64 = 512;
/// Milliseconds for which a transfer waits for those who use the shared buffer that it is for.
const TURN_MILLIS: u64 = 10_000;
/// Bytes of the stray transfer: more than a machine emulator may replace by a buffer of its own.
const STRAY: u64 = 8192;

/// A started disk.
pub struct BlockDisk {
    // In the order of dropping: the driver resets the device, then its vectors go.
    block: Block,
    wiring: Wiring,
    master: Master,
}

impl BlockDisk {
    /// Starts the disk of `master`.
    ///
    /// # Errors
    ///
    /// [`Error::Virtio`], [`Error::Pci`]; the device is off the bus then.
    pub fn start(master: Master) -> Result<Self, Error> {
        master.release()?;
        match Self::try_start(&master) {
            Ok((block, wiring)) => Ok(Self { block, wiring, master }),
            Err(error) => {
                // The first error says why; that the device could not even be stopped is for the log.
                if let Err(second) = master.arrest() {
                    log::error!("{second}");
                }
                Err(error)
            }
        }
    }

    fn try_start(master: &Master) -> Result<(Block, Wiring), Error> {
        let failed = |error| virtio(master, error);
        let transport = Arc::new(PciTransport::new(master.function().clone()).map_err(failed)?);
        let mut wiring = Wiring::new(master)?;
        let options = Options { vectors: wiring.vectors, ..Options::default() };
        let deadline = Deadline::after_millis(LIFECYCLE_MILLIS);
        let block = Block::new(transport.clone(), master.device().clone(), &options, deadline).map_err(failed)?;
        wiring.connect(master, &transport, block.config_handler().map_err(failed)?, block.queue_handler())?;
        Ok((block, wiring))
    }

    /// The driver itself.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// How it interrupts.
    pub fn signal(&self) -> Signal {
        self.wiring.signal()
    }

    /// The wire by which it interrupts, if it is one.
    pub fn wire(&self) -> Option<&Wire> {
        self.wiring.wire()
    }

    /// The bus master.
    pub fn master(&self) -> &Master {
        &self.master
    }

    /// Resets the disk and takes it off the bus: all its memory comes back.
    ///
    /// # Errors
    ///
    /// [`Error::Virtio`] where it does not finish the reset, [`Error::Pci`], [`Error::Dma`].
    pub fn stop(self) -> Result<(), Error> {
        let Self { block, wiring, master } = self;
        let reset = block.shut_down(Deadline::after_millis(LIFECYCLE_MILLIS)).map_err(|error| virtio(&master, error));
        drop(wiring);
        master.arrest()?;
        reset
    }
}

impl Disk for BlockDisk {
    type Error = ::virtio::Error;
    type Transfer = Ordered;

    fn device(&self) -> &Device {
        self.block.device()
    }

    fn block_size(&self) -> u32 {
        self.block.geometry().block_size
    }

    fn blocks(&self) -> u64 {
        self.block.geometry().sectors / (u64::from(self.block_size()) / SECTOR)
    }

    fn largest_transfer<L: Lent>(&self, loan: &L, offset: u64) -> u64 {
        self.block.largest_transfer(loan, offset)
    }

    /// Others who use a shared buffer are waited for, and wait until this is over.
    fn read<L: Lent>(&self, block: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Ordered, ::virtio::Error> {
        let sector = block.saturating_mul(u64::from(self.block_size()) / SECTOR);
        let Some(job) = Job::begin(loan, Deadline::after_millis(TURN_MILLIS))? else {
            return Ok(Ordered { transfer: self.block.read(sector, loan, range)?, fence: None });
        };
        let transfer = self.block.read(sector, &job, range)?;
        match transfer.watch().map(base::fallible::arc) {
            Some(Ok(watch)) => job.watch(watch),
            // Without memory to look by nobody will know how it goes, but for who has the result.
            Some(Err(_)) => job.fence().fail(),
            None => {}
        }
        Ok(Ordered { transfer, fence: Some(job.fence()) })
    }

    fn wait_for_room(&self, deadline: Deadline) -> Result<(), ::virtio::Error> {
        self.block.wait_for_room(deadline)
    }
}

/// A transfer, and what others who use the same buffer wait for.
#[must_use = "only the result says whether the transfer succeeded"]
pub struct Ordered {
    transfer: Transfer,
    fence: Option<Fence>,
}

impl Future for Ordered {
    type Output = Result<(), ::virtio::Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { transfer, fence } = &mut *self;
        let result = Pin::new(transfer).poll(context);
        if let (Poll::Ready(Err(_)), Some(fence)) = (&result, fence) {
            fence.known_to_have_failed();
        }
        result
    }
}

impl Stray for BlockDisk {
    fn device(&self) -> &Device {
        self.block.device()
    }

    fn stray(&self, target: Iova, deadline: Deadline) -> Result<(), String> {
        let size = u64::from(self.block_size());
        let len = STRAY.max(size).min(self.blocks().saturating_mul(size));
        let loan = Arc::new(dma::Stray::new(self.block.device(), target, len).map_err(|error| error.to_string())?);
        let mut transfer = self.block.read(0, &loan, 0..len).map_err(|error| error.to_string())?;
        // A disk that is stopped half-way reports it, breaks, or does not answer at all: whichever it is does not matter here.
        if let Err(error) = transfer.wait(Deadline::after_millis(200).min(deadline)) {
            log::debug!("{}: {error}", self.block.device().name());
        }
        Ok(())
    }
}
