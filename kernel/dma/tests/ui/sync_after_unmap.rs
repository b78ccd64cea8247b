//! A mapping that has ended cannot be synchronized.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: Mapped<FromDevice, Pages>) {
    let _pages = mapped.unmap();
    let _ = mapped.sync_for_cpu(0, 64);
}

fn main() {}
