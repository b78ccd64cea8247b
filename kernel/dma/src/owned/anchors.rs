//! The anchors of an owned domain: where the leaves of the ranges stand in the tables that its owner has mapped last.
//!
//! Owners map the same few ranges again and again. So a domain remembers [`PLACES`] of them by their address, each with its
//! [`Anchor`]: mapping such a range is a look at its entry and a store. While it is mapped the anchor is with its guard
//! ([`super::Placed`]), so that revoking it is to clear that entry. It is a short way and nothing else: what is reserved, lost or
//! being revoked is looked for before and after as ever, and where an anchor does not map, the general way says why.
//!
//! Why that is the same as the general way:
//!
//! - The entries of an anchor are those of its range for as long as there are tables. Tables are only ever added
//!   ([`iommu::pgtable`]): a page's table is linked for good, and no block is ever put over it; when a table is linked where a block
//!   would stand, the block's entry is empty no more, and the anchor refuses from then on.
//! - It looks at its entries and then stores to them, for which nobody else may map in them meanwhile. In an owned domain nobody
//!   does while another has the turn, and an anchor is only ever mapped by who has it. (Where a table could be linked, an anchor
//!   exchanges all the same, for address spaces that others fill at other ranges.)
//! - It clears what it has mapped. That is there until then: the tables refuse to map over it, and only its guard revokes it.
//!
//! A range that finds its place taken by another's anchor goes the general way, and where that has happened [`MISSES`] times the
//! place is given to it. While a place's anchor is with a guard, nobody else gets one for that place: so there is no more of them
//! than places, and who maps many ranges at a time does not make and free one for each.
//!
//! # Locking
//!
//! The turn of the domain is what an anchor is taken with. Giving it back is a store, to a place that is out of use until then.

use alloc::boxed::Box;
use base::fallible;
use core::ptr::{null_mut, without_provenance_mut};
use core::sync::atomic::AtomicPtr;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use iommu::contract::AddressSpace;
use iommu::domain::Turn;
use iommu::pgtable::Anchor;
use iommu::{Iova, IovaRange, PAGE_SIZE};

/// Ranges that are remembered: a power of two.
const PLACES: usize = 64;

/// How often another range is asked for at a place before its anchor is given up.
const MISSES: u32 = 16;

/// An anchor that a domain remembers. It belongs to one place, to which it goes back.
pub(super) struct Remembered {
    anchor: Anchor,
    place: usize,
    /// How often something was asked for that it is not for.
    misses: u32,
}

impl Remembered {
    /// The anchor.
    #[inline(always)]
    pub(super) fn anchor(&self) -> &Anchor {
        &self.anchor
    }
}

/// The place of ranges that begin at `start`. Neighbouring pages have different ones, and so have blocks.
#[inline(always)]
fn number(start: Iova) -> usize {
    let start = start.get();
    (start >> 12 ^ start >> 21 ^ start >> 30) as usize % PLACES
}

/// The word of a place whose anchor is with a guard.
const AWAY: usize = 1;

/// Where anchors are remembered.
///
/// # Invariants
///
/// A word is null (there is no anchor), [`AWAY`] (it is with whoever has taken it, or being made), or a box's, which is the place's
/// then. From `AWAY` it is changed by who has the anchor, else by who has the turn.
pub(super) struct Anchors([AtomicPtr<Remembered>; PLACES]);

impl Anchors {
    pub(super) const fn new() -> Self {
        Self([const { AtomicPtr::new(null_mut()) }; PLACES])
    }

    #[inline(always)]
    fn place(&self, number: usize) -> &AtomicPtr<Remembered> {
        &self.0[number % PLACES]
    }

    /// Takes the anchor of `range`, if it is remembered.
    ///
    /// # Safety
    ///
    /// `turn` is of the domain that these anchors are of.
    #[inline(always)]
    pub(super) unsafe fn take(&self, range: IovaRange, _turn: &Turn<'_>) -> Option<Box<Remembered>> {
        let place = self.place(number(range.start()));
        // Acquire: what its last holder did is over, and what is in the box was written before.
        let word = place.load(Acquire);
        if word.addr() <= AWAY {
            return None;
        }
        // SAFETY: the place's (invariant), and nobody changes the place while we have the turn.
        if unsafe { &*word }.anchor.range() != range {
            return None;
        }
        place.store(without_provenance_mut(AWAY), Relaxed);
        // SAFETY: the box that was given to the place, which has it no more.
        Some(unsafe { Box::from_raw(word) })
    }

    /// Gives back what was taken or made.
    #[inline(always)]
    pub(super) fn give_back(&self, anchor: Box<Remembered>) {
        self.place(anchor.place).store(Box::into_raw(anchor), Release);
    }

    /// Gives up what was taken.
    #[cold]
    #[inline(never)]
    pub(super) fn give_up(&self, anchor: Box<Remembered>) {
        let place = self.place(anchor.place);
        drop(anchor);
        place.store(null_mut(), Release);
    }

    /// Makes an anchor for `range`, which may be mapped ([`iommu::domain::Domain::check`]), is not, and of which none is remembered, if it
    /// is one leaf of `space` and its place is not another's.
    ///
    /// # Safety
    ///
    /// As [`Self::take`].
    #[inline(never)]
    pub(super) unsafe fn make(
        &self,
        range: IovaRange,
        space: &dyn AddressSpace,
        _turn: &Turn<'_>,
    ) -> Option<Box<Remembered>> {
        let (start, len) = (range.start(), range.len());
        // Else it is no leaf.
        if !len.is_power_of_two() || len < PAGE_SIZE || !start.is_aligned(len) {
            return None;
        }
        let number = number(start);
        let place = self.place(number);
        let word = place.load(Acquire);
        if word.addr() == AWAY {
            return None;
        }
        if !word.is_null() {
            // SAFETY: the place's (invariant), and nobody else reaches into it while we have the turn.
            let other = unsafe { &mut *word };
            other.misses = other.misses.saturating_add(1);
            if other.misses < MISSES {
                return None;
            }
            place.store(null_mut(), Relaxed);
            // SAFETY: the box that was given to the place, which has it no more.
            drop(unsafe { Box::from_raw(word) });
        }
        let made = fallible::boxed(Remembered { anchor: space.anchor(range)?, place: number, misses: 0 }).ok()?;
        place.store(without_provenance_mut(AWAY), Relaxed);
        Some(made)
    }
}

impl Drop for Anchors {
    fn drop(&mut self) {
        for place in &mut self.0 {
            let word = *place.get_mut();
            if word.addr() > AWAY {
                // SAFETY: the box that was given to the place, which nobody has any more.
                drop(unsafe { Box::from_raw(word) });
            }
        }
    }
}
