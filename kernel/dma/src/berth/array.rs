//! Where berths stand: in arrays that are used again, and never freed.
//!
//! The token of a mapping that has lapsed looks at its berth without keeping the device, which may be gone when the mapping has been
//! revoked. So what it looks at stays what it is: a berth, whose number of lapses only grows. There are as many arrays as there were
//! devices with berths at one time.
//!
//! # Locking
//!
//! One [`IrqMutex`], under which the heap's lock is taken.

#![expect(unsafe_code, reason = "forgets the anchors of berths that nobody has")]

use super::{Berth, COUNT, Number, PLACES};
use crate::Error;
use alloc::boxed::Box;
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::Ordering::Relaxed;

type Array = &'static [Berth; PLACES];

/// Arrays that nobody has.
static SPARE: IrqMutex<Spare> = IrqMutex::new(Spare { arrays: Vec::new(), made: 0 });

struct Spare {
    /// Room for all that were made.
    arrays: Vec<Array>,
    made: usize,
}

/// An array that somebody has.
pub(super) struct Rented(pub(super) Array);

impl Rented {
    /// Takes one whose berths are all vacant, each above the one behind it.
    pub(super) fn new() -> Result<Self, Error> {
        let spare = SPARE.lock().arrays.pop();
        if let Some(array) = spare {
            for berth in array {
                berth.next.store(below(berth.number), Relaxed);
                berth.entry.clear();
            }
            return Ok(Self(array));
        }
        let mut berths = Vec::new();
        berths.try_reserve_exact(PLACES)?;
        berths.extend((0..PLACES as Number).map(Berth::new));
        // It has the length that was asked for.
        let array: Box<[Berth; PLACES]> = berths.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)?;
        let mut spare = SPARE.lock();
        let missing = (spare.made + 1).saturating_sub(spare.arrays.len());
        spare.arrays.try_reserve(missing)?;
        spare.made += 1;
        Ok(Self(Box::leak(array)))
    }
}

impl Drop for Rented {
    fn drop(&mut self) {
        for berth in self.0 {
            // SAFETY: nobody has a berth here, nor will before the array is taken again.
            unsafe { *berth.anchor.get() = None };
        }
        // There is room for it: nothing is allocated.
        SPARE.lock().arrays.push(self.0);
    }
}

/// The number of the berth below one of an array in which all are vacant.
pub(super) const fn below(number: Number) -> Number {
    if (number as usize) < COUNT { number + 1 } else { 0 }
}
