//! Misuses that no compiler sees, because it is the device that is wrong: provoked by real DMA, stopped, and reported by name.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::format;
use alloc::string::String;
use base::Instant;
use board::EduStray;
use dma::{FromDevice, Mapped, Pages, ToDevice};
use iommu::{Access, FaultReason, Iova, PAGE_SIZE};
use kernel::faults::Noted;
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::{Completion, Direction};

/// Bytes that the device writes where it must not.
const LEN: u32 = 64;

/// A line of this file, as reports show it.
fn site(line: u32) -> String {
    format!("misuse.rs:{line}")
}

/// Fills the device's buffer with a pattern, so that what it writes would show.
fn load(edu: &EduStray) -> Result<(), Outcome> {
    let mut pages = edu.master().device().pages(PAGE_SIZE)?;
    pages.as_mut_slice()[..LEN as usize].copy_from_slice(&pattern(31, LEN as usize));
    let source: Mapped<ToDevice, Pages> = edu.master().device().map(pages).map_err(|rejected| rejected.error)?;
    edu.edu().dma_to_device(source.iova(), LEN, Completion::Interrupt, soon())?;
    source.unmap()?;
    Ok(())
}

/// Has the device write to `iova`, and calls `meanwhile` once when it has begun.
fn provoke(edu: &EduStray, iova: Iova, meanwhile: impl FnOnce() -> Result<(), Outcome>) -> Result<(), Outcome> {
    let mut meanwhile = Some(meanwhile);
    edu.edu().transfer_while(Direction::FromDevice, iova, LEN, soon(), || match meanwhile.take() {
        Some(call) => call(),
        None => Ok(()),
    })
}

/// The fault of a write that was stopped because nothing is mapped at `iova`.
fn stopped(bench: &Bench, edu: &EduStray, since: Instant, iova: Iova) -> Result<Noted, Outcome> {
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    let fault = noted.fault;
    expect_eq!((fault.access, fault.reason, fault.iova), (Some(Access::Write), FaultReason::NotMapped, Some(iova)));
    Ok(noted)
}

ktest! {
    /// Misuse 21. The device has been told the address and is at work; the driver takes the memory back without asking.
    fn a_device_that_still_runs_at_unmap_is_stopped_and_the_loan_named(bench) {
        let edu = bench.edu()?;
        load(&edu)?;
        let device = edu.master().device();
        let lent_at = line!() + 1;
        let target = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
        let iova = target.iova();
        // The device has the translation cached, or may have.
        edu.edu().dma_from_device(iova, LEN, Completion::Interrupt, soon())?;
        target.view().read_array::<4>(0)?;
        let since = bench.watch();
        let (mut pages, mut unmapped_at) = (None, 0);
        provoke(&edu, iova, || {
            unmapped_at = line!() + 1;
            let mut back = target.unmap()?;
            back.as_mut_slice().fill(0);
            pages = Some(back);
            Ok(())
        })?;
        let pages = pages.ok_or(board::Error::Missing("pages of the loan"))?;
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0), "the memory was written");
        let noted = stopped(bench, &edu, since, iova)?;
        let text = bench.hardware.explain(&noted.fault).unwrap_or_default();
        expect!(text.contains("was unmapped") && text.contains("by edu"), "{text}");
        expect!(text.contains(&site(unmapped_at)) && text.contains(&site(lent_at)), "{text}");
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// Misuse 22. The memory behind the address belongs to somebody else by now, and the address to nobody.
    fn a_stale_address_is_stopped_and_its_history_named(bench) {
        let edu = bench.edu()?;
        load(&edu)?;
        let device = edu.master().device();
        let target = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
        let kept = target.iova();
        edu.edu().dma_from_device(kept, LEN, Completion::Interrupt, soon())?;
        let unmapped_at = line!() + 1;
        let mut pages = target.unmap()?;
        pages.as_mut_slice().fill(0);
        let since = bench.watch();
        provoke(&edu, kept, || Ok(()))?;
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0), "the memory was written");
        let noted = stopped(bench, &edu, since, kept)?;
        let text = bench.hardware.explain(&noted.fault).unwrap_or_default();
        expect!(text.contains(" us ago by edu") && text.contains(&site(unmapped_at)), "{text}");
        edu.stop()?;
        Ok(())
    }
}
