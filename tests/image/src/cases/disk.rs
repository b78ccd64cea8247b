//! virtio-blk: what was written is what is read, many at once, from and into scattered memory.

use super::pattern;
use crate::bench::soon;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::block_on;
use board::BlockDisk;
use dma::{FromDevice, Ladder, Mapped, PageSet, ToDevice};
use kernel::class::Disk;
use ktest::{Outcome, expect, expect_eq, ktest};

/// Sectors from here on belong to the tests: the end of the disk holds nothing but the backup partition table.
fn scratch(disk: &BlockDisk) -> u64 {
    disk.block().geometry().sectors - 8192
}

fn to_disk(disk: &BlockDisk, bytes: &[u8]) -> Result<Arc<Mapped<ToDevice, PageSet>>, Outcome> {
    let mut pages = disk.device().page_set(bytes.len() as u64, Ladder::SINGLE_PAGES)?;
    pages.write_at(0, bytes)?;
    Ok(Arc::new(disk.device().map(pages).map_err(|rejected| rejected.error)?))
}

fn from_disk(disk: &BlockDisk, len: u64) -> Result<Arc<Mapped<FromDevice, PageSet>>, Outcome> {
    let pages = disk.device().page_set(len, Ladder::SINGLE_PAGES)?;
    Ok(Arc::new(disk.device().map(pages).map_err(|rejected| rejected.error)?))
}

fn back<D: dma::Direction>(loan: Arc<Mapped<D, PageSet>>) -> Result<PageSet, Outcome> {
    let mapped = Arc::try_unwrap(loan).map_err(|_| board::Error::Missing("last owner of a loan"))?;
    Ok(mapped.unmap()?)
}

ktest! {
    fn what_was_written_is_what_is_read(bench) {
        let disk = bench.disk()?;
        let bytes = pattern(11, 96 << 10);
        let out = to_disk(&disk, &bytes)?;
        block_on(soon(), disk.block().write(scratch(&disk), &out, 0..bytes.len() as u64)?)??;
        block_on(soon(), disk.block().flush()?)??;
        back(out)?;
        let into = from_disk(&disk, bytes.len() as u64)?;
        block_on(soon(), disk.block().read(scratch(&disk), &into, 0..bytes.len() as u64)?)??;
        let pages = back(into)?;
        let mut found = alloc::vec![0; bytes.len()];
        pages.read_at(0, &mut found)?;
        expect!(found == bytes);
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    fn sixty_four_requests_are_in_flight_at_once_and_each_gets_its_own(bench) {
        let disk = bench.disk()?;
        let bytes = pattern(12, 64 * 4096);
        let out = to_disk(&disk, &bytes)?;
        block_on(soon(), disk.block().write(scratch(&disk), &out, 0..bytes.len() as u64)?)??;
        back(out)?;
        let mut requests = Vec::new();
        let mut batch = disk.block().batch();
        for index in 0..64_u64 {
            let loan = from_disk(&disk, 4096)?;
            // Backwards, so that an answer given to the wrong request shows.
            let sector = scratch(&disk) + (63 - index) * 8;
            requests.push((batch.read(sector, &loan, 0..4096)?, loan, 63 - index));
        }
        drop(batch);
        for (transfer, loan, place) in requests {
            block_on(soon(), transfer)??;
            let mut found = [0; 4096];
            back(loan)?.read_at(0, &mut found)?;
            expect!(found == bytes[place as usize * 4096..][..4096], "request of block {place}");
        }
        let stats = disk.block().stats();
        expect_eq!(stats.submitted, stats.completed);
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_transfer_past_the_end_of_the_disk_is_refused(bench) {
        let disk = bench.disk()?;
        let loan = from_disk(&disk, 8192)?;
        let last = disk.block().geometry().sectors - 8;
        expect!(disk.block().read(last, &loan, 0..8192).is_err());
        expect!(disk.block().read(u64::MAX, &loan, 0..4096).is_err());
        back(loan)?;
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_loan_to_another_device_is_refused(bench) {
        let (disk, edu) = (bench.disk()?, bench.edu()?);
        let pages = edu.master().device().page_set(4096, Ladder::SINGLE_PAGES)?;
        let foreign = Arc::new(edu.master().device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
        expect!(disk.block().read(0, &foreign, 0..4096).is_err());
        back(foreign)?;
        edu.stop()?;
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    /// Nobody waits for the answer, and the memory stays lent until the disk has given it back all the same.
    fn a_dropped_request_keeps_its_loan_until_the_disk_has_finished(bench) {
        let disk = bench.disk()?;
        let loan = from_disk(&disk, 4096)?;
        drop(disk.block().read(0, &loan, 0..4096)?);
        let transfer = disk.block().read(8, &loan, 0..4096)?;
        block_on(soon(), transfer)??;
        // The queue lets go of abandoned requests when it is next used.
        let mut rounds = 0;
        while Arc::strong_count(&loan) > 1 && rounds < 1000 {
            block_on(soon(), disk.block().read(8, &from_disk(&disk, 4096)?, 0..4096)?)??;
            rounds += 1;
        }
        back(loan)?;
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    fn stopping_a_disk_with_requests_in_flight_gives_every_page_back(bench) {
        let before = kernel::mm::stats().free;
        for _ in 0..4 {
            let disk = bench.disk()?;
            let mut transfers = Vec::new();
            for index in 0..32 {
                let loan = from_disk(&disk, 64 << 10)?;
                transfers.push(disk.block().read(index * 128, &loan, 0..64 << 10)?);
            }
            disk.stop()?;
        }
        let after = kernel::mm::stats().free;
        // Table pages that the domains keep, and the heap, may have grown a little; the 8 MiB of buffers are back.
        expect!(after + 256 >= before, "{before} frames before, {after} after");
        expect_eq!(dma::quarantine::report().pages, 0);
        Ok(())
    }
}
