//! What an SMMU may do of its own accord, at any moment: speculate, prefetch, read entries word by word, consume commands when
//! it likes and carry them out in any order up to the next CMD_SYNC.
//!
//! The moments are every register access, every access of a device, and every publication or freeing of table memory. What
//! happens in each is drawn from one seeded generator: with one thread a failure repeats exactly, with several nearly so.

use super::cache::{Configuration, Fetching};
use super::config::{Route, Source};
use super::rng::Rng;
use super::{Consumption, Model, State};
use crate::spec::registers::{Cr0, strtab_base, strtab_base_cfg};
use crate::spec::ste;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// The state of the adversary.
pub(super) struct Adversary {
    pub rng: Rng,
    /// The streams that it is interested in.
    streams: Vec<u32>,
}

impl Model {
    /// From now on the SMMU does whatever it may do of its own accord, mostly with these streams, in an order that depends on
    /// `seed` alone (if one thread drives it). See the module documentation of the model for what that is.
    pub fn adversary(self: &Arc<Self>, seed: u64, streams: impl IntoIterator<Item = u32>) {
        let adversary = Adversary { rng: Rng::new(seed), streams: streams.into_iter().collect() };
        self.memory.watch(Arc::downgrade(self));
        self.state.lock().adversary = Some(adversary);
    }

    /// A moment in which something else may happen.
    pub(super) fn disturb(&self) {
        self.speculate(&mut self.state.lock());
    }

    /// Does whatever the SMMU feels like.
    pub(super) fn speculate(&self, state: &mut State) {
        self.audit(state);
        self.prefetch(state);
        let Some(adversary) = &mut state.adversary else { return };
        if adversary.rng.chance(4) {
            self.memory.evict(&mut adversary.rng);
        }
        let acts = adversary.rng.below(state.behaviour.acts).unwrap_or(0);
        for _ in 0..acts {
            self.act(state);
        }
    }

    /// Compares the caches with memory, if any was freed.
    pub(super) fn audit(&self, state: &mut State) {
        let frees = self.memory.frees();
        if state.frees != frees {
            state.frees = frees;
            for finding in super::audit::freed(&state.caches, self.memory) {
                state.violation(finding);
            }
        }
    }

    /// Drawn numbers for as long as there is an adversary.
    fn draw(&self, state: &mut State, end: u32) -> u32 {
        state.adversary.as_mut().and_then(|adversary| adversary.rng.below(end)).unwrap_or(0)
    }

    fn act(&self, state: &mut State) {
        match self.draw(state, 12) {
            0 => self.complete_one(state),
            1 if state.behaviour.consumption == Consumption::Random => {
                for _ in 0..self.draw(state, 3) {
                    self.consume(state);
                }
            }
            2 | 3 => self.read_some_ste(state),
            4 | 5 => self.read_some_cd(state),
            6 => {
                // The configuration alone.
                if let Some(source) = self.someone(state) {
                    let _ = self.route_if_on(state, source);
                }
            }
            7 => {
                if let Some(source) = self.someone(state)
                    && let Some(Route::Translate(stages)) = self.route_if_on(state, source)
                {
                    let _ = state.walker(self.memory, |walker| walker.all(&stages, true));
                }
            }
            _ => {
                if let Some(source) = self.someone(state)
                    && let Some(Route::Translate(stages)) = self.route_if_on(state, source)
                {
                    // A walk to where something is mapped, or a little beyond it. What fails is not an event: nobody asked.
                    let beyond = u64::from(self.draw(state, 4) / 3) << stages.first.granule;
                    state.walker(self.memory, |walker| {
                        if let Some(addr) = walker.somewhere(&stages) {
                            let _ = walker.translate(&stages, addr + beyond);
                        }
                    });
                }
            }
        }
    }

    fn route_if_on(&self, state: &mut State, source: Source) -> Option<Route> {
        state.regs.on(Cr0::SMMUEN).then(|| self.route(state, source).ok()).flatten()
    }

    /// One of the streams of interest, or a neighbour.
    fn someone(&self, state: &mut State) -> Option<Source> {
        let count = u32::try_from(state.adversary.as_ref()?.streams.len()).ok()?;
        let pick = self.draw(state, count) as usize;
        let sid = *state.adversary.as_ref()?.streams.get(pick)?;
        let sid = if self.draw(state, 16) == 0 { sid ^ 1 } else { sid };
        let ssid = match self.draw(state, 4) {
            0 if self.traits.idr1 >> 6 & 0x1f != 0 => Some(self.draw(state, 4)),
            _ => None,
        };
        Some(Source { sid, ssid })
    }

    /// Completes one of the invalidations that wait for a CMD_SYNC, whichever.
    fn complete_one(&self, state: &mut State) {
        let count = u32::try_from(state.pending.len()).unwrap_or(u32::MAX);
        if count != 0 {
            let pick = self.draw(state, count) as usize;
            let invalidation = state.pending.swap_remove(pick);
            state.caches.invalidate(invalidation);
        }
    }

    /// Reads some words of an STE; the others another time.
    fn read_some_ste(&self, state: &mut State) {
        let Some(Source { sid, .. }) = self.someone(state).filter(|_| state.regs.on(Cr0::SMMUEN)) else { return };
        if state.caches.ste.contains_key(&sid) {
            return;
        }
        let Ok(Some(at)) = self.ste_address(state, sid) else { return };
        let words = self.draw(state, 256) as u8;
        let begun = state.caches.ste_fetches.get(&sid).copied().filter(|begun| begun.at == at);
        let Ok(fetched) = self.fetch(begun.unwrap_or(Fetching::new(at)), words) else { return };
        if fetched.words == 0xff {
            state.caches.ste_fetches.remove(&sid);
            state.caches.ste.insert(sid, Configuration { at, entry: fetched.entry });
        } else {
            state.caches.ste_fetches.insert(sid, fetched);
        }
    }

    /// Reads some words of a CD, of a stream whose STE is cached and has no stage 2.
    fn read_some_cd(&self, state: &mut State) {
        let Some(source) = self.someone(state).filter(|_| state.regs.on(Cr0::SMMUEN)) else { return };
        let Source { sid, ssid } = source;
        let ssid = ssid.unwrap_or(0);
        let Some(stream) = state.caches.ste.get(&sid).map(|held| held.entry) else { return };
        let translates = ste::V.is_set(stream[0]) && ste::CONFIG.get(stream[0]) == ste::CONFIG_S1;
        let beyond = u64::from(ssid) >> ste::S1CDMAX.get(stream[0]) != 0;
        if !translates || beyond || state.caches.cd.contains_key(&(sid, ssid)) {
            return;
        }
        let Ok(Some(at)) = self.cd_address(state, source, &stream, None, ssid) else { return };
        let words = self.draw(state, 256) as u8;
        let begun = state.caches.cd_fetches.get(&(sid, ssid)).copied().filter(|begun| begun.at == at);
        let Ok(fetched) = self.fetch(begun.unwrap_or(Fetching::new(at)), words) else { return };
        if fetched.words == 0xff {
            state.caches.cd_fetches.remove(&(sid, ssid));
            state.caches.cd.insert((sid, ssid), Configuration { at, entry: fetched.entry });
        } else {
            state.caches.cd_fetches.insert((sid, ssid), fetched);
        }
    }

    /// Loads into the caches what the eager streams can reach.
    fn prefetch(&self, state: &mut State) {
        if state.eager.is_empty() || !state.regs.on(Cr0::SMMUEN) {
            return;
        }
        for sid in state.eager.clone() {
            let Ok(Route::Translate(stages)) = self.route(state, Source { sid, ssid: None }) else { continue };
            if let Err(fault) = state.walker(self.memory, |walker| walker.all(&stages, true)) {
                state.violation(alloc::format!("a prefetch fails: {fault:x?}"));
            }
        }
    }

    /// Everybody who may have a way to memory: whoever is cached, and whoever has an STE.
    pub(super) fn sources(&self, state: &mut State) -> Vec<Source> {
        let plain = |sid| Source { sid, ssid: None };
        let mut sources: Vec<Source> = state.caches.ste.keys().copied().map(plain).collect();
        let contexts = state.caches.cd.keys();
        sources.extend(contexts.map(|&(sid, ssid)| Source { sid, ssid: Some(ssid) }));
        if !state.regs.on(Cr0::SMMUEN) {
            return sources;
        }
        let config = u64::from(state.regs.strtab_base_cfg);
        let log2 = strtab_base_cfg::LOG2SIZE.get(config).min(24);
        let base = strtab_base::ADDR.address(state.regs.strtab_base);
        let (split, first) = if strtab_base_cfg::FMT.get(config) == 1 {
            let split = strtab_base_cfg::SPLIT.get(config);
            (split, self.memory.read_run(base, 1 << log2.saturating_sub(split)).unwrap_or_default())
        } else {
            (log2, alloc::vec![base | (log2 + 1)])
        };
        for (index, descriptor) in (0_u32..).zip(first) {
            let span = ste::L1STD_SPAN.get(descriptor);
            if span == 0 {
                continue;
            }
            let words = self.memory.read_run(ste::L1STD_L2PTR.address(descriptor), ste::WORDS << (span - 1).min(16));
            let entries = words.unwrap_or_default();
            for (offset, entry) in (0_u32..).zip(entries.chunks_exact(ste::WORDS)) {
                let word = entry.first().copied().unwrap_or(0);
                if ste::V.is_set(word) && ste::CONFIG.get(word) != ste::CONFIG_ABORT {
                    let sid = index << split | offset;
                    sources.push(plain(sid));
                    let substreams = 1_u32 << ste::S1CDMAX.get(word).min(10);
                    if substreams > 1 {
                        sources.extend((0..substreams).map(|ssid| Source { sid, ssid: Some(ssid) }));
                    }
                }
            }
        }
        sources
    }
}
