//! A list that a device has neither grows nor shows its buffers.
use dma::{MappedList, Pages, ToDevice};

fn driver(mut list: MappedList<ToDevice, Pages>, more: Pages) {
    let _pushed = list.push(more);
    let _buffers = list.buffers();
}

fn main() {}
