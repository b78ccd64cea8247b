//! What a device reaches, and what it does not: provoked by real DMA, judged by the event record and by the memory.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::sync::Arc;
use base::Instant;
use board::EduStray;
use dma::{Bidirectional, Error, FromDevice, Ladder, Mapped, Pages, ToDevice};
use iommu::domain::{Domain, DomainKind};
use iommu::{Access, FaultReason, Iova, PAGE_SIZE};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

/// Has edu write `len` bytes of its buffer, filled with `seed`'s pattern, to `target`.
fn write(edu: &EduStray, seed: u32, target: Iova, len: u32) -> Result<(), Outcome> {
    let mut pages = edu.master().device().pages(PAGE_SIZE)?;
    let bytes = pattern(seed, len as usize);
    pages.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
    let source: Mapped<ToDevice, Pages> = edu.master().device().map(pages).map_err(|rejected| rejected.error)?;
    edu.edu().dma_to_device(source.iova(), len, Completion::Interrupt, soon())?;
    source.unmap()?;
    edu.edu().dma_from_device(target, len, Completion::Interrupt, soon())?;
    Ok(())
}

fn lent(edu: &EduStray, pages: Pages) -> Result<Mapped<FromDevice, Pages>, Outcome> {
    Ok(edu.master().device().map(pages).map_err(|rejected| rejected.error)?)
}

/// Expects the first fault of edu since `since` to be a stopped access of this kind.
fn stopped(
    bench: &Bench,
    edu: &EduStray,
    since: Instant,
    access: Access,
    reason: FaultReason,
    at: Iova,
) -> Result<(), Outcome> {
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    expect_eq!(noted.fault.access, Some(access));
    expect_eq!(noted.fault.reason, reason);
    expect_eq!(noted.fault.iova, Some(at));
    let event = if reason == FaultReason::Permission { "F_PERMISSION" } else { "F_TRANSLATION" };
    expect_eq!(noted.fault.event, event);
    expect!(edu.master().streams().contains(&noted.fault.stream));
    Ok(())
}

ktest! {
    fn a_device_reaches_what_it_was_lent(bench) {
        let edu = bench.edu()?;
        let since = bench.watch();
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        write(&edu, 7, target.iova(), 1024)?;
        let pages = target.unmap()?;
        expect!(pages.as_slice()[..1024] == pattern(7, 1024));
        expect!(pages.as_slice()[1024..].iter().all(|byte| *byte == 0));
        expect!(!bench.has_faulted(edu.master().streams(), since));
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// With the TLBI of `unmap` taken out, the device still reaches the page through its cached translation.
    fn after_unmap_the_device_reaches_the_memory_no_more(bench) {
        let edu = bench.edu()?;
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        let iova = target.iova();
        write(&edu, 1, iova, 64)?;
        let pages = target.unmap()?;
        let since = bench.watch();
        edu.edu().dma_from_device(iova, 64, Completion::Interrupt, soon())?;
        write_nothing_changed(&pages, 1)?;
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, iova)?;
        edu.stop()?;
        Ok(())
    }
}

fn write_nothing_changed(pages: &Pages, seed: u32) -> Result<(), Outcome> {
    let bytes = core::hint::black_box(pages.as_slice());
    expect!(bytes[..64] == pattern(seed, 64));
    expect!(bytes[64..].iter().all(|byte| *byte == 0));
    Ok(())
}

ktest! {
    fn memory_at_its_physical_address_is_not_reached(bench) {
        let edu = bench.edu()?;
        let pages = edu.master().device().pages(PAGE_SIZE)?;
        let phys = Iova::new(pages.phys_runs()[0].start().get());
        let since = bench.watch();
        write(&edu, 3, phys, 64)?;
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, phys)?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_read_of_what_was_not_lent_is_stopped(bench) {
        let edu = bench.edu()?;
        let since = bench.watch();
        edu.edu().dma_to_device(Iova::new(0x7654_3000), 16, Completion::Interrupt, soon())?;
        stopped(bench, &edu, since, Access::Read, FaultReason::NotMapped, Iova::new(0x7654_3000))?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_transfer_across_the_end_of_a_loan_reaches_the_loan_only(bench) {
        let edu = bench.edu()?;
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        let end = Iova::new(target.iova().get() + PAGE_SIZE);
        let since = bench.watch();
        write(&edu, 5, Iova::new(end.get() - 32), 64)?;
        let pages = target.unmap()?;
        expect!(pages.as_slice()[PAGE_SIZE as usize - 32..] == pattern(5, 64)[..32]);
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, end)?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn what_was_lent_to_be_read_cannot_be_written(bench) {
        let edu = bench.edu()?;
        let pages = edu.master().device().pages(PAGE_SIZE)?;
        let target: Mapped<ToDevice, Pages> = edu.master().device().map(pages).map_err(|rejected| rejected.error)?;
        let iova = target.iova();
        let since = bench.watch();
        write(&edu, 9, iova, 64)?;
        let pages = target.unmap()?;
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
        stopped(bench, &edu, since, Access::Write, FaultReason::Permission, iova)?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// The disk's loan means nothing to edu, although it is mapped, at that very address, for the disk.
    fn a_loan_to_another_device_is_out_of_reach(bench) {
        let (edu, disk) = (bench.edu()?, bench.disk_master()?);
        let mut pages = disk.device().pages(PAGE_SIZE)?;
        pages.as_mut_slice()[..64].copy_from_slice(&pattern(2, 64));
        let loan: Mapped<Bidirectional, Pages> = disk.device().map(pages).map_err(|rejected| rejected.error)?;
        let far = Iova::new(loan.iova().get());
        // An address that edu has nothing at.
        expect!(edu.master().group().and_then(|group| group.domain()).is_some_and(|domain| domain.space().translate(far).is_none()));
        let since = bench.watch();
        edu.edu().dma_from_device(far, 64, Completion::Interrupt, soon())?;
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, far)?;
        write_nothing_changed(&loan.unmap()?, 2)?;
        disk.arrest()?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// An aborting STE makes no event: only the memory tells.
    fn a_blocked_device_reaches_nothing_of_what_it_was_lent(bench) {
        let edu = bench.edu()?;
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        write(&edu, 4, target.iova(), 64)?;
        let group = edu.master().group().cloned().ok_or(board::Error::Missing("group"))?;
        group.block()?;
        // Without an address space its interrupt is stopped too: polled.
        edu.edu().dma_from_device(Iova::new(target.iova().get() + 64), 64, Completion::Polling, soon())?;
        write_nothing_changed(&target.unmap()?, 4)?;
        expect!(matches!(edu.master().device().map::<FromDevice, _>(edu.master().device().pages(PAGE_SIZE)?), Err(rejected) if matches!(rejected.error, Error::NotAttached { .. })));
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn an_owned_domain_replaces_the_default_one_and_gives_it_back_as_it_was(bench) {
        let edu = bench.edu()?;
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        let iova = target.iova();
        let group = edu.master().group().cloned().ok_or(board::Error::Missing("group"))?;
        let space = group.iommu().create()?;
        let window = space.aperture().range;
        group.attach_owned(Arc::new(Domain::new(DomainKind::Owned, space, window)?))?;
        let refused = edu.master().device().map::<FromDevice, _>(edu.master().device().pages(PAGE_SIZE)?);
        expect!(matches!(refused, Err(rejected) if matches!(rejected.error, Error::OwnedDomain(_))));
        let since = bench.watch();
        edu.edu().dma_from_device(iova, 64, Completion::Polling, soon())?;
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, iova)?;
        group.detach_owned()?;
        write(&edu, 6, iova, 64)?;
        expect!(target.unmap()?.as_slice()[..64] == pattern(6, 64));
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_megabyte_of_scattered_pages_is_one_range_and_is_revoked_by_one_command_and_one_sync(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        // Every second page, so that no two are neighbours.
        let mut spacers = alloc::vec::Vec::new();
        for _ in 0..256 {
            spacers.push(device.pages(PAGE_SIZE)?);
        }
        let buffer = device.page_set(1 << 20, Ladder::SINGLE_PAGES)?;
        let smmu = &bench.hardware.smmus()[0];
        let before = smmu.statistics();
        let mapped = device.map::<FromDevice, _>(buffer).map_err(|rejected| rejected.error)?;
        expect_eq!(mapped.segments().len(), 1);
        expect_eq!(mapped.segments()[0].len, 1 << 20);
        let after_map = smmu.statistics().since(&before);
        expect_eq!(after_map.commands, 0, "a map needs no invalidation");
        mapped.unmap()?;
        let after = smmu.statistics().since(&before);
        expect!(after.syncs <= 1 && after.commands <= 2, "{after:?}");
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// The host counts the commands of this test in QEMU's trace.
    fn sixty_four_scattered_megabytes_are_streamed(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let mut buffer = device.page_set(1 << 20, Ladder::SINGLE_PAGES)?;
        for _ in 0..64 {
            buffer = device.map::<FromDevice, _>(buffer).map_err(|rejected| rejected.error)?.unmap()?;
        }
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// One stopped transfer of 4092 bytes makes a thousand records here.
    fn a_flood_of_events_keeps_the_first_and_does_not_stall(bench) {
        let edu = bench.edu()?;
        let before = bench.hardware.faults().total();
        let since = bench.watch();
        for round in 0..4 {
            let target = Iova::new(0x5555_0000 + round * PAGE_SIZE);
            edu.edu().dma_from_device(target, 4092, Completion::Interrupt, soon())?;
        }
        stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, Iova::new(0x5555_0000))?;
        expect!(bench.hardware.faults().total() > before);
        let smmu = &bench.hardware.smmus()[0];
        expect!(smmu.statistics().events >= 4000, "{:?}", smmu.statistics());
        // And it works on.
        let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
        write(&edu, 8, target.iova(), 64)?;
        expect!(target.unmap()?.as_slice()[..64] == pattern(8, 64));
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_fault_report_names_the_buffer_that_was_there(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let target = lent(&edu, device.pages(PAGE_SIZE)?)?;
        let iova = target.iova();
        target.unmap()?;
        let text = alloc::format!("{}", device.explain(iova));
        expect!(text.contains("fence.rs"), "{text}");
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_device_that_reports_says_that_it_was_stopped(bench) {
        let Ok((host, function)) = bench.function(0x1b36, 0x0005, 0) else {
            return Err(Outcome::skipped(format_args!("this QEMU has no iommu-testdev")));
        };
        let master = bench.hardware.attach(host, &function, "iommu-testdev", dma::Limits::NONE, false)?;
        master.release()?;
        let device = testdev::iommu_testdev::IommuTestdev::new(function)?;
        let pages = master.device().pages(PAGE_SIZE)?;
        let phys = pages.phys_runs()[0].start();
        let target = master.device().map::<FromDevice, _>(pages).map_err(|rejected| rejected.error)?;
        let iova = target.iova();
        device.write(iova, 4, phys)?;
        let pages = target.unmap()?;
        expect_eq!(pages.as_slice()[..4], 0x1234_5678_u32.to_le_bytes()[..]);
        let since = bench.watch();
        expect_eq!(device.write(iova, 4, phys), Err(testdev::TestdevError::Blocked));
        expect!(bench.fault(master.streams(), since).is_some());
        master.arrest()?;
        Ok(())
    }
    machine: testdev
}

ktest! {
    /// The SMMU stops at the command until the driver has put a CMD_SYNC in its place.
    fn a_command_that_the_smmu_refuses_is_reported_and_the_queue_goes_on(bench) {
        let smmu = &bench.hardware.smmus()[0];
        let edu = bench.edu()?;
        for round in 1..=3 {
            let before = smmu.statistics();
            let result = smmu.provoke_illegal_command();
            let refused = smmu.statistics().since(&before).refused_commands;
            if smmu.features().stage2 || (result.is_ok() && refused == 0) {
                return Err(Outcome::skipped(format_args!("this QEMU has no SMMU that refuses a command")));
            }
            expect_eq!((result, refused), (Err(smmuv3::Error::CommandRefused), 1));
            expect!(!smmu.is_dead());
            // Revocations work as before, and nothing is left that should be gone.
            let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
            let iova = target.iova();
            write(&edu, round, iova, 64)?;
            let pages = target.unmap()?;
            let since = bench.watch();
            edu.edu().dma_from_device(iova, 64, Completion::Interrupt, soon())?;
            write_nothing_changed(&pages, round)?;
            stopped(bench, &edu, since, Access::Write, FaultReason::NotMapped, iova)?;
        }
        expect_eq!(dma::quarantine::report().pages, 0);
        edu.stop()?;
        Ok(())
    }
    machine: stage1
}
