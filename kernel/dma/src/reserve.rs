//! Reserving device addresses, and linking memory into them as a separate step.
//!
//! A driver whose device has tables of its own, or whose buffer grows piece by piece, takes a [`Reservation`]: a range of the
//! device's addresses, anywhere, with an alignment, or at an address. Nothing is mapped in it. [`Reservation::link`] maps
//! owned memory at an offset, and [`Linked::unlink`] ends that; both as often as wanted. The range is nobody else's from the
//! reservation on until the reservation *and* all its links are gone: neither the allocator nor
//! [`Device::map_at`](crate::Device::map_at) hands out a part of it.
//!
//! Many links are made with one completion by [`Reservation::stage`] and [`Reservation::sync`], and ended with one by a
//! [`Gather`](crate::Gather). A link of a [`Part`] can be carved ([`Linked::carve`]), and ended piece by piece. Several links without a gap
//! can be named as one, by an [`Assembled`].
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

mod assembled;
mod link;
mod part;
mod stage;

pub use assembled::Assembled;
pub use link::{Carved, Link, Linkable, Linked};
pub use part::Part;
pub use stage::{NotLinked, Staged, Stages};

use crate::held::Held;
use crate::{Device, Direction, Error, Rejected};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{IrqMutex, fallible};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, IovaError, IovaRange, MapError};

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

    /// Lends `memory` to the device at byte `offset` of the reservation, a multiple of [`Device::page_size`]. When this returns,
    /// the device has it: nothing remains to be made visible. (For many links with one completion: [`Reservation::stage`].)
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the memory back: [`Error::OutOfRange`] where it is not inside the reservation, [`Error::Linked`] where
    /// something is linked already, and as [`Device::map`](crate::Device::map).
    #[track_caller]
    pub fn link<D: Direction, M: Linkable>(&self, offset: u64, memory: M) -> Result<Linked<D, M>, Rejected<M>> {
        let site = Location::caller();
        let claim = match Claim::new(&self.0, offset, memory.spans_len()) {
            Ok(claim) => claim,
            Err(error) => return Err(Rejected { buffer: memory, error }),
        };
        let iova = Iova::new(self.0.range.start().get() + offset);
        match Held::lend_reserved(&self.0.device, iova, Link { memory, claim }, M::EXTRA, site) {
            Ok(held) => Ok(Linked { held }),
            Err((link, error)) => Err(Rejected { buffer: link.memory, error }),
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
        let page_size = of.device.page_size();
        if (offset | len) & (page_size - 1) != 0 {
            return Err(Error::Map(MapError::Misaligned(page_size)));
        }
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

    /// Makes claims of their own of what lies behind each of `cuts`, which are offsets in this one, in order; those at its edges are
    /// none. The handle of each is to be had from [`Claim::at`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; nothing has changed.
    fn divide<const N: usize>(&self, cuts: [u64; N]) -> Result<(), Error> {
        let mut claims = self.of.claims.lock();
        claims.try_reserve(N)?;
        let Ok(mut index) = claims.binary_search_by_key(&self.offset, |(start, _)| *start) else { return Ok(()) };
        for at in cuts.map(|cut| self.offset + cut) {
            if let Some((start, len)) = claims.get(index).copied()
                && let (Some(before), Some(after)) = (at.checked_sub(start), (start + len).checked_sub(at))
                && before != 0
                && after != 0
            {
                claims.insert(index + 1, (at, after));
                if let Some(first) = claims.get_mut(index) {
                    first.1 = before;
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// The handle of the claim that [`Claim::divide`] has made at `offset` in this one. Called once for each.
    fn at(&self, offset: u64) -> Self {
        Self { of: self.of.clone(), offset: self.offset + offset }
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
