//! Misuse 20: there is no reference to memory that a device has.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: &Mapped<FromDevice, Pages>) -> &[u8] {
    mapped.as_slice()
}

fn main() {}
