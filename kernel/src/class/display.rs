//! Displays.

use super::Failure;
use crate::picture::{FileSpan, PixelFormat};
use alloc::{boxed::Box, sync::Arc};
use base::Deadline;
use dma::{Attachment, ToDevice};

/// The size of a display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// A picture in memory, to be shown where it is.
#[derive(Clone, Copy)]
pub struct Showing<'a> {
    /// The memory, attached to the display's device.
    pub memory: &'a Arc<Attachment<ToDevice>>,
    /// The pieces of the memory whose bytes, one after the other, are the rows from top to bottom without gaps.
    pub rows: &'a [FileSpan],
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// What a pixel of 4 bytes is made of. (24-bit pixels are refused.)
    pub format: PixelFormat,
}

/// A display that shows pictures out of memory.
pub trait Display: Send + Sync {
    /// Gives the bus master that reads the pictures: what it is to show has to be attached to it.
    fn device(&self) -> &dma::Device;

    /// Asks for the size of the display.
    ///
    /// # Errors
    ///
    /// If there is no display, or the device does not answer.
    fn mode(&self, deadline: Deadline) -> Result<Mode, Failure>;

    /// Shows a picture, and returns when it is on the screen. The memory stays lent until [`OnScreen::take_down`].
    ///
    /// # Errors
    ///
    /// If the rows are not inside the memory or are not as long as they should be, the format is unknown, or the device
    /// refuses or does not answer. What the device may still have of the memory stays lent.
    fn show(&self, picture: Showing<'_>, deadline: Deadline) -> Result<Box<dyn OnScreen>, Failure>;
}

/// A picture that is on the screen. Dropping it leaves it there, and the memory lent.
pub trait OnScreen: Send {
    /// Takes the picture from the screen, and returns when the device has let go of the memory: nothing holds the attachment
    /// any more but the caller.
    ///
    /// # Errors
    ///
    /// If the device refuses or does not answer; the memory stays lent then.
    fn take_down(self: Box<Self>, deadline: Deadline) -> Result<(), Failure>;
}
