//! The contract of revocation.
//!
//! Seen red: no TLBI, with and without ranges; TLBI before the leaves are cleared; no CMD_SYNC; completion not awaited; the
//! wrong ASID; the wrong VMID, for stage 1 and for stage 2; a wrong TTL, or always that of pages; a range one page short; the
//! invalidation of everything left out where it stands for many; a refused TLBI taken for success; a time-out taken for success,
//! or forgotten; retry after a failure without, or with too narrow an, invalidation.

use super::super::Consumption;
use super::*;
use crate::spec::command::opcode;
use iommu::RevokeError;

const ALL: [Traits; 4] = [Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL];

#[test]
fn after_ok_no_stream_finds_a_way_to_the_memory() {
    for traits in ALL {
        let rig = rig(traits);
        rig.model.eager([8, 9]);
        let space = rig.attached(8);
        rig.smmu.attach(id(9), &space).unwrap();
        for (pages, prot) in [(1, RW), (3, RW), (16, RW), (33, RW), (512, RW), (1024, RW), (700, RW | Prot::PAGEWISE)] {
            let len = pages * PAGE;
            map(&space, iova(0x20_0000, len), ram(0, len), prot).unwrap();
            assert_eq!(rig.reads(8, 0x20_0000), Some(RAM));
            assert_eq!(rig.reads(9, 0x20_0000 + len - 4), Some(RAM + len - 4));
            assert_eq!(space.revoke(&[iova(0x20_0000, len)]), Ok(()));
            assert_eq!(rig.model.paths_to(ram(0, len), &[id(8), id(9)]), Vec::<alloc::string::String>::new());
            assert_eq!(rig.reads(8, 0x20_0000 + len - 4), None);
        }
        rig.model.assert_clean();
    }
}

#[test]
fn what_was_not_revoked_stays() {
    for traits in ALL {
        let rig = rig(traits);
        rig.model.eager([8]);
        let space = rig.attached(8);
        map(&space, iova(0x1000, 7 * PAGE), ram(0, 7 * PAGE), RW | Prot::PAGEWISE).unwrap();
        space.revoke(&[iova(0x3000, 3 * PAGE)]).unwrap();
        let reached: Vec<bool> = (0..7).map(|page| rig.reads(8, 0x1000 + page * PAGE).is_some()).collect();
        assert_eq!(reached, [true, true, false, false, false, true, true]);
        rig.model.assert_clean();
    }
}

#[test]
fn a_mebibyte_of_scattered_pages_goes_with_one_range_invalidation_and_one_sync() {
    let rig = rig(Traits::NESTED);
    let space = rig.attached(8);
    let runs: Vec<_> = (0..256).map(|page| ram(page * 3 * PAGE, PAGE)).collect();
    #[allow(unsafe_code)]
    // SAFETY: the model's devices access no memory.
    unsafe { space.map(iova(0x10_0000, 1 << 20), &runs, RW) }.unwrap();
    rig.model.take_log();
    space.revoke(&[iova(0x10_0000, 1 << 20)]).unwrap();
    assert_eq!(rig.model.take_log(), [opcode::TLBI_NH_VA as u8, opcode::SYNC as u8]);
}

#[test]
fn ranges_that_lie_one_behind_the_other_are_invalidated_as_one() {
    const TLBI: u8 = opcode::TLBI_NH_VA as u8;
    const SYNC: u8 = opcode::SYNC as u8;
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    let page = |n: u64| iova(0x10_0000 + n * PAGE, PAGE);
    let revoked = |ranges: &[IovaRange]| {
        for range in ranges {
            let back = range.start().get() - 0x10_0000;
            map(&space, *range, ram(back, range.len()), RW | Prot::PAGEWISE).unwrap();
        }
        rig.model.take_log();
        space.revoke(ranges).unwrap();
        assert!(rig.model.paths_to(ram(0, 32 << 20), &[id(8)]).is_empty());
        rig.model.take_log()
    };
    assert_eq!(revoked(&(0..16).map(page).collect::<Vec<_>>()), [TLBI, SYNC]);
    // Ranges of several lengths, with a gap before the last: 16 pages in one piece, then another.
    let ranges = [iova(0x10_0000, 3 * PAGE), iova(0x10_3000, PAGE), iova(0x10_4000, 12 * PAGE), iova(0x20_0000, PAGE)];
    assert_eq!(revoked(&ranges), [TLBI, TLBI, SYNC]);
    // Not in order, nothing is behind another.
    assert_eq!(revoked(&[page(2), page(1), page(0)]), [TLBI, TLBI, TLBI, SYNC]);
    // A block behind pages is another kind of leaf, of which the level hint says so.
    let block = iova(0x20_0000, 0x20_0000);
    map(&space, iova(0x1f_f000, PAGE), ram(0, PAGE), RW).unwrap();
    map(&space, block, ram(0x20_0000, 0x20_0000), RW).unwrap();
    rig.model.take_log();
    space.revoke(&[iova(0x1f_f000, PAGE), block]).unwrap();
    assert_eq!(rig.model.take_log(), [TLBI, TLBI, SYNC]);
    rig.model.assert_clean();
}

#[test]
fn many_ranges_are_completed_by_one_sync() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    let ranges: Vec<_> = (0..40).map(|n| iova(0x1_0000 + n * 4 * PAGE, PAGE)).collect();
    for (n, &range) in (0..).zip(&ranges) {
        map(&space, range, ram(n * PAGE, PAGE), RW).unwrap();
    }
    let before = rig.smmu.statistics();
    space.revoke(&ranges).unwrap();
    let cost = rig.smmu.statistics().since(&before);
    assert_eq!((cost.address_invalidations, cost.syncs, cost.broad_invalidations), (40, 1, 0));
    assert!(rig.model.paths_to(ram(0, 40 * PAGE), &[id(8)]).is_empty());
    rig.model.assert_clean();
}

#[test]
fn more_ranges_than_are_worth_it_are_invalidated_as_a_whole() {
    for traits in ALL {
        let rig = rig(traits);
        rig.model.eager([8]);
        let space = rig.attached(8);
        let ranges: Vec<_> = (0..300).map(|n| iova(0x1_0000 + n * 4 * PAGE, PAGE)).collect();
        for (n, &range) in (0..).zip(&ranges) {
            map(&space, range, ram(n * PAGE, PAGE), RW).unwrap();
        }
        let before = rig.smmu.statistics();
        space.revoke(&ranges).unwrap();
        let cost = rig.smmu.statistics().since(&before);
        assert_eq!((cost.syncs, cost.broad_invalidations), (1, 1));
        assert!(rig.model.paths_to(ram(0, 300 * PAGE), &[id(8)]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn blocks_and_pages_in_one_range_are_all_gone() {
    for traits in ALL {
        let rig = rig(traits);
        rig.model.eager([8]);
        let space = rig.attached(8);
        let len = (1 << 22) + 5 * PAGE;
        map(&space, iova(0x20_0000, len), ram(0, len), RW).unwrap();
        assert_eq!(space.revoke(&[iova(0x20_0000, len)]), Ok(()));
        assert!(rig.model.paths_to(ram(0, len), &[id(8)]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn a_range_that_was_not_mapped_is_reported_and_the_rest_is_gone() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    assert_eq!(space.revoke(&[iova(0x1000, 2 * PAGE)]), Err(RevokeError::NotMapped(Iova::new(0x2000))));
    assert!(rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty());
    let outside = iova(1 << 40, PAGE);
    assert_eq!(space.revoke(&[outside]), Err(RevokeError::OutOfAperture(outside)));
    assert_eq!(space.revoke(&[]), Ok(()));
}

#[test]
fn a_range_that_cuts_a_block_changes_nothing_but_those_before_it_are_gone() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    map(&space, iova(0x20_0000, 0x20_0000), ram(0x20_0000, 0x20_0000), RW).unwrap();
    let ranges = [iova(0x1000, PAGE), iova(0x20_0000, PAGE)];
    assert_eq!(space.revoke(&ranges), Err(RevokeError::SplitsBlock(Iova::new(0x20_0000))));
    assert!(rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty());
    assert_eq!(rig.reads(8, 0x20_0000), Some(RAM + 0x20_0000));
}

#[test]
fn a_revocation_that_is_not_completed_is_never_called_ok() {
    for traits in ALL {
        let rig = rig_with(traits, hasty());
        let space = rig.attached(8);
        map(&space, iova(0x1000, 2 * PAGE), ram(0, 2 * PAGE), RW | Prot::PAGEWISE).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM));
        rig.model.behave(|b| b.consumption = Consumption::Stuck);
        assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::TimedOut));
        assert_eq!(rig.reads(8, 0x1000), Some(RAM), "the model still has it in its TLB, as an SMMU may");
        assert!(rig.smmu.is_dead());
        assert_eq!(space.revoke(&[iova(0x1000, PAGE)]), Err(RevokeError::Dead));
        assert_eq!(space.revoke(&[iova(0x2000, PAGE)]), Err(RevokeError::Dead));
        assert_eq!(rig.smmu.statistics().sync_timeouts, 1, "a dead SMMU is not waited for again");
        // It wakes up.
        rig.model.behave(|b| b.consumption = Consumption::Immediate);
        rig.model.run();
        assert!(!rig.smmu.is_dead());
        // Nothing is mapped there any more, but the TLB had it: this must not be taken for "nothing to do".
        let second = iova(0x2000, PAGE);
        assert_eq!(space.revoke(&[second]), Err(RevokeError::NotMapped(Iova::new(0x2000))));
        assert!(rig.model.paths_to(ram(0, 2 * PAGE), &[id(8)]).is_empty());
        rig.model.assert_clean();
    }
}

#[test]
fn what_a_failed_revocation_left_in_the_tlb_goes_with_the_next_whatever_its_level() {
    let rig = rig(Traits::NESTED);
    let space = rig.attached(8);
    let block = iova(0x20_0000, 0x20_0000);
    map(&space, block, ram(0, 0x20_0000), RW).unwrap();
    assert_eq!(rig.reads(8, 0x20_0000), Some(RAM));
    // The invalidation of the block is refused: the TLB keeps it.
    rig.model.behave(|b| b.refuse = Some(opcode::TLBI_NH_VA as u8));
    assert_eq!(space.revoke(&[block]), Err(RevokeError::Dead));
    assert_eq!(rig.reads(8, 0x20_0000), Some(RAM));
    // Pages are mapped there, and revoked: a hint at their level alone would leave the block.
    map(&space, iova(0x20_0000, PAGE), ram(0x40_0000, PAGE), RW).unwrap();
    assert_eq!(space.revoke(&[iova(0x20_0000, PAGE)]), Ok(()));
    assert!(rig.model.paths_to(ram(0, 0x60_0000), &[id(8)]).is_empty());
    let before = rig.smmu.statistics();
    map(&space, iova(0x20_0000, PAGE), ram(0x40_0000, PAGE), RW).unwrap();
    assert_eq!(space.revoke(&[iova(0x20_0000, PAGE)]), Ok(()));
    let cost = rig.smmu.statistics().since(&before);
    assert_eq!((cost.broad_invalidations, cost.address_invalidations), (0, 1), "healed");
}

#[test]
fn lost_publications_show_as_failure_and_never_as_ok() {
    let rig = rig_with(Traits::MINIMAL, hasty());
    let space = rig.attached(8);
    map(&space, iova(0x1000, PAGE), ram(0, PAGE), RW).unwrap();
    rig.memory.lose_publications(true);
    // Neither the cleared leaf nor the commands reach the SMMU.
    assert!(space.revoke(&[iova(0x1000, PAGE)]).is_err());
    assert!(!rig.model.paths_to(ram(0, PAGE), &[id(8)]).is_empty());
}

#[test]
fn a_page_is_reached_again_after_it_was_mapped_again() {
    let rig = rig(Traits::NESTED);
    rig.model.eager([8]);
    let space = rig.attached(8);
    for round in 0..20 {
        map(&space, iova(0x1000, PAGE), ram(round * PAGE, PAGE), RW).unwrap();
        assert_eq!(rig.reads(8, 0x1000), Some(RAM + round * PAGE));
        space.revoke(&[iova(0x1000, PAGE)]).unwrap();
        assert_eq!(rig.reads(8, 0x1000), None);
    }
    rig.model.assert_clean();
}
