//! Misuse 8: only a mapping can be synchronized.
use dma::Pages;

fn driver(pages: &Pages) {
    let _ = pages.sync_for_cpu(0, 64);
}

fn main() {}
