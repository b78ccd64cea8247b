//! Moving objects word by word.
//!
//! An object of more than two words is moved as a block of memory, from place to place to place, and what is done with it in between does not
//! change that. Once its words have been moved one by one the compiler knows them one by one, and keeps them in registers from
//! there to where they are wanted.

#![expect(unsafe_code, reason = "moves objects by their bytes")]

use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr;

/// The most words of an object that is moved so.
const MOST: usize = 8;

/// Returns `object`.
#[inline(always)]
pub(crate) fn by_words<M>(object: M) -> M {
    if size_of::<M>() > MOST * size_of::<u64>()
        || !size_of::<M>().is_multiple_of(size_of::<u64>())
        || align_of::<M>() != align_of::<u64>()
    {
        return object;
    }
    let object = ManuallyDrop::new(object);
    let mut copy = MaybeUninit::<M>::uninit();
    // A word may have bytes that are not initialized.
    let from = ptr::from_ref(&object).cast::<MaybeUninit<u64>>();
    let to = copy.as_mut_ptr().cast::<MaybeUninit<u64>>();
    macro_rules! words {
        ($($index:literal)*) => {
            $(if size_of::<M>() > $index * size_of::<u64>() {
                // SAFETY: both have more words than that, aligned as words are, and are two objects.
                unsafe { to.add($index).write(from.add($index).read()) };
            })*
        };
    }
    words!(0 1 2 3 4 5 6 7);
    // SAFETY: all of its bytes are those of the object, which is not used any more.
    unsafe { copy.assume_init() }
}
