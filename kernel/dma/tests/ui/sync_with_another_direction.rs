//! Misuse 10: a sync takes the direction from the mapping.
use dma::{Bidirectional, FromDevice, Mapped, Pages};

fn driver(mapped: &Mapped<Bidirectional, Pages>) {
    let _ = mapped.sync_for_cpu::<FromDevice>(0, 64);
}

fn main() {}
