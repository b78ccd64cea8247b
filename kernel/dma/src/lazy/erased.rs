//! Memory of whatever type that is kept for a flush.

#![expect(unsafe_code, reason = "keeps objects by their bytes")]

use core::mem::MaybeUninit;

/// Bytes of the largest object that is left to a flush.
const ROOM: usize = 96;

/// An object of whatever type, in place. Dropping it drops the object.
///
/// # Invariants
///
/// `storage` holds an object that `drop` drops, and nothing else does.
pub(super) struct Erased {
    storage: MaybeUninit<[u64; ROOM / 8]>,
    drop: unsafe fn(*mut ()),
}

// SAFETY: the object is `Send` (bound of `Erased::new`), and is reached by `&mut` only.
unsafe impl Send for Erased {}

impl Erased {
    /// Wraps `object`, or gives it back where it is too large.
    #[inline]
    pub(super) fn new<M: Send + 'static>(object: M) -> Result<Self, M> {
        unsafe fn drop_as<M>(object: *mut ()) {
            // SAFETY: the invariant of Erased: it is an `M`, dropped once.
            unsafe { object.cast::<M>().drop_in_place() }
        }
        if size_of::<M>() > ROOM || align_of::<M>() > align_of::<u64>() {
            return Err(object);
        }
        let mut storage = MaybeUninit::<[u64; ROOM / 8]>::uninit();
        // SAFETY: size and alignment fit, as was just checked.
        unsafe { storage.as_mut_ptr().cast::<M>().write(object) };
        // INVARIANT: the object was moved here.
        Ok(Self { storage, drop: drop_as::<M> })
    }
}

impl Drop for Erased {
    fn drop(&mut self) {
        // SAFETY: the invariant; and in `drop`, which runs once.
        unsafe { (self.drop)(self.storage.as_mut_ptr().cast()) }
    }
}

const _: () = assert!(size_of::<crate::Pages>() <= ROOM && size_of::<crate::PageSet>() <= ROOM);
