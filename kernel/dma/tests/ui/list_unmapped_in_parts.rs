//! A list ends whole: there is no count to get wrong.
use dma::{MappedList, Pages, ToDevice};

fn driver(list: MappedList<ToDevice, Pages>) {
    let _part = list.unmap(3);
}

fn main() {}
