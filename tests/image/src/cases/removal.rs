//! Drivers that go while their devices are at work: off the bus, blocked, every page back, and ready to be started again.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, block_on, wait_until};
use board::{EduStray, Master};
use dma::{Device, FromDevice, Ladder, ToDevice, tracker};
use iommu::group::{AttachmentState, Group};
use iommu::{Iova, PAGE_SIZE};
use kernel::class::{Disk, Frame, PixelOrder, Screen};
use ktest::{Outcome, expect, expect_eq, ktest};
use pci::Function;
use testdev::edu::Completion;

/// What is left of a master to look at when it has gone.
struct Gone {
    function: Arc<Function>,
    group: Option<Arc<Group>>,
}

impl Gone {
    fn of(master: &Master) -> Self {
        Self { function: master.function().clone(), group: master.group().cloned() }
    }

    fn check(&self) -> Result<(), Outcome> {
        expect!(!self.function.is_bus_master(), "it masters the bus");
        if let Some(group) = &self.group {
            expect_eq!(group.current(), AttachmentState::Blocked);
            expect_eq!(group.users(), 0);
        }
        Ok(())
    }
}

/// Rounds that fill what is kept for good, such as tables of the domain and the heap, and rounds that are judged.
const ROUNDS: (usize, usize) = (8, 4);

/// Caught: registers of a device that are mapped anew, with tables of their own, each time its driver starts.
///
/// Runs `round` again and again with every mapping recorded. After each nothing may be lent, and in the end no frame and no byte
/// of the heap goes any more.
fn leaks_nothing(mut round: impl FnMut() -> Result<(), Outcome>) -> Result<(), Outcome> {
    tracker::enable(true);
    let mut rounds = || {
        let mut left = Vec::with_capacity(ROUNDS.0 + ROUNDS.1);
        for _ in 0..ROUNDS.0 + ROUNDS.1 {
            round()?;
            let lent = tracker::report()?;
            expect!(lent.is_empty(), "{lent}");
            left.push((kernel::mm::stats().free, kernel::mm::heap_stats().used));
        }
        expect!(left[ROUNDS.0 - 1..].windows(2).all(|two| two[0] == two[1]), "frames free, heap used: {left:?}");
        expect_eq!(dma::quarantine::report().pages, 0);
        Ok(())
    };
    let result = rounds();
    tracker::enable(false);
    result
}

ktest! {
    /// With requests in flight that the device has not answered.
    fn a_disk_with_sixty_four_requests_in_flight(bench) {
        leaks_nothing(|| {
            let disk = bench.disk()?;
            let gone = Gone::of(disk.master());
            let mut transfers = Vec::new();
            {
                let mut batch = disk.block().batch();
                for index in 0..64 {
                    let pages = disk.device().page_set(PAGE_SIZE, Ladder::SINGLE_PAGES)?;
                    let loan = Arc::new(disk.device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
                    transfers.push(batch.read(index * 8, &loan, 0..PAGE_SIZE)?);
                }
            }
            disk.stop()?;
            gone.check()?;
            // Each has its end: the answer that came in time, or that the disk has gone.
            for transfer in transfers {
                let _ = block_on(soon(), transfer)?;
            }
            works(bench)
        })
    }
}

/// The disk can be started again, and reads.
fn works(bench: &Bench) -> Result<(), Outcome> {
    let disk = bench.disk()?;
    let pages = disk.device().page_set(PAGE_SIZE, Ladder::SINGLE_PAGES)?;
    let loan = Arc::new(disk.device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?);
    block_on(soon(), disk.block().read(0, &loan, 0..PAGE_SIZE)?)??;
    drop(loan);
    disk.stop()?;
    Ok(())
}

ktest! {
    fn a_screen_that_shows_a_picture_with_commands_in_flight(bench) {
        leaks_nothing(|| {
            for _ in 0..2 {
                let screen = bench.gpu()?;
                let gone = Gone::of(screen.master());
                let (width, height) = (128_u32, 128_u32);
                let bytes = u64::from(width * height * 4);
                let pages = screen.device().page_set(bytes, Ladder::SINGLE_PAGES)?;
                let loan = Arc::new(screen.device().map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?);
                let rows = 0..bytes;
                let rows = core::slice::from_ref(&rows);
                let frame = Frame { width, height, order: PixelOrder::Bgrx, loan: &loan, rows };
                let shown = screen.show(&frame, soon())?;
                drop(loan);
                for _ in 0..8 {
                    // Handed to the device, and not waited for.
                    let _ = block_on(Deadline::after_millis(0), screen.gpu().display_info());
                }
                screen.stop()?;
                gone.check()?;
                drop(shown);
            }
            Ok(())
        })
    }
}

/// Starts a transfer that goes on when this returns.
fn provoke(edu: &EduStray, iova: Iova) {
    // It takes longer than no time.
    let _ = edu.edu().dma_from_device(iova, 64, Completion::Polling, Deadline::after_millis(0));
}

/// Gives edu, which takes a tenth of a second for a transfer, time to finish whatever it does.
fn settle() {
    let _ = wait_until(Deadline::after_millis(400), || false);
}

fn still_lent(device: &Device, line: u32) -> Result<(), Outcome> {
    let left = device.lendings()?;
    expect_eq!(left.count(), 1);
    let text = format!("{left}");
    expect!(text.contains("edu") && text.contains("from device"), "{text}");
    expect!(text.contains(&format!("removal.rs:{line}")) && text.contains("4 KiB"), "{text}");
    Ok(())
}

ktest! {
    /// Misuse 18.
    fn mappings_that_outlive_their_driver_are_blocked_and_named(bench) {
        leaks_nothing(|| {
            let edu = bench.edu()?;
            let gone = Gone::of(edu.master());
            let device = edu.master().device().clone();
            let mut source = device.pages(PAGE_SIZE)?;
            source.as_mut_slice()[..64].copy_from_slice(&pattern(32, 64));
            let source = device.map::<ToDevice, _>(source).map_err(|rejected| rejected.error)?;
            edu.edu().dma_to_device(source.iova(), 64, Completion::Interrupt, soon())?;
            source.unmap()?;
            let (pages, line) = (device.pages(PAGE_SIZE)?, line!() + 1);
            let target = device.map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?;
            provoke(&edu, target.iova());
            edu.stop()?;
            gone.check()?;
            still_lent(&device, line)?;
            settle();
            let pages = target.unmap()?;
            expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0), "the memory was written");
            expect!(device.lendings()?.is_empty());
            // The same function again.
            let edu = bench.edu()?;
            let device = edu.master().device();
            let source = device.map::<ToDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
            edu.edu().dma_to_device(source.iova(), 64, Completion::Interrupt, soon())?;
            source.unmap()?;
            edu.stop()?;
            Ok(())
        })
    }
}
