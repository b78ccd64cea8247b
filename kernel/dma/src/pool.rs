//! Memory for copies that a device works on in place of a buffer that it cannot or must not reach.
//!
//! A pool is made of *sets* of [`SLOTS`] slots of [`SLOT`] bytes. A run of slots in one set is physically contiguous; a run is
//! found in the set's bit map with a handful of shifts, however many runs are taken. The sets are dealt out to *areas*, one for
//! each core as far as there are sets: a core takes from its own area and turns to the others only where that is full.
//!
//! The longest run has [`MAX_RUN`] bytes. A buffer that is longer gets several runs, up to the size of the pool.
//!
//! # Invariants
//!
//! A slot whose bit is clear belongs to exactly one run, and nobody else touches it. What an earlier user left in a slot is
//! overwritten before a device or the CPU sees it: that is the business of [`crate::bounce`] and of [`Chunk::zeroed`].
//!
//! # Locking
//!
//! One [`IrqMutex`] for each area, a leaf: its bit maps. One is held at a time, for one search.

#![expect(unsafe_code, reason = "hands out memory that it owns by pointer, and implements DmaMemory over it")]

use crate::Error;
use crate::buffer::to_usize;
use crate::memory::{DmaMemory, PageRequest, RawPages};
use crate::pages::Chunk;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use base::cpu::{self, MAX_CPUS};
use base::fallible;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use iommu::{OutOfMemory, PAGE_SIZE, PhysAddr, PhysRange};

/// Bytes in a slot: no cache line of one is another's.
pub(crate) const SLOT: u64 = 2048;
/// Slots in a set, one for each bit of its map.
const SLOTS: u32 = u128::BITS;
/// Bytes in a set, and in the longest contiguous run.
pub(crate) const MAX_RUN: u64 = SLOT * SLOTS as u64;

/// Memory for copies, see the module. Usually in an [`Arc`]; a pool that is a device's only memory is for ever.
pub struct Pool {
    name: Arc<str>,
    sets: Vec<Set>,
    areas: Vec<Area>,
    bytes: u64,
    used: AtomicU64,
    maintained_by: &'static dyn DmaMemory,
    /// What the sets are made of, where it is the pool's to free.
    _chunks: Vec<Chunk>,
}

/// # Invariants
///
/// `ptr` is `slots` slots of memory at `phys`, aligned to a slot, which live as long as the pool.
struct Set {
    phys: PhysAddr,
    ptr: NonNull<u8>,
    slots: u32,
}

// SAFETY: a pointer to memory that the pool owns, which any core may use.
unsafe impl Send for Set {}
// SAFETY: as above; what is not atomic goes through the locks of the areas.
unsafe impl Sync for Set {}

/// The bit maps of every `areas`-th set: a bit is set where the slot is free.
#[repr(align(64))]
struct Area {
    free: IrqMutex<Vec<u128>>,
}

/// A run of slots that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    set: u32,
    first: u8,
    count: u8,
}

/// The map of `count` slots from `first` on.
fn mask(first: u32, count: u32) -> u128 {
    let ones = if count >= SLOTS { u128::MAX } else { (1 << count) - 1 };
    ones << first
}

/// Where in the map `free` a run of `count` free slots begins.
fn starts(free: u128, count: u32) -> u128 {
    let (mut found, mut have) = (free, 1);
    while have < count {
        let more = have.min(count - have);
        found &= found >> more;
        have += more;
    }
    found
}

/// The slots of a set at `phys` whose address is `phase` modulo `align`; both are whole slots.
fn aligned(phys: PhysAddr, align: u64, phase: u64) -> u128 {
    let first = (phase.wrapping_sub(phys.get()) & (align - 1)) / SLOT;
    if first >= SLOTS.into() {
        return 0;
    }
    let (mut found, mut stride) = (1_u128 << first, align / SLOT);
    while stride < SLOTS.into() {
        found |= found << stride;
        stride *= 2;
    }
    found
}

impl Pool {
    /// Makes a pool of at least `bytes` (at least one set) of frames from `memory`, below or at the physical address `below`.
    /// It is as large as `memory` allows, if that is less.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] where there is not memory for one set.
    pub fn new(name: &str, memory: &'static dyn DmaMemory, bytes: u64, below: PhysAddr) -> Result<Self, Error> {
        Self::reached(name, memory, bytes, below, |_| true)
    }

    /// As [`Pool::new`], of memory that is `fit`.
    pub(crate) fn reached(
        name: &str,
        memory: &'static dyn DmaMemory,
        bytes: u64,
        below: PhysAddr,
        fit: impl Fn(PhysRange) -> bool,
    ) -> Result<Self, Error> {
        let (mut chunks, mut sets, mut unfit) = (Vec::new(), Vec::new(), Vec::new());
        let wanted = to_usize(bytes.div_ceil(MAX_RUN).max(1));
        // What is not fit is kept until the end, so that it is not handed out again.
        while sets.len() < wanted && unfit.len() <= wanted {
            let chunk = match Chunk::zeroed(memory, PageRequest { bytes: MAX_RUN, align: MAX_RUN, below }) {
                Ok(chunk) => chunk,
                Err(Error::OutOfMemory) => break,
                Err(error) => return Err(error),
            };
            if !fit(chunk.run()) {
                unfit.try_reserve(1)?;
                unfit.push(chunk);
                continue;
            }
            chunks.try_reserve(1)?;
            sets.try_reserve(1)?;
            let ptr = chunk.span(0).ok_or(Error::OutOfMemory)?.ptr;
            // INVARIANT: the chunk is all of one set, aligned to its size, and goes into the pool.
            sets.push(Set { phys: chunk.run().start(), ptr, slots: SLOTS });
            chunks.push(chunk);
        }
        if sets.is_empty() {
            return Err(Error::OutOfMemory);
        }
        Self::of(name, sets, chunks, memory)
    }

    /// Makes a pool of the physical memory `range`, which is at `ptr` for the CPU. Slots that are not whole are left out.
    /// `maintained_by` maintains the caches for it.
    ///
    /// # Errors
    ///
    /// [`Error::BadSize`] where there is not one whole page; [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// - The `range` is memory that nobody else uses for as long as the pool lives, readable and writable at `ptr`, cached
    ///   write-back, and not a part of a Rust object.
    /// - `maintained_by` can maintain the caches for it.
    pub unsafe fn carve_out(
        name: &str,
        range: PhysRange,
        ptr: NonNull<u8>,
        maintained_by: &'static dyn DmaMemory,
    ) -> Result<Self, Error> {
        let bad = Error::BadSize(range.len());
        let start = range.start().align_up(PAGE_SIZE).ok_or(bad.clone())?;
        let skipped = start.get() - range.start().get();
        let whole = range.len().checked_sub(skipped).map(|left| left / PAGE_SIZE * PAGE_SIZE);
        let whole = whole.filter(|whole| *whole != 0).ok_or(bad)?;
        let mut sets = Vec::new();
        for offset in (0..whole).step_by(to_usize(MAX_RUN)) {
            sets.try_reserve(1)?;
            let slots = ((whole - offset).min(MAX_RUN) / SLOT) as u32;
            // SAFETY: inside the range, all of which is at `ptr`.
            let ptr = unsafe { ptr.add(to_usize(skipped + offset)) };
            // INVARIANT: inside the range, which is the pool's.
            sets.push(Set { phys: PhysAddr::new(start.get() + offset), ptr, slots });
        }
        Self::of(name, sets, Vec::new(), maintained_by)
    }

    fn of(
        name: &str,
        sets: Vec<Set>,
        chunks: Vec<Chunk>,
        maintained_by: &'static dyn DmaMemory,
    ) -> Result<Self, Error> {
        let count = sets.len().clamp(1, MAX_CPUS);
        let mut areas = Vec::new();
        areas.try_reserve_exact(count)?;
        for area in 0..count {
            let mut free = Vec::new();
            free.try_reserve_exact(sets.len().div_ceil(count))?;
            free.extend(sets.iter().skip(area).step_by(count).map(|set| mask(0, set.slots)));
            areas.push(Area { free: IrqMutex::new(free) });
        }
        let bytes = sets.iter().map(|set| u64::from(set.slots) * SLOT).sum();
        let name = fallible::text(name).ok_or(Error::OutOfMemory)?;
        Ok(Self { name, sets, areas, bytes, used: AtomicU64::new(0), maintained_by, _chunks: chunks })
    }

    /// Its name in errors and reports.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The size in bytes: also the bound for everything that is copied through it at one time.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes in slots that are taken.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Who maintains the caches for it.
    pub(crate) fn maintained_by(&self) -> &'static dyn DmaMemory {
        self.maintained_by
    }

    /// Whether all of `run` is the pool's memory.
    pub(crate) fn covers(&self, run: PhysRange) -> bool {
        let mut left = run;
        // Sets may be neighbours.
        while !left.is_empty() {
            let Some(set) = self.sets.iter().find(|set| set.range().contains(left.start())) else { return false };
            let len = left.len().min(set.range().end().get() - left.start().get());
            let Some(rest) = left.part(len, left.len() - len) else { return true };
            left = rest;
        }
        true
    }

    /// Takes `bytes`, [`MAX_RUN`] at most, in a row, the first of them at an address that is `phase` modulo `align`, a power of two.
    /// Both are rounded to slots. `None` where no such run is free.
    pub(crate) fn take(&self, bytes: u64, align: u64, phase: u64) -> Option<Run> {
        let count = u32::try_from(bytes.div_ceil(SLOT)).ok().filter(|count| (1..=SLOTS).contains(count))?;
        let (align, phase) = (align.max(SLOT), phase / SLOT * SLOT);
        let areas = self.areas.len();
        let home = cpu::index() % areas;
        for (index, area) in self.areas.iter().enumerate().cycle().skip(home).take(areas) {
            let mut free = area.free.lock();
            for (free, number) in free.iter_mut().zip((index..).step_by(areas)) {
                let Some(set) = self.sets.get(number) else { break };
                let found = starts(*free, count) & aligned(set.phys, align, phase);
                if found != 0 {
                    let first = found.trailing_zeros();
                    *free &= !mask(first, count);
                    self.used.fetch_add(u64::from(count) * SLOT, Ordering::Relaxed);
                    return Some(Run { set: number as u32, first: first as u8, count: count as u8 });
                }
            }
        }
        None
    }

    /// Gives a run back, once.
    pub(crate) fn give(&self, run: Run) {
        let (set, areas) = (run.set as usize, self.areas.len());
        let slots = mask(run.first.into(), run.count.into());
        let Some(area) = self.areas.get(set % areas) else { return };
        let mut maps = area.free.lock();
        let Some(free) = maps.get_mut(set / areas).filter(|free| **free & slots == 0) else {
            drop(maps);
            log::error!("{}: a run was given back that was not taken", self.name);
            return;
        };
        *free |= slots;
        drop(maps);
        self.used.fetch_sub(u64::from(run.count) * SLOT, Ordering::Relaxed);
    }

    /// The memory of a run.
    pub(crate) fn memory_of(&self, run: Run) -> Option<RawPages> {
        let set = self.sets.get(run.set as usize)?;
        let offset = u64::from(run.first) * SLOT;
        // SAFETY: a run lies inside its set, which is at `ptr` (invariant).
        let ptr = unsafe { set.ptr.add(to_usize(offset)) };
        Some(RawPages { phys: set.phys.checked_add(offset)?, ptr, bytes: u64::from(run.count) * SLOT })
    }

    /// The run that begins at `phys` and has `bytes`.
    fn run_at(&self, phys: PhysAddr, bytes: u64) -> Option<Run> {
        let number = self.sets.iter().position(|set| set.range().contains(phys))?;
        let first = (phys.get() - self.sets.get(number)?.phys.get()) / SLOT;
        Some(Run { set: number as u32, first: first as u8, count: u8::try_from(bytes / SLOT).ok()? })
    }
}

impl Set {
    fn range(&self) -> PhysRange {
        PhysRange::new(self.phys, u64::from(self.slots) * SLOT).unwrap_or_default()
    }
}

/// A pool as the only memory of a device: what its driver allocates comes from it too, 256 KiB at most in
/// a row.
//
// SAFETY:
// - runs lie in memory of the pool's, which is mapped for good; each is taken once until it comes back;
// - maintenance is that of the pool's memory, and the alias never changes.
unsafe impl DmaMemory for Pool {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        let run = self.take(request.bytes, request.align, 0).ok_or(OutOfMemory)?;
        let memory = self.memory_of(run).ok_or(OutOfMemory)?;
        let last = memory.phys.checked_add(memory.bytes - 1).ok_or(OutOfMemory)?;
        if last > request.below {
            self.give(run);
            return Err(OutOfMemory);
        }
        Ok(memory)
    }

    unsafe fn free(&self, pages: RawPages) {
        match self.run_at(pages.phys, pages.bytes) {
            Some(run) => self.give(run),
            None => log::error!("{}: {pages:?} was freed, which is not of it", self.name),
        }
    }

    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintained_by.clean(ptr, bytes);
    }

    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintained_by.invalidate(ptr, bytes);
    }

    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintained_by.clean_invalidate(ptr, bytes);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({}, {:#x} of {:#x} bytes used)", self.name, self.used(), self.bytes)
    }
}

/// A pool that is there for as long as this is.
#[derive(Clone)]
pub(crate) enum PoolRef {
    Shared(Arc<Pool>),
    Static(&'static Pool),
}

impl Deref for PoolRef {
    type Target = Pool;
    fn deref(&self) -> &Pool {
        match self {
            Self::Shared(pool) => pool,
            Self::Static(pool) => pool,
        }
    }
}

#[cfg(all(test, feature = "fakes"))]
mod tests;
