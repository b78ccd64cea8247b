//! Memory that a device has is nobody else's.
use dma::{Device, Pages, ToDevice};

fn driver(device: &Device, pages: Pages) {
    let _mapped = device.map::<ToDevice, _>(pages);
    let _bytes = pages.as_slice();
}

fn main() {}
