//! Transfers in numbers, all about one type of loan: nothing is allocated for one, loans go in and come back by value, the
//! doorbell is rung once for many, and what the disk has returned is taken many at a time.

use super::Block;
use super::transfer::judge;
use crate::Error;
use crate::queue::{self, Access, Item};
use crate::spec::blk::{SECTOR_SIZE, request};
use base::Deadline;
use core::fmt;
use core::ops::Range;
use dma::Lent;

/// A transfer that was not handed to the disk. The loan comes back.
pub struct Refused<L> {
    /// What the transfer was about.
    pub loan: L,
    /// Why.
    pub error: Error,
}

impl<L> fmt::Debug for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Refused({:?})", self.error)
    }
}

impl<L> fmt::Display for Refused<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<L> core::error::Error for Refused<L> {}

/// A way to a disk for transfers that are all about one type of loan. From [`Block::lane`].
///
/// Dropping it takes nothing away from the disk: the queue keeps the loans until the disk is done.
pub struct Lane<'a, L: Lent> {
    block: &'a Block,
    lane: queue::Lane<L>,
}

impl Block {
    /// Opens a lane for transfers to and from loans of type `L`. All the memory that they ever need is allocated here.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::QueueFull`] where there are as many lanes as descriptors, and why the queue is out of use.
    pub fn lane<L: Lent>(&self) -> Result<Lane<'_, L>, Error> {
        Ok(Lane { block: self, lane: queue::Lane::new(&self.queue)? })
    }
}

impl<L: Lent> Lane<'_, L> {
    /// Hands a read to the disk, from `sector` on into bytes `range` of `loan`. It may lie there until [`Lane::kick`].
    ///
    /// # Errors
    ///
    /// As [`Block::read`].
    #[inline]
    pub fn read(&mut self, sector: u64, loan: L, range: Range<u64>) -> Result<(), Refused<L>> {
        self.add(request::IN, sector, loan, range, Access::Write)
    }

    /// Hands a write to the disk, of bytes `range` of `loan` to `sector` and on. It may lie there until [`Lane::kick`].
    ///
    /// # Errors
    ///
    /// As [`Block::write`].
    #[inline]
    pub fn write(&mut self, sector: u64, loan: L, range: Range<u64>) -> Result<(), Refused<L>> {
        if self.block.geometry.read_only {
            return Err(Refused { loan, error: Error::ReadOnly });
        }
        self.add(request::OUT, sector, loan, range, Access::Read)
    }

    #[inline]
    fn add(&mut self, kind: u32, sector: u64, loan: L, range: Range<u64>, access: Access) -> Result<(), Refused<L>> {
        let block = self.block;
        if let Err(error) = block.check_place(sector, &range) {
            return Err(Refused { loan, error });
        }
        // Type and reserved word, sector [5.2.6].
        let header = [u64::from(kind).to_le(), sector.to_le()];
        let limits = (block.geometry.max_segment, block.max_segments);
        let item = Item { header, range, access, limits };
        self.lane.add(&item, loan).map_err(|(loan, error)| Refused { loan, error })
    }

    /// Tells the disk about what was handed to it since the last time, if it wants to hear of it.
    pub fn kick(&self) {
        self.lane.queue().kick();
    }

    /// Transfers that were handed to the disk and have not been taken back.
    pub fn in_flight(&self) -> usize {
        self.lane.in_flight()
    }

    /// Sleeps until `count` transfers can be taken back by [`Lane::take`], or all that are in flight if those are fewer. The disk
    /// is asked to interrupt only then.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], and why the queue is out of use.
    pub fn wait(&mut self, count: usize, deadline: Deadline) -> Result<(), Error> {
        self.lane.wait(count, deadline)
    }

    /// Takes back what the disk has returned: calls `each` with every loan and how its transfer went, as [`super::Transfer`] ends.
    /// Does not sleep. Returns how many there were.
    ///
    /// # Errors
    ///
    /// Why the queue is out of use, if nothing was returned. Loans of transfers in flight stay until the disk has been reset.
    #[inline]
    pub fn take(&mut self, mut each: impl FnMut(L, Result<(), Error>)) -> Result<usize, Error> {
        self.lane.take(|loan, reply| {
            // Everything that the disk may write it must have written: the data, and then its answer.
            each(loan, reply.and_then(|reply| judge(reply.status, reply.written, reply.writable.saturating_sub(1))));
        })
    }
}

impl Block {
    /// Checks where on the disk a transfer is, and how long, and returns its length in bytes.
    #[inline]
    pub(super) fn check_place(&self, sector: u64, range: &Range<u64>) -> Result<u32, Error> {
        let len = range.end.saturating_sub(range.start);
        let block = u64::from(self.geometry.block_size);
        // A power of two, at least a sector.
        let (bytes, sectors) = (block - 1, block / SECTOR_SIZE - 1);
        if len == 0 || len & bytes != 0 || sector & sectors != 0 {
            return Err(Error::Misaligned { block });
        }
        let (count, capacity) = (len / SECTOR_SIZE, self.geometry.sectors);
        if sector.checked_add(count).is_none_or(|end| end > capacity) {
            return Err(Error::OutsideDisk { sector, count, capacity });
        }
        u32::try_from(len).map_err(|_| Error::TooLong)
    }
}
