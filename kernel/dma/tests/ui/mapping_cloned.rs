//! One loan, one owner.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: &Mapped<FromDevice, Pages>) -> Mapped<FromDevice, Pages> {
    mapped.clone()
}

fn main() {}
