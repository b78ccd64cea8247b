//! Changing an STE or a CD under a running SMMU (IHI 0070, 3.21.3).
//!
//! The SMMU reads the 64-bit words of an entry one by one, in any order and at any time, and may cache any mixture of what it
//! reads until the entry is invalidated and the invalidation has completed (a *sync point*). Which bits of an entry it looks at
//! depends on the entry itself: a stream that aborts has no context pointer.
//!
//! [`update`] changes an entry so that at every moment the SMMU sees the old entry or the new one in all the bits that it
//! looks at. That is possible when, after everything has been written that the old entry does not use, one word is left to
//! change: that word is the switch, one atomic store. Otherwise the entry is made invalid in between, and the transactions of
//! that moment are aborted; [`Outcome::hitless`] says so.
//!
//! Two fields of an STE may change at any moment without making an entry a mixture of two: MEV only says how often a fault is
//! reported, and EATS only whether a device's translation requests are answered, between "no" and "in full". Where that leaves
//! one word to change, they are changed beforehand. (Not where the device could be answered in part, or stage 2 stalls.)
//!
//! # Invariants
//!
//! - Between two sync points either only bits are stored that the entry in force does not use, or a single word.
//! - A word that the new entry does not use is cleaned up only after the switch has completed.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::spec::{cd, ste};

/// 64-bit words of an STE and of a CD.
pub const WORDS: usize = 8;
/// An entry as its words.
pub type Entry = [u64; WORDS];

const _: () = assert!(ste::WORDS == WORDS && cd::WORDS == WORDS);

/// The two kinds of entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A stream table entry.
    Ste,
    /// A context descriptor.
    Cd,
}

impl Kind {
    /// The valid flag, in word 0.
    const fn valid(self) -> u64 {
        match self {
            Self::Ste => ste::V.mask(),
            Self::Cd => cd::V.mask(),
        }
    }

    /// The bits of `entry` that the SMMU may look at.
    pub fn used(self, entry: &Entry) -> Entry {
        match self {
            Self::Ste => used_ste(entry),
            Self::Cd => used_cd(entry),
        }
    }
}

/// Word 1 attributes that are in force whenever transactions are not aborted.
const OVERRIDES: u64 = ste::MEMATTR.mask()
    | ste::MTCFG.mask()
    | ste::ALLOCCFG.mask()
    | ste::NSCFG.mask()
    | ste::PRIVCFG.mask()
    | ste::INSTCFG.mask();

fn used_ste(entry: &Entry) -> Entry {
    let mut used = [0; WORDS];
    used[0] = ste::V.mask();
    if !ste::V.is_set(entry[0]) {
        return used;
    }
    used[0] |= ste::CONFIG.mask();
    let config = ste::CONFIG.get(entry[0]);
    if config & 0b100 == 0 {
        return used;
    }
    used[1] |= OVERRIDES;
    if config == ste::CONFIG_BYPASS {
        used[1] |= ste::SHCFG.mask();
    }
    if config & 0b001 != 0 {
        used[0] |= ste::S1FMT.mask() | ste::S1CONTEXTPTR.mask() | ste::S1CDMAX.mask();
        used[1] |= ste::S1DSS.mask()
            | ste::S1CIR.mask()
            | ste::S1COR.mask()
            | ste::S1CSH.mask()
            | ste::S1STALLD.mask()
            | ste::STRW.mask()
            | ste::EATS.mask()
            | ste::MEV.mask();
        if ste::S1DSS.get(entry[1]) == ste::S1DSS_BYPASS {
            used[1] |= ste::SHCFG.mask();
        }
        // It tags the TLB entries of stage 1 too, where stage 2 is implemented.
        used[2] |= ste::S2VMID.mask();
    }
    if config & 0b010 != 0 {
        used[1] |= ste::S2FWB.mask() | ste::EATS.mask() | ste::SHCFG.mask() | ste::MEV.mask();
        used[2] |= ste::S2VMID.mask()
            | ste::S2T0SZ.mask()
            | ste::S2SL0.mask()
            | ste::S2IR0.mask()
            | ste::S2OR0.mask()
            | ste::S2SH0.mask()
            | ste::S2TG.mask()
            | ste::S2PS.mask()
            | ste::S2AA64.mask()
            | ste::S2ENDI.mask()
            | ste::S2AFFD.mask()
            | ste::S2PTW.mask()
            | ste::S2S.mask()
            | ste::S2R.mask();
        used[3] |= ste::S2TTB.mask();
    }
    used
}

fn used_cd(entry: &Entry) -> Entry {
    if !cd::V.is_set(entry[0]) {
        let mut used = [0; WORDS];
        used[0] = cd::V.mask();
        return used;
    }
    let mut used = [u64::MAX; WORDS];
    if cd::EPD0.is_set(entry[0]) {
        used[0] &= !(cd::T0SZ.mask() | cd::TG0.mask() | cd::IR0.mask() | cd::OR0.mask() | cd::SH0.mask());
        used[1] &= !cd::TTB0.mask();
    }
    used
}

/// Where [`update`] writes.
pub trait Sink {
    /// Stores one word, as one 64-bit access that the SMMU sees at the latest when [`Sink::sync`] begins.
    fn store(&mut self, index: usize, word: u64);

    /// Invalidates what the SMMU has cached of the entry and waits until that has completed.
    ///
    /// # Errors
    ///
    /// What kept the invalidation from completing.
    fn sync(&mut self) -> Result<(), Error>;
}

/// How an update went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Sync points that it took.
    pub syncs: u32,
    /// Whether the SMMU saw nothing but the old entry and the new one.
    pub hitless: bool,
}

/// The bits of `old` and `new`, both in use, that may change at any moment.
fn free_to_change(kind: Kind, old: &Entry, new: &Entry, used: &Entry, wanted: &Entry) -> Entry {
    let mut free = [0; WORDS];
    if kind == Kind::Ste {
        free[1] = ste::MEV.mask();
        let part = |entry: &Entry| ste::EATS.get(entry[1]) > ste::EATS_FULL;
        let stalls = |entry: &Entry| ste::S2S.is_set(entry[2]);
        if !part(old) && !part(new) && !stalls(old) && !stalls(new) {
            free[1] |= ste::EATS.mask();
        }
    }
    core::array::from_fn(|i| free[i] & used[i] & wanted[i])
}

/// Changes an entry from `current` to `target`.
///
/// # Errors
///
/// Of [`Sink::sync`]; the entry is then somewhere on its way, in a state that works as the old one, as the new one, or (where
/// the change is not hitless) aborts.
pub fn update(kind: Kind, current: &Entry, target: &Entry, sink: &mut impl Sink) -> Result<Outcome, Error> {
    let mut writer = Writer { sink, now: *current, syncs: 0 };
    let used = kind.used(current);
    let wanted = kind.used(target);
    // The old entry, with everything that it does not use (and `free`) already as in the new one; and what is then left.
    let stage = |free: &Entry| -> Entry {
        core::array::from_fn(|i| {
            let early = !used[i] | free[i];
            (current[i] & !early) | (target[i] & early)
        })
    };
    let left = |staged: &Entry| (0..WORDS).filter(|&i| (staged[i] ^ target[i]) & wanted[i] != 0).count();
    let mut staged = stage(&[0; WORDS]);
    if left(&staged) > 1 {
        staged = stage(&free_to_change(kind, current, target, &used, &wanted));
    }
    let mut switches = (0..WORDS).filter(|&i| (staged[i] ^ target[i]) & wanted[i] != 0);
    let hitless = match (switches.next(), switches.next()) {
        (None, _) => true,
        (Some(switch), None) => {
            if seeded(Bug::StoresSwapped) {
                writer.write(|i| (i == switch).then_some(target[i]))?;
            }
            writer.write(|i| (i != switch).then_some(staged[i]))?;
            writer.write(|i| (i == switch).then_some(target[i]))?;
            kind.valid() & current[0] & target[0] != 0
        }
        (Some(_), Some(_)) => {
            writer.write(|i| (i == 0).then_some(current[0] & !kind.valid()))?;
            writer.write(|i| (i != 0).then_some(target[i]))?;
            false
        }
    };
    writer.write(|i| Some(target[i]))?;
    Ok(Outcome { syncs: writer.syncs, hitless })
}

struct Writer<'a, S> {
    sink: &'a mut S,
    now: Entry,
    syncs: u32,
}

impl<S: Sink> Writer<'_, S> {
    /// Stores the words that `word` names and that differ, and makes a sync point if there were any.
    fn write(&mut self, word: impl Fn(usize) -> Option<u64>) -> Result<(), Error> {
        let mut changed = false;
        for (i, now) in self.now.iter_mut().enumerate() {
            if let Some(word) = word(i)
                && word != *now
            {
                self.sink.store(i, word);
                *now = word;
                changed = true;
            }
        }
        if changed {
            self.syncs += 1;
            if self.syncs != 1 || !seeded(Bug::NoSyncWhenStaged) {
                self.sink.sync()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
