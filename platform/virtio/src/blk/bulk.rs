//! Transfers of any length, cut into requests that the disk takes.

use super::{Block, Transfer};
use crate::Error;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::ops::Range;
use dma::Lent;

/// Requests of one bulk transfer in flight at a time: enough to keep a disk busy, and few enough to leave room for others.
const WINDOW: usize = 32;

impl Block {
    /// Reads from `sector` on into bytes `range` of `loan`, however long that is, with several requests in flight.
    ///
    /// # Errors
    ///
    /// As [`Block::read`], and what [`Transfer`] ends with; the first error ends it. Requests in flight then still write to the
    /// loan, which stays lent until they are over.
    pub async fn read_all<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<(), Error> {
        self.bulk(sector, &**loan, range, |sector, range| self.add_read(sector, loan, range)).await
    }

    /// Writes bytes `range` of `loan` to `sector` and on, however long that is, with several requests in flight.
    ///
    /// # Errors
    ///
    /// As [`Block::read_all`], and [`Error::ReadOnly`].
    pub async fn write_all<L: Lent>(&self, sector: u64, loan: &Arc<L>, range: Range<u64>) -> Result<(), Error> {
        self.bulk(sector, &**loan, range, |sector, range| self.add_write(sector, loan, range)).await
    }

    async fn bulk(
        &self,
        sector: u64,
        loan: &dyn Lent,
        range: Range<u64>,
        add: impl Fn(u64, Range<u64>) -> Result<Transfer, Error>,
    ) -> Result<(), Error> {
        let mut flying = VecDeque::new();
        flying.try_reserve_exact(WINDOW).map_err(|_| Error::OutOfMemory)?;
        let (mut sector, mut at) = (sector, range.start);
        loop {
            let left = range.end.saturating_sub(at);
            // Where not even one block fits the request, the request itself says why.
            let len = match self.largest_transfer(loan, at) {
                0 => left,
                largest => left.min(largest),
            };
            let result =
                if flying.len() < WINDOW { add(sector, at..at.saturating_add(len)) } else { Err(Error::QueueFull) };
            match result {
                Ok(transfer) => {
                    flying.push_back(transfer);
                    at += len;
                    sector += len / crate::spec::blk::SECTOR_SIZE;
                    if at == range.end {
                        break;
                    }
                }
                Err(Error::QueueFull) => {
                    let oldest = flying.pop_front().ok_or(Error::QueueFull)?;
                    self.queue.kick();
                    oldest.await?;
                    // Whatever else is over makes room too: the more at once, the fewer doorbells.
                    while let Some(next) = flying.pop_front_if(|next| next.is_over()) {
                        next.await?;
                    }
                }
                Err(error) => {
                    self.queue.kick();
                    return Err(error);
                }
            }
        }
        self.queue.kick();
        for transfer in flying {
            transfer.await?;
        }
        Ok(())
    }
}
