//! What becomes of a device's access: STE, CD, translation, or an event (IHI 0070, 3.3, 3.4 and 7.3).

use super::cache::{TlbEntry, WalkEntry};
use super::commands::raise;
use super::walk::{Failure, Regime};
use super::{Model, Overflow, State, check};
use crate::entry::{Entry, WORDS};
use crate::spec::event::{self, Event, number};
use crate::spec::registers::{Cr0, Gerror, IrqCtrl, OVFLG, cr2, gbpa, idr0, queue_base, strtab_base, strtab_base_cfg};
use crate::spec::{cd, ste};
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

/// What a stream's configuration makes of a transaction.
enum Route {
    Bypass,
    Translate(Regime),
}

type Record = [u64; event::WORDS];

impl Model {
    /// Reads `len` bytes at `iova` as the device `stream` does: says which memory that is.
    ///
    /// # Errors
    ///
    /// [`Stopped`], at the first byte that cannot be read.
    pub fn device_read(&self, stream: StreamId, iova: Iova, len: u64) -> Result<Vec<PhysRange>, Stopped> {
        self.access(stream.get(), iova.get(), len, false)
    }

    /// Writes `len` bytes at `iova` as the device `stream` does: says which memory that is.
    ///
    /// # Errors
    ///
    /// [`Stopped`], at the first byte that cannot be written.
    pub fn device_write(&self, stream: StreamId, iova: Iova, len: u64) -> Result<Vec<PhysRange>, Stopped> {
        self.access(stream.get(), iova.get(), len, true)
    }

    fn access(&self, sid: u32, iova: u64, len: u64, write: bool) -> Result<Vec<PhysRange>, Stopped> {
        let mut state = self.state.lock();
        let mut runs: Vec<PhysRange> = Vec::new();
        let mut at = iova;
        let end = iova.saturating_add(len);
        while at < end {
            let step = (4096 - at % 4096).min(end - at);
            let phys = match self.translate(&mut state, sid, at, write) {
                Ok(phys) => phys,
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

    fn translate(&self, state: &mut State, sid: u32, addr: u64, write: bool) -> Result<u64, Option<Record>> {
        let regime = match self.route(state, sid)? {
            Route::Bypass => return Ok(addr),
            Route::Translate(regime) => regime,
        };
        let rnw = if write { 0 } else { event::RNW.mask() };
        let s2 = if regime.s2 { event::S2.mask() } else { 0 };
        let ipa = if regime.s2 { event::IPA.address(addr) } else { 0 };
        let fault = |number, class| Some([head(number, sid), rnw | s2 | event::CLASS.put(class), addr, ipa]);
        let cached = state.caches.tlb.iter().find(|entry| entry.tag == regime.tag && covers(entry, addr)).copied();
        let entry = match cached {
            Some(entry) => entry,
            None => {
                let mut links = Vec::new();
                let found = regime.walk(self.memory, addr, &state.caches.walks, &mut links);
                remember(&mut state.caches.walks, links);
                match found {
                    Ok(entry) => {
                        state.caches.tlb.push(entry);
                        entry
                    }
                    Err(Failure::Translation) => return Err(fault(number::F_TRANSLATION, 2)),
                    Err(Failure::AddressSize) => return Err(fault(number::F_ADDR_SIZE, 2)),
                    Err(Failure::AccessFlag) => return Err(fault(number::F_ACCESS, 2)),
                    Err(Failure::Abort(at, bad)) => {
                        state.violation(format!("a walk for {addr:#x} reads {at:#x}: {bad:?}"));
                        let mut record = fault(number::F_WALK_EABT, 1);
                        if let Some(record) = &mut record {
                            record[3] = event::FETCH_ADDR.address(at);
                        }
                        return Err(record);
                    }
                }
            }
        };
        if write && !entry.write || !write && !entry.read {
            return Err(fault(number::F_PERMISSION, 2));
        }
        Ok(entry.phys + (addr - entry.base))
    }

    /// Finds a stream's regime, through the caches.
    fn route(&self, state: &mut State, sid: u32) -> Result<Route, Option<Record>> {
        if !state.regs.on(Cr0::SMMUEN) {
            let abort = self.traits.gbpa && gbpa::ABORT.is_set(u64::from(state.regs.gbpa));
            return if abort { Err(None) } else { Ok(Route::Bypass) };
        }
        let entry = self.ste(state, sid)?;
        if !ste::V.is_set(entry[0]) {
            return Err(Some([head(number::C_BAD_STE, sid), 0, 0, 0]));
        }
        if let Err(what) = check::ste(&entry, &self.traits) {
            state.violation(format!("stream {sid:#x}: {what}"));
            return Err(Some([head(number::C_BAD_STE, sid), 0, 0, 0]));
        }
        let oas = check::output_bits(&self.traits) as u32;
        match ste::CONFIG.get(entry[0]) {
            ste::CONFIG_BYPASS => Ok(Route::Bypass),
            ste::CONFIG_S1 => {
                let context = self.cd(state, sid, &entry)?;
                if !cd::V.is_set(context[0]) {
                    return Err(Some([head(number::C_BAD_CD, sid), 0, 0, 0]));
                }
                if let Err(what) = check::cd(&context, &self.traits) {
                    state.violation(format!("stream {sid:#x}: {what}"));
                    return Err(Some([head(number::C_BAD_CD, sid), 0, 0, 0]));
                }
                let stage2 = idr0::S2P.is_set(u64::from(self.traits.idr0));
                let vmid = if stage2 { ste::S2VMID.get(entry[2]) as u16 } else { 0 };
                Ok(Route::Translate(Regime::stage1(&context, vmid, oas)))
            }
            ste::CONFIG_S2 => Ok(Route::Translate(Regime::stage2(&entry, oas))),
            ste::CONFIG_NESTED => {
                state.violation("nested translation is not modelled".into());
                Err(None)
            }
            _ => Err(None),
        }
    }

    fn ste(&self, state: &mut State, sid: u32) -> Result<Entry, Option<Record>> {
        if let Some(entry) = state.caches.ste.get(&sid) {
            return Ok(*entry);
        }
        let bad = cr2::RECINVSID.is_set(u64::from(state.regs.cr2));
        let no_stream = Err(bad.then_some([head(number::C_BAD_STREAMID, sid), 0, 0, 0]));
        let config = u64::from(state.regs.strtab_base_cfg);
        if u64::from(sid) >> strtab_base_cfg::LOG2SIZE.get(config) != 0 {
            return no_stream;
        }
        let base = strtab_base::ADDR.address(state.regs.strtab_base);
        let at = if strtab_base_cfg::FMT.get(config) == 1 {
            let split = strtab_base_cfg::SPLIT.get(config);
            let index = self.l1_index(state, sid);
            let descriptor = match state.caches.l1.get(&index) {
                Some(descriptor) => *descriptor,
                None => {
                    let read = self.memory.read(base + u64::from(index) * 8);
                    let descriptor = self.fetched(state, sid, read, number::F_STE_FETCH)?;
                    state.caches.l1.insert(index, descriptor);
                    descriptor
                }
            };
            let span = ste::L1STD_SPAN.get(descriptor);
            if span == 0 {
                return no_stream;
            }
            let pointer = ste::L1STD_L2PTR.address(descriptor);
            if span != split + 1 || !pointer.is_multiple_of(64 << split) {
                state.violation(format!("a level 1 descriptor {descriptor:#x}"));
                return no_stream;
            }
            pointer + (u64::from(sid) & ((1 << split) - 1)) * ste::SIZE as u64
        } else {
            base + u64::from(sid) * ste::SIZE as u64
        };
        let mut entry = [0; WORDS];
        for (i, word) in (0..).zip(&mut entry) {
            *word = self.fetched(state, sid, self.memory.read(at + i * 8), number::F_STE_FETCH)?;
        }
        state.caches.ste.insert(sid, entry);
        Ok(entry)
    }

    fn cd(&self, state: &mut State, sid: u32, stream: &Entry) -> Result<Entry, Option<Record>> {
        if let Some(entry) = state.caches.cd.get(&sid) {
            return Ok(*entry);
        }
        let at = ste::S1CONTEXTPTR.address(stream[0]);
        let mut entry = [0; WORDS];
        for (i, word) in (0..).zip(&mut entry) {
            *word = self.fetched(state, sid, self.memory.read(at + i * 8), number::F_CD_FETCH)?;
        }
        state.caches.cd.insert(sid, entry);
        Ok(entry)
    }

    fn fetched(
        &self,
        state: &mut State,
        sid: u32,
        read: Result<u64, super::memory::BadRead>,
        number: u8,
    ) -> Result<u64, Option<Record>> {
        read.map_err(|bad| {
            state.violation(format!("the configuration of stream {sid:#x} is not in memory: {bad:?}"));
            Some([head(number, sid), 0, 0, 0])
        })
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
        if size.is_empty(prod, cons) && state.regs.irq_ctrl & IrqCtrl::EVENTQ_IRQEN.bits() != 0 {
            state.interrupts.events = true;
        }
    }

    /// Loads into the caches what the eager streams can reach.
    pub(super) fn prefetch(&self, state: &mut State) {
        if state.eager.is_empty() || !state.regs.on(Cr0::SMMUEN) {
            return;
        }
        for sid in state.eager.clone() {
            let Ok(Route::Translate(regime)) = self.route(state, sid) else { continue };
            self.fill(state, &regime);
        }
    }

    fn fill(&self, state: &mut State, regime: &Regime) {
        let mut links = Vec::new();
        match regime.all(self.memory, &mut links) {
            Ok(found) => {
                remember(&mut state.caches.walks, links);
                for entry in found {
                    if !state.caches.tlb.contains(&entry) {
                        state.caches.tlb.push(entry);
                    }
                }
            }
            Err(failure) => state.violation(format!("a prefetch fails: {failure:x?}")),
        }
    }

    /// Every way in which memory of `range` can be reached: translations in the TLB, whosever they are, and what the tables
    /// hold that `streams` are led to by the caches or by memory.
    pub fn paths_to(&self, range: PhysRange, streams: &[StreamId]) -> Vec<String> {
        let mut state = self.state.lock();
        let mut paths = Vec::new();
        let overlaps = |entry: &TlbEntry| {
            PhysRange::new(PhysAddr::new(entry.phys), entry.size).is_some_and(|mapped| mapped.overlaps(range))
        };
        for entry in state.caches.tlb.iter().filter(|entry| overlaps(entry)) {
            paths.push(format!("TLB: {entry:x?}"));
        }
        let cached_links = state.caches.walks.clone();
        for stream in streams {
            let sid = stream.get();
            // As the caches have it, and as memory has it.
            for fresh in [false, true] {
                let kept = fresh.then(|| core::mem::take(&mut state.caches));
                let route = self.route(&mut state, sid);
                if let Some(kept) = kept {
                    state.caches = kept;
                }
                let regime = match route {
                    Ok(Route::Bypass) => {
                        paths.push(format!("stream {sid:#x} bypasses"));
                        continue;
                    }
                    Ok(Route::Translate(regime)) => regime,
                    Err(_) => continue,
                };
                let below = cached_links.iter().filter(|link| link.tag == regime.tag);
                let found = below.map(|link| regime.below(self.memory, link));
                let found = found.chain([regime.all(self.memory, &mut Vec::new())]);
                for found in found {
                    match found {
                        Ok(found) => {
                            let hits = found.into_iter().filter(|entry| overlaps(entry));
                            paths.extend(hits.map(|entry| format!("stream {sid:#x}: {entry:x?}")));
                        }
                        Err(failure) => paths.push(format!("stream {sid:#x}: {failure:x?}")),
                    }
                }
            }
        }
        paths
    }
}

fn head(number: u8, sid: u32) -> u64 {
    event::NUMBER.put(u64::from(number)) | event::SID.put(u64::from(sid))
}

fn covers(entry: &TlbEntry, addr: u64) -> bool {
    addr.checked_sub(entry.base).is_some_and(|offset| offset < entry.size)
}

fn remember(walks: &mut Vec<WalkEntry>, links: Vec<WalkEntry>) {
    for link in links {
        if !walks.contains(&link) {
            walks.push(link);
        }
    }
}
