//! What a core has given back last, kept as it is for its next allocation of that size.
//!
//! A buffer is mapped, unmapped and mapped again, on one core, with nothing else in between. So a range that its holder gives back
//! ([`IovaAllocator::recycle`]) is kept for this core, one of each size class (a few, where it is a chunk), and for the two floors
//! below it stays allocated. There is a word for each, and taking or keeping a range is one exchange of it.
//!
//! What is kept is free as far as everybody else is concerned: before an allocation or a reservation fails, it is given up on all
//! cores.
//!
//! # Locking
//!
//! None: whoever exchanges a word for 0 has the range.

use super::{CHUNK, Core, IovaAllocator, class_of};
use crate::{Iova, IovaError, IovaRange};
use base::cpu;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Bits of a word that are the pages of the range; those above are where it begins. (A range that is kept has at most as many
/// pages as a chunk, and a page has at least as many bytes as this can count.)
const PAGES: u64 = 0xfff;

impl IovaAllocator {
    /// Takes what this core has kept last, if it is `len` bytes at a multiple of `align` that end at or before `limit`.
    #[inline(always)]
    pub(super) fn take_kept(&self, len: u64, align: u64, limit: Iova) -> Option<IovaRange> {
        self.take_word(self.kept(len)?, len, align, limit)
    }

    /// The same for the chunks that it has kept.
    pub(super) fn take_chunk(&self, len: u64, align: u64, limit: Iova) -> Option<IovaRange> {
        let chunks = &self.cores.get(cpu::index())?.kept_chunks;
        chunks.iter().find_map(|word| self.take_word(word, len, align, limit))
    }

    /// Whether `len` bytes are a whole chunk.
    #[inline(always)]
    pub(super) fn is_chunk(&self, len: u64) -> bool {
        len >> self.shift() == CHUNK
    }

    #[inline(always)]
    fn take_word(&self, word: &AtomicU64, len: u64, align: u64, limit: Iova) -> Option<IovaRange> {
        let kept = word.load(Relaxed);
        let start = kept & !PAGES;
        let within = align.wrapping_sub(1);
        if (kept & PAGES) << self.shift() != len
            || (align & within) | (start & within) != 0
            || start.wrapping_add(len).wrapping_sub(1) > limit.get()
        {
            return None;
        }
        word.compare_exchange(kept, 0, Acquire, Relaxed).ok()?;
        IovaRange::new(Iova::new(start), len)
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
        let (start, len) = (range.start().get(), range.len());
        // With a guard, a range is longer than it looks.
        if self.guard == 0
            && (start | len) & (self.page_size() - 1) == 0
            && let Some(word) = self.kept(len)
        {
            let (kept, new) = (word.load(Relaxed), start | len >> self.shift());
            if kept == 0 && word.compare_exchange(0, new, Release, Relaxed).is_ok() {
                return Ok(());
            }
            if kept == new || self.is_chunk(len) {
                return self.recycle_another(range);
            }
        }
        // What is smaller than a chunk goes back to one, which is as good.
        self.free_range(range)
    }

    /// [`Self::recycle`] of a chunk where one is kept already: it would go to the tree, and come from there again. Also for what is
    /// given back twice.
    #[inline(never)]
    fn recycle_another(&self, range: IovaRange) -> Result<(), IovaError> {
        let new = range.start().get() | range.len() >> self.shift();
        let Some(core) = self.cores.get(cpu::index()) else { return self.free_range(range) };
        if core.kept.iter().chain(&core.kept_chunks).any(|word| word.load(Relaxed) == new) {
            return Err(IovaError::NotAllocated(range));
        }
        let keep = |word: &AtomicU64| word.compare_exchange(0, new, Release, Relaxed).is_ok();
        if self.is_chunk(range.len()) && core.kept_chunks.iter().any(keep) { Ok(()) } else { self.free_range(range) }
    }

    /// Whether a core has kept exactly `range`.
    pub(super) fn is_kept(&self, range: IovaRange) -> bool {
        let pages = range.len() >> self.shift();
        let here = |core: &Core| {
            let words = core.kept.get(class_of(pages, 1) as usize).into_iter().chain(&core.kept_chunks);
            words.into_iter().any(|word| word.load(Relaxed) == range.start().get() | pages)
        };
        self.cores.iter().any(here)
    }

    /// Where this core keeps ranges of the class of `len` bytes.
    #[inline(always)]
    fn kept(&self, len: u64) -> Option<&AtomicU64> {
        self.cores.get(cpu::index())?.kept.get(class_of(len >> self.shift(), 1) as usize)
    }

    /// Gives up what is kept on all cores.
    #[cold]
    pub(super) fn give_up_kept(&self) {
        for word in self.cores.iter().flat_map(|Core { kept, kept_chunks, .. }| kept.iter().chain(kept_chunks)) {
            let kept = if word.load(Relaxed) == 0 { 0 } else { word.swap(0, Acquire) };
            let (start, len) = (Iova::new(kept & !PAGES), (kept & PAGES) << self.shift());
            if let Some(range) = IovaRange::new(start, len).filter(|range| !range.is_empty())
                && let Err(error) = self.free_range(range)
            {
                // Its holder was wrong about it.
                log::error!("address range {range} was given back and is not allocated: {error}");
            }
        }
    }
}
