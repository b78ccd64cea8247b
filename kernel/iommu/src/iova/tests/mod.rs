//! Tests of the allocator of device addresses.

mod cores;
mod day;
mod model;
mod vectors;

use super::*;

const PAGE: u64 = 4096;
const TOP: Iova = Iova::new(u64::MAX);

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

fn pages(start: u64, len: u64) -> IovaRange {
    range(start * PAGE, len * PAGE)
}
