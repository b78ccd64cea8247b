//! Lending a copy of borrowed memory for the duration of a closure.
//!
//! # Why always a copy
//!
//! Rule R3 lets memory be borrowed only by a closure, because a guard can be forgotten. A closure alone is not enough: when a
//! revocation fails, the borrowed memory goes back to a caller while a device still reaches it, and nothing short of stopping
//! the kernel would be sound. Memory that is not whole pages would also show its neighbours to the device. So the borrowed
//! bytes themselves are never lent: the device gets pages of our own, which can be put in quarantine, and which a queue may
//! even keep beyond the closure without harm. Who wants no copy owns [`Pages`](crate::Pages).

use crate::lent::{Lent, Segment, slice};
use crate::site::Site;
use crate::{Device, DeviceReads, DeviceWrites, Direction, Error, Mapped, Pages};
use alloc::sync::Arc;
use base::fallible;
use core::marker::PhantomData;

/// A copy of borrowed bytes that a device has, while a closure runs.
pub struct Scoped<'a, D: Direction> {
    mapped: Arc<Mapped<D, Pages>>,
    len: u64,
    scope: PhantomData<&'a mut [u8]>,
}

impl<D: Direction> Scoped<'_, D> {
    /// The loan, for a queue. If it has not been given back when the closure ends, the device keeps the copy until it has,
    /// and the mapping fails with [`Error::StillLent`].
    pub fn loan(&self) -> &Arc<Mapped<D, Pages>> {
        &self.mapped
    }

    /// The number of bytes that were borrowed. The loan is rounded up to whole pages.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no byte was borrowed: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The borrowed bytes in segments that the device can take.
    pub fn segments(&self) -> impl Iterator<Item = Segment> {
        // The loan is at least as long as the bytes.
        slice(&*self.mapped, 0, self.len).into_iter().flatten()
    }
}

impl<D: DeviceWrites> Scoped<'_, D> {
    /// Copies out of the device's copy: see [`View::read`](crate::View::read).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        self.mapped.sync_for_cpu(offset, to.len() as u64)?;
        self.mapped.view().read(offset, to)
    }
}

impl<D: DeviceReads> Scoped<'_, D> {
    /// Copies into the device's copy: see [`View::write`](crate::View::write).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.mapped.view().write(offset, from)?;
        self.mapped.sync_for_device(offset, from.len() as u64)
    }
}

pub(crate) fn run<D: Direction, R>(
    device: &Device,
    bytes: &mut [u8],
    f: impl FnOnce(&Scoped<'_, D>) -> R,
    site: Site,
) -> Result<R, Error> {
    let len = bytes.len();
    let mut pages = device.pages(len as u64)?;
    // In every direction: what the device does not write comes back as it was.
    if let Some(copy) = pages.as_mut_slice().get_mut(..len) {
        copy.copy_from_slice(bytes);
    }
    // Without memory for the handle the mapping is dropped, and with it revoked.
    let mapped = fallible::arc(Mapped::new(device, pages, site)?).map_err(|_| Error::OutOfMemory)?;
    let scoped = Scoped { mapped, len: len as u64, scope: PhantomData };
    let result = f(&scoped);
    let mapped =
        Arc::try_unwrap(scoped.mapped).map_err(|kept| Error::StillLent(kept.device().shared_name().clone()))?;
    let pages = mapped.unmap()?;
    if D::DEVICE_WRITES
        && let Some(copy) = pages.as_slice().get(..len)
    {
        bytes.copy_from_slice(copy);
    }
    Ok(result)
}
