//! Misuse 13: what lies on the stack cannot be lent.
use dma::{Device, ToDevice};

fn driver(device: &Device) {
    let mut command = [0_u8; 64];
    let _ = device.map::<ToDevice, _>(&mut command);
    let _ = device.map::<ToDevice, _>(command);
}

fn main() {}
