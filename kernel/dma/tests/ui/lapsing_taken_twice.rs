//! What was asked for is given back, or the token is: never both.
use dma::{FromDevice, Lapsing, Pages};

fn driver(lapsing: Lapsing<FromDevice, Pages>) {
    let _pages = lapsing.try_take();
    let _again = lapsing.try_take();
}

fn main() {}
