//! Where berths stand: in arrays that are used again, and never freed.
//!
//! The token of a mapping that has lapsed looks at its berth without keeping the device, which may be gone when the mapping has been
//! revoked. So what it looks at stays what it is: a berth, whose number of lapses only grows. There are as many arrays as there were
//! devices with berths at one time.
//!
//! # Locking
//!
//! One [`IrqMutex`] for the list of arrays, under which the heap's lock is taken, and one for the owner of each. Neither is held together
//! with another.

#![expect(unsafe_code, reason = "forgets the anchors of berths that nobody has")]

use super::{Berth, Berths, COUNT, Number, PLACES};
use crate::Error;
use crate::lazy::Orphans;
use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{IrqMutex, fallible};
use core::mem;
use core::sync::atomic::Ordering::Relaxed;

/// An array, and what goes with its berths.
pub(crate) struct Array {
    berths: Box<[Berth; PLACES]>,
    /// What dropped tokens have left.
    pub(crate) orphans: Orphans,
    owner: IrqMutex<Weak<Berths>>,
}

static ARRAYS: IrqMutex<Arrays> = IrqMutex::new(Arrays { all: Vec::new(), spare: Vec::new() });

struct Arrays {
    all: Vec<&'static Array>,
    /// Those that nobody has. Room for all.
    spare: Vec<&'static Array>,
}

impl Array {
    /// The berths of the device whose it is, if there is something to flush there or was.
    pub(crate) fn owner(&self) -> Option<Arc<Berths>> {
        self.owner.lock().upgrade()
    }

    fn made() -> Result<&'static Self, Error> {
        let mut berths = Vec::new();
        berths.try_reserve_exact(PLACES)?;
        berths.extend((0..PLACES as Number).map(Berth::new));
        // It has the length that was asked for.
        let berths: Box<[Berth; PLACES]> = berths.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)?;
        let array = Self { berths, orphans: Orphans::new()?, owner: IrqMutex::new(Weak::new()) };
        let array = fallible::boxed(array).map_err(|_| Error::OutOfMemory)?;
        let mut arrays = ARRAYS.lock();
        let missing = (arrays.all.len() + 1).saturating_sub(arrays.spare.len());
        arrays.spare.try_reserve(missing)?;
        arrays.all.try_reserve(1)?;
        let number = u16::try_from(arrays.all.len()).map_err(|_| Error::OutOfMemory)?;
        array.berths.iter().for_each(|berth| berth.array.store(number, Relaxed));
        // Nothing fails from here on.
        let array = Box::leak(array);
        arrays.all.push(array);
        Ok(array)
    }
}

/// The array in which a berth stands.
pub(crate) fn of(berth: &Berth) -> Option<&'static Array> {
    ARRAYS.lock().all.get(usize::from(berth.array.load(Relaxed))).copied()
}

/// The berths of all devices. One at a time: this may be the last owner of any.
pub(crate) fn owners() -> impl Iterator<Item = Arc<Berths>> {
    let array = |index: usize| ARRAYS.lock().all.get(index).copied();
    (0..).map_while(array).filter_map(Array::owner)
}

/// An array that somebody has.
pub(super) struct Rented {
    pub(super) berths: &'static [Berth; PLACES],
    pub(super) array: &'static Array,
}

impl Rented {
    /// Takes one whose berths are all vacant, each above the one behind it.
    pub(super) fn new() -> Result<Self, Error> {
        let spare = ARRAYS.lock().spare.pop();
        let array = match spare {
            Some(array) => {
                for berth in &*array.berths {
                    berth.next.store(below(berth.number), Relaxed);
                    berth.entry.clear();
                }
                array
            }
            None => Array::made()?,
        };
        Ok(Self { berths: &array.berths, array })
    }

    /// Says whose it is.
    pub(super) fn belong_to(&self, owner: Weak<Berths>) {
        let before = mem::replace(&mut *self.array.owner.lock(), owner);
        drop(before);
    }
}

impl Drop for Rented {
    fn drop(&mut self) {
        self.belong_to(Weak::new());
        for berth in self.berths {
            // SAFETY: nobody has a berth here, nor will before the array is taken again.
            unsafe { *berth.anchor.get() = None };
        }
        // There is room for it: nothing is allocated.
        ARRAYS.lock().spare.push(self.array);
    }
}

/// The number of the berth below one of an array in which all are vacant.
pub(super) const fn below(number: Number) -> Number {
    if (number as usize) < COUNT { number + 1 } else { 0 }
}
