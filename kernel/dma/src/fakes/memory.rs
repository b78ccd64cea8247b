//! Physical memory on the heap, with caches that a device may not snoop.

#![expect(unsafe_code, reason = "plays physical memory: pointers to the heap for the CPU, numbers for the bus")]

use super::Hardware;
use crate::buffer::{Span, to_usize};
use crate::copy;
use crate::memory::{AttributeError, Cacheability, DmaMemory, PageRequest, RawPages};
use alloc::alloc::{alloc, dealloc};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use base::IrqMutex;
use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use iommu::{OutOfMemory, PAGE_SIZE, PhysAddr, PhysRange};

/// Bytes in a line of the simulated cache.
const LINE: usize = 64;
/// What memory contains before it is written.
const POISON: u8 = 0xa5;

/// What a [`FakeMemory`] is like.
#[derive(Clone, Copy, Debug)]
pub struct FakeMemoryConfig {
    /// The physical addresses that are handed out, from the lowest on, never twice.
    pub range: PhysRange,
    /// Bytes left free after each allocation: 0 makes neighbours, a page makes everything scattered.
    pub gap: u64,
    /// Whether the bus sees what the CPU writes at once. If not, the two see different copies, and only cache maintenance
    /// moves data between them.
    pub snooped: bool,
}

impl Default for FakeMemoryConfig {
    fn default() -> Self {
        let range = PhysRange::new(PhysAddr::new(0x4000_0000), 1 << 46).unwrap_or_default();
        Self { range, gap: PAGE_SIZE, snooped: true }
    }
}

/// Physical memory on the heap.
pub struct FakeMemory {
    config: FakeMemoryConfig,
    state: IrqMutex<State>,
    /// Operations that succeed before one fails; `u64::MAX` for ever.
    until_failure: AtomicU64,
    only_cached: AtomicBool,
}

struct State {
    next: u64,
    blocks: BTreeMap<u64, Block>,
    violations: Vec<String>,
}

/// One allocation.
struct Block {
    /// What the CPU sees, through its cache if the memory is cacheable.
    cpu: NonNull<u8>,
    /// What the bus sees. The same pointer where the bus snoops, and where the CPU's alias is not cached.
    memory: NonNull<u8>,
    /// What the CPU's lines contained when they were last fetched or written back: a line that differs is dirty.
    clean: Vec<u8>,
    layout: Layout,
    cacheability: Cacheability,
}

// SAFETY: the pointers are to heap blocks that the block owns.
unsafe impl Send for Block {}

/// Copies out of memory that tests share with fake devices.
fn peek(base: NonNull<u8>, at: usize, to: &mut [u8]) {
    // SAFETY: callers stay inside one block of the heap, which is kept by the lock that they hold.
    let ptr = unsafe { base.add(at) };
    // SAFETY: as above; the CPU shares the memory with devices through atomics only.
    unsafe { copy::load(Span { ptr, bytes: to.len() }, to) };
}

/// Copies into memory that tests share with fake devices.
fn poke(base: NonNull<u8>, at: usize, from: &[u8]) {
    // SAFETY: as for `peek`.
    let ptr = unsafe { base.add(at) };
    // SAFETY: as for `peek`.
    unsafe { copy::store(Span { ptr, bytes: from.len() }, from) };
}

impl Block {
    /// What a bus master sees that snoops.
    fn snooped(&self) -> NonNull<u8> {
        if self.cacheability == Cacheability::Unmapped { self.memory } else { self.cpu }
    }

    /// Writes the line at `at` back if it is dirty.
    fn write_back(&mut self, at: usize) {
        let mut line = [0; LINE];
        peek(self.cpu, at, &mut line);
        if let Some(clean) = self.clean.get_mut(at..at + LINE)
            && clean != line
        {
            clean.copy_from_slice(&line);
            poke(self.memory, at, &line);
        }
    }

    /// Forgets the line at `at`, so that the next load fetches it.
    fn discard(&mut self, at: usize) {
        let mut line = [0; LINE];
        peek(self.memory, at, &mut line);
        poke(self.cpu, at, &line);
        if let Some(clean) = self.clean.get_mut(at..at + LINE) {
            clean.copy_from_slice(&line);
        }
    }
}

impl FakeMemory {
    /// Makes memory that lives as long as the test.
    pub fn new(config: FakeMemoryConfig) -> &'static Self {
        let state = State { next: config.range.start().get(), blocks: BTreeMap::new(), violations: Vec::new() };
        Box::leak(Box::new(Self {
            config,
            state: IrqMutex::new(state),
            until_failure: AtomicU64::new(u64::MAX),
            only_cached: AtomicBool::new(false),
        }))
    }

    /// Whether the bus sees what the CPU writes at once.
    pub fn is_snooped(&self) -> bool {
        self.config.snooped
    }

    /// Lets the next `operations` allocations succeed and the one after them fail, once.
    pub fn fail_after(&self, operations: u64) {
        self.until_failure.store(operations, Ordering::SeqCst);
    }

    /// From now on there is only cached memory (or no longer).
    pub fn only_cached(&self, only: bool) {
        self.only_cached.store(only, Ordering::SeqCst);
    }

    /// No more failures.
    pub fn heal(&self) {
        self.until_failure.store(u64::MAX, Ordering::SeqCst);
    }

    /// Whether the planned failure is now.
    fn fails(&self) -> bool {
        let count = |left| match left {
            u64::MAX => None,
            0 => Some(u64::MAX),
            left => Some(left - 1),
        };
        self.until_failure.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count) == Ok(0)
    }

    /// Allocations that have not been freed.
    pub fn live_allocations(&self) -> usize {
        self.state.lock().blocks.len()
    }

    /// Bytes in them.
    pub fn live_bytes(&self) -> u64 {
        self.state.lock().blocks.values().map(|block| block.layout.size() as u64).sum()
    }

    /// What was done to the memory that must not be: wrong frees, access of the bus to memory that is not allocated.
    pub fn violations(&self) -> Vec<String> {
        self.state.lock().violations.clone()
    }

    /// Reads `to.len()` bytes at `phys` as a bus master does that snoops the caches, whether others do or not.
    pub fn snooping_read(&self, phys: PhysAddr, to: &mut [u8]) -> bool {
        let len = to.len() as u64;
        self.bus(phys, len, |block, at| peek(block.snooped(), at, to))
    }

    /// Writes `from` at `phys` as a bus master does that snoops the caches: into lines that are not in memory yet.
    pub fn snooping_write(&self, phys: PhysAddr, from: &[u8]) -> bool {
        self.bus(phys, from.len() as u64, |block, at| poke(block.snooped(), at, from))
    }

    /// Reads `to.len()` bytes at `phys` as a bus master does. `false` where there is no allocated memory: a violation.
    pub fn bus_read(&self, phys: PhysAddr, to: &mut [u8]) -> bool {
        let len = to.len() as u64;
        self.bus(phys, len, |block, at| peek(block.memory, at, to))
    }

    /// Writes `from` at `phys` as a bus master does. `false` where there is no allocated memory: a violation.
    pub fn bus_write(&self, phys: PhysAddr, from: &[u8]) -> bool {
        self.bus(phys, from.len() as u64, |block, at| poke(block.memory, at, from))
    }

    fn bus(&self, phys: PhysAddr, len: u64, f: impl FnOnce(&mut Block, usize)) -> bool {
        let _hardware = Hardware::enter();
        let mut state = self.state.lock();
        if let Some((start, block)) = state.blocks.range_mut(..=phys.get()).next_back() {
            let offset = phys.get() - start;
            if offset.checked_add(len).is_some_and(|end| end <= block.layout.size() as u64) {
                f(block, to_usize(offset));
                return true;
            }
        }
        state.violations.push(format!("the bus reached {len:#x} bytes at {phys}, which nobody has"));
        false
    }

    /// Calls `f` for each line with a byte in the range, telling whether all of it is.
    fn maintain(&self, ptr: NonNull<u8>, bytes: usize, mut f: impl FnMut(&mut Block, usize, bool)) {
        let _hardware = Hardware::enter();
        if self.config.snooped {
            return;
        }
        let mut state = self.state.lock();
        let holds = |block: &&mut Block| {
            let offset = ptr.addr().get().wrapping_sub(block.cpu.addr().get());
            offset < block.layout.size()
        };
        let Some(block) = state.blocks.values_mut().find(holds).filter(|block| block.cpu != block.memory) else {
            state.violations.push(format!("cache maintenance of {ptr:?}, which is nobody's or not cached"));
            return;
        };
        let start = ptr.addr().get() - block.cpu.addr().get();
        let end = (start + bytes).min(block.layout.size());
        for line in (start / LINE * LINE..end).step_by(LINE) {
            f(block, line, line >= start && line + LINE <= end);
        }
    }
}

impl FakeMemory {
    fn take(&self, request: PageRequest, cacheability: Cacheability) -> Result<RawPages, OutOfMemory> {
        if self.fails() || Hardware::fails() {
            return Err(OutOfMemory);
        }
        let _hardware = Hardware::enter();
        let mut state = self.state.lock();
        let phys = PhysAddr::new(state.next).align_up(request.align).ok_or(OutOfMemory)?;
        let run = PhysRange::new(phys, request.bytes).ok_or(OutOfMemory)?;
        let last = PhysAddr::new(run.end().get() - 1);
        if !self.config.range.covers(run) || last > request.below {
            return Err(OutOfMemory);
        }
        let layout = Layout::from_size_align(to_usize(request.bytes), to_usize(PAGE_SIZE)).map_err(|_| OutOfMemory)?;
        let contents = if cacheability == Cacheability::Unmapped { 0 } else { POISON };
        let block = || {
            // SAFETY: the layout has a size: requests are not empty.
            let ptr = NonNull::new(unsafe { alloc(layout) }).ok_or(OutOfMemory)?;
            // SAFETY: just allocated with this size.
            unsafe { ptr.write_bytes(contents, layout.size()) };
            Ok(ptr)
        };
        let memory = block()?;
        // What is not cached has no copy in a cache, and what is not mapped nothing to get it by.
        let two_copies = !self.config.snooped && cacheability == Cacheability::WriteBack;
        let cpu = match cacheability {
            Cacheability::Unmapped => NonNull::dangling(),
            _ if two_copies => block()?,
            _ => memory,
        };
        let clean = if two_copies { alloc::vec![POISON; layout.size()] } else { Vec::new() };
        state.next = run.end().get() + self.config.gap;
        state.blocks.insert(phys.get(), Block { cpu, memory, clean, layout, cacheability });
        Ok(RawPages { phys, ptr: cpu, bytes: request.bytes })
    }

    fn give(&self, pages: RawPages, cacheability: Cacheability) {
        let _hardware = Hardware::enter();
        let mut state = self.state.lock();
        let Some(block) = state.blocks.remove(&pages.phys.get()) else {
            state.violations.push(format!("{pages:?} was freed, which nobody has"));
            return;
        };
        if block.cacheability != cacheability {
            state.violations.push(format!("{pages:?} was freed as {cacheability:?}, but is {:?}", block.cacheability));
        }
        if block.cpu != pages.ptr || block.layout.size() as u64 != pages.bytes {
            state.violations.push(format!("{pages:?} was freed, but allocated with another size or pointer"));
        }
        if block.cpu != block.memory && block.cacheability != Cacheability::Unmapped {
            // SAFETY: allocated with this layout in `take`, and taken out of the map: freed once.
            unsafe { dealloc(block.cpu.as_ptr(), block.layout) };
        }
        // SAFETY: as above.
        unsafe { dealloc(block.memory.as_ptr(), block.layout) };
    }

    /// How the CPU reaches the memory at `phys`; `None` if nobody has it.
    pub fn cacheability_at(&self, phys: PhysAddr) -> Option<Cacheability> {
        let state = self.state.lock();
        let (start, block) = state.blocks.range(..=phys.get()).next_back()?;
        (phys.get() - start < block.layout.size() as u64).then_some(block.cacheability)
    }
}

// SAFETY:
// - allocations are blocks of the heap of their own, within the range that was asked for, and no physical address is handed
//   out twice;
// - maintenance moves the data between the copies before it returns; what is not cacheable has one copy, and what is not mapped
//   no pointer.
unsafe impl DmaMemory for FakeMemory {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        self.take(request, Cacheability::WriteBack)
    }

    unsafe fn free(&self, pages: RawPages) {
        self.give(pages, Cacheability::WriteBack);
    }

    fn allocate_as(&self, request: PageRequest, cacheability: Cacheability) -> Result<RawPages, AttributeError> {
        if cacheability != Cacheability::WriteBack && self.only_cached.load(Ordering::SeqCst) {
            return Err(AttributeError::Unsupported);
        }
        self.take(request, cacheability).map_err(|_| AttributeError::OutOfMemory)
    }

    unsafe fn free_as(&self, pages: RawPages, cacheability: Cacheability) {
        self.give(pages, cacheability);
    }

    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintain(ptr, bytes, |block, line, _| block.write_back(line));
    }

    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintain(ptr, bytes, |block, line, whole| {
            if !whole {
                block.write_back(line);
            }
            block.discard(line);
        });
    }

    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.maintain(ptr, bytes, |block, line, _| {
            block.write_back(line);
            block.discard(line);
        });
    }
}
