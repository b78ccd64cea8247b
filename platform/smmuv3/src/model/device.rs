//! What becomes of a device's access: a translation or an event (IHI 0070, 3.4 and 7.3).

use super::cache::{AtcEntry, TlbEntry};
use super::commands::raise;
use super::config::{Record, Route, Source};
use super::output::{Line, interrupt};
use super::walk::{Failure, Fault, Stages};
use super::{Model, Overflow, State, check};
use crate::spec::event::{self, Event, number};
use crate::spec::registers::{Cr0, Gerror, OVFLG, idr1, queue_base};
use crate::spec::ste;
use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use iommu::{Iova, PhysAddr, PhysRange, StreamId};

/// Why an access was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Aborted, without an event.
    Silently,
    /// Aborted, with this event.
    Recorded(Event),
}

/// One access of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Who.
    pub stream: StreamId,
    /// With a SubstreamID (a PASID).
    pub substream: Option<u32>,
    /// Where.
    pub iova: Iova,
    /// How many bytes.
    pub len: u64,
    /// A write.
    pub write: bool,
    /// A privileged transaction. Those of PCIe without a PASID are not.
    pub privileged: bool,
}

/// What a transaction does, as far as permissions go.
#[derive(Clone, Copy)]
struct Manner {
    write: bool,
    privileged: bool,
}

impl Manner {
    fn may(self, entry: &TlbEntry) -> bool {
        (if self.write { entry.write } else { entry.read }) && (self.privileged || !entry.privileged)
    }

    /// What a record says of it in word 1.
    fn word(self) -> u64 {
        (if self.write { 0 } else { event::RNW.mask() }) | (if self.privileged { event::PNU.mask() } else { 0 })
    }
}

impl Model {
    /// Reads `len` bytes at `iova` as the device `stream` does: says which memory that is.
    ///
    /// # Errors
    ///
    /// [`Stopped`], at the first byte that cannot be read.
    pub fn device_read(&self, stream: StreamId, iova: Iova, len: u64) -> Result<Vec<PhysRange>, Stopped> {
        self.access(&Access { stream, substream: None, iova, len, write: false, privileged: false })
    }

    /// Writes `len` bytes at `iova` as the device `stream` does: says which memory that is.
    ///
    /// # Errors
    ///
    /// [`Stopped`], at the first byte that cannot be written.
    pub fn device_write(&self, stream: StreamId, iova: Iova, len: u64) -> Result<Vec<PhysRange>, Stopped> {
        self.access(&Access { stream, substream: None, iova, len, write: true, privileged: false })
    }

    /// Makes any access: says which memory that is.
    ///
    /// # Errors
    ///
    /// [`Stopped`], at the first byte that cannot be reached.
    pub fn access(&self, access: &Access) -> Result<Vec<PhysRange>, Stopped> {
        let mut state = self.state.lock();
        self.speculate(&mut state);
        let source = Source { sid: access.stream.get(), ssid: access.substream };
        let manner = Manner { write: access.write, privileged: access.privileged };
        let mut runs: Vec<PhysRange> = Vec::new();
        let mut at = access.iova.get();
        let end = at.saturating_add(access.len);
        while at < end {
            let step = (4096 - at % 4096).min(end - at);
            let phys = match self.translate(&mut state, source, at, manner) {
                Ok(entry) => entry.map_or(at, |entry| entry.phys + (at - entry.base)),
                Err(None) => return Err(Stopped::Silently),
                Err(Some(record)) => {
                    for _ in 0..state.behaviour.records {
                        self.record(&mut state, record);
                    }
                    return Err(Stopped::Recorded(Event::decode(record)));
                }
            };
            match runs.last_mut() {
                Some(run) if run.end().get() == phys => {
                    *run = PhysRange::new(run.start(), run.len() + step).unwrap_or(*run);
                }
                _ => runs.extend(PhysRange::new(PhysAddr::new(phys), step)),
            }
            at += step;
        }
        Ok(runs)
    }

    /// The memory type with which a device's access arrives: the MAIR byte of stage 1, or the MemAttr of stage 2 alone. `None`
    /// if it does not arrive, or arrives untranslated.
    pub fn memory_type(&self, stream: StreamId, iova: Iova) -> Option<u8> {
        let mut state = self.state.lock();
        let source = Source { sid: stream.get(), ssid: None };
        let manner = Manner { write: false, privileged: true };
        self.translate(&mut state, source, iova.get(), manner).ok().flatten().map(|entry| entry.attributes)
    }

    /// Asks for a translation as a device with ATS does, for keeping: from now on the device finds `iova` by itself, until a
    /// CMD_ATC_INV takes it back. Says whether it was granted.
    pub fn ats_request(&self, stream: StreamId, substream: Option<u32>, iova: Iova) -> bool {
        let mut state = self.state.lock();
        let source = Source { sid: stream.get(), ssid: substream };
        let manner = Manner { write: false, privileged: false };
        let granted = self.translate_by_smmu(&mut state, source, iova.get(), manner);
        let Ok(Some(entry)) = granted else { return false };
        let held = state.caches.ste.get(&source.sid).copied();
        if held.is_none_or(|held| ste::EATS.get(held.entry[1]) == 0) {
            return false;
        }
        state.caches.atc.push(AtcEntry { sid: source.sid, ssid: substream, entry });
        true
    }

    /// Translates one address. `Ok(None)` is "as it is".
    fn translate(
        &self,
        state: &mut State,
        source: Source,
        addr: u64,
        manner: Manner,
    ) -> Result<Option<TlbEntry>, Option<Record>> {
        let own = state.caches.atc.iter().find(|own| {
            own.sid == source.sid && own.ssid == source.ssid && addr.wrapping_sub(own.entry.base) < own.entry.size
        });
        if let Some(own) = own
            && manner.may(&own.entry)
        {
            let entry = own.entry;
            // A translated transaction: only the STE is looked at, for its EATS.
            self.route(state, source)?;
            let held = state.caches.ste.get(&source.sid).copied();
            if held.is_some_and(|held| ste::EATS.get(held.entry[1]) == 0) && state.regs.on(Cr0::ATSCHK) {
                return Err(Some([
                    source.head(number::F_TRANSL_FORBIDDEN),
                    manner.word() & event::RNW.mask(),
                    addr,
                    0,
                ]));
            }
            return Ok(Some(entry));
        }
        self.translate_by_smmu(state, source, addr, manner)
    }

    fn translate_by_smmu(
        &self,
        state: &mut State,
        source: Source,
        addr: u64,
        manner: Manner,
    ) -> Result<Option<TlbEntry>, Option<Record>> {
        let stages = match self.route(state, source)? {
            Route::Bypass => return Ok(None),
            Route::Translate(stages) => stages,
        };
        let entry = match state.walker(self.memory, |walker| walker.translate(&stages, addr)) {
            Ok(entry) => entry,
            Err(fault) => return Err(Some(describe(state, source, &stages, addr, manner, fault))),
        };
        // The STE may say that the stream's transactions are all of one kind.
        let can = idr1::ATTR_PERMS_OVR.is_set(u64::from(self.traits.idr1));
        let held = state.caches.ste.get(&source.sid).filter(|_| can);
        let overriding = held.map_or(0, |held| ste::PRIVCFG.get(held.entry[1]));
        let privileged = if overriding & 0b10 == 0 { manner.privileged } else { overriding == 0b11 };
        let manner = Manner { privileged, ..manner };
        if !manner.may(&entry) {
            let fault = Fault { failure: Failure::Permission, ipa: stages.first.s2.then_some(addr), table: false };
            return Err(Some(describe(state, source, &stages, addr, manner, fault)));
        }
        if !check::memory_type(&entry) {
            state.violation(format!("a memory type that does not exist: {:#x} at {addr:#x}", entry.attributes));
        }
        Ok(Some(entry))
    }

    /// Writes an event record.
    fn record(&self, state: &mut State, record: Record) {
        if !state.regs.on(Cr0::EVENTQEN) {
            return;
        }
        let size = state.event_queue();
        let (prod, cons) = (state.regs.eventq_prod, state.regs.eventq_cons);
        if size.is_full(prod, cons) {
            match state.behaviour.overflow {
                Overflow::Abort => raise(state, Gerror::EVENTQ_ABT_ERR),
                Overflow::Flag => {
                    let flag = OVFLG.mask() as u32;
                    state.regs.eventq_prod = prod & !flag | !cons & flag;
                }
            }
            return;
        }
        let base = queue_base::ADDR.address(state.regs.eventq_base);
        let at = base + size.slot(prod) as u64 * event::SIZE as u64;
        for (i, word) in (0..).zip(record) {
            if let Err(bad) = self.memory.write(at + i * 8, word) {
                state.violation(format!("the event queue is not in memory: {bad:?}"));
            }
        }
        state.regs.eventq_prod = size.advance(prod, 1) | prod & OVFLG.mask() as u32;
        if size.is_empty(prod, cons) {
            interrupt(state, Line::Events);
        }
    }

    /// Writes a record of an unknown stream.
    pub(super) fn flood(&self, state: &mut State) {
        let source = Source { sid: u32::MAX, ssid: None };
        self.record(state, [source.head(number::C_BAD_STREAMID), 0, 0, 0]);
    }

    /// Every way in which memory of `range` can be reached: translations in the TLB and in the devices, whosever they are, and
    /// what the tables hold that any stream is led to, by the caches or by memory. Besides the `streams` given, all are looked
    /// at that are cached or have an STE.
    pub fn paths_to(&self, range: PhysRange, streams: &[StreamId]) -> Vec<String> {
        let mut state = self.state.lock();
        let mut paths = Vec::new();
        let overlaps = |entry: &TlbEntry| {
            PhysRange::new(PhysAddr::new(entry.phys), entry.size).is_some_and(|mapped| mapped.overlaps(range))
        };
        // VMIDs of stage 2s that are walked below a stage 1, and of those that are all there is.
        let (mut below_others, mut alone) = (BTreeSet::new(), BTreeSet::new());
        for own in state.caches.atc.iter().filter(|own| overlaps(&own.entry)) {
            paths.push(format!("ATC: {own:x?}"));
        }
        let cached_links = state.caches.walks.clone();
        let mut sources = self.sources(&mut state);
        sources.extend(streams.iter().map(|stream| Source { sid: stream.get(), ssid: None }));
        sources.sort_unstable();
        sources.dedup();
        for source in sources {
            let Source { sid, ssid } = source;
            // As the caches have it, and as memory has it.
            for fresh in [false, true] {
                let kept = fresh.then(|| core::mem::take(&mut state.caches));
                let route = self.route(&mut state, source);
                if let Some(kept) = kept {
                    state.caches = kept;
                }
                let stages = match route {
                    Ok(Route::Bypass) => {
                        paths.push(format!("stream {sid:#x} {ssid:?} bypasses"));
                        continue;
                    }
                    Ok(Route::Translate(stages)) => stages,
                    Err(_) => continue,
                };
                if stages.first.s2 {
                    alone.insert(stages.first.tag.vmid);
                }
                below_others.extend(stages.second.map(|second| second.tag.vmid));
                state.walker(self.memory, |walker| {
                    let below = cached_links.iter().filter(|link| link.tag == stages.first.tag);
                    let mut found: Vec<_> = below.map(|link| walker.below(&stages, link)).collect();
                    found.push(walker.all(&stages, false));
                    for found in found {
                        match found {
                            Ok(found) => {
                                let hits = found.into_iter().filter(|entry| overlaps(entry));
                                paths.extend(hits.map(|entry| format!("stream {sid:#x} {ssid:?}: {entry:x?}")));
                            }
                            // Intermediate addresses of tables may be anything below a stale link.
                            Err(Fault { ipa: Some(_), .. }) => {}
                            Err(fault) => paths.push(format!("stream {sid:#x} {ssid:?}: {fault:x?}")),
                        }
                    }
                });
            }
        }
        for entry in state.caches.tlb.iter().filter(|entry| overlaps(entry)) {
            // From an intermediate address alone there is no way for a device.
            let vmid = entry.tag.vmid;
            if entry.tag.asid.is_some() || !below_others.contains(&vmid) || alone.contains(&vmid) {
                paths.push(format!("TLB: {entry:x?}"));
            }
        }
        paths
    }
}

/// The record of a fault.
fn describe(state: &mut State, source: Source, stages: &Stages, addr: u64, manner: Manner, fault: Fault) -> Record {
    let how = manner.word();
    let s2 = fault.ipa.or(stages.first.s2.then_some(addr));
    // Of stage 2 for a table of stage 1; while a table was read; for the transaction's own address.
    let class = |class| event::CLASS.put(class);
    let number = match fault.failure {
        Failure::Translation => number::F_TRANSLATION,
        Failure::AddressSize => number::F_ADDR_SIZE,
        Failure::AccessFlag => number::F_ACCESS,
        Failure::Permission => number::F_PERMISSION,
        Failure::Abort(at, bad) => {
            state.violation(format!("a walk for {addr:#x} reads {at:#x}: {bad:?}"));
            let stage = if s2.is_some() { event::S2.mask() } else { 0 };
            return [source.head(number::F_WALK_EABT), how | stage | class(1), addr, event::FETCH_ADDR.address(at)];
        }
    };
    let stage = if s2.is_some() { event::S2.mask() } else { 0 };
    let word = how | stage | class(if fault.table { 1 } else { 2 });
    [source.head(number), word, addr, s2.map_or(0, |ipa| event::IPA.address(ipa))]
}
