//! Scatter lists: many buffers, or parts of buffers, lent as one.
//!
//! A [`ScatterList`] is filled once, and mapped as often as wanted: all of it with one reservation, at one contiguous range of device
//! addresses. Parts may begin and end inside a page. What the device is told are the bytes of the parts, one after another; what
//! it reaches are the pages that they lie in, all of which the list owns.
//!
//! # Coalescing
//!
//! Parts that touch in device addresses are one *extent*: one ends where a page ends, and the next begins where one begins. Behind an
//! IOMMU, whole pages from anywhere are therefore one extent, and a first part that begins inside a page or a last one that
//! ends inside one belong to it, while a part in the middle that does either begins a new one. Where nothing translates, parts
//! touch where memory does. Extents are what [`Lent::segments`] shows; [`slice()`](crate::slice) and [`MappedList::coalesced`] cut them
//! where the device's limits demand it, and nowhere else: each segment is as long as it can be, so there are as few as there can be.
//!
//! # Invariants
//!
//! Of [`Entries`]: `starts[i]` is where the pages of part `i` begin in the list's pages, `data[i]` where its bytes begin in the list's bytes;
//! `runs` are the pages of all parts in order, neighbours merged; `extents` are the bytes of all parts in order, as ranges of the
//! list's pages, neighbours merged; `longest` is the length of the longest run.

#![expect(unsafe_code, reason = "promises that the pages of a list are those of its buffers")]

use crate::buffer::{Span, Spans, to_usize};
use crate::gather::{Endable, Parts};
use crate::held::Held;
use crate::lent::{Lent, Segment, Slices, sealed, whole};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Buffer, Device, DeviceReads, DeviceWrites, Direction, Error, Rejected, View, view};
use alloc::boxed::Box;
use alloc::vec::Vec;
use base::fallible;
use core::fmt;
use core::panic::Location;
use iommu::{Iova, PAGE_SIZE, PhysRange};

/// Buffers and parts of buffers, in an order.
///
/// One word, as it moves into each mapping and out of it.
pub struct ScatterList<B: Buffer> {
    /// `None` where a mapping has lost all of it.
    entries: Option<Box<Entries<B>>>,
}

struct Entries<B> {
    parts: Vec<Part<B>>,
    starts: Vec<u64>,
    data: Vec<u64>,
    runs: Vec<PhysRange>,
    longest: u64,
    extents: Vec<Extent>,
    /// Those of the mapping, in device addresses: the extents. Room for them otherwise.
    segments: Vec<Segment>,
    granule: u64,
    /// Bytes in all pages.
    cover: u64,
    /// Bytes in all parts.
    len: u64,
}

/// # Invariants
///
/// The `cover` bytes at `first` are whole pages of the buffer, in which the `len` bytes at `first + skip` lie.
struct Part<B> {
    buffer: B,
    first: u64,
    skip: u64,
    cover: u64,
    len: u64,
}

/// Bytes one after another in the list's pages.
#[derive(Clone, Copy)]
struct Extent {
    at: u64,
    len: u64,
}

impl Device {
    /// Makes a list with room for `parts` parts, in units of the device's pages.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn scatter_list<B: Buffer>(&self, parts: usize) -> Result<ScatterList<B>, Error> {
        ScatterList::new(parts, self.page_size())
    }

    /// Lends all of `list` to the device, with one reservation.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the list back: [`Error::BadSize`] for an empty one, [`Error::Misaligned`] where an extent does not meet the
    /// device's alignment, and as [`Device::map`].
    #[inline]
    #[track_caller]
    pub fn map_list<D: Direction, B: Buffer>(
        &self,
        list: ScatterList<B>,
    ) -> Result<MappedList<D, B>, Rejected<ScatterList<B>>> {
        MappedList::new(self, list, Location::caller())
    }
}

impl<B: Buffer> ScatterList<B> {
    /// Makes a list with room for `parts` parts. Of each part it lends whole pages of `granule` bytes, a power of two and at
    /// least [`PAGE_SIZE`]: see [`Device::page_size`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] for a granule that is none.
    pub fn new(parts: usize, granule: u64) -> Result<Self, Error> {
        if !granule.is_power_of_two() || granule < PAGE_SIZE {
            return Err(Error::BadSize(granule));
        }
        let mut entries = Entries { granule, ..Entries::NONE };
        entries.reserve(parts, parts)?;
        let entries = fallible::boxed(entries).map_err(|_| Error::OutOfMemory)?;
        Ok(Self { entries: Some(entries) })
    }

    /// What [`Held::lend_scattered`] needs of it.
    #[inline(always)]
    fn scattered(&mut self) -> Option<(&[PhysRange], u64, &mut Vec<Segment>)> {
        let Entries { runs, cover, segments, .. } = self.entries.as_deref_mut()?;
        Some((runs, *cover, segments))
    }

    #[inline(always)]
    fn entries(&self) -> &Entries<B> {
        match &self.entries {
            Some(entries) => entries,
            None => Entries::<B>::EMPTY,
        }
    }

    fn entries_mut(&mut self) -> Result<&mut Entries<B>, Error> {
        if self.entries.is_none() {
            self.entries = Some(fallible::boxed(Entries::NONE).map_err(|_| Error::OutOfMemory)?);
        }
        self.entries.as_deref_mut().ok_or(Error::OutOfMemory)
    }

    /// Adds all of `buffer`.
    ///
    /// # Errors
    ///
    /// As [`ScatterList::push_part`].
    pub fn push(&mut self, buffer: B) -> Result<(), Rejected<B>> {
        let len = Buffer::len(&buffer);
        self.push_part(buffer, 0, len)
    }

    /// Adds the `len` bytes at `offset` of `buffer`. (All of the buffer belongs to the list, and comes back from
    /// [`ScatterList::into_buffers`].)
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the buffer back: [`Error::OutOfRange`] where the pages of the part are not inside it, [`Error::BadSize`] for no
    /// bytes or more than there can be, [`Error::OutOfMemory`].
    pub fn push_part(&mut self, buffer: B, offset: u64, len: u64) -> Result<(), Rejected<B>> {
        let entries = match self.entries_mut() {
            Ok(entries) => entries,
            Err(error) => return Err(Rejected { buffer, error }),
        };
        match entries.add(&buffer, offset, len) {
            Ok((first, skip, cover)) => {
                entries.parts.push(Part { buffer, first, skip, cover, len });
                Ok(())
            }
            Err(error) => Err(Rejected { buffer, error }),
        }
    }

    /// The bytes in all parts.
    pub fn len(&self) -> u64 {
        self.entries().len
    }

    /// Whether there is no part.
    pub fn is_empty(&self) -> bool {
        self.entries().parts.is_empty()
    }

    /// The number of parts.
    pub fn count(&self) -> usize {
        self.entries().parts.len()
    }

    /// The buffers of all parts, in order.
    pub fn buffers(&self) -> impl Iterator<Item = &B> {
        self.entries().parts.iter().map(|part| &part.buffer)
    }

    /// Lets go of the buffers, in order.
    pub fn into_buffers(self) -> impl Iterator<Item = B> {
        self.entries.into_iter().flat_map(|entries| entries.parts).map(|part| part.buffer)
    }

    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let mut rest = to;
        for (at, len) in self.entries().pieces(offset, rest.len() as u64)? {
            let (now, later) = rest.split_at_mut(to_usize(len).min(rest.len()));
            view::read(self, at, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.store(offset, from)
    }

    fn store(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let mut rest = from;
        for (at, len) in self.entries().pieces(offset, rest.len() as u64)? {
            let (now, later) = rest.split_at(to_usize(len).min(rest.len()));
            view::write(self, at, now)?;
            rest = later;
        }
        Ok(())
    }
}

impl<B: Buffer> Entries<B> {
    const NONE: Self = Self {
        parts: Vec::new(),
        starts: Vec::new(),
        data: Vec::new(),
        runs: Vec::new(),
        longest: 0,
        extents: Vec::new(),
        segments: Vec::new(),
        granule: PAGE_SIZE,
        cover: 0,
        len: 0,
    };
    const EMPTY: &'static Self = &Self::NONE;

    fn reserve(&mut self, parts: usize, runs: usize) -> Result<(), Error> {
        self.parts.try_reserve(parts)?;
        self.starts.try_reserve(parts)?;
        self.data.try_reserve(parts)?;
        self.runs.try_reserve(runs)?;
        self.extents.try_reserve(parts)?;
        let segments = self.extents.len() + parts - self.segments.len().min(self.extents.len() + parts);
        self.segments.try_reserve(segments)?;
        Ok(())
    }

    /// Enters a part everywhere but in `parts`. Nothing is changed by an error.
    fn add(&mut self, buffer: &B, offset: u64, len: u64) -> Result<(u64, u64, u64), Error> {
        let size = Buffer::len(buffer);
        let out = Error::OutOfRange { offset, len, size };
        let mask = self.granule - 1;
        let end = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(self.granule));
        let end = end.filter(|end| *end <= size).ok_or(out)?;
        let (first, skip) = (offset & !mask, offset & mask);
        let cover = end - first;
        if len == 0 {
            return Err(Error::BadSize(len));
        }
        let covered = self.cover.checked_add(cover).ok_or(Error::BadSize(len))?;
        let runs = Buffer::runs(buffer);
        self.reserve(1, runs.len())?;

        // The last one may grow.
        let known = self.runs.len().saturating_sub(1);
        // The runs of the buffer's pages from `first` to `end`.
        let mut at = 0;
        for run in runs {
            let (from, to) = (first.max(at), end.min(at + run.len()));
            if let Some(part) = to.checked_sub(from).filter(|len| *len != 0).and_then(|len| run.part(from - at, len)) {
                match self.runs.last_mut() {
                    Some(last) if last.end() == part.start() => {
                        // Both are memory of which no byte is in two runs: their sum does not overflow.
                        *last = PhysRange::between(last.start(), part.end()).unwrap_or(*last);
                    }
                    _ => self.runs.push(part),
                }
            }
            at += run.len();
        }
        let extent = Extent { at: self.cover + skip, len };
        match self.extents.last_mut() {
            Some(last) if last.at + last.len == extent.at => last.len += len,
            _ => self.extents.push(extent),
        }
        self.longest = self.runs.iter().skip(known).fold(self.longest, |longest, run| longest.max(run.len()));
        self.starts.push(self.cover);
        self.data.push(self.len);
        self.cover = covered;
        self.len += len;
        Ok((first, skip, cover))
    }

    /// Whether its bytes are all the bytes of its pages.
    #[inline]
    fn is_whole_pages(&self) -> bool {
        matches!(*self.extents, [Extent { at: 0, len }] if len == self.cover)
    }

    /// The `len` bytes at `offset` of the parts, in pieces: where each begins in the list's pages, and how long it is.
    fn pieces(&self, offset: u64, len: u64) -> Result<impl Iterator<Item = (u64, u64)>, Error> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let end = end.ok_or(Error::OutOfRange { offset, len, size: self.len })?;
        let first = self.data.partition_point(|start| *start <= offset).saturating_sub(1);
        let parts = self.parts.iter().zip(&self.starts).zip(&self.data).skip(first);
        Ok(parts.map_while(move |((part, start), data)| {
            let (from, to) = (offset.max(*data), end.min(data + part.len));
            (from < to).then(|| (start + part.skip + (from - data), to - from))
        }))
    }
}

impl<B: Buffer> fmt::Debug for ScatterList<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entries { len, parts, extents, .. } = self.entries();
        write!(f, "ScatterList({len} bytes in {} parts, {} extents)", parts.len(), extents.len())
    }
}

// SAFETY:
// - the runs are those of whole pages of the buffers, in the order of the parts (invariants), and no buffer is in two parts;
// - spans are the buffers', cut at the end of a part's pages;
// - no reference is made here; views are made of a list that is held, or borrow it.
unsafe impl<B: Buffer> Spans for ScatterList<B> {
    #[inline]
    fn spans_runs(&self) -> &[PhysRange] {
        &self.entries().runs
    }
    #[inline]
    fn longest_run(&self) -> u64 {
        self.entries().longest
    }
    #[inline]
    fn spans_len(&self) -> u64 {
        self.entries().cover
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let Entries { parts, starts, .. } = self.entries();
        let index = starts.partition_point(|start| *start <= offset).checked_sub(1)?;
        let (part, start) = (parts.get(index)?, starts.get(index)?);
        let left = part.cover.checked_sub(offset - start).filter(|left| *left != 0)?;
        let span = part.buffer.span(part.first + (offset - start))?;
        Some(Span { ptr: span.ptr, bytes: span.bytes.min(to_usize(left)) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.entries().parts.first()?.buffer.maintained_by()
    }
}

/// A list that a device has, in direction `D`. [`MappedList::unmap`] and dropping it revoke.
///
/// All offsets count the bytes of the parts.
#[must_use = "dropping a mapping ends it"]
pub struct MappedList<D: Direction, B: Buffer> {
    held: Held<D, ScatterList<B>>,
}

impl<D: Direction, B: Buffer> MappedList<D, B> {
    #[inline]
    fn new(device: &Device, mut list: ScatterList<B>, site: Site) -> Result<Self, Rejected<ScatterList<B>>> {
        let isolated = device.is_isolated();
        let checked = match list.entries.as_deref_mut() {
            Some(entries) => {
                entries.segments.clear();
                check(device, isolated, entries)
            }
            None => Err(Error::BadSize(0)),
        };
        if let Err(error) = checked {
            return Err(Rejected { buffer: list, error });
        }
        let held = if !isolated && list.entries().runs.len() > 1 && list.entries().is_whole_pages() {
            Held::lend_scattered(device, list, ScatterList::scattered, site)
        } else {
            Held::lend(device, list, site)
        };
        let mut held = match held {
            Ok(held) => held,
            Err((list, error)) => return Err(Rejected { buffer: list, error }),
        };
        match place(&mut held) {
            Ok(()) => Ok(Self { held }),
            Err(error) => Err(give_up(held, error, site)),
        }
    }

    /// Looks at the bytes while the device has them: see [`Mapped::view`](crate::Mapped::view).
    pub fn view(&self) -> ListView<'_, D, B> {
        ListView { mapped: self }
    }

    /// All segments, as few as the device's limits allow.
    pub fn coalesced(&self) -> Slices<'_> {
        whole(self)
    }

    /// Revokes the device's access and gives the list back, with what the device wrote.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: all of the list is lost.
    #[inline]
    #[track_caller]
    pub fn unmap(self) -> Result<ScatterList<B>, Quarantined> {
        self.held.take_back(Location::caller())
    }
}

impl<D: DeviceWrites, B: Buffer> MappedList<D, B> {
    /// Lets the CPU see what the device has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        for (at, len) in self.held.memory().entries().pieces(offset, len)? {
            self.held.sync_for_cpu(at, len)?;
        }
        Ok(())
    }
}

impl<D: DeviceReads, B: Buffer> MappedList<D, B> {
    /// Lets the device see what the CPU has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        for (at, len) in self.held.memory().entries().pieces(offset, len)? {
            self.held.sync_for_device(at, len)?;
        }
        Ok(())
    }
}

/// Whether the list can be lent to the device.
#[inline]
fn check<B>(device: &Device, isolated: bool, entries: &Entries<B>) -> Result<(), Error> {
    if entries.parts.is_empty() {
        return Err(Error::BadSize(0));
    }
    // Pages begin at multiples of the alignment, or at least of a page.
    let align = device.limits().min_align;
    let align = if isolated { align } else { align.min(PAGE_SIZE) };
    if align > 1
        && let Some(extent) = entries.extents.iter().find(|extent| extent.at & (align - 1) != 0)
    {
        return Err(Error::Misaligned { device: device.shared_name().clone(), address: Iova::new(extent.at) });
    }
    Ok(())
}

/// Finds the extents of a list that has been lent, unless they are there already.
#[inline]
fn place<D: Direction, B: Buffer>(held: &mut Held<D, ScatterList<B>>) -> Result<(), Error> {
    let (loan, list) = held.parts_mut();
    // It has parts: they have been lent.
    let Some(Entries { extents, segments, .. }) = list.entries.as_deref_mut() else { return Ok(()) };
    if !segments.is_empty() {
        return Ok(());
    }
    let [whole] = loan.segments() else { return place_scattered(extents, loan.segments(), segments) };
    segments.try_reserve(extents.len())?;
    // Within the range of the loan: no overflow.
    let of = |extent: &Extent| Segment { iova: Iova::new(whole.iova.get() + extent.at), len: extent.len };
    segments.extend(extents.iter().map(of));
    Ok(())
}

/// [`place`] for pages in many pieces: extents are cut where pieces end, and joined where they touch.
#[cold]
fn place_scattered(extents: &[Extent], pages: &[Segment], segments: &mut Vec<Segment>) -> Result<(), Error> {
    // How many bytes of the list's pages lie before those of `page`.
    let (mut pages, mut before) = (pages.iter().peekable(), 0);
    for extent in extents {
        let (mut at, end) = (extent.at, extent.at + extent.len);
        while at < end {
            let Some(page) = pages.peek() else { return Err(Error::BadSize(end)) };
            if at >= before + page.len {
                before += page.len;
                pages.next();
                continue;
            }
            let len = (before + page.len).min(end) - at;
            let next = Segment { iova: Iova::new(page.iova.get() + (at - before)), len };
            at += len;
            match segments.last_mut() {
                Some(last) if last.iova.checked_add(last.len) == Some(next.iova) => last.len += len,
                _ => {
                    segments.try_reserve(1)?;
                    segments.push(next);
                }
            }
        }
    }
    Ok(())
}

/// Takes a list back that cannot be lent after all.
#[cold]
fn give_up<D: Direction, B: Buffer>(
    held: Held<D, ScatterList<B>>,
    error: Error,
    site: Site,
) -> Rejected<ScatterList<B>> {
    match held.take_back(site) {
        Ok(buffer) => Rejected { buffer, error },
        // An empty list in place of the one that is lost.
        Err(lost) => Rejected { buffer: ScatterList { entries: None }, error: lost.into() },
    }
}

impl<D: Direction, B: Buffer> Parts for MappedList<D, B> {
    type Direction = D;
    type Memory = ScatterList<B>;
    fn into_held(self) -> Held<D, ScatterList<B>> {
        self.held
    }
}

impl<D: Direction, B: Buffer> Endable for MappedList<D, B> {
    type Back = ScatterList<B>;
    fn back(list: ScatterList<B>) -> ScatterList<B> {
        list
    }
}

impl<D: Direction, B: Buffer> sealed::Sealed for MappedList<D, B> {}

impl<D: Direction, B: Buffer> Lent for MappedList<D, B> {
    #[inline]
    fn device(&self) -> &Device {
        &self.held.loan().device
    }
    #[inline]
    fn len(&self) -> u64 {
        self.held.memory().entries().len
    }
    #[inline]
    fn segments(&self) -> &[Segment] {
        &self.held.memory().entries().segments
    }
    #[inline]
    fn device_reads(&self) -> bool {
        D::DEVICE_READS
    }
    #[inline]
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for MappedList<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loan = self.held.loan();
        write!(f, "MappedList({} at {}, {:?})", loan.device.name(), loan.range(), D::PROT)
    }
}

/// Access of the CPU to a list that a device has: as [`View`](crate::View), by the bytes of the parts.
pub struct ListView<'a, D: Direction, B: Buffer> {
    mapped: &'a MappedList<D, B>,
}

impl<'a, D: Direction, B: Buffer> ListView<'a, D, B> {
    /// The list, and its pages as the device has them: it may have a copy.
    fn parts(&self) -> (&'a ScatterList<B>, View<'a, D, ScatterList<B>>) {
        let held = &self.mapped.held;
        (held.memory(), View::of(held.memory(), held.loan().copy()))
    }
}

impl<D: DeviceWrites, B: Buffer> ListView<'_, D, B> {
    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let (list, view) = self.parts();
        let mut rest = to;
        for (at, len) in list.entries().pieces(offset, rest.len() as u64)? {
            let now = to_usize(len).min(rest.len());
            let (now, later) = rest.split_at_mut(now);
            view.read(at, now)?;
            rest = later;
        }
        Ok(())
    }
}

impl<D: DeviceReads, B: Buffer> ListView<'_, D, B> {
    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let (list, view) = self.parts();
        let mut rest = from;
        for (at, len) in list.entries().pieces(offset, rest.len() as u64)? {
            let (now, later) = rest.split_at(to_usize(len).min(rest.len()));
            view.write(at, now)?;
            rest = later;
        }
        Ok(())
    }
}
