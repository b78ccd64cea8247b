//! Ranges that are kept for a device's next mapping, against the device: each kind of leaf, again and again.
//!
//! Seen red: a leaf that is not cleared; a leaf that is cleared and not invalidated.

use super::pattern;
use crate::bench::{Bench, soon};
use board::EduStray;
use dma::{Bidirectional, PageRequest, Pages, ToDevice};
use iommu::{Access, FaultReason, Iova, PAGE_SIZE};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

/// Has the device read and write at both ends of what it was lent, then at the same places when it is its no more.
fn round(bench: &Bench, edu: &EduStray, bytes: u64, seed: u32) -> Result<Iova, Outcome> {
    let device = edu.master().device();
    let request = PageRequest { align: bytes.next_power_of_two(), ..PageRequest::anywhere(bytes) };
    let mut pages = Pages::allocate(device.memory(), request)?;
    pages.as_mut_slice()[..64].copy_from_slice(&pattern(seed, 64));
    let since = bench.watch();
    let mapped = device.map::<Bidirectional, _>(pages).map_err(|rejected| rejected.error)?;
    let (first, last) = (mapped.iova(), Iova::new(mapped.iova().get() + bytes - 64));
    edu.edu().dma_to_device(first, 64, Completion::Interrupt, soon())?;
    edu.edu().dma_from_device(last, 64, Completion::Interrupt, soon())?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    let pages = mapped.unmap()?;
    let seen = pages.as_slice().last_chunk::<64>().copied().unwrap_or([0; 64]);
    expect!(seen[..] == pattern(seed, 64)[..]);
    for at in [first, last] {
        let since = bench.watch();
        edu.edu().dma_from_device(at, 64, Completion::Interrupt, soon())?;
        let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
        expect_eq!((noted.fault.access, noted.fault.reason), (Some(Access::Write), FaultReason::NotMapped));
        expect_eq!(noted.fault.iova, Some(at));
        let told = bench.hardware.explain(&noted.fault).unwrap_or_default();
        expect!(told.contains("was unmapped") && told.contains("berths.rs"), "{told}");
    }
    Ok(first)
}

ktest! {
    fn what_is_mapped_at_a_kept_range_is_reached_until_its_end_and_not_after(bench) {
        let edu = bench.edu()?;
        for bytes in [PAGE_SIZE, 64 << 10, 2 << 20, 3 * PAGE_SIZE] {
            let first = round(bench, &edu, bytes, 1)?;
            for seed in 2..5 {
                expect_eq!(round(bench, &edu, bytes, seed)?, first);
            }
        }
        // For reading only, at a range that could be written.
        let device = edu.master().device();
        let mapped = device.map::<ToDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
        let since = bench.watch();
        edu.edu().dma_to_device(mapped.iova(), 64, Completion::Interrupt, soon())?;
        expect!(!bench.has_faulted(edu.master().streams(), since));
        edu.edu().dma_from_device(mapped.iova(), 64, Completion::Interrupt, soon())?;
        let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
        expect_eq!((noted.fault.access, noted.fault.reason), (Some(Access::Write), FaultReason::Permission));
        mapped.unmap()?;
        Ok(edu.stop()?)
    }
}
