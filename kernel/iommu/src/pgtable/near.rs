//! Last-level tables of pages of 4 KiB, found by their address in a few instructions: most of what a page's mapping, revocation and
//! translation would do otherwise is to walk.
//!
//! The first of those tables that share a place here is found so, for good; the others are walked to. With other granules nothing
//! is noted, so nothing is found.

use super::geometry::Granule;
use crate::OutOfMemory;
use crate::contract::TableBlock;
use alloc::boxed::Box;
use alloc::vec::Vec;
use base::cpu;
use core::sync::atomic::AtomicU64;
use spin::Once;

/// Entries of a table.
const ENTRIES: usize = 512;
/// log2 of the bytes of a page, and of those that a table maps.
const PAGE_SHIFT: u32 = Granule::K4.shift();
const TABLE_SHIFT: u32 = PAGE_SHIFT + ENTRIES.trailing_zeros();
/// Tables that are found: those of 4 GiB, if they lie in one piece.
const PLACES: usize = 2048;

/// Bytes in a page.
pub(super) const PAGE: u64 = 1 << PAGE_SHIFT;
/// Bytes in a contiguous group of pages.
pub(super) const GROUP: u64 = PAGE * PAGES_OF_GROUP as u64;
const PAGES_OF_GROUP: usize = 16;

/// The entries of a table.
pub(super) type Entries = [AtomicU64; ENTRIES];

struct Table {
    /// Counted from address 0.
    number: u64,
    entries: &'static Entries,
}

/// The tables.
///
/// # Invariants
///
/// What is noted belongs to the page table that this is part of, and is freed after this.
pub(super) struct Near(Box<[Once<Table>; PLACES]>);

impl Near {
    /// Notes nothing.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new() -> Result<Self, OutOfMemory> {
        let mut places = Vec::new();
        places.try_reserve_exact(PLACES).map_err(|_| OutOfMemory)?;
        places.resize_with(PLACES, Once::new);
        places.into_boxed_slice().try_into().map(Self).map_err(|_| OutOfMemory)
    }

    /// The entries of the table that maps the pages around `iova`, if it has been noted.
    #[inline(always)]
    pub fn find(&self, iova: u64) -> Option<&Entries> {
        let table = self.0[place(iova)].get()?;
        (table.number == iova >> TABLE_SHIFT).then_some(table.entries)
    }

    /// [`Self::find`] for who keeps the page table for as long as he has the entries.
    pub fn find_kept(&self, iova: u64) -> Option<&'static Entries> {
        let table = self.0[place(iova)].get()?;
        (table.number == iova >> TABLE_SHIFT).then_some(table.entries)
    }

    /// Notes the table of a granule that maps the pages around `iova`, and lives at least as long as this.
    pub fn note(&self, granule: Granule, iova: u64, table: &TableBlock) {
        if granule == Granule::K4
            && let Ok(entries) = table.kept_words().try_into()
        {
            // Masked, so that no handler of this core meets the middle of it.
            cpu::without_interrupts(|| {
                self.0[place(iova)].call_once(|| Table { number: iova >> TABLE_SHIFT, entries });
            });
        }
    }
}

fn place(iova: u64) -> usize {
    (iova >> TABLE_SHIFT) as usize % PLACES
}

/// Where the page of `iova` is found in its table.
#[inline(always)]
pub(super) fn index(iova: u64) -> usize {
    (iova >> PAGE_SHIFT) as usize % ENTRIES
}

/// The contiguous group that begins at `iova`, and the index of its first entry.
#[inline(always)]
pub(super) fn group(entries: &Entries, iova: u64) -> (usize, &[AtomicU64; PAGES_OF_GROUP]) {
    let index = index(iova) / PAGES_OF_GROUP;
    (index * PAGES_OF_GROUP, &entries.as_chunks().0[index])
}
