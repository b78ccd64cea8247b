//! Call sites, in a form that can be stored without a lock.

#![expect(unsafe_code, reason = "turns a stored pointer back into the reference that it was")]

use core::panic::Location;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// A place in the source.
pub(crate) type Site = &'static Location<'static>;

/// A [`Site`] that several cores may store and load.
///
/// # Invariants
///
/// Null, or made from a `Site`.
pub(crate) struct AtomicSite(AtomicPtr<Location<'static>>);

impl AtomicSite {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    #[inline]
    pub(crate) fn store(&self, site: Site) {
        // INVARIANT: made from a `Site`. The pointer is never written through.
        self.0.store(ptr::from_ref(site).cast_mut(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn load(&self) -> Option<Site> {
        let site = self.0.load(Ordering::Relaxed).cast_const();
        // SAFETY: null, or made from a reference that is valid for ever (invariant), and nobody writes through it.
        unsafe { site.as_ref() }
    }
}
