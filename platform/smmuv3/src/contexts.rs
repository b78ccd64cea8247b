//! Tables of context descriptors, for streams with substreams (IHI 0070, 3.3.2 and 5.3).
//!
//! A stream without substreams needs no table: its STE points at the one CD of its address space. With substreams it has a
//! table of its own, in which the CDs of its spaces are copied by SubstreamID: linear, or of two levels where the SMMU has
//! them, with second levels that are made when first needed. SubstreamID 0 stands for the transactions without one.
//!
//! # Invariants
//!
//! - A CD that is not valid in the table belongs to no space; one that is, belongs to a space that [`Contexts`] holds.
//! - A second level is full of invalid CDs before it is linked, and is never unlinked.
//! - A table is freed only when no STE has pointed at it since an invalidation of the STE completed, which is one of all CDs
//!   found through it too.

use crate::bugs::{Bug, seeded};
use crate::descriptors::ste_stage1;
use crate::entry::Entry;
use crate::features::Features;
use crate::spec::{cd, ste};
use crate::strtab::Slot;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Release;
use iommu::OutOfMemory;
use iommu::contract::{AddressSpace, TableBlock, TableMemory};
use spin::Once;

/// SubstreamID bits that a second level of 4 KiB resolves.
const SPLIT_4K: u8 = 6;
/// SubstreamID bits that a second level of 64 KiB resolves.
const SPLIT_64K: u8 = 10;
/// The most SubstreamID bits with second levels of 4 KiB: a first level of 8 KiB.
const SMALL_MAX: u8 = 16;
/// The most SubstreamID bits of a linear table: 64 KiB.
const LINEAR_MAX: u8 = 10;

/// A table with a place for every SubstreamID.
pub(crate) struct ContextTable {
    memory: &'static dyn TableMemory,
    bits: u8,
    layout: Layout,
}

enum Layout {
    Linear(TableBlock),
    TwoLevel { split: u8, first: TableBlock, second: Box<[Once<TableBlock>]> },
}

impl ContextTable {
    /// Makes a table without a valid CD, for as many SubstreamIDs as the SMMU has, at most 2^`bits`.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new(features: &Features, bits: u8, memory: &'static dyn TableMemory) -> Result<Self, OutOfMemory> {
        let bits = bits.min(features.substream_id_bits);
        if !features.two_level_cd || bits <= SPLIT_4K {
            let bits = bits.min(LINEAR_MAX);
            return Ok(Self { memory, bits, layout: Layout::Linear(memory.allocate(cd::SIZE << bits)?) });
        }
        let split = if bits <= SMALL_MAX { SPLIT_4K } else { SPLIT_64K };
        let entries = 1_usize << (bits - split);
        let mut second = Vec::new();
        second.try_reserve_exact(entries).map_err(|_| OutOfMemory)?;
        second.resize_with(entries, Once::new);
        let first = memory.allocate((entries * 8).max(64))?;
        Ok(Self { memory, bits, layout: Layout::TwoLevel { split, first, second: second.into_boxed_slice() } })
    }

    /// Whether the table has a place for `ssid`.
    pub fn has(&self, ssid: u32) -> bool {
        u64::from(ssid) >> self.bits == 0
    }

    /// The STE of stage 1 through this table, with `dss` for what becomes of transactions without SubstreamID.
    pub fn ste(&self, dss: u64, features: &Features) -> Entry {
        let (phys, format) = match &self.layout {
            Layout::Linear(table) => (table.phys(), ste::S1FMT_LINEAR),
            Layout::TwoLevel { split: SPLIT_4K, first, .. } => (first.phys(), ste::S1FMT_4K),
            Layout::TwoLevel { first, .. } => (first.phys(), ste::S1FMT_64K),
        };
        let mut entry = ste_stage1(phys.get(), features.coherent);
        entry[0] |= ste::S1FMT.put(format) | ste::S1CDMAX.put(u64::from(self.bits));
        entry[1] = ste::S1DSS.set(entry[1], dss);
        if dss == ste::S1DSS_BYPASS && features.attr_types_ovr {
            entry[1] |= ste::SHCFG.put(ste::SHCFG_INCOMING);
        }
        entry
    }

    /// The CD of `ssid`; makes and links the second level if there is none. `None` for a SubstreamID beyond the table. The link
    /// is visible to the SMMU on return, but it may have cached that there was none.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn slot(&self, ssid: u32) -> Result<Option<Slot<'_>>, OutOfMemory> {
        if !self.has(ssid) {
            return Ok(None);
        }
        let ssid = ssid as usize;
        match &self.layout {
            Layout::Linear(block) => Ok(Some(Slot::new(block, ssid * cd::WORDS))),
            Layout::TwoLevel { split, first, second } => {
                let index = ssid >> split;
                let Some(place) = second.get(index) else { return Ok(None) };
                let block = match place.get() {
                    Some(block) => block,
                    None => self.link(first, index, place, *split)?,
                };
                Ok(Some(Slot::new(block, (ssid & ((1 << split) - 1)) * cd::WORDS)))
            }
        }
    }

    fn link<'a>(
        &self,
        first: &TableBlock,
        index: usize,
        place: &'a Once<TableBlock>,
        split: u8,
    ) -> Result<&'a TableBlock, OutOfMemory> {
        let fresh = self.memory.allocate(cd::SIZE << split)?;
        // Only one core at a time changes a stream, so nobody is ever waited for here.
        Ok(place.call_once(|| {
            if let Some(cell) = first.get(index) {
                cell.store(cd::L1CD_L2PTR.address(fresh.phys().get()) | cd::L1CD_V.mask(), Release);
            }
            if !seeded(Bug::L1CdNotPublished) {
                first.publish(index, index + 1);
            }
            fresh
        }))
    }
}

/// What becomes of transactions without SubstreamID (STE.S1DSS).
#[derive(Clone)]
pub(crate) enum Unnumbered {
    /// They are aborted.
    Terminated,
    /// They pass untranslated, as the stream did before it had substreams.
    Bypassing,
    /// They are translated, by CD 0.
    Translated(Arc<dyn AddressSpace>),
}

/// A stream with substreams: the table, and who is in it.
#[derive(Clone)]
pub(crate) struct Contexts {
    pub table: Arc<ContextTable>,
    pub unnumbered: Unnumbered,
    /// By SubstreamID, in no order.
    pub numbered: Vec<(u32, Arc<dyn AddressSpace>)>,
}

impl Contexts {
    /// A copy in which `extra` more substreams have room.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn copy(&self, extra: usize) -> Result<Self, OutOfMemory> {
        let mut numbered = Vec::new();
        numbered.try_reserve_exact(self.numbered.len() + extra).map_err(|_| OutOfMemory)?;
        numbered.extend(self.numbered.iter().cloned());
        Ok(Self { table: Arc::clone(&self.table), unnumbered: self.unnumbered.clone(), numbered })
    }

    /// All spaces with their SubstreamIDs, 0 being that of transactions without one.
    pub fn all(&self) -> impl Iterator<Item = (u32, &Arc<dyn AddressSpace>)> {
        let default = match &self.unnumbered {
            Unnumbered::Translated(space) => Some((0, space)),
            _ => None,
        };
        default.into_iter().chain(self.numbered.iter().map(|(ssid, space)| (*ssid, space)))
    }

    /// Who is attached to `ssid`.
    pub fn get(&self, ssid: u32) -> Option<&Arc<dyn AddressSpace>> {
        self.all().find(|(number, _)| *number == ssid).map(|(_, space)| space)
    }

    /// The encoding of STE.S1DSS.
    pub fn dss(&self) -> u64 {
        match self.unnumbered {
            Unnumbered::Terminated => ste::S1DSS_TERMINATE,
            Unnumbered::Bypassing => ste::S1DSS_BYPASS,
            Unnumbered::Translated(_) => ste::S1DSS_SSID0,
        }
    }
}
