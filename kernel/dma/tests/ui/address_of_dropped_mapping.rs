//! A mapping that was dropped has no addresses.
use dma::{Mapped, Pages, ToDevice};

fn driver(mapped: Mapped<ToDevice, Pages>) {
    drop(mapped);
    let _segments = mapped.segments();
}

fn main() {}
