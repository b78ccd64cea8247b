//! Stage-1 translation tables of EL1: 4 KiB granule, 48-bit addresses, four levels (DDI 0487, D8).
//!
//! # Invariants
//!
//! An entry goes from invalid to valid, and a leaf back to invalid ([`unmap`], whose caller invalidates TLBs before anything relies
//! on it). It never goes from valid to something else that is valid, and no table is ever freed: a walker that is on its way
//! through the tables always finds what it may use.

use core::sync::atomic::{AtomicU64, Ordering};

/// What a mapping is for, which decides its type and rights. Nothing is both writable and executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Instructions: read and execute.
    Code,
    /// Constants: read.
    Constants,
    /// Memory: read and write.
    Data,
    /// Memory that is not cached: read and write, Normal Non-cacheable.
    Uncached,
    /// Device registers: read and write, Device-nGnRE.
    Device,
}

pub(super) const VALID: u64 = 1;
pub(super) const TABLE_OR_PAGE: u64 = 1 << 1;
const READ_ONLY: u64 = 1 << 7;
const INNER_SHAREABLE: u64 = 3 << 8;
const ACCESSED: u64 = 1 << 10;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
pub(super) const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// MAIR_EL1 as the entry code sets it. The first three are what IOMMUs have, so that one table can be walked by both.
pub const MAIR: u64 = 0x0004_44ff;
const NORMAL: u64 = 0 << 2;
const NORMAL_NON_CACHEABLE: u64 = 1 << 2;
const DEVICE_NGNRE: u64 = 2 << 2;

impl Use {
    pub(super) const fn bits(self) -> u64 {
        let common = VALID | ACCESSED | UXN;
        common
            | match self {
                Self::Code => NORMAL | INNER_SHAREABLE | READ_ONLY,
                Self::Constants => NORMAL | INNER_SHAREABLE | READ_ONLY | PXN,
                Self::Data => NORMAL | INNER_SHAREABLE | PXN,
                // The shareability of what is not cached is outer, whatever stands there.
                Self::Uncached => NORMAL_NON_CACHEABLE | INNER_SHAREABLE | PXN,
                Self::Device => DEVICE_NGNRE | PXN,
            }
    }
}

/// A mapping that was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// An address or the length is not a multiple of the page size, or the range is empty or wraps.
    #[error("the range of {len:#x} bytes at {va:#x} (physical {pa:#x}) is not made of pages")]
    NotPages {
        /// Virtual address.
        va: u64,
        /// Physical address.
        pa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Something is mapped there already.
    #[error("virtual address {0:#x} is mapped already")]
    AlreadyMapped(u64),
    /// A physical address beyond what the tables or the linear map reach.
    #[error("physical address {0:#x} is out of reach")]
    OutOfReach(u64),
    /// Memory was asked for as a device.
    #[error("physical address {0:#x} is memory, not a device")]
    IsMemory(u64),
    /// No memory for a table.
    #[error("no memory for a translation table")]
    NoTables,
    /// The part of the address space for this kind of mapping is used up.
    #[error("no virtual addresses left")]
    NoAddresses,
    /// Nothing is mapped there.
    #[error("virtual address {0:#x} is not mapped")]
    NotMapped(u64),
    /// A block that reaches beyond the range that should be taken away. Splitting it would need a moment without a mapping.
    #[error("virtual address {0:#x} is part of a larger block")]
    PartOfBlock(u64),
    /// The final tables are not made yet.
    #[error("the final translation tables do not exist yet")]
    TooEarly,
}

/// Where tables come from and how they are reached.
pub trait Tables {
    /// Makes a table of 512 zeros; returns its physical address.
    fn allocate(&mut self) -> Option<u64>;
    /// The entry `index` (below 512) of the table at physical address `table`, which `allocate` has returned.
    fn entry(&self, table: u64, index: usize) -> &AtomicU64;
}

pub(super) const fn span(level: u32) -> u64 {
    1 << (39 - 9 * level)
}

pub(super) const fn index(va: u64, level: u32) -> usize {
    (va / span(level) % 512) as usize
}

/// Maps `len` bytes at `va` to `pa` in the tables below `root`, with the largest blocks that fit.
///
/// # Errors
///
/// [`MapError`]; a part of the range before the address of the error may be mapped then.
pub fn map(tables: &mut impl Tables, root: u64, va: u64, pa: u64, len: u64, purpose: Use) -> Result<(), MapError> {
    map_with(tables, root, (va, pa, len), purpose, span(1))
}

/// As [`map`], for a range (virtual address, physical address, length) with blocks no larger than `largest` bytes.
///
/// # Errors
///
/// As there.
pub fn map_with(
    tables: &mut impl Tables,
    root: u64,
    (va, pa, len): (u64, u64, u64),
    purpose: Use,
    largest: u64,
) -> Result<(), MapError> {
    let ends = va.checked_add(len - u64::from(len != 0)).and(pa.checked_add(len));
    if len == 0 || (va | pa | len) & 0xfff != 0 || ends.is_none() {
        return Err(MapError::NotPages { va, pa, len });
    }
    if pa + len > 1 << 48 {
        return Err(MapError::OutOfReach(pa));
    }
    let mut done = 0;
    while done < len {
        let (va, pa, left) = (va.wrapping_add(done), pa + done, len - done);
        let mut table = root;
        let mut level = 0;
        loop {
            let size = span(level);
            let fits = level != 0 && size <= largest && (va | pa).is_multiple_of(size) && left >= size;
            let entry = tables.entry(table, index(va, level)).load(Ordering::Relaxed);
            if fits {
                if entry & VALID != 0 {
                    return Err(MapError::AlreadyMapped(va));
                }
                let kind = if level == 3 { TABLE_OR_PAGE } else { 0 };
                tables.entry(table, index(va, level)).store(pa | purpose.bits() | kind, Ordering::Release);
                done += size;
                break;
            }
            table = match entry & (VALID | TABLE_OR_PAGE) {
                0 | TABLE_OR_PAGE => {
                    let next = tables.allocate().ok_or(MapError::NoTables)?;
                    tables.entry(table, index(va, level)).store(next | VALID | TABLE_OR_PAGE, Ordering::Release);
                    next
                }
                VALID => return Err(MapError::AlreadyMapped(va)),
                _ => entry & ADDRESS,
            };
            level += 1;
        }
    }
    Ok(())
}

/// Takes the mappings of the `len` bytes at `va` away and calls `gone` with the address of each leaf. TLBs have to be invalidated
/// for all of them before anything relies on it.
///
/// # Errors
///
/// [`MapError::NotPages`]; [`MapError::NotMapped`] or [`MapError::PartOfBlock`] where there is no leaf, or one that reaches beyond
/// the range: nothing has changed then.
pub fn unmap(tables: &impl Tables, root: u64, va: u64, len: u64, mut gone: impl FnMut(u64)) -> Result<(), MapError> {
    if len == 0 || (va | len) & 0xfff != 0 || va.checked_add(len - 1).is_none() {
        return Err(MapError::NotPages { va, pa: 0, len });
    }
    for clear in [false, true] {
        let mut done = 0;
        while done < len {
            let at = va + done;
            let (mut table, mut level) = (root, 0);
            let size = loop {
                let slot = tables.entry(table, index(at, level));
                let entry = slot.load(Ordering::Relaxed);
                if entry & VALID == 0 {
                    return Err(MapError::NotMapped(at));
                }
                if level == 3 || entry & TABLE_OR_PAGE == 0 {
                    let size = span(level);
                    if !at.is_multiple_of(size) || len - done < size {
                        return Err(MapError::PartOfBlock(at));
                    }
                    if clear {
                        slot.store(0, Ordering::Release);
                        gone(at);
                    }
                    break size;
                }
                table = entry & ADDRESS;
                level += 1;
            };
            done += size;
        }
    }
    Ok(())
}

/// The first address from `va` below `va + len` that is mapped in the tables below `root`.
pub fn first_mapped(tables: &impl Tables, root: u64, va: u64, len: u64) -> Option<u64> {
    let mut done = 0;
    while done < len {
        let at = va.wrapping_add(done);
        let mut table = root;
        let mut level = 0;
        loop {
            let entry = tables.entry(table, index(at, level)).load(Ordering::Relaxed);
            if entry & VALID == 0 {
                done += span(level) - at % span(level);
                break;
            }
            if level == 3 || entry & TABLE_OR_PAGE == 0 {
                return Some(at);
            }
            table = entry & ADDRESS;
            level += 1;
        }
    }
    None
}

#[cfg(test)]
pub(super) mod fake {
    use super::*;
    use std::boxed::Box;
    use std::vec::Vec;

    /// Tables at made-up physical addresses: 0x1000 times (position + 1).
    pub struct Fake {
        pub tables: Vec<Box<[AtomicU64; 512]>>,
        pub limit: usize,
    }

    impl Fake {
        pub fn new(limit: usize) -> (Self, u64) {
            let mut fake = Self { tables: Vec::new(), limit };
            let root = fake.allocate().unwrap();
            (fake, root)
        }

        /// The physical address and rights of `va`, by an independent walk.
        pub fn walk(&self, root: u64, va: u64) -> Option<(u64, u64)> {
            let mut table = root;
            for (level, shift) in [39, 30, 21, 12].into_iter().enumerate() {
                let entry = self.entry(table, (va >> shift & 511) as usize).load(Ordering::Relaxed);
                match (entry & 3, level) {
                    (3, 3) | (1, 1 | 2) => {
                        let mask = (1_u64 << shift) - 1;
                        assert_eq!(entry & ADDRESS & mask, 0, "a misaligned output address");
                        return Some(((entry & ADDRESS) | (va & mask), entry & !ADDRESS));
                    }
                    (3, _) => table = entry & ADDRESS,
                    (bits, _) => {
                        assert_eq!(bits & 1, 0, "a reserved encoding");
                        return None;
                    }
                }
            }
            unreachable!()
        }
    }

    impl Tables for Fake {
        fn allocate(&mut self) -> Option<u64> {
            if self.tables.len() == self.limit {
                return None;
            }
            self.tables.push(Box::new([const { AtomicU64::new(0) }; 512]));
            Some(self.tables.len() as u64 * 0x1000)
        }
        fn entry(&self, table: u64, index: usize) -> &AtomicU64 {
            &self.tables[(table / 0x1000) as usize - 1][index]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Fake;
    use super::*;
    use std::vec::Vec;

    const VA: u64 = 0xffff_0000_0000_0000;

    #[test]
    fn every_page_of_a_ragged_range_is_mapped_and_no_other() {
        let (mut fake, root) = Fake::new(64);
        let (start, end) = (0x3fff_f000_u64, 0x8020_3000_u64);
        map(&mut fake, root, VA + start, start, end - start, Use::Data).unwrap();
        for page in [start, 0x4000_0000, 0x7fff_f000, 0x8000_0000, 0x801f_f000, 0x8020_0000, end - 0x1000] {
            assert_eq!(fake.walk(root, VA + page + 0x123).map(|(pa, _)| pa), Some(page + 0x123), "{page:#x}");
        }
        assert_eq!(fake.walk(root, VA + start - 1), None);
        assert_eq!(fake.walk(root, VA + end), None);
        // The middle is one 1 GiB block: root, L1, and two tables for each ragged end.
        assert_eq!(fake.tables.len(), 6);
    }

    #[test]
    fn sixteen_gibibytes_need_few_tables() {
        let (mut fake, root) = Fake::new(64);
        map(&mut fake, root, VA + (1 << 30), 1 << 30, 16 << 30, Use::Data).unwrap();
        assert_eq!(fake.tables.len(), 2);
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        for purpose in [Use::Code, Use::Constants, Use::Data, Use::Uncached, Use::Device] {
            let bits = purpose.bits();
            assert!(bits & READ_ONLY != 0 || bits & PXN != 0, "{purpose:?}");
            assert!(bits & UXN != 0);
        }
    }

    #[test]
    fn a_mapping_is_never_replaced() {
        let (mut fake, root) = Fake::new(64);
        map(&mut fake, root, VA, 0, 0x20_0000, Use::Data).unwrap();
        assert_eq!(map(&mut fake, root, VA + 0x1000, 0, 0x1000, Use::Data), Err(MapError::AlreadyMapped(VA + 0x1000)));
        map(&mut fake, root, VA + 0x20_1000, 0, 0x1000, Use::Data).unwrap();
        assert_eq!(
            map(&mut fake, root, VA + 0x20_0000, 0, 0x20_0000, Use::Data),
            Err(MapError::AlreadyMapped(VA + 0x20_0000))
        );
    }

    /// Red when the first pass cleared entries as it went.
    #[test]
    fn what_is_taken_away_is_gone_and_nothing_else_is() {
        let (mut fake, root) = Fake::new(64);
        map_with(&mut fake, root, (VA, 0, 8 << 20), Use::Data, 2 << 20).unwrap();
        map(&mut fake, root, VA + (8 << 20), 8 << 20, 0x3000, Use::Data).unwrap();
        let mut gone = Vec::new();
        unmap(&fake, root, VA + (2 << 20), 2 << 20, |va| gone.push(va)).unwrap();
        assert_eq!(gone, [VA + (2 << 20)]);
        unmap(&fake, root, VA + (8 << 20) + 0x1000, 0x2000, |va| gone.push(va)).unwrap();
        assert_eq!(gone.len(), 3);
        for (va, there) in [
            (0, true),
            ((2 << 20) - 1, true),
            (2 << 20, false),
            ((4 << 20) - 1, false),
            (4 << 20, true),
            (8 << 20, true),
            ((8 << 20) + 0x1000, false),
        ] {
            assert_eq!(fake.walk(root, VA + va).is_some(), there, "{va:#x}");
        }
        // Half of a block, after a whole one: neither goes.
        let part = unmap(&fake, root, VA + (4 << 20), 0x30_0000, |_| panic!("gone"));
        assert_eq!(part, Err(MapError::PartOfBlock(VA + (6 << 20))));
        let hole = unmap(&fake, root, VA, 4 << 20, |_| panic!("gone"));
        assert_eq!(hole, Err(MapError::NotMapped(VA + (2 << 20))));
        assert!(fake.walk(root, VA + (4 << 20)).is_some() && fake.walk(root, VA).is_some());
        // And it can be had again, in tables that exist.
        let tables = fake.tables.len();
        map_with(&mut fake, root, (VA + (2 << 20), 2 << 20, 2 << 20), Use::Data, 2 << 20).unwrap();
        assert_eq!((fake.tables.len(), fake.walk(root, VA + (3 << 20)).unwrap().0), (tables, 3 << 20));
    }

    #[test]
    fn blocks_are_no_larger_than_asked_for() {
        let (mut fake, root) = Fake::new(64);
        map_with(&mut fake, root, (VA + (1 << 30), 1 << 30, 2 << 30), Use::Data, 2 << 20).unwrap();
        assert_eq!(fake.tables.len(), 4);
        unmap(&fake, root, VA + (1 << 30) + (512 << 20), 2 << 20, |_| ()).unwrap();
    }

    #[test]
    fn odd_ranges_are_refused() {
        let (mut fake, root) = Fake::new(64);
        for (va, pa, len) in [
            (VA, 0, 0),
            (VA + 1, 0, 4096),
            (VA, 1, 4096),
            (VA, 0, 1),
            (u64::MAX - 4095, 0, 8192),
            (VA, u64::MAX - 4095, 8192),
        ] {
            assert!(
                matches!(map(&mut fake, root, va, pa, len, Use::Data), Err(MapError::NotPages { .. })),
                "{va:#x} {pa:#x} {len:#x}"
            );
        }
        assert_eq!(map(&mut fake, root, VA, 1 << 48, 4096, Use::Data), Err(MapError::OutOfReach(1 << 48)));
        // The last page of the address space is a page like any other.
        map(&mut fake, root, u64::MAX - 4095, 0, 4096, Use::Data).unwrap();
    }

    #[test]
    fn running_out_of_tables_is_an_error() {
        let (mut fake, root) = Fake::new(2);
        assert_eq!(map(&mut fake, root, VA, 0, 0x1000, Use::Data), Err(MapError::NoTables));
    }

    #[test]
    fn the_first_mapped_address_is_found() {
        let (mut fake, root) = Fake::new(64);
        assert_eq!(first_mapped(&fake, root, VA, 1 << 40), None);
        map(&mut fake, root, VA + 0x4020_1000, 0, 0x1000, Use::Data).unwrap();
        assert_eq!(first_mapped(&fake, root, VA + 0x1000, 1 << 32), Some(VA + 0x4020_1000));
        assert_eq!(first_mapped(&fake, root, VA, 0x4020_1000), None);
        assert_eq!(first_mapped(&fake, root, VA + 0x4020_2000, 1 << 32), None);
    }
}
