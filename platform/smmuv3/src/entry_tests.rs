//! Every state that the SMMU can see during an update, by brute force.
//!
//! The checker keeps, for each word, every value that was in memory since the last completed invalidation, and after each
//! store looks at *every* combination of them: that is what an SMMU may have cached.
//!
//! How few sync points there can be is computed anew here, for every random pair.
//!
//! Seen red: the switch before the staged words; the switch and the clean-up in one go; `used` without S1CONTEXTPTR.

use super::*;
use crate::descriptors;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

struct Checker {
    kind: Kind,
    old: Entry,
    new: Entry,
    seen: [Vec<u64>; WORDS],
    must_be_hitless: bool,
    /// Bits of word 1 that may be as in either.
    free: u64,
    fail_at: Option<u32>,
    syncs: u32,
    wrong: Vec<Entry>,
}

impl Checker {
    fn new(kind: Kind, old: Entry, new: Entry) -> Self {
        let seen = old.map(|word| vec![word]);
        let whole = [old, new].iter().all(|entry| ste::EATS.get(entry[1]) <= 1 && entry[2] & ste::S2S.mask() == 0);
        let free = ste::MEV.mask() | if whole { ste::EATS.mask() } else { 0 };
        Self { kind, old, new, seen, free, must_be_hitless: true, fail_at: None, syncs: 0, wrong: Vec::new() }
    }

    /// Whether the SMMU does the same with both, but for what may change at any moment: how often faults are reported, and
    /// whether translation requests are answered in full or not at all.
    fn matches(&self, entry: &Entry, like: &Entry) -> bool {
        let used = self.kind.used(entry);
        let used_like = self.kind.used(like);
        let free = |i| if self.kind == Kind::Ste && i == 1 { self.free } else { 0 };
        (0..WORDS).all(|i| (entry[i] & used[i]) & !free(i) == (like[i] & used_like[i]) & !free(i))
    }

    fn check(&mut self) {
        let combinations: usize = self.seen.iter().map(Vec::len).product();
        for mut number in 0..combinations {
            let entry: Entry = core::array::from_fn(|i| {
                let choice = number % self.seen[i].len();
                number /= self.seen[i].len();
                self.seen[i][choice]
            });
            let invalid = entry[0] & self.kind.valid() == 0;
            if !(self.matches(&entry, &self.old)
                || self.matches(&entry, &self.new)
                || (invalid && !self.must_be_hitless))
            {
                self.wrong.push(entry);
            }
        }
    }
}

impl Sink for Checker {
    fn store(&mut self, index: usize, word: u64) {
        self.seen[index].push(word);
        self.check();
    }

    fn sync(&mut self) -> Result<(), Error> {
        self.syncs += 1;
        if self.fail_at == Some(self.syncs) {
            return Err(Error::SyncTimedOut);
        }
        for seen in &mut self.seen {
            *seen = vec![*seen.last().unwrap()];
        }
        Ok(())
    }
}

fn run(kind: Kind, old: Entry, new: Entry, hitless: bool) -> Outcome {
    let mut checker = Checker::new(kind, old, new);
    checker.must_be_hitless = hitless;
    let outcome = update(kind, &old, &new, &mut checker).unwrap();
    assert_eq!(checker.wrong, Vec::<Entry>::new(), "{old:x?} -> {new:x?}");
    for (seen, word) in checker.seen.iter().zip(new) {
        assert_eq!(seen, &vec![word], "the update did not end with the new entry, invalidated");
    }
    assert_eq!(outcome.hitless, hitless);
    assert_eq!(outcome.syncs, checker.syncs);
    outcome
}

fn abort() -> Entry {
    descriptors::ste_abort()
}
fn bypass() -> Entry {
    descriptors::ste_bypass(true)
}
fn s1(pointer: u64) -> Entry {
    descriptors::ste_stage1(pointer, true)
}
fn s1_dss(pointer: u64, dss: u64) -> Entry {
    let mut entry = s1(pointer);
    entry[0] |= ste::S1CDMAX.put(5);
    entry[1] = ste::S1DSS.set(entry[1], dss);
    if dss == ste::S1DSS_BYPASS {
        entry[1] |= ste::SHCFG.put(ste::SHCFG_INCOMING);
    }
    entry
}
fn s2(table: u64) -> Entry {
    let mut entry = [0; WORDS];
    entry[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_S2);
    entry[1] = ste::SHCFG.put(ste::SHCFG_INCOMING);
    entry[2] = ste::S2T0SZ.put(20) | ste::S2AA64.mask() | ste::S2R.mask();
    entry[3] = ste::S2TTB.address(table);
    entry
}
fn with(mut entry: Entry, word: usize, bits: u64) -> Entry {
    entry[word] |= bits;
    entry
}

#[test]
fn changes_between_kinds_of_streams_are_hitless_with_few_sync_points() {
    let ats = ste::EATS.put(1);
    for (old, new, syncs) in [
        (bypass(), abort(), 2),
        (abort(), bypass(), 2),
        (s1(0x1000), abort(), 2),
        (abort(), s1(0x1000), 2),
        (s1_dss(0x1000, ste::S1DSS_SSID0), bypass(), 3),
        (bypass(), s1_dss(0x1000, ste::S1DSS_SSID0), 3),
        (s1_dss(0x1000, ste::S1DSS_BYPASS), bypass(), 2),
        (bypass(), s1_dss(0x1000, ste::S1DSS_BYPASS), 2),
        (s2(0x2000), abort(), 2),
        (abort(), s2(0x2000), 2),
        (s2(0x2000), bypass(), 2),
        (bypass(), s2(0x2000), 2),
        (with(s1(0x1000), 1, ats), with(s2(0x2000), 1, ats), 3),
        (with(s2(0x2000), 1, ats), with(s1(0x1000), 1, ats), 3),
        (with(s1(0x1000), 1, ste::S1STALLD.mask()), with(s2(0x2000), 2, ste::S2S.mask()), 3),
        (with(s2(0x2000), 2, ste::S2S.mask()), with(s1(0x1000), 1, ste::S1STALLD.mask()), 3),
        (s1(0x1000), s1(0x1040), 1),
    ] {
        assert_eq!(run(Kind::Ste, old, new, true).syncs, syncs, "{old:x?} -> {new:x?}");
    }
}

/// Stage 1 over stage 2, as substreams over a parent have it, with ATS and merged events.
fn nested(pointer: u64, dss: u64) -> Entry {
    let stage1 = with(s1_dss(pointer, dss), 1, ste::EATS.put(1) | ste::MEV.mask());
    descriptors::ste_nested(&stage1, &s2(0x2000))
}

#[test]
fn nested_with_stage_1_bypassed_and_its_stage_2_alone_change_into_one_another() {
    let (both, alone) = (nested(0x1000, ste::S1DSS_BYPASS), s2(0x2000));
    assert_eq!(run(Kind::Ste, both, alone, true).syncs, 3);
    assert_eq!(run(Kind::Ste, alone, both, true).syncs, 2);
}

#[test]
fn nested_spaces_of_one_parent_replace_one_another_by_one_store() {
    let (a, b) = (nested(0x1000, ste::S1DSS_SSID0), nested(0x1040, ste::S1DSS_SSID0));
    assert_eq!(run(Kind::Ste, a, b, true).syncs, 1);
    assert_eq!(run(Kind::Ste, a, abort(), true).syncs, 2);
    assert_eq!(run(Kind::Ste, abort(), a, true).syncs, 2);
}

#[test]
fn translation_requests_are_allowed_and_forbidden_with_or_without_another_change_and_hitless() {
    let ats = |entry| with(entry, 1, ste::EATS.put(1));
    assert_eq!(run(Kind::Ste, s1(0x1000), ats(s1(0x1000)), true).syncs, 1);
    assert_eq!(run(Kind::Ste, ats(s1(0x1000)), s1(0x1000), true).syncs, 1);
    assert_eq!(run(Kind::Ste, s1(0x1000), ats(s1(0x1040)), true).syncs, 2);
    assert_eq!(run(Kind::Ste, ats(s1(0x1000)), s1(0x1040), true).syncs, 2);
    assert_eq!(run(Kind::Ste, ats(s1(0x1000)), abort(), true).syncs, 2);
}

#[test]
fn translation_requests_are_no_free_choice_where_they_are_answered_in_part_or_stage_2_stalls() {
    let mut split = nested(0x1000, ste::S1DSS_SSID0);
    split[1] = ste::EATS.set(split[1], ste::EATS_SPLIT);
    let plain = descriptors::ste_nested(&s1_dss(0x4000, ste::S1DSS_SSID0), &s2(0x2000));
    assert_eq!(run(Kind::Ste, split, plain, false).syncs, 3);
    let stalls = with(with(s2(0x2000), 2, ste::S2S.mask()), 1, ste::EATS.put(1));
    let elsewhere = with(s2(0x4000), 2, ste::S2S.mask());
    assert_eq!(run(Kind::Ste, stalls, elsewhere, false).syncs, 3);
}

/// As few sync points as there can be: none for nothing, one for one word, two more at most for what goes before and after.
fn fewest(kind: Kind, old: &Entry, new: &Entry) -> u32 {
    let differing = (0..WORDS).filter(|&i| old[i] != new[i]).count();
    let (used, wanted) = (kind.used(old), kind.used(new));
    let switch: Vec<usize> =
        (0..WORDS).filter(|&i| ((old[i] & used[i]) | (new[i] & !used[i])) & wanted[i] != new[i] & wanted[i]).collect();
    match (differing, &switch[..]) {
        (0, _) => 0,
        (1, _) | (_, []) => 1,
        // What the old entry does not use of the other words goes before; what the new one does not use of them, behind.
        (_, [switch]) => {
            let others = || (0..WORDS).filter(|i| i != switch);
            let before = others().any(|i| (old[i] ^ new[i]) & !used[i] != 0);
            let behind = others().any(|i| (old[i] ^ new[i]) & used[i] != 0);
            1 + u32::from(before) + u32::from(behind)
        }
        _ => 3,
    }
}

#[test]
fn a_change_of_ssid0_to_bypass_in_one_word_takes_one_sync_point() {
    // SHCFG and S1DSS share a word.
    let (a, b) = (s1_dss(0x1000, ste::S1DSS_SSID0), s1_dss(0x1000, ste::S1DSS_BYPASS));
    assert_eq!(run(Kind::Ste, a, b, true).syncs, 1);
    assert_eq!(run(Kind::Ste, b, a, true).syncs, 1);
}

#[test]
fn a_change_of_two_words_in_use_passes_through_an_invalid_entry() {
    let outcome = run(Kind::Ste, s1_dss(0x1000, ste::S1DSS_BYPASS), s1_dss(0x4000, ste::S1DSS_SSID0), false);
    assert_eq!(outcome.syncs, 3);
}

#[test]
fn a_change_of_stage_and_vmid_together_passes_through_an_invalid_entry() {
    // The VMID tags what stage 1 puts into the TLB too.
    let outcome = run(Kind::Ste, s1(0x1000), with(s2(0x2000), 2, ste::S2VMID.put(3)), false);
    assert_eq!(outcome.syncs, 3);
}

#[test]
fn context_descriptors_change_as_their_fields_allow() {
    let a = descriptors::cd(&descriptors::CdFields { asid: 4, ttb0: 0x1000, ..descriptors::CdFields::TEST });
    let b = descriptors::cd(&descriptors::CdFields { asid: 5, ttb0: 0x1000, ..descriptors::CdFields::TEST });
    assert_eq!(run(Kind::Cd, a, b, true).syncs, 1);
    assert_eq!(run(Kind::Cd, [0; WORDS], a, false).syncs, 2);
    assert_eq!(run(Kind::Cd, a, [0; WORDS], false).syncs, 2);
    let mut released = a;
    released[0] = (released[0] | cd::EPD0.mask())
        & !(cd::T0SZ.mask() | cd::TG0.mask() | cd::IR0.mask() | cd::OR0.mask() | cd::SH0.mask());
    released[1] = 0;
    assert_eq!(run(Kind::Cd, a, released, true).syncs, 2);
    assert_eq!(run(Kind::Cd, released, a, true).syncs, 2);
}

#[test]
fn an_entry_that_does_not_change_is_not_touched() {
    assert_eq!(run(Kind::Ste, s1(0x1000), s1(0x1000), true).syncs, 0);
}

#[test]
fn a_failed_sync_stops_the_update_in_a_state_that_was_allowed() {
    for at in 1..=3 {
        let (old, new) = (s1_dss(0x1000, ste::S1DSS_SSID0), bypass());
        let mut checker = Checker::new(Kind::Ste, old, new);
        checker.fail_at = Some(at);
        assert_eq!(update(Kind::Ste, &old, &new, &mut checker), Err(Error::SyncTimedOut));
        assert!(checker.wrong.is_empty());
    }
}

/// STEs of all kinds, with arbitrary contents in the fields.
fn any_ste() -> impl Strategy<Value = Entry> {
    (0_u64..8, any::<[u64; 8]>(), prop::bool::weighted(0.9)).prop_map(|(config, mut words, valid)| {
        words[0] = ste::CONFIG.set(words[0], config) & !ste::V.mask() | u64::from(valid);
        words
    })
}

fn any_cd() -> impl Strategy<Value = Entry> {
    (any::<[u64; 8]>(), any::<bool>(), prop::bool::weighted(0.9)).prop_map(|(mut words, epd0, valid)| {
        words[0] = cd::V.set(cd::EPD0.set(words[0], u64::from(epd0)), u64::from(valid));
        words
    })
}

/// Two entries that differ in a few fields only, as two of one driver do.
fn near(words: impl Strategy<Value = Entry>) -> impl Strategy<Value = (Entry, Entry)> {
    (words, prop::collection::vec((0..4_usize, 0..64_u32), 0..4)).prop_map(|(old, flips)| {
        let mut new = old;
        for (word, bit) in flips {
            new[word] ^= 1 << bit;
        }
        (old, new)
    })
}

proptest! {
    #[test]
    fn no_update_of_an_ste_to_a_similar_one_ever_shows_a_mixture((old, new) in near(any_ste())) {
        check_any(Kind::Ste, old, new)?;
    }

    #[test]
    fn no_update_of_a_cd_to_a_similar_one_ever_shows_a_mixture((old, new) in near(any_cd())) {
        check_any(Kind::Cd, old, new)?;
    }

    #[test]
    fn no_update_of_an_ste_ever_shows_a_mixture(old in any_ste(), new in any_ste()) {
        check_any(Kind::Ste, old, new)?;
    }

    #[test]
    fn no_update_of_a_cd_ever_shows_a_mixture(old in any_cd(), new in any_cd()) {
        check_any(Kind::Cd, old, new)?;
    }
}

fn check_any(kind: Kind, old: Entry, new: Entry) -> Result<(), TestCaseError> {
    let mut checker = Checker::new(kind, old, new);
    checker.must_be_hitless = false;
    let outcome = update(kind, &old, &new, &mut checker).unwrap();
    prop_assert!(checker.wrong.is_empty());
    let sees_invalid = (old[0] & new[0] & kind.valid() == 0) || !outcome.hitless;
    prop_assert!(sees_invalid || outcome.hitless);
    if outcome.hitless {
        let mut strict = Checker::new(kind, old, new);
        update(kind, &old, &new, &mut strict).unwrap();
        prop_assert!(strict.wrong.is_empty());
    }
    prop_assert!(outcome.syncs <= 3);
    prop_assert!(outcome.syncs <= fewest(kind, &old, &new), "{} are too many", outcome.syncs);
    // Through an invalid entry only where two words are left that must change together.
    let valid = old[0] & new[0] & kind.valid() != 0;
    prop_assert!(!valid || outcome.hitless || fewest(kind, &old, &new) == 3);
    Ok(())
}
