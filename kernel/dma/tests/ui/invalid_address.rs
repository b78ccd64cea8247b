//! Misuse 15: an address is not memory.
use dma::{Device, ToDevice};
use iommu::PhysAddr;

fn driver(device: &Device) {
    let _ = device.map::<ToDevice, _>(PhysAddr::new(0xdead_0000));
    let _ = device.map::<ToDevice, _>(0xdead_0000 as *mut u8);
}

fn main() {}
