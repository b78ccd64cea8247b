//! A view of memory lent to a device for writing takes nothing from the CPU.
use dma::{FromDevice, Mapped, Pages};

fn driver(mapped: &Mapped<FromDevice, Pages>) {
    let _ = mapped.view().write(0, &[0]);
}

fn main() {}
