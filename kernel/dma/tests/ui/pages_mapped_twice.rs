//! Misuse 19: memory that is lent cannot be lent again.
use dma::{Device, FromDevice, Pages, ToDevice};

fn driver(device: &Device, pages: Pages) {
    let _first = device.map::<ToDevice, _>(pages);
    let _second = device.map::<FromDevice, _>(pages);
}

fn main() {}
