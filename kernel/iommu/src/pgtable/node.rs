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
///   says, so [`Geometry::index`] is in bounds; or none, where the tables below have their places elsewhere
///   ([`PageTable::home`](super::PageTable::home)).
/// - A child that is there is linked from the entry of the same index, that link is visible to the hardware walker, and
///   neither ever goes away before the node does.
pub(super) struct Node {
    table: TableBlock,
    children: Children,
}

/// Places for tables below.
pub(super) type Children = Box<[Once<Node>]>;

/// Makes `count` places.
///
/// # Errors
///
/// [`OutOfMemory`].
pub(super) fn places(count: usize) -> Result<Children, OutOfMemory> {
    let mut children = Vec::new();
    children.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
    children.resize_with(count, Once::new);
    Ok(children.into_boxed_slice())
}

/// Why a child table could not be linked.
pub(super) enum LinkError {
    /// The entry is a block, or claimed for one.
    Taken,
    OutOfMemory,
}

impl Node {
    /// Allocates an empty table of `level`, `with_places` for those below it or without.
    pub fn new(
        geometry: &Geometry,
        level: usize,
        with_places: bool,
        memory: &'static dyn TableMemory,
    ) -> Result<Self, OutOfMemory> {
        let entries = geometry.level(level).mask + 1;
        let bytes = if level == geometry.start() { geometry.root_bytes() } else { entries * 8 };
        let children = places(if level == LAST || !with_places { 0 } else { entries })?;
        let table = memory.allocate(bytes)?;
        if table.len() < entries {
            return Err(OutOfMemory);
        }
        Ok(Self { table, children })
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

    /// The place of the table linked at `index`.
    #[inline]
    pub fn place(&self, index: usize) -> &Once<Node> {
        &self.children[index]
    }

    /// The place of the table linked at `index`, if it is here.
    #[inline]
    pub fn near_place(&self, index: usize) -> Option<&Once<Node>> {
        self.children.get(index)
    }

    /// The table linked at `index` of this node of `level`, whose place is `home`; allocates and links it if there is none.
    ///
    /// The new table is empty, and `TableMemory::allocate` has shown its zeroes to the walker before the link is stored; the
    /// link is shown to the walker before any core can find the child, so whoever fills it need publish nothing but leaves.
    #[cold]
    pub fn link<'a>(
        &self,
        geometry: &Geometry,
        level: usize,
        index: usize,
        home: &'a Once<Node>,
        with_places: bool,
        memory: &'static dyn TableMemory,
    ) -> Result<&'a Node, LinkError> {
        if let Some(child) = home.get() {
            return Ok(child);
        }
        let fresh = Node::new(geometry, level + 1, with_places, memory).map_err(|_| LinkError::OutOfMemory)?;
        // Interrupts are masked so that a handler of this core never spins on a link that its own core has begun. A core
        // that comes second waits for a store and a barrier, and frees its own table.
        base::cpu::without_interrupts(|| {
            home.try_call_once(|| {
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
