//! Finding entries, and remembering which words of which table the hardware has not been shown yet.

use super::PageTable;
use super::geometry::LAST;
use super::node::{LinkError, Node};
use crate::contract::TableBlock;
use spin::Once;

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
        (iova >> (self.geometry.level(LAST - 1).shift & 63)) as usize
    }

    /// The place of the table below `node`, of `level`, on the way to `iova`.
    fn home<'a>(&'a self, node: &'a Node, level: usize, iova: u64) -> &'a Once<Node> {
        if level == LAST - 1
            && let Some(place) = self.low.get(self.last_table(iova))
        {
            return place;
        }
        node.place(self.geometry.index(level, iova))
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
        // The places below the lowest table of the level above the last are in `low`, if that has all of them.
        let below = level + 2 == LAST
            && self.last_table(iova) <= self.geometry.level(LAST - 1).mask
            && self.low.len() > self.geometry.level(LAST - 1).mask;
        node.link(&self.geometry, level, index, self.home(node, level, iova), !below, self.memory)
    }

    #[inline(never)]
    fn leaf_table_above(&self, iova: u64) -> Option<&Node> {
        let mut node = &self.root;
        let start = self.geometry.start();
        // Unrolled: no table has more than four levels.
        if start == 0 {
            node = node.place(self.geometry.index(0, iova)).get()?;
        }
        if start <= 1 {
            node = node.place(self.geometry.index(1, iova)).get()?;
        }
        if start <= 2 {
            // (Lower ones are found before.)
            node = node.place(self.geometry.index(2, iova)).get()?;
        }
        Some(node)
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
