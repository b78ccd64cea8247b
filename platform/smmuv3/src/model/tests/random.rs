//! Anything, in any order: whoever reaches memory was lent it.
//!
//! The SMMU caches all it can, or does what an adversary likes; after every revocation no way to the pages may be left, of
//! whatever stream.
//!
//! Seen red: an invalidation prepared for a leaf or a contiguous group that covers its first page only.

use super::super::Consumption;
use super::super::rng::Rng;
use super::world::{SIZES, SLOTS, SPACES, STREAMS, Step, World};
use super::*;
use proptest::prelude::*;

fn step() -> impl Strategy<Value = Step> {
    let pages = prop::sample::select(SIZES.to_vec());
    prop_oneof![
        4 => (0..SPACES, 0..SLOTS, pages, any::<bool>(), any::<bool>())
            .prop_map(|(space, slot, pages, write, pagewise)| Step::Map { space, slot, pages, write, pagewise }),
        4 => (0..SPACES, prop::collection::vec(0..SLOTS, 1..3))
            .prop_map(|(space, slots)| Step::Revoke { space, slots }),
        3 => (0..STREAMS, 0..SPACES).prop_map(|(stream, space)| Step::Attach { stream, space }),
        1 => (0..STREAMS).prop_map(|stream| Step::Block { stream }),
        1 => (0..STREAMS).prop_map(|stream| Step::Bypass { stream }),
        1 => (0..SPACES).prop_map(|space| Step::Replace { space }),
        1 => (0..STREAMS, 0..SPACES, 0..SPACES).prop_map(|(stream, one, other)| Step::Swap { stream, one, other }),
        2 => (0..STREAMS, any::<u64>(), any::<bool>())
            .prop_map(|(stream, at, write)| Step::Hostile { stream, at: at >> 8, write }),
        1 => (0..STREAMS, 0..SLOTS).prop_map(|(stream, slot)| Step::Touch { stream, slot }),
    ]
}

fn traits() -> impl Strategy<Value = Traits> {
    prop::sample::select(std::vec![Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(96), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn streams_reach_what_they_were_lent_and_nothing_else(
        traits in traits(),
        slow in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let consumption = if slow { Consumption::PerLook(1) } else { Consumption::Immediate };
        let rig = rig(traits);
        rig.model.eager(0..STREAMS);
        let played = World::new(rig, consumption).and_then(|mut world| world.play(&steps));
        prop_assert_eq!(played, Ok(()));
    }

    #[test]
    fn an_adversary_finds_no_way_that_was_not_lent(
        traits in traits(),
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let rig = rig(traits);
        rig.model.adversary(seed, 0..STREAMS);
        let played = World::new(rig, Consumption::Random).and_then(|mut world| world.play(&steps));
        prop_assert_eq!(played, Ok(()));
    }
}

/// What each thread does: its own streams and space, and one space that all attach to.
fn thread(rig: &Rig, shared: &Arc<dyn AddressSpace>, number: u32, seed: u64) {
    let mut rng = Rng::new(seed ^ u64::from(number) << 32);
    let (stream, other) = (2 * number, 2 * number + 1);
    let mut space = rig.attached(stream);
    for round in 0..30 {
        let page = 0x1_0000 * u64::from(number) + 0x400 * round;
        let pages = SIZES[rng.below(SIZES.len() as u32).unwrap() as usize];
        let at = 0x40_0000 * (1 + u64::from(number));
        let memory = ram(page * PAGE, pages * PAGE);
        map(&space, iova(at, pages * PAGE), memory, RW).unwrap();
        assert_eq!(rig.reads(stream, at), Some(RAM + page * PAGE));
        match rng.below(4) {
            Some(0) => rig.smmu.attach(id(other), &space).unwrap(),
            Some(1) => rig.smmu.attach(id(other), shared).unwrap(),
            Some(2) => rig.smmu.block(id(other)).unwrap(),
            _ => {}
        }
        // A neighbour's addresses, and its streams: whatever becomes of it, this space is not reached through them.
        let foreign = rng.below(8).unwrap();
        if foreign / 2 != number {
            assert_ne!(rig.reads(foreign, at), Some(RAM + page * PAGE), "stream {foreign} of thread {number}");
        }
        space.revoke(&[iova(at, pages * PAGE)]).unwrap();
        assert_eq!(rig.model.paths_to(memory, &[]), Vec::<alloc::string::String>::new());
        assert_eq!(rig.reads(stream, at), None);
        // In the space that all share, each has a page of its own.
        let mine = iova(0x1000_0000 + u64::from(number) * PAGE, PAGE);
        let memory = ram((page + 0x300) * PAGE, PAGE);
        map(shared, mine, memory, RW).unwrap();
        shared.revoke(&[mine]).unwrap();
        assert_eq!(rig.model.paths_to(memory, &[]), Vec::<alloc::string::String>::new());
        if rng.chance(5) {
            space = rig.attached(stream);
        }
    }
}

#[test]
fn threads_that_map_revoke_attach_and_swap_leave_no_way_either() {
    for seed in 0..12 {
        let traits = [Traits::NESTED, Traits::STAGE2, Traits::MINIMAL][seed as usize % 3];
        let rig = rig(traits);
        rig.model.adversary(seed, 0..8);
        rig.model.behave(|b| b.consumption = Consumption::Random);
        let shared = rig.space();
        std::thread::scope(|scope| {
            for number in 0..4 {
                let (rig, shared) = (&rig, &shared);
                scope.spawn(move || thread(rig, shared, number, seed));
            }
        });
        rig.model.assert_clean();
    }
}
