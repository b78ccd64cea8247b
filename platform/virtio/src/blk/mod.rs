//! The block device \[5.2\].
//!
//! Requests are futures: many are in flight at once, each naming a range of lent memory. Header and status byte are in the
//! queue's own memory, so that a request maps nothing but what its caller has mapped.
//!
//! Sectors have 512 bytes whatever the block size; transfers start at and consist of whole blocks.

mod bulk;
mod config;
mod lane;
mod transfer;

pub use config::{Geometry, MAX_BLOCK_SIZE};
pub use lane::{Lane, Refused};
pub use transfer::{DiskId, Transfer, Watch};

use crate::device::{ConfigHandler, Core, Vectors};
use crate::queue::{Access, Command, Loans, Parts, Queue, QueueOptions, QueueStats, check_loan};
use crate::spec::blk::{HEADER_SIZE, ID_SIZE, SECTOR_SIZE, feature, request};
use crate::spec::device_type;
use crate::transport::Transport;
use crate::{Error, spec};
use alloc::sync::Arc;
use base::Deadline;
use core::ops::Range;
use dma::Lent;

/// How a disk is driven.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The most requests in flight; rounded down to a power of two and to what the device has.
    pub depth: u16,
    /// The most pieces of memory in one request. A translated loan is one piece, unless the device limits their size.
    pub segments: usize,
    /// Where it interrupts.
    pub vectors: Vectors,
}

impl Default for Options {
    fn default() -> Self {
        Self { depth: 128, segments: 126, vectors: Vectors::default() }
    }
}

/// A disk.
///
/// Dropping it resets the device; outstanding requests then end with [`Error::ShutDown`].
pub struct Block {
    core: Core,
    queue: Arc<Queue>,
    geometry: Geometry,
    max_segments: usize,
}

impl Block {
    /// Resets, negotiates and starts the disk behind `transport`, whose bus master is `device`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the device; it has been reset again then.
    pub fn new(
        transport: Arc<dyn Transport>,
        device: dma::Device,
        options: &Options,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let wanted = feature::SIZE_MAX | feature::SEG_MAX | feature::RO | feature::BLK_SIZE | feature::FLUSH;
        let mut core = Core::negotiate(transport, device, device_type::BLOCK, wanted, deadline)?;
        let geometry = config::read(&**core.transport(), core.features(), deadline)?;
        let queue = core.add_queue(
            0,
            &QueueOptions {
                size: options.depth,
                header: HEADER_SIZE,
                response: ID_SIZE + 1,
                segments: options.segments,
                vector: options.vectors.queue,
                quiet: false,
            },
        )?;
        core.start(options.vectors.config)?;
        let max_segments = queue
            .max_segments()
            .min(usize::try_from(geometry.max_segments).unwrap_or(usize::MAX))
            .min(core.dma().limits().max_segments);
        Ok(Self { core, queue, geometry, max_segments })
    }

    /// What the disk says of itself.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What serves the queue's interrupt.
    pub fn queue_handler(&self) -> Arc<Queue> {
        self.queue.clone()
    }

    /// What serves the configuration interrupt.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`].
    pub fn config_handler(&self) -> Result<Arc<ConfigHandler>, Error> {
        self.core.config_handler()
    }

    /// The bus master: loans must be to this device.
    pub fn device(&self) -> &dma::Device {
        self.core.dma()
    }

    /// Counters of the queue.
    pub fn stats(&self) -> QueueStats {
        self.queue.stats()
    }

    /// Reads from `sector` on into bytes `range` of `loan`.
    ///
    /// # Errors
    ///
    /// [`Error::OutsideDisk`], [`Error::Misaligned`], [`Error::ForeignDevice`], [`Error::WrongDirection`],
    /// [`Error::OutsideLoan`], and those of [`Queue::submit`]. How the transfer itself went is the result of the future.
    pub fn read<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        let transfer = self.add_read(sector, loan, range)?;
        self.queue.kick();
        Ok(transfer)
    }

    /// Writes bytes `range` of `loan` to `sector` and on. Durable after a [`Block::flush`] that was submitted after the write
    /// had completed.
    ///
    /// # Errors
    ///
    /// As [`Block::read`], and [`Error::ReadOnly`].
    pub fn write<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        let transfer = self.add_write(sector, loan, range)?;
        self.queue.kick();
        Ok(transfer)
    }

    /// Makes completed writes durable. Over at once for a disk that has no volatile cache.
    ///
    /// # Errors
    ///
    /// Those of [`Queue::submit`].
    pub fn flush(&self) -> Result<Transfer, Error> {
        let transfer = self.add_flush()?;
        self.queue.kick();
        Ok(transfer)
    }

    /// Asks for the identification string.
    ///
    /// # Errors
    ///
    /// Those of [`Queue::submit`].
    pub fn id(&self) -> Result<DiskId, Error> {
        let header = header(request::GET_ID, 0);
        let command = Command {
            header: &header,
            data: Parts::none(),
            access: Access::Write,
            response: ID_SIZE + 1,
            loans: Loans::none(),
        };
        Ok(DiskId::new(self.queue.submit(command)?))
    }

    /// Starts a batch: its requests are handed to the device one by one, and the doorbell is rung once, at its end.
    pub fn batch(&self) -> Batch<'_> {
        Batch { block: self }
    }

    /// Sleeps until another request can be handed to the device.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], and why the queue is out of use.
    pub fn wait_for_room(&self, deadline: Deadline) -> Result<(), Error> {
        self.queue.wait_for_room(1, deadline)
    }

    /// The most bytes, a multiple of the block size, that one request can transfer to or from `loan` starting at byte `offset`.
    /// For callers that split a long transfer.
    pub fn largest_transfer(&self, loan: &dyn Lent, offset: u64) -> u64 {
        let Ok(parts) = Parts::new(loan, &(offset..loan.len()), self.geometry.max_segment) else { return 0 };
        let bytes: u64 = parts.take(self.max_segments).map(|part| u64::from(part.len)).sum();
        // A chain's length has 32 bits; leave room for header and status.
        let bytes = bytes.min(u64::from(u32::MAX) - 2 * SECTOR_SIZE);
        bytes - bytes % u64::from(self.geometry.block_size)
    }

    /// Resets the device, fails outstanding requests and lets go of their loans.
    ///
    /// # Errors
    ///
    /// [`Error::ResetTimedOut`]: what the device may still be using has been leaked.
    pub fn shut_down(mut self, deadline: Deadline) -> Result<(), Error> {
        self.core.shut_down(deadline)
    }

    fn add_read<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        let len = self.check(sector, &**loan, &range, Access::Write)?;
        self.add_transfer(request::IN, sector, loan, &range, Access::Write, len)
    }

    fn add_write<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        if self.geometry.read_only {
            return Err(Error::ReadOnly);
        }
        self.check(sector, &**loan, &range, Access::Read)?;
        self.add_transfer(request::OUT, sector, loan, &range, Access::Read, 0)
    }

    fn add_flush(&self) -> Result<Transfer, Error> {
        if !self.geometry.flush {
            return Ok(Transfer::over());
        }
        let header = header(request::FLUSH, 0);
        let command =
            Command { header: &header, data: Parts::none(), access: Access::Read, response: 1, loans: Loans::none() };
        Ok(Transfer::new(self.queue.add(command)?, 0))
    }

    fn add_transfer<L: Lent>(
        &self,
        kind: u32,
        sector: u64,
        loan: &Arc<L>,
        range: &Range<u64>,
        access: Access,
        written: u32,
    ) -> Result<Transfer, Error> {
        let data = Parts::new(&**loan, range, self.geometry.max_segment)?;
        let count = data.clone().take(self.max_segments + 1).count();
        if count > self.max_segments {
            let count = data.count();
            return Err(Error::TooManySegments { count, max: self.max_segments });
        }
        let loans = Loans::one(loan.clone());
        let header = header(kind, sector);
        let command = Command { header: &header, data, access, response: 1, loans };
        Ok(Transfer::new(self.queue.add(command)?, written))
    }

    /// Checks a transfer and returns its length in bytes.
    fn check(&self, sector: u64, loan: &dyn Lent, range: &Range<u64>, access: Access) -> Result<u32, Error> {
        check_loan(loan, self.core.dma(), access, range)?;
        self.check_place(sector, range)
    }
}

/// Several requests, one doorbell. See [`Block::batch`].
pub struct Batch<'a> {
    block: &'a Block,
}

impl Batch<'_> {
    /// As [`Block::read`].
    ///
    /// # Errors
    ///
    /// As [`Block::read`].
    pub fn read<L: Lent>(&mut self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        self.block.add_read(sector, loan, range)
    }

    /// As [`Block::write`].
    ///
    /// # Errors
    ///
    /// As [`Block::write`].
    pub fn write<L: Lent>(&mut self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Transfer, Error> {
        self.block.add_write(sector, loan, range)
    }

    /// As [`Block::flush`].
    ///
    /// # Errors
    ///
    /// As [`Block::flush`].
    pub fn flush(&mut self) -> Result<Transfer, Error> {
        self.block.add_flush()
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.block.queue.kick();
    }
}

/// A request header.
#[inline]
fn header(kind: u32, sector: u64) -> [u8; spec::blk::HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}
