//! Memory to be lent: adjacent, aligned, or scattered.

use alloc::vec::Vec;
use dma::{Device, Ladder, PageRequest, PageSet, Pages};
use iommu::PAGE_SIZE;
use ktest::Outcome;

/// `bytes` of adjacent memory, aligned to its size.
pub fn adjacent(device: &Device, bytes: u64) -> Result<Pages, Outcome> {
    Ok(Pages::allocate(
        device.memory(),
        PageRequest { align: bytes.next_power_of_two(), ..PageRequest::anywhere(bytes) },
    )?)
}

/// `pages` pages of which no two that follow each other are neighbours in memory.
pub fn scattered(device: &Device, pages: u64) -> Result<PageSet, Outcome> {
    // Every second page of a large piece is given back, last: the next single pages that are asked for are those.
    let mut all = Vec::new();
    for _ in 0..4 * pages {
        all.push(Pages::zeroed(device.memory(), PAGE_SIZE)?);
    }
    all.sort_unstable_by_key(|page| page.phys_runs().first().map(|run| run.start()));
    let mut kept = Vec::new();
    for (index, page) in all.into_iter().enumerate() {
        if index % 2 == 0 {
            kept.push(page);
        }
    }
    let set = PageSet::zeroed(device.memory(), pages * PAGE_SIZE, Ladder::SINGLE_PAGES)?;
    if set.runs().len() as u64 != pages {
        return Err(Outcome::failed(format_args!("{} runs where {pages} were wanted", set.runs().len())));
    }
    Ok(set)
}
