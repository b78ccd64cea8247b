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
//! - Regions are sorted and do not overlap; each is mapped in the tables, as a whole, with its rights, and holds its extent; or nothing
//!   is mapped there, and the addresses are set aside.
//! - An extent leaves the list only after the tables have let go of it. Where they do not, it is kept for ever, and its addresses
//!   are not used again.

#![allow(unsafe_code)] // Maps extents, which it holds; see the invariants.

use crate::Error;
use crate::contract::{Extent, Kind, Tables};
use abi::{PAGE, READ, Rights, WRITE};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::ops::Range;
use iommu::pgtable::Leaves;
use iommu::{Iova, IovaRange, Prot};

/// Where programs may lie.
pub const PROGRAM: Range<u64> = 0x1_0000..0x600_0000;
/// The end of the stack with which a program starts.
pub const STACK_TOP: u64 = 0x700_0000;
/// Where the kernel puts what a process asks for.
pub const MAPS: Range<u64> = 0x200_0000_0000..0x300_0000_0000;

/// Whose a mapping is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Memory of the process's own.
    Own,
    /// It belongs to what this handle names, and goes with it.
    Handle(u64),
    /// Others have it too.
    Others,
}

/// What is mapped in a region.
enum Content {
    Mapped(Prot, Arc<dyn Extent>),
    /// The addresses are set aside.
    Nothing,
    /// The tables have not let go of what it was.
    Lost,
}

/// Some addresses, and what is there.
struct Region {
    range: IovaRange,
    content: Content,
    whose: Whose,
    /// What is there comes and goes, the addresses stay.
    set_aside: bool,
    /// How often a device has some of it.
    lent: u32,
}

impl Region {
    /// What is mapped there.
    fn mapped(&self) -> Option<(Prot, &Arc<dyn Extent>)> {
        match &self.content {
            Content::Mapped(prot, extent) => Some((*prot, extent)),
            Content::Nothing | Content::Lost => None,
        }
    }

    /// Bytes that count as memory of the process's, and as addresses for what others have too.
    fn charges(&self) -> (u64, u64) {
        match self.whose {
            Whose::Own => (self.range.len(), 0),
            Whose::Handle(_) if !self.set_aside => (0, 0),
            Whose::Handle(_) | Whose::Others => (0, self.range.len()),
        }
    }
}

/// The address space of a process.
pub struct Space {
    regions: Vec<Region>,
    tables: Arc<dyn Tables>,
    /// Addresses that a device which walks the same tables does not have as memory.
    reserved: Vec<IovaRange>,
    /// Pages of the process's own memory.
    pages: u64,
    pages_max: u64,
    regions_max: usize,
    /// Bytes of addresses for what others have too.
    shared: u64,
    shared_max: u64,
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
    /// Makes an address space of `tables`, in which nothing is mapped: for so many pages of memory, regions, and bytes of addresses for
    /// what others have too.
    pub fn new(tables: Arc<dyn Tables>, pages_max: u64, regions_max: usize, shared_max: u64) -> Self {
        let (regions, reserved) = (Vec::new(), Vec::new());
        Self { regions, tables, reserved, pages: 0, pages_max, regions_max, shared: 0, shared_max }
    }

    /// The tables.
    pub fn tables(&self) -> &Arc<dyn Tables> {
        &self.tables
    }

    /// Pages of the process's own memory that are mapped.
    pub fn mapped_pages(&self) -> u64 {
        self.pages
    }

    /// Says that `bytes` more of the process's own memory may be mapped.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`].
    pub fn afford(&self, bytes: u64) -> Result<(), Error> {
        self.afford_both(bytes, 0)
    }

    fn afford_both(&self, own: u64, shared: u64) -> Result<(), Error> {
        if self.regions.len() >= self.regions_max {
            return Err(Error::Quota("regions"));
        }
        if own / PAGE > self.pages_max.saturating_sub(self.pages) {
            return Err(Error::Quota("pages"));
        }
        if shared > self.shared_max.saturating_sub(self.shared) {
            return Err(Error::Quota("bytes of addresses"));
        }
        Ok(())
    }

    /// Maps all of `extent` wherever there is room.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`], [`Error::OutOfReach`] where there is no room, [`Error::Map`].
    pub fn map(&mut self, extent: Arc<dyn Extent>, prot: Prot, whose: Whose) -> Result<u64, Error> {
        let len = extent.len();
        let start = self.room(len, PAGE).ok_or(Error::OutOfReach(IovaRange::default()))?;
        self.map_at(pages(start, len)?, extent, prot, whose)?;
        Ok(start)
    }

    /// Maps all of `extent` at `range`.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`], [`Error::OutOfMemory`], [`Error::Map`]; [`Error::Overlap`] and [`Error::Reserved`] where the range is not
    /// free; [`Error::BadRights`] for what the extent does not allow.
    pub fn map_at(&mut self, range: IovaRange, extent: Arc<dyn Extent>, prot: Prot, whose: Whose) -> Result<(), Error> {
        let region = Region { range, content: Content::Nothing, whose, set_aside: false, lent: 0 };
        let index = self.place(&region)?;
        let content = self.show(range, extent, prot)?;
        self.insert(index, Region { content, ..region });
        Ok(())
    }

    /// Sets `len` bytes of addresses aside for what `handle` names, a multiple of `alignment`: nothing is there until [`Space::fill`].
    ///
    /// # Errors
    ///
    /// As [`Space::map`].
    pub(crate) fn set_aside(&mut self, len: u64, alignment: u64, handle: u64) -> Result<u64, Error> {
        let start = self.room(len, alignment).ok_or(Error::OutOfReach(IovaRange::default()))?;
        let (range, whose) = (pages(start, len)?, Whose::Handle(handle));
        let region = Region { range, content: Content::Nothing, whose, set_aside: true, lent: 0 };
        let index = self.place(&region)?;
        self.insert(index, region);
        Ok(start)
    }

    /// Whether something is, or may still be, mapped at a range that was set aside.
    pub(crate) fn is_filled(&self, range: IovaRange) -> bool {
        let region = self.set_aside_at(range).and_then(|index| self.regions.get(index));
        region.is_none_or(|region| !matches!(region.content, Content::Nothing))
    }

    /// Maps all of `extent` at a range that was set aside, and empty.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`] for another range; [`Error::Busy`] where something is there; [`Error::BadRights`] for what the extent does
    /// not allow; [`Error::BadLength`] for one of another size; [`Error::Map`].
    pub(crate) fn fill(&mut self, range: IovaRange, extent: Arc<dyn Extent>, prot: Prot) -> Result<(), Error> {
        let index = self.set_aside_at(range).ok_or(Error::NotMapped(range))?;
        if self.is_filled(range) {
            return Err(Error::Busy);
        }
        let content = self.show(range, extent, prot)?;
        if let Some(region) = self.regions.get_mut(index) {
            region.content = content;
        }
        Ok(())
    }

    /// Takes away what is mapped at a range that was set aside; the extent is dropped when nobody reaches it any more.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`] where nothing is; [`Error::Revoke`] where the tables do not let go of it: then it is gone for the process, and
    /// neither memory nor addresses are used again.
    pub(crate) fn empty(&mut self, range: IovaRange) -> Result<(), Error> {
        let index = self.set_aside_at(range).ok_or(Error::NotMapped(range))?;
        if self.regions.get(index).is_none_or(|region| region.mapped().is_none()) {
            return Err(Error::NotMapped(range));
        }
        self.clear(index)
    }

    fn set_aside_at(&self, range: IovaRange) -> Option<usize> {
        let index = self.index(range.start().get())?;
        self.regions.get(index).is_some_and(|region| region.set_aside && region.range == range).then_some(index)
    }

    /// Where in the list a new region goes, for which there is room afterwards.
    fn place(&mut self, new: &Region) -> Result<usize, Error> {
        let range = new.range;
        if !range.is_aligned(PAGE) || range.is_empty() {
            return Err(Error::BadLength(range.len()));
        }
        let (own, shared) = new.charges();
        self.afford_both(own, shared)?;
        let index = self.regions.partition_point(|region| region.range.start() < range.start());
        let near = self.regions.get(index.saturating_sub(1)..).unwrap_or_default().iter().take(2);
        if near.into_iter().any(|region| region.range.overlaps(range)) {
            return Err(Error::Overlap(range));
        }
        if let Some(taken) = self.reserved.iter().find(|reserved| reserved.overlaps(range)) {
            return Err(Error::Reserved(*taken));
        }
        self.regions.try_reserve(1)?;
        Ok(index)
    }

    fn insert(&mut self, index: usize, region: Region) {
        let (own, shared) = region.charges();
        (self.pages, self.shared) = (self.pages + own / PAGE, self.shared + shared);
        self.regions.insert(index, region);
    }

    /// Enters `extent` in the tables: what is returned is the content of a region of this range.
    fn show(&mut self, range: IovaRange, extent: Arc<dyn Extent>, prot: Prot) -> Result<Content, Error> {
        if extent.len() != range.len() {
            return Err(Error::BadLength(extent.len()));
        }
        if prot.contains(Prot::WRITE) && !extent.writable() {
            return Err(Error::BadRights(WRITE));
        }
        let attributes = match extent.kind() {
            Kind::Memory => Prot::empty(),
            Kind::Uncached => Prot::NON_COHERENT,
            Kind::Registers => Prot::MMIO,
        };
        // SAFETY: the region holds the extent until the tables have let go of the range (invariant); it overlaps no other, and
        // this object, exclusively borrowed, is the only one that maps in these tables.
        unsafe { self.tables.map(range, extent.runs(), prot | attributes) }?;
        Ok(Content::Mapped(prot, extent))
    }

    /// Takes a mapping away, which has to be exactly `range`, and not of a range that was set aside.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`]; [`Error::Busy`] while some of it is lent; [`Error::Revoke`] where the tables do not let go of it:
    /// then it is gone for the process, and neither memory nor addresses are used again.
    pub fn unmap(&mut self, range: IovaRange) -> Result<(), Error> {
        let index = self.index(range.start().get()).ok_or(Error::NotMapped(range))?;
        let fits = |region: &&Region| region.range == range && !region.set_aside && region.mapped().is_some();
        let region = self.regions.get(index).filter(fits).ok_or(Error::NotMapped(range))?;
        if region.lent != 0 {
            return Err(Error::Busy);
        }
        self.remove(index)
    }

    /// Takes a region out of the list, with what is there. One that is lost stays, and is nobody's.
    fn remove(&mut self, index: usize) -> Result<(), Error> {
        self.clear(index)?;
        let region = self.regions.remove(index);
        let (own, shared) = region.charges();
        (self.pages, self.shared) = (self.pages.saturating_sub(own / PAGE), self.shared.saturating_sub(shared));
        Ok(())
    }

    /// Has the tables let go of what is mapped in a region, and then lets go of it.
    fn clear(&mut self, index: usize) -> Result<(), Error> {
        let Some(region) = self.regions.get_mut(index) else { return Ok(()) };
        if region.mapped().is_none() {
            return Ok(());
        }
        match self.tables.unmap(region.range) {
            Ok(()) => {
                region.content = Content::Nothing;
                Ok(())
            }
            Err(error) => {
                log::error!("{} is lost: {error}", region.range);
                mem::forget(mem::replace(&mut region.content, Content::Lost));
                // The tables may still be walked there.
                mem::forget(self.tables.clone());
                Err(Error::Revoke(error))
            }
        }
    }

    /// Takes away what belongs to `handle`.
    ///
    /// # Errors
    ///
    /// [`Error::Revoke`] where the tables do not let go of some of it.
    pub(crate) fn remove_owned(&mut self, handle: u64) -> Result<(), Error> {
        let mut result = Ok(());
        let owned = |region: &Region| region.whose == Whose::Handle(handle) && !matches!(region.content, Content::Lost);
        while let Some(index) = self.regions.iter().position(owned) {
            result = result.and(self.remove(index));
        }
        result
    }

    /// The leaves of the tables that map what `address` lies in; `None` where nothing is, or nobody can tell.
    pub fn leaves(&self, address: u64) -> Option<Leaves> {
        let region = self.regions.get(self.index(address)?).filter(|region| region.mapped().is_some())?;
        self.tables.leaves(region.range)
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

    /// The first place for `len` bytes at a multiple of `alignment`, with a free page on either side.
    fn room(&self, len: u64, alignment: u64) -> Option<u64> {
        let mut at = MAPS.start.checked_next_multiple_of(alignment)?;
        loop {
            let end = at.checked_add(len)?.checked_add(PAGE)?;
            if end > MAPS.end {
                return None;
            }
            let wanted = IovaRange::new(Iova::new(at), len + PAGE)?;
            let taken = self.regions.iter().map(|region| region.range).chain(self.reserved.iter().copied());
            match taken.filter(|range| range.overlaps(wanted)).map(|range| range.end().get()).max() {
                Some(end) => {
                    let after = end.checked_next_multiple_of(PAGE)?.checked_add(PAGE)?;
                    at = after.checked_next_multiple_of(alignment)?;
                }
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
                let (prot, extent) = region.mapped().ok_or_else(bad)?;
                if !prot.contains(need) || extent.kind() == Kind::Registers {
                    return Err(bad());
                }
                let until = region.range.end().get().min(end);
                if act {
                    let done = (at - address) as usize;
                    f(&**extent, at - region.range.start().get(), done..done + (until - at) as usize)?;
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

    /// Lends `range`, which lies in one region of the process's own memory that it has with `need`: counts the loan, and hands out the
    /// pages.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`], [`Error::OutOfMemory`].
    pub(crate) fn lend(&mut self, range: IovaRange, need: Prot) -> Result<dma::OpenPages, Error> {
        let bad = || Error::BadAddress { address: range.start().get(), len: range.len() };
        let index = self.index(range.start().get()).ok_or_else(bad)?;
        let region = self.regions.get_mut(index).ok_or_else(bad)?;
        let (prot, extent) = region.mapped().ok_or_else(bad)?;
        if !region.range.covers(range) || !prot.contains(need) || region.whose != Whose::Own {
            return Err(bad());
        }
        let pages = extent.pages().ok_or_else(bad)?;
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
        self.regions.iter().filter_map(|region| Some((region.range, region.mapped()?.0)))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        for index in (0..self.regions.len()).rev() {
            // What stays is logged, and stays for ever.
            let _ = self.clear(index);
        }
    }
}
