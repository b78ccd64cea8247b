//! Misuse 14: what belongs to the kernel's image cannot be lent.
use dma::{Device, FromDevice, ToDevice};

static TABLE: [u8; 4096] = [0; 4096];

fn driver(device: &Device) {
    let _ = device.map::<ToDevice, _>(&TABLE);
    let _ = device.map::<FromDevice, _>(driver as fn(&Device));
}

fn main() {}
