//! A scoped mapping does not leave its closure.
use dma::{Device, Scoped, ToDevice};

fn driver(device: &Device, bytes: &mut [u8]) {
    let mut kept: Option<&Scoped<'_, ToDevice>> = None;
    let _ = device.with_mapped::<ToDevice, _>(bytes, |scoped| kept = Some(scoped));
    drop(kept);
}

fn main() {}
