//! What a device was told of memory that it has, and how that ends.

use super::Device;
use super::how::{How, Kind};
use crate::Error;
use crate::berth::Berth;
use crate::bounce::Bounced;
use crate::lazy::Strictness;
use crate::lent::{Segment, Segments};
use crate::record::{Slot, Tally};
use crate::site::Site;
use crate::translated::Translated;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem::{self, ManuallyDrop};
use iommu::contract::AddressSpace;
use iommu::{Iova, IovaError, IovaRange, MapError, Prot, RevokeError};

/// Why [`Device::lend_quickly`] did not.
pub(crate) enum Refused {
    /// There is something special: [`Device::lend`] sees to it, or says what is wrong.
    Special,
    /// No address is kept for it: [`Device::lend_elsewhere`] finds one.
    NotKept,
    /// There is no address.
    Iova(IovaError),
    /// The address space does not take it.
    Map(MapError),
}

/// The address side of a mapping: what the device was told. Small, because it moves with the memory. Ends by [`Loan::finish`] only;
/// forgetting it leaks.
pub struct Loan {
    /// Not counted ([`super::body`]): the berth or the tally keeps it until the loan has finished.
    pub(crate) device: ManuallyDrop<Device>,
    /// All of it, as one; [`Special`] has the rest to say, where there is more.
    pub(super) whole: Segment,
    pub(crate) site: Site,
    pub(super) how: How,
    pub(super) special: Option<Box<[Special; 1]>>,
}

const _: () = assert!(size_of::<Loan>() == 48);

/// What most loans do not have.
pub(super) struct Special {
    /// What the driver is told.
    segments: Segments,
    /// What the device has in place of the memory.
    copied: Option<Bounced>,
}

impl Special {
    pub(super) fn new(segments: Segments) -> Result<Box<[Self; 1]>, Error> {
        let mut one = Vec::new();
        one.try_reserve_exact(1)?;
        one.push(Self { segments, copied: None });
        // It has the one element.
        one.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)
    }
}

/// The addresses of a segment that a device was told.
#[inline(always)]
pub(super) fn as_range(segment: Segment) -> IovaRange {
    // It was made from a range, or from a bus window, whose end is an address too.
    IovaRange::new(segment.iova, segment.len).unwrap_or_default()
}

impl Loan {
    /// The same, of the device that it was made for and the place that it was made at: said once more for who knows them, so that neither is
    /// asked of the loan.
    #[inline(always)]
    pub(crate) fn made(self, device: &Device, site: Site) -> Self {
        Self { device: device.for_loan(), site, ..self }
    }

    /// The address range.
    #[inline(always)]
    pub(crate) fn range(&self) -> IovaRange {
        as_range(self.whole)
    }

    /// Where the address range begins.
    #[inline(always)]
    pub(crate) fn start(&self) -> Iova {
        self.whole.iova
    }

    /// What the driver is told.
    #[inline(always)]
    pub(crate) fn segments(&self) -> &[Segment] {
        match &self.special {
            None => core::slice::from_ref(&self.whole),
            Some(special) => special[0].segments.as_slice(),
        }
    }

    /// What the device has in place of the memory.
    #[inline(always)]
    pub(crate) fn copy(&self) -> Option<&Bounced> {
        self.special.as_ref().and_then(|special| special[0].copied.as_ref())
    }

    /// Drops all but the copy that was lent. After [`Loan::finish`], when the device may be gone.
    #[inline(always)]
    pub(crate) fn into_copy(self) -> Option<Bounced> {
        let [special] = *self.special?;
        special.copied
    }

    /// Takes nothing over of what the device writes into a copy.
    pub(crate) fn discard_copy(&mut self) {
        if let Some(copied) = self.special.as_mut().and_then(|special| special[0].copied.as_mut()) {
            copied.discard();
        }
    }

    /// Room for what makes a loan special.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub(crate) fn room() -> Result<Room, Error> {
        Special::new(Segments::default()).map(Room)
    }

    /// Names to the driver only the `len` bytes at `skip` of what was lent, and takes in the copy that was lent if it was one.
    pub(crate) fn narrow(&mut self, room: Room, skip: u64, len: u64, copied: Option<Bounced>) {
        if self.is_passed() {
            self.how = How::new(Slot::COUNTED, Kind::Direct);
        }
        let mut special = match self.special.take() {
            Some(special) => special,
            None => {
                let mut special = room.0;
                special[0].segments = Segments::One(self.whole);
                special
            }
        };
        special[0].segments.narrow(skip, len);
        special[0].copied = copied;
        self.special = Some(special);
    }

    /// The address space that it was made in; `None` where nothing translates.
    #[inline(always)]
    pub(crate) fn space(&self) -> Option<&dyn AddressSpace> {
        self.translated().map(Translated::space)
    }

    /// The way that it went; `None` where nothing translates.
    #[inline(always)]
    pub(crate) fn translated(&self) -> Option<&Translated> {
        if self.how.translates() { self.device.translated_way() } else { None }
    }

    /// Whether it is mapped by the leaf that the anchor of its berth knows.
    #[inline(always)]
    pub(crate) fn is_anchored(&self) -> bool {
        self.how.is_anchored()
    }

    /// Revokes an anchored loan, takes note of its end and makes its berth ready for the next. Called once; the
    /// loan is dropped then, or if this fails counted by [`Loan::count_lost`], and forgotten.
    ///
    /// # Errors
    ///
    /// See [`RevokeError`].
    #[inline(always)]
    pub(crate) fn end_anchored(&self, site: Site) -> Result<(), RevokeError> {
        // It was mapped by an anchor.
        let Some(way) = self.device.translated_way() else { return Err(RevokeError::Dead) };
        // SAFETY: the loan has the berth (invariant of `Kind`), and whoever has the loan is done with the device.
        unsafe { way.end_anchored(self.how.slot(), self.whole.iova, site) }
    }

    /// Lets it lapse, which is of a buffer, if it has a berth and the device has room: the berth, and what it is to be asked
    /// ([`Berths::lapse`](crate::berth::Berths::lapse)). The loan is over then, and is to be forgotten.
    #[inline(always)]
    pub(crate) fn lapse(&self, least: Strictness) -> Option<(&'static Berth, u64)> {
        let device = &self.device.0;
        if !self.how.has_berth() {
            return None;
        }
        // Where a copy was lent that has none.
        debug_assert!(self.special.is_none(), "what is special about a buffer's loan is its copy");
        // (The least there is has been asked for where there are berths for it.)
        if least > Strictness::UnlessAsked && self.device.strictness() < least {
            return None;
        }
        let (number, len) = (self.how.slot().number(), self.whole.len);
        match device.lapsing()?.lapse(number, len) {
            Some(lapsed) => Some(lapsed),
            None => device.berths.as_ref()?.lapse_slowly(number, len),
        }
    }

    /// Takes note of the loan's end, gives its address range back and stops keeping the device, after a successful revocation of it.
    /// Called once; the loan is dropped then, and its device not used any more. (After one that failed it is counted by
    /// [`Loan::count_lost`], and forgotten.)
    #[inline(always)]
    pub(crate) fn finish(&self, site: Site) {
        self.finish_by(self.translated(), site);
    }

    /// [`Loan::finish`] for who has looked up [`Loan::translated`], which costs a few instructions each time.
    #[inline(always)]
    pub(crate) fn finish_by(&self, translated: Option<&Translated>, site: Site) {
        match translated {
            Some(way) => self.device.finish(way, self.range(), self.how, self.site, site),
            None => self.device.finish_direct(self.whole, self.how.slot(), self.site, site),
        }
        self.leave();
    }

    /// Whether nothing translates for it, nothing is special about its device, and it is not recorded.
    #[inline(always)]
    pub(crate) fn is_passed(&self) -> bool {
        self.how.is_passed()
    }

    /// The end of a loan that is [passed](Loan::is_passed).
    ///
    /// # Safety
    ///
    /// It is.
    #[inline(always)]
    pub(crate) unsafe fn end_passed(self) {
        // (What makes a loan special changes its kind.)
        debug_assert!(self.is_passed() && self.special.is_none(), "a loan that is not passed");
        // SAFETY: it was entered when it was made, and nobody uses it any more.
        unsafe { self.device.leave(self.how.word()) };
        mem::forget(self);
    }

    /// Stops keeping the device: the last that happens to a loan. (One with a berth has done so when that was ready for the next.)
    #[inline(always)]
    pub(crate) fn leave(&self) {
        if let Some(one) = self.how.counted(self.whole.len) {
            // SAFETY: it was entered when it was made, and nobody uses it any more.
            unsafe { self.device.leave(one) };
        }
    }

    pub(crate) fn count_lost(&self) {
        self.device.count_lost(self.whole);
    }

    /// Makes two of it: the first `at` bytes, which are fewer than all and some, and the rest. There is nothing special about it, its
    /// range is somebody else's, and it can be revoked in these parts. On record it ends and two begin.
    pub(crate) fn split(self, at: u64, prot: Prot) -> (Self, Self) {
        let Self { device, whole, site, how, .. } = self;
        let first = Segment { iova: whole.iova, len: at };
        let second = Segment { iova: Iova::new(whole.iova.get() + at), len: whole.len - at };
        let records = &device.0.records;
        // The end first: the first part is recorded in its place.
        records.end(how.slot(), as_range(whole), site, site);
        let [slot, other] =
            [first, second].map(|segment| records.begin(as_range(segment), prot - Prot::PAGEWISE, site));
        // One more of them, and no more pages.
        device.enter(Tally::word(0));
        let second = Self { device: device.for_loan(), whole: second, site, how: how.with_slot(other), special: None };
        (Self { device, whole: first, site, how: how.with_slot(slot), special: None }, second)
    }
}

/// See [`Loan::room`].
pub(crate) struct Room(Box<[Special; 1]>);
