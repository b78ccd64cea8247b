//! The tables of the running kernel.

use super::runs;
use super::tables::{self, MapError, Tables, Use};
use crate::layout::{self, LINEAR_BASE, LINEAR_LIMIT, PAGE_SIZE};
use crate::mmio::Mmio;
use aarch64_cpu::asm::barrier;
use aarch64_cpu::registers::{PAR_EL1, SCTLR_EL1, TCR_EL1, TTBR0_EL1};
use base::IrqMutex;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use tock_registers::interfaces::{ReadWriteable, Readable, Writeable};

const PAGE: u64 = PAGE_SIZE as u64;
const BLOCK: u64 = 2 << 20;
const LARGE_BLOCK: u64 = 1 << 30;

/// Tables in the image, for as long as there is no frame allocator.
const POOL_TABLES: usize = 72;

/// How many GiB of memory, the lowest, are in the linear map in blocks of 2 MiB, which can leave it one by one. Each costs a table
/// and a few microseconds at the start; memory above is mapped in blocks of 1 GiB, and stays.
const FINE_GIB: u64 = 32;

#[repr(C, align(4096))]
struct Pool(UnsafeCell<[[u64; 512]; POOL_TABLES]>);

// SAFETY: reached only as atomics, through `Source::entry`.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([[0; 512]; POOL_TABLES]));

/// Physical address of the image's first byte.
static IMAGE_PHYS: AtomicU64 = AtomicU64::new(0);

/// The final tables' root, for cores that start later. Read with the MMU off.
#[unsafe(no_mangle)]
static SECONDARY_TTBR1: AtomicU64 = AtomicU64::new(0);

/// A table without entries, for the lower half.
static EMPTY: AtomicU64 = AtomicU64::new(0);

/// A way to get one zeroed frame for a table: its physical address.
type TableSource = fn() -> Option<u64>;

struct Source {
    used: usize,
    frames: Option<TableSource>,
}

impl Tables for Source {
    fn allocate(&mut self) -> Option<u64> {
        if self.used < POOL_TABLES {
            let table = image_to_phys(POOL.0.get().addr() as u64) + self.used as u64 * PAGE;
            self.used += 1;
            return Some(table);
        }
        self.frames?()
    }

    fn entry(&self, table: u64, index: usize) -> &AtomicU64 {
        assert!(index < 512);
        let image = IMAGE_PHYS.load(Ordering::Relaxed);
        let size = layout::image_end() - layout::image_start();
        let va = if table.wrapping_sub(image) < size {
            layout::image_start() + (table - image)
        } else {
            LINEAR_BASE + table
        };
        let entry = core::ptr::with_exposed_provenance_mut::<u64>(va as usize + index * 8);
        // SAFETY:
        // - `allocate` has returned `table`: it lies in the pool or is a frame that was given away for good, mapped in the image
        //   or in the linear map (which is made before frames are used), and is aligned;
        // - nothing reaches a table but through here.
        unsafe { AtomicU64::from_ptr(entry) }
    }
}

struct Space {
    source: Source,
    root: Option<u64>,
    device_next: u64,
    /// Device windows, the first of which is free when its `end` is 0. A driver that is started again gets the window it had.
    windows: [Window; WINDOWS],
}

/// Device windows that are remembered. One that is not is mapped again each time it is asked for.
const WINDOWS: usize = 256;

/// Physical addresses that are mapped as a device from `va` on.
#[derive(Clone, Copy)]
struct Window {
    start: u64,
    end: u64,
    va: u64,
}

static SPACE: IrqMutex<Space> = IrqMutex::new(Space {
    source: Source { used: 0, frames: None },
    root: None,
    device_next: layout::DEVICE_BASE,
    windows: [Window { start: 0, end: 0, va: 0 }; WINDOWS],
});

/// A range of physical addresses.
pub type Physical = Range<u64>;

/// Translates a virtual address as the MMU does for a read; `None` where it would fault.
pub fn translate(va: u64) -> Option<u64> {
    base::cpu::without_interrupts(|| {
        // SAFETY: asks the MMU for a translation; the result is in PAR_EL1, which interrupts are kept from.
        unsafe { asm!("at s1e1r, {}", "isb", in(reg) va, options(nostack, preserves_flags)) };
        let par = PAR_EL1.get();
        (par & 1 == 0).then_some((par & 0x000f_ffff_ffff_f000) | (va & (PAGE - 1)))
    })
}

/// Finds out where the image is. Called once, before anything else here.
pub(crate) fn note_image() {
    let phys = translate(layout::image_start()).unwrap_or_else(|| crate::exit::exit(1));
    IMAGE_PHYS.store(phys, Ordering::Relaxed);
}

/// The physical address of an address in the image.
pub(crate) fn image_to_phys(va: u64) -> u64 {
    va - layout::image_start() + IMAGE_PHYS.load(Ordering::Relaxed)
}

/// Where the image with its variables and stacks lies, by physical address.
pub fn image() -> Physical {
    image_to_phys(layout::image_start())..image_to_phys(layout::image_end())
}

/// Gives the tables a way to get more frames, once there is a frame allocator. Called with the tables' lock held.
///
/// # Safety
///
/// Each frame that `source` returns is zeroed, reachable in the linear map, and given away for good.
pub unsafe fn set_table_source(source: fn() -> Option<u64>) {
    SPACE.lock().source.frames = Some(source);
}

/// Makes the final tables with all of `memory` in the linear map, and switches to them. Called once, on the first core, before
/// others are started.
///
/// `memory` is RAM by physical address: aligned ranges that do not overlap; partial pages at their ends are left out. The image's
/// code and constants are read-only in the linear map too.
///
/// # Errors
///
/// [`MapError`]; the early tables stay in use then.
pub fn init(memory: impl IntoIterator<Item = Physical>) -> Result<(), MapError> {
    let mut space = SPACE.lock();
    let space = &mut *space;
    let root = space.source.allocate().ok_or(MapError::NoTables)?;
    let empty = space.source.allocate().ok_or(MapError::NoTables)?;

    let mut map_image = |range: Range<u64>, purpose| {
        let pa = image_to_phys(range.start);
        tables::map(&mut space.source, root, range.start, pa, range.end - range.start, purpose)
    };
    map_image(layout::text(), Use::Code)?;
    map_image(layout::rodata(), Use::Constants)?;
    map_image(layout::rodata_end()..layout::boot_tables_end(), Use::Data)?;
    map_image(layout::boot_emergency_bottom()..layout::boot_emergency_top(), Use::Data)?;
    map_image(layout::boot_exception_bottom()..layout::boot_exception_top(), Use::Data)?;
    map_image(layout::boot_main_bottom()..layout::boot_main_top(), Use::Data)?;

    let fixed = image_to_phys(layout::image_start())..image_to_phys(layout::rodata_end());
    let mut fine = FINE_GIB;
    for range in memory {
        if range.start.max(range.end) > LINEAR_LIMIT {
            return Err(MapError::OutOfReach(range.end));
        }
        let range = range.start.next_multiple_of(PAGE)..range.end & !(PAGE - 1);
        let before = range.start..range.end.min(fixed.start);
        let inside = range.start.max(fixed.start)..range.end.min(fixed.end);
        let after = range.start.max(fixed.end)..range.end;
        for (part, purpose) in [(before, Use::Data), (inside, Use::Constants), (after, Use::Data)] {
            if part.start < part.end {
                // What is below the limit in blocks of 2 MiB, and what is above as large as it may be.
                let touched = part.end.div_ceil(LARGE_BLOCK) - part.start / LARGE_BLOCK;
                let middle = if touched <= fine { part.end } else { (part.start / LARGE_BLOCK + fine) * LARGE_BLOCK };
                fine = fine.saturating_sub(touched);
                let middle = middle.clamp(part.start, part.end);
                for (from, to, largest) in [(part.start, middle, BLOCK), (middle, part.end, LARGE_BLOCK)] {
                    if from < to {
                        let range = (LINEAR_BASE + from, from, to - from);
                        tables::map_with(&mut space.source, root, range, purpose, largest)?;
                    }
                }
            }
        }
    }

    EMPTY.store(empty, Ordering::Relaxed);
    SECONDARY_TTBR1.store(root, Ordering::Relaxed);
    // SAFETY: the variable is mapped. Cores that start read it with the MMU off, past the caches.
    unsafe { crate::cache::clean((&raw const SECONDARY_TTBR1).addr(), 8) };
    barrier::dsb(barrier::ISHST);
    // SAFETY: `root` maps the image as before, but with less rights, and all that is in use: code, variables and this core's stacks.
    unsafe { switch(root, empty) };
    drop_identity();
    space.root = Some(root);
    Ok(())
}

/// Switches this core's upper half to the tables at `root`.
///
/// # Safety
///
/// `root` maps all that is in use at the same addresses; `empty` is a table without entries.
unsafe fn switch(root: u64, empty: u64) {
    unsafe extern "C" {
        static switch_ttbr1: u8;
    }
    let function = image_to_phys((&raw const switch_ttbr1).addr() as u64);
    // SAFETY:
    // - `function` is the code's physical address, mapped by the identity tables in TTBR0;
    // - between the two tables nothing in the upper half is touched: everything is masked, and the function uses no stack.
    unsafe {
        asm!(
            "mrs {daif}, daif",
            "msr daifset, #0xf",
            "blr {function}",
            "msr daif, {daif}",
            daif = out(reg) _,
            function = in(reg) function,
            in("x0") root,
            in("x1") empty,
            out("x30") _,
            options(nostack),
        );
    }
}

/// Empties this core's lower half, and forbids execution of what is writable. Called on each core once the final tables are on.
pub(crate) fn drop_identity() {
    TTBR0_EL1.set(EMPTY.load(Ordering::Relaxed));
    TCR_EL1.modify(TCR_EL1::EPD0::DisableTTBR0Walks);
    barrier::isb(barrier::SY);
    SCTLR_EL1.modify(SCTLR_EL1::WXN::Enable);
    // SAFETY: drops this core's cached translations; the tables are as they should be.
    unsafe { asm!("tlbi vmalle1", "dsb nsh", "isb", options(nostack, preserves_flags)) };
}

/// Empties this core's lower half again: nothing that a process may have named can be reached. Interrupts are masked.
pub(crate) fn leave_user() {
    TTBR0_EL1.set(EMPTY.load(Ordering::Relaxed));
    barrier::isb(barrier::SY);
}

/// Maps the `len` bytes of device registers at physical address `phys`, Device-nGnRE.
///
/// The address need not be aligned to a page; whole pages are mapped. What is mapped already is not mapped again.
///
/// # Errors
///
/// [`MapError`]: also where any of the pages is memory.
pub fn map_device(phys: u64, len: usize) -> Result<Mmio, MapError> {
    let not_pages = MapError::NotPages { va: 0, pa: phys, len: len as u64 };
    let start = phys & !(PAGE - 1);
    let end = phys.checked_add(len as u64).and_then(|end| end.checked_next_multiple_of(PAGE)).ok_or(not_pages)?;
    if len == 0 {
        return Err(not_pages);
    }
    if end > 1 << 48 {
        return Err(MapError::OutOfReach(phys));
    }
    let mut space = SPACE.lock();
    let space = &mut *space;
    let root = space.root.ok_or(MapError::TooEarly)?;
    if start < LINEAR_LIMIT {
        let linear = tables::first_mapped(&space.source, root, LINEAR_BASE + start, end.min(LINEAR_LIMIT) - start);
        if let Some(va) = linear {
            return Err(MapError::IsMemory(va - LINEAR_BASE));
        }
    }
    let known = |window: &&Window| window.start <= start && end <= window.end;
    if let Some(window) = space.windows.iter().find(known) {
        return window_at(window.va + (phys - window.start), len).ok_or(not_pages);
    }
    // At the same place within a block as the device, so that large windows are mapped by blocks.
    let block = if end - start < LARGE_BLOCK { BLOCK } else { LARGE_BLOCK };
    let va = (space.device_next & !(block - 1)) + (start & (block - 1));
    let va = if va < space.device_next { va + block } else { va };
    if va >= layout::DEVICE_END {
        return Err(MapError::NoAddresses);
    }
    if end - start > layout::DEVICE_END - va {
        return Err(MapError::NoAddresses);
    }
    // An unmapped page between two windows. Advanced first: a mapping that fails half-way is not tried again at the same place.
    space.device_next = va + (end - start) + PAGE;
    tables::map(&mut space.source, root, va, start, end - start, Use::Device)?;
    publish();
    if let Some(free) = space.windows.iter_mut().find(|window| window.end == 0) {
        *free = Window { start, end, va };
    }
    window_at(va + (phys - start), len).ok_or(not_pages)
}

/// The `len` bytes at `va`, which [`map_device`] has mapped.
fn window_at(va: u64, len: usize) -> Option<Mmio> {
    let base = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(va as usize))?;
    // SAFETY: the bytes are mapped as a device for good, and are not memory that Rust code has: RAM is refused.
    Some(unsafe { Mmio::new(base, len) })
}

/// Maps the memory at physical address `phys` as the stacks of core `index`. Returns their ends: main, exception, emergency.
pub(crate) fn map_core_stacks(index: usize, phys: u64) -> Result<[u64; 3], MapError> {
    let mut space = SPACE.lock();
    let space = &mut *space;
    let root = space.root.ok_or(MapError::TooEarly)?;
    let mut va = layout::STACK_BASE + index as u64 * (1 << 20);
    let mut pa = phys;
    let mut tops = [0; 3];
    let sizes = [layout::EMERGENCY_STACK, layout::EXCEPTION_STACK, layout::MAIN_STACK];
    for (top, size) in tops.iter_mut().rev().zip(sizes) {
        va += PAGE;
        tables::map(&mut space.source, root, va, pa, size as u64, Use::Data)?;
        va += size as u64;
        pa += size as u64;
        *top = va;
    }
    publish();
    Ok(tops)
}

const _: () = assert!(layout::CORE_STACKS + 3 * PAGE_SIZE <= 1 << 20);

/// Takes `memory`, whole blocks of 2 MiB, out of the linear map. When this returns, no core reaches it there any more, not even by
/// speculation. Lines of it may still be in caches.
///
/// # Errors
///
/// [`MapError`]: also for memory that is in the linear map in larger blocks. Nothing has changed then.
///
/// # Safety
///
/// Nobody uses the memory, or has a pointer to it that will be used, until it enters the linear map again.
pub unsafe fn leave_linear(memory: Physical) -> Result<(), MapError> {
    unmap_now(LINEAR_BASE, LINEAR_LIMIT, memory)
}

/// Puts `memory`, that left the linear map whole, back.
///
/// # Errors
///
/// [`MapError`].
///
/// # Safety
///
/// The memory has left the linear map, is mapped nowhere else, and no line of it is in a cache.
pub unsafe fn enter_linear(memory: Physical) -> Result<(), MapError> {
    map_now(LINEAR_BASE, LINEAR_LIMIT, memory, Use::Data).map(drop)
}

/// Maps `memory`, whole pages, in its place outside the linear map.
///
/// # Errors
///
/// [`MapError`]; nothing is mapped then.
///
/// # Safety
///
/// The memory is in no linear map, and is mapped nowhere else.
pub unsafe fn map_alias(memory: Physical, purpose: Use) -> Result<NonNull<u8>, MapError> {
    map_now(layout::ALIAS_BASE, layout::ALIAS_LIMIT, memory, purpose)
}

/// Takes away what [`map_alias`] mapped. When this returns, no core reaches it any more.
///
/// # Errors
///
/// [`MapError`]; nothing has changed then.
///
/// # Safety
///
/// No pointer to it is used any more.
pub unsafe fn unmap_alias(memory: Physical) -> Result<(), MapError> {
    unmap_now(layout::ALIAS_BASE, layout::ALIAS_LIMIT, memory)
}

fn map_now(base: u64, limit: u64, memory: Physical, purpose: Use) -> Result<NonNull<u8>, MapError> {
    let Range { start, end } = memory;
    let not_pages = MapError::NotPages { va: base, pa: start, len: end.wrapping_sub(start) };
    let len = end.checked_sub(start).ok_or(not_pages)?;
    if end > limit {
        return Err(MapError::OutOfReach(end));
    }
    let mut space = SPACE.lock();
    let space = &mut *space;
    let root = space.root.ok_or(MapError::TooEarly)?;
    let va = base + start;
    if let Some(taken) = tables::first_mapped(&space.source, root, va, len) {
        return Err(MapError::AlreadyMapped(taken));
    }
    // The alias is given back page by page, and so mapped by pages.
    let largest = if base == LINEAR_BASE { BLOCK } else { PAGE };
    let mapped = tables::map_with(&mut space.source, root, (va, start, len), purpose, largest);
    if let Err(error) = mapped {
        // What was mapped before the tables ran out goes again.
        let mut at = va;
        while at < va + len && tables::unmap(&space.source, root, at, PAGE, |_| ()).is_ok() {
            at += PAGE;
        }
        invalidate(va..at, PAGE);
        return Err(error);
    }
    publish();
    NonNull::new(core::ptr::with_exposed_provenance_mut(va as usize)).ok_or(not_pages)
}

fn unmap_now(base: u64, limit: u64, memory: Physical) -> Result<(), MapError> {
    let Range { start, end } = memory;
    let len = end.checked_sub(start).ok_or(MapError::NotPages { va: base, pa: start, len: 0 })?;
    if end > limit {
        return Err(MapError::OutOfReach(end));
    }
    let space = SPACE.lock();
    let root = space.root.ok_or(MapError::TooEarly)?;
    let mut leaves = 0;
    tables::unmap(&space.source, root, base + start, len, |_| leaves += 1)?;
    // Blocks only, or pages among them.
    invalidate(base + start..base + end, if leaves * BLOCK == len { BLOCK } else { PAGE });
    Ok(())
}

/// Maps `runs` of memory one after another at `va`, in the part of the address space for that, by the largest leaves that lie so.
///
/// # Errors
///
/// [`MapError`]; nothing is mapped then.
///
/// # Safety
///
/// Wherever else the memory is mapped it has the same attributes, and nothing that is mapped at `va` was forgotten to be taken away.
pub unsafe fn map_virtual(va: u64, runs: impl Iterator<Item = Physical>, purpose: Use) -> Result<(), MapError> {
    let outside = MapError::NotPages { va, pa: 0, len: 0 };
    let offset = va.checked_sub(layout::VIRTUAL_BASE).ok_or(outside)?;
    let mut left = layout::VIRTUAL_LEN.checked_sub(offset).ok_or(outside)?;
    let mut space = SPACE.lock();
    let space = &mut *space;
    let root = space.root.ok_or(MapError::TooEarly)?;
    let runs = runs.map(|Range { start, end }| {
        let len = end.saturating_sub(start);
        // What would leave the part is refused as no run at all.
        match left.checked_sub(len) {
            Some(rest) => left = rest,
            None => return (start, 0),
        }
        (start, len)
    });
    let mapped = runs::map_runs(&mut space.source, root, va, runs, purpose);
    if mapped.is_err() {
        // A walker may have looked ahead at what was valid for a moment.
        invalidate_all();
    }
    mapped?;
    publish();
    Ok(())
}

/// Takes away all that [`map_virtual`] mapped at `va`, `len` bytes. When this returns, no core reaches it there any more.
///
/// # Errors
///
/// [`MapError`]; nothing has changed then.
///
/// # Safety
///
/// No pointer to it is used any more.
pub unsafe fn unmap_virtual(va: u64, len: u64) -> Result<(), MapError> {
    let offset = va.checked_sub(layout::VIRTUAL_BASE).ok_or(MapError::NotMapped(va))?;
    if layout::VIRTUAL_LEN.checked_sub(offset).is_none_or(|left| left < len) {
        return Err(MapError::NotMapped(va));
    }
    let space = SPACE.lock();
    let root = space.root.ok_or(MapError::TooEarly)?;
    tables::unmap(&space.source, root, va, len, |_| ())?;
    invalidate(va..va + len, PAGE);
    Ok(())
}

/// Calls `leaf` with the size of each leaf that maps a byte of the `len` bytes at `va`, and whether it carries the Contiguous bit.
pub fn virtual_leaves(va: u64, len: u64, leaf: impl FnMut(u64, bool)) {
    let space = SPACE.lock();
    let Some(root) = space.root else { return };
    runs::for_each_leaf(&space.source, root, va, len, leaf);
}

/// Leaves beyond which everything goes: one by one would take long, with interrupts masked.
const MANY: u64 = 512;

/// Drops all that any core's TLB has; the entries that are to go are gone from the tables.
fn invalidate_all() {
    barrier::dsb(barrier::ISHST);
    // SAFETY: drops cached translations; the tables are as they should be.
    unsafe { asm!("tlbi vmalle1is", options(nostack, preserves_flags)) };
    barrier::dsb(barrier::ISH);
    barrier::isb(barrier::SY);
}

/// Drops what any core's TLB has of the leaves in `range`, none smaller than `step`, which are gone from the tables.
fn invalidate(range: Range<u64>, step: u64) {
    if range.end.saturating_sub(range.start) / step > MANY {
        return invalidate_all();
    }
    // The walkers see that the entries are gone before what TLBs have of them goes.
    barrier::dsb(barrier::ISHST);
    for va in range.step_by(step as usize) {
        // SAFETY: drops cached translations; the tables are as they should be.
        unsafe { asm!("tlbi vaale1is, {}", in(reg) va >> 12 & 0xfff_ffff_ffff, options(nostack, preserves_flags)) };
    }
    // And all cores have.
    barrier::dsb(barrier::ISH);
    barrier::isb(barrier::SY);
}

/// Makes new entries visible to the walkers before the next access.
fn publish() {
    barrier::dsb(barrier::ISHST);
    barrier::isb(barrier::SY);
}
