//! Which device addresses are taken.
//!
//! An [`IovaAllocator`] hands out ranges of one window, never page 0 of the space, and takes back exactly what it has handed out:
//! a part of a range, two ranges in one, or a range twice is an error, not a later disaster.
//!
//! The lowest chunk or range that is free goes first, for every device, so that those which gain by addresses below 4 GiB get
//! them without asking. What is left of a chunk of which a part is reserved (the first, for its page 0) is taken only when no
//! whole chunk is left, wherever it lies.
//!
//! # Two floors
//!
//! The exact allocator (`tree`) knows every range and finds a place in logarithmic time. Before it stand caches of small
//! ranges: a *chunk* is 512 aligned pages cut into slots of one power of two (up to all of them), a core allocates from a chunk
//! of its own, any core may free into it, and both look at a few words, however many ranges are live. The address itself says in which
//! chunk a range would be, and the chunk says how many pages of which slots are in use, so this way is checked as exactly as the other one,
//! and needs no memory.
//!
//! Ranges that are taken by address and lie in one chunk are kept by the same means, in chunks that have no slots but a bit for
//! each page.
//!
//! Before both stands what each core has given back last (`kept`).
//!
//! Caches cannot hoard: a chunk that becomes vacant goes back (unless a core is using it), and before an allocation fails,
//! all chunks of all cores are dissolved, which turns every slot in use into a range of its own and everything else, up to
//! the unused end of a slot, into free space. An allocation fails only where no place is left.
//!
//! # Locking
//!
//! The tree's lock, then the lock of one chunk; the lock of a magazine by itself. All are `IrqMutex`es, held for one operation. Memory
//! for the tree's nodes is allocated under its lock, so the heap's lock comes after both. Not for interrupt handlers.

mod cache;
mod chunk;
mod kept;
#[cfg(test)]
mod tests;
mod tree;

use crate::{Iova, IovaError, IovaRange, OutOfMemory, PAGE_SIZE};
use alloc::boxed::Box;
use alloc::sync::Weak;
use alloc::vec::Vec;
use base::{IrqMutex, IrqMutexGuard, cpu};
use chunk::{BY_ADDRESS, CHUNK, CHUNK_SHIFT, CLASSES, Chunk, NOBODY};
use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64};
pub use kept::Keep;
use kept::Magazine;
use spin::Once;
use tree::{Tree, Use};

/// Chunks of one block.
const BLOCK: usize = 512;
/// The most blocks that a window can have at a time: chunks for 512 GiB of pages of 4 KiB.
const BLOCKS: usize = 512;

/// What one core has, for each class.
#[repr(align(64))]
struct Core {
    /// What it has given back last (see `kept`).
    kept: [AtomicU64; CLASSES],
    /// What it has given back beside that, likewise, made when there is some.
    magazines: [Lazy<IrqMutex<Magazine>>; CLASSES],
    /// The chunk from which it allocates.
    chunks: [AtomicU32; CLASSES],
}

impl Core {
    fn new() -> Self {
        Self {
            kept: [const { AtomicU64::new(0) }; CLASSES],
            magazines: [const { Once::new() }; CLASSES],
            chunks: [const { AtomicU32::new(u32::MAX) }; CLASSES],
        }
    }
}

/// Something that is made when it is first used. (An array of one, since only slices can be allocated fallibly.)
type Lazy<T> = Once<Box<[T; 1]>>;

/// The bits of some chunks or blocks.
type Bits = [AtomicU64; BLOCK / 64];

/// Neighbouring chunks.
struct Block {
    chunks: [Lazy<IrqMutex<Chunk>>; BLOCK],
    /// One bit for each chunk that is listed under its class.
    listed: [Bits; CLASSES],
}

#[allow(clippy::declare_interior_mutable_const)] // To make arrays with.
const NO_BITS: Bits = [const { AtomicU64::new(0) }; BLOCK / 64];

impl Block {
    fn new() -> Self {
        Self { chunks: [const { Once::new() }; BLOCK], listed: [const { NO_BITS }; CLASSES] }
    }
}

/// One window of device addresses.
pub struct IovaAllocator {
    window: IovaRange,
    page_shift: u32,
    /// Pages kept free behind every allocation.
    guard: u64,
    /// The first page of the first chunk.
    front: u64,
    /// How many chunks there can be.
    count: usize,
    blocks: Box<[Lazy<Block>]>,
    /// By index.
    cores: Box<[Core; cpu::MAX_CPUS]>,
    /// One bit for each block that may have a listed chunk of that class.
    listed: [Bits; CLASSES],
    shared: IrqMutex<Tree>,
    /// Who else keeps ranges that nobody uses.
    keepers: IrqMutex<Vec<Weak<dyn Keep>>>,
}

impl IovaAllocator {
    /// Makes an allocator of the addresses in `window`, in units of `page_size` bytes (a power of two, at least
    /// [`PAGE_SIZE`]). Page 0 of the space is
    /// never given out, whatever the window says.
    ///
    /// # Errors
    ///
    /// [`IovaError::Misaligned`] for a page size that is none; [`IovaError::OutOfWindow`] for a window without a whole page;
    /// [`IovaError::OutOfMemory`].
    pub fn new(window: IovaRange, page_size: u64) -> Result<Self, IovaError> {
        Self::with_guard(window, page_size, 0)
    }

    /// Like [`IovaAllocator::new`], and keeps `guard` bytes (a multiple of the page size) free behind every allocation, so
    /// that a device which runs past the end of a buffer faults instead of reaching the next one.
    ///
    /// # Errors
    ///
    /// As [`IovaAllocator::new`].
    pub fn with_guard(window: IovaRange, page_size: u64, guard: u64) -> Result<Self, IovaError> {
        if !page_size.is_power_of_two() || page_size < PAGE_SIZE || guard & (page_size - 1) != 0 {
            return Err(IovaError::Misaligned(page_size));
        }
        let start = window.start().get().max(page_size).checked_next_multiple_of(page_size);
        let start = start.ok_or(IovaError::OutOfWindow(window))?;
        let page_shift = page_size.trailing_zeros();
        let (first, end) = (start >> page_shift, window.end().get() >> page_shift);
        if first >= end {
            return Err(IovaError::OutOfWindow(window));
        }
        let between = IovaRange::between(Iova::new(start), Iova::new(end << page_shift));
        let window = between.ok_or(IovaError::OutOfWindow(window))?;
        let front = first.next_multiple_of(CHUNK);
        let count = (end.saturating_sub(front) >> CHUNK_SHIFT).min((BLOCKS * BLOCK) as u64) as usize;
        Ok(Self {
            window,
            page_shift,
            guard: guard >> page_shift,
            front,
            count,
            blocks: boxed(count.div_ceil(BLOCK), Once::new)?,
            cores: boxed(cpu::MAX_CPUS, Core::new)?.try_into().map_err(|_| OutOfMemory)?,
            listed: [const { NO_BITS }; CLASSES],
            shared: IrqMutex::new(Tree::new(first, end)?),
            keepers: IrqMutex::new(Vec::new()),
        })
    }

    /// The addresses that can be given out.
    pub fn window(&self) -> IovaRange {
        self.window
    }

    /// The unit of allocation in bytes.
    pub fn page_size(&self) -> u64 {
        1 << self.shift()
    }

    /// Takes exactly `range`, for good or until [`IovaAllocator::release`].
    ///
    /// # Errors
    ///
    /// [`IovaError::InUse`] if any of it is allocated or reserved; [`IovaError::OutOfWindow`], [`IovaError::Misaligned`],
    /// [`IovaError::OutOfMemory`].
    #[inline]
    pub fn reserve(&self, range: IovaRange) -> Result<(), IovaError> {
        let (start, len) = self.pages(range);
        if range.is_aligned(self.page_size())
            && self.window.covers(range)
            && let Some(taken) = self.take_in_chunk(start, len)
        {
            return if taken { Ok(()) } else { Err(IovaError::InUse(range)) };
        }
        self.take(range, Use::Reserved)
    }

    /// Gives back what [`IovaAllocator::reserve`] took.
    ///
    /// # Errors
    ///
    /// [`IovaError::NotAllocated`] if exactly this range is not reserved.
    #[inline]
    pub fn release(&self, range: IovaRange) -> Result<(), IovaError> {
        let (start, len) = self.pages(range);
        let whole = range.is_aligned(self.page_size());
        if whole && let Some(chunk) = self.chunk((start.wrapping_sub(self.front) >> CHUNK_SHIFT) as usize) {
            let mut chunk = chunk.lock();
            if chunk.class == Some(BY_ADDRESS) {
                let there = chunk.put_at(start & (CHUNK - 1), len);
                return if there { Ok(()) } else { Err(IovaError::NotAllocated(range)) };
            }
        }
        if whole && self.shared.lock().give_back(start, len, Use::Reserved) {
            Ok(())
        } else {
            Err(IovaError::NotAllocated(range))
        }
    }

    /// Allocates `len` bytes (a multiple of the page size) at a multiple of `align` (a power of two) that end at or before the
    /// address `limit`. The guard, if there is one, lies before the limit too.
    ///
    /// # Errors
    ///
    /// [`IovaError::NoSpace`], [`IovaError::Misaligned`], [`IovaError::OutOfMemory`].
    #[inline(always)]
    pub fn allocate(&self, len: u64, align: u64, limit: Iova) -> Result<IovaRange, IovaError> {
        let class = class_of(len >> self.shift(), 1) as usize;
        let core = self.here();
        match self.take_kept(core.kept.get(class), len, align, limit) {
            Some(range) => Ok(range),
            None => self.allocate_range(core, class, len, align, limit),
        }
    }

    /// With what has been found already.
    #[inline(never)]
    fn allocate_range(
        &self,
        core: &Core,
        class: usize,
        len: u64,
        align: u64,
        limit: Iova,
    ) -> Result<IovaRange, IovaError> {
        match self.take_from_magazine(core, class, len, align, limit) {
            Some(range) => Ok(range),
            None => self.allocate_another(len, align, limit),
        }
    }

    #[inline(never)]
    fn allocate_another(&self, len: u64, align: u64, limit: Iova) -> Result<IovaRange, IovaError> {
        if let Some(range) = self.search_magazine(len, align, limit) {
            return Ok(range);
        }
        if len & (self.page_size() - 1) == 0
            && align.is_power_of_two()
            && let Some(start) = self.allocate_cached(len, align, limit)
            && let Some(range) = IovaRange::new(Iova::new(start << self.shift()), len)
        {
            return Ok(range);
        }
        self.allocate_slowly(len, align, limit)
    }

    /// Allocates from the chunk of this core, if that has a slot for `len` bytes.
    #[inline(always)]
    fn allocate_cached(&self, len: u64, align: u64, limit: Iova) -> Option<u64> {
        let (pages, align, limit) = self.in_pages(len, align, limit);
        let class = class_of(pages, align);
        if len == 0 || class >= CLASSES as u32 {
            return None;
        }
        self.allocate_here(class as u8, pages as u16, limit)
    }

    /// Length with guard, alignment, and the first page beyond the limit.
    #[inline(always)]
    fn in_pages(&self, len: u64, align: u64, limit: Iova) -> (u64, u64, u64) {
        // The guard is less than the space, and a page more than the last one is not beyond 64 bits.
        let pages = (len >> self.shift()).wrapping_add(self.guard);
        let align = (align >> self.shift()).max(1);
        let last = u64::from(!limit.get() & (self.page_size() - 1) == 0);
        (pages, align, (limit.get() >> self.shift()).wrapping_add(last))
    }

    #[cold]
    #[inline(never)]
    fn allocate_slowly(&self, len: u64, align: u64, limit: Iova) -> Result<IovaRange, IovaError> {
        if len == 0 || len & (self.page_size() - 1) != 0 || !align.is_power_of_two() {
            return Err(IovaError::Misaligned(self.page_size()));
        }
        let no_space = IovaError::NoSpace { len, align, limit };
        let (pages, align, limit) = self.in_pages(len, align, limit);
        let class = class_of(pages, align);
        let small = class < CLASSES as u32;
        let cached = if small { self.allocate_small(class as u8, pages as u16, limit) } else { None };
        let start = match cached {
            Some(start) => start,
            None => self.allocate_exact(pages, align, limit)?.ok_or(no_space)?,
        };
        IovaRange::new(Iova::new(start << self.shift()), len).ok_or(no_space)
    }

    /// Gives back what [`IovaAllocator::allocate`] returned. No device must be able to reach anything through it any more.
    ///
    /// # Errors
    ///
    /// [`IovaError::NotAllocated`] if exactly this range is not allocated; nothing has changed then.
    pub fn free(&self, range: IovaRange) -> Result<(), IovaError> {
        if self.is_kept(range) { Err(IovaError::NotAllocated(range)) } else { self.free_range(range) }
    }

    #[inline(never)]
    fn free_range(&self, range: IovaRange) -> Result<(), IovaError> {
        let (start, len) = self.pages(range);
        if range.is_empty() || !range.is_aligned(self.page_size()) {
            return Err(IovaError::NotAllocated(range));
        }
        // Both are far below 64 bits.
        let pages = len.wrapping_add(self.guard);
        let number = (start.wrapping_sub(self.front) >> CHUNK_SHIFT) as usize;
        if let Some(chunk) = self.chunk(number) {
            let mut chunk = chunk.lock();
            if chunk.class.is_some() {
                let freed = chunk.put(start & (CHUNK - 1), pages);
                if freed && chunk.owner == NOBODY {
                    self.freed_in_nobodys(number, chunk);
                } else {
                    drop(chunk);
                }
                return if freed { Ok(()) } else { Err(IovaError::NotAllocated(range)) };
            }
        }
        self.free_in_tree(range, start, pages)
    }

    /// What a slot that was freed in a chunk that no core owns makes of that.
    #[inline(never)]
    fn freed_in_nobodys(&self, number: usize, mut chunk: IrqMutexGuard<'_, Chunk>) {
        let vacant = chunk.is_vacant();
        self.list(number, &mut chunk);
        drop(chunk);
        if vacant {
            self.retire(number);
        }
    }

    #[inline(never)]
    fn free_in_tree(&self, range: IovaRange, start: u64, pages: u64) -> Result<(), IovaError> {
        let there = self.shared.lock().give_back(start, pages, Use::Allocated);
        if there { Ok(()) } else { Err(IovaError::NotAllocated(range)) }
    }

    /// Takes exactly `range` for good: what [`IovaAllocator::release`] gives back are other ranges.
    ///
    /// # Errors
    ///
    /// As [`IovaAllocator::reserve`].
    pub(crate) fn withhold(&self, range: IovaRange) -> Result<(), IovaError> {
        self.take(range, Use::Withheld)
    }

    /// Undoes [`IovaAllocator::withhold`].
    pub(crate) fn restore(&self, range: IovaRange) {
        let (start, len) = self.pages(range);
        self.shared.lock().give_back(start, len, Use::Withheld);
    }

    fn take(&self, range: IovaRange, used: Use) -> Result<(), IovaError> {
        if range.is_empty() || !range.is_aligned(self.page_size()) {
            return Err(IovaError::Misaligned(self.page_size()));
        }
        if !self.window.covers(range) {
            return Err(IovaError::OutOfWindow(range));
        }
        let (start, len) = self.pages(range);
        let taken = self.reclaiming(start, start + len, |tree| Ok(tree.take(start, len, used)?.then_some(())))?;
        taken.ok_or(IovaError::InUse(range))
    }

    /// log2 of the page size, as the compiler must see it to leave out the check that it is less than 64.
    #[inline]
    const fn shift(&self) -> u32 {
        self.page_shift & 63
    }

    #[inline]
    fn chunk(&self, number: usize) -> Option<&IrqMutex<Chunk>> {
        let [block] = &**self.blocks.get(number / BLOCK)?.get()?;
        let [chunk] = &**block.chunks[number % BLOCK].get()?;
        Some(chunk)
    }

    #[inline]
    fn chunk_start(&self, number: usize) -> u64 {
        // Of chunks that are inside the window.
        self.front.wrapping_add((number as u64) << CHUNK_SHIFT)
    }

    #[inline]
    fn pages(&self, range: IovaRange) -> (u64, u64) {
        (range.start().get() >> self.shift(), range.len() >> self.shift())
    }
}

/// log2 of the least power of two that is no less than either.
#[inline(always)]
fn class_of(pages: u64, align: u64) -> u32 {
    u64::BITS - (pages.wrapping_sub(1) | align.wrapping_sub(1)).leading_zeros()
}

/// Allocates one.
fn one<T>(make: impl FnMut() -> T) -> Result<Box<[T; 1]>, OutOfMemory> {
    boxed(1, make)?.try_into().map_err(|_| OutOfMemory)
}

/// Allocates a slice.
fn boxed<T>(len: usize, make: impl FnMut() -> T) -> Result<Box<[T]>, OutOfMemory> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| OutOfMemory)?;
    values.resize_with(len, make);
    Ok(values.into_boxed_slice())
}

impl fmt::Debug for IovaAllocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IovaAllocator({})", self.window)
    }
}
