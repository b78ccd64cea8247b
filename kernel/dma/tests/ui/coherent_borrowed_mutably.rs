//! No exclusive reference to memory that a device shares.
use core::sync::atomic::AtomicU32;
use dma::Coherent;

fn driver(mut shared: Coherent<AtomicU32>) -> u32 {
    *shared.get_mut()
}

fn main() {}
