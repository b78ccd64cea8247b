//! Ownership whose allocation may fail: `Box::new` and `Arc::new` end the program where there is no memory.
//!
//! The standard library has no stable way to make one that fails. A `Box` is made of the memory that it needs. For an `Arc` the memory is
//! taken first, which can fail with an error, and parked for this core; then the `Arc` is made, and the image's allocator, which asks
//! [`take`] before anything else, hands that very block out. Interrupts are masked in between, so that nobody else on this core allocates.
//! With an allocator that does not ask (a host's), the block is kept until the `Arc` is there: memory was found a moment ago, but that is
//! no promise.
//!
//! # Locking
//!
//! A flag and an [`IrqMutex`] for each core, a leaf; the mutex is taken only while the flag is up.

use crate::{IrqMutex, cpu};
use alloc::alloc::{alloc, dealloc};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::alloc::Layout;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block that nobody uses; it is handed to one taker.
unsafe impl Send for Block {}

struct Parked {
    armed: AtomicBool,
    block: IrqMutex<Option<Block>>,
}

static PARKED: [Parked; cpu::MAX_CPUS] =
    [const { Parked { armed: AtomicBool::new(false), block: IrqMutex::new(None) } }; cpu::MAX_CPUS];

/// Returns the block that this core has parked, if it has this layout, or null. For the image's allocator, before anything else.
#[inline]
pub fn take(layout: Layout) -> *mut u8 {
    match PARKED.get(cpu::index()) {
        Some(parked) if parked.armed.load(Ordering::Relaxed) => unpark(parked, layout),
        _ => null_mut(),
    }
}

#[cold]
fn unpark(parked: &Parked, layout: Layout) -> *mut u8 {
    match parked.block.lock().take_if(|block| block.layout == layout) {
        Some(block) => {
            parked.armed.store(false, Ordering::Relaxed);
            block.start.as_ptr()
        }
        None => null_mut(),
    }
}

/// The layout of an `Arc`'s memory: two counters, then the value. (Were it another, [`take`] would not fit, and the block would
/// go back unused.)
fn of_arc(value: Layout) -> Option<Layout> {
    let (layout, _) = Layout::new::<[AtomicUsize; 2]>().extend(value).ok()?;
    Some(layout.pad_to_align())
}

/// What allocates once, and may be given back instead.
trait Maker {
    type Made;
    fn make(self) -> Self::Made;
}

struct Value<T>(T);

impl<T> Maker for Value<T> {
    type Made = Arc<T>;
    fn make(self) -> Arc<T> {
        Arc::new(self.0)
    }
}

impl Maker for &str {
    type Made = Arc<str>;
    fn make(self) -> Arc<str> {
        Arc::from(self)
    }
}

/// Runs `make`, which allocates once with `layout`, with that memory ready; `Err` with `make` where there is none.
fn with_memory<M: Maker>(layout: Layout, make: M) -> Result<M::Made, M> {
    cpu::without_interrupts(|| {
        // SAFETY: the layout is not empty: it has the counters.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else { return Err(make) };
        let parked = PARKED.get(cpu::index());
        if let Some(parked) = parked {
            let replaced = parked.block.lock().replace(Block { start, layout });
            parked.armed.store(true, Ordering::Relaxed);
            // Only where two threads of a host share an index.
            release(replaced);
        } else {
            release(Some(Block { start, layout }));
        }
        let made = make.make();
        if let Some(parked) = parked {
            parked.armed.store(false, Ordering::Relaxed);
            release(parked.block.lock().take());
        }
        Ok(made)
    })
}

fn release(block: Option<Block>) {
    if let Some(Block { start, layout }) = block {
        // SAFETY: allocated with this layout, and nobody has taken it.
        unsafe { dealloc(start.as_ptr(), layout) };
    }
}

/// Makes a `Box`.
///
/// # Errors
///
/// The value, where there is no memory.
pub fn boxed<T>(value: T) -> Result<Box<T>, T> {
    let layout = Layout::new::<T>();
    if layout.size() == 0 {
        // That takes no memory.
        return Ok(Box::new(value));
    }
    // SAFETY: the layout is not empty.
    let Some(start) = NonNull::new(unsafe { alloc(layout) }.cast::<T>()) else { return Err(value) };
    // SAFETY: just allocated, for a `T`.
    unsafe { start.write(value) };
    // SAFETY: allocated by the allocator of boxes with the layout of a `T`, and it is one now; nobody else has the pointer.
    Ok(unsafe { Box::from_raw(start.as_ptr()) })
}

/// Makes an `Arc`.
///
/// # Errors
///
/// The value, where there is no memory.
pub fn arc<T>(value: T) -> Result<Arc<T>, T> {
    let Some(layout) = of_arc(Layout::new::<T>()) else { return Err(value) };
    match with_memory(layout, Value(value)) {
        Ok(made) => Ok(made),
        Err(Value(value)) => Err(value),
    }
}

/// Copies a text into an `Arc`. `None` where there is no memory.
pub fn text(text: &str) -> Option<Arc<str>> {
    let layout = of_arc(Layout::for_value(text))?;
    with_memory(layout, text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_holds_its_value_and_drops_it_once() {
        let shared = Arc::new(());
        let held = boxed((7_u8, shared.clone())).unwrap();
        assert_eq!((held.0, Arc::strong_count(&shared)), (7, 2));
        drop(held);
        assert_eq!(Arc::strong_count(&shared), 1);
        assert_eq!(*boxed(()).unwrap(), ());
    }

    /// Caught: `with_memory` that leaves the block parked.
    #[test]
    fn what_is_made_is_an_arc_like_any_other_and_nothing_stays_parked() {
        let number = arc(7_u64).unwrap();
        assert_eq!((*number, Arc::strong_count(&number)), (7, 1));
        assert!(take(Layout::new::<[u64; 3]>()).is_null());
        assert_eq!(&*text("a name").unwrap(), "a name");
        assert_eq!(&*text("").unwrap(), "");
        assert!(take(Layout::new::<[u64; 2]>()).is_null());
    }

    /// An allocator that asks gets the very block.
    #[test]
    fn a_parked_block_is_taken_by_its_layout_once() {
        let layout = Layout::new::<[u64; 5]>();
        struct Taker(Layout);
        impl Maker for Taker {
            type Made = *mut u8;
            fn make(self) -> *mut u8 {
                assert!(take(Layout::new::<[u64; 4]>()).is_null());
                let block = take(self.0);
                assert!(!block.is_null() && take(self.0).is_null());
                block
            }
        }
        let block = with_memory(layout, Taker(layout)).ok().unwrap();
        // SAFETY: taken, so it is ours, with this layout.
        unsafe { dealloc(block, layout) };
    }
}
