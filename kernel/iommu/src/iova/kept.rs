//! What a core has given back last, kept as it is for its next allocation of that size.
//!
//! A buffer is mapped, unmapped and mapped again, on one core. So ranges that their holders give back ([`IovaAllocator::recycle`]) are
//! kept for this core, and stay allocated for the two floors below. In front, for what comes back one by one with nothing else in
//! between, stands one range of each size class: a word, and taking or keeping it is one exchange. Behind it is a [`Magazine`] of
//! each class, for what comes back one after another: what came in last is had first. A core's magazine of a class is made when it first
//! has two ranges of it to keep.
//!
//! What is kept is free as far as everybody else is concerned: before an allocation or a reservation fails, it is given up on all
//! cores. A core keeps at most [`DEPTH`] ranges of a class, and as many as cover 16 MiB (of pages of 4 KiB), and the one in front.
//!
//! # Locking
//!
//! None for the words: whoever exchanges one for 0 has the range. The list of keepers has an [`IrqMutex`], under which the heap's lock is
//! taken; it is not held while they give up. A magazine has a lock, a leaf; what is given up is freed without it.

use super::{CLASSES, Core, IovaAllocator, class_of, one};
use crate::{Iova, IovaError, IovaRange, OutOfMemory};
use alloc::sync::Weak;
use base::{IrqMutex, cpu};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Bits of a word that are the pages of the range; those above are where it begins. (A range that is kept has at most as many
/// pages as a chunk, and a page has at least as many bytes as this can count.)
const PAGES: u64 = 0xfff;

/// The most ranges in a magazine.
const DEPTH: usize = 128;
/// The most pages in the ranges of a magazine, if all were as long as those of its class can be.
const MOST_PAGES: usize = 4096;
/// How far below the top a range is looked for that suits.
const SEARCH: usize = 8;

/// Ranges of one size class that a core keeps, as words, the newest last.
pub(super) struct Magazine {
    len: usize,
    most: usize,
    words: [u64; DEPTH],
}

impl Magazine {
    fn new(class: usize) -> Self {
        Self { len: 0, most: (MOST_PAGES >> class).min(DEPTH), words: [0; DEPTH] }
    }

    /// Keeps `word`. Returns whether there was room.
    #[inline(always)]
    fn push(&mut self, word: u64) -> bool {
        match self.words.get_mut(self.len) {
            Some(place) if self.len < self.most => {
                *place = word;
                self.len = self.len.wrapping_add(1);
                true
            }
            _ => false,
        }
    }

    /// How many are kept.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The newest.
    #[inline(always)]
    fn top(&self) -> Option<u64> {
        self.words.get(self.len.wrapping_sub(1)).copied()
    }

    fn pop(&mut self) -> Option<u64> {
        let top = self.top()?;
        self.len -= 1;
        Some(top)
    }

    /// Takes the newest, if it suits.
    #[inline(always)]
    fn take(&mut self, wanted: Wanted) -> Option<Iova> {
        let start = wanted.suits(self.top()?)?;
        self.len -= 1;
        Some(start)
    }

    /// Takes the newest of those near the top that suit.
    fn search(&mut self, wanted: Wanted) -> Option<Iova> {
        let kept = self.words.get_mut(..self.len)?;
        let (at, start) =
            kept.iter().enumerate().rev().take(SEARCH).find_map(|(at, word)| Some((at, wanted.suits(*word)?)))?;
        // The others stay in their order.
        kept.get_mut(at..)?.rotate_left(1);
        self.len -= 1;
        Some(start)
    }
}

/// Somebody who keeps ranges that are allocated and not in use, for his own next use of them.
pub trait Keep: Send + Sync {
    /// Frees what is not in use: somebody finds no address. Called without a lock of the allocator's.
    fn give_up(&self);
}

/// What somebody wants to allocate.
#[derive(Clone, Copy)]
struct Wanted {
    len: u64,
    align: u64,
    limit: Iova,
    page_shift: u32,
}

impl Wanted {
    /// Where the range of this word begins, if it is one that is wanted.
    #[inline(always)]
    fn suits(&self, word: u64) -> Option<Iova> {
        let start = word & !PAGES;
        let within = self.align.wrapping_sub(1);
        if (word & PAGES) << (self.page_shift & 63) != self.len
            || (self.align & within) | (start & within) != 0
            || start.wrapping_add(self.len).wrapping_sub(1) > self.limit.get()
        {
            return None;
        }
        Some(Iova::new(start))
    }
}

impl IovaAllocator {
    /// Takes what this core has kept in front, `word` for ranges of `len` bytes, if it is at a multiple of `align` and ends at or before
    /// `limit`.
    #[inline(always)]
    pub(super) fn take_kept(&self, word: Option<&AtomicU64>, len: u64, align: u64, limit: Iova) -> Option<IovaRange> {
        let word = word?;
        let kept = word.load(Relaxed);
        let start = Wanted { len, align, limit, page_shift: self.page_shift }.suits(kept)?;
        word.compare_exchange(kept, 0, Acquire, Relaxed).ok()?;
        IovaRange::new(start, len)
    }

    /// Takes the newest of the magazine of `core`, likewise.
    #[inline(always)]
    pub(super) fn take_from_magazine(
        &self,
        core: &Core,
        class: usize,
        len: u64,
        align: u64,
        limit: Iova,
    ) -> Option<IovaRange> {
        let wanted = Wanted { len, align, limit, page_shift: self.page_shift };
        let [magazine] = &**core.magazines.get(class)?.get()?;
        let start = magazine.lock().take(wanted)?;
        IovaRange::new(start, len)
    }

    /// Takes what suits of the newest there.
    pub(super) fn search_magazine(&self, len: u64, align: u64, limit: Iova) -> Option<IovaRange> {
        let wanted = Wanted { len, align, limit, page_shift: self.page_shift };
        let start = self.magazine(class_of(len >> self.shift(), 1) as usize)?.lock().search(wanted)?;
        IovaRange::new(start, len)
    }

    /// What this core has.
    #[inline(always)]
    pub(super) fn here(&self) -> &Core {
        // The index of a core, by which nothing is left out.
        &self.cores[cpu::index() % cpu::MAX_CPUS]
    }

    /// Gives back what [`IovaAllocator::allocate`] returned, to be had again soon. The caller vouches for it: the range was allocated
    /// here and is given back once. ([`IovaAllocator::free`] would know; here that is found out only when the range is next in the
    /// way of something, and the tables keep two mappings from it.) No device must be able to reach anything through it any more.
    ///
    /// # Errors
    ///
    /// As [`IovaAllocator::free`], where the range is not kept.
    #[inline(always)]
    pub fn recycle(&self, range: IovaRange) -> Result<(), IovaError> {
        if let Some(new) = self.word(range)
            && let Some(word) = self.kept(range.len())
            && word.load(Relaxed) == 0
            && word.compare_exchange(0, new, Release, Relaxed).is_ok()
        {
            return Ok(());
        }
        self.recycle_another(range)
    }

    /// [`Self::recycle`] where one is kept in front already. Also for what is given back twice.
    #[inline(never)]
    fn recycle_another(&self, range: IovaRange) -> Result<(), IovaError> {
        let Some(new) = self.word(range) else { return self.free_range(range) };
        let class = class_of(new & PAGES, 1) as usize;
        if self.kept(range.len()).is_some_and(|word| word.load(Relaxed) == new) {
            return Err(IovaError::NotAllocated(range));
        }
        if let Some(magazine) = self.magazine_or_new(class) {
            let mut magazine = magazine.lock();
            if magazine.top() == Some(new) {
                return Err(IovaError::NotAllocated(range));
            }
            if magazine.push(new) {
                return Ok(());
            }
        }
        self.free_range(range)
    }

    /// The word of a range that can be kept.
    #[inline(always)]
    fn word(&self, range: IovaRange) -> Option<u64> {
        let (start, len) = (range.start().get(), range.len());
        // With a guard, a range is longer than it looks.
        (self.guard == 0
            && (start | len) & (self.page_size() - 1) == 0
            && class_of(len >> self.shift(), 1) < CLASSES as u32)
            .then_some(start | len >> self.shift())
    }

    /// Whether a core has kept exactly `range`.
    pub(super) fn is_kept(&self, range: IovaRange) -> bool {
        let pages = range.len() >> self.shift();
        let (class, word) = (class_of(pages, 1) as usize, range.start().get() | pages);
        let in_magazine = |core: &Core| {
            let Some(Some(magazine)) = core.magazines.get(class).map(|cell| cell.get()) else { return false };
            let [magazine] = &**magazine;
            let magazine = magazine.lock();
            magazine.words.iter().take(magazine.len).any(|kept| *kept == word)
        };
        let in_front = |core: &Core| core.kept.get(class).is_some_and(|kept| kept.load(Relaxed) == word);
        self.cores.iter().any(|core| in_front(core) || in_magazine(core))
    }

    /// Where this core keeps the one range in front of the class of `len` bytes.
    #[inline(always)]
    fn kept(&self, len: u64) -> Option<&AtomicU64> {
        self.here().kept.get(class_of(len >> self.shift(), 1) as usize)
    }

    /// This core's magazine of a class, if it has one.
    #[inline(always)]
    fn magazine(&self, class: usize) -> Option<&IrqMutex<Magazine>> {
        let [magazine] = &**self.here().magazines.get(class)?.get()?;
        Some(magazine)
    }

    #[inline(always)]
    fn magazine_or_new(&self, class: usize) -> Option<&IrqMutex<Magazine>> {
        match self.magazine(class) {
            Some(magazine) => Some(magazine),
            None => self.new_magazine(class),
        }
    }

    /// `None` also where there is no memory for it: then nothing more is kept than the one in front.
    #[cold]
    #[inline(never)]
    fn new_magazine(&self, class: usize) -> Option<&IrqMutex<Magazine>> {
        let cell = self.here().magazines.get(class)?;
        // A core's own: nobody waits.
        let [magazine] = &**cell.try_call_once(|| one(|| IrqMutex::new(Magazine::new(class)))).ok()?;
        Some(magazine)
    }

    /// Has `keeper` asked for what it keeps before an allocation or a reservation fails.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn add_keeper(&self, keeper: Weak<dyn Keep>) -> Result<(), OutOfMemory> {
        let mut keepers = self.keepers.lock();
        keepers.retain(|keeper| keeper.strong_count() != 0);
        keepers.try_reserve(1).map_err(|_| OutOfMemory)?;
        keepers.push(keeper);
        Ok(())
    }

    /// Gives up what is kept, here on all cores and by others.
    #[cold]
    pub(super) fn give_up_kept(&self) {
        for index in 0.. {
            // One at a time: it frees ranges, and may be the last handle of its keeper.
            let Some(keeper) = self.keepers.lock().get(index).map(Weak::upgrade) else { break };
            if let Some(keeper) = keeper {
                keeper.give_up();
            }
        }
        for core in self.cores.iter() {
            for word in &core.kept {
                let kept = if word.load(Relaxed) == 0 { 0 } else { word.swap(0, Acquire) };
                self.give_up(kept);
            }
            for [magazine] in core.magazines.iter().filter_map(|cell| cell.get()).map(|magazine| &**magazine) {
                // No more than are there at a time: its core may go on keeping.
                for _ in 0..DEPTH {
                    let Some(word) = magazine.lock().pop() else { break };
                    self.give_up(word);
                }
            }
        }
    }

    fn give_up(&self, word: u64) {
        let (start, len) = (Iova::new(word & !PAGES), (word & PAGES) << self.shift());
        if let Some(range) = IovaRange::new(start, len).filter(|range| !range.is_empty())
            && let Err(error) = self.free_range(range)
        {
            // Its holder was wrong about it.
            log::error!("address range {range} was given back and is not allocated: {error}");
        }
    }
}
