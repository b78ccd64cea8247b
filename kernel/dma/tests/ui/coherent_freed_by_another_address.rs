//! Misuse 4: coherent memory is freed as the object that it is, not by an address.
use core::sync::atomic::AtomicU32;
use dma::{Coherent, Device};

fn driver(device: &Device, ring: &Coherent<[AtomicU32]>) {
    let second = &ring[1];
    let _ = second.release();
    let _ = device.free_coherent(second);
}

fn main() {}
