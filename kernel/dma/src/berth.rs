//! Address ranges that stay a device's when a mapping ends, for its next mapping of that size.
//!
//! A driver maps and unmaps buffers of the same few sizes for ever. So the range of a mapping that has ended is *berthed*: it stays
//! allocated, together with the place of its leaf in the tables ([`Anchor`]) and its own record, and the next mapping of its
//! length on that core takes all of it by one exchange. What is berthed is mapped nowhere: its revocation has returned `Ok`.
//!
//! There are [`COUNT`] berths for each device. A mapping that finds none, here or on another core, goes the general way
//! ([`crate::translated`]), and has its range berthed when it ends, if a berth is vacant. Ranges that nobody uses are given up when the
//! domain has no address left for somebody ([`Keep`]), and when a range that is in use finds no berth vacant, those of other sizes.
//!
//! # Invariants
//!
//! - A berth is on one stack at most: vacant ones on `vacant`, those that are ready on a core's, by size, those of mappings that have
//!   lapsed on another of the core's ([`lapsing`]). Whoever has taken one off has it alone, until he puts it on one. (Its number is then
//!   in a loan, or in a variable.)
//! - The range of a berth that is not vacant is allocated in `domain`, and nobody else has it.
//! - A berth that is neither vacant nor ready keeps the device's [`Body`].
//! - The anchor is changed by who has the berth, while it is vacant to everybody else.
//!
//! # Locking
//!
//! None. The stacks are words: the number of the uppermost, and above it how many have been taken off, so that a word that was read is
//! the same stack if it is still the same word (2^47 changes in between apart). Records are read by who explains a fault, as those of
//! [`crate::record`].

#![expect(unsafe_code, reason = "what a berth holds is its holder's alone")]

pub(crate) mod array;
mod history;
mod lapsing;
mod mooring;
#[cfg(test)]
mod tests;

use crate::Error;
use crate::device::{Body, SHARDS};
use crate::record::Entry;
use crate::site::Site;
use alloc::sync::Arc;
use array::Rented;
use base::time::Stamp;
use base::{cpu, fallible};
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use iommu::domain::Domain;
use iommu::iova::Keep;
use iommu::pgtable::Anchor;
use iommu::{Iova, RevokeError};
use lapsing::Lapsed;
use spin::Once;

/// Places for berths, of which that of number 0 is none.
const PLACES: usize = 512;
/// Berths of a device.
pub(crate) const COUNT: usize = PLACES - 1;
/// Stacks of a core, for ranges of 4 KiB up to 128 MiB by the power of two that holds them.
const CLASSES: usize = 16;
/// The most bytes of a range that is berthed.
const LONGEST: u64 = 2 << 20;

/// Bits of a stack's word that are the number of its uppermost berth; 0 where there is none.
const TOP: u64 = 0xffff;
/// Nothing is put there any more.
const CLOSED: u64 = TOP + 1;
/// The bits above count what was taken off.
const CHANGE: u64 = CLOSED << 1;

/// Which berth: from 1 up to [`COUNT`].
pub(crate) type Number = u32;

/// One of them.
#[repr(align(128))]
pub(crate) struct Berth {
    /// The range, and what is mapped there or was, since the range was berthed. Its owner has the berth.
    pub(crate) entry: Entry,
    /// The number of the next on the same stack; 0 where there is none.
    next: AtomicU32,
    /// The stack on which it is put: [`class`].
    class: AtomicU32,
    number: Number,
    anchor: UnsafeCell<Option<Anchor>>,
    /// What lapsed here could not be revoked.
    lost: AtomicBool,
    /// The core on which a mapping has lapsed here last.
    core: AtomicU8,
    /// Which [`array`] it is in.
    array: AtomicU16,
    /// Mappings that have lapsed here and been revoked since.
    lapses: AtomicU64,
}

const _: () = assert!(size_of::<Berth>() == 128);

// SAFETY: all but the anchor are atomics; the anchor is reached by who has the berth only (invariant), and may be sent.
unsafe impl Sync for Berth {}

impl Berth {
    const fn new(number: Number) -> Self {
        Self {
            entry: Entry::new(),
            number,
            next: AtomicU32::new(array::below(number)),
            class: AtomicU32::new(0),
            anchor: UnsafeCell::new(None),
            lost: AtomicBool::new(false),
            core: AtomicU8::new(0),
            array: AtomicU16::new(0),
            lapses: AtomicU64::new(0),
        }
    }
}

/// Berths one above the other.
struct Stack(AtomicU64);

impl Stack {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }
}

/// A stack as somebody saw it.
struct Seen<'a> {
    word: u64,
    /// The word without the uppermost.
    without: u64,
    uppermost: &'a Berth,
}

/// What is a core's.
#[repr(align(128))]
struct Core {
    /// What is ready, by size.
    ready: [Stack; CLASSES],
    lapsed: Lapsed,
}

impl Core {
    const fn new() -> Self {
        Self { ready: [const { Stack::new() }; CLASSES], lapsed: Lapsed::new() }
    }
}

/// The stack of a core for ranges of `len` bytes. (Others may share it.)
#[inline(always)]
fn class(len: u64) -> usize {
    len.wrapping_sub(1).leading_zeros() as usize % CLASSES
}

/// The berths of a device.
pub(crate) struct Berths {
    /// The device's.
    name: Arc<str>,
    domain: Arc<Domain>,
    cores: [Core; SHARDS],
    rented: Rented,
    vacant: Stack,
    /// The core that another has had a berth from last.
    donor: AtomicU8,
    /// Mappings whose ranges have been given up, and their bytes.
    before: [AtomicU64; 2],
    /// The address space has anchors.
    anchored: AtomicBool,
    /// The device's, which a berth that is out keeps.
    body: AtomicPtr<Body>,
    /// Why a flush has failed.
    failed: Once<RevokeError>,
    /// A berth has had to forget what was last in it.
    forgotten: AtomicBool,
}

/// A berth that was taken for a mapping.
pub(crate) struct Taken<'a> {
    /// Which.
    pub berth: &'a Berth,
    /// Where its range begins; it is as long as was asked for.
    pub start: Iova,
    /// Where the range's leaf stands, if it has one.
    pub anchor: Option<&'a Anchor>,
}

impl Berth {
    /// Its number.
    #[inline(always)]
    pub(crate) fn number(&self) -> Number {
        self.number
    }

    /// The anchor.
    ///
    /// # Safety
    ///
    /// The caller has the berth.
    #[inline(always)]
    pub(crate) unsafe fn anchor(&self) -> Option<&Anchor> {
        // SAFETY: the caller's promise (invariant).
        unsafe { &*self.anchor.get() }.as_ref()
    }
}

impl Berths {
    /// Makes berths of `domain` for a device, all vacant.
    pub(crate) fn new(domain: Arc<Domain>, name: Arc<str>) -> Result<Arc<Self>, Error> {
        let all = Self {
            name,
            cores: [const { Core::new() }; SHARDS],
            rented: Rented::new()?,
            failed: Once::new(),
            vacant: Stack(AtomicU64::new(1)),
            donor: AtomicU8::new(0),
            before: [const { AtomicU64::new(0) }; 2],
            anchored: AtomicBool::new(false),
            body: AtomicPtr::new(null_mut()),
            forgotten: AtomicBool::new(false),
            domain,
        };
        let all = fallible::arc(all).map_err(|_| Error::OutOfMemory)?;
        let keeper: Arc<dyn Keep> = all.clone();
        all.domain.iova().add_keeper(Arc::downgrade(&keeper))?;
        all.rented.belong_to(Arc::downgrade(&all));
        Ok(all)
    }

    /// What is ready on this core for ranges of so many bytes.
    #[inline(always)]
    fn stack(&self, len: u64) -> &Stack {
        &self.cores[cpu::index() % SHARDS].ready[class(len)]
    }

    /// The stack of this core for the ranges of a berth's length.
    #[inline(always)]
    fn stack_of(&self, berth: &Berth) -> &Stack {
        self.stack_on(cpu::index(), berth)
    }

    /// The same of any core.
    #[inline(always)]
    fn stack_on(&self, core: usize, berth: &Berth) -> &Stack {
        &self.cores[core % SHARDS].ready[berth.class.load(Relaxed) as usize % CLASSES]
    }

    /// The berth of that number.
    #[inline(always)]
    pub(crate) fn berth(&self, number: Number) -> &'static Berth {
        &self.rented.berths[number as usize % PLACES]
    }

    /// Takes the uppermost berth of a stack.
    #[inline(always)]
    fn pop(&self, stack: &Stack) -> Option<&Berth> {
        let seen = self.look(stack)?;
        if Self::take_off(stack, &seen) { Some(seen.uppermost) } else { self.pop_again(stack) }
    }

    #[inline(always)]
    fn look(&self, stack: &Stack) -> Option<Seen<'_>> {
        // Acquire: what is below the uppermost was written before it was put there.
        let word = stack.0.load(Acquire);
        if word & TOP == 0 {
            return None;
        }
        let uppermost = self.berth((word & TOP) as Number);
        let without = ((word & !TOP) | u64::from(uppermost.next.load(Relaxed))).wrapping_add(CHANGE);
        Some(Seen { word, without, uppermost })
    }

    /// `false` if anything has been taken off or put on since.
    #[inline(always)]
    fn take_off(stack: &Stack, seen: &Seen<'_>) -> bool {
        // Acquire: what its last holder did is over.
        stack.0.compare_exchange(seen.word, seen.without, Acquire, Relaxed).is_ok()
    }

    /// Somebody else was there at the same time.
    #[cold]
    #[inline(never)]
    fn pop_again(&self, stack: &Stack) -> Option<&Berth> {
        self.pop(stack)
    }

    /// Puts a berth on a stack. The caller has it, and then has it no more: unless the stack is closed, which returns `false`.
    #[inline(always)]
    fn push(&self, stack: &Stack, berth: &Berth) -> bool {
        let word = stack.0.load(Relaxed);
        if word & CLOSED != 0 {
            return false;
        }
        berth.next.store((word & TOP) as u32, Relaxed);
        let new = (word & !TOP) | u64::from(berth.number);
        // Release: what this holder did is over, for the next.
        match stack.0.compare_exchange(word, new, Release, Relaxed) {
            Ok(_) => true,
            Err(_) => self.push_again(stack, berth),
        }
    }

    #[cold]
    #[inline(never)]
    fn push_again(&self, stack: &Stack, berth: &Berth) -> bool {
        self.push(stack, berth)
    }

    /// Takes a berth with a range of exactly `len` bytes that ends at or before `limit`, and is aligned to `align` unless it is one leaf.
    /// A range that is one block is for memory in one `run` only: the tables below it that pages have would be in the way of every
    /// block to come.
    #[inline(always)]
    pub(crate) fn take(&self, len: u64, limit: u64, run: bool, align: impl Fn() -> u64) -> Option<Taken<'_>> {
        let berth = self.pop(self.stack(len))?;
        match Self::suits(berth, len, limit, run, &align) {
            Some(taken) => Some(taken),
            None => self.take_another(berth, len, limit, run, align()),
        }
    }

    #[inline(always)]
    fn suits<'a>(berth: &'a Berth, len: u64, limit: u64, run: bool, align: &impl Fn() -> u64) -> Option<Taken<'a>> {
        let start = berth.entry.start();
        // SAFETY: the berth was taken off a stack: it is the caller's alone (invariant).
        let anchor = unsafe { berth.anchor() };
        if berth.entry.bytes() != len || start.get().wrapping_add(len).wrapping_sub(1) > limit {
            return None;
        }
        let unfit = match anchor {
            Some(anchor) => !run && anchor.is_block(),
            None => start.get() & align().wrapping_sub(1) != 0,
        };
        if unfit {
            return None;
        }
        Some(Taken { berth, start, anchor })
    }

    /// [`Self::take`] where the uppermost, which has been taken off, does not suit: looks below it, and leaves the others in their order.
    #[cold]
    #[inline(never)]
    fn take_another<'a>(&'a self, first: &'a Berth, len: u64, limit: u64, run: bool, align: u64) -> Option<Taken<'a>> {
        let mut others = [Some(first), None, None, None, None, None, None, None];
        let mut found = None;
        for place in others.iter_mut().skip(1) {
            let Some(berth) = self.pop(self.stack(len)) else { break };
            found = Self::suits(berth, len, limit, run, &|| align);
            if found.is_some() {
                break;
            }
            *place = Some(berth);
        }
        others.into_iter().rev().flatten().for_each(|berth| self.put_back(berth));
        found
    }

    /// [`Self::take`] where this core has none: what is mapped on one core and ends on another is ready there, and what a core has that maps
    /// no more is of use to nobody else. Looks where one was found last and at one core more, so that nobody pays for many who have none.
    #[cold]
    pub(crate) fn take_elsewhere(&self, len: u64, limit: u64, run: bool, align: u64) -> Option<Taken<'_>> {
        let last = usize::from(self.donor.load(Relaxed));
        for core in [last, last.wrapping_add(1)].map(|core| core % SHARDS) {
            let stack = &self.cores[core].ready[class(len)];
            let Some(berth) = self.pop(stack) else { continue };
            self.donor.store(core as u8, Relaxed);
            match Self::suits(berth, len, limit, run, &|| align) {
                Some(taken) => return Some(taken),
                None => self.put_back(berth),
            }
        }
        self.donor.store(last.wrapping_add(1) as u8, Relaxed);
        None
    }

    /// Puts a berth back that was taken and not used.
    #[cold]
    #[inline(never)]
    pub(crate) fn put_back(&self, berth: &Berth) {
        if !self.push(self.stack_of(berth), berth) {
            self.vacate(berth);
            self.give_back(berth);
        }
    }

    /// Records that the range of a berth, which the caller has, has been revoked, and makes it ready for the next mapping.
    #[inline(always)]
    pub(crate) fn end(&self, berth: &Berth, start: Iova, unmapped_at: Site) {
        berth.entry.end(start, Stamp::now(), unmapped_at);
        if !self.push(self.stack_of(berth), berth) {
            self.put_back(berth);
        }
    }
}
