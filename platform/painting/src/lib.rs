//! The show: what is drawn over a picture, and what the kernel and the process that draws tell each other.
//!
//! Pure: the program that draws, the kernel that has it draw, and the host that knows what must be on the screen use the same source.
//! Frame `N` is a function of the picture and of `N`, because what a frame covers is put back before the next is drawn.
//!
//! # Locking
//!
//! None.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod layout;
mod orders;
mod painter;

pub use layout::Layout;
pub use orders::{Account, Orders, PAGE, Report};
pub use painter::{KEPT, Painter};

/// Bytes of a pixel.
pub const PIXEL: usize = 4;
