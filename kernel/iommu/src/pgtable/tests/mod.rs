//! Tests of the tables, against memory whose walker sees only what was published.

mod anchors;
mod exclusive;
mod fake;
mod model;
mod rules;
mod vectors;

use super::{Geometry, Granule, PageTable, Stage};
use crate::{Iova, IovaRange, PhysAddr, PhysRange};

fn iova(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

fn phys(start: u64, len: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(start), len).unwrap()
}

fn stage1(granule: Granule, ias: u8, oas: u8) -> Geometry {
    Geometry::new(granule, Stage::One, ias, oas).unwrap()
}
