//! Memory for making the device tree: handed out from secure memory in one direction, never taken back.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};

struct Heap {
    /// How many bytes are given away.
    used: AtomicUsize,
}

#[global_allocator]
static HEAP: Heap = Heap { used: AtomicUsize::new(0) };

unsafe extern "C" {
    static mut __heap_start: u8;
    static __heap_end: u8;
}

// SAFETY: ranges of the linker script's heap, aligned as asked for; none is given away twice, as `used` only grows.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let first = &raw mut __heap_start;
        let start = first.addr();
        let size = (&raw const __heap_end).addr() - start;
        let place = |used: usize| Some((start + used).checked_next_multiple_of(layout.align())? - start);
        let grown = |used: usize| place(used)?.checked_add(layout.size()).filter(|&end| end <= size);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown) {
            // SAFETY: within the heap, as `grown` has seen.
            Ok(used) => unsafe { first.add(place(used).unwrap_or(0)) },
            Err(_) => core::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}
