//! Twenty disks and two displays, all at work at once.

use super::pattern;
use crate::bench::soon;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::block_on;
use board::{BlockDisk, Error};
use dma::{FromDevice, Ladder, ToDevice};
use kernel::class::{Disk, Frame, PixelOrder, Screen};
use ktest::{expect, expect_eq, ktest};

const DISKS: u32 = 20;
/// Bytes that each disk writes and reads.
const LEN: u64 = 64 << 10;

/// Sectors from here on belong to the tests.
fn scratch(disk: &BlockDisk) -> u64 {
    disk.block().geometry().sectors - 8192
}

ktest! {
    fn twenty_disks_work_at_once_and_each_has_what_it_was_given(bench) {
        let disks: Vec<BlockDisk> = (0..DISKS as usize).map(|nth| bench.nth_disk(nth)).collect::<Result<_, Error>>()?;
        let mut streams: Vec<_> = disks.iter().flat_map(|disk| disk.master().streams().to_vec()).collect();
        streams.sort_unstable();
        streams.dedup();
        expect_eq!(streams.len(), disks.len());

        // All are told before any is waited for, both times.
        let mut writes = Vec::new();
        for (disk, seed) in disks.iter().zip(100..) {
            let mut pages = disk.device().page_set(LEN, Ladder::SINGLE_PAGES)?;
            pages.write_at(0, &pattern(seed, LEN as usize))?;
            let loan = Arc::new(disk.device().map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?);
            writes.push(disk.block().write(scratch(disk), &loan, 0..LEN)?);
        }
        for write in writes {
            block_on(soon(), write)??;
        }
        let mut reads = Vec::new();
        for disk in &disks {
            let pages = disk.device().page_set(LEN, Ladder::SINGLE_PAGES)?;
            let loan = Arc::new(disk.device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
            reads.push((disk.block().read(scratch(disk), &loan, 0..LEN)?, loan));
        }
        for ((read, loan), seed) in reads.into_iter().zip(100..) {
            block_on(soon(), read)??;
            let pages = Arc::try_unwrap(loan).map_err(|_| Error::Missing("last owner of a loan"))?.unmap()?;
            let mut found = alloc::vec![0; LEN as usize];
            pages.read_at(0, &mut found)?;
            expect!(found == pattern(seed, LEN as usize), "disk {}", seed - 100);
        }
        for disk in disks {
            disk.stop()?;
        }
        Ok(())
    }
    machine: crowd
}

ktest! {
    fn two_displays_show_at_once(bench) {
        let screens = [bench.nth_gpu(0)?, bench.nth_gpu(1)?];
        expect!(screens[0].master().streams() != screens[1].master().streams());
        let (width, height) = (320_u32, 200_u32);
        let len = width * height * 4;
        let mut shown = Vec::new();
        for (screen, seed) in screens.iter().zip(200..) {
            let mut pages = screen.device().page_set(len.into(), Ladder::SINGLE_PAGES)?;
            pages.write_at(0, &pattern(seed, len as usize))?;
            let loan = Arc::new(screen.device().map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?);
            let rows = 0..u64::from(len);
            let rows = core::slice::from_ref(&rows);
            let frame = Frame { width, height, order: PixelOrder::Bgrx, loan: &loan, rows };
            shown.push((screen.show(&frame, soon())?, loan));
        }
        for (screen, (picture, loan)) in screens.iter().zip(shown) {
            screen.hide(picture, soon())?;
            Arc::try_unwrap(loan).map_err(|_| Error::Missing("last owner of a loan"))?.unmap()?;
        }
        for screen in screens {
            screen.stop()?;
        }
        Ok(())
    }
    machine: crowd
}
