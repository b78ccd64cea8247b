//! Memory that the CPU and a device share without synchronization: rings, descriptors, queues.
//!
//! The CPU reaches it only as types of atomics ([`DeviceShared`]), to which a shared reference is sound whatever the device
//! does. Publication may take two steps: an [`Unpublished`] is memory that no device reaches yet, and its owner's alone (`&mut T`,
//! plain accesses through `get_mut`); publishing it makes it a [`Coherent`].
//!
//! For a device that does not snoop the caches the memory is not cacheable, and has no second, cacheable alias. Of atomic accesses
//! only loads and stores are sure to work there ([`Cacheability::NonCacheable`]).

#![expect(unsafe_code, reason = "makes references to typed memory of its own, shared with a device")]

use crate::attributed::AttributedPages;
use crate::held::Held;
use crate::lent::{Lent, lent_by_held};
use crate::memory::Cacheability;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Bidirectional, Device, Error};
use core::fmt;
use core::mem::{align_of, needs_drop, size_of};
use core::ops::{Deref, DerefMut};
use core::panic::Location;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use iommu::{Iova, MapError, PAGE_SIZE, Prot};

/// Types that a CPU and a device may access at the same time.
///
/// # Safety
///
/// - The type is made of atomic integers only (`AtomicU8` to `AtomicU64`, arrays of them, and `repr(C)` structures of them),
///   so that every access through a shared reference is atomic.
/// - Every bit pattern is a valid value, the one of all zeroes among them.
pub unsafe trait DeviceShared: Send + Sync + 'static {}

// SAFETY: an atomic integer: all accesses are atomic, and any bits are a value.
unsafe impl DeviceShared for AtomicU8 {}
// SAFETY: as above.
unsafe impl DeviceShared for AtomicU16 {}
// SAFETY: as above.
unsafe impl DeviceShared for AtomicU32 {}
// SAFETY: as above.
unsafe impl DeviceShared for AtomicU64 {}
// SAFETY: nothing but elements that are fit.
unsafe impl<T: DeviceShared, const N: usize> DeviceShared for [T; N] {}
// SAFETY: nothing but elements that are fit.
unsafe impl<T: DeviceShared> DeviceShared for [T] {}

/// A `T` that the CPU and a device share. Dropping it revokes the device's access.
///
/// # Invariants
///
/// `value` points to the start of the memory of `held`, which is large enough for it, aligned and initialized.
pub struct Coherent<T: DeviceShared + ?Sized> {
    value: NonNull<T>,
    held: Held<Bidirectional, AttributedPages>,
}

// SAFETY: it owns the memory, and `T` may be used from any core by shared reference.
unsafe impl<T: DeviceShared + ?Sized> Send for Coherent<T> {}
// SAFETY: as above.
unsafe impl<T: DeviceShared + ?Sized> Sync for Coherent<T> {}

impl<T: DeviceShared> Coherent<T> {
    pub(crate) fn new(device: &Device, extra: Prot, site: Site) -> Result<Self, Error> {
        let pages = allocate::<T>(device, 1)?;
        // INVARIANT: `allocate` made room for one `T`.
        Self::publish(device, pages.start().cast(), pages, extra, site)
    }
}

impl<T: DeviceShared> Coherent<[T]> {
    #[inline]
    pub(crate) fn new_slice(device: &Device, count: usize, extra: Prot, site: Site) -> Result<Self, Error> {
        let pages = allocate::<T>(device, count)?;
        // INVARIANT: `allocate` made room for `count` of them.
        let value = NonNull::slice_from_raw_parts(pages.start().cast(), count);
        Self::publish(device, value, pages, extra, site)
    }
}

impl<T: DeviceShared + ?Sized> Coherent<T> {
    /// Lends `pages`, in which `value` is, to the device.
    #[inline(always)]
    fn publish(
        device: &Device,
        value: NonNull<T>,
        pages: AttributedPages,
        extra: Prot,
        site: Site,
    ) -> Result<Self, Error> {
        base::barrier::device_write();
        let held = match Held::lend_coherent(device, pages, extra, site) {
            Ok(held) => held,
            Err(error) => return Err(refused(device, extra, error)),
        };
        if !extra.is_empty() && !expressed(&held, extra) {
            held.take_back(site)?;
            return Err(unsupported(device));
        }
        if held.loan().segments().len() != 1 {
            // Only where bus windows meet in the middle of it. A ring needs one address.
            let memory = held.memory().run();
            return Err(Error::Unreachable { device: device.shared_name().clone(), memory });
        }
        // INVARIANT: `value` points into the memory that is now held.
        Ok(Self { value, held })
    }
}

impl<T: DeviceShared> Coherent<[T]> {
    /// The number of elements, as of any slice. ([`Lent::len`] counts bytes.)
    pub fn len(&self) -> usize {
        self.value.len()
    }

    /// Whether there is no element: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: DeviceShared + ?Sized> Coherent<T> {
    /// The device's address of the first byte; all others follow it.
    #[inline]
    pub fn iova(&self) -> Iova {
        self.held.loan().start()
    }

    /// The device's address of the byte at `offset` of the value.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] beyond the value's last byte.
    pub fn iova_at(&self, offset: u64) -> Result<Iova, Error> {
        let size = size_of_val::<T>(self) as u64;
        let out = Error::OutOfRange { offset, len: 1, size };
        if offset < size { self.iova().checked_add(offset).ok_or(out) } else { Err(out) }
    }

    /// The device's address of `part`, a field or an element of the value.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`] if it is none.
    pub fn iova_of<P: ?Sized>(&self, part: &P) -> Result<Iova, Error> {
        let part_start = core::ptr::from_ref(part).addr() as u64;
        self.iova_at(part_start.wrapping_sub(self.value.addr().get() as u64))
    }

    /// Revokes the device's access and frees the memory, as a drop does, but says if that failed.
    ///
    /// # Errors
    ///
    /// [`Quarantined`].
    #[track_caller]
    pub fn release(self) -> Result<(), Quarantined> {
        self.held.take_back(Location::caller()).map(drop)
    }
}

impl<T: DeviceShared + ?Sized> Deref for Coherent<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY:
        // - the memory is initialized, aligned, and lives as long as the borrow (invariant);
        // - the device may write it at any moment, which a reference to a `DeviceShared` allows: all accesses are atomic.
        unsafe { self.value.as_ref() }
    }
}

lent_by_held!([T: DeviceShared + ?Sized] Coherent<T>, Bidirectional, |this| size_of_val::<T>(this) as u64);

impl<T: DeviceShared + ?Sized> fmt::Debug for Coherent<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Coherent({} at {})", self.device().name(), self.held.loan().range())
    }
}

/// A zeroed `T` in memory for sharing with a device, before the device reaches it: its owner's alone.
///
/// # Invariants
///
/// `value` points to the start of `pages`, which are large enough for it, aligned and initialized. No device reaches them.
pub struct Unpublished<T: DeviceShared + ?Sized> {
    value: NonNull<T>,
    pages: AttributedPages,
    device: Device,
}

// SAFETY: it owns the memory, and `T` may be used from any core.
unsafe impl<T: DeviceShared + ?Sized> Send for Unpublished<T> {}
// SAFETY: as above.
unsafe impl<T: DeviceShared + ?Sized> Sync for Unpublished<T> {}

impl<T: DeviceShared> Unpublished<T> {
    pub(crate) fn new(device: &Device) -> Result<Self, Error> {
        let pages = allocate::<T>(device, 1)?;
        // INVARIANT: `allocate` made room for one `T`.
        Ok(Self { value: pages.start().cast(), pages, device: device.clone() })
    }
}

impl<T: DeviceShared> Unpublished<[T]> {
    pub(crate) fn new_slice(device: &Device, count: usize) -> Result<Self, Error> {
        let pages = allocate::<T>(device, count)?;
        // INVARIANT: `allocate` made room for `count` of them.
        let value = NonNull::slice_from_raw_parts(pages.start().cast(), count);
        Ok(Self { value, pages, device: device.clone() })
    }
}

impl<T: DeviceShared + ?Sized> Unpublished<T> {
    /// Lends it to the device: from here on both sides use it, by atomic accesses. What was written before is there when the
    /// device first looks.
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; the memory is freed.
    #[track_caller]
    pub fn publish(self) -> Result<Coherent<T>, Error> {
        self.publish_as(Prot::empty(), Location::caller())
    }

    /// As [`Unpublished::publish`], for privileged transactions of the device only.
    ///
    /// # Errors
    ///
    /// As there; [`Error::Unsupported`] where nothing tells them from others.
    #[track_caller]
    pub fn publish_privileged(self) -> Result<Coherent<T>, Error> {
        self.publish_as(Prot::PRIVILEGED, Location::caller())
    }

    fn publish_as(self, extra: Prot, site: Site) -> Result<Coherent<T>, Error> {
        let Self { value, pages, device } = self;
        Coherent::publish(&device, value, pages, extra, site)
    }
}

/// Why memory was not lent.
#[cold]
fn refused(device: &Device, extra: Prot, error: Error) -> Error {
    match error {
        Error::Map(MapError::BadProt) if !extra.is_empty() => unsupported(device),
        other => other,
    }
}

/// Whether the address space says what was asked for: some formats cannot, and leave it out.
#[cold]
fn expressed(held: &Held<Bidirectional, AttributedPages>, extra: Prot) -> bool {
    let Ok(translated) = held.loan().device.translated() else { return false };
    translated.space().translate(held.loan().start()).is_some_and(|(_, prot)| prot.contains(extra))
}

#[cold]
fn unsupported(device: &Device) -> Error {
    Error::Unsupported { device: device.shared_name().clone(), what: "memory for its privileged transactions only" }
}

impl<T: DeviceShared + ?Sized> Deref for Unpublished<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: initialized, aligned, and ours alone (invariant).
        unsafe { self.value.as_ref() }
    }
}

impl<T: DeviceShared + ?Sized> DerefMut for Unpublished<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: initialized, aligned, and ours alone (invariant); any bits are a value.
        unsafe { self.value.as_mut() }
    }
}

impl<T: DeviceShared + ?Sized> fmt::Debug for Unpublished<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unpublished({} for {})", self.pages.run(), self.device.name())
    }
}

/// Zeroed pages with room for `count` of `T`, that `device` can be lent.
fn allocate<T: DeviceShared>(device: &Device, count: usize) -> Result<AttributedPages, Error> {
    const { assert!(!needs_drop::<T>(), "integers have nothing to drop") };
    let Some(bytes) = size_of::<T>().checked_mul(count) else { return Err(Error::OutOfMemory) };
    if bytes == 0 || align_of::<T>() as u64 > PAGE_SIZE {
        return Err(Error::BadLayout(size_of::<T>()));
    }
    let cacheability = if device.is_coherent() { Cacheability::WriteBack } else { Cacheability::NonCacheable };
    AttributedPages::zeroed(device.memory(), device.coherent_request(bytes as u64)?, cacheability)
}
