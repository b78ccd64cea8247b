//! Device address spaces: a translation table with an ASID (or a VMID), and the contract of revocation.
//!
//! Stage 1 where the SMMU has it: a context descriptor of its own for each space, shared by all streams attached to it, never
//! changed while the space lives. Stage 2 alone where that is all there is.
//!
//! # How revocation keeps the contract
//!
//! [`AddressSpace::revoke`] clears the leaves and publishes that ([`PageTable::unmap`]), issues TLB invalidations that cover
//! every range in full, tagged with this space's identifier, and returns `Ok` only when a CMD_SYNC behind them has been
//! consumed and none of them was refused. By 3.21.1 of the architecture no transaction that used the old translations is then
//! still under way, whichever stream sent it.
//!
//! - A range is invalidated even where nothing was mapped: an earlier revocation may have cleared the leaves and failed, or
//!   another core may have cleared them and not yet got as far as invalidating.
//! - After a failed revocation the next one invalidates the whole space: level hints that fit today's leaves need not fit what
//!   the TLB still holds.
//! - Tables are freed, and the identifier is, only after an invalidation of everything tagged with it. If that fails they
//!   are kept for ever.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`, as argued above.

use crate::Error;
use crate::bugs::{self, Bug, seeded};
use crate::cmdq::Batch;
use crate::descriptors::{CdFields, cd as context_descriptor, ste_stage1, ste_stage2};
use crate::entry::Entry;
use crate::registers::Registers;
use crate::smmu::Shared;
use crate::spec::cd;
use crate::spec::command::{Command, TlbiRange};
use crate::tlbi::Split;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use iommu::contract::{AddressSpace, Aperture, TableBlock};
use iommu::pgtable::{Geometry, Granule, MAIR, PageTable, Stage, Unmapped};
use iommu::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError};

/// Commands by address of one revocation beyond which everything of the space is invalidated instead. Walking a whole space
/// anew costs less than so many commands.
const COMMANDS_MAX: u64 = 128;

/// What the TLB entries of a space are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    Asid(u16),
    Vmid(u16),
}

impl Tag {
    const fn vmid(self) -> u16 {
        match self {
            Self::Asid(_) => 0,
            Self::Vmid(vmid) => vmid,
        }
    }

    fn invalidate_all(self) -> Command {
        match self {
            Self::Asid(asid) => Command::TlbiNhAsid { vmid: 0, asid },
            Self::Vmid(vmid) => Command::TlbiS12Vmall { vmid },
        }
    }

    fn invalidate(self, addr: u64, range: TlbiRange) -> Command {
        // No table is ever freed under a living space, so leaf entries suffice.
        match self {
            Self::Asid(asid) => {
                let asid = asid ^ u16::from(seeded(Bug::WrongAsid));
                Command::TlbiNhVa { vmid: 0, asid, addr, range: bugs::hinted(range), leaf: true }
            }
            Self::Vmid(vmid) => {
                let vmid = vmid ^ u16::from(seeded(Bug::WrongVmid));
                Command::TlbiS2Ipa { vmid, addr, range: bugs::hinted(range), leaf: true }
            }
        }
    }
}

/// What the SMMU walks: kept together so that it is freed together, or kept together for ever.
struct Walked {
    table: PageTable,
    /// The context descriptor, for stage 1.
    context: Option<TableBlock>,
}

/// One device address space of one SMMU.
pub(crate) struct Space<R: Registers> {
    shared: Arc<Shared<R>>,
    tag: Tag,
    walked: Arc<Walked>,
    /// Revocations that failed.
    failures: AtomicU64,
    /// Of those, how many were followed by a complete invalidation.
    healed: AtomicU64,
}

impl<R: Registers> Space<R> {
    /// Makes an address space in which nothing is mapped.
    ///
    /// # Errors
    ///
    /// [`AttachError::NoIdentifier`], [`AttachError::OutOfMemory`], [`AttachError::Unsupported`] for a shape that the tables do
    /// not have.
    pub fn new(shared: Arc<Shared<R>>) -> Result<Self, AttachError> {
        let features = &shared.features;
        let stage = if features.stage1 { Stage::One } else { Stage::Two };
        let output = features.output_bits;
        let input = shared.config.input_bits.min(features.input_bits);
        let input = if stage == Stage::Two { input.min(output) } else { input };
        let geometry = Geometry::new(shared.granule, stage, input, output)
            .map_err(|_| AttachError::Unsupported("translation tables of this size"))?;
        let table = PageTable::new(geometry, shared.memory)?;
        let (tag, context) = match stage {
            Stage::One => {
                let context = shared.memory.allocate(cd::SIZE)?;
                (Tag::Asid(shared.asids.allocate().ok_or(AttachError::NoIdentifier)?), Some(context))
            }
            Stage::Two => (Tag::Vmid(shared.vmids.allocate().ok_or(AttachError::NoIdentifier)?), None),
        };
        if let (Tag::Asid(asid), Some(context)) = (tag, &context) {
            let words = context_descriptor(&CdFields {
                asid,
                ttb0: table.root().get(),
                t0sz: geometry.tsz(),
                tg0: tg0(geometry.granule()),
                ips: features.ips(output),
                mair: if seeded(Bug::MairWrong) { MAIR.rotate_left(8) } else { MAIR },
                coherent: features.coherent,
            });
            for (cell, word) in context.iter().zip(words) {
                cell.store(word, Ordering::Relaxed);
            }
            if !seeded(Bug::CdNotPublished) {
                context.publish(0, cd::WORDS);
            }
        }
        let walked = Arc::new(Walked { table, context });
        Ok(Self { shared, tag, walked, failures: AtomicU64::new(0), healed: AtomicU64::new(0) })
    }

    /// The STE of a stream that is attached to this space.
    pub fn ste(&self) -> Entry {
        let features = &self.shared.features;
        let Walked { table, context } = &*self.walked;
        match context {
            Some(context) => ste_stage1(context.phys().get(), features.coherent),
            None => ste_stage2(self.tag.vmid(), table.geometry(), table.root().get(), features),
        }
    }

    /// Whether the space belongs to `shared`.
    pub fn is_of(&self, shared: &Arc<Shared<R>>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    /// Adds the invalidations for one unmapped range to `batch`. `Ok(false)` if they are more than `budget`, of which is taken
    /// what they cost; then everything must be invalidated instead.
    fn invalidate(&self, batch: &mut Batch<'_, R>, unmapped: &Unmapped, budget: &mut u64) -> Result<bool, Error> {
        // Where something was missing, an earlier revocation may have failed: the hints speak of what was found only.
        let hints = unmapped.missing.is_none() || seeded(Bug::HintsAlways);
        let granule = self.walked.table.geometry().granule();
        let range = bugs::covered(unmapped.range, granule.size());
        if seeded(Bug::NoTlbi) {
            return Ok(true);
        }
        if self.shared.features.range_invalidation {
            let ttl = if hints { unmapped.level.unwrap_or(0) } else { 0 };
            for (addr, range) in Split::new(range, granule.shift(), ttl) {
                if *budget == 0 {
                    return Ok(false);
                }
                *budget -= 1;
                batch.push(self.tag.invalidate(addr, range))?;
            }
        } else {
            // Without ranges, one command for each leaf: any address in a block takes all of it out.
            let step = if hints { unmapped.leaf_size } else { None }.unwrap_or(granule.size());
            let count = range.len().div_ceil(step);
            if count > *budget {
                return Ok(false);
            }
            *budget -= count;
            for i in 0..count {
                batch.push(self.tag.invalidate(unmapped.range.start().get() + i * step, TlbiRange::SINGLE))?;
            }
        }
        Ok(true)
    }

    /// Clears all of `ranges`, then completes their invalidation. `Err` if that failed; else what [`AddressSpace::revoke`] has
    /// to say.
    fn try_revoke(&self, ranges: &[IovaRange], everything: bool) -> Result<Result<(), RevokeError>, Error> {
        let mut batch = self.shared.batch();
        let mut budget = COMMANDS_MAX;
        let mut broad = everything;
        let mut verdict = Ok(());
        let mut issued = Ok(());
        for &range in ranges {
            match self.walked.table.unmap(range) {
                Ok(unmapped) => {
                    if verdict.is_ok()
                        && let Some(missing) = unmapped.missing
                    {
                        verdict = Err(RevokeError::NotMapped(missing));
                    }
                    // Even where the SMMU takes no more commands the other ranges are cleared.
                    let forgotten = seeded(Bug::SecondRangeForgotten) && ranges.first() != Some(&range);
                    if !broad && issued.is_ok() && !forgotten {
                        issued = self.invalidate(&mut batch, &unmapped, &mut budget).map(|within| broad = !within);
                    }
                }
                Err(error) => {
                    // This range is as it was; those before it are gone, and that must be completed.
                    verdict = Err(error);
                    break;
                }
            }
        }
        issued?;
        if broad && !seeded(Bug::NoBroadTlbi) {
            // After the last leaf was cleared: what the TLB fetches from here on is the new state.
            batch.push(self.tag.invalidate_all())?;
        }
        batch.complete()?;
        Ok(verdict)
    }
}

// SAFETY: the contract of `iommu::contract`:
// - `revoke` returns `Ok` (or `NotMapped`) only after `Batch::complete` did, as the module documentation argues;
// - devices reach this space's table only, whose leaves are made by `PageTable::map` from what `map` was told, within `prot`.
unsafe impl<R: Registers> AddressSpace for Space<R> {
    fn aperture(&self) -> Aperture {
        self.walked.table.geometry().aperture()
    }

    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        self.walked.table.map(iova, runs, prot)
    }

    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        let aperture = self.aperture().range;
        if let Some(&outside) = ranges.iter().find(|&&range| !aperture.covers(range)) {
            return Err(RevokeError::OutOfAperture(outside));
        }
        if ranges.iter().all(|range| range.is_empty()) {
            return Ok(());
        }
        let failures = self.failures.load(Ordering::Acquire);
        let everything = !seeded(Bug::FailureForgotten) && failures != self.healed.load(Ordering::Acquire);
        match self.try_revoke(ranges, everything) {
            Ok(verdict) => {
                if everything {
                    self.healed.fetch_max(failures, Ordering::AcqRel);
                }
                verdict
            }
            Err(error) if bugs::forgiven(error) => Ok(()),
            Err(error) => {
                self.failures.fetch_add(1, Ordering::AcqRel);
                Err(error.into())
            }
        }
    }

    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        self.walked.table.translate(iova)
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tag {
            Tag::Asid(asid) => write!(f, "ASID {asid}")?,
            Tag::Vmid(vmid) => write!(f, "VMID {vmid}")?,
        }
        write!(f, ", {}", self.walked.table.geometry())
    }
}

impl<R: Registers> Drop for Space<R> {
    fn drop(&mut self) {
        if seeded(Bug::NoTlbiBeforeFree) {
            return;
        }
        // No stream is attached: each holds its space until the SMMU has completed a change to another.
        let mut batch = self.shared.batch();
        let issued = if seeded(Bug::AsidReusedEarly) {
            core::mem::forget(Arc::clone(&self.walked));
            Ok(())
        } else {
            batch.push(self.tag.invalidate_all())
        };
        let result = issued.and_then(|()| batch.complete());
        match (result, self.tag) {
            (Ok(()), Tag::Asid(asid)) => self.shared.asids.free(asid),
            (Ok(()), Tag::Vmid(vmid)) => self.shared.vmids.free(vmid),
            (Err(_), _) => {
                self.shared.counters.leaked_spaces.add(1);
                core::mem::forget(Arc::clone(&self.walked));
            }
        }
    }
}

/// The encoding of a granule in CD.TG0 and STE.S2TG.
pub(crate) const fn tg0(granule: Granule) -> u64 {
    match granule {
        Granule::K4 => cd::TG0_4K,
        Granule::K16 => cd::TG0_16K,
        Granule::K64 => cd::TG0_64K,
    }
}
