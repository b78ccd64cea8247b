//! The CPU does not write what the device writes: lists have directions as mappings have.
use dma::{FromDevice, MappedList, Pages};

fn driver(list: MappedList<FromDevice, Pages>) {
    let _written = list.view().write(0, b"no");
}

fn main() {}
