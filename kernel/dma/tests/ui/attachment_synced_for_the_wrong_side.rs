//! Misuse 11, of an attachment: no fetching of what the device only reads, no handing over of what it only writes.
use dma::{Attachment, FromDevice, ToDevice};

fn driver(read: &Attachment<ToDevice>, written: &Attachment<FromDevice>) {
    let _ = read.sync_for_cpu(0, 64);
    let _ = written.sync_for_device(0, 64);
}

fn main() {}
