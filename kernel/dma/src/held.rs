//! Memory together with its loan: the one place where memory goes to a device and comes back.
//!
//! # Invariants
//!
//! From [`Held::lend`] until a revocation has succeeded, the memory is reachable by the device, owned by the [`Held`], and
//! nobody has a reference into it. Whoever forgets a [`Held`] leaks the memory and the loan, and nothing else.

#![expect(unsafe_code, reason = "lends memory that it owns, and takes it back after revocation")]

use crate::bounce;
use crate::buffer::{Runs, Spans, check_range, for_each_span};
use crate::device::{Loan, Refused};
use crate::lent::Segment;
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::words::by_words;
use crate::{Device, Direction, Error, Limits};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use iommu::{Iova, PhysRange, Prot, RevokeError};

/// Memory `M` that a device has, in direction `D`. Dropping it revokes.
pub struct Held<D: Direction, M: Spans> {
    loan: ManuallyDrop<Loan>,
    memory: ManuallyDrop<M>,
    direction: PhantomData<D>,
}

impl<D: Direction, M: Spans> Held<D, M> {
    /// Lends `memory`.
    #[inline(always)]
    pub(crate) fn lend(device: &Device, memory: M, site: Site) -> Result<Self, (M, Error)> {
        Self::lend_as(device, memory, Prot::empty(), site)
    }

    /// Lends `memory` with more attributes than its direction's.
    #[inline(always)]
    pub(crate) fn lend_as(device: &Device, memory: M, extra: Prot, site: Site) -> Result<Self, (M, Error)> {
        let memory = by_words(memory);
        let (len, mask) = (memory.spans_len(), |limits: &Limits| limits.address_mask);
        // SAFETY: as in `lend_slowly`.
        match unsafe { Self::quickly(device, &memory, len, D::PROT | extra, mask, site) } {
            Ok(loan) => Ok(Self::of(loan, memory)),
            Err(refused) => {
                // An object that is referred to here, or that this wrote, would be in memory on the quick way too, and moved from
                // place to place: another object, which is not there on the quick way.
                let memory = memory;
                match Self::not_quickly(device, &memory, extra, site, refused) {
                    Ok(loan) => Ok(Self::of(loan.made(device, site), memory)),
                    Err(error) => Err((memory, error)),
                }
            }
        }
    }

    /// [`Device::lend_quickly`].
    ///
    /// # Safety
    ///
    /// As there.
    #[inline(always)]
    unsafe fn quickly(
        device: &Device,
        memory: &M,
        len: u64,
        prot: Prot,
        mask: impl Fn(&Limits) -> u64,
        site: Site,
    ) -> Result<Loan, Refused> {
        let longest = || memory.only_run().map_or_else(|| memory.longest_run(), |run| run.len());
        // SAFETY: the caller's promise.
        unsafe { device.lend_quickly(Runs::of(memory), longest, len, prot, mask, site) }
    }

    /// Lends `memory`, which is in many runs: `of` shows them, and their bytes in sum. Where nothing translates they may be named in the
    /// segments that it shows, which are none, and by the loan as one: for who has no use for what the loan names.
    #[inline]
    pub(crate) fn lend_scattered(
        device: &Device,
        mut memory: M,
        of: impl FnOnce(&mut M) -> Option<(&[PhysRange], u64, &mut Vec<Segment>)>,
        site: Site,
    ) -> Result<Self, (M, Error)> {
        // SAFETY: as in `lend_slowly`.
        let lend = |(runs, len, segments)| unsafe { device.lend_scattered(runs, len, segments, site) };
        match of(&mut memory).and_then(lend) {
            Some(loan) => Ok(Self::of(loan, memory)),
            None => Self::lend(device, memory, site),
        }
    }

    /// Lends `memory` at an address that is not kept for it, if that is what the quick way was refused for.
    ///
    /// # Errors
    ///
    /// Why not, or why the quick way was refused.
    #[inline(never)]
    fn elsewhere(
        device: &Device,
        memory: &M,
        prot: Prot,
        mask: u64,
        site: Site,
        refused: Refused,
    ) -> Result<Loan, Refused> {
        let Refused::NotKept = refused else { return Err(refused) };
        let (runs, longest) = (memory.spans_runs(), memory.longest_run());
        // SAFETY: as in `lend_slowly`.
        unsafe { device.lend_elsewhere(runs, longest, memory.spans_len(), prot, mask, site) }
    }

    #[cold]
    #[inline(never)]
    fn not_quickly(device: &Device, memory: &M, extra: Prot, site: Site, refused: Refused) -> Result<Loan, Error> {
        let mask = device.limits().address_mask;
        let refused = match Self::elsewhere(device, memory, D::PROT | extra, mask, site, refused) {
            Ok(loan) => return Ok(loan),
            Err(refused) => refused,
        };
        match refused {
            Refused::Special | Refused::NotKept => Self::lend_slowly(device, None, memory, extra, site),
            Refused::Iova(error) => bounce::lend::<D, M>(device, None, memory, site, error.into()),
            Refused::Map(error) => bounce::lend::<D, M>(device, None, memory, site, error.into()),
        }
    }

    /// Lends `memory`, at a fixed address if there is one.
    #[cold]
    pub(crate) fn lend_at(device: &Device, at: Option<Iova>, memory: M, site: Site) -> Result<Self, (M, Error)> {
        match Self::lend_slowly(device, at, &memory, Prot::empty(), site) {
            Ok(loan) => Ok(Self::of(loan, memory)),
            Err(error) => Err((memory, error)),
        }
    }

    /// Lends what is the caller's, and goes into a [`Held`] if this succeeds; or a copy, where that helps.
    fn lend_slowly(device: &Device, at: Option<Iova>, memory: &M, extra: Prot, site: Site) -> Result<Loan, Error> {
        let len = memory.spans_len();
        if !device.is_coherent() {
            prepare::<D, M>(memory, 0, len)?;
        }
        // SAFETY:
        // - `memory` is owned by the caller: nobody has a reference into it (contract of Spans), and from here on it is reached
        //   through atomics only, until `take_back` or a drop has revoked the loan;
        // - it is not freed before that either: if the revocation fails, it is forgotten.
        match unsafe { device.lend(at, memory.spans_runs(), len, D::PROT | extra, site) } {
            Ok(loan) => Ok(loan),
            Err(error) => bounce::lend::<D, M>(device, at, memory, site, error),
        }
    }

    /// Lends memory that is shared for good: never a copy of it, and within the device's limits for such memory. Memory that cannot
    /// be lent is freed.
    #[inline(always)]
    pub(crate) fn lend_coherent(device: &Device, memory: M, extra: Prot, site: Site) -> Result<Self, Error> {
        let (len, mask) = (memory.spans_len(), |limits: &Limits| limits.coherent_mask);
        // SAFETY: as in `lend_slowly`.
        match unsafe { Self::quickly(device, &memory, len, D::PROT | extra, mask, site) } {
            Ok(loan) => Ok(Self::of(loan, memory)),
            Err(refused) => {
                // As in `lend_as`.
                let memory = memory;
                let loan = Self::coherent_not_quickly(device, &memory, D::PROT | extra, site, refused)?;
                Ok(Self::of(loan.made(device, site), memory))
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn coherent_not_quickly(
        device: &Device,
        memory: &M,
        prot: Prot,
        site: Site,
        refused: Refused,
    ) -> Result<Loan, Error> {
        let mask = device.limits().coherent_mask;
        let refused = match Self::elsewhere(device, memory, prot, mask, site, refused) {
            Ok(loan) => return Ok(loan),
            Err(refused) => refused,
        };
        match refused {
            // SAFETY: as in `lend_slowly`.
            Refused::Special | Refused::NotKept => unsafe {
                device.lend_coherent(memory.spans_runs(), memory.spans_len(), prot, site)
            },
            Refused::Iova(error) => Err(error.into()),
            Refused::Map(error) => Err(error.into()),
        }
    }

    /// Lends `memory` with more attributes than its direction's at `iova`, which the caller has reserved for it until the loan has ended.
    pub(crate) fn lend_reserved(
        device: &Device,
        iova: Iova,
        memory: M,
        extra: Prot,
        site: Site,
    ) -> Result<Self, (M, Error)> {
        let len = memory.spans_len();
        if !device.is_coherent()
            && let Err(error) = prepare::<D, M>(&memory, 0, len)
        {
            return Err((memory, error));
        }
        // SAFETY: as in `lend_at`.
        match unsafe { device.lend_reserved(iova, memory.spans_runs(), len, D::PROT | extra, site) } {
            Ok(loan) => Ok(Self::of(loan, memory)),
            Err(error) => Err((memory, error)),
        }
    }

    /// What a loan was made of, or of a copy of which.
    #[inline(always)]
    pub(crate) fn of(loan: Loan, memory: M) -> Self {
        Self { loan: ManuallyDrop::new(loan), memory: ManuallyDrop::new(memory), direction: PhantomData }
    }

    #[inline]
    pub(crate) fn loan(&self) -> &Loan {
        &self.loan
    }

    #[inline]
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    /// For what it knows about the loan; the bytes are out of its reach as ever.
    pub(crate) fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// As [`Held::memory_mut`], beside the loan.
    #[inline]
    pub(crate) fn parts_mut(&mut self) -> (&Loan, &mut M) {
        (&self.loan, &mut self.memory)
    }

    /// Whether the device has a copy.
    pub(crate) fn is_copy(&self) -> bool {
        self.loan.copy().is_some()
    }

    /// Takes nothing over of what the device writes, if it has a copy.
    pub(crate) fn discard_copy(&mut self) {
        self.loan.discard_copy();
    }

    /// Revokes, and gives the memory back.
    #[inline(always)]
    pub(crate) fn take_back(self, site: Site) -> Result<M, Quarantined> {
        // SAFETY: `end` keeps it until it is revoked.
        let (loan, memory) = unsafe { self.into_parts() };
        // SAFETY: the two belong together, and nobody else has revoked the loan.
        unsafe { Self::end(loan, memory, site) }
    }

    /// Takes loan and memory apart.
    ///
    /// # Safety
    ///
    /// The device reaches the memory until the loan has been revoked: until then the memory is neither reached but by atomics
    /// nor dropped.
    #[inline(always)]
    pub(crate) unsafe fn into_parts(self) -> (Loan, M) {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped and not used afterwards.
        let loan = unsafe { ManuallyDrop::take(&mut this.loan) };
        // SAFETY: as above.
        let memory = unsafe { ManuallyDrop::take(&mut this.memory) };
        (loan, memory)
    }

    /// Puts together what [`Held::into_parts`] took apart.
    ///
    /// # Safety
    ///
    /// The two belong together, and the loan has not been revoked.
    #[inline]
    pub(crate) unsafe fn from_parts(loan: Loan, memory: M) -> Self {
        Self { loan: ManuallyDrop::new(loan), memory: ManuallyDrop::new(memory), direction: PhantomData }
    }

    /// Gives the memory back after a revocation that somebody else has carried out.
    ///
    /// # Safety
    ///
    /// `outcome` is `Ok` only if a revocation of all of the loan's range in the loan's address space has returned `Ok` since
    /// the memory was lent (or the loan has no address space).
    #[inline]
    pub(crate) unsafe fn settle(self, outcome: Result<(), RevokeError>, site: Site) -> Result<M, Quarantined> {
        // SAFETY: `conclude` drops it only if it has been revoked.
        let (loan, memory) = unsafe { self.into_parts() };
        let (loan, memory) = (ManuallyDrop::new(loan), ManuallyDrop::new(memory));
        if let Err(cause) = outcome {
            // Objects of their own, which are not there on the quick way (see `lend_as`).
            let (loan, mut memory) = (loan, memory);
            // SAFETY: they are gone.
            return Err(unsafe { Self::lose(&loan, &mut memory, cause) });
        }
        // Before the device may be gone.
        let coherent = loan.device.is_coherent();
        loan.finish(site);
        // SAFETY: the two belong together; it has been revoked, as the caller promises, and the loan has finished.
        Ok(unsafe { Self::conclude(loan, memory, coherent) })
    }

    /// # Safety
    ///
    /// The two belong together, and the loan has not been revoked.
    #[inline(always)]
    unsafe fn end(loan: Loan, memory: M, site: Site) -> Result<M, Quarantined> {
        // Neither is dropped before the outcome is known, whatever happens.
        let (loan, memory) = (ManuallyDrop::new(loan), ManuallyDrop::new(memory));
        // Looked up once: after a call nothing is known of what lies behind a reference. Errors go nowhere but to where they are dealt
        // with: an outcome that is handed on is written to memory again.
        if loan.is_anchored() {
            let memory = by_words(memory);
            if let Err(cause) = loan.end_anchored(site) {
                // Objects of their own, which are not there on the quick way (see `lend_as`).
                let (loan, mut memory) = (loan, memory);
                // SAFETY: they are gone.
                return Err(unsafe { Self::lose(&loan, &mut memory, cause) });
            }
            // SAFETY: the caller's promise; it has been revoked, and has finished. A device that has berths snoops.
            return Ok(unsafe { Self::conclude(loan, memory, true) });
        }
        if loan.is_passed() {
            // SAFETY: it was lent so; nobody uses the loan any more.
            unsafe { ManuallyDrop::into_inner(loan).end_passed() };
            if D::DEVICE_WRITES {
                base::barrier::device_read();
            }
            return Ok(ManuallyDrop::into_inner(memory));
        }
        let memory = by_words(memory);
        let translated = loan.translated();
        if let Some(way) = translated
            && let Err(cause) = way.space().revoke(&[loan.range()])
        {
            let (loan, mut memory) = (loan, memory);
            // SAFETY: as above.
            return Err(unsafe { Self::lose(&loan, &mut memory, cause) });
        }
        // As in `settle`.
        let coherent = loan.device.is_coherent();
        loan.finish_by(translated, site);
        // SAFETY: the caller's promise; it has been revoked, and has finished.
        Ok(unsafe { Self::conclude(loan, memory, coherent) })
    }

    /// Everything by value: what the rare ways refer to would have to be in memory on all of them.
    ///
    /// # Safety
    ///
    /// The two belong together, the loan has been revoked and has finished.
    #[inline(always)]
    unsafe fn conclude(loan: ManuallyDrop<Loan>, memory: ManuallyDrop<M>, coherent: bool) -> M {
        // Before the memory moves, so that what it is made of need not be kept meanwhile.
        if let Some(copied) = ManuallyDrop::into_inner(loan).into_copy() {
            bounce::take_over::<D, M>(copied, &memory, coherent);
        } else {
            if !coherent {
                fetch_last::<D, M>(&memory);
            }
            if D::DEVICE_WRITES {
                base::barrier::device_read();
            }
        }
        ManuallyDrop::into_inner(memory)
    }

    /// What remains of a loan whose revocation has failed: the device may reach the memory for ever, so nothing of it is dropped. The
    /// address range is never used again, and the address space stays, which the loan's handle of the device keeps.
    ///
    /// # Safety
    ///
    /// The caller uses neither of the two any more.
    #[cold]
    #[inline(never)]
    unsafe fn lose(loan: &ManuallyDrop<Loan>, memory: &mut ManuallyDrop<M>, cause: RevokeError) -> Quarantined {
        loan.count_lost();
        if loan.copy().is_some() {
            // The device has the copy, and keeps it. The memory was not lent.
            // SAFETY: the caller uses it no more.
            unsafe { ManuallyDrop::drop(memory) };
        }
        let device = loan.device.shared_name().clone();
        let lost = Quarantined { device, range: loan.range(), cause, mapped_at: loan.site };
        quarantine::add(&lost);
        lost
    }

    /// Lets the CPU see what the device has written so far to the `len` bytes at `offset`.
    pub(crate) fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        check_range(self.memory(), offset, len)?;
        base::barrier::device_read();
        let coherent = self.loan.device.is_coherent();
        if let Some(copy) = self.loan.copy() {
            return bounce::sync_for_cpu::<D, M>(copy, self.memory(), offset, len, coherent);
        }
        if coherent {
            return Ok(());
        }
        fetch::<D, M>(self.memory(), offset, len)
    }

    /// Lets the device see what the CPU has written so far to the `len` bytes at `offset`.
    pub(crate) fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        check_range(self.memory(), offset, len)?;
        let coherent = self.loan.device.is_coherent();
        if let Some(copy) = self.loan.copy() {
            bounce::sync_for_device::<D, M>(copy, self.memory(), offset, len, coherent)?;
        } else if !coherent {
            prepare::<D, M>(self.memory(), offset, len)?;
        }
        base::barrier::device_write();
        Ok(())
    }
}

impl<D: Direction, M: Spans> Drop for Held<D, M> {
    fn drop(&mut self) {
        let site = self.loan.site;
        // SAFETY: in `drop`, which runs once (`into_parts` keeps it from running), and last.
        let loan = unsafe { ManuallyDrop::take(&mut self.loan) };
        // SAFETY: as above; `end` keeps it until it is revoked.
        let memory = unsafe { ManuallyDrop::take(&mut self.memory) };
        // SAFETY: the two belong together, and nobody else has revoked the loan.
        let taken = unsafe { Self::end(loan, memory, site) };
        drop(taken);
    }
}

/// Before a device that does not snoop gets memory: what the CPU wrote goes to memory, and where the device may write, no line
/// stays behind that could be written back over the device's data later.
#[cold]
pub(crate) fn prepare<D: Direction, M: Spans>(memory: &M, offset: u64, len: u64) -> Result<(), Error> {
    let Some(maintained_by) = memory.maintained_by() else { return Ok(()) };
    for_each_span(memory, offset, len, |span| {
        if D::DEVICE_WRITES {
            maintained_by.clean_invalidate(span.ptr, span.bytes);
        } else {
            maintained_by.clean(span.ptr, span.bytes);
        }
    })
}

/// After the last write of a device that does not snoop. What others who have the memory wrote after it may be in the caches and
/// nowhere else.
#[cold]
fn fetch_last<D: Direction, M: Spans>(memory: &M) {
    let len = memory.spans_len();
    // The whole of the memory is always in range.
    let _ = match memory.has_others() && D::DEVICE_WRITES {
        true => prepare::<D, M>(memory, 0, len),
        false => fetch::<D, M>(memory, 0, len),
    };
}

/// After a device that does not snoop has written: lines that were fetched speculatively meanwhile are discarded.
#[cold]
pub(crate) fn fetch<D: Direction, M: Spans>(memory: &M, offset: u64, len: u64) -> Result<(), Error> {
    let Some(maintained_by) = memory.maintained_by().filter(|_| D::DEVICE_WRITES) else { return Ok(()) };
    for_each_span(memory, offset, len, |span| maintained_by.invalidate(span.ptr, span.bytes))
}
