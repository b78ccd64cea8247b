//! Misuse 11, of bytes: no fetching of what the device only reads, no handing over of what it only writes.
use dma::{FromDevice, MappedBytes, ToDevice};

fn driver(read: &MappedBytes<ToDevice>, written: &MappedBytes<FromDevice>) {
    let _ = read.sync_for_cpu(0, 64);
    let _ = written.sync_for_device(0, 64);
}

fn main() {}
