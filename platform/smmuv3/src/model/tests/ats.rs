//! Devices that cache translations.
//!
//! Seen red: no CMD_ATC_INV in a revocation, or for another SubstreamID, or one page short; CMD_ATC_INV in the same batch as the
//! TLB invalidation; none when a space is replaced; a
//! stream with ATS not on the list of its space, or never taken off it.

use super::*;
use crate::spec::command::opcode;
use iommu::{AttachError, RevokeError};

fn atc_invalidations(rig: &Rig) -> usize {
    rig.model.take_log().iter().filter(|&&code| u64::from(code) == opcode::ATC_INV).count()
}

#[test]
fn a_device_with_ats_reaches_nothing_that_was_revoked_although_it_had_cached_it() {
    for seed in 0..40 {
        let rig = rig(FULL);
        let space = rig.attached(8);
        rig.smmu.enable_ats(id(8)).unwrap();
        map(&space, iova(0x7000, 4 * PAGE), ram(0, 4 * PAGE), RW).unwrap();
        rig.model.adversary(seed, [8]);
        for page in 0..4 {
            assert!(rig.model.ats_request(id(8), None, Iova::new(0x7000 + page * PAGE)));
        }
        // Three pages from an odd one: two commands.
        space.revoke(&[iova(0x7000, 3 * PAGE)]).unwrap();
        let paths = rig.model.paths_to(ram(0, 3 * PAGE), &[]);
        assert!(paths.is_empty(), "seed {seed}: {paths:#?}");
        assert_eq!(rig.reads(8, 0x7000), None);
        assert_eq!(rig.reads(8, 0xa000), Some(RAM + 3 * PAGE));
        rig.model.assert_clean();
    }
}

#[test]
fn the_range_is_split_exactly_and_waits_for_the_tlb_first() {
    let rig = rig(FULL);
    let space = rig.attached(8);
    rig.smmu.enable_ats(id(8)).unwrap();
    map(&space, iova(0x7000, 3 * PAGE), ram(0, 3 * PAGE), RW).unwrap();
    rig.model.take_log();
    space.revoke(&[iova(0x7000, 3 * PAGE)]).unwrap();
    let (va, atc, sync) = (opcode::TLBI_NH_VA as u8, opcode::ATC_INV as u8, opcode::SYNC as u8);
    assert_eq!(rig.model.take_log(), [va, sync, atc, atc, sync]);
}

#[test]
fn without_ats_nothing_is_asked_for_and_nothing_is_granted() {
    let rig = rig(FULL);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert!(!rig.model.ats_request(id(8), None, Iova::new(0x1000)));
    rig.model.take_log();
    space.revoke(&[iova(0x1000, PAGE)]).unwrap();
    assert_eq!(atc_invalidations(&rig), 0);
    let old = super::rig(Traits::NESTED);
    assert_eq!(old.smmu.enable_ats(id(8)), Err(AttachError::Unsupported("ATS")));
}

#[test]
fn what_the_device_cached_of_a_space_that_was_replaced_or_taken_away_is_gone() {
    for seed in 0..20 {
        let rig = rig(FULL);
        let (a, b) = (rig.attached(8), rig.space());
        rig.smmu.enable_ats(id(8)).unwrap();
        map(&a, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        map(&b, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
        rig.model.adversary(seed, [8]);
        assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
        rig.smmu.attach(id(8), &b).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM + PAGE));
        assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
        rig.smmu.block(id(8)).unwrap();
        assert_eq!(rig.reads(8, 0x1000), None);
        drop((a, b));
        assert!(rig.model.paths_to(ram(0, 2 * PAGE), &[]).is_empty());
        // Still on when it comes back.
        let c = rig.attached(8);
        map(&c, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
        c.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn each_substream_is_invalidated_under_its_own_number() {
    for seed in 0..20 {
        let rig = rig(FULL);
        let (default, shared) = (rig.attached(8), rig.space());
        rig.smmu.enable_ats(id(8)).unwrap();
        rig.smmu.attach_substream(id(8), 3, &shared).unwrap();
        rig.smmu.attach_substream(id(8), 9, &shared).unwrap();
        rig.model.adversary(seed, [8]);
        map(&default, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
        map(&shared, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
        for substream in [None, Some(3), Some(9)] {
            assert!(rig.model.ats_request(id(8), substream, Iova::new(0x1000)));
        }
        rig.model.take_log();
        shared.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert_eq!(atc_invalidations(&rig), 2);
        assert_eq!((rig.reads_as(8, 3, 0x1000), rig.reads_as(8, 9, 0x1000)), (None, None));
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        assert!(rig.model.paths_to(ram(PAGE, PAGE), &[]).is_empty());
        // A detached one takes its cache with it.
        map(&shared, iova(0x1000, PAGE), ram(PAGE, PAGE), RW).unwrap();
        assert!(rig.model.ats_request(id(8), Some(3), Iova::new(0x1000)));
        rig.smmu.detach_substream(id(8), 3).unwrap();
        rig.smmu.detach_substream(id(8), 9).unwrap();
        shared.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert!(rig.model.paths_to(ram(PAGE, PAGE), &[]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn switched_off_it_forgets_everything_and_is_left_alone() {
    let rig = rig(FULL);
    let space = rig.attached(8);
    rig.smmu.enable_ats(id(8)).unwrap();
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
    rig.smmu.disable_ats(id(8)).unwrap();
    assert!(!rig.model.ats_request(id(8), None, Iova::new(0x1000)));
    rig.model.take_log();
    space.revoke(&[iova(0x1000, PAGE)]).unwrap();
    assert_eq!(atc_invalidations(&rig), 0);
    assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
    rig.model.assert_clean();
}

#[test]
fn a_device_that_does_not_answer_makes_the_revocation_fail_and_the_next_one_take_everything() {
    let rig = rig_with(FULL, hasty());
    let space = rig.attached(8);
    rig.smmu.enable_ats(id(8)).unwrap();
    map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW).unwrap();
    assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
    rig.model.behave(|b| b.atc_timeouts = 1);
    let failed = space.revoke(&[iova(0x1000, PAGE)]);
    assert!(matches!(failed, Err(RevokeError::Dead | RevokeError::TimedOut)), "{failed:?}");
    // The next, of something else, makes up for it.
    space.revoke(&[iova(0x2000, PAGE)]).unwrap();
    assert!(rig.model.paths_to(ram(0, 2 * PAGE), &[]).is_empty());
    assert!(!rig.smmu.is_dead());
}

#[test]
fn a_device_that_does_not_answer_when_its_space_is_taken_keeps_it_out_of_reuse() {
    let rig = rig_with(FULL, hasty());
    let space = rig.attached(8);
    rig.smmu.enable_ats(id(8)).unwrap();
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert!(rig.model.ats_request(id(8), None, Iova::new(0x1000)));
    rig.model.behave(|b| b.atc_timeouts = 1);
    assert!(rig.smmu.block(id(8)).is_err());
    assert_eq!(rig.reads(8, 0x1000), None, "the STE aborts translated accesses too");
    // It is still a client of the space: revoking asks it again.
    space.revoke(&[iova(0x1000, PAGE)]).unwrap();
    assert!(rig.model.paths_to(ram(0, PAGE), &[]).is_empty());
    assert_eq!(rig.smmu.statistics().leaked_spaces, 1);
}
