//! Many devices at once, and devices far from the first root bus.

use crate::Bench;
use crate::bench::soon;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::block_on;
use board::{BlockDisk, EduStray, Error, GpuScreen, Signal};
use dma::{FromDevice, Ladder, Limits};
use iommu::{Iova, PAGE_SIZE};
use kernel::class::Screen;
use ktest::{Outcome, TestResult, expect, expect_eq, ktest};
use testdev::edu::Completion;

ktest! {
    fn twenty_disks_work_at_once(bench) {
        let mut disks = Vec::new();
        for nth in 0..20 {
            let (host, function) = bench.function(0x1af4, 0x1042, nth)?;
            let disk = BlockDisk::start(bench.hardware.attach(host, &function, "virtio-blk", Limits::NONE, false)?)?;
            expect_eq!(disk.signal(), Signal::Message);
            disks.push(disk);
        }
        let mut transfers = Vec::new();
        for index in 0..8 {
            for disk in &disks {
                let pages = disk.block().device().page_set(16 << 10, Ladder::SINGLE_PAGES)?;
                let loan = disk.block().device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?;
                transfers.push(disk.block().read(index * 32, &Arc::new(loan), 0..16 << 10)?);
            }
        }
        for transfer in transfers {
            block_on(soon(), transfer)??;
        }
        for disk in disks {
            disk.stop()?;
        }
        expect_eq!(dma::quarantine::report().pages, 0);
        Ok(())
    }
    machine: many
}

ktest! {
    fn two_displays_answer_side_by_side(bench) {
        let display = |nth| -> Result<GpuScreen, Outcome> {
            let (host, function) = bench.function(0x1af4, 0x1050, nth)?;
            Ok(GpuScreen::start(bench.hardware.attach(host, &function, "virtio-gpu", Limits::NONE, false)?)?)
        };
        let (first, second) = (display(0)?, display(1)?);
        expect!(first.master().streams() != second.master().streams());
        for _ in 0..10 {
            expect!(first.size(soon())?.0 >= 640 && second.size(soon())?.0 >= 640);
        }
        first.stop()?;
        expect!(second.size(soon())?.0 >= 640);
        second.stop()?;
        Ok(())
    }
    machine: many
}

/// The edu on a bus of which `is` holds, fenced like any other.
fn fenced(bench: &Bench, is: impl Fn(u8) -> bool) -> TestResult {
    let mut edus = bench.hardware.functions().filter(|(_, function)| testdev::edu::Edu::matches(function));
    let (host, function) = edus.find(|(_, function)| is(function.bdf().bus())).ok_or(Error::Missing("edu there"))?;
    let edu = EduStray::start(bench.hardware.attach(host, function, "edu", Limits::NONE, false)?)?;
    let requester = edu.master().function().bdf().requester_id().get();
    let streams: Vec<u32> = edu.master().streams().iter().map(|stream| stream.get()).collect();
    expect_eq!(streams, [u32::from(requester)]);
    edu.edu().raise_interrupt(1, soon())?;
    let device = edu.master().device();
    let lent = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
    let since = bench.watch();
    edu.edu().dma_from_device(lent.iova(), 64, Completion::Interrupt, soon())?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    edu.edu().dma_from_device(Iova::new(0x1234_5000), 64, Completion::Interrupt, soon())?;
    let noted = bench.fault(edu.master().streams(), since).ok_or(Error::Missing("fault record"))?;
    expect_eq!(noted.fault.iova, Some(Iova::new(0x1234_5000)));
    drop(lent);
    edu.stop()?;
    Ok(())
}

ktest! {
    fn a_device_behind_a_further_host_bridge_has_its_stream_its_messages_and_its_fence(bench) {
        fenced(bench, |bus| bus > 0x80)
    }
    machine: many
}

ktest! {
    fn a_device_behind_a_switch_has_its_stream_its_messages_and_its_fence(bench) {
        fenced(bench, |bus| (1..0x80).contains(&bus))
    }
    machine: many
}
