//! Pages that the kernel reaches in another way than through the linear map, or not at all.
//!
//! A [`Pool`] takes blocks of [`BLOCK`] bytes that nobody uses from where memory comes from. A block has left the linear map as a
//! whole; its pages are handed out in runs and mapped elsewhere, each run with what was asked for and nothing else. When all of a
//! block's pages are back, the block goes back too, except for one that is kept for the next who asks.
//!
//! # Invariants
//!
//! - A page of a block is in the linear map never, and in the window outside it exactly while it is handed out mapped.
//! - A bit of `used` is 1 exactly while its page is handed out, or can never be again because its mapping would not go.
//!
//! # Locking
//!
//! One [`IrqMutex`] for the list of blocks. Blocks are taken, mapped, unmapped and given back outside of it.

#![forbid(unsafe_code)]

use alloc::vec::Vec;
use base::IrqMutex;
use core::ptr::NonNull;
use dma::{AttributeError, Cacheability, PageRequest};
use iommu::{PAGE_SIZE, PhysAddr, PhysRange};

/// Bytes of a block: what leaves the linear map at once.
pub const BLOCK: u64 = 2 << 20;

/// Where blocks come from, and how pages are mapped.
pub trait Backing: Send + Sync {
    /// Takes `bytes`, a multiple of [`BLOCK`], aligned to `align` (at least [`BLOCK`]), the last byte not above `below`, that
    /// nobody uses, out of the linear map. `None` if there is none.
    fn take(&self, bytes: u64, align: u64, below: PhysAddr) -> Option<PhysRange>;
    /// Gives back what [`Backing::take`] took. All of it is unmapped.
    fn give(&self, range: PhysRange);
    /// Maps pages that are mapped nowhere, so that no line of them is in a cache if they are not cacheable. Pages that are to
    /// stay unmapped are filled with zeros, and the pointer dangles. `None` if there is no memory for tables.
    fn map(&self, pages: PhysRange, cacheability: Cacheability) -> Option<NonNull<u8>>;
    /// Takes away what [`Backing::map`] mapped. Says whether it is gone.
    fn unmap(&self, pages: PhysRange, cacheability: Cacheability) -> bool;
}

/// Pages outside the linear map.
pub struct Pool<B> {
    backing: B,
    blocks: IrqMutex<Vec<Block>>,
}

/// What a pool has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes outside the linear map.
    pub taken: u64,
    /// Bytes of them that are handed out.
    pub used: u64,
}

struct Block {
    range: PhysRange,
    used: Vec<u64>,
    free: u64,
    /// It was added for good, and is never given back.
    fixed: bool,
}

impl Block {
    fn new(range: PhysRange, fixed: bool) -> Option<Self> {
        let pages = range.len() / PAGE_SIZE;
        let words = usize::try_from(pages.div_ceil(64)).ok()?;
        let mut used = Vec::new();
        used.try_reserve_exact(words).ok()?;
        used.resize(words, 0);
        Some(Self { range, used, free: pages, fixed })
    }

    fn is_used(&self, page: u64) -> bool {
        self.used.get((page / 64) as usize).is_none_or(|word| word >> (page % 64) & 1 != 0)
    }

    fn mark(&mut self, first: u64, count: u64, used: bool) {
        for page in first..first + count {
            if let Some(word) = self.used.get_mut((page / 64) as usize) {
                *word = *word & !(1 << (page % 64)) | u64::from(used) << (page % 64);
            }
        }
        self.free = if used { self.free - count } else { self.free + count };
    }

    /// Takes the lowest run of `bytes` that is free and meets the constraints.
    fn take(&mut self, PageRequest { bytes, align, below }: PageRequest) -> Option<PhysRange> {
        let count = bytes / PAGE_SIZE;
        if count > self.free {
            return None;
        }
        let mut at = self.range.start().align_up(align)?;
        'place: loop {
            let run = PhysRange::new(at, bytes).filter(|run| self.range.covers(*run))?;
            if run.end().get() - 1 > below.get() {
                return None;
            }
            let first = at.offset_from(self.range.start())? / PAGE_SIZE;
            for page in (first..first + count).rev() {
                if self.is_used(page) {
                    // Behind the last page in the way.
                    at = self.range.start().checked_add((page + 1) * PAGE_SIZE)?.align_up(align)?;
                    continue 'place;
                }
            }
            self.mark(first, count, true);
            return Some(run);
        }
    }

    fn give(&mut self, run: PhysRange) {
        if let Some(offset) = run.start().offset_from(self.range.start()) {
            self.mark(offset / PAGE_SIZE, run.len() / PAGE_SIZE, false);
        }
    }

    /// Whether it could be given back.
    fn is_free(&self) -> bool {
        !self.fixed && self.free * PAGE_SIZE == self.range.len()
    }
}

impl<B: Backing> Pool<B> {
    /// A pool without blocks.
    pub const fn new(backing: B) -> Self {
        Self { backing, blocks: IrqMutex::new(Vec::new()) }
    }

    /// Adds `range`, whole pages that are not in the linear map and never will be. Nobody uses them.
    ///
    /// # Errors
    ///
    /// [`AttributeError::OutOfMemory`].
    pub fn add(&self, range: PhysRange) -> Result<(), AttributeError> {
        let block = Block::new(range, true).ok_or(AttributeError::OutOfMemory)?;
        self.push(block).map_err(|_| AttributeError::OutOfMemory)
    }

    fn push(&self, block: Block) -> Result<(), Block> {
        let mut blocks = self.blocks.lock();
        if blocks.try_reserve(1).is_err() {
            return Err(block);
        }
        blocks.push(block);
        Ok(())
    }

    /// Hands out pages that are reached with `cacheability` only, and where. Their contents are undefined, zeros if they are not
    /// mapped at all.
    ///
    /// # Errors
    ///
    /// [`AttributeError::OutOfMemory`]; [`AttributeError::Unsupported`] if the request breaks the rules of [`PageRequest`].
    pub fn allocate(
        &self,
        request: PageRequest,
        cacheability: Cacheability,
    ) -> Result<(PhysRange, NonNull<u8>), AttributeError> {
        let PageRequest { bytes, align, below } = request;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || !align.is_power_of_two() || align < PAGE_SIZE {
            return Err(AttributeError::Unsupported);
        }
        let there = self.blocks.lock().iter_mut().find_map(|block| block.take(request));
        let run = match there {
            Some(run) => run,
            None => self.take_from_new(request, bytes, align, below).ok_or(AttributeError::OutOfMemory)?,
        };
        match self.backing.map(run, cacheability) {
            Some(pointer) => Ok((run, pointer)),
            None => {
                self.put_back(run);
                Err(AttributeError::OutOfMemory)
            }
        }
    }

    fn take_from_new(&self, request: PageRequest, bytes: u64, align: u64, below: PhysAddr) -> Option<PhysRange> {
        let taken = self.backing.take(bytes.checked_next_multiple_of(BLOCK)?, align.max(BLOCK), below)?;
        let mut block = Block::new(taken, false);
        let run = block.as_mut().and_then(|block| block.take(request));
        match (block.map(|block| self.push(block)), run) {
            (Some(Ok(())), Some(run)) => Some(run),
            _ => {
                self.backing.give(taken);
                None
            }
        }
    }

    /// Takes back what [`Pool::allocate`] handed out with this `cacheability`.
    pub fn free(&self, run: PhysRange, cacheability: Cacheability) {
        if self.backing.unmap(run, cacheability) {
            self.put_back(run);
        } else {
            log::error!("memory: the mapping of {run} does not go; it is lost");
        }
    }

    fn put_back(&self, run: PhysRange) {
        let mut blocks = self.blocks.lock();
        let Some(at) = blocks.iter().position(|block| block.range.covers(run)) else {
            drop(blocks);
            log::error!("memory: {run} is in no block");
            return;
        };
        let spare = blocks.iter().enumerate().any(|(index, block)| index != at && block.is_free());
        let emptied = blocks.get_mut(at).is_some_and(|block| {
            block.give(run);
            block.is_free() && (spare || block.range.len() != BLOCK)
        });
        let gone = emptied.then(|| blocks.swap_remove(at));
        drop(blocks);
        if let Some(block) = gone {
            self.backing.give(block.range);
        }
    }

    /// Gives back all blocks of which no page is in use. Says whether there was any.
    pub fn trim(&self) -> bool {
        let mut any = false;
        loop {
            let mut blocks = self.blocks.lock();
            let free = blocks.iter().position(Block::is_free).map(|at| blocks.swap_remove(at));
            drop(blocks);
            let Some(block) = free else { return any };
            self.backing.give(block.range);
            any = true;
        }
    }

    /// What the pool has.
    pub fn stats(&self) -> PoolStats {
        let mut stats = PoolStats::default();
        for block in self.blocks.lock().iter() {
            stats.taken += block.range.len();
            stats.used += block.range.len() - block.free * PAGE_SIZE;
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    /// Memory from 1 GiB on, and what each page of it is.
    struct Fake(Mutex<State>);

    #[derive(Default)]
    struct State {
        free: Vec<u64>,
        /// Pages that have left the linear map, and how they are mapped.
        out: BTreeMap<u64, Option<Cacheability>>,
        no_tables: bool,
    }

    const START: u64 = 1 << 30;

    impl Fake {
        fn new(blocks: u64) -> Self {
            let free = (0..blocks).map(|block| START + block * BLOCK).collect();
            Self(Mutex::new(State { free, ..State::default() }))
        }
    }

    fn pages(range: PhysRange) -> impl Iterator<Item = u64> {
        (range.start().get()..range.end().get()).step_by(PAGE_SIZE as usize)
    }

    impl Backing for Fake {
        fn take(&self, bytes: u64, align: u64, below: PhysAddr) -> Option<PhysRange> {
            assert!(bytes.is_multiple_of(BLOCK) && align >= BLOCK);
            let mut state = self.0.lock().unwrap();
            let fits = |start: &u64| {
                let all =
                    |free: &Vec<u64>| (*start..start + bytes).step_by(BLOCK as usize).all(|at| free.contains(&at));
                start.is_multiple_of(align) && start + bytes - 1 <= below.get() && all(&state.free)
            };
            let start = *state.free.iter().find(|start| fits(start))?;
            state.free.retain(|at| !(start..start + bytes).contains(at));
            let range = PhysRange::new(PhysAddr::new(start), bytes).unwrap();
            for page in pages(range) {
                assert_eq!(state.out.insert(page, None), None, "taken twice");
            }
            Some(range)
        }
        fn give(&self, range: PhysRange) {
            let mut state = self.0.lock().unwrap();
            for page in pages(range) {
                assert_eq!(state.out.remove(&page), Some(None), "given back while mapped: two aliases");
            }
            state.free.extend(pages(range).step_by(512));
        }
        fn map(&self, range: PhysRange, cacheability: Cacheability) -> Option<NonNull<u8>> {
            let mut state = self.0.lock().unwrap();
            if state.no_tables {
                return None;
            }
            for page in pages(range) {
                let entry = state.out.get_mut(&page).expect("mapped while in the linear map: two aliases");
                assert_eq!(entry.replace(cacheability), None, "mapped twice");
            }
            NonNull::new(range.start().get() as *mut u8)
        }
        fn unmap(&self, range: PhysRange, cacheability: Cacheability) -> bool {
            let mut state = self.0.lock().unwrap();
            for page in pages(range) {
                assert_eq!(state.out.insert(page, None), Some(Some(cacheability)));
            }
            true
        }
    }

    fn request(pages: u64) -> PageRequest {
        PageRequest::anywhere(pages * PAGE_SIZE)
    }

    #[test]
    fn pages_share_a_block_and_one_is_kept_for_the_next() {
        let pool = Pool::new(Fake::new(4));
        let (a, _) = pool.allocate(request(1), Cacheability::NonCacheable).unwrap();
        let (b, _) = pool.allocate(request(511), Cacheability::Unmapped).unwrap();
        assert_eq!(pool.stats(), PoolStats { taken: BLOCK, used: BLOCK });
        let (c, _) = pool.allocate(request(1), Cacheability::NonCacheable).unwrap();
        assert_eq!(pool.stats().taken, 2 * BLOCK);
        pool.free(a, Cacheability::NonCacheable);
        pool.free(b, Cacheability::Unmapped);
        assert_eq!(pool.stats(), PoolStats { taken: 2 * BLOCK, used: PAGE_SIZE });
        pool.free(c, Cacheability::NonCacheable);
        assert_eq!(pool.stats(), PoolStats { taken: BLOCK, used: 0 });
        assert!(pool.trim() && !pool.trim());
        assert_eq!(pool.stats(), PoolStats::default());
    }

    #[test]
    fn what_is_larger_than_a_block_goes_back_at_once() {
        let pool = Pool::new(Fake::new(4));
        let large = PageRequest { align: 2 * BLOCK, ..request(513) };
        let (a, _) = pool.allocate(large, Cacheability::NonCacheable).unwrap();
        assert!(a.start().is_aligned(2 * BLOCK));
        pool.free(a, Cacheability::NonCacheable);
        assert_eq!(pool.stats(), PoolStats::default());
        assert_eq!(pool.allocate(request(4 * 512 + 1), Cacheability::NonCacheable), Err(AttributeError::OutOfMemory));
        for bad in [request(0), PageRequest { bytes: 5, ..request(1) }, PageRequest { align: 3, ..request(1) }] {
            assert_eq!(pool.allocate(bad, Cacheability::NonCacheable), Err(AttributeError::Unsupported));
        }
        let low = PageRequest { below: PhysAddr::new(START - 1), ..request(1) };
        assert_eq!(pool.allocate(low, Cacheability::NonCacheable), Err(AttributeError::OutOfMemory));
    }

    #[test]
    fn without_tables_nothing_is_lost() {
        let pool = Pool::new(Fake::new(1));
        pool.backing.0.lock().unwrap().no_tables = true;
        assert_eq!(pool.allocate(request(512), Cacheability::NonCacheable), Err(AttributeError::OutOfMemory));
        pool.backing.0.lock().unwrap().no_tables = false;
        pool.allocate(request(512), Cacheability::NonCacheable).unwrap();
    }

    #[test]
    fn a_carve_out_hands_out_its_own_pages_only() {
        let range = PhysRange::new(PhysAddr::new(START + 0x3000), 5 * PAGE_SIZE).unwrap();
        let pool = Pool::new(Fake::new(0));
        pool.backing.0.lock().unwrap().out = pages(range).map(|page| (page, None)).collect();
        pool.add(range).unwrap();
        let pair = PageRequest { align: 2 * PAGE_SIZE, ..request(2) };
        let (a, _) = pool.allocate(pair, Cacheability::WriteBack).unwrap();
        assert_eq!(a.start().get(), START + 0x4000);
        let (b, _) = pool.allocate(pair, Cacheability::WriteBack).unwrap();
        assert!(pool.allocate(request(2), Cacheability::WriteBack).is_err());
        pool.allocate(request(1), Cacheability::NonCacheable).unwrap();
        pool.free(a, Cacheability::WriteBack);
        pool.free(b, Cacheability::WriteBack);
        let (rest, _) = pool.allocate(request(4), Cacheability::Unmapped).unwrap();
        pool.free(rest, Cacheability::Unmapped);
        let all = PageRequest { below: range.start().checked_add(range.len() - 1).unwrap(), ..request(4) };
        let (last, _) = pool.allocate(all, Cacheability::WriteBack).unwrap();
        pool.free(last, Cacheability::WriteBack);
        // All of it is free but the first page, and it is still there.
        assert!(!pool.trim());
        assert_eq!(pool.stats(), PoolStats { taken: range.len(), used: PAGE_SIZE });
    }

    /// Red when a block that was added was given back like one that was taken.
    #[test]
    fn a_carve_out_stays_when_all_of_it_is_free() {
        let range = PhysRange::new(PhysAddr::new(START), 5 * PAGE_SIZE).unwrap();
        let pool = Pool::new(Fake::new(0));
        pool.backing.0.lock().unwrap().out = pages(range).map(|page| (page, None)).collect();
        pool.add(range).unwrap();
        for _ in 0..3 {
            let (run, _) = pool.allocate(request(5), Cacheability::NonCacheable).unwrap();
            pool.free(run, Cacheability::NonCacheable);
            assert!(!pool.trim());
        }
    }

    proptest! {
        /// The fake panics wherever a page would have two aliases. Red when `Block::take` did not look at the last page of a run,
        /// and when `put_back` gave a block back with a page in use.
        #[test]
        fn no_page_ever_has_two_aliases_and_all_come_back(
            steps in prop::collection::vec((0_u64..700, 0_u32..5, 0_usize..3, any::<prop::sample::Index>()), 1..120)
        ) {
            let kinds = [Cacheability::NonCacheable, Cacheability::Unmapped, Cacheability::WriteBack];
            let pool = Pool::new(Fake::new(6));
            let mut live: Vec<(PhysRange, Cacheability)> = Vec::new();
            for (count, shift, kind, index) in steps {
                if count < 250 && !live.is_empty() {
                    let (run, kind) = live.swap_remove(index.index(live.len()));
                    pool.free(run, kind);
                } else {
                    let count = if count > 650 { count } else { count / 20 + 1 };
                    let request = PageRequest { align: PAGE_SIZE << shift, ..request(count) };
                    if let Ok((run, _)) = pool.allocate(request, kinds[kind]) {
                        prop_assert!(run.start().is_aligned(request.align) && run.len() == request.bytes);
                        prop_assert!(live.iter().all(|(other, _)| !other.overlaps(run)));
                        live.push((run, kinds[kind]));
                    }
                }
                prop_assert_eq!(pool.stats().used, live.iter().map(|(run, _)| run.len()).sum::<u64>());
            }
            for (run, kind) in live {
                pool.free(run, kind);
            }
            prop_assert!(pool.stats().taken <= BLOCK);
            pool.trim();
            prop_assert_eq!(pool.backing.0.lock().unwrap().free.len(), 6);
        }
    }
}
