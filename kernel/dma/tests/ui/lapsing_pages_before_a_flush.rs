//! What has lapsed is not memory yet: only a flush makes it so.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: Mapped<FromDevice, Pages>) {
    let lapsing = mapped.unmap_lazy();
    let _bytes = lapsing.as_slice();
}

fn main() {}
