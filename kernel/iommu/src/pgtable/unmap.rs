//! Taking mappings away, and saying what must be invalidated for it.

use super::descriptor::{EMPTY, is_contiguous, is_group, is_leaf, is_single_page};
use super::geometry::LAST;
use super::walk::{Cursor, Dirty, Place};
use super::{PageTable, near};
use crate::{Iova, IovaRange, RevokeError};
use base::words;
use core::sync::atomic::Ordering::Relaxed;

/// What an unmap cleared. **Until the range has been invalidated and the invalidation awaited, devices may still reach what
/// was mapped there**, also where part of it was missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the range must be invalidated"]
pub struct Unmapped {
    /// What to invalidate. No table was freed, so leaf entries suffice.
    pub range: IovaRange,
    /// The level of all cleared leaves, for the TTL hint, or `None` if they were on several (or there were none).
    pub level: Option<u8>,
    /// The size of all cleared leaves in bytes, likewise.
    pub leaf_size: Option<u64>,
    /// How many leaves were cleared. With 0 there is nothing to invalidate.
    pub leaves: u64,
    /// The first page that was not mapped. The rest was cleared all the same.
    pub missing: Option<Iova>,
}

/// What a range was mapped by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf(u8);

impl Leaf {
    /// A page.
    pub const PAGE: Self = Self(LAST as u8);
    /// Pages under one Contiguous bit: in the place of the level that has no blocks.
    pub const GROUP: Self = Self(0);
    /// How many kinds there are.
    pub const KINDS: usize = LAST + 1;

    /// A block of that level.
    pub(super) const fn block(level: u8) -> Self {
        Self(level)
    }

    /// Counts the kinds from 0: that of [`Leaf::GROUP`], then the levels of blocks and pages.
    #[inline]
    pub const fn kind(self) -> usize {
        self.0 as usize % Self::KINDS
    }

    /// The kind of that number, from 0.
    pub const fn of_kind(kind: usize) -> Self {
        Self((kind % Self::KINDS) as u8)
    }

    /// The level of its entries.
    #[inline]
    pub const fn level(self) -> u8 {
        if self.0 == Self::GROUP.0 { LAST as u8 } else { self.0 }
    }
}

/// Counts cleared leaves.
#[derive(Default)]
struct Tally {
    leaves: u64,
    levels: u8,
    missing: Option<u64>,
}

impl PageTable {
    /// Clears the leaves of `range` and makes that visible to the walker. Does not invalidate anything, and frees no table. An
    /// unmapped page is reported in [`Unmapped::missing`] and does not keep the others from being cleared.
    ///
    /// # Errors
    ///
    /// Nothing has been changed after an error: [`RevokeError::OutOfAperture`]; [`RevokeError::SplitsBlock`] if `range`
    /// begins or ends inside a leaf or a contiguous group, whose start is reported.
    pub fn unmap(&self, range: IovaRange) -> Result<Unmapped, RevokeError> {
        if range.end().get() > self.geometry.input_end() {
            return Err(RevokeError::OutOfAperture(range));
        }
        let leaf = self.unmap_leaf::<false>(range).map(Leaf::level);
        if let Some(level) = leaf.or_else(|| self.unmap_run::<false>(range)) {
            let shape = self.geometry.level(usize::from(level));
            let (leaf_size, leaves) = (Some(shape.size()), range.len() >> (shape.shift & 63));
            return Ok(Unmapped { range, level: Some(level), leaf_size, leaves, missing: None });
        }
        self.unmap_range(range)
    }

    /// Clears what `range` is mapped by and makes that visible to the walker, as [`PageTable::unmap`] does, if it is one page, one
    /// contiguous group or one block, in tables that are near. Otherwise does nothing. Returns which it was: **then it must be
    /// invalidated.** `BARRIER`: as [`PageTable::map_exclusively`].
    #[inline(always)] // A call costs a good part of what is done.
    #[must_use = "the range must be invalidated"]
    pub fn unmap_leaf<const BARRIER: bool>(&self, range: IovaRange) -> Option<Leaf> {
        let (start, len) = (range.start().get(), range.len());
        if len == near::PAGE {
            if start & (near::PAGE - 1) != 0 {
                return None;
            }
            let index = near::index(start);
            let entry = &self.near.find(start)?[index];
            if !is_single_page(entry.load(Relaxed)) {
                return None;
            }
            entry.store(EMPTY, Relaxed);
            self.publish::<BARRIER>(start, index, index + 1);
            return Some(Leaf::PAGE);
        }
        if len == near::GROUP {
            if start & (near::GROUP - 1) != 0 {
                return None;
            }
            // Written as a whole, and cleared as a whole: the first speaks for all.
            let (index, group) = near::group(self.near.find(start)?, start);
            let [first, ..] = group;
            if !is_group(first.load(Relaxed)) {
                return None;
            }
            words::clear(group);
            self.publish::<BARRIER>(start, index, index + group.len());
            return Some(Leaf::GROUP);
        }
        self.unmap_block::<BARRIER>(range).map(Leaf)
    }

    #[inline(never)] // Keeps the way of one page short.
    fn unmap_range(&self, range: IovaRange) -> Result<Unmapped, RevokeError> {
        let page = self.geometry.level(LAST).size();
        let (start, end) = (range.start().get(), range.end().get());
        if !range.is_aligned(page) {
            let cut = if range.start().is_aligned(page) { range.end() } else { range.start() };
            return Err(RevokeError::SplitsBlock(cut.align_down(page)));
        }
        let mut tally = Tally::default();
        if start != end {
            for edge in [start, end - page] {
                if let Some((first, after)) = self.unit(edge)
                    && (first < start || after > end)
                {
                    return Err(RevokeError::SplitsBlock(Iova::new(first)));
                }
            }
            self.clear(start, end, &mut tally);
        }
        let level = tally.levels.is_power_of_two().then(|| tally.levels.trailing_zeros());
        Ok(Unmapped {
            range,
            level: level.map(|level| level as u8),
            leaf_size: level.map(|level| self.geometry.level(level as usize).size()),
            leaves: tally.leaves,
            missing: tally.missing.map(Iova::new),
        })
    }

    /// The leaf, or the contiguous group of leaves, that maps `iova`: its first address and the one after it.
    fn unit(&self, iova: u64) -> Option<(u64, u64)> {
        let Place { node, level, index } = self.place(iova);
        let entry = node.entry(index).load(Relaxed);
        if !is_leaf(entry, level) {
            return None;
        }
        let shape = self.geometry.level(level);
        let span = if is_contiguous(entry) { shape.contiguous as u64 * shape.size() } else { shape.size() };
        let first = iova & !(span - 1);
        Some((first, first + span))
    }

    fn clear(&self, start: u64, end: u64, tally: &mut Tally) {
        let mut cursor = Cursor::new(self);
        let mut dirty = Dirty::default();
        let last = self.geometry.level(LAST);
        let mut at = start;
        while at < end {
            if let Some(node) = cursor.leaf_table(at) {
                let index = self.geometry.index(LAST, at);
                let count = (((end - at) >> last.shift) as usize).min(last.mask + 1 - index);
                for i in 0..count {
                    // No exchange: nobody else may change a page that this caller has mapped, and if somebody does, the worst
                    // that a store can do is to unmap what the caller is about to invalidate anyhow.
                    let entry = node.entry(index + i);
                    if is_leaf(entry.load(Relaxed), LAST) {
                        entry.store(EMPTY, Relaxed);
                        tally.leaves += 1;
                        tally.levels |= 1 << LAST;
                    } else {
                        tally.missing.get_or_insert(at + i as u64 * last.size());
                    }
                }
                dirty.touch(node.table(), index, index + count);
                at += count as u64 * last.size();
                continue;
            }
            let Place { node, level, index } = self.place(at);
            let entry = node.entry(index);
            let leaf = entry.load(Relaxed);
            // An exchange: a plain store could wipe out a link to a table, were the rule of disjoint ranges broken.
            if is_leaf(leaf, level) && entry.compare_exchange(leaf, EMPTY, Relaxed, Relaxed).is_ok() {
                tally.leaves += 1;
                tally.levels |= 1 << level;
                dirty.touch(node.table(), index, index + 1);
            } else {
                tally.missing.get_or_insert(at);
            }
            let size = self.geometry.level(level).size();
            at = (at & !(size - 1)) + size;
        }
    }
}
