//! The caches of small ranges: which core allocates from which chunk, and how chunks come and go.
//!
//! # Locking
//!
//! As the parent says: the tree, then one chunk. The bits of `listed` are hints; what a chunk says of itself under its lock
//! holds.

use super::chunk::{BY_ADDRESS, CHUNK, CHUNK_SHIFT, Chunk, NOBODY};
use super::tree::{Tree, Use};
use super::{BLOCK, Block, IovaAllocator, one};
use crate::OutOfMemory;
use base::{IrqMutex, cpu};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// What a block has for a core that looks for a chunk.
enum Next {
    Found(usize),
    /// The lowest there is lies beyond the limit.
    BeyondLimit,
    None,
}

impl IovaAllocator {
    /// Allocates from the chunk of this core, if there is a free slot in it.
    #[inline(always)]
    pub(super) fn allocate_here(&self, class: u8, pages: u16, limit: u64) -> Option<u64> {
        let core = cpu::index();
        let number = self.cores.get(core)?.chunks.get(usize::from(class))?.load(Relaxed) as usize;
        let chunk = self.chunk(number)?;
        let start = self.chunk_start(number);
        let mut chunk = chunk.lock();
        if chunk.class != Some(class) || chunk.owner != core as u32 || start.wrapping_add(CHUNK) > limit {
            return None;
        }
        Some(start.wrapping_add(chunk.take(pages)?))
    }

    /// Allocates from the chunk of this core, or from another one that becomes it.
    pub(super) fn allocate_small(&self, class: u8, pages: u16, limit: u64) -> Option<u64> {
        if let Some(start) = self.allocate_here(class, pages, limit) {
            return Some(start);
        }
        let core = cpu::index();
        let number = self.cores.get(core)?.chunks.get(usize::from(class))?.load(Relaxed) as usize;
        if let Some(chunk) = self.chunk(number) {
            let mut chunk = chunk.lock();
            if chunk.class == Some(class) && chunk.owner == core as u32 {
                if self.chunk_start(number) + CHUNK > limit {
                    return None;
                }
                chunk.owner = NOBODY;
            }
        }
        self.refill(core as u32, class, pages, limit)
    }

    /// Gives `core` another chunk, and allocates from it.
    #[cold]
    fn refill(&self, core: u32, class: u8, pages: u16, limit: u64) -> Option<u64> {
        let number = self.next_chunk(core, class, limit)?;
        self.cores.get(core as usize)?.chunks.get(usize::from(class))?.store(number as u32, Relaxed);
        let page = self.chunk(number)?.lock().take(pages)?;
        Some(self.chunk_start(number) + page)
    }

    /// Finds another chunk of `class` for `core`, all of it before `limit`: one that another core has left, else a new one.
    fn next_chunk(&self, core: u32, class: u8, limit: u64) -> Option<usize> {
        for (outer, summary) in self.listed.get(usize::from(class))?.iter().enumerate() {
            // Which blocks may have one.
            let mut blocks = summary.load(Relaxed);
            while blocks != 0 {
                let bit = blocks & blocks.wrapping_neg();
                let number = outer * 64 + blocks.trailing_zeros() as usize;
                blocks &= !bit;
                match self.next_of_block(number, core, class, limit) {
                    Next::Found(number) => return Some(number),
                    Next::BeyondLimit => return None,
                    Next::None => self.unlist_block(number, class, bit),
                }
            }
        }
        self.new_chunk(core, class, limit)
    }

    fn next_of_block(&self, number: usize, core: u32, class: u8, limit: u64) -> Next {
        let Some(words) = self.block(number).and_then(|block| block.listed.get(usize::from(class))) else {
            return Next::None;
        };
        for (index, word) in words.iter().enumerate() {
            loop {
                let bits = word.load(Relaxed);
                if bits == 0 {
                    break;
                }
                let bit = bits & bits.wrapping_neg();
                let number = number * BLOCK + index * 64 + bits.trailing_zeros() as usize;
                if self.chunk_start(number) + CHUNK > limit {
                    return Next::BeyondLimit;
                }
                if word.fetch_and(!bit, Relaxed) & bit == 0 {
                    continue;
                }
                let Some(chunk) = self.chunk(number) else { continue };
                let mut chunk = chunk.lock();
                if chunk.class == Some(class) && chunk.listed {
                    chunk.listed = false;
                    chunk.owner = core;
                    return Next::Found(number);
                }
            }
        }
        Next::None
    }

    /// Notes that a block has no listed chunk of `class`, unless one has come meanwhile.
    fn unlist_block(&self, number: usize, class: u8, bit: u64) {
        let summary = self.listed.get(usize::from(class)).and_then(|words| words.get(number / 64));
        let words = self.block(number).and_then(|block| block.listed.get(usize::from(class)));
        if let (Some(summary), Some(words)) = (summary, words) {
            summary.fetch_and(!bit, SeqCst);
            // Whoever lists a chunk sets its bit before the block's: it is seen here, or the block's is set after this.
            if words.iter().any(|word| word.load(SeqCst) != 0) {
                summary.fetch_or(bit, SeqCst);
            }
        }
    }

    fn block(&self, number: usize) -> Option<&Block> {
        self.blocks.get(number)?.get().map(|block| &block[0])
    }

    /// Takes a chunk from the tree for `core`, unless somebody needs all the space there is.
    fn new_chunk(&self, core: u32, class: u8, limit: u64) -> Option<usize> {
        let limit = limit.min(self.chunk_start(self.count));
        let mut tree = self.shared.lock();
        if tree.reclaiming != 0 {
            return None;
        }
        let start = tree.allocate(CHUNK, CHUNK, limit, Use::Chunk).ok()??;
        self.begin(&mut tree, start, class, core)
    }

    /// Makes the pages from `start`, which have been taken from the tree, a chunk.
    fn begin(&self, tree: &mut Tree, start: u64, class: u8, core: u32) -> Option<usize> {
        let number = (start.wrapping_sub(self.front) >> CHUNK_SHIFT) as usize;
        // Only who has just taken the chunk's pages from the tree comes here, under the tree's lock: nobody waits.
        let chunk = self.blocks.get(number / BLOCK).and_then(|cell| {
            let [block] = &**cell.try_call_once(|| one(Block::new)).ok()?;
            let [chunk] = &**block.chunks[number % BLOCK].try_call_once(|| one(|| IrqMutex::new(Chunk::new()))).ok()?;
            Some(chunk)
        });
        match chunk {
            Some(chunk) => {
                chunk.lock().assign(class, core);
                Some(number)
            }
            None => {
                tree.give_back(start, CHUNK, Use::Chunk);
                None
            }
        }
    }

    /// Takes exactly the `len` pages from `start`, if they can be taken in a chunk by themselves. Returns whether all of them were
    /// free; `None` if the tree has to be asked.
    #[inline]
    pub(super) fn take_in_chunk(&self, start: u64, len: u64) -> Option<bool> {
        let offset = start & (CHUNK - 1);
        if start < self.front || len == 0 || len > CHUNK - offset {
            return None;
        }
        let number = (start.wrapping_sub(self.front) >> CHUNK_SHIFT) as usize;
        if let Some(chunk) = self.chunk(number) {
            let mut chunk = chunk.lock();
            if chunk.class == Some(BY_ADDRESS) {
                return Some(chunk.take_at(offset, len));
            }
        }
        self.take_in_new_chunk(number, offset, len)
    }

    #[cold]
    fn take_in_new_chunk(&self, number: usize, offset: u64, len: u64) -> Option<bool> {
        if number >= self.count {
            return None;
        }
        {
            let mut tree = self.shared.lock();
            let start = self.chunk_start(number);
            if tree.reclaiming != 0 || !tree.take(start, CHUNK, Use::Chunk).ok()? {
                return None;
            }
            self.begin(&mut tree, start, BY_ADDRESS, NOBODY)?;
        }
        let mut chunk = self.chunk(number)?.lock();
        // It may have been dissolved again meanwhile.
        if chunk.class == Some(BY_ADDRESS) { Some(chunk.take_at(offset, len)) } else { None }
    }

    /// Offers a chunk that no core owns to all, if it is worth it.
    #[inline]
    pub(super) fn list(&self, number: usize, chunk: &mut Chunk) {
        if !chunk.listed && chunk.is_worthwhile() {
            chunk.listed = true;
            self.mark(number, chunk.class, true);
        }
    }

    fn mark(&self, number: usize, class: Option<u8>, listed: bool) {
        let Some(class) = class.map(usize::from) else { return };
        let (outer, inner) = (number / BLOCK, number % BLOCK);
        let words = self.block(outer).and_then(|block| block.listed.get(class));
        let summary = self.listed.get(class).and_then(|words| words.get(outer / 64));
        if let (Some(word), Some(summary)) = (words.and_then(|words| words.get(inner / 64)), summary) {
            let bit = 1 << (inner % 64);
            if listed {
                word.fetch_or(bit, SeqCst);
                summary.fetch_or(1 << (outer % 64), SeqCst);
            } else {
                word.fetch_and(!bit, Relaxed);
            }
        }
    }

    /// Allocates from the tree.
    #[cold]
    pub(super) fn allocate_exact(&self, pages: u64, align: u64, limit: u64) -> Result<Option<u64>, OutOfMemory> {
        // What is larger than the window is not worth taking the caches apart.
        if pages > (self.window.len() >> self.shift()).min(limit) {
            return Ok(None);
        }
        self.reclaiming(0, limit, |tree| tree.allocate(pages, align, limit, Use::Allocated))
    }

    /// Gives a vacant chunk back to the tree, if it is still vacant and nobody's.
    #[cold]
    pub(super) fn retire(&self, number: usize) {
        let mut tree = self.shared.lock();
        let Some(chunk) = self.chunk(number) else { return };
        let mut chunk = chunk.lock();
        if chunk.owner == NOBODY && chunk.is_vacant() {
            self.mark(number, chunk.class, false);
            *chunk = Chunk::new();
            tree.give_back(self.chunk_start(number), CHUNK, Use::Chunk);
        }
    }

    /// Does `attempt`; as long as it finds no place, dissolves one chunk after another of those that have a page in
    /// `start..end`, and tries again.
    ///
    /// The tree is unlocked in between: a chunk of slots that are all in use takes a while. No new chunk is made meanwhile, so
    /// that in the end all there is has been tried.
    pub(super) fn reclaiming<T>(
        &self,
        start: u64,
        end: u64,
        mut attempt: impl FnMut(&mut Tree) -> Result<Option<T>, OutOfMemory>,
    ) -> Result<Option<T>, OutOfMemory> {
        let found = attempt(&mut self.shared.lock())?;
        if found.is_some() {
            return Ok(found);
        }
        self.give_up_kept();
        let mut tree = self.shared.lock();
        let found = attempt(&mut tree)?;
        if found.is_some() || tree.chunks == 0 {
            return Ok(found);
        }
        tree.reclaiming += 1;
        drop(tree);
        let first = (start.saturating_sub(self.front) >> CHUNK_SHIFT) as usize;
        let last = end.saturating_sub(self.front).div_ceil(CHUNK).min(self.count as u64) as usize;
        let mut found = Ok(None);
        let mut number = first;
        while number < last {
            // Blocks that never had a chunk are passed over.
            if self.block(number / BLOCK).is_none() {
                number = (number / BLOCK + 1) * BLOCK;
                continue;
            }
            let this = number;
            number += 1;
            let mut tree = self.shared.lock();
            found = match self.dissolve(&mut tree, this) {
                Ok(true) => attempt(&mut tree),
                Ok(false) => continue,
                Err(error) => Err(error),
            };
            if !matches!(found, Ok(None)) {
                break;
            }
        }
        if matches!(found, Ok(None)) {
            self.give_up_kept();
        }
        let mut tree = self.shared.lock();
        tree.reclaiming -= 1;
        // Once more, for what others dissolved and freed in the meantime.
        if matches!(found, Ok(None)) { attempt(&mut tree) } else { found }
    }

    /// Turns a chunk into ranges of the tree. Returns whether there was one.
    fn dissolve(&self, tree: &mut Tree, number: usize) -> Result<bool, OutOfMemory> {
        let Some(mut chunk) = self.chunk(number).map(IrqMutex::lock) else { return Ok(false) };
        if chunk.class.is_none() {
            return Ok(false);
        }
        tree.ensure(2 * chunk.live() + 2)?;
        let start = self.chunk_start(number);
        tree.give_back(start, CHUNK, Use::Chunk);
        let used = if chunk.class == Some(BY_ADDRESS) { Use::Reserved } else { Use::Allocated };
        for (page, pages) in chunk.slots() {
            // The memory is there and the pages have just become free: this succeeds.
            tree.take(start + page, pages, used)?;
        }
        self.mark(number, chunk.class, false);
        *chunk = Chunk::new();
        Ok(true)
    }
}
