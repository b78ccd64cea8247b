//! The address space of a process: a list of regions, and the tables that say the same.
//!
//! # Layout
//!
//! The program lies in [`PROGRAM`], the stack ends at [`STACK_TOP`], and everything else goes to [`MAPS`], with a page between any
//! two. All of it is where the buses of common machines have neither doorbells nor windows, so that a device can use the same
//! addresses.
//!
//! # Invariants
//!
//! - Regions are sorted and do not overlap; each is mapped in the tables, as a whole, with its rights, and holds its extent.
//! - An extent leaves the list only after the tables have let go of it. Where they do not, it is kept for ever.

#![allow(unsafe_code)] // Maps extents, which it holds; see the invariants.

use crate::Error;
use crate::contract::{Extent, Kind, Tables};
use abi::{PAGE, READ, Rights, WRITE};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::ops::Range;
use iommu::{Iova, IovaRange, Prot};

/// Where programs may lie.
pub const PROGRAM: Range<u64> = 0x1_0000..0x600_0000;
/// The end of the stack with which a program starts.
pub const STACK_TOP: u64 = 0x700_0000;
/// Where the kernel puts what a process asks for.
pub const MAPS: Range<u64> = 0x200_0000_0000..0x300_0000_0000;

/// One mapping.
struct Region {
    range: IovaRange,
    prot: Prot,
    extent: Arc<dyn Extent>,
    /// How often a device has some of it.
    lent: u32,
    /// The handle that it belongs to, and goes with.
    owner: Option<u64>,
}

/// The address space of a process.
pub struct Space {
    regions: Vec<Region>,
    tables: Arc<dyn Tables>,
    /// Addresses that a device which walks the same tables does not have as memory.
    reserved: Vec<IovaRange>,
    /// Pages of memory in regions.
    pages: u64,
    pages_max: u64,
    regions_max: usize,
}

/// Whole pages from `address` on.
pub(crate) fn pages(address: u64, len: u64) -> Result<IovaRange, Error> {
    if !address.is_multiple_of(PAGE) {
        return Err(Error::Misaligned(address));
    }
    if len == 0 || !len.is_multiple_of(PAGE) {
        return Err(Error::BadLength(len));
    }
    IovaRange::new(Iova::new(address), len).ok_or(Error::BadLength(len))
}

/// What `rights` are in the tables.
pub(crate) fn prot(rights: Rights) -> Result<Prot, Error> {
    match rights {
        READ => Ok(Prot::READ),
        // A stage 1 cannot deny reading.
        rights if rights == READ | WRITE => Ok(Prot::READ | Prot::WRITE),
        _ => Err(Error::BadRights(rights)),
    }
}

impl Space {
    /// Makes an address space of `tables`, in which nothing is mapped.
    pub fn new(tables: Arc<dyn Tables>, pages_max: u64, regions_max: usize) -> Self {
        Self { regions: Vec::new(), tables, reserved: Vec::new(), pages: 0, pages_max, regions_max }
    }

    /// The tables.
    pub fn tables(&self) -> &Arc<dyn Tables> {
        &self.tables
    }

    /// Pages of memory that are mapped.
    pub fn mapped_pages(&self) -> u64 {
        self.pages
    }

    /// Says that `bytes` more of memory may be mapped.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`].
    pub fn afford(&self, bytes: u64) -> Result<(), Error> {
        if self.regions.len() >= self.regions_max {
            return Err(Error::Quota("regions"));
        }
        if bytes / PAGE > self.pages_max.saturating_sub(self.pages) {
            return Err(Error::Quota("pages"));
        }
        Ok(())
    }

    /// Maps all of `extent` wherever there is room.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`], [`Error::OutOfReach`] where there is no room, [`Error::Map`].
    pub fn map(&mut self, extent: Arc<dyn Extent>, prot: Prot, owner: Option<u64>) -> Result<u64, Error> {
        let len = extent.len();
        let start = self.room(len).ok_or(Error::OutOfReach(IovaRange::default()))?;
        let range = pages(start, len)?;
        self.map_at(range, extent, prot, owner)?;
        Ok(start)
    }

    /// Maps all of `extent` at `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`], [`Error::Map`]; [`Error::Overlap`] and [`Error::Reserved`] where the range is not
    /// free; [`Error::BadRights`] for what the extent does not allow.
    pub fn map_at(
        &mut self,
        range: IovaRange,
        extent: Arc<dyn Extent>,
        prot: Prot,
        owner: Option<u64>,
    ) -> Result<(), Error> {
        if extent.len() != range.len() || !range.is_aligned(PAGE) || range.is_empty() {
            return Err(Error::BadLength(range.len()));
        }
        if prot.contains(Prot::WRITE) && !extent.writable() {
            return Err(Error::BadRights(WRITE));
        }
        let charge = if extent.kind() == Kind::Memory { range.len() } else { 0 };
        self.afford(charge)?;
        let index = self.regions.partition_point(|region| region.range.start() < range.start());
        let near = self.regions.get(index.saturating_sub(1)..).unwrap_or_default().iter().take(2);
        if near.into_iter().any(|region| region.range.overlaps(range)) {
            return Err(Error::Overlap(range));
        }
        if let Some(taken) = self.reserved.iter().find(|reserved| reserved.overlaps(range)) {
            return Err(Error::Reserved(*taken));
        }
        self.regions.try_reserve(1)?;
        let attributes = match extent.kind() {
            Kind::Memory => Prot::empty(),
            Kind::Uncached => Prot::NON_COHERENT,
            Kind::Registers => Prot::MMIO,
        };
        // SAFETY: the region holds the extent until the tables have let go of the range (invariant); it overlaps no other, and
        // this object, exclusively borrowed, is the only one that maps in these tables.
        unsafe { self.tables.map(range, extent.runs(), prot | attributes) }?;
        self.pages += charge / PAGE;
        self.regions.insert(index, Region { range, prot, extent, lent: 0, owner });
        Ok(())
    }

    /// Takes a mapping away, which has to be exactly `range`.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`]; [`Error::Busy`] while some of it is lent; [`Error::Revoke`] where the tables do not let go of it:
    /// then it is gone for the process, and the memory is never used again.
    pub fn unmap(&mut self, range: IovaRange) -> Result<(), Error> {
        let index = self.index(range.start().get()).ok_or(Error::NotMapped(range))?;
        let region = self.regions.get(index).filter(|region| region.range == range).ok_or(Error::NotMapped(range))?;
        if region.lent != 0 {
            return Err(Error::Busy);
        }
        self.remove(index)
    }

    fn remove(&mut self, index: usize) -> Result<(), Error> {
        let region = self.regions.remove(index);
        if region.extent.kind() == Kind::Memory {
            self.pages = self.pages.saturating_sub(region.range.len() / PAGE);
        }
        if let Err(error) = self.tables.unmap(region.range) {
            log::error!("{} is lost: {error}", region.range);
            mem::forget(region);
            // The tables may still be walked there.
            mem::forget(self.tables.clone());
            return Err(Error::Revoke(error));
        }
        Ok(())
    }

    /// Takes away what belongs to the handle `owner`.
    pub fn remove_owned(&mut self, owner: u64) {
        while let Some(index) = self.regions.iter().position(|region| region.owner == Some(owner)) {
            // It is logged, and gone either way.
            let _ = self.remove(index);
        }
    }

    /// Keeps mappings out of `ranges`, in addition to what is kept out already.
    ///
    /// # Errors
    ///
    /// [`Error::Overlap`] where something is; [`Error::OutOfMemory`].
    pub fn reserve(&mut self, ranges: &[IovaRange]) -> Result<(), Error> {
        for range in ranges {
            if self.regions.iter().any(|region| region.range.overlaps(*range)) {
                return Err(Error::Overlap(*range));
            }
        }
        self.reserved.try_reserve(ranges.len())?;
        for range in ranges {
            if !self.reserved.iter().any(|known| known.covers(*range)) {
                self.reserved.push(*range);
            }
        }
        Ok(())
    }

    /// The region in which `address` lies.
    fn index(&self, address: u64) -> Option<usize> {
        let after = self.regions.partition_point(|region| region.range.start().get() <= address);
        let index = after.checked_sub(1)?;
        self.regions.get(index)?.range.contains(Iova::new(address)).then_some(index)
    }

    /// The first place for `len` bytes, with a free page on either side.
    fn room(&self, len: u64) -> Option<u64> {
        let mut at = MAPS.start;
        loop {
            let end = at.checked_add(len)?.checked_add(PAGE)?;
            if end > MAPS.end {
                return None;
            }
            let wanted = IovaRange::new(Iova::new(at), len + PAGE)?;
            let taken = self.regions.iter().map(|region| region.range).chain(self.reserved.iter().copied());
            match taken.filter(|range| range.overlaps(wanted)).map(|range| range.end().get()).max() {
                Some(end) => at = end.checked_next_multiple_of(PAGE)?.checked_add(PAGE)?,
                None => return Some(at),
            }
        }
    }

    /// Calls `f` with each piece of the `len` bytes at `address`, after all of them were found to be mapped with `need`.
    fn each(
        &self,
        address: u64,
        len: u64,
        need: Prot,
        mut f: impl FnMut(&dyn Extent, u64, Range<usize>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let bad = || Error::BadAddress { address, len };
        let end = address.checked_add(len).ok_or_else(bad)?;
        for act in [false, true] {
            let mut at = address;
            while at < end {
                let region = self.index(at).and_then(|index| self.regions.get(index)).ok_or_else(bad)?;
                if !region.prot.contains(need) || region.extent.kind() == Kind::Registers {
                    return Err(bad());
                }
                let until = region.range.end().get().min(end);
                if act {
                    let done = (at - address) as usize;
                    f(&*region.extent, at - region.range.start().get(), done..done + (until - at) as usize)?;
                }
                at = until;
            }
        }
        Ok(())
    }

    /// Copies what the process has at `address` to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`] unless all of it is memory that the process may read; nothing was copied then.
    pub fn copy_in(&self, address: u64, to: &mut [u8]) -> Result<(), Error> {
        self.each(address, to.len() as u64, Prot::READ, |extent, offset, part| {
            extent.read(offset, to.get_mut(part).unwrap_or_default())
        })
    }

    /// Copies `from` to what the process has at `address`.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`] unless all of it is memory that the process may write; nothing was copied then.
    pub fn copy_out(&self, address: u64, from: &[u8]) -> Result<(), Error> {
        self.each(address, from.len() as u64, Prot::WRITE, |extent, offset, part| {
            extent.write(offset, from.get(part).unwrap_or_default())
        })
    }

    /// Lends `range`, which lies in one region of memory that the process has with `need`: counts the loan, and hands out the
    /// pages.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`], [`Error::OutOfMemory`].
    pub(crate) fn lend(&mut self, range: IovaRange, need: Prot) -> Result<dma::OpenPages, Error> {
        let bad = || Error::BadAddress { address: range.start().get(), len: range.len() };
        let index = self.index(range.start().get()).ok_or_else(bad)?;
        let region = self.regions.get_mut(index).ok_or_else(bad)?;
        if !region.range.covers(range) || !region.prot.contains(need) {
            return Err(bad());
        }
        let pages = region.extent.pages().ok_or_else(bad)?;
        let pages = pages.part(range.start().get() - region.range.start().get(), range.len())?;
        region.lent = region.lent.checked_add(1).ok_or(Error::Quota("loans"))?;
        Ok(pages)
    }

    /// Ends the count of a loan that began at `address`.
    pub(crate) fn lent_back(&mut self, address: u64) {
        if let Some(region) = self.index(address).and_then(|index| self.regions.get_mut(index)) {
            region.lent = region.lent.saturating_sub(1);
        }
    }

    /// All mappings: where, and with which rights.
    pub fn mappings(&self) -> impl Iterator<Item = (IovaRange, Prot)> {
        self.regions.iter().map(|region| (region.range, region.prot))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        while !self.regions.is_empty() {
            // It is logged; the extent stays for ever.
            let _ = self.remove(self.regions.len() - 1);
        }
    }
}
