//! Mappings that end lazily: what a device still reaches is nobody else's, and after the flush it is stopped.

use super::pattern;
use crate::bench::{Bench, soon};
use base::time::Duration;
use board::EduStray;
use dma::{Device, FromDevice, Gather, Ladder, Mapped, PageSet, Pages, ToDevice, lazy};
use iommu::{Access, FaultReason, Iova};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

const LEN: u32 = 64;

/// Gives edu `bytes` to write.
fn load(edu: &EduStray, bytes: &[u8]) -> Result<(), Outcome> {
    let device = edu.master().device();
    let mut pages = device.pages(4096)?;
    pages.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
    let from = device.map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?;
    edu.edu().dma_to_device(from.iova(), LEN, Completion::Interrupt, soon())?;
    from.unmap()?;
    Ok(())
}

/// A mapping that lapses when it ends: the one before it has left its range.
fn mapped(device: &Device) -> Result<Mapped<FromDevice, Pages>, Outcome> {
    device.map::<FromDevice, _>(device.pages(4096)?).map_err(|rejected| rejected.error)?.unmap()?;
    Ok(device.map::<FromDevice, _>(device.pages(4096)?).map_err(|rejected| rejected.error)?)
}

fn strays(bench: &Bench, edu: &EduStray, at: Iova) -> Result<(), Outcome> {
    let since = bench.watch();
    edu.edu().dma_from_device(at, LEN, Completion::Interrupt, soon())?;
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    expect_eq!(noted.fault.access, Some(Access::Write));
    expect_eq!(noted.fault.reason, FaultReason::NotMapped);
    expect_eq!(noted.fault.iova, Some(at));
    Ok(())
}

fn stale_access(bench: &Bench, edu: &EduStray) -> Result<(), Outcome> {
    let device = edu.master().device();
    let bytes = pattern(31, LEN as usize);
    load(edu, &bytes)?;
    let mapped = mapped(device)?;
    let at = mapped.iova();
    let lapsing = mapped.unmap_lazy();
    expect!(!lapsing.is_over());
    // Others map and allocate meanwhile: neither the address nor the memory is theirs.
    let mut others = alloc::vec::Vec::new();
    for _ in 0..32 {
        let other = device.map::<FromDevice, _>(device.pages(4096)?).map_err(|rejected| rejected.error)?;
        expect!(other.iova() != at);
        others.push(other);
    }
    let since = bench.watch();
    edu.edu().dma_from_device(at, LEN, Completion::Interrupt, soon())?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    expect!(!lapsing.is_over());
    for other in others {
        expect!(other.unmap()?.as_slice().iter().all(|byte| *byte == 0));
    }
    device.flush(soon()).map_err(|_| board::Error::Missing("flush in time"))?;
    let pages = lapsing.try_take().map_err(|_| board::Error::Missing("pages after the flush"))?;
    // It reached what it had been lent, and nothing else.
    expect!(pages.as_slice()[..LEN as usize] == bytes[..]);
    strays(bench, edu, at)
}

ktest! {
    fn a_device_reaches_what_has_lapsed_until_the_flush_and_that_is_nobody_elses(bench) {
        let edu = bench.edu()?;
        // edu's transfers take longer than the period.
        lazy::set_period(Duration::from_secs(1000));
        let result = stale_access(bench, &edu);
        lazy::set_period(lazy::PERIOD);
        result?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn what_has_lapsed_is_flushed_by_the_clock(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let mapped = mapped(device)?;
        let at = mapped.iova();
        let since = base::Instant::now();
        let lapsing = mapped.unmap_lazy();
        // Unless this core was away for as long as that.
        expect!(!lapsing.is_over() || since.elapsed() >= lazy::PERIOD);
        let over = base::wait_until(soon(), || lapsing.is_over());
        expect!(over.is_ok());
        expect!(lapsing.try_take().is_ok());
        strays(bench, &edu, at)?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn many_mappings_end_with_one_completion_and_none_is_reached_afterwards(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let mut gather = Gather::<Mapped<FromDevice, Pages>, 16>::new();
        let mut at = Iova::new(0);
        for _ in 0..16 {
            let mapped = device.map::<FromDevice, _>(device.pages(4096)?).map_err(|rejected| rejected.error)?;
            at = mapped.iova();
            expect!(gather.push(mapped).is_ok());
        }
        for pages in gather.finish() {
            expect_eq!(pages?.len(), 4096);
        }
        strays(bench, &edu, at)?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn dropped_tokens_leave_their_memory_to_the_flush_under_load(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        for round in 0..1000_u64 {
            let set = PageSet::zeroed(device.memory(), 4096 * (1 + round % 4), Ladder::SINGLE_PAGES)?;
            drop(device.map::<FromDevice, _>(set).map_err(|rejected| rejected.error)?.unmap_lazy());
        }
        device.flush(soon()).map_err(|_| board::Error::Missing("flush in time"))?;
        expect_eq!(device.stats().live_mappings, 0);
        expect_eq!(device.stats().quarantined_pages, 0);
        edu.stop()?;
        Ok(())
    }
}
