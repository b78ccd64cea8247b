//! A view ends before the mapping does.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: Mapped<FromDevice, Pages>) {
    let view = mapped.view();
    let _pages = mapped.unmap();
    let _ = view.read(0, &mut [0]);
}

fn main() {}
