//! What has lapsed is given back once.
use dma::{FromDevice, Lapsing, Pages};

fn driver(lapsing: Lapsing<FromDevice, Pages>) {
    let _twice = lapsing.clone();
}

fn main() {}
