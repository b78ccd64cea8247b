//! A link that may be mapped by large leaves is not unlinked in parts.
use dma::{FromDevice, Linked, Pages};

fn driver(link: Linked<FromDevice, Pages>) {
    let _carved = link.carve(0, 4096);
}

fn main() {}
