//! Misuse 3: each kind of mapping has its own end, and no other.
use core::sync::atomic::AtomicU32;
use dma::{Attachment, Coherent, Mapped, Pages, ToDevice};

fn driver(mapped: Mapped<ToDevice, Pages>, ring: Coherent<AtomicU32>, shared: Attachment<ToDevice>) {
    let _ = mapped.release();
    let _ = ring.detach();
    let _ = shared.unmap();
}

fn main() {}
