//! The heap, and the frame allocator's arena.
//!
//! The heap starts as a piece of the image, so that memory can be allocated before anybody knows what the machine has, and grows by
//! runs of frames. It never shrinks.
//!
//! The frame allocator's trees allocate, too, while its lock is held. Those allocations, told by the core that makes them, come
//! from an arena of their own: the heap may then ask for frames whenever it is empty, and the books can always be written.
//!
//! # Locking
//!
//! Heap and arena have an [`IrqMutex`] each, both leaves. The heap's is released before frames are asked for.

#![allow(unsafe_code)] // This is the allocator.

#[cfg(target_os = "none")]
pub(super) use target::{give_books, keeping_books};

/// How large the heap is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStats {
    /// Bytes that the heap has been given so far.
    pub size: usize,
    /// Bytes in use.
    pub used: usize,
}

/// How large the heap is; zeros on a host, where it is the host's.
pub fn heap_stats() -> HeapStats {
    #[cfg(target_os = "none")]
    return target::stats();
    #[cfg(not(target_os = "none"))]
    HeapStats::default()
}

/// On a host, the process's allocator does it all.
#[cfg(not(target_os = "none"))]
pub(super) unsafe fn give_books(_start: *mut u8, _len: usize) {}

/// On a host, the process's allocator does it all.
#[cfg(not(target_os = "none"))]
pub(super) fn keeping_books<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_os = "none")]
mod target {
    use super::HeapStats;
    use crate::mm::{self, Zone};
    use base::{IrqMutex, cpu};
    use core::alloc::{GlobalAlloc, Layout};
    use core::cell::UnsafeCell;
    use core::ptr::{NonNull, null_mut};
    use core::sync::atomic::{AtomicUsize, Ordering};
    use iommu::PAGE_SIZE;
    use talc::base::Talc;
    use talc::source::Manual;
    use talc::{DefaultBinning, min_first_heap_size};

    /// Bytes of the image that the heap starts with: a device tree's `Machine` and the boot's own lists.
    const BOOT_HEAP: usize = 512 << 10;

    /// The least by which the heap grows, in bytes.
    const STEP: usize = 1 << 20;

    /// What a run of frames holds beside the allocation it was got for, at most: the allocator's tags and its alignment of both ends.
    const OVERHEAD: usize = 4 * talc::base::CHUNK_UNIT;

    /// How often an allocation makes the heap grow: other cores may take what it has grown by.
    const GROWTHS: usize = 8;

    const NOBODY: usize = usize::MAX;

    struct Pool {
        talc: Talc<Manual, DefaultBinning>,
        size: usize,
        used: usize,
    }

    impl Pool {
        const fn new() -> Self {
            Self { talc: Talc::new(Manual), size: 0, used: 0 }
        }

        /// # Safety
        ///
        /// The memory is mapped, writable, and given away for good.
        unsafe fn give(&mut self, start: *mut u8, len: usize) {
            // SAFETY: the caller's promise. Too little memory is refused, and lost.
            if unsafe { self.talc.claim(start, len) }.is_some() {
                self.size += len;
            }
        }

        fn alloc(&mut self, layout: Layout) -> *mut u8 {
            // SAFETY: `GlobalAlloc`'s callers ask for no empty layout.
            let start = unsafe { self.talc.try_allocate(layout) };
            if start.is_some() {
                self.used += layout.size();
            }
            start.map_or(null_mut(), NonNull::as_ptr)
        }

        /// # Safety
        ///
        /// `start` came from `alloc` with this layout.
        unsafe fn dealloc(&mut self, start: *mut u8, layout: Layout) {
            // SAFETY: the caller's promise.
            unsafe { self.talc.deallocate(start, layout) };
            self.used -= layout.size();
        }
    }

    struct Heap {
        pool: IrqMutex<Pool>,
        books: IrqMutex<Pool>,
        /// Where the books' arena is; set once, before it is used.
        books_start: AtomicUsize,
        books_end: AtomicUsize,
        /// The core that is in the frame allocator.
        keeper: AtomicUsize,
    }

    #[global_allocator]
    static HEAP: Heap = Heap {
        pool: IrqMutex::new(Pool::new()),
        books: IrqMutex::new(Pool::new()),
        books_start: AtomicUsize::new(0),
        books_end: AtomicUsize::new(0),
        keeper: AtomicUsize::new(NOBODY),
    };

    #[repr(C, align(4096))]
    struct BootHeap(UnsafeCell<[u8; BOOT_HEAP]>);

    // SAFETY: given to the heap once, under its lock, and touched by nothing else.
    unsafe impl Sync for BootHeap {}

    static BOOT: BootHeap = BootHeap(UnsafeCell::new([0; BOOT_HEAP]));

    const _: () = assert!(BOOT_HEAP > min_first_heap_size::<DefaultBinning>());

    impl Heap {
        fn keeps_books(&self) -> bool {
            self.keeper.load(Ordering::Relaxed) == cpu::index()
        }

        fn is_book(&self, start: *mut u8) -> bool {
            let range = self.books_start.load(Ordering::Relaxed)..self.books_end.load(Ordering::Relaxed);
            range.contains(&start.addr())
        }

        fn try_alloc(&self, layout: Layout) -> *mut u8 {
            let mut pool = self.pool.lock();
            if pool.size == 0 {
                // SAFETY: the piece of the image that exists for this, given once.
                unsafe { pool.give(BOOT.0.get().cast(), BOOT_HEAP) };
            }
            pool.alloc(layout)
        }

        /// Adds a run of frames in which `layout` fits. False if there is none.
        fn grow(&self, layout: Layout) -> bool {
            let Some(need) = layout.size().checked_add(layout.align()).and_then(|sum| sum.checked_add(OVERHEAD)) else {
                return false;
            };
            let pages = |bytes: usize| bytes.div_ceil(PAGE_SIZE as usize);
            // The usual step; or, where memory is tight, only what is needed.
            let range = mm::alloc(pages(need.max(STEP)), Zone::Any).or_else(|_| mm::alloc(pages(need), Zone::Any));
            let Ok(range) = range else {
                return false;
            };
            let mut pool = self.pool.lock();
            // SAFETY: the frames are ours, mapped in the linear map, and kept for good.
            unsafe { pool.give(mm::pointer(range.start()), range.len() as usize) };
            true
        }
    }

    // SAFETY:
    // - blocks come from `Talc`, which hands out disjoint, aligned ones inside memory that was given for good;
    // - a parked block came from here, with this layout, and is handed out once (contract of `fallible::take`);
    // - each goes back to the pool it came from, which its address tells;
    // - nothing here panics but on an arithmetic overflow of a counter, which the size of memory rules out.
    unsafe impl GlobalAlloc for Heap {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let parked = base::fallible::take(layout);
            if !parked.is_null() {
                return parked;
            }
            if self.keeps_books() {
                let start = self.books.lock().alloc(layout);
                // The arena is large enough; what the heap has left is a second line of defence. It must not grow from here.
                return if start.is_null() { self.try_alloc(layout) } else { start };
            }
            for _ in 0..GROWTHS {
                let start = self.try_alloc(layout);
                if !start.is_null() || !self.grow(layout) {
                    return start;
                }
            }
            self.try_alloc(layout)
        }

        unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
            let pool = if self.is_book(start) { &self.books } else { &self.pool };
            // SAFETY: the block came from this pool with this layout (the caller's promise, and the pools' addresses are disjoint).
            unsafe { pool.lock().dealloc(start, layout) };
        }

        unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            {
                let mut pool = if self.is_book(start) { self.books.lock() } else { self.pool.lock() };
                // SAFETY: the block came from this pool with this layout, and `size` is not 0 (the caller's promise).
                if unsafe { pool.talc.try_realloc_in_place(start, layout, size) } {
                    pool.used = pool.used - layout.size() + size;
                    return start;
                }
            }
            let Ok(new) = Layout::from_size_align(size, layout.align()) else {
                return null_mut();
            };
            // SAFETY: the layout is not empty.
            let moved = unsafe { self.alloc(new) };
            if !moved.is_null() {
                // SAFETY: the old block is valid for its size, the new one for `size`, and they do not overlap.
                unsafe { moved.copy_from_nonoverlapping(start, layout.size().min(size)) };
                // SAFETY: the caller's promise; the block is not used any more.
                unsafe { self.dealloc(start, layout) };
            }
            moved
        }
    }

    /// Gives the frame allocator's books their memory.
    ///
    /// # Safety
    ///
    /// The memory is mapped, writable, and given away for good. Called once, by the holder of the frame allocator's lock.
    pub(in crate::mm) unsafe fn give_books(start: *mut u8, len: usize) {
        HEAP.books_start.store(start.addr(), Ordering::Relaxed);
        HEAP.books_end.store(start.addr() + len, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { HEAP.books.lock().give(start, len) };
    }

    /// Runs `f`, with what it allocates coming from the books' arena. Called by the holder of the frame allocator's lock: interrupts
    /// are masked, and no other core is here.
    pub(in crate::mm) fn keeping_books<R>(f: impl FnOnce() -> R) -> R {
        HEAP.keeper.store(cpu::index(), Ordering::Relaxed);
        let result = f();
        HEAP.keeper.store(NOBODY, Ordering::Relaxed);
        result
    }

    pub(super) fn stats() -> HeapStats {
        let pool = HEAP.pool.lock();
        HeapStats { size: pool.size, used: pool.used }
    }
}
