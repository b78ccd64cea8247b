//! A view of memory lent to a device for reading has nothing to fetch.
use dma::{Mapped, Pages, ToDevice};

fn driver(mapped: &Mapped<ToDevice, Pages>) {
    let _ = mapped.view().read(0, &mut [0]);
}

fn main() {}
