//! What was put into a gather is over for its driver, though the device still has it.
use dma::{FromDevice, Gather, Mapped, Pages};

fn driver(mapped: Mapped<FromDevice, Pages>) {
    let mut gather = Gather::<Mapped<FromDevice, Pages>, 4>::new();
    let _full = gather.push(mapped);
    let _iova = mapped.iova();
}

fn main() {}
