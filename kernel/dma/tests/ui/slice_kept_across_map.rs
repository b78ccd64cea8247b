//! No reference into memory survives its lending.
use dma::{Device, FromDevice, Pages};

fn driver(device: &Device, pages: Pages) -> u8 {
    let bytes = pages.as_slice();
    let _mapped = device.map::<FromDevice, _>(pages);
    bytes[0]
}

fn main() {}
