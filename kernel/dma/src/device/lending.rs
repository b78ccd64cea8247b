//! The ways on which memory goes to a device: past everything special where nothing is, through the IOMMU, past it, as a copy.

use super::how::How;
use super::loan::as_range;
use super::{Backend, Copying, Device, Inner, Kind, Loan, Refused, Special, Way};
use crate::buffer::Runs;
use crate::direct::Direct;
use crate::lent::{Segment, Segments};
use crate::record::Slot;
use crate::site::Site;
use crate::translated::Translated;
use crate::{Bounce, Error, Limits, Policy};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use iommu::{Iova, IovaRange, PAGE_SIZE, PhysRange, Prot};

impl Device {
    /// As [`Device::lend`], wherever there is room, for the device and the memory that nothing is special about: nothing is copied and
    /// no caches are maintained. `longest` says what the longest of the runs measures.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is lent.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    #[inline(always)]
    pub(crate) unsafe fn lend_quickly(
        &self,
        runs: Runs<'_>,
        longest: impl Fn() -> u64,
        len: u64,
        prot: Prot,
        mask: impl Fn(&Limits) -> u64,
        site: Site,
    ) -> Result<Loan, Refused> {
        let (inner, device) = (&*self.0, self.for_loan());
        match &inner.backend {
            Backend::Translated(translated) => {
                let limits = &inner.limits;
                let one;
                // Here, because it is in memory.
                let runs = match runs {
                    Runs::One(run) => {
                        one = [run];
                        one.as_slice()
                    }
                    Runs::All(runs) => runs,
                };
                // SAFETY: the caller's promise.
                match unsafe { translated.map_in_berth::<true>(runs, &longest, len, prot, limits, mask(limits), site) }
                {
                    // It has a berth, which keeps the device.
                    Some(Ok((iova, slot, kind))) => {
                        let how = How::new(slot, kind);
                        Ok(Loan { device, whole: Segment { iova, len }, site, how, special: None })
                    }
                    Some(Err(refused)) => Err(refused),
                    None => Err(Refused::NotKept),
                }
            }
            Backend::Direct(direct) => match runs.only() {
                Some(run) if mask(&inner.limits) >= inner.limits.address_mask => {
                    let Some(iova) = direct.near(run) else { return Err(Refused::Special) };
                    Ok(self.loan(Segment { iova, len }, How::passed(len), site))
                }
                _ => Err(Refused::Special),
            },
            _ => Err(Refused::Special),
        }
    }

    /// [`Device::lend_quickly`] through an IOMMU, where no range is kept for it on this core.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_elsewhere(
        &self,
        runs: &[PhysRange],
        longest: u64,
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Refused> {
        let Backend::Translated(translated) = &self.0.backend else { return Err(Refused::Special) };
        let limits = &self.0.limits;
        // SAFETY: the caller's promise.
        let elsewhere = unsafe { translated.map_in_berth::<false>(runs, || longest, len, prot, limits, mask, site) };
        if let Some(mapped) = elsewhere {
            let (iova, slot, kind) = mapped?;
            // It has a berth, which keeps the device.
            return Ok(self.loan(Segment { iova, len }, How::new(slot, kind), site));
        }
        // SAFETY: as above.
        let range = unsafe { translated.map_quickly(runs, longest, len, prot, limits, mask) }?;
        let slot = self.0.records.begin(range, prot, site);
        Ok(self.loan(Segment { iova: range.start(), len }, How::new(slot, Kind::Plain), site))
    }

    /// As [`Device::lend_quickly`], where nothing translates, of many runs, which are named in `segments` alone. `None` where the memory has
    /// to go another way; `segments` is empty then, as it is before.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    #[inline]
    pub(crate) unsafe fn lend_scattered(
        &self,
        runs: &[PhysRange],
        len: u64,
        segments: &mut Vec<Segment>,
        site: Site,
    ) -> Option<Loan> {
        let inner = &*self.0;
        let Backend::Direct(direct) = &inner.backend else { return None };
        let limits = &inner.limits;
        if !direct.windows.fill(runs, limits.address_mask, limits.min_align, segments).ok()? {
            return None;
        }
        let iova = segments.first()?.iova;
        Some(self.loan(Segment { iova, len }, How::passed(len), site))
    }

    /// Lends the memory of `runs`, `len` bytes: at `at`, or wherever there is room.
    ///
    /// # Safety
    ///
    /// Until a revocation of the loan has succeeded, the device may access the memory within `prot`: there is no reference to it that
    /// this would invalidate, and it is not freed.
    #[cold]
    pub(crate) unsafe fn lend(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        let mask = self.0.limits.address_mask;
        match &self.0.backend {
            Backend::SpecialTranslated(_, Some(copying)) | Backend::SpecialDirect(_, Some(copying)) => {
                copying.check(runs, &self.0.name)?;
                // SAFETY: the caller's promise, here and below.
                unsafe { self.lend_copy(at, runs, len, prot, site) }
            }
            Backend::Translated(translated) | Backend::SpecialTranslated(translated, None) => {
                // SAFETY: as above.
                unsafe { self.translate(translated, at, runs, len, prot, mask, site) }
            }
            Backend::Direct(direct) | Backend::SpecialDirect(direct, None) => {
                self.pass(direct, at, runs, len, prot, mask, site)
            }
        }
    }

    /// As [`Device::lend`], of a copy: it is not copied again.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_copy(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(at, runs, len, prot, self.0.limits.address_mask, site) }
    }

    /// As [`Device::lend`], of coherent memory, which is never copied.
    ///
    /// # Errors
    ///
    /// Also where the memory is not in the restricted pool that is the device's only memory.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_coherent(
        &self,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        self.check_restricted(runs)?;
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(None, runs, len, prot, self.0.limits.coherent_mask, site) }
    }

    /// As [`Device::lend`], of what is not memory, which is never copied.
    ///
    /// # Errors
    ///
    /// Also where a restricted pool is the device's only memory.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_peer(&self, runs: &[PhysRange], len: u64, prot: Prot, site: Site) -> Result<Loan, Error> {
        self.check_restricted(runs)?;
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(None, runs, len, prot | Prot::MMIO, self.0.limits.address_mask, site) }
    }

    /// Refuses what is not in the pool that is the device's only memory, if it has one.
    fn check_restricted(&self, runs: &[PhysRange]) -> Result<(), Error> {
        match &self.0.backend {
            Backend::SpecialTranslated(_, Some(copying)) | Backend::SpecialDirect(_, Some(copying))
                if matches!(copying, Copying::Foreign(_)) =>
            {
                copying.check(runs, &self.0.name)
            }
            _ => Ok(()),
        }
    }

    /// # Safety
    ///
    /// As [`Device::lend`].
    unsafe fn lend_below(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        match self.way() {
            // SAFETY: the caller's promise.
            Way::Translated(translated) => unsafe { self.translate(translated, at, runs, len, prot, mask, site) },
            Way::Direct(direct) => self.pass(direct, at, runs, len, prot, mask, site),
        }
    }

    /// Lends through the IOMMU.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    #[expect(clippy::too_many_arguments, reason = "what a mapping is made of")]
    unsafe fn translate(
        &self,
        translated: &Translated,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        let snooped = self.0.coherent || prot.contains(Prot::MMIO);
        let prot = if snooped { prot } else { prot | Prot::NON_COHERENT };
        let Inner { limits, name, .. } = &*self.0;
        let (range, kind) = match at {
            // SAFETY: the caller's promise is what `map` asks for.
            None => (unsafe { translated.map(runs, len, prot, limits, mask, name) }?, Kind::Plain),
            Some(iova) => {
                let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
                // SAFETY: as above.
                unsafe { translated.map_at(range, runs, prot, mask, name) }?;
                (range, Kind::Fixed)
            }
        };
        let slot = self.0.records.begin(range, prot, site);
        Ok(self.loan(Segment { iova: range.start(), len }, How::new(slot, kind), site))
    }

    /// Lends the memory of `runs`, `len` bytes, at `iova`, which the caller has reserved and keeps until the loan has ended.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_reserved(
        &self,
        iova: Iova,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        let prot = self.reserved_prot(runs, prot)?;
        let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
        // SAFETY: the caller's promise.
        unsafe { self.translated()?.map_reserved(range, runs, prot, &self.0.name) }?;
        Ok(self.loan_reserved(range, prot, site))
    }

    /// How what is linked is mapped, if it may be.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] for what the device is to have copies of only.
    pub(crate) fn reserved_prot(&self, runs: &[PhysRange], prot: Prot) -> Result<Prot, Error> {
        match &self.0.backend {
            _ if prot.contains(Prot::MMIO) => self.check_restricted(runs)?,
            Backend::SpecialTranslated(_, Some(copying)) => copying.check(runs, &self.0.name)?,
            _ => (),
        }
        let snooped = self.0.coherent || prot.contains(Prot::MMIO);
        Ok(if snooped { prot } else { prot | Prot::NON_COHERENT })
    }

    /// The loan of what has been mapped at `range`, which somebody else has reserved.
    pub(crate) fn loan_reserved(&self, range: IovaRange, prot: Prot, site: Site) -> Loan {
        let slot = self.0.records.begin(range, prot - Prot::PAGEWISE, site);
        self.loan(Segment { iova: range.start(), len: range.len() }, How::new(slot, Kind::Reserved), site)
    }

    /// Lends memory that no IOMMU translates for, and that is one segment; recorded, if there is a tracker.
    fn one(&self, segment: Segment, prot: Prot, site: Site) -> Loan {
        match self.0.records.begin_tracked(segment, prot, site) {
            Some(slot) => self.loan(segment, How::new(slot, Kind::Direct), site),
            None => self.loan(segment, How::new(Slot::COUNTED, Kind::Direct), site),
        }
    }

    /// A loan as most are.
    #[inline(always)]
    pub(super) fn loan(&self, whole: Segment, how: How, site: Site) -> Loan {
        if let Some(one) = how.counted(whole.len) {
            self.enter(one);
        }
        Loan { device: self.for_loan(), whole, site, how, special: None }
    }

    /// Takes note of the end of a loan of `whole` that nothing translated.
    #[inline(always)]
    pub(super) fn finish_direct(&self, whole: Segment, slot: Slot, mapped_at: Site, site: Site) {
        if slot != Slot::COUNTED {
            self.0.records.end(slot, as_range(whole), mapped_at, site);
        }
    }

    /// Takes note of the end of a loan at `range`, and gives its address range back. `translated` was its way.
    #[inline(always)]
    pub(super) fn finish(&self, translated: &Translated, range: IovaRange, how: How, mapped_at: Site, site: Site) {
        if how.has_berth() {
            return translated.end_in_berth(how.slot(), range, site);
        }
        self.0.records.end(how.slot(), range, mapped_at, site);
        if how.is_plain() {
            translated.release_or_keep(range);
        } else if how.is_fixed() {
            translated.release_fixed(range);
        }
    }

    /// Counts what could not be revoked.
    #[cold]
    pub(super) fn count_lost(&self, whole: Segment) {
        self.0.records.quarantined.fetch_add(whole.len / PAGE_SIZE, Ordering::Relaxed);
    }

    /// Lends memory that no IOMMU translates for.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "what a mapping is made of")]
    fn pass(
        &self,
        direct: &Direct,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        let Inner { limits, name, .. } = &*self.0;
        if at.is_some() {
            return Err(Error::NotIsolated(name.clone()));
        }
        let segments = direct.windows.segments(runs, mask, limits.min_align, name)?;
        let first = segments.as_slice().first().map(|segment| segment.iova).unwrap_or_default();
        let special = match segments {
            Segments::One(_) => None,
            Segments::Many(_) => Some(Special::new(segments)?),
        };
        let loan = self.one(Segment { iova: first, len }, prot, site);
        Ok(Loan { special, ..loan })
    }
}

impl Copying {
    /// What the policy demands.
    pub(super) fn of(policy: &Policy) -> Option<Self> {
        match policy.bounce {
            Bounce::Never | Bounce::Needed(_) => None,
            Bounce::Always(_) => Some(Self::All),
            Bounce::Restricted(pool) => Some(Self::Foreign(pool)),
        }
    }

    /// Refuses memory that is to be copied.
    pub(super) fn check(&self, runs: &[PhysRange], device: &Arc<str>) -> Result<(), Error> {
        let foreign = |run: &&PhysRange| match self {
            Self::All => true,
            Self::Foreign(pool) => !pool.covers(**run),
        };
        match runs.iter().find(foreign) {
            Some(run) => Err(Error::Unreachable { device: device.clone(), memory: *run }),
            None => Ok(()),
        }
    }
}
