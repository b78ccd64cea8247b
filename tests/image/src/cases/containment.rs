//! Devices that do not stop faulting.

use super::pattern;
use crate::bench::soon;
use base::{Deadline, wait_until};
use dma::{FromDevice, Ladder};
use iommu::group::AttachmentState;
use iommu::{Iova, PAGE_SIZE};
use kernel::faults::DEFAULT_BUDGET;
use ktest::{expect, expect_eq, ktest};
use testdev::edu::Completion;

ktest! {
    /// Red when only the bus mastering was taken away, and when only the address space was.
    fn a_device_that_does_not_stop_faulting_is_taken_off_the_bus_and_others_work_on(bench) {
        let (edu, disk) = (bench.edu()?, bench.disk()?);
        let group = edu.master().group().cloned().ok_or(board::Error::Missing("group"))?;
        let contained = bench.hardware.contained();
        let since = bench.watch();
        bench.hardware.faults().set_budget(8);
        for round in 0..9 {
            expect!(round == 0 || bench.hardware.faults().total() != 0);
            // Polled: a device without an address space cannot interrupt.
            edu.edu().dma_from_device(Iova::new(0x5555_0000 + round * PAGE_SIZE), 64, Completion::Polling, soon())?;
        }
        let over = wait_until(Deadline::after_millis(5_000), || bench.hardware.contained() > contained);
        bench.hardware.faults().set_budget(DEFAULT_BUDGET);
        over?;
        expect_eq!(group.current(), AttachmentState::Blocked);
        expect!(!edu.master().function().is_bus_master());
        // The first record is still there, and it can be said whose it was.
        let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
        expect_eq!((noted.fault.iova, noted.fault.event), (Some(Iova::new(0x5555_0000)), "F_TRANSLATION"));
        let explained = bench.hardware.explain(&noted.fault).unwrap_or_default();
        expect!(explained.contains("edu") && explained.contains("for edu"), "{explained}");
        // It gets nothing any more, and no way back without being attached anew.
        expect!(edu.master().device().map::<FromDevice, _>(edu.master().device().pages(PAGE_SIZE)?).is_err());
        expect!(matches!(edu.master().release(), Err(board::Error::Contained(_))));
        expect!(!edu.master().function().is_bus_master());

        // The disk has noticed nothing.
        let into = disk.block().device().page_set(PAGE_SIZE, Ladder::SINGLE_PAGES)?;
        let into = alloc::sync::Arc::new(disk.block().device().map::<FromDevice, _>(into).map_err(|rejected| rejected.error)?);
        base::block_on(soon(), disk.block().read(0, &into, 0..PAGE_SIZE)?)??;
        drop(into);
        disk.stop()?;
        edu.stop()?;
        // Attached anew, it has its budget back, and works.
        let edu = bench.edu()?;
        let mut pages = edu.master().device().pages(PAGE_SIZE)?;
        pages.as_mut_slice()[..64].copy_from_slice(&pattern(41, 64));
        let source = edu.master().device().map::<dma::ToDevice, _>(pages).map_err(|rejected| rejected.error)?;
        edu.edu().dma_to_device(source.iova(), 64, Completion::Interrupt, soon())?;
        source.unmap()?;
        edu.stop()?;
        Ok(())
    }
}
