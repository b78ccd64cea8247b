//! The way of a device's memory through an IOMMU: one contiguous range of addresses in the device's default domain, whatever
//! the memory looks like.

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space that it has by pointer")]

use crate::berth::{Berths, Taken};
use crate::buffer::longest;
use crate::device::{Kind, Refused};
use crate::record::Slot;
use crate::site::Site;
use crate::{Error, Limits, tracker};
use alloc::sync::Arc;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};
use iommu::contract::AddressSpace;
use iommu::domain::Domain;
use iommu::group::{AttachmentState, Group};
use iommu::{AttachError, Iova, IovaError, IovaRange, PAGE_SIZE, PhysAddr, PhysRange, Prot, RevokeError};

/// Pages in the largest range that the allocator of addresses keeps ready for each core.
pub(crate) const READY_PAGES: u64 = 64;

/// The way through an IOMMU. While it lives, and has not been told to leave, it is a user of the group.
pub(crate) struct Translated {
    group: Arc<Group>,
    left: AtomicBool,
    domain: Arc<Domain>,
    /// None where the tracker records every mapping by itself, and of a device that is special.
    berths: Option<Arc<Berths>>,
    space: Space,
    /// The smallest and the largest leaf of the space, in bytes.
    page_size: u64,
    largest_leaf: u64,
    output_max: PhysAddr,
}

/// The domain's address space, with its address found once: where an [`Arc`] of an unknown type has its object is a matter of that
/// type's alignment, which would be looked up and reckoned with at each use.
///
/// # Invariants
///
/// `object` is what `owner` points to.
struct Space {
    object: NonNull<dyn AddressSpace>,
    _owner: Arc<dyn AddressSpace>,
}

// SAFETY: it is a shared owner of the object, which any core may use by shared reference (supertraits of AddressSpace).
unsafe impl Send for Space {}
// SAFETY: as above.
unsafe impl Sync for Space {}

impl Space {
    fn new(owner: Arc<dyn AddressSpace>) -> Self {
        const fn any_core<T: Send + Sync + ?Sized>() {}
        const { any_core::<dyn AddressSpace>() };
        // INVARIANT: an Arc's object stays where it is while there is an owner.
        Self { object: NonNull::from(&*owner), _owner: owner }
    }

    #[inline(always)]
    fn get(&self) -> &dyn AddressSpace {
        // SAFETY: the object lives as long as its owner does, which lives as long as the borrow (invariant), and is only ever reached
        // by shared reference.
        unsafe { self.object.as_ref() }
    }
}

impl Translated {
    /// The way of a group that is attached to its default DMA domain. `plain`: of a device that nothing is special about.
    pub(crate) fn new(group: Arc<Group>, device: &Arc<str>, plain: bool) -> Result<Self, Error> {
        let Some(domain) = group.domain() else { return Err(not_attached(group.current(), device)) };
        let space = Space::new(domain.space().clone());
        let aperture = space.get().aperture();
        let largest_leaf = 1 << (63 - aperture.page_sizes.max(PAGE_SIZE).leading_zeros());
        let page_size = aperture.page_size().max(PAGE_SIZE);
        let berths = if tracker::is_on() || !plain { None } else { Some(Berths::new(domain.clone(), device.clone())?) };
        group.enter();
        Ok(Self {
            berths,
            group,
            left: AtomicBool::new(false),
            domain,
            space,
            page_size,
            largest_leaf,
            output_max: aperture.output_max,
        })
    }

    pub(crate) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Whether the device uses its group no more.
    pub(crate) fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    /// Stops being a user of the group, which is blocked if there is no other.
    pub(crate) fn leave(&self) -> Result<(), AttachError> {
        if self.left.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // From here on all ask for more than the group's state.
        if let Some(berths) = &self.berths {
            berths.close();
        }
        self.group.leave().map(drop)
    }

    #[inline(always)]
    pub(crate) fn space(&self) -> &dyn AddressSpace {
        self.space.get()
    }

    /// The largest physical address that the space can put out.
    pub(crate) fn output_max(&self) -> PhysAddr {
        self.output_max
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Bytes of addresses that there are at most, none above `mask`.
    pub(crate) fn largest(&self, mask: u64) -> u64 {
        let window = self.domain.iova().window();
        window.end().get().min(mask.saturating_add(1)).saturating_sub(window.start().get())
    }

    /// Maps `runs` at one contiguous range, no byte of it above `mask`.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    pub(crate) unsafe fn map(
        &self,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        limits: &Limits,
        mask: u64,
        device: &Arc<str>,
    ) -> Result<IovaRange, Error> {
        // A change of attachment right after this look is harmless: the mapping is then made in an address space that the
        // device is not attached to.
        self.check_attached(device)?;
        let align = self.align(|| longest(runs), len, limits);
        let range = self.domain.iova().allocate(len, align, Iova::new(mask))?;
        // SAFETY: the caller's promise.
        match unsafe { self.space().map(range, runs, prot) } {
            Ok(()) => Ok(range),
            Err(error) => {
                self.release(range);
                Err(error.into())
            }
        }
    }

    /// As [`Translated::map`], for the way that is taken again and again: at a range that has a berth, which is ready on this core (`HERE`)
    /// or on another. `None` where there is none.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "what a mapping is made of")]
    pub(crate) unsafe fn map_in_berth<const HERE: bool>(
        &self,
        runs: &[PhysRange],
        longest: impl Fn() -> u64,
        len: u64,
        prot: Prot,
        limits: &Limits,
        mask: u64,
        site: Site,
    ) -> Option<Result<(Iova, Slot, Kind), Refused>> {
        // As in `map`. A device that has left has no berths.
        if !self.group.is_in_default() {
            return Some(Err(Refused::Special));
        }
        let (berths, run) = (self.berths.as_deref()?, matches!(runs, [_]));
        let align = || self.align(&longest, len, limits);
        let taken = match HERE {
            true => berths.take(len, mask, run, align),
            false => berths.take_elsewhere(len, mask, run, align()),
        }?;
        if let Some(anchor) = taken.anchor
            && let [run] = runs
            // SAFETY: the caller's promise; nobody else has the range.
            && unsafe { anchor.map(*run, prot) }
        {
            taken.berth.entry.begin(taken.start, prot, site);
            return Some(Ok((taken.start, Slot::of(taken.berth.number()), Kind::Anchored)));
        }
        // SAFETY: the caller's promise.
        Some(unsafe { self.map_at_berth(berths, taken, len, runs, prot, site) })
    }

    /// Maps what is no single leaf at a range that has a berth.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    #[inline(never)]
    unsafe fn map_at_berth(
        &self,
        berths: &Berths,
        taken: Taken<'_>,
        len: u64,
        runs: &[PhysRange],
        prot: Prot,
        site: Site,
    ) -> Result<(Iova, Slot, Kind), Refused> {
        let Taken { berth, start, .. } = taken;
        let range = IovaRange::new(start, len).unwrap_or_default();
        // SAFETY: the caller's promise; nobody else has the range.
        match unsafe { self.space().map(range, runs, prot) } {
            Ok(()) => {
                berth.entry.begin(start, prot, site);
                Ok((start, Slot::of(berth.number()), Kind::Berthed))
            }
            Err(error) => {
                berths.put_back(berth);
                Err(Refused::Map(error))
            }
        }
    }

    /// Revokes what was mapped at the anchor of a berth, and takes note of its end.
    ///
    /// # Safety
    ///
    /// The caller has the berth, and has it no more if this succeeds.
    #[inline(always)]
    pub(crate) unsafe fn end_anchored(&self, slot: Slot, start: Iova, site: Site) -> Result<(), RevokeError> {
        // Who has mapped there had them.
        let Some(berths) = self.berths.as_deref() else { return Err(RevokeError::Dead) };
        let berth = berths.berth(slot.number());
        // SAFETY: the caller's promise.
        let Some(anchor) = (unsafe { berth.anchor() }) else { return Err(RevokeError::Dead) };
        // SAFETY: the berths of this device have anchors of its space only.
        unsafe { self.space().revoke_anchored(anchor) }?;
        berths.end(berth, start, site);
        Ok(())
    }

    /// Takes note of the end of a mapping that had a berth, after its revocation.
    #[inline(always)]
    pub(crate) fn end_in_berth(&self, slot: Slot, range: IovaRange, site: Site) {
        if let Some(berths) = &self.berths {
            berths.end(berths.berth(slot.number()), range.start(), site);
        }
    }

    /// The ranges that are kept for this device.
    pub(crate) fn berths(&self) -> Option<&Arc<Berths>> {
        self.berths.as_ref()
    }

    /// As [`Translated::map`], wherever there is room, for what nothing is special about.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    #[inline(never)]
    pub(crate) unsafe fn map_quickly(
        &self,
        runs: &[PhysRange],
        longest: u64,
        len: u64,
        prot: Prot,
        limits: &Limits,
        mask: u64,
    ) -> Result<IovaRange, Refused> {
        // As there.
        if !self.is_attached() {
            return Err(Refused::Special);
        }
        let longest = || longest;
        let align = self.align(longest, len, limits);
        let range = match self.domain.iova().allocate(len, align, Iova::new(mask)) {
            Ok(range) => range,
            Err(error) => return Err(Refused::Iova(error)),
        };
        // SAFETY: the caller's promise.
        match unsafe { self.space().map(range, runs, prot) } {
            Ok(()) => Ok(range),
            Err(error) => {
                self.release_unused(range);
                Err(Refused::Map(error))
            }
        }
    }

    /// Maps `runs` at `range`, which the allocator is kept from; no byte of it may be above `mask`.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    pub(crate) unsafe fn map_at(
        &self,
        range: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
        mask: u64,
        device: &Arc<str>,
    ) -> Result<(), Error> {
        self.check_attached(device)?;
        if range.end().get() - 1 > mask {
            return Err(Error::Iova(IovaError::OutOfWindow(range)));
        }
        self.domain.iova().reserve(range)?;
        // SAFETY: the caller's promise.
        unsafe { self.space().map(range, runs, prot) }.map_err(|error| {
            self.release_fixed(range);
            error.into()
        })
    }

    /// Maps `runs` at `range`, which somebody has reserved.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`].
    pub(crate) unsafe fn map_reserved(
        &self,
        range: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
        device: &Arc<str>,
    ) -> Result<(), Error> {
        self.check_attached(device)?;
        // SAFETY: the caller's promise.
        Ok(unsafe { self.space().map(range, runs, prot) }?)
    }

    /// Takes `len` bytes of addresses, aligned for large leaves as far as that is free to choose.
    pub(crate) fn reserve(&self, len: u64, align: u64, limits: &Limits) -> Result<IovaRange, Error> {
        let leaf = (1_u64 << len.max(1).ilog2()).min(self.largest_leaf);
        let least = self.page_size.max(limits.min_align).max(align);
        let limit = Iova::new(limits.address_mask);
        let iova = self.domain.iova();
        match iova.allocate(len, least.max(leaf), limit) {
            Err(IovaError::NoSpace { .. }) if leaf > least => Ok(iova.allocate(len, least, limit)?),
            result => Ok(result?),
        }
    }

    /// Takes exactly `range`.
    pub(crate) fn reserve_at(&self, range: IovaRange, limits: &Limits) -> Result<(), Error> {
        if range.is_empty() || range.end().get() - 1 > limits.address_mask {
            return Err(Error::Iova(IovaError::OutOfWindow(range)));
        }
        if !range.start().is_aligned(limits.min_align) {
            return Err(Error::Iova(IovaError::Misaligned(limits.min_align)));
        }
        Ok(self.domain.iova().reserve(range)?)
    }

    #[inline(always)]
    fn is_attached(&self) -> bool {
        self.group.is_in_default() && !self.has_left()
    }

    pub(crate) fn check_attached(&self, device: &Arc<str>) -> Result<(), Error> {
        if self.is_attached() { Ok(()) } else { Err(self.why_not_attached(device)) }
    }

    #[cold]
    fn why_not_attached(&self, device: &Arc<str>) -> Error {
        match self.group.current() {
            // It has left, or the group has just come back.
            AttachmentState::Default => not_attached(AttachmentState::Blocked, device),
            state => not_attached(state, device),
        }
    }

    /// The alignment of a DMA address for memory whose longest run has so many bytes: what the device demands, and what lets leaves be
    /// large.
    #[inline(always)]
    fn align(&self, longest: impl FnOnce() -> u64, len: u64, limits: &Limits) -> u64 {
        let least = self.page_size.max(limits.min_align);
        if len <= self.page_size {
            return least;
        }
        let align = least.max((1 << longest().max(1).ilog2()).min(self.largest_leaf));
        match limits.boundary {
            // What is not longer than the boundary does not cross it.
            Some(boundary) => align.max(len.checked_next_power_of_two().unwrap_or(boundary).min(boundary)),
            None => align,
        }
    }

    /// Gives an address range back, after its revocation; keeps it for this device, if there is room.
    #[inline(never)]
    pub(crate) fn release_or_keep(&self, range: IovaRange) {
        if !self.keep(range) {
            self.release(range);
        }
    }

    /// Keeps an address range for this device, after its revocation, if there is room. `false`: it is to be given back.
    pub(crate) fn keep(&self, range: IovaRange) -> bool {
        self.berths.as_ref().is_some_and(|berths| berths.moor(range, self.space()))
    }

    /// Gives an address range back, after its revocation.
    #[inline]
    pub(crate) fn release(&self, range: IovaRange) {
        if let Err(error) = self.domain.iova().recycle(range) {
            lost(range, &error);
        }
    }

    /// Gives back an address range in which nothing was mapped.
    #[cold]
    fn release_unused(&self, range: IovaRange) {
        self.release(range);
    }

    /// Gives a range that was mapped where its driver wanted it back to the allocator, after its revocation.
    #[cold]
    pub(crate) fn release_fixed(&self, range: IovaRange) {
        if let Err(error) = self.domain.iova().release(range) {
            lost(range, &error);
        }
    }
}

impl Drop for Translated {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            log::error!("dma: a group could not be blocked when its last device was given up: {error}");
        }
    }
}

#[cold]
fn lost(range: IovaRange, error: &IovaError) {
    log::error!("dma: address range {range} is lost: {error}");
}

fn not_attached(state: AttachmentState, name: &Arc<str>) -> Error {
    match state {
        AttachmentState::Owned => Error::OwnedDomain(name.clone()),
        _ => Error::NotAttached { device: name.clone(), state },
    }
}
