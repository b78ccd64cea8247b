//! A structure is fit for sharing only if its author promises so, in unsafe code.
use core::sync::atomic::AtomicU16;
use dma::Device;

#[repr(C)]
struct Descriptor {
    len: u16,
    flags: AtomicU16,
}

fn driver(device: &Device) {
    let _ = device.coherent_slice::<Descriptor>(16);
}

fn main() {}
