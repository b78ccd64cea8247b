//! The software tree that mirrors the tables, so that no physical address is ever turned into a pointer.

use super::descriptor::{EMPTY, table};
use super::geometry::{Geometry, LAST};
use crate::OutOfMemory;
use crate::contract::{TableBlock, TableMemory};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use spin::Once;

/// One table and the tables below it.
///
/// # Invariants
///
/// - `table` has at least as many words, and `children` (above the last level) exactly as many places, as the level's mask
///   says, so [`Geometry::index`] is in bounds.
/// - A child that is there is linked from the entry of the same index, that link is visible to the hardware walker, and
///   neither ever goes away before the node does.
pub(super) struct Node {
    table: TableBlock,
    children: Box<[Once<Node>]>,
}

/// Why a child table could not be linked.
pub(super) enum LinkError {
    /// The entry is a block, or claimed for one.
    Taken,
    OutOfMemory,
}

impl Node {
    /// Allocates an empty table of `level`.
    pub fn new(geometry: &Geometry, level: usize, memory: &'static dyn TableMemory) -> Result<Self, OutOfMemory> {
        let entries = geometry.level(level).mask + 1;
        let bytes = if level == geometry.start() { geometry.root_bytes() } else { entries * 8 };
        let mut children = Vec::new();
        if level != LAST {
            children.try_reserve_exact(entries).map_err(|_| OutOfMemory)?;
            children.resize_with(entries, Once::new);
        }
        let table = memory.allocate(bytes)?;
        if table.len() < entries {
            return Err(OutOfMemory);
        }
        Ok(Self { table, children: children.into_boxed_slice() })
    }

    /// The table.
    #[inline]
    pub fn table(&self) -> &TableBlock {
        &self.table
    }

    /// The entry at `index`.
    #[inline]
    pub fn entry(&self, index: usize) -> &AtomicU64 {
        &self.table[index]
    }

    /// The table linked at `index`.
    #[inline]
    pub fn child(&self, index: usize) -> Option<&Node> {
        self.children[index].get()
    }

    /// The table linked at `index` of this node of `level`; allocates and links it if there is none.
    ///
    /// The new table is empty, and `TableMemory::allocate` has shown its zeroes to the walker before the link is stored; the
    /// link is shown to the walker before any core can find the child, so whoever fills it need publish nothing but leaves.
    #[cold]
    pub fn link(
        &self,
        geometry: &Geometry,
        level: usize,
        index: usize,
        memory: &'static dyn TableMemory,
    ) -> Result<&Node, LinkError> {
        if let Some(child) = self.child(index) {
            return Ok(child);
        }
        let fresh = Node::new(geometry, level + 1, memory).map_err(|_| LinkError::OutOfMemory)?;
        // Interrupts are masked so that a handler of this core never spins on a link that its own core has begun. A core
        // that comes second waits for a store and a barrier, and frees its own table.
        base::cpu::without_interrupts(|| {
            self.children[index].try_call_once(|| {
                let link = table(fresh.table.phys());
                match self.table[index].compare_exchange(EMPTY, link, Ordering::Release, Ordering::Relaxed) {
                    Ok(_) => {
                        self.table.publish(index, index + 1);
                        Ok(fresh)
                    }
                    Err(_) => Err(LinkError::Taken),
                }
            })
        })
    }
}
