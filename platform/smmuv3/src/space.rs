//! Device address spaces: translation tables with an identifier on each SMMU, and the contract of revocation.
//!
//! Stage 1 where the SMMU has it: a context descriptor of its own for each space, shared by all streams attached to it, never
//! changed while the space lives. Stage 2 alone where that is all there is, or by request; stage 1 over a stage 2 by request
//! (see [`Translation`]).
//!
//! # How revocation keeps the contract
//!
//! [`AddressSpace::revoke`] clears the leaves and publishes that ([`PageTable::unmap`]), issues invalidations that cover every
//! range in full on every SMMU that the space is known to (see `member.rs`), and returns `Ok` only when on each of them a
//! CMD_SYNC behind them has been consumed and none of them was refused. By 3.21.1 of the architecture no transaction that used
//! the old translations is then still under way, whichever stream sent it.
//!
//! - A range is invalidated even where nothing was mapped: an earlier revocation may have cleared the leaves and failed, or
//!   another core may have cleared them and not yet got as far as invalidating.
//! - Ranges that lie one behind the other, in the order in which they are given, are invalidated as one.
//! - If one SMMU fails, the others are invalidated all the same, and the revocation has failed.
//! - After a failed revocation the next one invalidates the whole space: level hints that fit today's leaves need not fit what
//!   the TLB still holds.
//! - Tables are freed, and identifiers are, only after an invalidation of everything tagged with them. If that fails they
//!   are kept for ever.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`, as argued above.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::cmdq::{Batch, Later, Words};
use crate::member::{Member, Tag};
use crate::registers::Registers;
use crate::request::{Request, Translation};
use crate::smmu::Shared;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::cpu::Masked;
use core::any::Any;
use core::fmt;
use core::hint::cold_path;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use iommu::contract::{AddressSpace, Aperture};
use iommu::pgtable::{Anchor, Leaves, PageTable, Unmapped};
use iommu::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError};

/// Commands by address of one revocation beyond which everything of the space is invalidated instead. Walking a whole space
/// anew costs less than so many commands.
const COMMANDS_MAX: u64 = 128;
/// Unmapped ranges whose level hints are remembered for a second SMMU and those after it.
const HINTS: usize = 8;

/// One device address space, of one SMMU or of several.
pub(crate) struct Space<R: Registers> {
    first: Member<R>,
    /// Those of the other SMMUs.
    others: Vec<Member<R>>,
    table: Arc<PageTable>,
    /// One member, for which a revocation is nothing but invalidations by address.
    plain: bool,
    /// Tables and command queue are in memory that a barrier publishes.
    by_barrier: bool,
    /// Not both, or a failed revocation that no complete invalidation has followed: revocations look closer.
    slow: AtomicBool,
    /// Revocations that failed (low half), and how many of those were followed by a complete invalidation (high half).
    failures: AtomicU64,
}

/// Bits of the lower half of [`Space::failures`].
const HALF: u32 = 32;

impl<R: Registers> Space<R> {
    /// Makes an address space in which nothing is mapped, for all of `smmus`.
    ///
    /// # Errors
    ///
    /// [`AttachError::NoIdentifier`], [`AttachError::OutOfMemory`]; [`AttachError::Unsupported`] for what one of the SMMUs does
    /// not have; [`AttachError::ForeignSpace`] for a parent that is not a stage 2 of each.
    pub fn new(smmus: &[&Arc<Shared<R>>], request: &Request) -> Result<Self, AttachError> {
        let first = smmus.first().ok_or(AttachError::Unsupported("an address space of no SMMU"))?;
        let stage = request.stage(&first.features)?;
        for smmu in smmus {
            if request.stage(&smmu.features)? != stage {
                return Err(AttachError::Unsupported("the stage of the other SMMUs"));
            }
            request.check_override(&smmu.features, stage)?;
        }
        let mut parents = Vec::new();
        parents.try_reserve_exact(smmus.len()).map_err(|_| AttachError::OutOfMemory)?;
        let mut output = None;
        if let Translation::Nested(space) = &request.translation {
            for smmu in smmus {
                let below = Self::member(space, smmu).ok_or(AttachError::ForeignSpace)?;
                parents
                    .push(Some(below.adopt(space).ok_or(AttachError::Unsupported("a parent that is not a stage 2"))?));
                output = Some(below.intermediate_bits());
            }
        } else {
            parents.resize_with(smmus.len(), || None);
        }
        let shapes = smmus.iter().map(|smmu| (&smmu.features, &smmu.config));
        let geometry = request.geometry(shapes, stage, output)?;
        // Memory that is made visible to an SMMU that does not snoop is visible to those that do.
        let memory = smmus.iter().find(|smmu| !smmu.features.coherent).unwrap_or(first).memory;
        let table = base::fallible::arc(PageTable::new(geometry, memory)?).map_err(|_| AttachError::OutOfMemory)?;
        let mut others = Vec::new();
        others.try_reserve_exact(smmus.len().saturating_sub(1)).map_err(|_| AttachError::OutOfMemory)?;
        let mut members = smmus
            .iter()
            .zip(parents)
            .map(|(&smmu, parent)| Member::new(Arc::clone(smmu), Arc::clone(&table), parent, request.privileged));
        let first = members.next().ok_or(AttachError::Unsupported("an address space of no SMMU"))??;
        for member in members {
            others.push(member?);
        }
        let plain = others.is_empty() && first.is_plain();
        let by_barrier = memory.publishes_by_barrier() && smmus.iter().all(|smmu| smmu.memory.publishes_by_barrier());
        Ok(Self {
            first,
            others,
            table,
            plain,
            by_barrier,
            slow: AtomicBool::new(!(plain && by_barrier)),
            failures: AtomicU64::new(0),
        })
    }

    fn members(&self) -> impl Iterator<Item = &Member<R>> {
        core::iter::once(&self.first).chain(&self.others)
    }

    /// What `shared` knows `space` as, if it does.
    pub fn member<'a>(space: &'a Arc<dyn AddressSpace>, shared: &Shared<R>) -> Option<&'a Member<R>> {
        let any: &dyn Any = &**space;
        any.downcast_ref::<Self>()?.members().find(|member| member.is_of(shared))
    }

    /// Clears all of `ranges`, then completes their invalidation everywhere. `Err` if that failed; else what
    /// [`AddressSpace::revoke`] has to say.
    fn try_revoke(&self, ranges: &[IovaRange], everything: bool) -> Result<Result<(), RevokeError>, Error> {
        let Self { first, others, .. } = self;
        let mut batch = first.shared().batch();
        let mut budget = COMMANDS_MAX;
        let mut broad = everything;
        let mut verdict = Ok(());
        let mut issued = Ok(());
        let mut cleared = 0;
        let mut run = Run::default();
        let mut hints: [Option<Unmapped>; HINTS] = [None; HINTS];
        for &range in ranges {
            match self.table.unmap(range) {
                Ok(unmapped) => {
                    if verdict.is_ok()
                        && let Some(missing) = unmapped.missing
                    {
                        verdict = Err(RevokeError::NotMapped(missing));
                    }
                    if let Some(place) = hints.get_mut(cleared) {
                        *place = Some(unmapped);
                    }
                    cleared += 1;
                    // Even where the SMMU takes no more commands the other ranges are cleared.
                    let forgotten = seeded(Bug::SecondRangeForgotten) && ranges.first() != Some(&range);
                    if !broad && issued.is_ok() && !forgotten {
                        issued = run.add(first, &mut batch, &mut budget, Some(unmapped)).map(|within| broad = !within);
                    }
                }
                Err(error) => {
                    // This range is as it was; those before it are gone, and that must be completed.
                    verdict = Err(error);
                    break;
                }
            }
        }
        if !broad && issued.is_ok() {
            issued = run.add(first, &mut batch, &mut budget, None).map(|within| broad = !within);
        }
        let ranges = ranges.get(..cleared).unwrap_or(ranges);
        let mut result = issued.and_then(|()| first.complete(batch, ranges, broad));
        for member in others.iter().take_while(|_| !seeded(Bug::OtherSmmuForgotten)) {
            let hints = if everything { None } else { hints.get(..cleared) };
            result = result.and(Self::invalidate_also(member, ranges, hints));
        }
        result.map(|()| verdict)
    }

    /// Completes on one more SMMU the invalidation of what was cleared: by address if there are hints for each range.
    fn invalidate_also(
        member: &Member<R>,
        ranges: &[IovaRange],
        hints: Option<&[Option<Unmapped>]>,
    ) -> Result<(), Error> {
        let mut batch = member.shared().batch();
        let mut budget = COMMANDS_MAX;
        let mut broad = hints.is_none();
        let mut run = Run::default();
        for unmapped in hints.unwrap_or_default().iter().flatten().copied().map(Some).chain([None]) {
            if !broad {
                broad = !run.add(member, &mut batch, &mut budget, unmapped)?;
            }
        }
        member.complete(batch, ranges, broad)
    }

    /// Revokes one range of a plain space that has no failure behind it: the same steps, for which nothing is gathered.
    /// `BARRIER`: its tables and the command queue are in memory that a barrier publishes. Calls nothing that comes back, so that
    /// it needs no registers but those that are free.
    #[inline(always)]
    fn revoke_one<const BARRIER: bool>(&self, range: IovaRange) -> Result<(), RevokeError> {
        let member = &self.first;
        // The bugs are in the general way.
        let tested =
            seeded(Bug::NoTlbi) || seeded(Bug::WrongAsid) || seeded(Bug::WrongTtl) || seeded(Bug::RangeOnePageShort);
        let leaf = if tested { None } else { self.table.unmap_leaf::<BARRIER>(range) };
        let Some(leaf) = leaf else {
            cold_path();
            return self.revoke_run::<BARRIER>(range);
        };
        let command = member.leaf_command(range.start(), leaf);
        match member.execute::<BARRIER>(command) {
            Ok(()) => Ok(()),
            Err(later) => self.finish(command, later),
        }
    }

    /// [`Self::revoke_one`] of a range that is not one leaf or contiguous group.
    #[inline(never)]
    fn revoke_run<const BARRIER: bool>(&self, range: IovaRange) -> Result<(), RevokeError> {
        let Some(level) = self.table.unmap_run::<BARRIER>(range) else { return self.revoke_any(range) };
        let Some(command) = self.first.command(range, level) else { return self.invalidate_run(range, level) };
        match self.first.execute::<BARRIER>(command) {
            Ok(()) => Ok(()),
            Err(later) => self.finish(command, later),
        }
    }

    /// Does what is left of a revocation whose range has been cleared. Each kind is a call of its own, with what it needs in
    /// registers.
    #[inline(always)]
    fn finish(&self, [word0, word1]: Words, later: Later) -> Result<(), RevokeError> {
        match later {
            Later::Issue => self.issue(word0, word1),
            Later::Leave { end, cons, masked } => self.leave(word0, word1, end, cons, masked),
            Later::Await { end } => self.wait(word0, word1, end),
        }
    }

    #[cold]
    #[inline(never)]
    fn issue(&self, word0: u64, word1: u64) -> Result<(), RevokeError> {
        self.finish_by([word0, word1], Later::Issue)
    }

    #[cold]
    #[inline(never)]
    fn leave(&self, word0: u64, word1: u64, end: u64, cons: u32, masked: Masked) -> Result<(), RevokeError> {
        self.finish_by([word0, word1], Later::Leave { end, cons, masked })
    }

    #[cold]
    #[inline(never)]
    fn wait(&self, word0: u64, word1: u64, end: u64) -> Result<(), RevokeError> {
        self.finish_by([word0, word1], Later::Await { end })
    }

    fn finish_by(&self, command: Words, later: Later) -> Result<(), RevokeError> {
        self.first.finish(command, later).or_else(|error| self.failed(error))
    }

    /// Invalidates a range that was mapped by leaves of `level` and takes more than one command.
    #[inline(never)]
    fn invalidate_run(&self, range: IovaRange, level: u8) -> Result<(), RevokeError> {
        let size = self.table.geometry().leaf_size(level);
        let unmapped =
            Unmapped { range, level: Some(level), leaf_size: Some(size), leaves: range.len() / size, missing: None };
        self.invalidate_one(unmapped)
    }

    /// [`Self::revoke_one`] of whatever the shorter ways do not take.
    #[inline(never)]
    fn revoke_any(&self, range: IovaRange) -> Result<(), RevokeError> {
        if range.is_empty() {
            return self.revoke_all(&[range]);
        }
        let unmapped = self.table.unmap(range)?;
        match (self.invalidate_one(unmapped), unmapped.missing) {
            (Ok(()), Some(missing)) => Err(RevokeError::NotMapped(missing)),
            (result, _) => result,
        }
    }

    fn invalidate_one(&self, unmapped: Unmapped) -> Result<(), RevokeError> {
        let member = &self.first;
        let result = match member.invalidate_quickly(&unmapped) {
            Some(result) => result,
            None => Self::invalidate_in_batches(member, unmapped),
        };
        result.or_else(|error| self.failed(error))
    }

    /// Revokes where the SMMU has to be shown what was stored, and where more is to be done than invalidations of one range.
    #[inline(never)]
    fn revoke_otherwise(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        if let [range] = ranges
            && self.plain
            && self.is_healed()
        {
            return self.revoke_one::<false>(*range);
        }
        self.revoke_all(ranges)
    }

    /// [`AddressSpace::map`] likewise.
    #[inline(never)]
    fn map_published(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        self.table.map_exclusively::<false>(iova, runs, prot)
    }

    #[cold]
    #[inline(never)]
    fn invalidate_in_batches(member: &Member<R>, unmapped: Unmapped) -> Result<(), Error> {
        Self::invalidate_also(member, &[unmapped.range], Some(&[Some(unmapped)]))
    }

    /// Notes that a revocation has failed.
    #[cold]
    fn failed(&self, error: Error) -> Result<(), RevokeError> {
        if crate::bugs::forgiven(error) {
            return Ok(());
        }
        // Each takes milliseconds: the half does not overflow.
        self.failures.fetch_add(1, Ordering::SeqCst);
        self.slow.store(true, Ordering::SeqCst);
        Err(error.into())
    }

    /// Whether a complete invalidation has followed the last failure. (Who must know of a failure knows of it by more than this
    /// word.)
    #[inline(always)]
    fn is_healed(&self) -> bool {
        healed(self.failures.load(Ordering::Relaxed))
    }

    /// Notes that a complete invalidation has followed `failures`.
    #[cold]
    fn heal(&self, failures: u64) {
        let count = failures & ((1 << HALF) - 1);
        let heal = |now: u64| (now >> HALF < count).then_some(now & ((1 << HALF) - 1) | count << HALF);
        // Refused where another core has noted as much.
        let _ = self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, heal);
        if self.plain && self.by_barrier {
            self.slow.store(false, Ordering::SeqCst);
            // Another core may have noted a failure before that, and said so before: it is said again.
            if !healed(self.failures.load(Ordering::SeqCst)) {
                self.slow.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Revokes any ranges.
    #[inline(never)]
    fn revoke_all(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        let aperture = self.table.geometry().aperture().range;
        if let Some(&outside) = ranges.iter().find(|&&range| !aperture.covers(range)) {
            return Err(RevokeError::OutOfAperture(outside));
        }
        if ranges.iter().all(|range| range.is_empty()) {
            return Ok(());
        }
        let failures = self.failures.load(Ordering::Acquire);
        let everything = !seeded(Bug::FailureForgotten) && !healed(failures);
        match self.try_revoke(ranges, everything) {
            Ok(verdict) => {
                if everything {
                    self.heal(failures);
                }
                verdict
            }
            Err(error) => self.failed(error),
        }
    }
}

/// What [`Space::failures`] says.
#[inline(always)]
const fn healed(failures: u64) -> bool {
    failures & ((1 << HALF) - 1) == failures >> HALF
}

/// What was cleared and lies in one piece, to be invalidated as one range.
#[derive(Default)]
struct Run(Option<Unmapped>);

impl Run {
    /// Adds `next`, or with `None` nothing any more. What it does not continue is invalidated. As [`Member::invalidate`].
    fn add<R: Registers>(
        &mut self,
        member: &Member<R>,
        batch: &mut Batch<'_, R>,
        budget: &mut u64,
        next: Option<Unmapped>,
    ) -> Result<bool, Error> {
        let Some(before) = self.0 else {
            self.0 = next;
            return Ok(true);
        };
        if let Some(next) = &next
            && let Some(joined) = joined(&before, next)
        {
            self.0 = Some(joined);
            return Ok(true);
        }
        self.0 = next;
        member.invalidate(batch, &before, budget)
    }
}

/// Both as one, if the second begins where the first ends and the same is known of their leaves.
fn joined(first: &Unmapped, second: &Unmapped) -> Option<Unmapped> {
    let known = |unmapped: &Unmapped| (unmapped.level, unmapped.leaf_size, unmapped.missing.is_some());
    if first.range.end() != second.range.start() || known(first) != known(second) {
        return None;
    }
    let range = IovaRange::between(first.range.start(), second.range.end())?;
    Some(Unmapped { range, leaves: first.leaves + second.leaves, ..*first })
}

// SAFETY: the contract of `iommu::contract`:
// - `revoke` returns `Ok` (or `NotMapped`) only after `Member::complete` did on each SMMU, as the module documentation argues;
// - devices reach this space's table only, whose leaves are made by `PageTable::map` from what `map` was told, within `prot`
//   (and for nested ones within what the `map` of the parent was told).
unsafe impl<R: Registers> AddressSpace for Space<R> {
    fn aperture(&self) -> Aperture {
        self.table.geometry().aperture()
    }

    #[inline]
    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // The caller has the range for itself.
        if self.by_barrier {
            if let Some(result) = self.table.map_leaf::<true>(iova, runs, prot) {
                return result;
            }
            cold_path();
            return self.table.map_buffer::<true>(iova, runs, prot);
        }
        cold_path();
        self.map_published(iova, runs, prot)
    }

    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // SAFETY: the caller's promise.
        unsafe { self.map(iova, runs, prot) }
    }

    #[inline]
    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        if let [range] = ranges
            && !self.slow.load(Ordering::Relaxed)
        {
            return self.revoke_one::<true>(*range);
        }
        cold_path();
        self.revoke_otherwise(ranges)
    }

    fn anchor(&self, range: IovaRange) -> Option<Anchor> {
        if self.by_barrier { self.table.anchor(range) } else { None }
    }

    #[inline]
    unsafe fn revoke_anchored(&self, anchor: &Anchor) -> Result<(), RevokeError> {
        // The bugs are in the general way.
        let tested =
            seeded(Bug::NoTlbi) || seeded(Bug::WrongAsid) || seeded(Bug::WrongTtl) || seeded(Bug::RangeOnePageShort);
        if !tested && !self.slow.load(Ordering::Relaxed) {
            anchor.clear();
            let command = self.first.leaf_command(anchor.range().start(), anchor.leaf());
            return match self.first.execute::<true>(command) {
                Ok(()) => Ok(()),
                Err(later) => self.finish(command, later),
            };
        }
        cold_path();
        self.revoke_otherwise(&[anchor.range()])
    }

    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        self.table.translate(iova)
    }

    fn leaves(&self, range: IovaRange) -> Option<Leaves> {
        Some(self.table.leaves(range))
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for member in self.members() {
            match member.tag() {
                Tag::Asid { vmid: 0, asid } => write!(f, "ASID {asid}, ")?,
                Tag::Asid { vmid, asid } => write!(f, "ASID {asid} under VMID {vmid}, ")?,
                Tag::Vmid(vmid) => write!(f, "VMID {vmid}, ")?,
            }
        }
        write!(f, "{}", self.table.geometry())
    }
}
