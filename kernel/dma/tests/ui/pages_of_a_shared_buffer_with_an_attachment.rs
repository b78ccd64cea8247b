//! The pages of a shared buffer come out by value, and only from the last one who has it.
use dma::{Attachment, PageSet, SharedBuffer, ToDevice};

fn driver(picture: SharedBuffer, _showing: &Attachment<ToDevice>) -> PageSet {
    let pages: PageSet = picture.into_pages();
    pages
}

fn main() {}
