//! Memory that a device may write at any moment is reached through atomics only.
use dma::Device;

fn driver(device: &Device) {
    let _ = device.coherent::<u32>();
}

fn main() {}
