//! An address space as one SMMU knows it: its identifier, its context descriptor, and what is cached under them.
//!
//! # Which invalidation for which space (IHI 0070, 4.4)
//!
//! | space | by address | everything |
//! |---|---|---|
//! | stage 1, alone or nested | NH_VA with VMID and ASID | NH_ASID |
//! | stage 2 | S2_IPA with VMID | S12_VMALL |
//! | stage 2 with nested spaces on top | S2_IPA, CMD_SYNC, NH_ALL with VMID | S12_VMALL |
//!
//! The VMID is 0 unless a stage 2 is in use. What the SMMU has cached of both stages combined is tagged as stage 1, so S2_IPA
//! does not take it out; and it can be cached anew from a stage 2 entry until S2_IPA has completed, hence the CMD_SYNC between.
//!
//! Where ATS is on, CMD_ATC_INVs follow in a second batch: a device may ask again at once, and must then no longer be
//! answered from the SMMU's TLB.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the list of streams with ATS, never held while waiting.

use crate::Error;
use crate::atc::{EVERYTHING, Spans};
use crate::bugs::{self, Bug, seeded};
use crate::cmdq::{Batch, Later, Words};
use crate::descriptors::{CdFields, cd as context_descriptor, ste_nested, ste_stage1, ste_stage2, tg0};
use crate::entry::{Entry, WORDS};
use crate::registers::Registers;
use crate::smmu::Shared;
use crate::spec::command::{Command, TlbiRange, tlbi_nh_va, with_range};
use crate::spec::{cd, ste};
use crate::tlbi::Split;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::{AtomicBool, Ordering, fence};
use iommu::contract::{AddressSpace, TableBlock};
use iommu::pgtable::{Geometry, Leaf, MAIR, PageTable, Unmapped};
use iommu::{AttachError, Iova, IovaRange, OutOfMemory, Prot};

/// What the TLB entries of a space are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// Stage 1. The VMID is the parent's, or 0.
    Asid { vmid: u16, asid: u16 },
    /// Stage 2.
    Vmid(u16),
}

impl Tag {
    const fn invalidate_all(self) -> Command {
        match self {
            Self::Asid { vmid, asid } => Command::TlbiNhAsid { vmid, asid },
            Self::Vmid(vmid) => Command::TlbiS12Vmall { vmid },
        }
    }

    fn invalidate(self, addr: u64, range: TlbiRange) -> Command {
        // No table is ever freed under a living space, so leaf entries suffice.
        match self {
            Self::Asid { vmid, asid } => {
                let asid = asid ^ u16::from(seeded(Bug::WrongAsid));
                Command::TlbiNhVa { vmid, asid, addr, range: bugs::hinted(range), leaf: true }
            }
            Self::Vmid(vmid) => {
                let vmid = vmid ^ u16::from(seeded(Bug::WrongVmid));
                Command::TlbiS2Ipa { vmid, addr, range: bugs::hinted(range), leaf: true }
            }
        }
    }
}

/// A stage 2 under a nested space.
pub(crate) struct Parent {
    /// Keeps its tables.
    pub space: Arc<dyn AddressSpace>,
    pub vmid: u16,
    /// The STE of the stage 2 alone.
    pub ste: Entry,
}

/// What the SMMU walks: kept together so that it is freed together, or kept together for ever.
struct Walked {
    table: Arc<PageTable>,
    /// The context descriptor, for stage 1.
    context: Option<TableBlock>,
    parent: Option<Parent>,
}

/// Somebody who may hold translations of the space in an ATC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Client {
    pub sid: u32,
    pub ssid: Option<u32>,
}

const WORDS_OF_COMMAND: usize = crate::spec::command::WORDS;

/// The invalidation of a leaf of that kind at address 0.
fn leaf_words(tag: Tag, geometry: &Geometry, leaf: Leaf) -> Words {
    let range = IovaRange::new(Iova::new(0), geometry.bytes_of(leaf)).unwrap_or_default();
    match (tag, Split::whole(range, geometry.granule().shift(), leaf.level())) {
        (Tag::Asid { vmid, asid }, Some((_, range))) => tlbi_nh_va(vmid, asid, 0, range, true),
        _ => [0; WORDS_OF_COMMAND],
    }
}

/// Commands of a revocation that is issued at once.
const QUICK: usize = 4;

/// One SMMU's side of an address space.
pub(crate) struct Member<R: Registers> {
    shared: Arc<Shared<R>>,
    tag: Tag,
    /// See [`Self::is_plain`].
    plain: bool,
    /// Accesses of its streams are taken for privileged.
    privileged: bool,
    /// What all invalidations of one leaf have in common, in a plain space, by its kind.
    leaf_words: [Words; Leaf::KINDS],
    /// log2 of the bytes in a page.
    page_shift: u32,
    walked: Arc<Walked>,
    /// A nested space was ever put on top of this stage 2.
    nests: AtomicBool,
    /// One entry for each attachment with ATS.
    clients: IrqMutex<Vec<Client>>,
}

impl<R: Registers> Member<R> {
    /// Gives `table` an identifier, and for stage 1 a context descriptor. `privileged`: see [`crate::Request`].
    ///
    /// # Errors
    ///
    /// [`AttachError::NoIdentifier`], [`AttachError::OutOfMemory`], and [`AttachError::Unsupported`] where `parent` does not map
    /// what the walker must read.
    pub fn new(
        shared: Arc<Shared<R>>,
        table: Arc<PageTable>,
        parent: Option<Parent>,
        privileged: bool,
    ) -> Result<Self, AttachError> {
        let features = &shared.features;
        let (tag, context) = if table.geometry().stage() == iommu::pgtable::Stage::One {
            let context = shared.memory.allocate(cd::SIZE)?;
            if let Some(parent) = &parent {
                for read in [context.phys(), table.root()] {
                    let seen = parent.space.translate(Iova::new(read.get()));
                    if !seen.is_some_and(|(phys, prot)| phys == read && prot.contains(Prot::READ)) {
                        return Err(AttachError::Unsupported("a parent that does not map the tables to themselves"));
                    }
                }
            }
            let vmid = parent.as_ref().map_or(0, |parent| parent.vmid);
            (Tag::Asid { vmid, asid: shared.asids.allocate().ok_or(AttachError::NoIdentifier)? }, Some(context))
        } else {
            (Tag::Vmid(shared.vmids.allocate().ok_or(AttachError::NoIdentifier)?), None)
        };
        if let (Tag::Asid { asid, .. }, Some(context)) = (tag, &context) {
            let geometry = table.geometry();
            let words = context_descriptor(&CdFields {
                asid,
                ttb0: table.root().get(),
                t0sz: geometry.tsz(),
                tg0: tg0(geometry.granule()),
                ips: features.ips(geometry.output_bits()),
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
        let Ok(walked) = base::fallible::arc(Walked { table, context, parent }) else {
            // Nothing was ever tagged with it.
            match tag {
                Tag::Asid { asid, .. } => shared.asids.free(asid),
                Tag::Vmid(vmid) => shared.vmids.free(vmid),
            }
            return Err(AttachError::OutOfMemory);
        };
        let plain = features.range_invalidation && !features.ats && matches!(tag, Tag::Asid { .. });
        let words_of = |kind| leaf_words(tag, walked.table.geometry(), Leaf::of_kind(kind));
        let leaf_words = core::array::from_fn(words_of);
        Ok(Self {
            shared,
            tag,
            plain,
            privileged,
            leaf_words,
            page_shift: walked.table.geometry().granule().shift(),
            walked,
            nests: AtomicBool::new(false),
            clients: IrqMutex::new(Vec::new()),
        })
    }

    /// The tables, and whether they alone translate.
    pub fn table(&self) -> (&PageTable, bool) {
        (&self.walked.table, self.walked.parent.is_none())
    }

    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// The STE of a stream that is attached to this space.
    pub fn ste(&self) -> Entry {
        match &self.walked.context {
            Some(context) => self.ste_with(ste_stage1(context.phys().get(), self.shared.features.coherent)),
            None => {
                let (Tag::Asid { vmid, .. } | Tag::Vmid(vmid)) = self.tag;
                let table = &self.walked.table;
                ste_stage2(vmid, table.geometry(), table.root().get(), &self.shared.features)
            }
        }
    }

    /// Whether accesses of its streams are taken for privileged.
    pub fn is_privileged(&self) -> bool {
        self.privileged
    }

    /// A stage 1 STE with what this space has beside its context descriptor: a stage 2 under it, or an override.
    pub fn ste_with(&self, mut stage1: Entry) -> Entry {
        if self.privileged {
            stage1[1] |= ste::PRIVCFG.put(ste::PRIVCFG_PRIVILEGED);
        }
        match &self.walked.parent {
            Some(parent) => ste_nested(&stage1, &parent.ste),
            None => stage1,
        }
    }

    /// The space's context descriptor, for a table of them. `None` for stage 2.
    pub fn context(&self) -> Option<Entry> {
        let context = self.walked.context.as_ref()?;
        let mut words = [0; WORDS];
        for (word, cell) in words.iter_mut().zip(context.iter()) {
            *word = cell.load(Ordering::Relaxed);
        }
        Some(words)
    }

    /// The stage 2 below, as what two spaces that share a table of context descriptors must have in common.
    pub fn parent(&self) -> Option<&Arc<dyn AddressSpace>> {
        self.walked.parent.as_ref().map(|parent| &parent.space)
    }

    /// Becomes the stage 2 of a nested space. `None` for a stage 1. `space` is the address space that this is a member of.
    pub fn adopt(&self, space: &Arc<dyn AddressSpace>) -> Option<Parent> {
        let Tag::Vmid(vmid) = self.tag else { return None };
        // Before any stream walks through both stages; see `nested_above`.
        self.nests.store(true, Ordering::SeqCst);
        Some(Parent { space: Arc::clone(space), vmid, ste: self.ste() })
    }

    /// Bits of what a stage 1 on top may put out.
    pub fn intermediate_bits(&self) -> u8 {
        let encoded = self.shared.features.ips(self.walked.table.geometry().input_bits());
        crate::spec::registers::OAS_BITS.get(usize::try_from(encoded).unwrap_or(0)).copied().unwrap_or(32)
    }

    /// Whether the member is that of `shared`.
    pub fn is_of(&self, shared: &Shared<R>) -> bool {
        core::ptr::eq(&raw const *self.shared, shared)
    }

    pub fn shared(&self) -> &Arc<Shared<R>> {
        &self.shared
    }

    /// Whether nested spaces have to be invalidated too. After the tables were changed: who becomes a parent only later is not
    /// walked before, and its walks see the change.
    fn nested_above(&self) -> bool {
        fence(Ordering::SeqCst);
        self.nests.load(Ordering::SeqCst)
    }

    /// Adds the invalidations for one unmapped range to `batch`. `Ok(false)` if they are more than `budget`, of which is taken
    /// what they cost; then everything must be invalidated instead.
    pub fn invalidate(&self, batch: &mut Batch<'_, R>, unmapped: &Unmapped, budget: &mut u64) -> Result<bool, Error> {
        let granule = self.walked.table.geometry().granule();
        let range = bugs::covered(unmapped.range, granule.size());
        if seeded(Bug::NoTlbi) {
            return Ok(true);
        }
        if self.shared.features.range_invalidation {
            let ttl = Self::level_hint(unmapped);
            for (addr, range) in Split::new(range, granule.shift(), ttl) {
                if *budget == 0 {
                    return Ok(false);
                }
                *budget -= 1;
                batch.push(self.tag.invalidate(addr, range))?;
            }
        } else {
            // Without ranges, one command for each leaf: any address in a block takes all of it out. As for hints.
            let hints = unmapped.missing.is_none() || seeded(Bug::HintsAlways);
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

    /// Whether a revocation is nothing but invalidations by address, if they are few: stage 1, ranges, no ATC.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// The command that invalidates what was mapped by `leaf` at `start` of a plain space.
    #[inline]
    pub fn leaf_command(&self, start: Iova, leaf: Leaf) -> Words {
        let [word0, word1] = self.leaf_words[leaf.kind()];
        [word0, word1 | start.get()]
    }

    /// The command that invalidates one range of a plain space, all of whose leaves were of `level`, if one command does.
    #[inline(always)]
    pub fn command(&self, range: IovaRange, level: u8) -> Option<Words> {
        if seeded(Bug::NoTlbi) {
            return None;
        }
        let range = bugs::covered(range, 1 << (self.page_shift & 63));
        let (addr, range) = Split::whole(range, self.page_shift, level)?;
        let [word0, _] = self.leaf_words[Leaf::PAGE.kind()];
        let word0 = if seeded(Bug::WrongAsid) { word0 ^ crate::spec::command::ASID.put(1) } else { word0 };
        Some(with_range(word0, addr, bugs::hinted(range)))
    }

    /// The level of all leaves of a range, or 0. Where something was missing, an earlier revocation may have failed: what is known
    /// of the leaves speaks of what was found only.
    #[inline]
    fn level_hint(unmapped: &Unmapped) -> u8 {
        let known = unmapped.missing.is_none() || seeded(Bug::HintsAlways);
        if known { unmapped.level.unwrap_or(0) } else { 0 }
    }

    /// Executes one command and completes it, as far as nothing has to be waited for. `BARRIER`: as
    /// [`CommandQueue::execute_one`](crate::cmdq::CommandQueue::execute_one).
    ///
    /// # Errors
    ///
    /// What [`Self::finish`] needs to do the rest.
    #[inline(always)] // Into the few places that call it.
    pub fn execute<const BARRIER: bool>(&self, command: Words) -> Result<(), Later> {
        let shared = &*self.shared;
        shared.commands.execute_one::<R, BARRIER>(&shared.doorbell, command)
    }

    /// Does what [`Self::execute`] has left.
    ///
    /// # Errors
    ///
    /// What kept the command from completing.
    pub fn finish(&self, command: Words, later: Later) -> Result<(), Error> {
        let shared = &*self.shared;
        shared.commands.finish(&shared.registers, &shared.counters, command, later)
    }

    /// Invalidates one unmapped range of a plain space and awaits that. `None` where it takes more than [`QUICK`] commands:
    /// nothing has been issued then.
    #[inline(never)]
    pub fn invalidate_quickly(&self, unmapped: &Unmapped) -> Option<Result<(), Error>> {
        let Tag::Asid { vmid, asid } = self.tag else { return None };
        if seeded(Bug::NoTlbi) {
            return None;
        }
        let asid = asid ^ u16::from(seeded(Bug::WrongAsid));
        let granule = self.walked.table.geometry().granule();
        let mut words = [[0; 2]; QUICK];
        let mut count = 0;
        let range = bugs::covered(unmapped.range, granule.size());
        for (addr, range) in Split::new(range, granule.shift(), Self::level_hint(unmapped)) {
            *words.get_mut(count)? = tlbi_nh_va(vmid, asid, addr, bugs::hinted(range), true);
            count += 1;
        }
        let shared = &*self.shared;
        Some(shared.commands.execute(&shared.registers, &shared.counters, words.get(..count)?))
    }

    /// Completes the invalidations in `batch`: of the whole space if `broad`, and then those of the ATCs.
    ///
    /// # Errors
    ///
    /// What kept an invalidation from completing.
    pub fn complete(&self, mut batch: Batch<'_, R>, ranges: &[IovaRange], broad: bool) -> Result<(), Error> {
        if broad && !seeded(Bug::NoBroadTlbi) {
            // After the last leaf was cleared: what the TLB fetches from here on is the new state.
            batch.push(self.tag.invalidate_all())?;
        } else if let Tag::Vmid(vmid) = self.tag
            && self.nested_above()
        {
            if !seeded(Bug::NoSyncBetweenStages) {
                batch.push(Command::Sync)?;
            }
            if !seeded(Bug::NoTlbiAbove) {
                batch.push(Command::TlbiNhAll { vmid })?;
            }
        }
        batch.complete()?;
        self.invalidate_clients(ranges, broad)
    }

    /// Removes `ranges` from the ATCs. Whoever becomes a client after the list was read is answered from tables and TLBs that
    /// no longer have them.
    fn invalidate_clients(&self, ranges: &[IovaRange], broad: bool) -> Result<(), Error> {
        if !self.shared.features.ats || seeded(Bug::NoAtcInvalidation) {
            return Ok(());
        }
        fence(Ordering::SeqCst);
        let mut batch = None;
        // Positions in the list may move while it is not locked; a client that leaves has its whole ATC invalidated by whoever
        // takes it off, and those that stay must not be missed: the list is copied, or where that fails read under the lock.
        let clients = self.clients.lock();
        let mut copy = Vec::new();
        if copy.try_reserve_exact(clients.len()).is_err() {
            return Err(Error::OutOfMemory);
        }
        copy.extend_from_slice(&clients);
        drop(clients);
        for Client { sid, ssid } in copy {
            let batch = batch.get_or_insert_with(|| self.shared.batch());
            if broad {
                batch.push(Command::AtcInv { sid, ssid, addr: 0, log2: EVERYTHING })?;
                continue;
            }
            for (addr, log2) in ranges.iter().flat_map(|&range| Spans::new(range)) {
                batch.push(Command::AtcInv { sid, ssid, addr, log2 })?;
            }
        }
        batch.map_or(Ok(()), Batch::complete)
    }

    /// Notes somebody who may from now on hold translations in an ATC.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn admit(&self, client: Client) -> Result<(), OutOfMemory> {
        let mut clients = self.clients.lock();
        clients.try_reserve(1).map_err(|_| OutOfMemory)?;
        clients.push(client);
        Ok(())
    }

    /// Forgets one attachment of a client, whose ATC holds nothing of this space (any more, or yet).
    pub fn dismiss(&self, client: Client) {
        let mut clients = self.clients.lock();
        if let Some(place) = clients.iter().position(|other| *other == client) {
            clients.swap_remove(place);
        }
    }
}

impl<R: Registers> Drop for Member<R> {
    fn drop(&mut self) {
        if seeded(Bug::NoTlbiBeforeFree) {
            return;
        }
        // No stream is attached: each holds its space until the SMMU has completed a change to another. Nor is a nested space
        // on top, for those hold this one.
        let mut batch = self.shared.batch();
        let issued = if seeded(Bug::AsidReusedEarly) {
            core::mem::forget(Arc::clone(&self.walked));
            Ok(())
        } else {
            batch.push(self.tag.invalidate_all())
        };
        let result = issued.and_then(|()| batch.complete());
        match (result, self.tag) {
            (Ok(()), Tag::Asid { asid, .. }) => self.shared.asids.free(asid),
            (Ok(()), Tag::Vmid(vmid)) => self.shared.vmids.free(vmid),
            (Err(_), _) => {
                self.shared.counters.leaked_spaces.add(1);
                core::mem::forget(Arc::clone(&self.walked));
            }
        }
    }
}
