//! Misuse 1: only a mapping can be unmapped, and only `map` makes one.
use dma::{Device, Pages};
use iommu::Iova;

fn driver(device: &Device, pages: Pages) {
    let _ = pages.unmap();
    let _ = device.unmap(Iova::new(0x1000));
}

fn main() {}
