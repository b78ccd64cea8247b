//! The exact allocator: a balanced tree of all ranges of the window, used and free.
//!
//! The ranges tile the window: each page belongs to exactly one, and no two free ones touch. Every node knows the longest free
//! range below it and the largest naturally aligned power of two that a free range below it contains, so finding the lowest
//! fit, giving back and merging all take a number of steps that grows with the logarithm of the number of ranges. (One case
//! may look at more: an alignment that is not the length's own, when no range is long enough to serve it wherever it begins.
//! Then the ranges that are long enough are tried one by one, so that no space is missed.)
//!
//! Units are pages. Nodes live in blocks that never move, linked by index; memory for them is had before anything changes.

use crate::OutOfMemory;
use alloc::boxed::Box;
use alloc::vec::Vec;
#[cfg(test)]
use core::cell::Cell;

mod balance;

/// What a range is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Free,
    Allocated,
    /// Taken by address, until it is released.
    Reserved,
    /// Taken by address, for good.
    Withheld,
    /// Lent to a cache of small ranges.
    Chunk,
}

/// A node's index.
type Link = u32;

/// No node.
const NIL: Link = Link::MAX;

/// log2 of the nodes in one block of them.
const BLOCK_SHIFT: u32 = 8;
const BLOCK: usize = 1 << BLOCK_SHIFT;

#[derive(Clone, Copy)]
struct Node {
    start: u64,
    len: u64,
    used: Use,
    height: u8,
    /// One more than log2 of the largest aligned power of two in a free range of this subtree; 0 for none.
    max_order: u8,
    /// The longest free range of this subtree.
    max_len: u64,
    left: Link,
    /// The right child; of a node that is not in use, the next such node.
    right: Link,
}

/// Ranges of pages, all of them.
pub(super) struct Tree {
    blocks: Vec<Box<[Node]>>,
    /// The first node that is not in use.
    unused: Link,
    /// How many nodes are not in use.
    spare: usize,
    root: Link,
    /// How many ranges are lent to caches.
    pub chunks: usize,
    /// How many callers want caches to take nothing new.
    pub reclaiming: usize,
    #[cfg(test)]
    pub steps: Cell<u64>,
}

/// The largest aligned power of two in a range, as [`Node::max_order`] has it.
fn order(start: u64, len: u64) -> u8 {
    let Some(log) = len.checked_ilog2() else { return 0 };
    let size = 1_u64 << log;
    let aligned = start.next_multiple_of(size);
    // A range that is as long as two blocks of half the size, less a page, contains one.
    if aligned + size <= start + len { log as u8 + 1 } else { log as u8 }
}

impl Tree {
    /// A window of the pages `start..end`, all free.
    pub fn new(start: u64, end: u64) -> Result<Self, OutOfMemory> {
        let mut tree = Self {
            blocks: Vec::new(),
            unused: NIL,
            spare: 0,
            root: NIL,
            chunks: 0,
            reclaiming: 0,
            #[cfg(test)]
            steps: Cell::new(0),
        };
        tree.ensure(1)?;
        tree.add(start, end - start, Use::Free);
        Ok(tree)
    }

    /// Allocates `len` pages at a multiple of `align` (a power of two), the last of them before `limit`.
    pub fn allocate(&mut self, len: u64, align: u64, limit: u64, used: Use) -> Result<Option<u64>, OutOfMemory> {
        self.ensure(2)?;
        let Some((link, start)) = self.fit(len, align, limit) else { return Ok(None) };
        self.carve(link, start, len, used);
        Ok(Some(start))
    }

    /// Takes exactly the `len` pages from `start`. Returns whether all of them were free.
    pub fn take(&mut self, start: u64, len: u64, used: Use) -> Result<bool, OutOfMemory> {
        self.ensure(2)?;
        match self.containing(start) {
            Some(link) if self.node(link).used == Use::Free && start + len <= self.node(link).end() => {
                self.carve(link, start, len, used);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Gives back the range that is exactly this one and used for this. Returns whether there was one.
    pub fn give_back(&mut self, start: u64, len: u64, used: Use) -> bool {
        match self.containing(start) {
            Some(link) if (self.node(link).start, self.node(link).len, self.node(link).used) == (start, len, used) => {
                self.free(start, len, used);
                true
            }
            _ => false,
        }
    }

    /// Gets memory for `nodes` more ranges.
    pub fn ensure(&mut self, nodes: usize) -> Result<(), OutOfMemory> {
        while self.spare < nodes {
            let first = self.blocks.len() << BLOCK_SHIFT;
            if first + BLOCK >= NIL as usize {
                return Err(OutOfMemory);
            }
            self.blocks.try_reserve(1).map_err(|_| OutOfMemory)?;
            let mut block = Vec::new();
            block.try_reserve_exact(BLOCK).map_err(|_| OutOfMemory)?;
            block.extend((0..BLOCK).map(|i| Node {
                start: 0,
                len: 0,
                used: Use::Free,
                height: 0,
                max_order: 0,
                max_len: 0,
                left: NIL,
                right: if i + 1 < BLOCK { (first + i + 1) as Link } else { self.unused },
            }));
            self.blocks.push(block.into_boxed_slice());
            self.unused = first as Link;
            self.spare += BLOCK;
        }
        Ok(())
    }

    /// The range that contains `page`, if that is in the window.
    fn containing(&self, page: u64) -> Option<Link> {
        let mut at = self.root;
        let mut best = None;
        while at != NIL {
            self.step();
            let node = self.node(at);
            if node.start <= page {
                best = Some(at);
                at = node.right;
            } else {
                at = node.left;
            }
        }
        best.filter(|link| page < self.node(*link).end())
    }

    /// Finds a free range for `len` pages, and where in it they go.
    fn fit(&self, len: u64, align: u64, limit: u64) -> Option<(Link, u64)> {
        let place = |link: Link| {
            let node = self.node(link);
            let start = node.start.checked_next_multiple_of(align)?;
            let end = start.checked_add(len)?;
            (end <= node.end() && end <= limit).then_some((link, start))
        };
        if align == 1 {
            return self.lowest(|node| node.max_len >= len, |node| node.len >= len).and_then(place);
        }
        if align == len {
            let needed = len.trailing_zeros() as u8 + 1;
            let own = |node: &Node| order(node.start, node.len) >= needed;
            return self.lowest(|node| node.max_order >= needed, own).and_then(place);
        }
        let sure = len.saturating_add(align - 1);
        let found = self.lowest(|node| node.max_len >= sure, |node| node.len >= sure).and_then(place);
        found.or_else(|| self.search(self.root, len, limit, &place))
    }

    /// The lowest free range of which `own` holds, where `below` says the same of the best range of a subtree.
    fn lowest(&self, below: impl Fn(&Node) -> bool, own: impl Fn(&Node) -> bool) -> Option<Link> {
        let mut at = self.root;
        while at != NIL && below(self.node(at)) {
            self.step();
            let node = self.node(at);
            if node.left != NIL && below(self.node(node.left)) {
                at = node.left;
            } else if node.used == Use::Free && own(node) {
                return Some(at);
            } else {
                at = node.right;
            }
        }
        None
    }

    /// The lowest free range of the subtree that `place` accepts, looking at all that are long enough.
    fn search<T>(&self, at: Link, len: u64, limit: u64, place: &impl Fn(Link) -> Option<T>) -> Option<T> {
        if at == NIL || self.node(at).max_len < len {
            return None;
        }
        self.step();
        let node = self.node(at);
        let left = self.search(node.left, len, limit, place);
        if left.is_some() || node.start >= limit {
            return left;
        }
        let own = if node.used == Use::Free { place(at) } else { None };
        own.or_else(|| self.search(node.right, len, limit, place))
    }

    /// Cuts `len` pages at `start` out of the free range `link`. Needs up to two nodes.
    fn carve(&mut self, link: Link, start: u64, len: u64, used: Use) {
        let free = *self.node(link);
        let (head, tail) = (start - free.start, free.end() - (start + len));
        if head == 0 {
            self.change(free.start, |node| (node.len, node.used) = (len, used));
        } else {
            self.change(free.start, |node| node.len = head);
            self.add(start, len, used);
        }
        if tail != 0 {
            self.add(start + len, tail, Use::Free);
        }
        self.chunks += usize::from(used == Use::Chunk);
    }

    /// Frees a range that is there, and merges it with its neighbours.
    fn free(&mut self, start: u64, len: u64, used: Use) {
        self.chunks -= usize::from(used == Use::Chunk);
        let is_free = |tree: &Self, link: &Link| tree.node(*link).used == Use::Free;
        let mut merged = len;
        if let Some(next) = self.containing(start + len).filter(|link| is_free(self, link)) {
            let next = *self.node(next);
            merged += next.len;
            self.remove_range(next.start);
        }
        let before = start.checked_sub(1).and_then(|page| self.containing(page)).filter(|link| is_free(self, link));
        match before {
            Some(before) => {
                let before = self.node(before).start;
                self.remove_range(start);
                self.change(before, |node| node.len += merged);
            }
            None => self.change(start, |node| (node.len, node.used) = (merged, Use::Free)),
        }
    }

    /// How many ranges there is memory for.
    #[cfg(test)]
    pub fn nodes(&self) -> usize {
        self.blocks.len() << BLOCK_SHIFT
    }

    #[inline]
    fn step(&self) {
        #[cfg(test)]
        self.steps.set(self.steps.get() + 1);
    }
}

impl Node {
    fn end(&self) -> u64 {
        self.start + self.len
    }
}

#[cfg(test)]
mod tests;
