//! Areas of the CPU's addresses.

#![expect(unsafe_code, reason = "declares what a space of the CPU promises, and reaches memory through it")]

use super::Area;
use super::sealed::{self, Place};
use crate::buffer::{Span, Spans, to_usize};
use crate::memory::DmaMemory;
use crate::share::CpuIntent;
use crate::site::Site;
use crate::{Attributes, CpuAccess, CpuWrites, Direction, Error, Extents, SharedBuffer, view};
use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use iommu::PhysRange;
use iommu::pgtable::Leaves;

/// An address space of the CPU's, in which scattered memory gets one range: the kernel's own.
///
/// # Safety
///
/// - [`CpuSpace::reserve`] returns addresses that nobody else has until [`CpuSpace::release`].
/// - After [`CpuSpace::map`] the CPU reaches the runs one after another from `start` on, by the kernel's own instructions, as the
///   attributes say: an alias that differs in nothing but its address.
/// - After [`CpuSpace::unmap`] returned true no core reaches anything there.
pub unsafe trait CpuSpace: Send + Sync {
    /// Takes `len` bytes of addresses, aligned to `align`, a power of two.
    ///
    /// # Errors
    ///
    /// Where there are none, [`Error::Iova`].
    fn reserve(&self, len: u64, align: u64) -> Result<u64, Error>;

    /// Gives back what [`CpuSpace::reserve`] gave.
    fn release(&self, start: u64, len: u64);

    /// Maps `runs` one after another at `start`, readable and writable: all or nothing.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::BadSize`] where it cannot be mapped so.
    ///
    /// # Safety
    ///
    /// The range is reserved, and nothing is mapped there; the memory stays what it is until [`CpuSpace::unmap`].
    unsafe fn map(&self, start: u64, runs: &[PhysRange], attributes: Attributes) -> Result<(), Error>;

    /// Takes the mapping of all of a reserved range away. Says whether it is gone, for every core.
    ///
    /// # Safety
    ///
    /// No pointer to it is used any more.
    unsafe fn unmap(&self, start: u64, len: u64) -> bool;

    /// The leaves that map a range.
    fn leaves(&self, start: u64, len: u64) -> Option<Leaves>;
}

/// The CPU's addresses, as a space of which areas can be had.
#[derive(Clone, Copy)]
pub struct Cpu(pub &'static dyn CpuSpace);

impl sealed::Space for Cpu {
    type Backed<D: Direction> = InCpu;

    fn take(&self, place: Place, len: u64) -> Result<u64, Error> {
        match place {
            Place::Aligned(align) => self.0.reserve(len, align),
            // Nobody needs a certain address of the kernel's.
            Place::At(_) => Err(Error::BadSize(len)),
        }
    }

    fn give(&self, _: Place, start: u64, len: u64) {
        self.0.release(start, len);
    }

    fn back<D: Direction>(area: Area<Self>, buffer: &SharedBuffer, _: Site) -> Result<InCpu, (Area<Self>, Error)> {
        let mapped = buffer.extents().and_then(|extents| {
            if extents.attributes() == Attributes::Registers {
                return Err(Error::NotForCpu(buffer.name().into()));
            }
            let start = NonNull::new(core::ptr::with_exposed_provenance_mut(to_usize(area.start)));
            let start = start.ok_or(Error::BadSize(area.len))?;
            // SAFETY: the area has the range for itself; the extents go into an `InCpu`, which lets go of them when the mapping is gone.
            unsafe { area.space.0.map(area.start, extents.runs(), extents.attributes()) }?;
            Ok((extents, start))
        });
        match mapped {
            Ok((extents, start)) => {
                Ok(InCpu { area: ManuallyDrop::new(area), extents: ManuallyDrop::new(extents), start })
            }
            Err(error) => Err((area, error)),
        }
    }

    fn leaves(&self, start: u64, len: u64) -> Option<Leaves> {
        self.0.leaves(start, len)
    }
}

/// A buffer that the CPU reaches in one piece. The accesses themselves are begun and ended as ever, and shown here.
///
/// # Invariants
///
/// The whole of the buffer is mapped at `start` while the object lives.
pub struct InCpu {
    area: ManuallyDrop<Area<Cpu>>,
    extents: ManuallyDrop<Extents>,
    start: NonNull<u8>,
}

// SAFETY: a mapping that every core has; it hands out copies only.
unsafe impl Send for InCpu {}
// SAFETY: as above.
unsafe impl Sync for InCpu {}

impl InCpu {
    /// The first byte's address.
    pub fn start(&self) -> u64 {
        self.area.start
    }

    /// The first byte, for whoever keeps to the rules of shared memory: by atomics, within an access. Dangles when this is dropped.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.area.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.area.is_empty()
    }

    /// The leaves that map it.
    pub fn leaves(&self) -> Option<Leaves> {
        self.area.leaves()
    }

    /// Copies the bytes from `offset` on to `to`, within `access`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`], or [`Error::NotForCpu`] for an access of another buffer; nothing was copied.
    pub fn read_at<A: CpuIntent>(&self, access: &CpuAccess<'_, A>, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        self.check(access)?;
        view::read(self, offset, to)
    }

    /// Copies `from` to the bytes from `offset` on, within `access`.
    ///
    /// # Errors
    ///
    /// As [`InCpu::read_at`].
    pub fn write_at(&self, access: &mut CpuAccess<'_, CpuWrites>, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.check(access)?;
        view::write(self, offset, from)?;
        // By the buffer's own alias: the caches know memory, not addresses.
        access.written(offset, from.len() as u64)
    }

    fn check<A: CpuIntent>(&self, access: &CpuAccess<'_, A>) -> Result<(), Error> {
        let buffer = self.extents.buffer();
        if access.is_of(&buffer) { Ok(()) } else { Err(Error::NotForCpu(buffer.name().into())) }
    }

    /// Takes the mapping away, and gives the addresses back, with nothing behind them.
    ///
    /// # Errors
    ///
    /// [`Error::NotForCpu`] where the mapping would not go: addresses and memory are never used again.
    pub fn unmap(self) -> Result<Area<Cpu>, Error> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used afterwards, and not dropped.
        unsafe { this.end() }
    }

    /// # Safety
    ///
    /// Called once; the object is not used afterwards, and not dropped.
    unsafe fn end(&mut self) -> Result<Area<Cpu>, Error> {
        // SAFETY: the pointer is used no more (the caller's promise; whoever took it was told).
        if !unsafe { self.area.space.0.unmap(self.area.start, self.area.len) } {
            let buffer = self.extents.buffer();
            log::error!("{} stays mapped at {:#x} for ever", buffer.name(), self.area.start);
            return Err(Error::NotForCpu(buffer.name().into()));
        }
        // SAFETY: the caller's promise: dropped once, after the mapping has gone.
        unsafe { ManuallyDrop::drop(&mut self.extents) };
        // SAFETY: as above: taken once.
        Ok(unsafe { ManuallyDrop::take(&mut self.area) })
    }
}

impl Drop for InCpu {
    fn drop(&mut self) {
        // SAFETY: in `drop`, which runs once (`unmap` keeps it from running), and last.
        drop(unsafe { self.end() });
    }
}

// SAFETY:
// - the runs are the buffer's, which the extents keep alive and where it is, and all of it is mapped at `start` (invariant);
// - no reference is made; forgotten, it keeps its count of the buffer for ever.
unsafe impl Spans for InCpu {
    fn spans_runs(&self) -> &[PhysRange] {
        self.extents.runs()
    }
    fn spans_len(&self) -> u64 {
        self.area.len
    }
    fn span(&self, offset: u64) -> Option<Span> {
        let bytes = self.area.len.checked_sub(offset).filter(|bytes| *bytes != 0)?;
        // SAFETY: below the size of the mapping.
        let ptr = unsafe { self.start.add(to_usize(offset)) };
        Some(Span { ptr, bytes: to_usize(bytes) })
    }
    fn maintained_by(&self) -> Option<&'static dyn DmaMemory> {
        None
    }
}

impl fmt::Debug for InCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InCpu({:?})", *self.area)
    }
}
