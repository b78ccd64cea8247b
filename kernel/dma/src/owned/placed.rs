//! What lies in an owned domain: buffers, until they are taken out.

#![expect(unsafe_code, reason = "takes memory back after revocation")]

use super::OwnedDomain;
use super::anchors::Remembered;
use crate::held;
use crate::quarantine::{self, Quarantined};
use crate::site::Site;
use crate::{Buffer, Direction, Error, View};
use alloc::boxed::Box;
use core::fmt;
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use iommu::{IovaRange, RevokeError};

/// What a mapping was made by; `None`: in the general way.
pub(super) type Placement = Option<Box<Remembered>>;

/// A buffer in an owned domain, in direction `D`: [`Placed::unmap`] and dropping it revoke, `mem::forget` leaks it.
#[must_use = "dropping a mapping ends it"]
pub struct Placed<D: Direction, B: Buffer> {
    pub(super) domain: OwnedDomain,
    pub(super) range: IovaRange,
    pub(super) anchor: Placement,
    pub(super) buffer: ManuallyDrop<B>,
    pub(super) site: Site,
    pub(super) direction: PhantomData<D>,
}

impl<D: Direction, B: Buffer> Placed<D, B> {
    /// Where it is.
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Looks at the memory while devices have it. Where they do not snoop the caches, see [`Placed::sync_for_cpu`] and
    /// [`Placed::sync_for_device`].
    pub fn view(&self) -> View<'_, D, B> {
        View::new(&self.buffer)
    }

    /// Lets the CPU see what devices have written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_cpu(&self, offset: u64, len: u64) -> Result<(), Error> {
        crate::buffer::check_range(&*self.buffer, offset, len)?;
        base::barrier::device_read();
        if self.domain.0.coherent { Ok(()) } else { held::fetch::<D, B>(&self.buffer, offset, len) }
    }

    /// Lets devices see what the CPU has written so far to the `len` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn sync_for_device(&self, offset: u64, len: u64) -> Result<(), Error> {
        crate::buffer::check_range(&*self.buffer, offset, len)?;
        if !self.domain.0.coherent {
            held::prepare::<D, B>(&self.buffer, offset, len)?;
        }
        base::barrier::device_write();
        Ok(())
    }

    /// Revokes every device's access through this domain and gives the buffer back.
    ///
    /// # Errors
    ///
    /// [`Quarantined`] if the revocation failed: the buffer is lost.
    #[inline]
    pub fn unmap(self) -> Result<B, Quarantined> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used afterwards, and not dropped.
        let result = unsafe { this.end() };
        // SAFETY: as above: taken once. (What is left has nothing to drop.)
        drop(unsafe { core::ptr::read(&raw const this.domain) });
        result
    }

    /// # Safety
    ///
    /// Called once; the buffer is not used afterwards.
    #[inline(always)]
    unsafe fn end(&mut self) -> Result<B, Quarantined> {
        let revoked = match self.anchor.take() {
            Some(anchor) => self.domain.revoke_anchored(self.range, anchor),
            None => self.domain.revoke(self.range),
        };
        match revoked {
            Ok(()) => {
                // SAFETY: the caller's promise. After the revocation no device reaches the memory.
                let buffer = unsafe { ManuallyDrop::take(&mut self.buffer) };
                if !self.domain.0.coherent {
                    // The whole of the memory is always in range.
                    let _ = held::fetch::<D, B>(&buffer, 0, buffer.spans_len());
                }
                if D::DEVICE_WRITES {
                    base::barrier::device_read();
                }
                Ok(buffer)
            }
            Err(cause) => Err(self.quarantined(cause)),
        }
    }

    /// The buffer is never dropped.
    #[cold]
    #[inline(never)]
    fn quarantined(&self, cause: RevokeError) -> Quarantined {
        let device = self.domain.0.name.clone();
        let lost = Quarantined { device, range: self.range, cause, mapped_at: self.site };
        quarantine::add(&lost);
        lost
    }
}

impl<D: Direction, B: Buffer> Drop for Placed<D, B> {
    fn drop(&mut self) {
        // SAFETY: in `drop`, which runs once (`unmap` keeps it from running), and last.
        drop(unsafe { self.end() });
    }
}

impl<D: Direction, B: Buffer> fmt::Debug for Placed<D, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Placed({} in {}, {:?})", self.range, self.domain.0.name, D::PROT)
    }
}
