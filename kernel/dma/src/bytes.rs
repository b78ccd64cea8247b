//! Buffers that are no whole pages.
//!
//! An IOMMU lends pages. Who lends a part of one shows the device its neighbours too; so a device that is not trusted
//! ([`Policy::trusted`](crate::Policy)) gets a copy in a page of its own, at the same offset in the page. A device that is trusted,
//! or that nothing keeps from all of memory anyway, gets the bytes where they are, unless it does not snoop the caches: bytes
//! that share a cache line with others cannot be maintained without losing one or the other.
//!
//! # Invariants
//!
//! Each [`Bytes`] has a part of a chunk that no other has. Who has it by value has all access to it, and nobody else refers to
//! it; the chunk is freed with its last part.

#![expect(unsafe_code, reason = "makes slices of memory that it owns by pointer, and lends it")]

use crate::buffer::{Span, Spans, to_usize};
use crate::device::Loan;
use crate::held::Held;
use crate::lent::{Segment, lent_by_held};
use crate::memory::DmaMemory;
use crate::pages::Chunk;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Device, DeviceReads, DeviceWrites, Direction, Error, Pages, Rejected, View, bounce};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::fallible;
use core::fmt;
use core::panic::Location;
use core::slice;
use iommu::{Iova, PAGE_SIZE, PhysRange};

/// A part of some pages. A plain slice while, and only while, no device has it.
pub struct Bytes {
    chunk: Arc<Chunk>,
    start: u64,
    len: u64,
    /// The pages that have a byte of it.
    pages: [PhysRange; 1],
}

impl Bytes {
    /// Cuts `pages` into parts of these sizes, one after another. What is left at the end is nobody's.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] where the sizes add up to more than there is, [`Error::BadSize`] for a size of 0,
    /// [`Error::OutOfMemory`].
    pub fn cut(pages: Pages, sizes: &[u64]) -> Result<Vec<Self>, Error> {
        let chunk = fallible::arc(pages.into_chunk()).map_err(|_| Error::OutOfMemory)?;
        let size = chunk.run().len();
        let mut parts = Vec::new();
        parts.try_reserve_exact(sizes.len())?;
        let mut start = 0_u64;
        for &len in sizes {
            let end = start.checked_add(len).filter(|end| *end <= size);
            let end = end.ok_or(Error::OutOfRange { offset: start, len, size })?;
            if len == 0 {
                return Err(Error::BadSize(0));
            }
            let first = start / PAGE_SIZE * PAGE_SIZE;
            let whole = end.next_multiple_of(PAGE_SIZE) - first;
            let pages = chunk.run().part(first, whole).ok_or(Error::BadSize(len))?;
            // INVARIANT: begins where the last part ended, inside the chunk.
            parts.push(Self { chunk: chunk.clone(), start, len, pages: [pages] });
            start = end;
        }
        Ok(parts)
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How far into a page it begins.
    pub fn offset_in_page(&self) -> u64 {
        self.start % PAGE_SIZE
    }

    /// The memory.
    pub fn as_slice(&self) -> &[u8] {
        let Some(Span { ptr, bytes }) = self.span(0) else { return &[] };
        // SAFETY: initialized bytes that this object has alone (invariant); `&self` keeps it, and whoever could write it is
        // excluded meanwhile.
        unsafe { slice::from_raw_parts(ptr.as_ptr(), bytes) }
    }

    /// The memory.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let Some(Span { ptr, bytes }) = self.span(0) else { return &mut [] };
        // SAFETY: as for `as_slice`, and `&mut self` excludes everybody else.
        unsafe { slice::from_raw_parts_mut(ptr.as_ptr(), bytes) }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:#x} at {:#x} of {})", self.len, self.start, self.chunk.run())
    }
}

// SAFETY:
// - the one span is the part of the chunk that the object has alone; the runs are the pages around it, which are lent only to
//   devices that are vouched for to keep to the part (`lend`);
// - the chunk is held by pointer, so it does not move, and no reference is made here;
// - forgotten, it keeps the chunk.
unsafe impl Spans for Bytes {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.pages
    }
    fn spans_len(&self) -> u64 {
        self.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let left = self.len.checked_sub(offset).filter(|left| *left != 0)?;
        let Span { ptr, bytes } = self.chunk.span(self.start + offset)?;
        Some(Span { ptr, bytes: bytes.min(to_usize(left)) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        Some(self.chunk.memory())
    }
}

/// Bytes that a device has, in direction `D`. [`MappedBytes::unmap`] and dropping it revoke, `mem::forget` leaks it.
#[must_use = "dropping a mapping ends it"]
pub struct MappedBytes<D: Direction> {
    held: Held<D, Bytes>,
}

impl<D: Direction> MappedBytes<D> {
    pub(crate) fn new(device: &Device, bytes: Bytes, site: Site) -> Result<Self, Rejected<Bytes>> {
        match lend::<D>(device, &bytes, site) {
            Ok(loan) => Ok(Self { held: Held::of(loan, bytes) }),
            Err(error) => Err(Rejected { buffer: bytes, error }),
        }
    }

    /// The device's address of the first byte. All others follow it where [`Lent::segments`](crate::Lent::segments) is one segment.
    pub fn iova(&self) -> Iova {
        self.segments().first().map(|segment| segment.iova).unwrap_or_default()
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.held.memory().len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// See [`Mapped::view`](crate::Mapped::view).
    pub fn view(&self) -> View<'_, D, Bytes> {
        View::of(self.held.memory(), self.held.loan().copy())
    }

    /// Revokes the device's access and gives the bytes back, with what the device wrote.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the bytes are lost, unless the device had a copy.
    #[track_caller]
    pub fn unmap(self) -> Result<Bytes, Quarantined> {
        self.held.take_back(Location::caller())
    }
}

impl<D: DeviceWrites> MappedBytes<D> {
    /// See [`Mapped::sync_for_cpu`](crate::Mapped::sync_for_cpu).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads> MappedBytes<D> {
    /// See [`Mapped::sync_for_device`](crate::Mapped::sync_for_device).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_device(offset, len)
    }
}

/// Lends the bytes where they are, or a copy.
fn lend<D: Direction>(device: &Device, bytes: &Bytes, site: Site) -> Result<Loan, Error> {
    let skip = bytes.offset_in_page();
    let [pages] = bytes.pages;
    let alone = skip == 0 && bytes.len.is_multiple_of(PAGE_SIZE);
    let vouched_for = device.is_trusted() || !device.is_isolated();
    let aligned = (pages.start().get() + skip).is_multiple_of(device.limits().min_align.min(PAGE_SIZE));
    let as_it_is = alone || vouched_for && device.is_coherent() && aligned && device.page_size() == PAGE_SIZE;
    let why = if as_it_is {
        if !device.is_coherent() {
            crate::held::prepare::<D, _>(bytes, 0, bytes.len)?;
        }
        let room = Loan::room()?;
        // SAFETY:
        // - the bytes are owned: nobody has a reference into them, and they go into a `Held`, or nowhere;
        // - what else is in the pages the device does not touch: somebody vouches for it, or there is nothing else.
        match unsafe { device.lend(None, &bytes.pages, pages.len(), D::PROT, site) } {
            Ok(mut loan) => {
                loan.narrow(room, skip, bytes.len, None);
                return Ok(loan);
            }
            Err(error) => error,
        }
    } else {
        Error::Unreachable { device: device.shared_name().clone(), memory: pages }
    };
    bounce::lend_part::<D, _>(device, None, bytes, skip, site, why)
}

lent_by_held!([D: Direction] MappedBytes<D>, D, |this| Self::len(this));

impl<D: Direction> MappedBytes<D> {
    /// See [`Lent::segments`](crate::Lent::segments).
    pub fn segments(&self) -> &[Segment] {
        self.held.loan().segments()
    }
}

impl<D: Direction> fmt::Debug for MappedBytes<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loan = self.held.loan();
        write!(f, "MappedBytes({} at {}, {:?})", loan.device.name(), loan.range(), D::PROT)
    }
}
