//! Misuse 11, of the other kinds of loans.
use dma::{Attachment, FromDevice, Linked, MappedBytes, MappedList, Pages, ToDevice};

fn driver(list: &MappedList<ToDevice, Pages>, link: &Linked<FromDevice, Pages>) {
    let _ = list.sync_for_cpu(0, 64);
    let _ = link.sync_for_device(0, 64);
}

fn others(shared: &Attachment<ToDevice>, bytes: &MappedBytes<FromDevice>) {
    let _ = shared.sync_for_cpu(0, 64);
    let _ = bytes.sync_for_device(0, 64);
}

fn main() {}
