//! Links that are made together, with one completion.
//!
//! [`Reservation::stage`] takes a place for memory, and nothing else: the device reaches none of it, and a [`Staged`] has no address
//! that a driver could name. [`Reservation::sync`] then makes all of them links at once: caches are maintained for all where
//! the device does not snoop, then all are mapped, and the IOMMU is told and waited for once ([`AddressSpace::sync`]), as those
//! need that remember what was not mapped, or take mappings as requests. Only then is there a [`Linked`] to be had from each.
//!
//! # Invariants
//!
//! A [`Staged`] is a [`Place::Linked`] only after a sync that covered it has returned `Ok`. Memory that may be mapped is in no
//! place from which it could be taken: after a sync that failed it has been revoked, or is lost.
//!
//! # Locking
//!
//! As for the rest of this module: none is held while mapping, syncing or revoking.
//!
//! [`AddressSpace::sync`]: iommu::contract::AddressSpace::sync

#![expect(unsafe_code, reason = "maps what it owns, and completes many mappings with one call")]

use super::{Claim, Link, Linkable, Linked, Reservation, Reserved};
use crate::device::Loan;
use crate::gather::merge;
use crate::held::{Held, prepare};
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::{Direction, Error, Rejected};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::panic::Location;
use iommu::{IovaRange, PhysRange, Prot, RevokeError};

/// What is to be linked by the next [`Reservation::sync`], in direction `D`. Dropping it gives up what it has: before the sync its
/// memory, afterwards the link.
#[must_use = "it is linked by a sync"]
pub struct Staged<D: Direction, M: Linkable> {
    place: Place<D, M>,
    site: Site,
}

enum Place<D: Direction, M: Linkable> {
    /// Not mapped.
    Waiting(Link<M>),
    Linked(Linked<D, M>),
    /// Mapped, and not to be had back.
    Lost(Quarantined),
    /// Only while it is being changed.
    Empty,
}

/// Why a [`Staged`] is not a link.
pub enum NotLinked<D: Direction, M: Linkable> {
    /// No sync has linked it.
    Waiting(Staged<D, M>),
    /// A sync has failed, and so has what was to undo it.
    Lost(Quarantined),
}

impl<D: Direction, M: Linkable> fmt::Debug for NotLinked<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting(staged) => f.debug_tuple("Waiting").field(staged).finish(),
            Self::Lost(lost) => f.debug_tuple("Lost").field(lost).finish(),
        }
    }
}

impl<D: Direction, M: Linkable> fmt::Display for NotLinked<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting(_) => f.write_str("no sync has linked it"),
            Self::Lost(lost) => fmt::Display::fmt(lost, f),
        }
    }
}

impl<D: Direction, M: Linkable> core::error::Error for NotLinked<D, M> {}

impl<D: Direction, M: Linkable> Staged<D, M> {
    /// The link, if a sync has made it.
    ///
    /// # Errors
    ///
    /// [`NotLinked`].
    pub fn linked(self) -> Result<Linked<D, M>, NotLinked<D, M>> {
        match self.place {
            Place::Linked(linked) => Ok(linked),
            Place::Lost(lost) => Err(NotLinked::Lost(lost)),
            Place::Waiting(_) | Place::Empty => Err(NotLinked::Waiting(self)),
        }
    }

    /// What was to be linked. A link that has been made is ended.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] where it is mapped and could not be revoked.
    #[track_caller]
    pub fn withdraw(self) -> Result<M, Quarantined> {
        match self.place {
            Place::Waiting(link) => Ok(link.memory),
            Place::Linked(linked) => linked.unlink(),
            Place::Lost(lost) => Err(lost),
            Place::Empty => unreachable!("a place is empty only inside of the methods that change it"),
        }
    }
}

impl<D: Direction, M: Linkable> fmt::Debug for Staged<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Waiting(link) => write!(f, "Staged(at {:#x})", link.claim.offset),
            Place::Linked(linked) => fmt::Debug::fmt(linked, f),
            Place::Lost(lost) => write!(f, "Staged({lost})"),
            Place::Empty => f.write_str("Staged"),
        }
    }
}

/// What a sync has to map.
pub struct Wanted<'a> {
    of: &'a Arc<Reserved>,
    offset: u64,
    runs: &'a [PhysRange],
    len: u64,
    prot: Prot,
}

impl Wanted<'_> {
    fn range(&self) -> Option<IovaRange> {
        self.of.range.part(self.offset, self.len)
    }
}

/// A [`Staged`] of whatever type: what [`Reservation::sync`] takes. Only this crate implements it.
pub trait Stages: sealed::Sealed {
    /// `None` where there is nothing to do any more.
    #[doc(hidden)]
    fn wanted(&self) -> Option<Wanted<'_>>;
    /// Has a device that does not snoop find what the CPU wrote.
    #[doc(hidden)]
    fn prepare(&self) -> Result<(), Error>;
    /// Makes the link of what is wanted.
    ///
    /// # Safety
    ///
    /// It is mapped as it is wanted, and that was completed.
    #[doc(hidden)]
    unsafe fn complete(&mut self);
    /// Gives up what is wanted: it may be mapped for ever.
    #[doc(hidden)]
    fn lose(&mut self, cause: RevokeError);
}

mod sealed {
    pub trait Sealed {}
    impl<D: crate::Direction, M: super::Linkable> Sealed for super::Staged<D, M> {}
    impl Sealed for &mut dyn super::Stages {}
}

impl<D: Direction, M: Linkable> Staged<D, M> {
    /// Takes what waits, and the loan of it.
    fn take(&mut self) -> Option<(Loan, Link<M>)> {
        match mem::replace(&mut self.place, Place::Empty) {
            Place::Waiting(link) => {
                let of = &link.claim.of;
                let range = of.range.part(link.claim.offset, link.memory.spans_len()).unwrap_or_default();
                let loan = of.device.loan_reserved(range, D::PROT, self.site);
                Some((loan, link))
            }
            other => {
                self.place = other;
                None
            }
        }
    }
}

impl<D: Direction, M: Linkable> Stages for Staged<D, M> {
    fn wanted(&self) -> Option<Wanted<'_>> {
        let Place::Waiting(Link { memory, claim }) = &self.place else { return None };
        let (runs, len) = (memory.spans_runs(), memory.spans_len());
        Some(Wanted { of: &claim.of, offset: claim.offset, runs, len, prot: D::PROT | M::EXTRA })
    }

    fn prepare(&self) -> Result<(), Error> {
        match &self.place {
            Place::Waiting(link) => prepare::<D, _>(link, 0, link.memory.spans_len()),
            _ => Ok(()),
        }
    }

    unsafe fn complete(&mut self) {
        if let Some((loan, link)) = self.take() {
            // SAFETY: the loan is of this memory, which is mapped there (the caller's promise) and has not been revoked.
            let held = unsafe { Held::from_parts(loan, link) };
            self.place = Place::Linked(Linked { held });
        }
    }

    fn lose(&mut self, cause: RevokeError) {
        if let Some((loan, link)) = self.take() {
            let (device, range) = (loan.device.shared_name().clone(), loan.range());
            loan.count_lost();
            // Its device may reach it for ever: neither is ever dropped.
            mem::forget((loan, link));
            let lost = Quarantined { device, range, cause, mapped_at: self.site };
            quarantine::add(&lost);
            self.place = Place::Lost(lost);
        }
    }
}

impl Stages for &mut dyn Stages {
    fn wanted(&self) -> Option<Wanted<'_>> {
        (**self).wanted()
    }
    fn prepare(&self) -> Result<(), Error> {
        (**self).prepare()
    }
    unsafe fn complete(&mut self) {
        // SAFETY: the caller's promise.
        unsafe { (**self).complete() }
    }
    fn lose(&mut self, cause: RevokeError) {
        (**self).lose(cause);
    }
}

impl Reservation {
    /// Takes byte `offset` of the reservation on, a multiple of [`Device::page_size`](crate::Device::page_size), for `memory`, which
    /// the next [`Reservation::sync`] links. Until then no device reaches it.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the memory back: [`Error::OutOfRange`] where it is not inside the reservation, [`Error::Linked`] where
    /// something is linked or staged already.
    #[track_caller]
    pub fn stage<D: Direction, M: Linkable>(&self, offset: u64, memory: M) -> Result<Staged<D, M>, Rejected<M>> {
        let site = Location::caller();
        match Claim::new(&self.0, offset, memory.spans_len()) {
            Ok(claim) => Ok(Staged { place: Place::Waiting(Link { memory, claim }), site }),
            Err(error) => Err(Rejected { buffer: memory, error }),
        }
    }

    /// Links all that is staged in `staged`, with one completion: all or nothing. What is linked in it already stays so. Of one type
    /// they are a slice of [`Staged`], of several types one of `&mut dyn Stages`.
    ///
    /// # Errors
    ///
    /// As [`Reservation::link`], and [`Error::ForeignLink`] where one is another reservation's; then nothing is linked, and all can
    /// be withdrawn, or synced again. Where some had been mapped already and could not be revoked, these are lost, as each says.
    pub fn sync<S: Stages>(&self, staged: &mut [S]) -> Result<(), Error> {
        let mut ranges = Vec::new();
        ranges.try_reserve_exact(staged.len())?;
        for wanted in staged.iter().filter_map(Stages::wanted) {
            if !Arc::ptr_eq(wanted.of, &self.0) {
                return Err(Error::ForeignLink(wanted.range().unwrap_or_default()));
            }
        }
        let device = &self.0.device;
        let translated = device.translated()?;
        translated.check_attached(device.shared_name())?;
        // Before the first of them is mapped: the device must not find there what was in memory before the CPU wrote.
        if !device.is_coherent() {
            staged.iter().try_for_each(Stages::prepare)?;
        }
        let mut map = || {
            for wanted in staged.iter().filter_map(Stages::wanted) {
                let prot = device.reserved_prot(wanted.runs, wanted.prot)?;
                let range = wanted.range().ok_or(Error::BadSize(wanted.len))?;
                // SAFETY:
                // - the memory is owned by what is staged: nobody has a reference into it (contract of Spans), and it stays so until
                //   it is revoked: it becomes a link, is revoked below, or is lost;
                // - the range is its claim's.
                unsafe { translated.space().map_unsynced(range, wanted.runs, prot) }?;
                // There is room for all.
                ranges.push(range);
            }
            Ok(())
        };
        let mapped: Result<(), Error> = map();
        let count = ranges.len();
        let ranges = merge(&mut ranges);
        let Err(error) = mapped.and_then(|()| Ok(translated.space().sync(ranges)?)) else {
            // SAFETY: all were mapped as they were wanted, and synced.
            staged.iter_mut().for_each(|staged| unsafe { staged.complete() });
            return Ok(());
        };
        if count != 0
            && let Err(cause) = translated.space().revoke(ranges)
        {
            let waiting = staged.iter_mut().filter(|staged| staged.wanted().is_some());
            waiting.take(count).for_each(|staged| staged.lose(cause));
        }
        Err(error)
    }
}
