//! Memory together with its loan: the one place where memory goes to a device and comes back.
//!
//! # Invariants
//!
//! From [`Held::lend`] until a revocation has succeeded, the memory is reachable by the device, owned by the [`Held`], and
//! nobody has a reference into it. Whoever forgets a [`Held`] leaks the memory and the loan, and nothing else.

#![expect(unsafe_code, reason = "lends memory that it owns, and takes it back after revocation")]

use crate::bounce;
use crate::buffer::{Spans, check_range, for_each_span};
use crate::device::{Loan, Refused};
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::{Device, Direction, Error};
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use iommu::{Iova, Prot, RevokeError};

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
        let (runs, len) = (memory.spans_runs(), memory.spans_len());
        // SAFETY: as in `lend_slowly`.
        match unsafe { device.lend_quickly(runs, len, D::PROT | extra, device.limits().address_mask, site) } {
            Ok(loan) => Ok(Self::of(loan, memory)),
            // By reference, and without the memory in the result: an object that this wrote would be in memory on the quick way
            // too, and moved from place to place.
            Err(refused) => match Self::not_quickly(device, &memory, extra, site, refused) {
                Ok(loan) => Ok(Self::of(loan, memory)),
                Err(error) => Err((memory, error)),
            },
        }
    }

    #[cold]
    #[inline(never)]
    fn not_quickly(device: &Device, memory: &M, extra: Prot, site: Site, refused: Refused) -> Result<Loan, Error> {
        match refused {
            Refused::Special => Self::lend_slowly(device, None, memory, extra, site),
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

    /// Lends memory that is shared for good: never a copy of it, and within the device's limits for such memory.
    pub(crate) fn lend_coherent(device: &Device, memory: M, extra: Prot, site: Site) -> Result<Self, (M, Error)> {
        let (runs, len, prot) = (memory.spans_runs(), memory.spans_len(), D::PROT | extra);
        // SAFETY: as in `lend_slowly`.
        let loan = match unsafe { device.lend_quickly(runs, len, prot, device.limits().coherent_mask, site) } {
            Ok(loan) => Ok(loan),
            // SAFETY: as above.
            Err(Refused::Special) => unsafe { device.lend_coherent(runs, len, prot, site) },
            Err(Refused::Iova(error)) => Err(error.into()),
            Err(Refused::Map(error)) => Err(error.into()),
        };
        match loan {
            Ok(loan) => Ok(Self::of(loan, memory)),
            Err(error) => Err((memory, error)),
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
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped and not used afterwards.
        unsafe { this.end(site) }
    }

    /// Takes loan and memory apart.
    ///
    /// # Safety
    ///
    /// The device reaches the memory until the loan has been revoked: until then the memory is neither reached but by atomics
    /// nor dropped.
    #[inline]
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
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not dropped and not used afterwards; the outcome is as the caller promises.
        unsafe { this.conclude(outcome, site) }
    }

    /// # Safety
    ///
    /// Called once; the object is not used afterwards, and not dropped.
    #[inline(always)]
    unsafe fn end(&mut self, site: Site) -> Result<M, Quarantined> {
        let outcome = self.loan.revoke();
        // SAFETY: the caller's promise; the outcome is that of revoking this loan.
        unsafe { self.conclude(outcome, site) }
    }

    /// # Safety
    ///
    /// Both as for [`Held::end`] and as for [`Held::settle`].
    #[inline(always)]
    unsafe fn conclude(&mut self, outcome: Result<(), RevokeError>, site: Site) -> Result<M, Quarantined> {
        if let Err(cause) = self.loan.settle(outcome, site) {
            // SAFETY: the caller's promise: not used afterwards.
            return Err(unsafe { self.lose(cause) });
        }
        let coherent = self.loan.device.is_coherent();
        let copied = self.loan.take_copy();
        // SAFETY: the caller's promise: taken once, and the loan has been settled. It goes before the memory moves, so that what it
        // is made of need not be kept meanwhile.
        unsafe { ManuallyDrop::drop(&mut self.loan) };
        if let Some(copied) = copied {
            bounce::take_over::<D, M>(copied, &self.memory, coherent);
        } else {
            if !coherent {
                // The whole of the memory is always in range.
                let _ = fetch::<D, M>(&self.memory, 0, self.memory.spans_len());
            }
            if D::DEVICE_WRITES {
                base::barrier::device_read();
            }
        }
        // SAFETY: as above.
        Ok(unsafe { ManuallyDrop::take(&mut self.memory) })
    }

    /// What remains of a loan whose revocation has failed.
    ///
    /// # Safety
    ///
    /// Called once; the object is not used afterwards, and not dropped.
    #[cold]
    unsafe fn lose(&mut self, cause: RevokeError) -> Quarantined {
        if self.loan.copy().is_some() {
            // The device has the copy, and keeps it: the loan, which has it, is never dropped. The memory was not lent.
            // SAFETY: the caller's promise.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
        let device = self.loan.device.shared_name().clone();
        let lost = Quarantined { device, range: self.loan.range(), cause, mapped_at: self.loan.site };
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
        // SAFETY: in `drop`, which runs once (`take_back` keeps it from running), and last.
        let taken = unsafe { self.end(site) };
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

/// After a device that does not snoop has written: lines that were fetched speculatively meanwhile are discarded.
#[cold]
pub(crate) fn fetch<D: Direction, M: Spans>(memory: &M, offset: u64, len: u64) -> Result<(), Error> {
    let Some(maintained_by) = memory.maintained_by().filter(|_| D::DEVICE_WRITES) else { return Ok(()) };
    for_each_span(memory, offset, len, |span| maintained_by.invalidate(span.ptr, span.bytes))
}
