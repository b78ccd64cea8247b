//! What has lapsed has no address that a driver could name to its device.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: Mapped<FromDevice, Pages>) {
    let lapsing = mapped.unmap_lazy();
    let _segments = dma::slice(&lapsing, 0, 512);
}

fn main() {}
