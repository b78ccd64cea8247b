//! What the main job needs of a disk, of a screen, of who draws, and of a device that strays.
//!
//! The kernel names no driver: boards implement these traits for theirs. Calls are generic over the loan, so that there is no
//! indirection between the main job and the queue.

#![forbid(unsafe_code)]

use alloc::sync::Arc;
use base::Deadline;
use core::fmt::Display;
use core::future::Future;
use core::ops::Range;
use core::time::Duration;
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

/// Work that was begun, and what it cost to begin.
#[derive(Debug)]
pub struct Begun<W> {
    /// The work.
    pub work: W,
    /// How long others stood in the way, if any did.
    pub waited: Option<Duration>,
}

/// A screen.
pub trait Screen {
    /// What can go wrong.
    type Error: Display;
    /// A picture that the device has. Dropping it leaves its memory lent: see [`Screen::hide`].
    type Shown;
    /// A picture that is being read and shown again. Dropping it does not end it.
    type Refresh: Future<Output = Result<(), Self::Error>>;

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

    /// Has the device read a picture again, of which `loan` is the memory, and show what it reads. Begun when this returns: whoever
    /// changes the picture is waited for before, and nobody does until the device has read it, whether it is awaited or not.
    ///
    /// # Errors
    ///
    /// If it was not begun: whoever stood in the way still did at `deadline`. How it went is the result of the work.
    fn refresh<L: Lent>(
        &self,
        shown: &Self::Shown,
        loan: &Arc<L>,
        deadline: Deadline,
    ) -> Result<Begun<Self::Refresh>, Self::Error>;

    /// Takes a picture off the screen. When it returns `Ok`, the device has let go of the memory.
    ///
    /// # Errors
    ///
    /// If the device has not confirmed that it let go; the memory stays lent.
    fn hide(&self, shown: Self::Shown, deadline: Deadline) -> Result<(), Self::Error>;
}

/// What a painter has done, in its own words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Painted {
    /// Frames that it drew.
    pub frames: u64,
    /// Bytes of pixels that it stored.
    pub bytes: u64,
    /// Times that it waited for others who had the picture.
    pub waits: u64,
    /// How long it waited, in all.
    pub waited: Duration,
}

/// Who draws into a picture that is on the screen. Dropping it ends it, wherever it is, and with it every access that it has.
pub trait Painter {
    /// What can go wrong.
    type Error: Display;

    /// Has it draw the next frame. When this returns its access to the picture has begun (and maybe ended): it has waited for whoever
    /// read the last frame, and whoever wants to read the next waits for it without another word.
    ///
    /// # Errors
    ///
    /// If it has not begun at `deadline`, or has come to an end.
    fn draw(&mut self, deadline: Deadline) -> Result<(), Self::Error>;

    /// What is wrong with it at this moment, if anything is: asked when others have waited for it in vain.
    fn trouble(&self) -> Option<Self::Error>;

    /// Waits for it to end by itself, after its last frame.
    ///
    /// # Errors
    ///
    /// If it does not, or not well.
    fn finish(self, deadline: Deadline) -> Result<Painted, Self::Error>;
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
