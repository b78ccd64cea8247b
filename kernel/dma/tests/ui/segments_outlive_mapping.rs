//! Segments are borrowed from the mapping that they name.
use dma::{FromDevice, Mapped, Pages, Segment};

fn driver(mapped: Mapped<FromDevice, Pages>) -> &'static [Segment] {
    mapped.segments()
}

fn main() {}
