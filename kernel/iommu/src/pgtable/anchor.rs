//! Leaves that are found once and mapped many times.
//!
//! A buffer's address range is mostly one leaf: a page, a contiguous group or a block. Whoever keeps the range for the next buffer of
//! its size keeps an [`Anchor`] with it, which knows where the leaf's entries are: mapping is then to write them, and unmapping to
//! clear them, without looking at sizes and alignments of addresses and without finding the table again.
//!
//! # Invariants
//!
//! The entries are in tables of the page table that the anchor keeps, and are freed after it. They are those of the range, as its leaf
//! has them, and nothing is linked below them while the anchor's leaf is mapped.

#![allow(unsafe_code)] // A declaration: what a mapping is to a device is up to who makes it.

use super::descriptor::{EMPTY, Template};
use super::geometry::LAST;
use super::{Leaf, PageTable, near};
use crate::{IovaRange, PhysRange, Prot};
use alloc::sync::Arc;
use base::{barrier, words};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

/// Where the leaf of a range stands in the tables. In memory that a barrier publishes.
pub struct Anchor {
    /// The first of them.
    entry: &'static AtomicU64,
    entries: &'static [AtomicU64],
    leaf: Leaf,
    table: Arc<PageTable>,
    range: IovaRange,
}

impl PageTable {
    /// Finds where `range` would be mapped by one leaf. `None` where it would not, where tables are missing above it or linked below
    /// it, where something is mapped, and for tables in memory that takes more than a barrier to publish.
    #[cold]
    pub fn anchor(self: &Arc<Self>, range: IovaRange) -> Option<Anchor> {
        if !self.memory.publishes_by_barrier() {
            return None;
        }
        let (leaf, entries) = self.leaf_entries(range)?;
        let entry = entries.first()?;
        (words::any(entries) == EMPTY).then(|| Anchor { entry, entries, leaf, table: Arc::clone(self), range })
    }

    fn leaf_entries(&self, range: IovaRange) -> Option<(Leaf, &'static [AtomicU64])> {
        let (start, len) = (range.start().get(), range.len());
        let (leaf, pages) = match len {
            near::PAGE => (Leaf::PAGE, 1),
            near::GROUP => (Leaf::GROUP, (near::GROUP / near::PAGE) as usize),
            _ => {
                let (level, node, index) = self.block(range)?;
                let entries = node.table().kept_words().get(index..)?.get(..1)?;
                return Some((Leaf::block(level as u8), entries));
            }
        };
        if start & (len - 1) != 0 {
            return None;
        }
        let index = near::index(start);
        Some((leaf, self.near.find_kept(start)?.get(index..)?.get(..pages)?))
    }
}

impl Anchor {
    /// The range.
    #[inline]
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// What it is mapped by.
    #[inline(always)]
    pub fn leaf(&self) -> Leaf {
        self.leaf
    }

    /// Whether the leaf is a block, in whose place a table may be linked.
    #[inline]
    pub fn is_block(&self) -> bool {
        self.leaf != Leaf::PAGE && self.leaf != Leaf::GROUP
    }

    /// Whether the leaf is one of `table`'s.
    #[inline(always)]
    pub fn is_of(&self, table: &Arc<PageTable>) -> bool {
        Arc::ptr_eq(&self.table, table)
    }

    /// Maps the range to `run` by its leaf, visible to the walker when this returns. `false` where it does not fit (size, alignment,
    /// limit, permissions) or something is mapped or linked there: nothing has been done then. The way of a page is inlined.
    ///
    /// # Safety
    ///
    /// As [`AddressSpace::map`](crate::contract::AddressSpace::map), for the address space that the table is of.
    #[inline(always)]
    pub unsafe fn map(&self, run: PhysRange, prot: Prot) -> bool {
        if self.leaf == Leaf::PAGE { self.map_page(run, prot) } else { self.map_larger(run, prot) }
    }

    /// [`Anchor::map`], of which the way of a block is inlined, too.
    ///
    /// # Safety
    ///
    /// As [`Anchor::map`].
    #[inline(always)]
    pub unsafe fn map_inline(&self, run: PhysRange, prot: Prot) -> bool {
        if self.leaf == Leaf::PAGE {
            self.map_page(run, prot)
        } else if self.leaf == Leaf::GROUP {
            self.map_larger(run, prot)
        } else {
            self.map_block(run, prot)
        }
    }

    #[inline(always)]
    fn map_page(&self, run: PhysRange, prot: Prot) -> bool {
        let (phys, len) = (run.start().get(), run.len());
        let Ok(template) = self.table.templates.get(prot) else { return false };
        // One comparison for two: what stands below the page's number stands above it then.
        let page = phys.rotate_right(near::PAGE.trailing_zeros());
        if len != near::PAGE || page >= self.table.shape.output_end / near::PAGE {
            return false;
        }
        // The caller has the range for himself.
        if self.entry.load(Relaxed) != EMPTY {
            return false;
        }
        self.entry.store(template.leaf(LAST, phys, false), Relaxed);
        barrier::publish();
        true
    }

    #[inline(never)] // Keeps the way of a page short.
    fn map_larger(&self, run: PhysRange, prot: Prot) -> bool {
        if self.leaf == Leaf::GROUP { self.map_group(run, prot) } else { self.map_block(run, prot) }
    }

    /// What a leaf larger than a page is made of, if `run` fits.
    #[inline(always)]
    fn template_of_larger(&self, run: PhysRange, prot: Prot) -> Option<Template> {
        let (phys, len) = (run.start().get(), run.len());
        // (What is aligned to the leaf, as the limit is, and begins below it ends there.)
        if len != self.range.len()
            || phys & len.wrapping_sub(1) != 0
            || phys >= self.table.shape.output_end
            || prot.contains(Prot::PAGEWISE)
        {
            return None;
        }
        self.table.templates.get(prot).ok()
    }

    #[inline(always)]
    fn map_group(&self, run: PhysRange, prot: Prot) -> bool {
        let Some(template) = self.template_of_larger(run, prot) else { return false };
        if words::any(self.entries) != EMPTY {
            return false;
        }
        words::count_up(self.entries, template.leaf(LAST, run.start().get(), true), near::PAGE);
        barrier::publish();
        true
    }

    #[inline(always)]
    fn map_block(&self, run: PhysRange, prot: Prot) -> bool {
        let Some(template) = self.template_of_larger(run, prot) else { return false };
        // An exchange, as in `run.rs`: a store could wipe out a link to a table, were the rule of disjoint ranges broken.
        if self.entry.compare_exchange(EMPTY, template.block(run.start().get()), Relaxed, Relaxed).is_err() {
            return false;
        }
        barrier::publish();
        true
    }

    /// Clears the leaf that [`Anchor::map`] has made, and makes that visible to the walker. **Then the range must be invalidated.**
    #[inline(always)]
    pub fn clear(&self) {
        if self.leaf == Leaf::GROUP {
            words::clear(self.entries);
        } else {
            self.entry.store(EMPTY, Relaxed);
        }
        barrier::publish();
    }
}
