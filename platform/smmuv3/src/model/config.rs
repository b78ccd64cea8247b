//! From a StreamID and a SubstreamID to what translates a transaction, through the configuration caches (IHI 0070, 3.3).

use super::cache::{Configuration, Fetching};
use super::memory::BadRead;
use super::walk::{Fault, Regime, Stages, Walker};
use super::{Model, State, check};
use crate::entry::{Entry, WORDS};
use crate::spec::event::{self, number};
use crate::spec::registers::{Cr0, cr2, gbpa, idr0, strtab_base, strtab_base_cfg};
use crate::spec::{Field, cd, ste};
use alloc::format;

/// Level-1 context descriptor: it links a table.
pub const L1CD_V: Field = Field::bit(0);
/// Level-1 context descriptor: address of the table of CDs.
pub const L1CD_L2PTR: Field = Field::new(51, 12);

/// What a stream's configuration makes of a transaction.
#[derive(Clone, Copy, Debug)]
pub(super) enum Route {
    /// It passes untranslated.
    Bypass,
    /// It is translated.
    Translate(Stages),
}

pub(super) type Record = [u64; event::WORDS];

/// Who sends a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Source {
    pub sid: u32,
    pub ssid: Option<u32>,
}

impl Source {
    /// The first word of a record.
    pub fn head(self, number: u8) -> u64 {
        let ssid = self.ssid.map_or(0, |ssid| event::SSV.mask() | event::SSID.put(u64::from(ssid)));
        event::NUMBER.put(u64::from(number)) | event::SID.put(u64::from(self.sid)) | ssid
    }

    pub fn record(self, number: u8) -> Option<Record> {
        Some([self.head(number), 0, 0, 0])
    }
}

impl Model {
    /// Finds what translates a transaction of `source`, through the caches.
    pub(super) fn route(&self, state: &mut State, source: Source) -> Result<Route, Option<Record>> {
        if !state.regs.on(Cr0::SMMUEN) {
            let abort = self.traits.gbpa && gbpa::ABORT.is_set(u64::from(state.regs.gbpa));
            return if abort { Err(None) } else { Ok(Route::Bypass) };
        }
        let Source { sid, ssid } = source;
        let entry = self.ste(state, sid)?;
        if !ste::V.is_set(entry[0]) {
            return Err(source.record(number::C_BAD_STE));
        }
        if let Err(what) = check::ste(&entry, &self.traits) {
            state.violation(format!("stream {sid:#x}: {what}"));
            return Err(source.record(number::C_BAD_STE));
        }
        let config = ste::CONFIG.get(entry[0]);
        if config & 0b100 == 0 {
            return Err(None);
        }
        let oas = check::output_bits(&self.traits) as u32;
        let second = (config & 0b010 != 0).then(|| Regime::stage2(&entry, oas));
        let only_second = second.map_or(Route::Bypass, |first| Route::Translate(Stages { first, second: None }));
        if config & 0b001 == 0 {
            return if ssid.is_some() { Err(source.record(number::C_BAD_SUBSTREAMID)) } else { Ok(only_second) };
        }
        let bits = ste::S1CDMAX.get(entry[0]);
        let index = match (ssid, ste::S1DSS.get(entry[1])) {
            (None, _) if bits == 0 => 0,
            (None, ste::S1DSS_TERMINATE) => return Err(source.record(number::F_STREAM_DISABLED)),
            (None, ste::S1DSS_BYPASS) => return Ok(only_second),
            (None, _) => 0,
            (Some(ssid), _) if u64::from(ssid) >> bits != 0 || bits == 0 => {
                return Err(source.record(number::C_BAD_SUBSTREAMID));
            }
            (Some(0), ste::S1DSS_SSID0) => return Err(source.record(number::F_STREAM_DISABLED)),
            (Some(ssid), _) => ssid,
        };
        let context = self.cd(state, source, &entry, second.as_ref(), index)?;
        if !cd::V.is_set(context[0]) {
            return Err(source.record(number::C_BAD_CD));
        }
        if let Err(what) = check::cd(&context, &self.traits, second.as_ref().map(|second| second.input)) {
            state.violation(format!("stream {sid:#x}: {what}"));
            return Err(source.record(number::C_BAD_CD));
        }
        if cd::EPD0.is_set(context[0]) {
            return Err(source.record(number::F_TRANSLATION));
        }
        let stage2 = idr0::S2P.is_set(u64::from(self.traits.idr0));
        let vmid = if stage2 { ste::S2VMID.get(entry[2]) as u16 } else { 0 };
        let mut first = Regime::stage1(&context, vmid, oas);
        if let Some(second) = &second {
            first.output = first.output.min(second.input.max(32));
        }
        Ok(Route::Translate(Stages { first, second }))
    }

    fn ste(&self, state: &mut State, sid: u32) -> Result<Entry, Option<Record>> {
        if let Some(held) = state.caches.ste.get(&sid) {
            return Ok(held.entry);
        }
        let source = Source { sid, ssid: None };
        let at = match self.ste_address(state, sid) {
            Ok(Some(at)) => at,
            Ok(None) => {
                let heard = cr2::RECINVSID.is_set(u64::from(state.regs.cr2));
                return Err(if heard { source.record(number::C_BAD_STREAMID) } else { None });
            }
            Err(bad) => return Err(self.not_in_memory(state, source, bad, number::F_STE_FETCH)),
        };
        // What the SMMU has begun to read it need not read again.
        let begun = state.caches.ste_fetches.remove(&sid).filter(|begun| begun.at == at);
        let fetched = self.fetch(begun.unwrap_or(Fetching::new(at)), 0xff);
        let fetched = fetched.map_err(|bad| self.not_in_memory(state, source, bad, number::F_STE_FETCH))?;
        state.caches.ste.insert(sid, Configuration { at, entry: fetched.entry });
        Ok(fetched.entry)
    }

    /// Reads the words of an entry that `words` names and that were not read yet.
    pub(super) fn fetch(&self, mut fetching: Fetching, words: u8) -> Result<Fetching, BadRead> {
        for (i, word) in (0..WORDS).zip(&mut fetching.entry) {
            let bit = 1 << i;
            if words & bit != 0 && fetching.words & bit == 0 {
                *word = self.memory.read(fetching.at + i as u64 * 8)?;
                fetching.words |= bit;
            }
        }
        Ok(fetching)
    }

    /// Where the STE of a StreamID is, if there is one.
    pub(super) fn ste_address(&self, state: &mut State, sid: u32) -> Result<Option<u64>, BadRead> {
        let config = u64::from(state.regs.strtab_base_cfg);
        if u64::from(sid) >> strtab_base_cfg::LOG2SIZE.get(config) != 0 {
            return Ok(None);
        }
        let base = strtab_base::ADDR.address(state.regs.strtab_base);
        if strtab_base_cfg::FMT.get(config) != 1 {
            return Ok(Some(base + u64::from(sid) * ste::SIZE as u64));
        }
        let split = strtab_base_cfg::SPLIT.get(config);
        let index = self.l1_index(state, sid);
        let descriptor = match state.caches.l1.get(&index) {
            Some(&(_, descriptor)) => descriptor,
            None => {
                let at = base + u64::from(index) * 8;
                let descriptor = self.memory.read(at)?;
                state.caches.l1.insert(index, (at, descriptor));
                descriptor
            }
        };
        let span = ste::L1STD_SPAN.get(descriptor);
        if span == 0 {
            return Ok(None);
        }
        let pointer = ste::L1STD_L2PTR.address(descriptor);
        let stray = descriptor & !(ste::L1STD_SPAN.mask() | ste::L1STD_L2PTR.mask());
        let bytes = 64 << (span - 1);
        if span > split + 1 || !pointer.is_multiple_of(bytes) || stray != 0 {
            state.violation(format!("a level 1 stream table descriptor {descriptor:#x}"));
            return Ok(None);
        }
        let offset = u64::from(sid) & ((1 << split) - 1);
        if offset >> (span - 1) != 0 {
            // The second level has fewer STEs than the split allows: the stream has none.
            return Ok(None);
        }
        Ok(Some(pointer + offset * ste::SIZE as u64))
    }

    fn cd(
        &self,
        state: &mut State,
        source: Source,
        stream: &Entry,
        second: Option<&Regime>,
        ssid: u32,
    ) -> Result<Entry, Option<Record>> {
        let key = (source.sid, ssid);
        if let Some(held) = state.caches.cd.get(&key) {
            return Ok(held.entry);
        }
        let Some(at) = self.cd_address(state, source, stream, second, ssid)? else {
            return Err(source.record(number::C_BAD_SUBSTREAMID));
        };
        let begun = state.caches.cd_fetches.remove(&key).filter(|begun| begun.at == at);
        let fetched = self.fetch(begun.unwrap_or(Fetching::new(at)), 0xff);
        let fetched = fetched.map_err(|bad| self.not_in_memory(state, source, bad, number::F_CD_FETCH))?;
        state.caches.cd.insert(key, Configuration { at, entry: fetched.entry });
        Ok(fetched.entry)
    }

    /// Where the CD of a SubstreamID is, if there is one.
    pub(super) fn cd_address(
        &self,
        state: &mut State,
        source: Source,
        stream: &Entry,
        second: Option<&Regime>,
        ssid: u32,
    ) -> Result<Option<u64>, Option<Record>> {
        let base = ste::S1CONTEXTPTR.address(stream[0]);
        let linear = |base: u64, index: u64| base + index * cd::SIZE as u64;
        let leaf_bits = match (ste::S1CDMAX.get(stream[0]), ste::S1FMT.get(stream[0])) {
            (0, _) => return self.context_memory(state, source, second, base).map(Some),
            (_, 0) => return self.context_memory(state, source, second, linear(base, u64::from(ssid))).map(Some),
            (_, 1) => 6,
            _ => 10,
        };
        let index = ssid >> leaf_bits;
        let descriptor = match state.caches.l1cd.get(&(source.sid, index)) {
            Some(&(_, descriptor)) => descriptor,
            None => {
                let at = self.context_memory(state, source, second, base + u64::from(index) * 8)?;
                let read = self.memory.read(at);
                let descriptor = read.map_err(|bad| self.not_in_memory(state, source, bad, number::F_CD_FETCH))?;
                state.caches.l1cd.insert((source.sid, index), (at, descriptor));
                descriptor
            }
        };
        if !L1CD_V.is_set(descriptor) {
            return Ok(None);
        }
        let table = L1CD_L2PTR.address(descriptor);
        if descriptor & !(L1CD_V.mask() | L1CD_L2PTR.mask()) != 0 || !table.is_multiple_of(64 << leaf_bits) {
            state.violation(format!("a level 1 context descriptor {descriptor:#x}"));
            return Ok(None);
        }
        let at = linear(table, u64::from(ssid) & ((1 << leaf_bits) - 1));
        self.context_memory(state, source, second, at).map(Some)
    }

    /// Contexts are found through stage 2, where there is one.
    fn context_memory(
        &self,
        state: &mut State,
        source: Source,
        second: Option<&Regime>,
        at: u64,
    ) -> Result<u64, Option<Record>> {
        let physical = state.walker(self.memory, |walker| walker.physical(second, at));
        physical.map_err(|Fault { .. }| {
            let word = event::S2.mask() | event::RNW.mask();
            Some([source.head(number::F_TRANSLATION), word, 0, event::IPA.address(at)])
        })
    }

    fn not_in_memory(&self, state: &mut State, source: Source, bad: BadRead, number: u8) -> Option<Record> {
        state.violation(format!("the configuration of stream {:#x} is not in memory: {bad:?}", source.sid));
        source.record(number)
    }
}

impl State {
    /// Walks through the caches, and notes what was noticed.
    pub(super) fn walker<T>(&mut self, memory: &super::ModelMemory, walk: impl FnOnce(&mut Walker<'_>) -> T) -> T {
        let mut findings = core::mem::take(&mut self.findings);
        let rng = self.adversary.as_mut().map(|adversary| &mut adversary.rng);
        let result = walk(&mut Walker { memory, caches: &mut self.caches, findings: &mut findings, rng });
        for finding in findings.drain(..) {
            self.violation(format!("{finding}"));
        }
        self.findings = findings;
        result
    }
}
