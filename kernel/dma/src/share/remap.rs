//! The remap unit: a shared buffer that an importer sees in another order, and no byte of it copied.
//!
//! What [`SharedBuffer::attach_pieces`] maps are the pages that have a byte of the pieces, in the order in which the pieces come
//! to them: so an importer that wants one contiguous range sees whole pages in any order. What is finer than a page no
//! translation can turn round. That is for the segments: they are cut from the mapping byte by byte, and an importer that takes
//! a list of them (a display's backing, a disk's scatter list) reads or writes the pieces one after another. Pages that no
//! piece touches are not mapped: the importer does not reach them.
//!
//! [`Tiles`] says which pieces make a picture that is stored in tiles linear, upside down or with its tiles turned.

#![expect(unsafe_code, reason = "promises that the pages in another order are the buffer's")]

use super::attachment::{alone, lend_other, supplied, synced};
use super::store::Store;
use super::{DeviceUser, Inner, SharedBuffer};
use crate::buffer::{Span, Spans, to_usize};
use crate::held::Held;
use crate::lent::{Lent, Segment, Segments, SharedLoan, sealed};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::{Device, Direction, Error};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::panic::Location;
use iommu::PhysRange;

/// A page of the buffer that is not mapped.
const ABSENT: u32 = u32::MAX;

impl SharedBuffer {
    /// Lends the bytes of `pieces`, in this order, to `device`: they are the loan's bytes, one after another. A byte may be in
    /// several.
    ///
    /// # Errors
    ///
    /// As [`SharedBuffer::attach`]; [`Error::OutOfRange`] for a piece that is not inside the buffer, [`Error::BadSize`] where there is
    /// no byte in any; [`Error::Map`] where the buffer is not made of pages that the device's space can map one by one.
    #[track_caller]
    pub fn attach_pieces<D: Direction>(
        &self,
        device: &Device,
        pieces: impl Iterator<Item = Range<u64>> + Clone,
    ) -> Result<Remapped<D>, Error> {
        let site = Location::caller();
        let user = DeviceUser::enter::<D>(&self.0, !device.is_coherent())?;
        let registers = matches!(user.store(), Store::Other { .. });
        let remap = Remap::new(user, device.page_size(), pieces.clone())?;
        let mut held: Held<D, Remap> = match registers {
            true => lend_other(device, remap, site)?,
            false => Held::lend(device, remap, site).map_err(|(_, error)| error)?,
        };
        if D::DEVICE_WRITES && held.is_copy() {
            alone(&mut held)?;
        }
        let (segments, len) = held.memory().segments(held.loan().segments(), pieces)?;
        Ok(Remapped { held, segments, len })
    }
}

/// Pages of a buffer in an order of their own.
///
/// # Invariants
///
/// `pages[i]` is the number, in units of `unit` bytes, of the buffer's page that lies at `i` in the mapping; `places` is the inverse;
/// `runs` are these pages, neighbours merged.
pub(crate) struct Remap {
    user: DeviceUser,
    unit: u64,
    pages: Vec<u32>,
    places: Vec<u32>,
    runs: Vec<PhysRange>,
}

impl AsMut<DeviceUser> for Remap {
    fn as_mut(&mut self) -> &mut DeviceUser {
        &mut self.user
    }
}

impl AsRef<DeviceUser> for Remap {
    fn as_ref(&self) -> &DeviceUser {
        &self.user
    }
}

impl Remap {
    fn new(user: DeviceUser, unit: u64, pieces: impl Iterator<Item = Range<u64>>) -> Result<Self, Error> {
        let size = user.spans_len();
        let total = u32::try_from(size / unit).ok().filter(|total| *total < ABSENT).ok_or(Error::BadSize(size))?;
        let mut remap = Self { user, unit, pages: Vec::new(), places: Vec::new(), runs: Vec::new() };
        remap.places.try_reserve_exact(to_usize(total.into()))?;
        remap.places.resize(to_usize(total.into()), ABSENT);
        for Range { start, end } in pieces {
            let out = Error::OutOfRange { offset: start, len: end.saturating_sub(start), size };
            if start > end || end > size {
                return Err(out);
            }
            if start == end {
                continue;
            }
            for page in start / unit..end.div_ceil(unit) {
                let place = remap.places.get_mut(to_usize(page)).ok_or(out.clone())?;
                if *place == ABSENT {
                    remap.pages.try_reserve(1)?;
                    // There are fewer pages than `total`, which fits.
                    *place = remap.pages.len() as u32;
                    remap.pages.push(page as u32);
                }
            }
        }
        if remap.pages.is_empty() {
            return Err(Error::BadSize(0));
        }
        remap.order_runs()?;
        Ok(remap)
    }

    fn order_runs(&mut self) -> Result<(), Error> {
        // Where each of the buffer's runs begins, so that a page is found by halving.
        let store = self.user.store().spans_runs();
        let mut starts = Vec::new();
        starts.try_reserve_exact(store.len())?;
        let mut at = 0;
        for run in store {
            starts.push(at);
            at += run.len();
        }
        for page in &self.pages {
            let (mut from, end) = (u64::from(*page) * self.unit, (u64::from(*page) + 1) * self.unit);
            while from < end {
                let index = starts.partition_point(|start| *start <= from).saturating_sub(1);
                let (Some(start), Some(run)) = (starts.get(index), store.get(index)) else { break };
                let len = (start + run.len()).min(end) - from;
                let part = run.part(from - start, len).ok_or(Error::BadSize(len))?;
                match self.runs.last_mut() {
                    Some(last) if last.end() == part.start() => {
                        *last = PhysRange::between(last.start(), part.end()).unwrap_or(*last);
                    }
                    _ => {
                        self.runs.try_reserve(1)?;
                        self.runs.push(part);
                    }
                }
                from += len;
            }
        }
        Ok(())
    }

    /// Cuts the pieces from the mapping, which is `mapped`. Returns how many bytes they have, too.
    fn segments(&self, mapped: &[Segment], pieces: impl Iterator<Item = Range<u64>>) -> Result<(Segments, u64), Error> {
        let (mut segments, mut len) = (Segments::default(), 0_u64);
        for Range { start, end } in pieces {
            let mut at = start;
            while at < end {
                let place = self.places.get(to_usize(at / self.unit)).copied().unwrap_or(ABSENT);
                let now = (self.unit - at % self.unit).min(end - at);
                cut(mapped, u64::from(place) * self.unit + at % self.unit, now, &mut segments)?;
                at += now;
            }
            len = len.checked_add(end - start).ok_or(Error::BadSize(end - start))?;
        }
        Ok((segments, len))
    }
}

/// Adds the `len` bytes at `offset` of a mapping to `to`.
fn cut(mapped: &[Segment], offset: u64, len: u64, to: &mut Segments) -> Result<(), Error> {
    let (mut skip, mut left) = (offset, len);
    for segment in mapped {
        if left == 0 {
            break;
        }
        let inside = skip.min(segment.len);
        skip -= inside;
        let now = (segment.len - inside).min(left);
        if now != 0 {
            let iova = segment.iova.checked_add(inside).ok_or(Error::BadSize(len))?;
            to.push(Segment { iova, len: now })?;
            left -= now;
        }
    }
    if left == 0 { Ok(()) } else { Err(Error::OutOfRange { offset, len, size: offset }) }
}

// SAFETY:
// - the runs are pages of the buffer, which `user` keeps alive and where it is, in the order of the spans, each once;
// - spans are the store's, each inside one page;
// - nobody makes references into the memory (invariant of Inner), so that several owners do not disturb each other;
// - forgotten, it keeps its count of the buffer for ever, and with it the memory.
unsafe impl Spans for Remap {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.runs
    }
    fn spans_len(&self) -> u64 {
        self.pages.len() as u64 * self.unit
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let page = self.pages.get(to_usize(offset / self.unit))?;
        let span = self.user.span(u64::from(*page) * self.unit + offset % self.unit)?;
        Some(Span { bytes: span.bytes.min(to_usize(self.unit - offset % self.unit)), ..span })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.user.maintained_by()
    }
    fn has_others(&self) -> bool {
        true
    }
}

/// Pieces of a shared buffer that one device has in an order of its own, in direction `D`. Its bytes are the pieces', one after
/// another: [`Lent::segments`] says where. [`Remapped::detach`] and dropping it revoke.
#[must_use = "dropping an attachment ends it"]
pub struct Remapped<D: Direction> {
    held: Held<D, Remap>,
    segments: Segments,
    len: u64,
}

impl<D: Direction> Remapped<D> {
    /// The buffer.
    pub fn buffer(&self) -> SharedBuffer {
        SharedBuffer(self.held.memory().user.buffer().clone())
    }

    /// Revokes the device's access.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed, as for an [`Attachment`](super::Attachment).
    #[track_caller]
    pub fn detach(self) -> Result<(), Quarantined> {
        self.held.take_back(Location::caller()).map(drop)
    }
}

impl<D: Direction> sealed::Sealed for Remapped<D> {}

impl<D: Direction> Lent for Remapped<D> {
    fn device(&self) -> &Device {
        &self.held.loan().device
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn segments(&self) -> &[Segment] {
        self.segments.as_slice()
    }
    fn device_reads(&self) -> bool {
        D::DEVICE_READS
    }
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
    fn shared(&self) -> Option<SharedLoan<'_>> {
        Some(SharedLoan(self))
    }
}

impl<D: Direction> super::Synced for Remapped<D> {
    fn buffer(&self) -> &Arc<Inner> {
        self.held.memory().user.buffer()
    }
    fn fetch(&self) -> Result<(), Error> {
        synced(&self.held, D::DEVICE_WRITES, Held::sync_for_cpu)
    }
    fn supply(&self) -> Result<(), Error> {
        supplied(&self.held)
    }
}

impl<D: Direction> fmt::Debug for Remapped<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (loan, buffer, pieces) = (self.held.loan(), self.buffer(), self.segments.as_slice().len());
        write!(f, "Remapped({} to {} in {pieces} segments, {:?})", buffer.name(), loan.device.name(), D::PROT)
    }
}

/// Pixels of a tile's side.
pub const TILE: u32 = 32;
/// Bytes of a pixel.
const PIXEL: u64 = 4;
/// Bytes of a row of a tile, and of a tile: one page.
const TILE_ROW: u64 = TILE as u64 * PIXEL;
const TILE_BYTES: u64 = TILE_ROW * TILE as u64;
const _: () = assert!(TILE_BYTES == iommu::PAGE_SIZE);

/// A picture of 32-bit pixels that is stored in tiles of 32 x 32 pixels, each a page, the rows of each one after another; tiles from
/// left to right, then from the top down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    first: u64,
    columns: u32,
    rows: u32,
}

/// How an importer sees a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileView {
    /// As it is.
    Upright,
    /// With the last row first.
    UpsideDown,
    /// With its tiles turned clockwise to other places, so often by a quarter; the pixels in them stay upright, as segments would
    /// have one pixel each otherwise.
    Turned(u8),
}

impl Tiles {
    /// A picture of this size in pixels, whose first tile lies at byte `first` of a buffer. `None` where the sides are not made of
    /// tiles, there is no pixel, or the place is not a multiple of a page.
    pub fn new(first: u64, width: u32, height: u32) -> Option<Self> {
        let tiled = |side: u32| (side != 0 && side.is_multiple_of(TILE)).then_some(side / TILE);
        let tiles = Self { first, columns: tiled(width)?, rows: tiled(height)? };
        let bytes = u64::from(tiles.columns).checked_mul(tiles.rows.into())?.checked_mul(TILE_BYTES)?;
        (first.is_multiple_of(TILE_BYTES) && first.checked_add(bytes).is_some()).then_some(tiles)
    }

    /// Bytes of all tiles.
    pub fn bytes(&self) -> u64 {
        u64::from(self.columns) * u64::from(self.rows) * TILE_BYTES
    }

    /// Width and height in pixels of what an importer sees.
    pub fn size(&self, view: TileView) -> (u32, u32) {
        let (columns, rows) = self.grid(view);
        (columns * TILE, rows * TILE)
    }

    fn grid(&self, view: TileView) -> (u32, u32) {
        match view {
            TileView::Turned(quarters) if quarters % 2 == 1 => (self.rows, self.columns),
            _ => (self.columns, self.rows),
        }
    }

    /// Where in the buffer the tile begins that an importer sees at this column and row of tiles.
    fn tile(&self, view: TileView, column: u32, row: u32) -> u64 {
        let Self { first, columns, rows } = *self;
        let (x, y) = match view {
            TileView::Upright => (column, row),
            TileView::UpsideDown => (column, rows - 1 - row),
            TileView::Turned(quarters) => match quarters % 4 {
                0 => (column, row),
                1 => (row, rows - 1 - column),
                2 => (columns - 1 - column, rows - 1 - row),
                _ => (columns - 1 - row, column),
            },
        };
        first + (u64::from(y) * u64::from(columns) + u64::from(x)) * TILE_BYTES
    }

    /// The pieces that, one after another, are the rows of what the importer sees, from the top down: for one that takes a list of
    /// segments.
    pub fn linear(self, view: TileView) -> impl Iterator<Item = Range<u64>> + Clone {
        let (columns, rows) = self.grid(view);
        (0..rows * TILE).flat_map(move |y| {
            let line = if view == TileView::UpsideDown { TILE - 1 - y % TILE } else { y % TILE };
            (0..columns).map(move |column| {
                let start = self.tile(view, column, y / TILE) + u64::from(line) * TILE_ROW;
                start..start + TILE_ROW
            })
        })
    }

    /// The tiles in the order in which the importer sees them: for one that takes pages in one range, and knows tiles. (Upside down,
    /// each tile's rows stay as they are.)
    pub fn by_tile(self, view: TileView) -> impl Iterator<Item = Range<u64>> + Clone {
        let (columns, rows) = self.grid(view);
        (0..rows).flat_map(move |row| {
            (0..columns).map(move |column| {
                let start = self.tile(view, column, row);
                start..start + TILE_BYTES
            })
        })
    }
}
