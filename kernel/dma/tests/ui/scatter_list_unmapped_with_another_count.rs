//! Misuse 5: scattered memory comes back whole.
use dma::{FromDevice, Mapped, PageSet};

fn driver(mapped: Mapped<FromDevice, PageSet>) {
    let count = mapped.segments().len();
    let _ = mapped.unmap(count - 1);
}

fn main() {}
