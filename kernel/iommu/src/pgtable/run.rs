//! Mappings that lie in one last-level table: what nearly every buffer is.
//!
//! The same leaves and the same checks as in `map.rs` and `unmap.rs`, with the table found once and the entries gone through
//! eight at a time. Whatever does not fit (no table yet, several of them, a block) is told so and goes the general way.

use super::PageTable;
use super::descriptor::{EMPTY, Template, all_leaves, is_contiguous};
use super::geometry::LAST;
use super::unmap::Unmapped;
use crate::{Iova, IovaRange, MapError, PhysRange, RevokeError};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// Entries that are looked at together.
const TOGETHER: usize = 8;

impl PageTable {
    /// Maps `iova`, in which nobody else maps at this time. Sizes, alignment and limits have been checked. `None` where it does
    /// not lie in one table that is there.
    pub(super) fn map_in_table(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        template: Template,
        large: bool,
    ) -> Option<Result<(), MapError>> {
        let shape = self.geometry.level(LAST);
        let start = iova.start().get();
        let index = self.geometry.index(LAST, start);
        let count = (iova.len() >> (shape.shift & 63)) as usize;
        if count > shape.mask + 1 - index {
            return None;
        }
        let node = self.leaf_table(start)?;
        let entries = node.table().get(index..index + count)?;
        if !all_empty(entries) {
            let taken = entries.iter().position(|entry| entry.load(Relaxed) != EMPTY).unwrap_or(0);
            return Some(Err(MapError::AlreadyMapped(Iova::new(start + taken as u64 * shape.size()))));
        }
        let mut rest = entries;
        let mut runs = runs;
        let mut at = index;
        while let Some((first, others)) = runs.split_first() {
            // Physically adjacent runs are one.
            let mut len = first.len();
            runs = others;
            while let Some((next, others)) = runs.split_first()
                && next.start().get() == first.start().get() + len
            {
                len += next.len();
                runs = others;
            }
            let pages = (len >> (shape.shift & 63)) as usize;
            let (here, after) = rest.split_at_checked(pages)?;
            self.write(here, at, first.start().get(), template, large);
            rest = after;
            at += pages;
        }
        node.table().publish(index, index + count);
        Some(Ok(()))
    }

    /// Writes the leaves of one physical run, whose first is the table's entry `index`.
    #[inline]
    fn write(&self, entries: &[AtomicU64], index: usize, phys: u64, template: Template, large: bool) {
        let shape = self.geometry.level(LAST);
        let (size, group) = (shape.size(), shape.contiguous);
        if let [entry] = entries {
            entry.store(template.leaf(LAST, phys, false), Relaxed);
            return;
        }
        // The pages before the first group.
        let head = index.wrapping_neg() & (group - 1);
        let phys_of_group = phys.wrapping_add(head as u64 * size);
        let grouped = large && phys_of_group & (group as u64 * size - 1) == 0;
        let whole = if grouped { entries.len().saturating_sub(head) & !(group - 1) } else { 0 };
        let (before, rest) = entries.split_at(if whole == 0 { entries.len() } else { head });
        let (groups, after) = rest.split_at(whole.min(rest.len()));
        let plain = template.leaf(LAST, 0, false);
        fill(before, plain | phys, size);
        if whole != 0 {
            fill(groups, template.leaf(LAST, phys_of_group, true), size);
            fill(after, plain | phys_of_group.wrapping_add(whole as u64 * size), size);
        }
    }

    /// Clears the leaves of `range`, which is aligned and inside the input range. `None` where not all of it is mapped by pages
    /// of one table.
    pub(super) fn unmap_in_table(&self, range: IovaRange) -> Option<Result<Unmapped, RevokeError>> {
        let shape = self.geometry.level(LAST);
        let start = range.start().get();
        let index = self.geometry.index(LAST, start);
        let count = (range.len() >> (shape.shift & 63)) as usize;
        if count > shape.mask + 1 - index {
            return None;
        }
        let node = self.leaf_table(start)?;
        let entries = node.table().get(index..index + count)?;
        let (first, last) = (entries.first()?.load(Relaxed), entries.last()?.load(Relaxed));
        let (within, span) = (shape.contiguous - 1, shape.contiguous as u64 * shape.size());
        if is_contiguous(first) && index & within != 0 {
            return Some(Err(RevokeError::SplitsBlock(range.start().align_down(span))));
        }
        if is_contiguous(last) && (index + count) & within != 0 {
            return Some(Err(RevokeError::SplitsBlock(range.end().align_down(span))));
        }
        // What is cleared before something is missing is cleared: the general way counts it as missing, which makes the
        // invalidation do without hints. So it is looked for first.
        if !are_leaves(entries) {
            return None;
        }
        clear(entries);
        node.table().publish(index, index + count);
        Some(Ok(Unmapped {
            range,
            level: Some(LAST as u8),
            leaf_size: Some(shape.size()),
            leaves: count as u64,
            missing: None,
        }))
    }
}

/// Whether nothing is there.
#[inline]
fn all_empty(entries: &[AtomicU64]) -> bool {
    let (blocks, rest) = entries.as_chunks::<TOGETHER>();
    let any = |entries: &[AtomicU64]| entries.iter().fold(0, |all, entry| all | entry.load(Relaxed));
    blocks.iter().all(|block| any(block) == EMPTY) && any(rest) == EMPTY
}

/// Whether all are pages.
#[inline]
fn are_leaves(entries: &[AtomicU64]) -> bool {
    let (blocks, rest) = entries.as_chunks::<TOGETHER>();
    let all = |entries: &[AtomicU64]| entries.iter().fold(u64::MAX, |all, entry| all & entry.load(Relaxed));
    blocks.iter().all(|block| all_leaves(all(block))) && all_leaves(all(rest))
}

/// Clears entries. No exchange: nobody else may change a page that the caller has mapped, and if somebody does, the worst that a
/// store can do is to unmap what the caller is about to invalidate anyhow.
#[inline]
fn clear(entries: &[AtomicU64]) {
    let (blocks, rest) = entries.as_chunks::<TOGETHER>();
    for block in blocks {
        block.iter().for_each(|entry| entry.store(EMPTY, Relaxed));
    }
    rest.iter().for_each(|entry| entry.store(EMPTY, Relaxed));
}

/// Stores `leaf` and those that follow it in steps of `size`. Addresses have been checked: nothing wraps.
#[inline]
fn fill(entries: &[AtomicU64], mut leaf: u64, size: u64) {
    let mut store = |entry: &AtomicU64| {
        entry.store(leaf, Relaxed);
        leaf = leaf.wrapping_add(size);
    };
    let (blocks, rest) = entries.as_chunks::<TOGETHER>();
    for block in blocks {
        block.iter().for_each(&mut store);
    }
    rest.iter().for_each(&mut store);
}
