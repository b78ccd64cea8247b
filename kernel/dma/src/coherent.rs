//! Memory that the CPU and a device share without synchronization: rings, descriptors, queues.
//!
//! The CPU reaches it only as types of atomics ([`DeviceShared`]), to which a shared reference is sound whatever the device
//! does. That is also why there is no first step before publication: a plain `T` that nobody else sees could be had only to be
//! given up again, and atomic stores to memory whose address the device has not been told cost the same.
//!
//! For a device that does not snoop the caches the memory is not cacheable, and has no second, cacheable alias.

#![expect(unsafe_code, reason = "makes references to typed memory of its own, shared with a device")]

use crate::buffer::{Span, Spans, to_usize};
use crate::held::Held;
use crate::lent::{Lent, Segment, sealed};
use crate::memory::{Cacheability, DmaMemory, RawPages};
use crate::pages::Chunk;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Bidirectional, Device, Error};
use core::fmt;
use core::mem::{align_of, needs_drop, size_of};
use core::ops::Deref;
use core::panic::Location;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use iommu::{Iova, PAGE_SIZE, PhysRange};

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
    held: Held<Bidirectional, CoherentPages>,
}

// SAFETY: it owns the memory, and `T` may be used from any core by shared reference.
unsafe impl<T: DeviceShared + ?Sized> Send for Coherent<T> {}
// SAFETY: as above.
unsafe impl<T: DeviceShared + ?Sized> Sync for Coherent<T> {}

impl<T: DeviceShared> Coherent<T> {
    pub(crate) fn new(device: &Device, site: Site) -> Result<Self, Error> {
        let (start, held) = allocate::<T>(device, 1, site)?;
        // INVARIANT: `allocate` made room for one `T`.
        Ok(Self { value: start.cast(), held })
    }
}

impl<T: DeviceShared> Coherent<[T]> {
    pub(crate) fn new_slice(device: &Device, count: usize, site: Site) -> Result<Self, Error> {
        let (start, held) = allocate::<T>(device, count, site)?;
        // INVARIANT: `allocate` made room for `count` of them.
        Ok(Self { value: NonNull::slice_from_raw_parts(start.cast(), count), held })
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
        self.held.loan().range.start()
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

impl<T: DeviceShared + ?Sized> sealed::Sealed for Coherent<T> {}

impl<T: DeviceShared + ?Sized> Lent for Coherent<T> {
    fn device(&self) -> &Device {
        &self.held.loan().device
    }
    fn len(&self) -> u64 {
        size_of_val::<T>(self) as u64
    }
    fn segments(&self) -> &[Segment] {
        self.held.loan().segments.as_slice()
    }
    fn device_reads(&self) -> bool {
        true
    }
    fn device_writes(&self) -> bool {
        true
    }
}

impl<T: DeviceShared + ?Sized> fmt::Debug for Coherent<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Coherent({} at {})", self.device().name(), self.held.loan().range)
    }
}

/// Zeroed pages with room for `count` of `T`, lent to `device`, and their first byte.
fn allocate<T: DeviceShared>(
    device: &Device,
    count: usize,
    site: Site,
) -> Result<(NonNull<u8>, Held<Bidirectional, CoherentPages>), Error> {
    const { assert!(!needs_drop::<T>(), "integers have nothing to drop") };
    let bytes = size_of::<T>().checked_mul(count).ok_or(Error::OutOfMemory)?;
    if bytes == 0 || align_of::<T>() as u64 > PAGE_SIZE {
        return Err(Error::BadLayout(size_of::<T>()));
    }
    let chunk = Chunk::zeroed(device.memory(), device.coherent_request(bytes as u64)?)?;
    let pages = CoherentPages::new(chunk, device.is_coherent())?;
    let start = pages.raw.ptr;
    let held = Held::lend_coherent(device, pages, site).map_err(|(_, error)| error)?;
    if held.loan().segments.as_slice().len() != 1 {
        // Only where bus windows meet in the middle of it. A ring needs one address.
        let [memory] = held.memory().run;
        return Err(Error::Unreachable { device: device.shared_name().clone(), memory });
    }
    Ok((start, held))
}

/// Pages as a device shares them, cached or not.
///
/// # Invariants
///
/// `raw` is a whole allocation of `memory`, and `raw.ptr` its only alias: write-back if `cached`, otherwise not cacheable.
pub(crate) struct CoherentPages {
    raw: RawPages,
    run: [PhysRange; 1],
    memory: &'static dyn DmaMemory,
    cached: bool,
}

// SAFETY: it owns the memory, which any core may access.
unsafe impl Send for CoherentPages {}
// SAFETY: as above; it hands out pointers only.
unsafe impl Sync for CoherentPages {}

impl CoherentPages {
    pub(crate) fn new(chunk: Chunk, cached: bool) -> Result<Self, Error> {
        let run = [chunk.run()];
        let (raw, memory) = chunk.into_raw();
        let mut pages = Self { raw, run, memory, cached: true };
        if !cached {
            memory.clean_invalidate(pages.raw.ptr, to_usize(pages.raw.bytes));
            // SAFETY: one whole allocation of `memory` with the alias that is valid now; nobody else has a pointer. On an
            // error it is freed as it is: nothing has changed.
            pages.raw.ptr = unsafe { memory.set_cacheability(&pages.raw, Cacheability::NonCacheable) }?;
            pages.cached = false;
        }
        Ok(pages)
    }
}

impl Drop for CoherentPages {
    fn drop(&mut self) {
        let RawPages { phys, mut ptr, bytes } = self.raw;
        if !self.cached {
            // SAFETY: one whole allocation with the alias that is valid now (invariant); the references that there were
            // borrowed the `Coherent` that owned this.
            match unsafe { self.memory.set_cacheability(&self.raw, Cacheability::WriteBack) } {
                Ok(cached) => ptr = cached,
                Err(error) => {
                    // Nobody may take it for ordinary memory.
                    log::error!("dma: {bytes:#x} bytes of coherent memory at {phys} are lost: {error}");
                    return;
                }
            }
        }
        // SAFETY: one whole allocation, write-back, that no device reaches: the loan that owned this was revoked, or never
        // made.
        unsafe { self.memory.free(RawPages { phys, ptr, bytes }) };
    }
}

// SAFETY:
// - the run is the allocation, which the object owns, and the one span is all of it;
// - held by pointer, no reference is made, and freed by the drop only.
unsafe impl Spans for CoherentPages {
    fn spans_runs(&self) -> &[PhysRange] {
        &self.run
    }
    fn spans_len(&self) -> u64 {
        self.raw.bytes
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let bytes = self.raw.bytes.checked_sub(offset).filter(|bytes| *bytes != 0)?;
        // SAFETY: below the size of the allocation.
        let ptr = unsafe { self.raw.ptr.add(to_usize(offset)) };
        Some(Span { ptr, bytes: to_usize(bytes) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        // Atomic accesses cannot be bracketed by maintenance: it is either snooped or not cached.
        None
    }
}
