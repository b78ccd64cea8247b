//! VMSAv8-64 translation tables, stage 1 and 2, for any IOMMU that walks them (DDI 0487, chapter D8; IHI 0070, 3.4).
//!
//! A [`PageTable`] changes tables and makes the change visible to the walker. It sends no command: a map needs no
//! invalidation, since nothing invalid is cached, and what an unmap needs is said by the [`Unmapped`] it returns.
//!
//! # Which leaves a mapping gets
//!
//! At each address the largest block that the rest of the physical run, both alignments and the tables already there allow
//! (physically adjacent runs count as one), else pages; the Contiguous bit on every naturally aligned group that lies in one
//! run. [`Prot::PAGEWISE`] asks for single pages without the hint. A block is only put where no table is linked. What a later
//! [`PageTable::unmap`] may cut follows from that: it takes away whole leaves and whole contiguous groups, and refuses the
//! rest, because changing the size of a live leaf would need break-before-make under a running device. Who unmaps what it
//! mapped never meets this.
//!
//! # Concurrency
//!
//! All methods take `&self` and no lock. Callers that run at the same time work on disjoint ranges; an IOVA allocator sees to
//! that. Whoever breaks this rule still cannot lose a table, make a device reach anything that was not mapped, or map an
//! address twice: a mapping first claims every entry by compare-exchange from *empty* to a value that is invalid to hardware,
//! and only when it has claimed all of them writes leaves. So of two overlapping mappings at most one succeeds, and the other
//! is undone without hardware having seen any of it. [`PageTable::map_exclusively`] is for callers who keep the rule for certain:
//! there a page's entry is looked at and then stored.
//!
//! # Invariants
//!
//! - Tables are only ever added, and freed when the whole [`PageTable`] drops. No walker has a pointer to a freed table as long
//!   as the owner drops the table after the hardware has let go of the root.
//! - A table's contents are visible to the walker before the link to it is; the link is, before any leaf below counts as
//!   mapped. When `map` or `unmap` returns, its leaves are visible.

mod descriptor;
mod geometry;
mod leaves;
mod map;
mod node;
mod run;
#[cfg(test)]
mod tests;
mod unmap;
mod walk;

pub use descriptor::{MAIR, MAIR_DEVICE, MAIR_NON_CACHEABLE, MAIR_WRITE_BACK};
pub use geometry::{Geometry, Granule, Stage};
pub use leaves::Leaves;
pub use unmap::Unmapped;

use crate::contract::TableMemory;
use crate::{Iova, OutOfMemory, PhysAddr, Prot};
use core::fmt;
use core::sync::atomic::Ordering;
use descriptor::Templates;
use geometry::LAST;
use node::{Children, Node, places};

/// One set of translation tables.
pub struct PageTable {
    geometry: Geometry,
    templates: Templates,
    memory: &'static dyn TableMemory,
    root: Node,
    /// The places of the last-level tables of the lowest addresses, which are the ones in use: found without a walk. The places
    /// above them in the tree are for tables of higher addresses.
    low: Children,
}

/// Places in [`PageTable::low`]: for 1 GiB of pages of 4 KiB.
const LOW: usize = 512;

impl PageTable {
    /// Makes tables in which nothing is mapped.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] when the root cannot be allocated.
    pub fn new(geometry: Geometry, memory: &'static dyn TableMemory) -> Result<Self, OutOfMemory> {
        let root = Node::new(&geometry, geometry.start(), true, memory)?;
        let entries = geometry.level(LAST - 1).mask + 1;
        let low = places(if geometry.start() < LAST { entries.min(LOW) } else { 0 })?;
        Ok(Self { geometry, templates: Templates::new(geometry.stage()), memory, root, low })
    }

    /// Where the first table is, for TTB0 or S2TTB.
    pub fn root(&self) -> PhysAddr {
        self.root.table().phys()
    }

    /// The shape of the tables.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Translates as the hardware would, and says what the leaf permits.
    pub fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        let address = iova.get();
        if address >= self.geometry.input_end() {
            return None;
        }
        let (level, entry) = match self.leaf_table(address) {
            Some(node) => (LAST, node.entry(self.geometry.index(LAST, address)).load(Ordering::Acquire)),
            None => {
                let place = self.place(address);
                (place.level, place.node.entry(place.index).load(Ordering::Acquire))
            }
        };
        if !descriptor::is_leaf(entry, level) {
            return None;
        }
        let offset = self.geometry.level(level).size() - 1;
        let phys = descriptor::address(entry) & !offset | address & offset;
        Some((PhysAddr::new(phys), descriptor::decode(self.geometry.stage(), entry)))
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageTable({} at {})", self.geometry, self.root())
    }
}
