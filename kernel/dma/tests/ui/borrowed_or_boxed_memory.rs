//! Only owned pages can be lent, not what a borrow or a box refers to.
use dma::{Device, ToDevice};

fn driver(device: &Device, borrowed: &'static mut [u8], boxed: Box<[u8]>) {
    let _ = device.map::<ToDevice, _>(borrowed);
    let _ = device.map::<ToDevice, _>(boxed);
}

fn main() {}
