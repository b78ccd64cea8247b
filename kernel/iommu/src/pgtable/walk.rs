//! Finding entries, and remembering which words of which table the hardware has not been shown yet.

use super::PageTable;
use super::geometry::LAST;
use super::node::{LinkError, Node};
use crate::contract::TableBlock;
use spin::Once;

/// The level above the last.
const ABOVE: usize = LAST - 1;

/// The entry that decides about an address: a leaf, or nothing.
pub(super) struct Place<'a> {
    pub node: &'a Node,
    pub level: usize,
    pub index: usize,
}

impl PageTable {
    /// The last-level table that holds the page of `iova`, if it is linked.
    #[inline(always)] // A call costs the paths of one page more than the walk.
    pub(super) fn leaf_table(&self, iova: u64) -> Option<&Node> {
        match self.low.get(self.last_table(iova)) {
            Some(place) => place.get(),
            None => self.leaf_table_above(iova),
        }
    }

    /// Counts last-level tables from address 0 to that of `iova`.
    #[inline(always)]
    fn last_table(&self, iova: u64) -> usize {
        (iova >> (self.shape.table_shift & 63)) as usize
    }

    /// Counts tables above the last level, likewise.
    #[inline(always)]
    fn table_above(&self, iova: u64) -> usize {
        (iova >> (self.shape.above_shift & 63)) as usize
    }

    /// The place of the table below `node`, of `level`, on the way to `iova`.
    fn home<'a>(&'a self, node: &'a Node, level: usize, iova: u64) -> &'a Once<Node> {
        let near = match level + 1 {
            LAST => self.low.get(self.last_table(iova)),
            ABOVE => self.middle.get(self.table_above(iova)),
            _ => None,
        };
        near.unwrap_or_else(|| node.place(self.geometry.index(level, iova)))
    }

    /// The table linked at `index` of `node`, of `level`, on the way to `iova`; allocates and links it if there is none.
    #[cold]
    pub(super) fn link<'a>(
        &'a self,
        node: &'a Node,
        level: usize,
        index: usize,
        iova: u64,
    ) -> Result<&'a Node, LinkError> {
        // The lowest table of a level has the places for those below it near, if all of them are there.
        let mask = self.geometry.level(level + 1).mask;
        let near = match level + 2 {
            LAST => self.last_table(iova) <= mask && self.low.len() > mask,
            ABOVE => self.table_above(iova) <= mask && self.middle.len() > mask,
            _ => false,
        };
        let table = node.link(&self.geometry, level, index, self.home(node, level, iova), !near, self.memory)?;
        if level + 1 == LAST {
            self.near.note(self.geometry.granule(), iova, table.table());
        }
        Ok(table)
    }

    /// The last-level table that holds the page of `iova`, if it is linked and near. Then `iova` is in the input range.
    #[inline(always)]
    pub(super) fn near_leaf_table(&self, iova: u64) -> Option<&Node> {
        if let Some(place) = self.low.get(self.last_table(iova)) {
            return place.get();
        }
        self.middle.get(self.table_above(iova))?.get()?.place(self.geometry.index(LAST - 1, iova)).get()
    }

    #[inline(always)]
    fn leaf_table_above(&self, iova: u64) -> Option<&Node> {
        match self.middle.get(self.table_above(iova)) {
            Some(place) => Some(place.get()?.place(self.geometry.index(LAST - 1, iova)).get()?),
            None => self.leaf_table_far(iova),
        }
    }

    #[inline(never)]
    fn leaf_table_far(&self, iova: u64) -> Option<&Node> {
        self.table_at(LAST, iova)
    }

    /// Makes stores to the entries `from..to` of the last-level table of `iova`, which is linked, visible to the walker. `BARRIER`: as
    /// [`TableBlock::publish_as`].
    #[inline(always)]
    pub(super) fn publish<const BARRIER: bool>(&self, iova: u64, from: usize, to: usize) {
        if BARRIER {
            base::barrier::publish();
        } else if let Some(node) = self.leaf_table(iova) {
            node.table().publish(from, to);
        }
    }

    /// The table of `level`, one of the two above the last, that maps `iova`, if it is linked and near.
    #[inline(always)]
    pub(super) fn near_table(&self, level: usize, iova: u64) -> Option<&Node> {
        if level == ABOVE
            && let Some(place) = self.middle.get(self.table_above(iova))
        {
            return place.get();
        }
        let start = self.geometry.start();
        if start == level {
            return Some(&self.root);
        }
        // Of two levels there is no walk.
        if start + 1 == level { self.root.near_place(self.geometry.index(start, iova))?.get() } else { None }
    }

    /// The table of `level` on the way to `iova`, if there is one.
    pub(super) fn table_at(&self, level: usize, iova: u64) -> Option<&Node> {
        let mut node = &self.root;
        let start = self.geometry.start();
        for above in start..level {
            node = self.home(node, above, iova).get()?;
        }
        (start <= level).then_some(node)
    }

    /// The deepest linked entry for `iova`.
    pub(super) fn place(&self, iova: u64) -> Place<'_> {
        let mut node = &self.root;
        let mut level = self.geometry.start();
        loop {
            let index = self.geometry.index(level, iova);
            match if level < LAST { self.home(node, level, iova).get() } else { None } {
                Some(child) => node = child,
                None => return Place { node, level, index },
            }
            level += 1;
        }
    }
}

/// A walk along ascending addresses that stays in a last-level table while it can.
pub(super) struct Cursor<'a> {
    table: &'a PageTable,
    leaf: Option<(&'a Node, u64)>,
}

impl<'a> Cursor<'a> {
    pub fn new(table: &'a PageTable) -> Self {
        Self { table, leaf: None }
    }

    /// The last-level table that holds the page of `iova`, if it is linked.
    #[inline]
    pub fn leaf_table(&mut self, iova: u64) -> Option<&'a Node> {
        let last = self.table.geometry.level(LAST);
        let which = (iova >> last.shift) & !(last.mask as u64);
        match self.leaf {
            Some((node, at)) if at == which => Some(node),
            _ => {
                let node = self.table.leaf_table(iova)?;
                self.leaf = Some((node, which));
                Some(node)
            }
        }
    }
}

/// Words that were stored and not published. Neighbouring words are published together.
///
/// Published when dropped, so that no way out of a function forgets it.
#[derive(Default)]
pub(super) struct Dirty<'a> {
    table: Option<&'a TableBlock>,
    from: usize,
    to: usize,
}

impl<'a> Dirty<'a> {
    /// Notes that the words `from..to` of `table` were stored.
    #[inline]
    pub fn touch(&mut self, table: &'a TableBlock, from: usize, to: usize) {
        if self.to == from && self.table.is_some_and(|earlier| core::ptr::eq(earlier, table)) {
            self.to = to;
        } else {
            self.publish();
            *self = Self { table: Some(table), from, to };
        }
    }

    fn publish(&mut self) {
        if let Some(table) = self.table.take() {
            table.publish(self.from, self.to);
        }
    }
}

impl Drop for Dirty<'_> {
    #[inline]
    fn drop(&mut self) {
        self.publish();
    }
}
