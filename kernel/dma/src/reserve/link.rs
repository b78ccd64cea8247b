//! What is linked into a reservation, and the links.

#![expect(unsafe_code, reason = "promises that the memory of a link is what was linked")]

use super::{Claim, Part};
use crate::buffer::{Span, Spans};
use crate::device::Loan;
use crate::gather::{Endable, Parts};
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::DmaMemory;
use crate::quarantine::Quarantined;
use crate::{Buffer, DeviceReads, DeviceWrites, Direction, Error, PageSet, Pages, PeerRange, Rejected, View};
use core::fmt;
use core::panic::Location;
use iommu::{Iova, IovaRange, PhysRange, Prot};

/// What can be linked into a [`Reservation`](super::Reservation): memory, a [`Part`] of memory, or what another device has on the
/// bus ([`PeerRange`]). Only this crate implements it.
pub trait Linkable: Spans + Sized + 'static {
    /// How it is mapped, beyond its direction.
    #[doc(hidden)]
    const EXTRA: Prot;
}

impl Linkable for Pages {
    const EXTRA: Prot = Prot::empty();
}
impl Linkable for PageSet {
    const EXTRA: Prot = Prot::empty();
}
impl Linkable for PeerRange {
    const EXTRA: Prot = Prot::MMIO;
}
impl<M: Linkable> Linkable for Part<M> {
    const EXTRA: Prot = M::EXTRA.union(Prot::PAGEWISE);
}

/// What is linked, and its place.
pub struct Link<M> {
    pub(super) memory: M,
    pub(super) claim: Claim,
}

// SAFETY: all are those of the memory, which this owns and makes no reference into; forgotten, it forgets the memory.
unsafe impl<M: Linkable> Spans for Link<M> {
    fn spans_runs(&self) -> &[PhysRange] {
        self.memory.spans_runs()
    }
    fn spans_len(&self) -> u64 {
        self.memory.spans_len()
    }
    fn span(&self, offset: u64) -> Option<Span> {
        self.memory.span(offset)
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        self.memory.maintained_by()
    }
}

/// What a device has at its place in a [`Reservation`](super::Reservation), in direction `D`. [`Linked::unlink`] and dropping it
/// revoke.
#[must_use = "dropping a link ends it"]
pub struct Linked<D: Direction, M: Linkable> {
    pub(super) held: Held<D, Link<M>>,
}

impl<D: Direction, M: Linkable> Linked<D, M> {
    /// The device's address of the first byte.
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// Where in the reservation it is, in bytes.
    pub fn offset(&self) -> u64 {
        self.held.memory().claim.offset
    }

    pub(super) fn range(&self) -> IovaRange {
        self.held.loan().range()
    }

    /// Revokes the device's access and gives back what was linked, with what the device wrote. The addresses stay reserved. Many
    /// links end with one completion in a [`Gather`](crate::Gather).
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: what was linked is lost, and the reservation never ends.
    #[track_caller]
    pub fn unlink(self) -> Result<M, Quarantined> {
        self.held.take_back(Location::caller()).map(|link| link.memory)
    }
}

impl<D: Direction, M: Linkable + Buffer> Linked<D, M> {
    /// Looks at the memory while the device has it: see [`Mapped::view`](crate::Mapped::view).
    pub fn view(&self) -> View<'_, D, Link<M>> {
        View::new(self.held.memory())
    }
}

impl<D: DeviceWrites, M: Linkable + Buffer> Linked<D, M> {
    /// Lets the CPU see what the device has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_cpu(offset, len)
    }
}

impl<D: DeviceReads, M: Linkable + Buffer> Linked<D, M> {
    /// Lets the device see what the CPU has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.held.sync_for_device(offset, len)
    }
}

/// A link in up to three: what [`Linked::carve`] makes. The device notices nothing of it.
#[must_use = "dropping links ends them"]
pub struct Carved<D: Direction, M: Linkable> {
    /// What lies before the part.
    pub before: Option<Linked<D, Part<M>>>,
    /// The part.
    pub part: Linked<D, Part<M>>,
    /// What lies behind it.
    pub after: Option<Linked<D, Part<M>>>,
}

impl<D: Direction, M: Linkable> fmt::Debug for Carved<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { before, part, after } = self;
        f.debug_struct("Carved").field("before", before).field("part", part).field("after", after).finish()
    }
}

impl<D: Direction, M: Linkable> Linked<D, Part<M>> {
    /// Makes a link of its own of the `len` bytes at `offset`, whole pages of the device's
    /// ([`Device::page_size`](crate::Device::page_size)): to be unlinked while the rest stays, alone or with other parts and links in a
    /// [`Gather`](crate::Gather).
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the link back as it was: [`Error::OutOfRange`], [`Error::BadSize`] for no bytes or no whole pages,
    /// [`Error::OutOfMemory`].
    pub fn carve(self, offset: u64, len: u64) -> Result<Carved<D, M>, Rejected<Self>> {
        let (size, mask) = (self.held.memory().spans_len(), self.device().page_size() - 1);
        let end = match offset.checked_add(len) {
            Some(end) if end > size => Err(Error::OutOfRange { offset, len, size }),
            Some(end) if len != 0 && (offset | len) & mask == 0 => Ok(end),
            Some(_) => Err(Error::BadSize(len)),
            None => Err(Error::OutOfRange { offset, len, size }),
        };
        let link = self.held.memory();
        // What may fail comes first, and changes nothing if it does.
        let ready = end.and_then(|end| {
            let runs = link.memory.cut([0..offset, offset..end, end..size])?;
            link.claim.divide([offset, end])?;
            Ok((end, runs))
        });
        let (end, [before_runs, runs, after_runs]) = match ready {
            Ok(ready) => ready,
            Err(error) => return Err(Rejected { buffer: self, error }),
        };
        // SAFETY: loan and memory are cut in the same places, and each piece is put together again below; nothing comes between.
        let (loan, Link { memory, claim }) = unsafe { self.held.into_parts() };
        let (before, rest) =
            if offset == 0 { (None, loan) } else { some_first(loan.split(offset, D::PROT | M::EXTRA)) };
        let (loan, after) = if end == size { (rest, None) } else { some_second(rest.split(len, D::PROT | M::EXTRA)) };
        let after = after.map(|loan| Self::piece(loan, memory.piece(end..size, after_runs), claim.at(end)));
        let (before, claim) = match before {
            Some(loan) => {
                let rest = claim.at(offset);
                (Some(Self::piece(loan, memory.piece(0..offset, before_runs), claim)), rest)
            }
            None => (None, claim),
        };
        Ok(Carved { before, part: Self::piece(loan, memory.piece(offset..end, runs), claim), after })
    }

    /// A piece of a link that was taken apart.
    fn piece(loan: Loan, memory: Part<M>, claim: Claim) -> Self {
        // SAFETY: by the only caller, above: the loan is of the addresses at which this part of the memory lies, and it has not
        // been revoked.
        let held = unsafe { Held::from_parts(loan, Link { memory, claim }) };
        Self { held }
    }
}

fn some_first<T>((first, second): (T, T)) -> (Option<T>, T) {
    (Some(first), second)
}

fn some_second<T>((first, second): (T, T)) -> (T, Option<T>) {
    (first, Some(second))
}

impl<D: Direction, M: Linkable> Parts for Linked<D, M> {
    type Direction = D;
    type Memory = Link<M>;
    fn into_held(self) -> Held<D, Link<M>> {
        self.held
    }
}

impl<D: Direction, M: Linkable> Endable for Linked<D, M> {
    type Back = M;
    fn back(link: Link<M>) -> M {
        link.memory
    }
}

lent_by_held!([D: Direction, M: Linkable] Linked<D, M>, D, |this| this.held.memory().spans_len());

impl<D: Direction, M: Linkable> fmt::Debug for Linked<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linked({} at {}, {:?})", self.device().name(), self.range(), D::PROT)
    }
}
