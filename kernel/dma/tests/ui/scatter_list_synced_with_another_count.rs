//! Misuse 12: a sync names bytes of the mapping, not segments of a list.
use dma::{FromDevice, Mapped, PageSet};

fn driver(mapped: &Mapped<FromDevice, PageSet>) {
    let _ = mapped.sync_for_cpu(mapped.segments(), 3);
}

fn main() {}
