//! What the main job needs of a disk, of a screen, and of a device that strays.
//!
//! The kernel names no driver: boards implement these traits for theirs. Calls are generic over the loan, so that there is no
//! indirection between the main job and the queue.

#![forbid(unsafe_code)]

use alloc::sync::Arc;
use base::Deadline;
use core::fmt::Display;
use core::future::Future;
use core::ops::Range;
use dma::{Device, Lent};
use iommu::Iova;

/// A disk.
pub trait Disk {
    /// What can go wrong.
    type Error: Display;
    /// One transfer under way. Dropping it does not end it.
    type Transfer: Future<Output = Result<(), Self::Error>>;

    /// The bus master: loans are to be made to this device.
    fn device(&self) -> &Device;
    /// Bytes of a block: the unit of transfers.
    fn block_size(&self) -> u32;
    /// The number of blocks.
    fn blocks(&self) -> u64;
    /// The most bytes, a multiple of the block size, that one transfer from byte `offset` of `loan` on can have; 0 if the loan
    /// has none there.
    fn largest_transfer<L: Lent>(&self, loan: &L, offset: u64) -> u64;

    /// Starts to read from block `block` on into bytes `range` of `loan`.
    ///
    /// # Errors
    ///
    /// If it was not started. How it went is the result of the future.
    fn read<L: Lent>(&self, block: u64, loan: &Arc<L>, range: Range<u64>) -> Result<Self::Transfer, Self::Error>;

    /// Sleeps until another transfer can be started.
    ///
    /// # Errors
    ///
    /// If `deadline` passes, or the disk has failed.
    fn wait_for_room(&self, deadline: Deadline) -> Result<(), Self::Error>;
}

/// How pixels of four bytes lie in memory, in the order of their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelOrder {
    /// Blue, green, red, nothing.
    Bgrx,
    /// Red, green, blue, nothing.
    Rgbx,
}

/// A picture in lent memory.
#[derive(Debug)]
pub struct Frame<'a, L> {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// What a pixel looks like.
    pub order: PixelOrder,
    /// Memory that was lent to the screen's device.
    pub loan: &'a Arc<L>,
    /// The parts of it that, one after another, are the rows from the top down.
    pub rows: &'a [Range<u64>],
}

/// A screen.
pub trait Screen {
    /// What can go wrong.
    type Error: Display;
    /// A picture that the device has. Dropping it leaves its memory lent: see [`Screen::hide`].
    type Shown;

    /// The bus master: loans are to be made to this device.
    fn device(&self) -> &Device;

    /// Width and height in pixels.
    ///
    /// # Errors
    ///
    /// If the device does not say, or nothing is connected to it.
    fn size(&self, deadline: Deadline) -> Result<(u32, u32), Self::Error>;

    /// Shows a picture. When it returns, the picture is on the screen.
    ///
    /// # Errors
    ///
    /// If it is not shown.
    fn show<L: Lent>(&self, frame: &Frame<'_, L>, deadline: Deadline) -> Result<Self::Shown, Self::Error>;

    /// Takes a picture off the screen. When it returns `Ok`, the device has let go of the memory.
    ///
    /// # Errors
    ///
    /// If the device has not confirmed that it let go; the memory stays lent.
    fn hide(&self, shown: Self::Shown, deadline: Deadline) -> Result<(), Self::Error>;
}

/// A device that can be made to access memory that it was not lent, to prove that it cannot.
pub trait Stray {
    /// What it is in reports, and whose accesses they are.
    fn device(&self) -> &Device;

    /// Makes the device try to access the memory at `target`, at least 4 bytes of it. It is not told how it went, and may not
    /// work any more afterwards: the IOMMU's record and the memory itself are what counts.
    ///
    /// # Errors
    ///
    /// Why it could not even be made to try.
    fn stray(&self, target: Iova, deadline: Deadline) -> Result<(), alloc::string::String>;
}
