//! From the disk into scattered pages, and from the same pages onto the screen.

use super::{Failure, STEP_MILLIS, Source};
use crate::class::{Disk, Frame, PixelOrder, Screen};
use crate::disk::Extent;
use crate::picture::{Layout, Picture, PixelFormat};
use alloc::collections::VecDeque;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, block_on};
use core::fmt::Display;
use core::future::Future;
use core::ops::Range;
use dma::{Attachment, CpuReads, FromDevice, Ladder, Lent, Remapped, SharedBuffer, TileView, Tiles, ToDevice};
use iommu::PAGE_SIZE;

/// Transfers that the disk is asked for at a time.
const IN_FLIGHT: usize = 64;

/// What was moved, and by whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that the disk wrote to memory.
    pub from_disk: u64,
    /// Bytes that the screen's device read from memory.
    pub to_screen: u64,
    /// Bytes of pixels that the CPU wrote.
    pub copied: u64,
    /// Physical runs that the buffer is made of.
    pub runs: usize,
    /// Addresses that the devices were told for it.
    pub segments: usize,
    /// Transfers that the disk was asked for.
    pub transfers: usize,
    /// Pieces that the screen was told, where the picture lies in tiles.
    pub pieces: usize,
    /// Width and height of what the screen shows, in pixels.
    pub size: (u32, u32),
}

/// Who wants to know that the picture is on the screen.
pub trait Screenshot {
    /// The picture is there now, `width` by `height` pixels; returns when it may go.
    fn ready(&self, width: u32, height: u32);
}

/// Brings the picture to the screen, lets `screenshot` look at it, and takes everything back. With a `view`, a 32-bit picture lies
/// in tiles meanwhile: the disk writes it into them, and the screen reads it out of them in that view.
///
/// # Errors
///
/// What went wrong. Whatever was lent has been taken back, or stays lent for ever (and is counted) where a device did not let
/// go.
pub fn show<D: Disk, S: Screen>(
    disk: &D,
    screen: &S,
    source: &Source,
    view: Option<TileView>,
    screenshot: &impl Screenshot,
) -> Result<Outcome, Failure> {
    if let (Some(view), Picture::Direct(layout)) = (view, source.picture) {
        return tiled(disk, screen, source, &layout, view, screenshot);
    }
    let block = u64::from(disk.block_size());
    let bytes = source.located.file.size.next_multiple_of(block);
    // Single pages: as scattered as memory gets, and one contiguous range for the devices all the same.
    let pages = disk.device().page_set(bytes, Ladder::SINGLE_PAGES).map_err(Failure::dma)?;
    let runs = pages.runs().len();
    let file = SharedBuffer::try_new("picture", pages).map_err(|rejected| Failure::dma(rejected.error))?;
    let size = (source.picture.width(), source.picture.height());
    let mut outcome = Outcome { runs, from_disk: bytes, size, ..Outcome::default() };

    let filled = Arc::new(file.attach::<FromDevice>(disk.device()).map_err(Failure::dma)?);
    outcome.segments = filled.segments().len();
    match source.picture {
        Picture::Direct(layout) => {
            // Disk and screen have the same pages at the same time, one to write and one to read. The screen waits for the disk by
            // itself.
            let shown = Arc::new(file.attach::<ToDevice>(screen.device()).map_err(Failure::dma)?);
            let reading = read(disk, &source.located.file.extents, &filled, bytes)?;
            outcome.transfers = reading.count;
            let presented = present(screen, &layout, &shown, screenshot);
            // If the disk has failed, then so has the screen.
            finish(reading)?;
            outcome.to_screen = presented?;
            detach(filled)?;
            detach(shown)?;
        }
        Picture::Bmp24(_) | Picture::Png { .. } => {
            let reading = read(disk, &source.located.file.extents, &filled, bytes)?;
            outcome.transfers = reading.count;
            finish(reading)?;
            detach(filled)?;
            let (pixels, layout, copied) = decode(screen, source, &file)?;
            outcome.copied = copied;
            let shown = Arc::new(pixels.attach::<ToDevice>(screen.device()).map_err(Failure::dma)?);
            outcome.to_screen = present(screen, &layout, &shown, screenshot)?;
            detach(shown)?;
        }
    }
    Ok(outcome)
}

/// As [`show`], of a picture that lies in tiles of a page each between disk and screen. Neither the CPU nor a copy turns it: the
/// disk is told where the rows of the file lie in the tiles, the screen where those of the view do.
fn tiled<D: Disk, S: Screen>(
    disk: &D,
    screen: &S,
    source: &Source,
    layout: &Layout,
    view: TileView,
    screenshot: &impl Screenshot,
) -> Result<Outcome, Failure> {
    let block = u64::from(disk.block_size());
    let bytes = source.located.file.size.next_multiple_of(block);
    let unfit = || Failure::dma("a picture in tiles has sides of whole tiles, and rows without gaps");
    // What stands before the pixels in the file has pages of its own, and what follows them too.
    let head = layout.offset;
    let first = head.next_multiple_of(PAGE_SIZE);
    let tiles = Tiles::new(first, layout.width, layout.height).filter(|_| layout.stride == layout.row_bytes());
    let tiles = tiles.ok_or_else(unfit)?;
    let behind = first + tiles.bytes();
    let tail = bytes.checked_sub(head + tiles.bytes()).ok_or_else(unfit)?;
    let pages = disk.device().page_set(behind + tail, Ladder::SINGLE_PAGES).map_err(Failure::dma)?;
    let mut outcome = Outcome { runs: pages.runs().len(), from_disk: bytes, ..Outcome::default() };
    let picture = SharedBuffer::try_new("picture in tiles", pages).map_err(|rejected| Failure::dma(rejected.error))?;

    let stored = if layout.top_down { TileView::Upright } else { TileView::UpsideDown };
    let file = core::iter::once(0..head).chain(tiles.linear(stored)).chain(core::iter::once(behind..behind + tail));
    let filled: Remapped<FromDevice> = picture.attach_pieces(disk.device(), file).map_err(Failure::dma)?;
    let filled = Arc::new(filled);
    let shown: Remapped<ToDevice> = picture.attach_pieces(screen.device(), tiles.linear(view)).map_err(Failure::dma)?;
    let shown = Arc::new(shown);
    (outcome.segments, outcome.pieces) = (filled.segments().len(), shown.segments().len());

    let (width, height) = tiles.size(view);
    outcome.size = (width, height);
    let seen = Layout { width, height, offset: 0, stride: width * 4, top_down: true, format: layout.format };
    let reading = read(disk, &source.located.file.extents, &filled, bytes)?;
    outcome.transfers = reading.count;
    let presented = present(screen, &seen, &shown, screenshot);
    finish(reading)?;
    outcome.to_screen = presented?;
    for ended in [Arc::try_unwrap(filled).map(Remapped::detach).ok(), Arc::try_unwrap(shown).map(Remapped::detach).ok()]
    {
        ended.ok_or_else(|| Failure::dma("a device still has the picture"))?.map_err(Failure::dma)?;
    }
    Ok(outcome)
}

/// Transfers of which some are under way.
pub(super) struct Reading<T> {
    transfers: VecDeque<T>,
    pub(super) count: usize,
}

/// Has the disk write the file's extents into the buffer, many transfers in flight at once.
pub(super) fn read<D: Disk, L: Lent>(
    disk: &D,
    extents: &[Extent],
    buffer: &Arc<L>,
    bytes: u64,
) -> Result<Reading<D::Transfer>, Failure> {
    let block = u64::from(disk.block_size());
    let deadline = Deadline::after_millis(STEP_MILLIS);
    let mut reading: Reading<D::Transfer> = Reading { transfers: VecDeque::new(), count: 0 };
    reading.transfers.try_reserve_exact(IN_FLIGHT).map_err(|_| Failure::OutOfMemory("the list of transfers"))?;
    let mut offset = 0;
    for extent in extents {
        let mut at = extent.lba;
        let mut left = extent.sectors.saturating_mul(block).min(bytes.saturating_sub(offset));
        while left != 0 {
            let len = left.min(disk.largest_transfer(&**buffer, offset));
            if len == 0 {
                return Err(Failure::disk("it cannot transfer a single block to the buffer"));
            }
            if reading.transfers.len() >= IN_FLIGHT
                && let Some(oldest) = reading.transfers.pop_front()
            {
                block_on(deadline, oldest).map_err(Failure::disk)?.map_err(Failure::disk)?;
            }
            disk.wait_for_room(deadline).map_err(Failure::disk)?;
            reading.transfers.push_back(disk.read(at, buffer, offset..offset + len).map_err(Failure::disk)?);
            reading.count += 1;
            at += len / block;
            offset += len;
            left -= len;
        }
    }
    if offset != bytes {
        return Err(Failure::disk("the file's clusters hold less than its size"));
    }
    Ok(reading)
}

/// Waits until the disk has done what it was asked for.
pub(super) fn finish<T, E>(reading: Reading<T>) -> Result<(), Failure>
where
    T: Future<Output = Result<(), E>>,
    E: Display,
{
    let deadline = Deadline::after_millis(STEP_MILLIS);
    for transfer in reading.transfers {
        block_on(deadline, transfer).map_err(Failure::disk)?.map_err(Failure::disk)?;
    }
    Ok(())
}

/// Shows the rows of `layout` in `loan`. Returns how many bytes the device read for it.
fn present<S: Screen, L: Lent>(
    screen: &S,
    layout: &Layout,
    loan: &Arc<L>,
    screenshot: &impl Screenshot,
) -> Result<u64, Failure> {
    let shown = put_on(screen, layout, loan, Deadline::after_millis(STEP_MILLIS))?;
    screenshot.ready(layout.width, layout.height);
    screen.hide(shown, Deadline::after_millis(STEP_MILLIS)).map_err(Failure::screen)?;
    Ok(layout_bytes(layout))
}

/// Shows the rows of `layout` in `loan`, and leaves them there.
pub(super) fn put_on<S: Screen, L: Lent>(
    screen: &S,
    layout: &Layout,
    loan: &Arc<L>,
    deadline: Deadline,
) -> Result<S::Shown, Failure> {
    let mut rows: Vec<Range<u64>> = Vec::new();
    for span in layout.row_spans() {
        rows.try_reserve(1).map_err(|_| Failure::OutOfMemory("the list of rows"))?;
        rows.push(span.offset..span.offset + span.len);
    }
    let order = order(layout.format);
    let frame = Frame { width: layout.width, height: layout.height, order, loan, rows: &rows };
    screen.show(&frame, deadline).map_err(Failure::screen)
}

/// How a screen is told what its pixels are made of.
pub(super) fn order(format: PixelFormat) -> PixelOrder {
    match format {
        PixelFormat::Rgbx | PixelFormat::Rgba => PixelOrder::Rgbx,
        PixelFormat::Bgrx | PixelFormat::Bgra | PixelFormat::Bgr => PixelOrder::Bgrx,
    }
}

pub(super) fn layout_bytes(layout: &Layout) -> u64 {
    u64::from(layout.row_bytes()) * u64::from(layout.height)
}

/// Decodes the file into a buffer of its own. Says how many bytes of pixels that wrote.
pub(super) fn decode<S: Screen>(
    screen: &S,
    source: &Source,
    file: &SharedBuffer,
) -> Result<(SharedBuffer, Layout, u64), Failure> {
    let (width, height) = (source.picture.width(), source.picture.height());
    let layout = Layout { width, height, offset: 0, stride: width * 4, top_down: true, format: PixelFormat::Bgrx };
    let size = usize::try_from(source.located.file.size).map_err(|_| Failure::OutOfMemory("the picture's file"))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size).map_err(|_| Failure::OutOfMemory("the picture's file"))?;
    bytes.resize(size, 0);
    file.cpu_access::<CpuReads>().map_err(Failure::dma)?.read_at(0, &mut bytes).map_err(Failure::dma)?;

    let mut pixels = screen.device().page_set(layout_bytes(&layout), Ladder::SINGLE_PAGES).map_err(Failure::dma)?;
    let (mut stored, mut copied) = (Ok(()), 0);
    source
        .picture
        .decode(&bytes, |row, line| {
            let offset = u64::from(row) * u64::from(layout.stride);
            if stored.is_ok() {
                stored = pixels.write_at(offset, line);
                copied += line.len() as u64;
            }
        })
        .map_err(|error| Failure::Picture { path: source.path.to_string(), error })?;
    stored.map_err(Failure::dma)?;
    let buffer = SharedBuffer::try_new("decoded picture", pixels).map_err(|rejected| Failure::dma(rejected.error))?;
    Ok((buffer, layout, copied))
}

/// Ends a loan that no transfer has any more.
pub(super) fn detach<D: dma::Direction>(loan: Arc<Attachment<D>>) -> Result<(), Failure> {
    match Arc::try_unwrap(loan) {
        Ok(attachment) => attachment.detach().map_err(Failure::dma),
        Err(_) => Err(Failure::dma("a device still has the picture")),
    }
}
