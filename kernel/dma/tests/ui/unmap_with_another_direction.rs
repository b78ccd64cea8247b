//! Misuse 6: the direction is part of the mapping's type.
use dma::{FromDevice, Mapped, Pages, ToDevice};

fn driver(mapped: Mapped<ToDevice, Pages>) {
    let _ = Mapped::<FromDevice, Pages>::unmap(mapped);
}

fn main() {}
