//! What was given back cannot be given back again.
use dma::{Mapped, Pages, ToDevice};

fn driver(mapped: Mapped<ToDevice, Pages>) {
    let _pages = mapped.unmap();
    let _again = mapped.unmap();
}

fn main() {}
