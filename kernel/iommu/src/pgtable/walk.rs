//! Finding entries, and remembering which words of which table the hardware has not been shown yet.

use super::PageTable;
use super::geometry::LAST;
use super::node::Node;
use crate::contract::TableBlock;

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
        let mut node = &self.root;
        let start = self.geometry.start();
        // Unrolled: no table has more than four levels.
        if start == 0 {
            node = node.child(self.geometry.index(0, iova))?;
        }
        if start <= 1 {
            node = node.child(self.geometry.index(1, iova))?;
        }
        if start <= 2 {
            node = node.child(self.geometry.index(2, iova))?;
        }
        Some(node)
    }

    /// The deepest linked entry for `iova`.
    pub(super) fn place(&self, iova: u64) -> Place<'_> {
        let mut node = &self.root;
        let mut level = self.geometry.start();
        loop {
            let index = self.geometry.index(level, iova);
            match if level < LAST { node.child(index) } else { None } {
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
