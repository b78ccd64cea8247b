//! Which stream has what, and the changing of it.
//!
//! # How a change goes
//!
//! It is planned first, with everything allocated that it needs; until then nothing has changed. Then a CD is written where one
//! in the stream's table changes, the STE is, and the ATC is emptied of what it holds of the spaces that were taken away.
//! Replacing what a live substream has would take two words of its CD, with a moment of neither in between: instead the table
//! is copied and the STE's pointer to it switched, one word. So it is where the STE gets a stage 2 with its first CD: nothing
//! may be found through a CD before the stage 2 is there that limits it.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the table of streams; the heap's lock comes after it, when a stream is used for the first time. A change of an
//! STE takes several invalidations and waits, during which no lock is held: the stream is marked as being changed instead, and whoever
//! wants to change the same stream waits for the mark, with a deadline.
//!
//! # Lifetimes
//!
//! A stream holds its address spaces and its table of CDs. The old ones are let go only after the SMMU has completed the
//! change; if it does not, both stay in memory for ever, because the SMMU may be walking either.

use crate::Error;
use crate::atc::EVERYTHING;
use crate::bugs::{Bug, seeded};
use crate::contexts::{ContextTable, Contexts, Unnumbered};
use crate::descriptors::{ste_abort, ste_bypass};
use crate::entry::{Entry, Kind, Sink, WORDS, update};
use crate::member::{Client, Member};
use crate::registers::Registers;
use crate::smmu::Shared;
use crate::space::Space;
use crate::spec::command::Command;
use crate::spec::ste;
use crate::strtab::Slot;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, IrqMutex};
use iommu::contract::AddressSpace;
use iommu::{AttachError, StreamId};

/// What becomes of a stream's transactions.
#[derive(Clone, Default)]
pub(crate) enum Treatment {
    /// They are aborted.
    #[default]
    Blocked,
    /// They are translated by an address space.
    Translated(Arc<dyn AddressSpace>),
    /// They are translated by the address space of their SubstreamID.
    Substreams(Arc<Contexts>),
    /// They pass untranslated.
    Bypass,
}

impl Treatment {
    /// The address spaces, with the SubstreamID whose accesses they translate.
    fn spaces(&self) -> impl Iterator<Item = (Option<u32>, &Arc<dyn AddressSpace>)> {
        let (one, many) = match self {
            Self::Translated(space) => (Some((None, space)), None),
            Self::Substreams(contexts) => (None, Some(contexts.all())),
            Self::Blocked | Self::Bypass => (None, None),
        };
        let many = many.into_iter().flatten().map(|(ssid, space)| ((ssid != 0).then_some(ssid), space));
        one.into_iter().chain(many)
    }
}

/// A change that is wanted.
#[derive(Clone, Copy)]
pub(crate) enum Wish<'a> {
    /// Abort everything.
    Block,
    /// Let everything pass.
    Bypass,
    /// Translate transactions without SubstreamID, and leave the others as they are.
    Attach(&'a Arc<dyn AddressSpace>),
    /// Translate those of a SubstreamID.
    AttachSubstream(u32, &'a Arc<dyn AddressSpace>),
    /// Abort those of a SubstreamID.
    DetachSubstream(u32),
    /// Answer translation requests, or do not.
    Ats(bool),
}

#[derive(Default)]
struct Stream {
    treatment: Treatment,
    /// Translation requests are answered.
    ats: bool,
    /// Somebody is changing the STE.
    changing: bool,
    /// The SMMU may have cached something older than the STE in memory.
    stale: bool,
}

/// A stream as it was when its change began.
#[derive(Clone)]
struct Before {
    treatment: Treatment,
    ats: bool,
    stale: bool,
}

/// A change, ready to be made.
struct Plan {
    treatment: Treatment,
    ats: bool,
    /// A CD that is to be written before the STE, in a table that both treatments have.
    context: Option<(Arc<ContextTable>, u32, Entry)>,
}

/// All streams that were ever attached.
#[derive(Default)]
pub(crate) struct Streams {
    /// Sorted.
    table: IrqMutex<Vec<(u32, Stream)>>,
}

/// The stream of this number. One that was never attached becomes one that is blocked, as its STE is.
fn entry(table: &mut Vec<(u32, Stream)>, stream: StreamId) -> Result<&mut Stream, AttachError> {
    let stream = stream.get();
    let index = match table.binary_search_by_key(&stream, |(number, _)| *number) {
        Ok(index) => index,
        Err(index) => {
            table.try_reserve(1).map_err(|_| AttachError::OutOfMemory)?;
            table.insert(index, (stream, Stream::default()));
            index
        }
    };
    // It is there, or was just put there.
    table.get_mut(index).map(|(_, entry)| entry).ok_or(AttachError::OutOfMemory)
}

/// Shares a value, if there is memory for that.
fn shared<T>(value: T) -> Result<Arc<T>, AttachError> {
    base::fallible::arc(value).map_err(|_| AttachError::OutOfMemory)
}

impl Streams {
    /// Marks `stream` as being changed, and says what it is now.
    ///
    /// # Errors
    ///
    /// [`AttachError::OutOfMemory`] for a stream that was never attached, [`AttachError::TimedOut`].
    fn begin(&self, stream: StreamId, deadline: Deadline) -> Result<Before, AttachError> {
        loop {
            let expired = deadline.has_passed();
            {
                let mut table = self.table.lock();
                let entry = entry(&mut table, stream)?;
                if !entry.changing {
                    entry.changing = true;
                    return Ok(Before { treatment: entry.treatment.clone(), ats: entry.ats, stale: entry.stale });
                }
            }
            if expired {
                return Err(AttachError::TimedOut);
            }
            core::hint::spin_loop();
        }
    }

    /// Ends a change. Returns what the stream had, for the caller to drop with no lock held.
    fn end(&self, stream: StreamId, now: Option<(Treatment, bool)>, stale: bool) -> Option<Treatment> {
        let mut table = self.table.lock();
        // It has been marked, so it is there.
        let entry = entry(&mut table, stream).ok()?;
        entry.changing = false;
        entry.stale = stale;
        let (treatment, ats) = now?;
        entry.ats = ats;
        Some(core::mem::replace(&mut entry.treatment, treatment))
    }

    /// How many streams are not blocked.
    pub fn attached(&self) -> usize {
        self.table.lock().iter().filter(|(_, stream)| !matches!(stream.treatment, Treatment::Blocked)).count()
    }
}

impl<R: Registers> Shared<R> {
    /// Changes what becomes of the transactions of `stream`.
    ///
    /// # Errors
    ///
    /// [`AttachError::TimedOut`] and [`AttachError::Dead`], after which the STE in memory aborts, but the SMMU may not have
    /// taken notice. After all others nothing has changed.
    pub fn change(&self, stream: StreamId, wish: Wish<'_>) -> Result<(), AttachError> {
        let Some(slot) = self.table.slot(stream)? else { return Err(AttachError::NoSuchStream(stream)) };
        let mut before = self.streams.begin(stream, Deadline::after(self.config.sync_timeout))?;
        let ready = self.plan(&before, wish).and_then(|plan| {
            self.check_overrides(&plan)?;
            self.admit(stream, &plan)?;
            Ok(plan)
        });
        let plan = match ready {
            Ok(plan) => plan,
            Err(error) => {
                self.streams.end(stream, None, before.stale);
                return Err(error);
            }
        };
        if seeded(Bug::SpaceFreedEarly) {
            before.treatment = Treatment::Blocked;
            drop(self.streams.end(stream, Some((Treatment::Blocked, before.ats)), before.stale));
        }
        match self.carry_out(stream, &slot, &before, &plan) {
            Ok(()) => {
                self.dismiss(stream, &before.treatment, before.ats);
                let old = self.streams.end(stream, Some((plan.treatment, plan.ats)), false);
                drop(before);
                drop(old);
                Ok(())
            }
            Err(error) => {
                // One store, whatever state the entry is in: Config has no other way to abort, and V stays set.
                if let Some(&word) = ste_abort().first() {
                    slot.store(0, word);
                }
                // The ATC may still hold what it held of either: both keep the stream as a client.
                let old = self.streams.end(
                    stream,
                    Some((Treatment::Blocked, before.ats || plan.ats)),
                    !seeded(Bug::StaleForgotten),
                );
                self.leak(old);
                self.leak(Some(plan.treatment));
                Err(error.into())
            }
        }
    }

    /// Whether all that a stream is to have agrees about what is privileged: its STE says it for all substreams, and what an ATC
    /// holds is not asked for again with each access.
    fn check_overrides(&self, plan: &Plan) -> Result<(), AttachError> {
        let mut all = None;
        for (_, space) in plan.treatment.spaces() {
            let privileged = self.ours(space)?.is_privileged();
            if *all.get_or_insert(privileged) != privileged {
                return Err(AttachError::Unsupported("substreams of which one is privileged"));
            }
        }
        if plan.ats && all == Some(true) {
            return Err(AttachError::Unsupported("ATS where all accesses are taken for privileged"));
        }
        Ok(())
    }

    /// Finds out what a change comes to, and allocates what it takes.
    fn plan(&self, before: &Before, wish: Wish<'_>) -> Result<Plan, AttachError> {
        let ats = before.ats;
        let plain = |treatment| Ok(Plan { treatment, ats, context: None });
        match (wish, &before.treatment) {
            (Wish::Block, _) => plain(Treatment::Blocked),
            (Wish::Bypass, _) => plain(Treatment::Bypass),
            (Wish::Ats(on), _) => {
                if on && !self.features.ats {
                    return Err(AttachError::Unsupported("ATS"));
                }
                Ok(Plan { treatment: before.treatment.clone(), ats: on, context: None })
            }
            (Wish::Attach(space), Treatment::Substreams(contexts)) => self.plan_context(contexts, 0, space, ats),
            (Wish::Attach(space), _) => {
                self.ours(space)?;
                plain(Treatment::Translated(Arc::clone(space)))
            }
            (Wish::AttachSubstream(ssid, space), treatment) => {
                if self.features.substream_id_bits == 0 || self.config.substream_bits == 0 {
                    return Err(AttachError::Unsupported("substreams"));
                }
                if let Treatment::Substreams(contexts) = treatment {
                    self.numbered(&contexts.table, ssid)?;
                    return self.plan_context(contexts, ssid, space, ats);
                }
                let unnumbered = match treatment {
                    Treatment::Translated(space) => Unnumbered::Translated(Arc::clone(space)),
                    Treatment::Bypass => Unnumbered::Bypassing,
                    _ => Unnumbered::Terminated,
                };
                let table = ContextTable::new(&self.features, self.config.substream_bits, self.memory)?;
                self.numbered(&table, ssid)?;
                let mut contexts = Contexts { table: shared(table)?, unnumbered, numbered: Vec::new() }.copy(1)?;
                contexts.numbered.push((ssid, Arc::clone(space)));
                self.fill(&contexts)?;
                plain(Treatment::Substreams(shared(contexts)?))
            }
            (Wish::DetachSubstream(ssid), Treatment::Substreams(contexts)) if ssid != 0 => {
                let place = contexts.numbered.iter().position(|(number, _)| *number == ssid);
                let place = place.ok_or(AttachError::NoSuchSubstream(ssid))?;
                let mut rest = contexts.copy(0)?;
                rest.numbered.swap_remove(place);
                let context = Some((Arc::clone(&rest.table), ssid, [0; WORDS]));
                Ok(Plan { treatment: Treatment::Substreams(shared(rest)?), ats, context })
            }
            (Wish::DetachSubstream(ssid), _) => Err(AttachError::NoSuchSubstream(ssid)),
        }
    }

    /// Plans to give SubstreamID `ssid` (0 for none) the space `space`.
    fn plan_context(
        &self,
        contexts: &Contexts,
        ssid: u32,
        space: &Arc<dyn AddressSpace>,
        ats: bool,
    ) -> Result<Plan, AttachError> {
        let taken = contexts.get(ssid);
        let same = taken.is_some_and(|old| Arc::ptr_eq(old, space));
        let taken = taken.is_some();
        let mut next = contexts.copy(1)?;
        next.numbered.retain(|(number, _)| *number != ssid);
        if ssid == 0 {
            next.unnumbered = Unnumbered::Translated(Arc::clone(space));
        } else {
            next.numbered.push((ssid, Arc::clone(space)));
        }
        let mut context = None;
        // The STE of a table that nobody is in has no stage 2. A CD of a nested space must not be found through that: it would be
        // walked as a stage 1 alone, to what are intermediate addresses, and be tagged with no VMID. A new table comes with its STE.
        let below = self.ours(space)?.parent().is_some() && !seeded(Bug::CdWithoutStage2);
        let uncovered = below && contexts.all().next().is_none();
        if taken && !same || uncovered {
            next.table = shared(ContextTable::new(&self.features, self.config.substream_bits, self.memory)?)?;
            self.fill(&next)?;
        } else {
            self.check(&next)?;
            let words = self.ours(space)?.context().ok_or(AttachError::Unsupported("substreams of a stage 2 alone"))?;
            // The second level is there when the change begins.
            next.table.slot(ssid)?;
            context = Some((Arc::clone(&next.table), ssid, words));
        }
        Ok(Plan { treatment: Treatment::Substreams(shared(next)?), ats, context })
    }

    fn numbered(&self, table: &ContextTable, ssid: u32) -> Result<(), AttachError> {
        if ssid != 0 && table.has(ssid) { Ok(()) } else { Err(AttachError::NoSuchSubstream(ssid)) }
    }

    /// What this SMMU knows `space` as.
    fn ours<'a>(&self, space: &'a Arc<dyn AddressSpace>) -> Result<&'a Member<R>, AttachError> {
        Space::<R>::member(space, self).ok_or(AttachError::ForeignSpace)
    }

    /// Whether the spaces can share an STE: stage 1 all, over the same stage 2 if any.
    fn check(&self, contexts: &Contexts) -> Result<(), AttachError> {
        let mut below: Option<Option<&Arc<dyn AddressSpace>>> = None;
        for (_, space) in contexts.all() {
            let member = self.ours(space)?;
            if member.context().is_none() {
                return Err(AttachError::Unsupported("substreams of a stage 2 alone"));
            }
            let same = match (below, member.parent()) {
                (None, _) | (Some(None), None) => true,
                (Some(Some(one)), Some(other)) => Arc::ptr_eq(one, other),
                _ => false,
            };
            if !same {
                return Err(AttachError::Unsupported("substreams over different parents"));
            }
            below = Some(member.parent());
        }
        if matches!(contexts.unnumbered, Unnumbered::Bypassing) && below.flatten().is_some() {
            return Err(AttachError::Unsupported("substreams over a parent in a stream that bypasses"));
        }
        Ok(())
    }

    /// Writes the CDs of a table that no STE points at yet.
    fn fill(&self, contexts: &Contexts) -> Result<(), AttachError> {
        self.check(contexts)?;
        for (ssid, space) in contexts.all() {
            let words = self.ours(space)?.context().unwrap_or_default();
            let slot = contexts.table.slot(ssid)?.ok_or(AttachError::NoSuchSubstream(ssid))?;
            for (index, word) in words.into_iter().enumerate() {
                slot.store(index, word);
            }
        }
        Ok(())
    }

    /// The STE for a treatment.
    fn ste(&self, treatment: &Treatment, ats: bool) -> Result<Entry, Error> {
        const FOREIGN: Error = Error::Unsupported("an address space of another SMMU");
        let mut entry = match treatment {
            Treatment::Blocked => return Ok(ste_abort()),
            Treatment::Bypass => return Ok(ste_bypass(self.features.attr_types_ovr)),
            Treatment::Translated(space) => self.ours(space).map_err(|_| FOREIGN)?.ste(),
            Treatment::Substreams(contexts) => {
                let stage1 = contexts.table.ste(contexts.dss(), &self.features);
                match contexts.all().next() {
                    Some((_, space)) => self.ours(space).map_err(|_| FOREIGN)?.ste_with(stage1),
                    None => stage1,
                }
            }
        };
        if ats {
            entry[1] |= ste::EATS.put(ste::EATS_FULL);
        }
        Ok(entry)
    }

    fn carry_out(&self, stream: StreamId, slot: &Slot<'_>, before: &Before, plan: &Plan) -> Result<(), Error> {
        let target = self.ste(&plan.treatment, plan.ats)?;
        let sid = stream.get();
        // Leaf clear: the L1STD may be new, linked by this core or by one that has not got as far as this.
        let forget =
            Command::CfgiSte { sid: sid ^ u32::from(seeded(Bug::CfgiWrongStream)), leaf: seeded(Bug::CfgiLeafOnly) };
        let mut sink = EntrySink { shared: self, slot, forget };
        if before.stale {
            sink.sync()?;
        }
        if let Some((table, ssid, words)) = &plan.context {
            let slot = table.slot(*ssid)?.ok_or(Error::OutOfMemory)?;
            // Leaf clear: the L1CD may be new.
            let forget = Command::CfgiCd { sid, ssid: *ssid, leaf: seeded(Bug::CfgiCdLeafOnly) };
            update(Kind::Cd, &slot.read(), words, &mut EntrySink { shared: self, slot: &slot, forget })?;
        }
        update(Kind::Ste, &slot.read(), &target, &mut sink)?;
        self.empty_atc(sid, before, plan)
    }

    /// Has the device forget what it holds of spaces that it no longer has.
    fn empty_atc(&self, sid: u32, before: &Before, plan: &Plan) -> Result<(), Error> {
        if !before.ats || seeded(Bug::AtcKept) {
            return Ok(());
        }
        let mut batch = self.batch();
        let mut unnumbered = matches!(before.treatment, Treatment::Substreams(_) | Treatment::Translated(_));
        for (ssid, space) in before.treatment.spaces() {
            let kept =
                plan.ats && plan.treatment.spaces().any(|(number, other)| number == ssid && Arc::ptr_eq(other, space));
            if !kept && ssid.is_some() {
                batch.push(Command::AtcInv { sid, ssid, addr: 0, log2: EVERYTHING })?;
            }
            unnumbered &= !(kept && ssid.is_none());
        }
        if unnumbered || before.stale {
            batch.push(Command::AtcInv { sid, ssid: None, addr: 0, log2: EVERYTHING })?;
        }
        batch.complete()
    }

    /// Makes the stream a client of all its new spaces if it has ATS.
    fn admit(&self, stream: StreamId, plan: &Plan) -> Result<(), AttachError> {
        for (done, (ssid, space)) in plan.treatment.spaces().enumerate().take_while(|_| plan.ats) {
            if let Err(error) = self.ours(space)?.admit(Client { sid: stream.get(), ssid }) {
                for (ssid, space) in plan.treatment.spaces().take(done) {
                    self.ours(space)?.dismiss(Client { sid: stream.get(), ssid });
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Takes the stream off the list of clients of spaces that it had.
    fn dismiss(&self, stream: StreamId, treatment: &Treatment, ats: bool) {
        for (ssid, space) in treatment.spaces().take_while(|_| ats) {
            if let Ok(member) = self.ours(space) {
                member.dismiss(Client { sid: stream.get(), ssid });
            }
        }
    }

    /// Keeps address spaces and tables for ever: the SMMU may still walk them.
    fn leak(&self, treatment: Option<Treatment>) {
        if let Some(treatment) = treatment
            && !seeded(Bug::FailedSpaceFreed)
        {
            self.counters.leaked_spaces.add(treatment.spaces().count() as u64);
            core::mem::forget(treatment);
        }
    }
}

/// One entry under change, and the command that has the SMMU forget it.
struct EntrySink<'a, R: Registers> {
    shared: &'a Shared<R>,
    slot: &'a Slot<'a>,
    forget: Command,
}

impl<R: Registers> Sink for EntrySink<'_, R> {
    fn store(&mut self, index: usize, word: u64) {
        self.slot.store(index, word);
    }

    fn sync(&mut self) -> Result<(), Error> {
        let mut batch = self.shared.batch();
        let forgotten = match self.forget {
            Command::CfgiCd { .. } => seeded(Bug::NoCfgiCd),
            _ => seeded(Bug::NoCfgiSte),
        };
        if !forgotten {
            batch.push(self.forget)?;
        }
        batch.complete()
    }
}
