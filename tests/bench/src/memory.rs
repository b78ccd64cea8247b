//! Memory to be lent: adjacent, aligned, or scattered.

use alloc::vec::Vec;
use dma::{Device, PageRequest, Pages, ScatterList};
use iommu::PAGE_SIZE;
use ktest::Outcome;

/// `bytes` of adjacent memory, aligned to its size.
pub fn adjacent(device: &Device, bytes: u64) -> Result<Pages, Outcome> {
    Ok(Pages::allocate(
        device.memory(),
        PageRequest { align: bytes.next_power_of_two(), ..PageRequest::anywhere(bytes) },
    )?)
}

/// How often pages are asked for before [`scattered`] or [`neighbours`] gives up.
const SURPLUS: u64 = 8;

/// More single pages than are needed, in the order of their addresses.
fn single_pages(device: &Device, needed: u64) -> Result<Vec<Pages>, Outcome> {
    let mut all = Vec::new();
    for _ in 0..SURPLUS * needed {
        all.push(Pages::zeroed(device.memory(), PAGE_SIZE)?);
    }
    all.sort_unstable_by_key(start);
    Ok(all)
}

fn start(page: &Pages) -> u64 {
    page.phys_runs().first().map_or(0, |run| run.start().get())
}

fn list(device: &Device, pages: Vec<Pages>) -> Result<ScatterList<Pages>, Outcome> {
    let mut list = device.scatter_list(pages.len())?;
    for page in pages {
        list.push(page)?;
    }
    Ok(list)
}

/// A list of `count` pages of which no two are neighbours in memory.
pub fn scattered(device: &Device, count: u64) -> Result<ScatterList<Pages>, Outcome> {
    let mut chosen: Vec<Pages> = Vec::new();
    for page in single_pages(device, count)? {
        if chosen.last().is_none_or(|last| start(last) + PAGE_SIZE < start(&page)) && (chosen.len() as u64) < count {
            chosen.push(page);
        }
    }
    if chosen.len() as u64 != count {
        return Err(Outcome::failed(format_args!("{} scattered pages where {count} were wanted", chosen.len())));
    }
    list(device, chosen)
}

/// A list of `count` pages, each of which is followed by its neighbour in memory.
pub fn neighbours(device: &Device, count: u64) -> Result<ScatterList<Pages>, Outcome> {
    let mut chosen: Vec<Pages> = Vec::new();
    for page in single_pages(device, count)? {
        if chosen.len() as u64 == count {
            break;
        }
        if chosen.last().is_some_and(|last| start(last) + PAGE_SIZE != start(&page)) {
            chosen.clear();
        }
        chosen.push(page);
    }
    if chosen.len() as u64 != count {
        return Err(Outcome::failed(format_args!("there are no {count} free pages that are neighbours")));
    }
    list(device, chosen)
}
