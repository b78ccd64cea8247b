//! Misuse 11, of a list: no fetching of what the device only reads, no handing over of what it only writes.
use dma::{FromDevice, MappedList, Pages, ToDevice};

fn driver(read: &MappedList<ToDevice, Pages>, written: &MappedList<FromDevice, Pages>) {
    let _ = read.sync_for_cpu(0, 64);
    let _ = written.sync_for_device(0, 64);
}

fn main() {}
