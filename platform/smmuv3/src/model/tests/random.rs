//! Anything, in any order: whoever reaches memory was lent it.
//!
//! Streams, spaces and pages are few, so that they collide. A plain model of what is lent says what each stream must reach; the
//! SMMU caches eagerly, and after every revocation no way to the pages may be left.

use super::super::Consumption;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const STREAMS: u32 = 3;
const SPACES: usize = 3;
const SLOTS: u64 = 6;

#[derive(Clone, Debug)]
enum Step {
    Map { space: usize, slot: u64, pages: u64, write: bool, pagewise: bool },
    Revoke { space: usize, slots: Vec<u64> },
    Attach { stream: u32, space: usize },
    Block { stream: u32 },
    Replace { space: usize },
    Touch { stream: u32, slot: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let pages = prop::sample::select(std::vec![1_u64, 2, 5, 16, 17, 64, 512, 513]);
    prop_oneof![
        (0..SPACES, 0..SLOTS, pages, any::<bool>(), any::<bool>())
            .prop_map(|(space, slot, pages, write, pagewise)| Step::Map { space, slot, pages, write, pagewise }),
        (0..SPACES, prop::collection::vec(0..SLOTS, 1..3)).prop_map(|(space, slots)| Step::Revoke { space, slots }),
        (0..STREAMS, 0..SPACES).prop_map(|(stream, space)| Step::Attach { stream, space }),
        (0..STREAMS).prop_map(|stream| Step::Block { stream }),
        (0..SPACES).prop_map(|space| Step::Replace { space }),
        (0..STREAMS, 0..SLOTS).prop_map(|(stream, slot)| Step::Touch { stream, slot }),
    ]
}

/// What is lent: by space and slot, the physical offset, the pages and whether writing is allowed.
type Lent = BTreeMap<(u64, u64), (u64, u64, bool)>;

struct World {
    rig: Rig,
    spaces: Vec<(u64, Arc<dyn AddressSpace>)>,
    attached: BTreeMap<u32, (u64, Arc<dyn AddressSpace>)>,
    lent: Lent,
    next_page: u64,
    next_space: u64,
}

fn slot_at(slot: u64) -> u64 {
    0x40_0000 + slot * 0x40_0000
}

impl World {
    fn new(traits: Traits, consumption: Consumption) -> Self {
        let rig = rig(traits);
        rig.model.eager(0..STREAMS);
        rig.model.behave(|b| b.consumption = consumption);
        let spaces = (0..SPACES as u64).map(|n| (n, rig.space())).collect();
        Self { rig, spaces, attached: BTreeMap::new(), lent: Lent::new(), next_page: 0, next_space: SPACES as u64 }
    }

    fn streams() -> Vec<StreamId> {
        (0..STREAMS).map(id).collect()
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Map { space, slot, pages, write, pagewise } => {
                let (name, space) = &self.spaces[*space];
                let mut prot = if *write { RW } else { Prot::READ };
                prot.set(Prot::PAGEWISE, *pagewise);
                let offset = self.next_page.next_multiple_of(512);
                let run = ram(offset * PAGE, pages * PAGE);
                let result = map(space, iova(slot_at(*slot), pages * PAGE), run, prot);
                prop_assert_eq!(result.is_ok(), !self.lent.contains_key(&(*name, *slot)));
                if result.is_ok() {
                    self.next_page = offset + pages;
                    self.lent.insert((*name, *slot), (offset, *pages, *write));
                }
            }
            Step::Revoke { space, slots } => {
                let (name, space) = &self.spaces[*space];
                let mut slots = slots.clone();
                slots.sort_unstable();
                slots.dedup();
                let taken: Vec<_> =
                    slots.iter().filter_map(|&slot| Some((slot, self.lent.remove(&(*name, slot))?))).collect();
                let ranges: Vec<_> =
                    taken.iter().map(|(slot, (_, pages, _))| iova(slot_at(*slot), pages * PAGE)).collect();
                prop_assert_eq!(space.revoke(&ranges), Ok(()));
                for (_, (offset, pages, _)) in taken {
                    let paths = self.rig.model.paths_to(ram(offset * PAGE, pages * PAGE), &Self::streams());
                    prop_assert!(paths.is_empty(), "{:#?}", paths);
                }
            }
            Step::Attach { stream, space } => {
                let (name, space) = &self.spaces[*space];
                self.rig.smmu.attach(id(*stream), space).unwrap();
                self.attached.insert(*stream, (*name, Arc::clone(space)));
            }
            Step::Block { stream } => {
                self.rig.smmu.block(id(*stream)).unwrap();
                self.attached.remove(stream);
            }
            Step::Replace { space } => {
                // The old one lives on as long as a stream has it; nothing can be mapped in it any more.
                let fresh = self.rig.space();
                self.spaces[*space] = (self.next_space, fresh);
                self.next_space += 1;
            }
            Step::Touch { .. } => {}
        }
        Ok(())
    }

    fn check(&self, stream: u32, slot: u64) -> Result<(), TestCaseError> {
        let lent = self.attached.get(&stream).and_then(|(name, _)| self.lent.get(&(*name, slot)));
        let at = slot_at(slot);
        let read = self.rig.reads(stream, at);
        let written = self.rig.model.device_write(id(stream), Iova::new(at), 4).is_ok();
        prop_assert_eq!(read, lent.map(|(offset, ..)| RAM + offset * PAGE));
        prop_assert_eq!(written, lent.is_some_and(|(.., write)| *write));
        if let Some((offset, pages, _)) = lent {
            let end = at + pages * PAGE;
            prop_assert_eq!(self.rig.reads(stream, end - 4), Some(RAM + (offset + pages) * PAGE - 4));
            prop_assert_eq!(self.rig.reads(stream, end), None);
        }
        Ok(())
    }
}

fn play(traits: Traits, consumption: Consumption, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut world = World::new(traits, consumption);
    for step in steps {
        world.run(step)?;
        match step {
            Step::Touch { stream, slot } => world.check(*stream, *slot)?,
            _ => (0..STREAMS).try_for_each(|stream| world.check(stream, 0))?,
        }
    }
    for stream in 0..STREAMS {
        (0..SLOTS).try_for_each(|slot| world.check(stream, slot))?;
    }
    let violations = world.rig.model.violations();
    prop_assert!(violations.is_empty(), "{:#?}", violations);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn streams_reach_what_they_were_lent_and_nothing_else(
        traits in prop::sample::select(std::vec![Traits::NESTED, Traits::OLD, Traits::STAGE2, Traits::MINIMAL]),
        slow in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let consumption = if slow { Consumption::PerLook(1) } else { Consumption::Immediate };
        play(traits, consumption, &steps)?;
    }
}
