//! Virtual contiguous memory: one range of addresses over memory that is not in one piece.
//!
//! [`fill`] makes a buffer of physical chunks, as large as a ladder allows and memory has, and says what it got. [`reserve`] takes
//! a range of addresses of a space, aligned as asked for; [`Area::back`] maps the buffer there, by the largest leaves and the
//! Contiguous bit where chunks and alignment allow. The same buffer may be behind any number of areas, of several spaces at a time:
//! it is a [`SharedBuffer`], and all that holds of those holds here.
//!
//! A table of pages stays where it is when its last page is unmapped: over addresses that had one, a chunk is mapped by pages with the
//! Contiguous bit, not by a block. [`InDevice::leaves`] and its like say what it came to.
//!
//! | space | what an area of it becomes |
//! |---|---|
//! | [`Device`]: the device's DMA domain | [`InDevice`], a loan |
//! | [`OwnedDomain`]: a space that its owner fills and swaps under devices | [`InDomain`] |
//! | [`Cpu`]: the kernel's own addresses | [`InCpu`], memory in one piece |
//! | those of a process | what its calls make of it: addresses for long, memory within a [`SpaceAccess`](crate::SpaceAccess) |
//!
//! A device's whole address space is exchanged for another one by [`OwnedAttachment::swap`](crate::OwnedAttachment::swap): areas at the same
//! addresses of two domains are then two contents of the same range.
//!
//! # Invariants
//!
//! An area's addresses go back when nothing is mapped there any more: after a revocation that succeeded, or never.
//!
//! # Locking
//!
//! None of its own.

mod cpu;
mod device;
mod domain;
mod fill;

pub use cpu::{Cpu, CpuSpace, InCpu};
pub use device::InDevice;
pub use domain::InDomain;
pub use fill::{Chunks, fill};

use crate::{Device, Direction, Error, OwnedDomain, SharedBuffer};
use core::fmt;
use iommu::pgtable::Leaves;

/// An address space of which ranges can be had.
pub trait Space: sealed::Space {}

impl Space for Device {}
impl Space for OwnedDomain {}
impl Space for Cpu {}

pub(crate) mod sealed {
    use super::{Direction, Error, Leaves, SharedBuffer};
    use crate::site::Site;

    pub trait Space: Clone + Send + Sync + 'static {
        /// What an area becomes that has something behind it.
        type Backed<D: Direction>;
        fn take(&self, place: Place, len: u64) -> Result<u64, Error>;
        fn give(&self, place: Place, start: u64, len: u64);
        fn back<D: Direction>(
            area: super::Area<Self>,
            buffer: &SharedBuffer,
            site: Site,
        ) -> Result<Self::Backed<D>, (super::Area<Self>, Error)>
        where
            Self: super::Space;
        fn leaves(&self, start: u64, len: u64) -> Option<Leaves>;
    }

    /// Where a range is wanted.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Place {
        Aligned(u64),
        At(u64),
    }
}

use sealed::Place;

/// A range of addresses of a space, with nothing behind it. Dropping it gives the addresses back.
#[must_use = "dropping it gives the addresses back"]
pub struct Area<S: Space> {
    space: S,
    place: Place,
    start: u64,
    len: u64,
}

/// Takes `length` bytes of addresses of `space`, a multiple of its pages, aligned to `alignment`, a power of two.
///
/// # Errors
///
/// [`Error::Iova`] where there are no such addresses; [`Error::BadSize`]; [`Error::NotIsolated`] for a device for which nothing
/// translates.
pub fn reserve<S: Space>(space: &S, length: u64, alignment: u64) -> Result<Area<S>, Error> {
    if length == 0 || !alignment.is_power_of_two() {
        return Err(Error::BadSize(length));
    }
    Area::take(space, Place::Aligned(alignment), length)
}

/// As [`reserve`], at `start`.
///
/// # Errors
///
/// As there.
pub fn reserve_at<S: Space>(space: &S, start: u64, length: u64) -> Result<Area<S>, Error> {
    if length == 0 {
        return Err(Error::BadSize(length));
    }
    Area::take(space, Place::At(start), length)
}

impl<S: Space> Area<S> {
    fn take(space: &S, place: Place, len: u64) -> Result<Self, Error> {
        Ok(Self { start: space.take(place, len)?, space: space.clone(), place, len })
    }

    /// The first address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The leaves that map it at this moment; `None` where there are no tables to look at.
    pub(crate) fn leaves(&self) -> Option<Leaves> {
        self.space.leaves(self.start, self.len)
    }

    /// Maps `buffer` here, in direction `D`: the area's size is the buffer's.
    ///
    /// # Errors
    ///
    /// The area, with the reason: [`Error::OutOfRange`] for a buffer of another size; as [`SharedBuffer::attach`], but that nothing is
    /// copied.
    #[track_caller]
    pub fn back<D: Direction>(self, buffer: &SharedBuffer) -> Result<S::Backed<D>, (Self, Error)> {
        if buffer.len() != self.len {
            let error = Error::OutOfRange { offset: 0, len: buffer.len(), size: self.len };
            return Err((self, error));
        }
        S::back(self, buffer, core::panic::Location::caller())
    }
}

impl<S: Space> Drop for Area<S> {
    fn drop(&mut self) {
        self.space.give(self.place, self.start, self.len);
    }
}

impl<S: Space> fmt::Debug for Area<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Area({:#x} bytes at {:#x})", self.len, self.start)
    }
}
