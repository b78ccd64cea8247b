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
//! there a page's entry is looked at and then stored. So is it by [`Anchor::map`], which finds it once for many mappings; a block's
//! entry, in whose place a table could be linked, is exchanged.
//!
//! # Invariants
//!
//! - Tables are only ever added, and freed when the whole [`PageTable`] drops. No walker has a pointer to a freed table as long
//!   as the owner drops the table after the hardware has let go of the root.
//! - A table's contents are visible to the walker before the link to it is; the link is, before any leaf below counts as
//!   mapped. When `map` or `unmap` returns, its leaves are visible.

mod anchor;
mod descriptor;
mod geometry;
mod leaves;
mod map;
mod near;
mod node;
mod run;
#[cfg(test)]
mod tests;
mod unmap;
mod walk;

pub use anchor::Anchor;
pub use descriptor::{MAIR, MAIR_DEVICE, MAIR_NON_CACHEABLE, MAIR_WRITE_BACK};
pub use geometry::{Geometry, Granule, Stage};
pub use leaves::Leaves;
pub use unmap::{Leaf, Unmapped};

use crate::contract::TableMemory;
use crate::{Iova, OutOfMemory, PhysAddr, Prot};
use core::fmt;
use core::sync::atomic::Ordering;
use descriptor::{Said, Templates};
use geometry::LAST;
use near::Near;
use node::{Children, Node, places};

/// One set of translation tables.
pub struct PageTable {
    shape: Shape,
    /// Before the tables, which are freed after it.
    near: Near,
    /// The places of the last-level tables of the lowest addresses, which are the ones in use: found without a walk. The places
    /// above them in the tree are for tables of higher addresses.
    low: Children,
    /// The same for the tables above them.
    middle: Children,
    templates: Templates,
    said: Said,
    geometry: Geometry,
    memory: &'static dyn TableMemory,
    root: Node,
}

/// Places in [`PageTable::low`] (for 1 GiB of pages of 4 KiB) and in [`PageTable::middle`] (for 512 GiB).
const PLACES: usize = 512;

/// The size of no block that could be asked for.
const NO_BLOCK: u64 = u64::MAX;

/// What the ways of a page and of a buffer ask of the [`Geometry`], side by side.
struct Shape {
    /// Bytes in a page.
    page: u64,
    /// The bits of an address that are inside a page.
    within: u64,
    /// Bytes that a last-level table maps.
    table: u64,
    /// log2 of it.
    page_shift: u32,
    /// log2 of the bytes that a last-level table maps.
    table_shift: u32,
    /// Bytes of the blocks of the levels above the last, the lower one first. [`NO_BLOCK`] where there are none.
    blocks: [u64; 2],
    /// log2 of the bytes that a table above the last level maps.
    above_shift: u32,
    /// Entries of a last-level table, less one.
    mask: usize,
    /// The first input address that cannot be translated.
    input_end: u64,
    /// The first output address that cannot be put out.
    output_end: u64,
}

impl Shape {
    fn new(geometry: &Geometry) -> Self {
        let level = |number| geometry.level(number);
        let block = |number| match level(number).leaf && geometry.start() <= number {
            true => level(number).size(),
            false => NO_BLOCK,
        };
        Self {
            blocks: [block(LAST - 1), block(LAST - 2)],
            page: level(LAST).size(),
            within: level(LAST).size() - 1,
            table: level(LAST - 1).size(),
            page_shift: level(LAST).shift,
            table_shift: level(LAST - 1).shift,
            above_shift: level(LAST - 2).shift,
            mask: level(LAST).mask,
            input_end: geometry.input_end(),
            output_end: geometry.output_end(),
        }
    }

    /// Where the page of `iova` is found in its table.
    #[inline(always)]
    fn index(&self, iova: u64) -> usize {
        (iova >> (self.page_shift & 63)) as usize & self.mask
    }
}

impl PageTable {
    /// Makes tables in which nothing is mapped.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`] when the root cannot be allocated.
    pub fn new(geometry: Geometry, memory: &'static dyn TableMemory) -> Result<Self, OutOfMemory> {
        let tables = |level: usize| match geometry.start() <= level {
            true => (geometry.level(level).mask + 1).min(PLACES),
            false => 0,
        };
        let (low, middle) = (places(tables(LAST - 1))?, places(tables(LAST - 2))?);
        let start = geometry.start();
        let elsewhere = start == LAST - 2 && middle.len() > geometry.level(start).mask
            || start == LAST - 1 && low.len() > geometry.level(start).mask;
        let root = Node::new(&geometry, start, !elsewhere, memory)?;
        let (templates, said) = (Templates::new(geometry.stage()), Said::new(geometry.stage()));
        Ok(Self {
            shape: Shape::new(&geometry),
            near: Near::new()?,
            low,
            middle,
            templates,
            said,
            geometry,
            memory,
            root,
        })
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
    #[inline]
    pub fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        let address = iova.get();
        // (What is near is in the input range.)
        let Some(entries) = self.near.find(address) else { return self.translate_far(address) };
        let entry = entries[near::index(address)].load(Ordering::Acquire);
        if !descriptor::is_leaf(entry, LAST) {
            return None;
        }
        let phys = descriptor::address(entry) | address & (near::PAGE - 1);
        Some((PhysAddr::new(phys), self.said.get(entry)))
    }

    #[inline(never)] // Keeps the way of a page short.
    fn translate_far(&self, address: u64) -> Option<(PhysAddr, Prot)> {
        if address >= self.shape.input_end {
            return None;
        }
        let place = self.place(address);
        let entry = place.node.entry(place.index).load(Ordering::Acquire);
        if !descriptor::is_leaf(entry, place.level) {
            return None;
        }
        let offset = self.geometry.level(place.level).size() - 1;
        let phys = descriptor::address(entry) & !offset | address & offset;
        Some((PhysAddr::new(phys), self.said.get(entry)))
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageTable({} at {})", self.geometry, self.root())
    }
}
