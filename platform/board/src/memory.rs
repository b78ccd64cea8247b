//! The kernel's frames as memory for devices and for tables that hardware walks.
//!
//! Memory that is not cached, or that the CPU is not to reach, comes from blocks that have left the linear map (`kernel::mm::Pool`);
//! so does a carve-out of the device tree, which never was in it.

use alloc::boxed::Box;
use alloc::vec::Vec;
use arch::cache;
use arch::mmu::{self, Use};
use base::IrqMutex;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{AttributeError, Cacheability, DmaMemory, PageRequest, RawPages};
use iommu::contract::{TableBlock, TableMemory};
use iommu::{OutOfMemory, PAGE_SIZE, PhysAddr, PhysRange};
use kernel::machine::Machine;
use kernel::mm::{self, Backing, Pool, PoolStats, Zone};

/// Frames of the kernel's allocator, in the linear map.
#[derive(Debug)]
pub struct KernelMemory {
    /// Whether walkers of tables look into the CPU's caches.
    coherent: bool,
}

/// For hardware that is coherent with the CPU's caches.
pub static COHERENT: KernelMemory = KernelMemory { coherent: true };
/// For hardware that is not: what it is to see is cleaned to memory.
pub static NON_COHERENT: KernelMemory = KernelMemory { coherent: false };

const FOUR_GIB: u64 = 1 << 32;
/// What is smaller never comes from the area that is kept for large allocations.
const LARGE: u64 = 16 * PAGE_SIZE;

/// Pages outside the linear map.
static ALIASES: Pool<Blocks> = Pool::new(Blocks { grows: true });

/// What is outside the linear map for the sake of its attributes, carve-outs not counted.
pub fn alias_stats() -> PoolStats {
    ALIASES.stats()
}

/// Gives all memory back that is outside the linear map without need. Says whether there was any.
pub fn trim_aliases() -> bool {
    ALIASES.trim()
}

/// One page, as most allocations are, of the frames that are kept at hand.
#[inline(always)]
fn at_hand(request: PageRequest) -> Option<RawPages> {
    let PageRequest { bytes, align, below } = request;
    if bytes != PAGE_SIZE || align > PAGE_SIZE || below.get() < FOUR_GIB - 1 {
        return None;
    }
    let phys = mm::alloc_at_hand(zone_of(below))?;
    // No frame lies where the linear map has none: it is not null.
    Some(RawPages { phys, ptr: pointer(phys).ok()?, bytes })
}

/// Where memory is looked for first.
#[inline]
fn zone_of(below: PhysAddr) -> Zone {
    if below.get() >= u64::MAX >> 16 { Zone::Any } else { Zone::Below4GiB }
}

/// Allocates frames; what is kept outside the linear map for the next who asks goes first when there are none.
fn allocate(bytes: u64, align: u64, below: PhysAddr) -> Result<PhysRange, OutOfMemory> {
    match allocate_linear(bytes, align, below) {
        Err(OutOfMemory) if ALIASES.trim() => allocate_linear(bytes, align, below),
        other => other,
    }
}

/// Allocates frames, large runs from the area kept for them if nothing else is left.
fn allocate_contiguous(bytes: u64, align: u64, below: PhysAddr) -> Result<PhysRange, OutOfMemory> {
    match allocate(bytes, align, below) {
        Err(OutOfMemory) if bytes >= LARGE => {
            let count = usize::try_from(bytes / PAGE_SIZE).map_err(|_| OutOfMemory)?;
            let range = mm::alloc_in_area(count, align.max(PAGE_SIZE)).map_err(|_| OutOfMemory)?;
            if range.end().get() - 1 > below.get() {
                give_back(range);
                return Err(OutOfMemory);
            }
            Ok(range)
        }
        other => other,
    }
}

fn allocate_linear(bytes: u64, align: u64, below: PhysAddr) -> Result<PhysRange, OutOfMemory> {
    let count = usize::try_from(bytes.div_ceil(PAGE_SIZE)).map_err(|_| OutOfMemory)?;
    let zone = zone_of(below);
    let fits = |range: &PhysRange| range.end().get() - 1 <= below.get();
    let first = mm::alloc_aligned(count, align.max(PAGE_SIZE), zone);
    let found = match first {
        // Between 4 GiB and no limit at all, memory above 4 GiB may do.
        Err(_) if zone == Zone::Below4GiB && below.get() >= FOUR_GIB => {
            mm::alloc_aligned(count, align.max(PAGE_SIZE), Zone::Any)
        }
        other => other,
    };
    let range = found.map_err(|_| OutOfMemory)?;
    if !fits(&range) {
        give_back(range);
        return Err(OutOfMemory);
    }
    Ok(range)
}

fn give_back(range: PhysRange) {
    // SAFETY: the callers own the range and use it no more; devices have been revoked, which is the contract of `dma`.
    if let Err(error) = unsafe { mm::free(range) } {
        log::error!("memory: {error}");
    }
}

fn pointer(phys: PhysAddr) -> Result<NonNull<u8>, OutOfMemory> {
    NonNull::new(mm::pointer(phys)).ok_or(OutOfMemory)
}

/// The carve-outs that are in use.
static CARVE_OUTS: IrqMutex<Vec<(PhysRange, &'static CarveOut)>> = IrqMutex::new(Vec::new());

/// Where the memory of a PCI function comes from: `host` and `way` as for [`Machine::function_pools`].
///
/// # Errors
///
/// [`OutOfMemory`].
pub(crate) fn of_function(
    machine: &Machine,
    host: usize,
    way: &[(u8, u8)],
) -> Result<&'static dyn DmaMemory, OutOfMemory> {
    let pools = machine.function_pools(host, way);
    // An area for large allocations that is not everybody's is a carve-out like others.
    let own = pools.carve_out.or(pools.contiguous.filter(|pool| !pool.default));
    let Some(range) = own.and_then(|pool| pool.range) else { return Ok(&COHERENT) };
    let find =
        |list: &[(PhysRange, &'static CarveOut)]| list.iter().find(|(other, _)| *other == range).map(|(_, it)| *it);
    if let Some(known) = find(&CARVE_OUTS.lock()) {
        return Ok(known);
    }
    // SAFETY: the device tree says that it is for these devices; it is left out of the linear map and of the frames, and there is
    // one of it: this is what the list is for, and functions are attached one after another.
    let made = unsafe { CarveOut::new(range) }?;
    let mut list = CARVE_OUTS.lock();
    list.try_reserve(1).map_err(|_| OutOfMemory)?;
    list.push((range, made));
    Ok(made)
}

/// Blocks of the kernel's frames, and mappings of their pages.
struct Blocks {
    /// Whether there are more than those that were added.
    grows: bool,
}

fn physical(range: PhysRange) -> mmu::Physical {
    range.start().get()..range.end().get()
}

impl Blocks {
    /// Takes frames out of the linear map, or gives them back.
    fn leave(&self, frames: PhysRange) -> Option<PhysRange> {
        // SAFETY: just allocated, and nobody else's.
        if unsafe { mmu::leave_linear(physical(frames)) }.is_ok() {
            return Some(frames);
        }
        // Mapped in blocks that are too large.
        give_back(frames);
        None
    }
}

impl Backing for Blocks {
    fn take(&self, bytes: u64, align: u64, below: PhysAddr) -> Option<PhysRange> {
        if !self.grows {
            return None;
        }
        let anywhere = allocate_linear(bytes, align, below).or_else(|_| {
            let count = usize::try_from(bytes / PAGE_SIZE).map_err(|_| OutOfMemory)?;
            let range = mm::alloc_in_area(count, align).map_err(|_| OutOfMemory)?;
            if range.end().get() - 1 > below.get() {
                give_back(range);
                return Err(OutOfMemory);
            }
            Ok(range)
        });
        let low = || allocate_linear(bytes, align, below.min(PhysAddr::new(FOUR_GIB - 1))).ok();
        anywhere.ok().and_then(|frames| self.leave(frames)).or_else(|| self.leave(low()?))
    }

    fn give(&self, range: PhysRange) {
        // SAFETY: the pool's: it left the linear map whole and its pages are unmapped; what was not cached left no line behind.
        match unsafe { mmu::enter_linear(physical(range)) } {
            Ok(()) => give_back(range),
            Err(error) => log::error!("memory: {range} is lost: {error}"),
        }
    }

    fn map(&self, pages: PhysRange, cacheability: Cacheability) -> Option<NonNull<u8>> {
        let purpose = if cacheability == Cacheability::WriteBack { Use::Data } else { Use::Uncached };
        // SAFETY: the pool's pages are not in the linear map, and those that it hands out are mapped nowhere.
        let pointer = unsafe { mmu::map_alias(physical(pages), purpose) }.ok()?;
        let (address, len) = (pointer.addr().get(), usize::try_from(pages.len()).ok()?);
        if cacheability == Cacheability::WriteBack {
            return Some(pointer);
        }
        // What earlier users left in caches. Maintenance by an alias that is not cached reaches them all the same, and nothing
        // can be fetched again: there is no cacheable alias left to fetch by.
        // SAFETY: just mapped.
        unsafe { cache::clean_invalidate(address, len) };
        if cacheability == Cacheability::NonCacheable {
            return Some(pointer);
        }
        // SAFETY: just mapped, and nobody else's.
        unsafe { cache::zero(address, len) };
        base::barrier::publish();
        // SAFETY: the pointer is used no more.
        unsafe { mmu::unmap_alias(physical(pages)) }.ok()?;
        Some(NonNull::dangling())
    }

    fn unmap(&self, pages: PhysRange, cacheability: Cacheability) -> bool {
        // SAFETY: the owner has given the pages back and uses no pointer to them.
        cacheability == Cacheability::Unmapped || unsafe { mmu::unmap_alias(physical(pages)) }.is_ok()
    }
}

/// A carve-out of the device tree: shared memory of the devices that refer to it. Their streaming memory comes from the frames.
pub struct CarveOut {
    pool: Pool<Blocks>,
    frames: &'static KernelMemory,
}

impl CarveOut {
    /// The memory of `range`, which is in no linear map, and which nobody else uses, for good.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    ///
    /// # Safety
    ///
    /// It is RAM, for these devices alone, mapped nowhere.
    pub unsafe fn new(range: PhysRange) -> Result<&'static Self, OutOfMemory> {
        let pool = Pool::new(Blocks { grows: false });
        pool.add(range).map_err(|_| OutOfMemory)?;
        Ok(Box::leak(Box::new(Self { pool, frames: &COHERENT })))
    }

    /// What of it is in use.
    pub fn stats(&self) -> PoolStats {
        self.pool.stats()
    }
}

// SAFETY:
// - streaming memory is the frames';
// - shared memory is the pool's: each page for one owner, mapped as asked for, nowhere else, and uncached without lines left.
unsafe impl DmaMemory for CarveOut {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        DmaMemory::allocate(self.frames, request)
    }

    fn allocate_contiguous(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        self.frames.allocate_contiguous(request)
    }

    unsafe fn free(&self, pages: RawPages) {
        // SAFETY: the caller's promise: it came from the frames.
        unsafe { DmaMemory::free(self.frames, pages) };
    }

    fn allocate_as(&self, request: PageRequest, cacheability: Cacheability) -> Result<RawPages, AttributeError> {
        shared(&self.pool, request, cacheability)
    }

    unsafe fn free_as(&self, pages: RawPages, cacheability: Cacheability) {
        give_shared(&self.pool, &pages, cacheability);
    }

    unsafe fn zero(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { cache::zero(ptr.addr().get(), bytes) };
    }

    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        self.frames.clean(ptr, bytes);
    }

    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.frames.invalidate(ptr, bytes);
    }

    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.frames.clean_invalidate(ptr, bytes);
    }
}

fn shared(pool: &Pool<Blocks>, request: PageRequest, how: Cacheability) -> Result<RawPages, AttributeError> {
    let (range, ptr) = pool.allocate(request, how)?;
    Ok(RawPages { phys: range.start(), ptr, bytes: range.len() })
}

fn give_shared(pool: &Pool<Blocks>, pages: &RawPages, how: Cacheability) {
    if let Some(range) = PhysRange::new(pages.phys, pages.bytes) {
        pool.free(range, how);
    }
}

// SAFETY:
// - frames come from the kernel's allocator, which gives each to one owner only, and are mapped read-write in the linear map;
// - cache maintenance is by virtual address to the point of coherency, complete on return;
// - what is not write-back in the linear map has left it, is mapped as asked for and nowhere else, and was cleaned and invalidated
//   after it had no cacheable alias any more.
unsafe impl DmaMemory for KernelMemory {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        if let Some(page) = at_hand(request) {
            return Ok(page);
        }
        let range = allocate(request.bytes, request.align, request.below)?;
        Ok(RawPages { phys: range.start(), ptr: pointer(range.start())?, bytes: range.len() })
    }

    #[inline]
    fn allocate_contiguous(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        if let Some(page) = at_hand(request) {
            return Ok(page);
        }
        let range = allocate_contiguous(request.bytes, request.align, request.below)?;
        Ok(RawPages { phys: range.start(), ptr: pointer(range.start())?, bytes: range.len() })
    }

    unsafe fn free(&self, pages: RawPages) {
        if let Some(range) = PhysRange::new(pages.phys, pages.bytes) {
            give_back(range);
        }
    }

    fn allocate_as(&self, request: PageRequest, cacheability: Cacheability) -> Result<RawPages, AttributeError> {
        match cacheability {
            Cacheability::WriteBack => self.allocate_contiguous(request).map_err(|_| AttributeError::OutOfMemory),
            _ => shared(&ALIASES, request, cacheability),
        }
    }

    unsafe fn free_as(&self, pages: RawPages, cacheability: Cacheability) {
        match cacheability {
            // SAFETY: the caller's promise: it came from the frames.
            Cacheability::WriteBack => unsafe { DmaMemory::free(self, pages) },
            _ => give_shared(&ALIASES, &pages, cacheability),
        }
    }

    unsafe fn zero(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { cache::zero(ptr.addr().get(), bytes) };
    }

    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean(ptr.addr().get(), bytes) };
    }

    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        // Lines that straddle an end must not lose a neighbour's store. Cleaning before discarding costs little more and is
        // right for all of them.
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean_invalidate(ptr.addr().get(), bytes) };
    }

    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        // SAFETY: the range is mapped: it came from `allocate`.
        unsafe { cache::clean_invalidate(ptr.addr().get(), bytes) };
    }
}

// SAFETY: frames come from the kernel's allocator, which gives each to one owner only; they are zeroed and cleaned before they
// are handed out, and cleaned or discarded by virtual address where the hardware does not snoop.
unsafe impl TableMemory for KernelMemory {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        let len = bytes as u64;
        let range = allocate(len, len, PhysAddr::new(u64::MAX))?;
        let pointer = pointer(range.start())?;
        // SAFETY: the frames are ours alone and mapped; all bytes of them.
        unsafe { cache::zero(pointer.addr().get(), range.len() as usize) };
        // SAFETY: aligned to a page, zeroed, ours until `free`, where the slice comes back and is used no more; all further
        // access is atomic.
        let words = unsafe { core::slice::from_raw_parts(pointer.cast::<AtomicU64>().as_ptr(), bytes / 8) };
        self.publish(words);
        // SAFETY: just allocated, for the caller alone; it comes back through `free`.
        Ok(unsafe { TableBlock::new(range.start(), words, self) })
    }

    fn free(&self, phys: PhysAddr, words: &'static [AtomicU64]) {
        let len = (size_of_val(words) as u64).next_multiple_of(PAGE_SIZE);
        if let Some(range) = PhysRange::new(phys, len) {
            give_back(range);
        }
    }

    fn publish(&self, words: &[AtomicU64]) {
        if !self.coherent {
            core::sync::atomic::fence(Ordering::SeqCst);
            // SAFETY: the words are mapped.
            unsafe { cache::clean(words.as_ptr().addr(), size_of_val(words)) };
        }
        base::barrier::publish();
    }

    fn publishes_by_barrier(&self) -> bool {
        self.coherent
    }

    fn observe(&self, words: &[AtomicU64]) {
        if !self.coherent {
            // The CPU never stores to words that hardware writes, so that cleaning writes nothing back over them.
            // SAFETY: the words are mapped.
            unsafe { cache::clean_invalidate(words.as_ptr().addr(), size_of_val(words)) };
        }
        base::barrier::device_read();
    }
}
