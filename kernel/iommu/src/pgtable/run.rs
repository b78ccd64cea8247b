//! Mappings that are one block, or pages in last-level tables that are there: what nearly every buffer is.
//!
//! The same leaves and the same checks as in `map.rs` and `unmap.rs`, with each table found once and the entries gone through
//! sixteen at a time. Whatever does not fit (no table yet, blocks and pages) is told so and goes the general way.

use super::PageTable;
use super::descriptor::{EMPTY, Template, all_leaves, is_contiguous, is_group, is_single_block};
use super::geometry::LAST;
use super::map::parts;
use super::node::Node;
use crate::{Iova, IovaRange, MapError, PhysRange, Prot};
use base::words;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// Entries that are looked at together.
const TOGETHER: usize = 16;

/// Neighbouring entries of one last-level table.
struct Piece<'a> {
    node: &'a Node,
    index: usize,
    entries: &'a [AtomicU64],
    /// The address behind them.
    end: u64,
}

impl PageTable {
    /// The block that is all of `iova`: its level, the table and the index in it. `None` if it is none, or a table is missing.
    #[inline(always)]
    pub(super) fn block(&self, iova: IovaRange) -> Option<(usize, &Node, usize)> {
        let (start, len) = (iova.start().get(), iova.len());
        let [table, above] = self.shape.blocks;
        let level = if len == table {
            LAST - 1
        } else if len == above {
            LAST - 2
        } else {
            return None;
        };
        if start & len.wrapping_sub(1) != 0 || start >= self.shape.input_end {
            return None;
        }
        Some((level, self.near_table(level, start)?, self.geometry.index(level, start)))
    }

    /// Maps `iova`, in which nobody else maps at this time, to as much from `phys` on, which can be put out, by one block. `None` where
    /// no single block can be put, where tables are in its way or missing above it, and where something is mapped: nothing has been
    /// done then. `BARRIER`: as [`PageTable::map_exclusively`].
    #[inline(always)]
    pub(super) fn map_block<const BARRIER: bool>(&self, iova: IovaRange, phys: u64, prot: Prot) -> Option<()> {
        if phys & iova.len().wrapping_sub(1) != 0 {
            return None;
        }
        let (_, node, index) = self.block(iova)?;
        let template = self.templates.get(prot).ok()?;
        // An exchange, as in `unmap.rs`: a store could wipe out a link to a table, were the rule of disjoint ranges broken.
        let leaf = template.block(phys);
        node.entry(index).compare_exchange(EMPTY, leaf, Relaxed, Relaxed).ok()?;
        self.publish_node::<BARRIER>(node, index);
        Some(())
    }

    #[inline(always)]
    fn publish_node<const BARRIER: bool>(&self, node: &Node, index: usize) {
        node.table().publish_as::<BARRIER>(index, index.wrapping_add(1));
    }

    /// Clears the leaf of `range` and makes that visible to the walker, if it is one block. Returns its level: **then the range must be
    /// invalidated.** `None` where that takes more than a look: nothing has been done then. `BARRIER`: as
    /// [`PageTable::map_exclusively`].
    #[inline(always)]
    #[must_use = "the range must be invalidated"]
    pub(super) fn unmap_block<const BARRIER: bool>(&self, range: IovaRange) -> Option<u8> {
        let (level, node, index) = self.block(range)?;
        let entry = node.entry(index);
        let leaf = entry.load(Relaxed);
        if !is_single_block(leaf) {
            return None;
        }
        entry.compare_exchange(leaf, EMPTY, Relaxed, Relaxed).ok()?;
        self.publish_node::<BARRIER>(node, index);
        Some(level as u8)
    }

    /// Maps `iova`, in which nobody else maps at this time, to one run. `None` where that takes more than a look: nothing has been
    /// done then.
    #[inline(always)]
    pub(super) fn map_run<const BARRIER: bool>(
        &self,
        iova: IovaRange,
        run: PhysRange,
        template: Template,
        large: bool,
    ) -> Option<()> {
        let shape = &self.shape;
        let (start, phys, len) = (iova.start().get(), run.start().get(), iova.len());
        if run.len() != len {
            return None;
        }
        // Blocks may be a part of it.
        if large && len >= shape.table && (start ^ phys) & shape.table.wrapping_sub(1) == 0 {
            return None;
        }
        let bits = start | phys | len;
        if bits & shape.within != 0 || iova.end().get() > shape.input_end || run.end().get() > shape.output_end {
            return None;
        }
        if !self.in_one_table(start, len) {
            return self.map_across(iova, phys, template, large);
        }
        let (node, index, entries) = self.entries(start, len)?;
        if !all_empty(entries) {
            return None;
        }
        self.write_pages(entries, index, phys, template, large);
        node.table().publish_as::<BARRIER>(index, index.wrapping_add(entries.len()));
        Some(())
    }

    /// [`Self::map_run`] for pages in several tables.
    #[inline(never)]
    fn map_across(&self, iova: IovaRange, phys: u64, template: Template, large: bool) -> Option<()> {
        for (start, len) in self.by_table(iova) {
            if !all_empty(self.entries(start, len)?.2) {
                return None;
            }
        }
        // Tables never go away: all of them are found again.
        for (start, len) in self.by_table(iova) {
            let (node, index, entries) = self.entries(start, len)?;
            self.write_pages(
                entries,
                index,
                phys.wrapping_add(start.wrapping_sub(iova.start().get())),
                template,
                large,
            );
            node.table().publish(index, index + entries.len());
        }
        Some(())
    }

    /// The parts of `range`, start and length, that lie in one last-level table each.
    fn by_table(&self, range: IovaRange) -> impl Iterator<Item = (u64, u64)> {
        let (mut at, end, table) = (range.start().get(), range.end().get(), self.shape.table);
        core::iter::from_fn(move || {
            let start = at;
            at = end.min((start | (table - 1)).saturating_add(1));
            (start < end).then_some((start, at - start))
        })
    }

    /// Whether the pages of `len` bytes from `start` on lie in one last-level table.
    #[inline(always)]
    fn in_one_table(&self, start: u64, len: u64) -> bool {
        // (So do no pages at all.)
        let last = start.wrapping_add(len.saturating_sub(1));
        (start ^ last) < self.shape.table
    }

    /// [`Self::map_run`] for runs of one page each, no two of them neighbours.
    #[inline(always)]
    pub(super) fn map_list<const BARRIER: bool>(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        template: Template,
    ) -> Option<()> {
        let shape = &self.shape;
        let (mut lengths, mut starts, mut neighbours, mut next) = (0, 0, false, u64::MAX);
        for run in runs {
            let start = run.start().get();
            lengths |= run.len() ^ shape.page;
            starts |= start;
            neighbours |= start == next;
            next = start.wrapping_add(shape.page);
        }
        let start = iova.start().get();
        // All starts are aligned, so the pages end where the output ends, too.
        if lengths != 0
            || neighbours
            || (starts | start) & shape.within != 0
            || starts >= shape.output_end
            || iova.end().get() > shape.input_end
            || (runs.len() as u64) << (shape.page_shift & 63) != iova.len()
        {
            return None;
        }
        let (node, index, entries) = self.entries(start, iova.len())?;
        if !all_empty(entries) {
            return None;
        }
        let leaf = template.leaf(LAST, 0, false);
        let mut store = |(entry, run): (&AtomicU64, &PhysRange)| entry.store(leaf | run.start().get(), Relaxed);
        let (blocks, rest) = entries.as_chunks::<TOGETHER>();
        let (runs, others) = runs.as_chunks::<TOGETHER>();
        for (block, runs) in blocks.iter().zip(runs) {
            block.iter().zip(runs).for_each(&mut store);
        }
        rest.iter().zip(others).for_each(store);
        node.table().publish_as::<BARRIER>(index, index.wrapping_add(entries.len()));
        Some(())
    }

    /// Clears the leaves of `range` and makes that visible to the walker, if they are pages in tables that are near. Returns their
    /// level: **then the range must be invalidated.** `None` where that takes more than a look: nothing has been done then.
    /// `BARRIER`: as [`PageTable::map_exclusively`].
    #[inline(always)]
    #[must_use = "the range must be invalidated"]
    pub fn unmap_run<const BARRIER: bool>(&self, range: IovaRange) -> Option<u8> {
        let shape = &self.shape;
        let (start, len) = (range.start().get(), range.len());
        if (start | len) & shape.within != 0 || range.end().get() > shape.input_end {
            return None;
        }
        if !self.in_one_table(start, len) {
            return self.unmap_across(range);
        }
        let (node, index, entries) = self.entries(start, len)?;
        let (first, last) = (entries.first()?.load(Relaxed), entries.last()?.load(Relaxed));
        let within = self.geometry.level(LAST).contiguous.wrapping_sub(1);
        if is_contiguous(first) && index & within != 0
            || is_contiguous(last) && index.wrapping_add(entries.len()) & within != 0
        {
            return None;
        }
        // What is cleared before something is missing is cleared: the general way counts it as missing, which makes the
        // invalidation do without hints. So it is looked for first.
        if !self.are_pages(entries, index) {
            return None;
        }
        clear(entries);
        node.table().publish_as::<BARRIER>(index, index.wrapping_add(entries.len()));
        Some(LAST as u8)
    }

    /// [`Self::unmap_run`] for pages in several tables.
    #[inline(never)]
    fn unmap_across(&self, range: IovaRange) -> Option<u8> {
        let within = self.geometry.level(LAST).contiguous - 1;
        for (start, len) in self.by_table(range) {
            let (_, index, entries) = self.entries(start, len)?;
            // A table has whole groups: only at the ends of the range can one be cut.
            let (first, last) = (entries.first()?.load(Relaxed), entries.last()?.load(Relaxed));
            let cut = is_contiguous(first) && index & within != 0
                || is_contiguous(last) && (index + entries.len()) & within != 0;
            if cut || !self.are_pages(entries, index) {
                return None;
            }
        }
        for (start, len) in self.by_table(range) {
            let (node, index, entries) = self.entries(start, len)?;
            clear(entries);
            node.table().publish(index, index + entries.len());
        }
        Some(LAST as u8)
    }

    /// The entries of the pages of `len` bytes from `start` on, which are inside the input range: table, index, entries. `None` where
    /// they are none, or do not lie in one table, or that is missing.
    #[inline(always)]
    fn entries(&self, start: u64, len: u64) -> Option<(&Node, usize, &[AtomicU64])> {
        let index = self.shape.index(start);
        let count = (len >> (self.shape.page_shift & 63)) as usize;
        // No more than there are: the sum does not overflow.
        if count.wrapping_sub(1) > self.shape.mask.wrapping_sub(index) {
            return None;
        }
        let node = self.near_leaf_table(start)?;
        Some((node, index, node.table().get(index..index.wrapping_add(count))?))
    }

    /// Whether all of `entries`, of which the first is the table's entry `index`, are pages. A group of which the first has the
    /// Contiguous bit was written as a whole and is cleared as a whole.
    #[inline(always)]
    fn are_pages(&self, entries: &[AtomicU64], index: usize) -> bool {
        let group = self.geometry.level(LAST).contiguous;
        let mut rest = entries;
        if index & group.wrapping_sub(1) == 0 {
            while let Some((whole, after)) = rest.split_at_checked(group)
                && let Some(first) = whole.first()
                && is_group(first.load(Relaxed))
            {
                rest = after;
            }
        }
        are_leaves(rest)
    }

    /// The entries of the pages from `start` on that lie in one table, up to `end` (which are both aligned). `None` where the
    /// table is missing.
    fn piece(&self, start: u64, end: u64) -> Option<Piece<'_>> {
        let shape = self.geometry.level(LAST);
        let index = self.geometry.index(LAST, start);
        let count = ((end.wrapping_sub(start) >> (shape.shift & 63)) as usize).min(shape.mask + 1 - index);
        let node = self.leaf_table(start)?;
        let entries = node.table().get(index..index + count)?;
        Some(Piece { node, index, entries, end: start + ((count as u64) << (shape.shift & 63)) })
    }

    /// [`Self::map_in_table`] for several tables.
    #[inline(never)]
    fn map_in_tables(
        &self,
        iova: IovaRange,
        runs: &[PhysRange],
        template: Template,
        large: bool,
    ) -> Option<Result<(), MapError>> {
        let mut at = iova.start().get();
        while at < iova.end().get() {
            let piece = self.piece(at, iova.end().get())?;
            if !all_empty(piece.entries) {
                let taken = piece.entries.iter().position(|entry| entry.load(Relaxed) != EMPTY).unwrap_or(0);
                let at = at + taken as u64 * self.geometry.level(LAST).size();
                return Some(Err(MapError::AlreadyMapped(Iova::new(at))));
            }
            at = piece.end;
        }
        // Tables never go away: all the pieces are found again.
        for mut part in parts(iova.start().get(), runs) {
            while part.len != 0 {
                let piece = self.piece(part.iova, part.iova + part.len)?;
                self.write(piece.entries, piece.index, part.phys, template, large);
                piece.node.table().publish(piece.index, piece.index + piece.entries.len());
                part = part.after(piece.end - part.iova);
            }
        }
        Some(Ok(()))
    }

    /// Maps `iova`, in which nobody else maps at this time. Sizes, alignment and limits have been checked. `None` where it does
    /// not lie in tables that are there.
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
            return self.map_in_tables(iova, runs, template, large);
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
    #[inline(always)] // A list has a run for each page.
    fn write(&self, entries: &[AtomicU64], index: usize, phys: u64, template: Template, large: bool) {
        if let [entry] = entries {
            entry.store(template.leaf(LAST, phys, false), Relaxed);
        } else {
            self.write_pages(entries, index, phys, template, large);
        }
    }

    #[inline(always)]
    fn write_pages(&self, entries: &[AtomicU64], index: usize, phys: u64, template: Template, large: bool) {
        let shape = self.geometry.level(LAST);
        let (size, group) = (shape.size(), shape.contiguous);
        // The pages before the first group.
        let head = index.wrapping_neg() & group.wrapping_sub(1);
        let phys_of_group = phys.wrapping_add((head as u64).wrapping_mul(size));
        let grouped = large && phys_of_group & (group as u64).wrapping_mul(size).wrapping_sub(1) == 0;
        let whole = if grouped { entries.len().saturating_sub(head) & group.wrapping_neg() } else { 0 };
        let (before, rest) = entries.split_at(if whole == 0 { entries.len() } else { head });
        let (groups, after) = rest.split_at(whole.min(rest.len()));
        let plain = template.leaf(LAST, 0, false);
        fill(before, plain | phys, size);
        if whole != 0 {
            fill(groups, template.leaf(LAST, phys_of_group, true), size);
            fill(after, plain | phys_of_group.wrapping_add((whole as u64).wrapping_mul(size)), size);
        }
    }
}

/// Whether nothing is there.
#[inline(always)]
fn all_empty(entries: &[AtomicU64]) -> bool {
    words::any(entries) == EMPTY
}

/// Whether all are pages.
#[inline(always)]
fn are_leaves(entries: &[AtomicU64]) -> bool {
    all_leaves(words::all(entries))
}

/// Clears entries. No exchange: nobody else may change a page that the caller has mapped, and if somebody does, the worst that a
/// store can do is to unmap what the caller is about to invalidate anyhow.
#[inline(always)]
fn clear(entries: &[AtomicU64]) {
    const { assert!(EMPTY == 0) };
    words::clear(entries);
}

/// Stores `leaf` and those that follow it in steps of `size`. Addresses have been checked: nothing wraps.
#[inline(always)]
fn fill(entries: &[AtomicU64], leaf: u64, size: u64) {
    words::count_up(entries, leaf, size);
}
