//! Reserving device addresses, and linking memory into them as a separate step.
//!
//! A driver whose device has tables of its own, or whose buffer grows piece by piece, takes a [`Reservation`]: a range of the
//! device's addresses, anywhere, with an alignment, or at an address. Nothing is mapped in it. [`Reservation::link`] maps
//! owned memory at an offset, and [`Linked::unlink`] ends that; both as often as wanted. The range is nobody else's from the
//! reservation on until the reservation *and* all its links are gone: neither the allocator nor
//! [`Device::map_at`](crate::Device::map_at) hands out a part of it.
//!
//! Several links without a gap can be named as one, by an [`Assembled`].
//!
//! # Invariants
//!
//! No two [`Claim`]s on a reservation overlap, and all lie inside it. A claim lasts from before its memory is mapped until after
//! it was revoked; if that failed, for ever, and with it the reservation.
//!
//! # Locking
//!
//! One [`IrqMutex`] for each reservation around the list of its claims; the heap's lock comes after it. It is not held while
//! mapping or revoking.

#![expect(unsafe_code, reason = "promises that the memory of a link is that of its buffer")]

use crate::buffer::{Span, Spans};
use crate::gather::{Endable, Parts};
use crate::held::Held;
use crate::lent::{Lent, Segment, sealed};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::{Buffer, Device, DeviceReads, DeviceWrites, Direction, Error, Rejected, View};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{IrqMutex, fallible};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, IovaError, IovaRange, PhysRange};

/// Where a reservation is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Wherever there is room.
    Anywhere,
    /// At a multiple of so many bytes, a power of two.
    Aligned(u64),
    /// At this address.
    At(Iova),
}

/// A range of a device's addresses that is kept for its driver.
pub struct Reservation(Arc<Reserved>);

struct Reserved {
    device: Device,
    range: IovaRange,
    /// It was asked for by address.
    fixed: bool,
    /// Offset and length of what is linked, in order.
    claims: IrqMutex<Vec<(u64, u64)>>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Every link keeps the reservation, so nothing is mapped any more.
        if let Ok(translated) = self.device.translated() {
            if self.fixed {
                translated.release_fixed(self.range);
            } else {
                translated.release(self.range);
            }
        }
    }
}

impl Device {
    /// Reserves `len` bytes of the device's addresses, a multiple of [`Device::page_size`].
    ///
    /// # Errors
    ///
    /// [`Error::Iova`] where there is no such range, or part of it is taken, or out of the device's reach;
    /// [`Error::NotIsolated`] where nothing translates; [`Error::BadSize`].
    pub fn reserve(&self, len: u64, placement: Placement) -> Result<Reservation, Error> {
        let translated = self.translated()?;
        if len == 0 {
            return Err(Error::BadSize(len));
        }
        if let Placement::Aligned(align) = placement
            && !align.is_power_of_two()
        {
            return Err(Error::Iova(IovaError::Misaligned(self.page_size())));
        }
        let range = match placement {
            Placement::Anywhere => translated.reserve(len, 1, self.limits())?,
            Placement::Aligned(align) => translated.reserve(len, align, self.limits())?,
            Placement::At(iova) => {
                let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
                translated.reserve_at(range, self.limits())?;
                range
            }
        };
        let fixed = matches!(placement, Placement::At(_));
        let reserved = Reserved { device: self.clone(), range, fixed, claims: IrqMutex::new(Vec::new()) };
        // Without room for it, it is dropped, and gives the range back.
        fallible::arc(reserved).map(Reservation).map_err(|_| Error::OutOfMemory)
    }
}

impl Reservation {
    /// Whose addresses they are.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The first address.
    pub fn iova(&self) -> Iova {
        self.0.range.start()
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.0.range.len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that are linked at this moment.
    pub fn linked(&self) -> u64 {
        self.0.claims.lock().iter().map(|(_, len)| len).sum()
    }

    /// Lends `buffer` to the device at byte `offset` of the reservation, a multiple of [`Device::page_size`]. When this returns,
    /// the device has it: nothing remains to be made visible.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the buffer back: [`Error::OutOfRange`] where it is not inside the reservation, [`Error::Linked`] where
    /// something is linked already, and as [`Device::map`](crate::Device::map).
    #[track_caller]
    pub fn link<D: Direction, B: Buffer>(&self, offset: u64, buffer: B) -> Result<Linked<D, B>, Rejected<B>> {
        let site = Location::caller();
        let claim = match Claim::new(&self.0, offset, Buffer::len(&buffer)) {
            Ok(claim) => claim,
            Err(error) => return Err(Rejected { buffer, error }),
        };
        let iova = Iova::new(self.0.range.start().get() + offset);
        match Held::lend_reserved(&self.0.device, iova, Link { buffer, claim }, site) {
            Ok(held) => Ok(Linked { held }),
            Err((link, error)) => Err(Rejected { buffer: link.buffer, error }),
        }
    }

    /// Gives the addresses back.
    ///
    /// # Errors
    ///
    /// The reservation, while something is linked. (To drop it is no error: then the addresses go back with the last link.)
    pub fn release(self) -> Result<(), Self> {
        Arc::try_unwrap(self.0).map(drop).map_err(Self)
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({} for {}, {:#x} bytes linked)", self.0.range, self.0.device.name(), self.linked())
    }
}

/// A part of a reservation in which something is linked.
struct Claim {
    of: Arc<Reserved>,
    offset: u64,
}

impl Claim {
    fn new(of: &Arc<Reserved>, offset: u64, len: u64) -> Result<Self, Error> {
        let size = of.range.len();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.ok_or(Error::OutOfRange { offset, len, size })?;
        let mut claims = of.claims.lock();
        let index = claims.partition_point(|(start, _)| *start < offset);
        let before = index.checked_sub(1).and_then(|before| claims.get(before)).copied();
        let after = claims.get(index).copied();
        let taken = before.filter(|(start, len)| start + len > offset).or(after.filter(|(start, _)| *start < end));
        if let Some((start, len)) = taken {
            return Err(Error::Linked(of.range.part(start, len).unwrap_or(of.range)));
        }
        claims.try_reserve(1)?;
        claims.insert(index, (offset, len));
        drop(claims);
        Ok(Self { of: of.clone(), offset })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.of.claims.lock();
        if let Ok(index) = claims.binary_search_by_key(&self.offset, |(start, _)| *start) {
            claims.remove(index);
        }
    }
}

/// A buffer and its place.
pub struct Link<B: Buffer> {
    buffer: B,
    claim: Claim,
}

// SAFETY: all are those of the buffer, which this owns and makes no reference into; forgotten, it forgets the buffer.
unsafe impl<B: Buffer> Spans for Link<B> {
    fn spans_runs(&self) -> &[PhysRange] {
        self.buffer.spans_runs()
    }
    fn spans_len(&self) -> u64 {
        self.buffer.spans_len()
    }
    fn span(&self, offset: u64) -> Option<Span> {
        self.buffer.span(offset)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.buffer.maintained_by()
    }
}

/// A buffer that a device has at its place in a [`Reservation`], in direction `D`. [`Linked::unlink`] and dropping it revoke.
#[must_use = "dropping a link ends it"]
pub struct Linked<D: Direction, B: Buffer> {
    held: Held<D, Link<B>>,
}

impl<D: Direction, B: Buffer> Linked<D, B> {
    /// The device's address of the first byte.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// Where in the reservation it is, in bytes.
    pub fn offset(&self) -> u64 {
        self.held.memory().claim.offset
    }

    /// Looks at the memory while the device has it: see [`Mapped::view`](crate::Mapped::view).
    pub fn view(&self) -> View<'_, D, Link<B>> {
        View::new(self.held.memory())
    }

    /// Revokes the device's access and gives the buffer back, with what the device wrote. The addresses stay reserved. Many
    /// links end with one completion in a [`Gather`](crate::Gather).
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the buffer is lost, and the reservation never ends.
    #[track_caller]
    pub fn unlink(self) -> Result<B, Quarantined> {
        self.held.take_back(Location::caller()).map(|link| link.buffer)
    }
}

impl<D: DeviceWrites, B: Buffer> Linked<D, B> {
    /// Lets the CPU see what the device has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads, B: Buffer> Linked<D, B> {
    /// Lets the device see what the CPU has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_device(offset, len)
    }
}

impl<D: Direction, B: Buffer> Parts for Linked<D, B> {
    type Direction = D;
    type Memory = Link<B>;
    fn into_held(self) -> Held<D, Link<B>> {
        self.held
    }
}

impl<D: Direction, B: Buffer> Endable for Linked<D, B> {
    type Back = B;
    fn back(link: Link<B>) -> B {
        link.buffer
    }
}

impl<D: Direction, B: Buffer> sealed::Sealed for Linked<D, B> {}

impl<D: Direction, B: Buffer> Lent for Linked<D, B> {
    fn device(&self) -> &Device {
        &self.held.loan().device
    }
    fn len(&self) -> u64 {
        self.held.memory().spans_len()
    }
    fn segments(&self) -> &[Segment] {
        self.held.loan().segments()
    }
    fn device_reads(&self) -> bool {
        D::DEVICE_READS
    }
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Linked<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loan = self.held.loan();
        write!(f, "Linked({} at {}, {:?})", loan.device.name(), loan.range(), D::PROT)
    }
}

/// Links that follow one another without a gap, as one loan: for descriptors that name more than one of them.
#[must_use = "dropping it ends the links"]
pub struct Assembled<D: Direction, B: Buffer> {
    /// At least one.
    links: Vec<Linked<D, B>>,
    device: Device,
    segment: Segment,
}

impl<D: Direction, B: Buffer> Assembled<D, B> {
    /// Joins `links`, in their order.
    ///
    /// # Errors
    ///
    /// The links, if there is none, or if one does not begin where the one before ends, for the same device.
    pub fn new(links: Vec<Linked<D, B>>) -> Result<Self, Vec<Linked<D, B>>> {
        let Some(first) = links.first() else { return Err(links) };
        let (device, start) = (first.device().clone(), first.iova());
        let mut end = start;
        for link in &links {
            let range = link.held.loan().range();
            if range.start() != end || *link.device() != device {
                return Err(links);
            }
            end = range.end();
        }
        let len = end.offset_from(start).unwrap_or(0);
        Ok(Self { links, device, segment: Segment { iova: start, len } })
    }

    /// The links.
    pub fn links(&self) -> &[Linked<D, B>] {
        &self.links
    }

    /// The links, each for itself again.
    pub fn into_links(self) -> Vec<Linked<D, B>> {
        self.links
    }
}

impl<D: Direction, B: Buffer> sealed::Sealed for Assembled<D, B> {}

impl<D: Direction, B: Buffer> Lent for Assembled<D, B> {
    fn device(&self) -> &Device {
        &self.device
    }
    fn len(&self) -> u64 {
        self.segment.len
    }
    fn segments(&self) -> &[Segment] {
        core::slice::from_ref(&self.segment)
    }
    fn device_reads(&self) -> bool {
        D::DEVICE_READS
    }
    fn device_writes(&self) -> bool {
        D::DEVICE_WRITES
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Assembled<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Assembled({} links at {}, {:?})", self.links.len(), self.segment.iova, D::PROT)
    }
}
