//! Misuse 7: a mapping that may have failed has no address.
use dma::{Device, Pages, ToDevice};
use iommu::Iova;

fn driver(device: &Device, pages: Pages) -> Iova {
    device.map::<ToDevice, _>(pages).iova()
}

fn main() {}
