//! A reference into shared memory ends before the memory does.
use core::sync::atomic::{AtomicU32, Ordering};
use dma::Coherent;

fn driver(shared: Coherent<[AtomicU32]>) -> u32 {
    let first = &shared[0];
    drop(shared);
    first.load(Ordering::Relaxed)
}

fn main() {}
