//! Misuse 2: a mapping knows its size; there is no other to say.
use dma::{Mapped, Pages, ToDevice};

fn driver(mapped: Mapped<ToDevice, Pages>) {
    let _ = mapped.unmap(4096);
}

fn main() {}
