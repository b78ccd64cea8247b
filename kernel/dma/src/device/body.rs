//! What keeps a device: its owners and its loans.
//!
//! As long as anybody owns a handle, loans need keep nothing: so they are not counted in one place, for which all cores would contend.
//! Which of them there are is seen all the same: a loan in a berth is one that is missing there, and all others are in a core's
//! [tally](crate::record::Tally). When the last owner goes the device is *closed*: what is out is counted once, and from then on
//! whatever ends says so.
//!
//! A handle that a loan has is not counted either. Whoever clones it is an owner, as before.
//!
//! # Invariants
//!
//! - `owners` is how many handles are owned. They are 1 of the body's `holds`, however many, as long as there is one.
//! - In a body that is closed every loan is 1 of them, too. (While it is being closed, there are [`MANY`] more than there should be.)
//! - The body exists until they are 0, and whoever leaves does not touch it afterwards, unless he was the last.
//!
//! # Locking
//!
//! None.

use super::{Device, Inner};
use crate::lazy::Strictness;
#[cfg(doc)]
use crate::record::Tally;
use crate::{Error, berth};
use alloc::sync::Arc;
use base::fallible;
use core::mem::ManuallyDrop;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use core::sync::atomic::{AtomicBool, AtomicU64};
use iommu::{IovaRange, PAGE_SIZE};

/// More than there are loans.
const MANY: u64 = 1 << 62;

/// A device.
pub(crate) struct Body {
    inner: Inner,
    owners: AtomicU64,
    holds: AtomicU64,
    /// By its last owner: it may have others since.
    closed: AtomicBool,
}

/// A handle. Cloning and dropping it counts.
///
/// # Invariants
///
/// The body exists as long as the handle: it is one of `owners`, or part of a loan.
pub(super) struct Handle(NonNull<Body>);

// SAFETY: a shared reference to a body, which any core may use.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Deref for Handle {
    type Target = Inner;
    #[inline(always)]
    fn deref(&self) -> &Inner {
        &self.body().inner
    }
}

impl Handle {
    pub(super) fn new(inner: Inner) -> Result<Self, Error> {
        const fn any_core<T: Send + Sync>() {}
        const { any_core::<Body>() };
        let [owners, holds] = [const { AtomicU64::new(1) }; 2];
        let body = Body { inner, owners, holds, closed: AtomicBool::new(false) };
        let body = Arc::into_raw(fallible::arc(body).map_err(|_| Error::OutOfMemory)?);
        // (An Arc's object has an address.) INVARIANT: it goes when `holds` is 0.
        let this = Self(NonNull::new(body.cast_mut()).ok_or(Error::OutOfMemory)?);
        if let Some(berths) = &this.berths {
            berths.belong_to(this.0);
        }
        Ok(this)
    }

    #[inline(always)]
    fn body(&self) -> &Body {
        // SAFETY: it exists as long as the handle (invariant).
        unsafe { self.0.as_ref() }
    }

    /// Owners and holds.
    #[cfg(all(test, feature = "fakes"))]
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.body().owners.load(Acquire), self.body().holds.load(Acquire))
    }

    /// Whether it is a handle of the same device.
    #[inline]
    pub(super) fn is(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        let body = self.body();
        if body.owners.fetch_add(1, Relaxed) == 0 {
            // By a loan, which is one of them until then.
            body.holds.fetch_add(1, Relaxed);
        }
        Self(self.0)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let body = self.body();
        let mut owners = body.owners.load(Acquire);
        loop {
            if owners == 1 {
                // Nobody else owns one, so nobody else is closing it, nor is it left before that is done.
                body.close();
            }
            match body.owners.compare_exchange_weak(owners, owners.wrapping_sub(1), AcqRel, Acquire) {
                Ok(_) => break,
                Err(now) => owners = now,
            }
        }
        if owners == 1 {
            // SAFETY: this was the owners' one, and this handle is not used any more.
            unsafe { Body::leave(self.0) };
        }
    }
}

impl Body {
    /// Counts the loans.
    #[cold]
    fn close(&self) {
        if self.closed.swap(true, AcqRel) {
            return;
        }
        // Nobody is the last while this is going on.
        self.holds.fetch_add(MANY, Relaxed);
        let mut loans = self.inner.records.close_tallies();
        if let Some(berths) = &self.inner.berths {
            // All of them: those that are not out come home at once.
            loans = loans.wrapping_add(berth::COUNT as u64);
            berths.close_for_good();
        }
        self.holds.fetch_add(loans.wrapping_sub(MANY), AcqRel);
    }

    /// Counts one more, of a loan that has begun in a tally that is closed.
    #[cold]
    #[inline(never)]
    fn hold(&self) {
        self.holds.fetch_add(1, Relaxed);
    }

    /// Takes note of what could not be revoked: nothing ends lazily here any more.
    #[cold]
    pub(crate) fn has_lost(&self, range: IovaRange) {
        self.inner.records.quarantined.fetch_add(range.len() / PAGE_SIZE, Relaxed);
        self.inner.set_strictness(Strictness::Always);
    }

    /// Counts one less, and frees the body if there is no other.
    ///
    /// # Safety
    ///
    /// It was the caller's; he does not use the body any more.
    #[cold]
    #[inline(never)]
    pub(crate) unsafe fn leave(this: NonNull<Self>) {
        // SAFETY: the caller's one keeps it until here.
        if unsafe { this.as_ref() }.holds.fetch_sub(1, AcqRel) == 1 {
            // SAFETY: it came from an Arc, this once; nobody is left who uses it (invariant).
            drop(unsafe { Arc::from_raw(this.as_ptr().cast_const()) });
        }
    }
}

impl Device {
    /// A handle for a loan that has begun: see [`Device::enter`].
    #[inline(always)]
    pub(super) fn for_loan(&self) -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self(Handle(self.0.0)))
    }

    /// Takes note of a loan that has no berth, whose [`Tally::word`] is `one`. Until [`Device::leave`] it keeps the device.
    #[inline(always)]
    pub(super) fn enter(&self, one: u64) {
        if self.0.records.of_this_core().tally.begin(one) {
            self.0.body().hold();
        }
    }

    /// Takes note of the end of such a loan.
    ///
    /// # Safety
    ///
    /// It was entered, with this word; nobody uses its handle any more.
    #[inline(always)]
    pub(super) unsafe fn leave(&self, one: u64) {
        let body = self.0.0;
        if self.0.records.of_this_core().tally.end(one) {
            // SAFETY: the loan was counted when the body was closed, or has been since; the caller's promise.
            unsafe { Body::leave(body) };
        }
    }
}
