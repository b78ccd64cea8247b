//! The allocator of runs against brute force.

use super::*;
use crate::fakes::{FakeMemory, FakeMemoryConfig};
use alloc::collections::BTreeMap;
use proptest::prelude::*;

fn pool(bytes: u64) -> Pool {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    Pool::new("pool", memory, bytes, PhysAddr::new(u64::MAX)).unwrap()
}

/// A carve-out that begins `pages` pages into a multiple of the size of a set.
fn carve_out(pages: u64, len: u64) -> Pool {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let range = PhysRange::new(PhysAddr::new(0x1_0000_0000 + pages * PAGE_SIZE), len).unwrap();
    let ptr = NonNull::from(alloc::vec![0_u8; to_usize(len)].leak()).cast();
    // SAFETY: leaked memory, of which nobody has a pointer.
    unsafe { Pool::carve_out("pool", range, ptr, memory) }.unwrap()
}

#[test]
fn runs_of_every_length_are_found_where_slot_by_slot_they_are_free() {
    let maps = [0, u128::MAX, 0xff00_ff00, 1 << 127, !1, 0x5555_5555_5555_5555_5555, u128::MAX << 64, u128::MAX >> 3];
    for map in maps {
        for count in 1..=SLOTS {
            let free = |slot: u32| slot < SLOTS && map & (1 << slot) != 0;
            let brute = (0..SLOTS).filter(|first| (*first..first + count).all(free));
            let brute = brute.fold(0_u128, |bits, first| bits | 1 << first);
            assert_eq!(starts(map, count), brute, "{map:#x} {count}");
        }
    }
}

#[test]
fn slots_of_every_alignment_and_phase_are_those_of_their_addresses() {
    for base in [0, SLOT, 7 * SLOT, 128 * SLOT, 0x1234_5678 * SLOT] {
        for align in (11..24).map(|bits| 1_u64 << bits) {
            for phase in [0, SLOT, 3 * SLOT, align / 2].map(|phase| phase / SLOT * SLOT % align) {
                let brute = (0..SLOTS).filter(|slot| (base + u64::from(*slot) * SLOT) % align == phase);
                let brute = brute.fold(0_u128, |bits, slot| bits | 1 << slot);
                assert_eq!(aligned(PhysAddr::new(base), align, phase), brute, "{base:#x} {align:#x} {phase:#x}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Take { bytes: u64, align: u64, phase: u64 },
    Give(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let small = 1..4 * SLOT;
    let bytes = prop_oneof![3 => small, 2 => 1..MAX_RUN + 1, 1 => Just(MAX_RUN), 1 => Just(MAX_RUN + 1)];
    prop_oneof![
        3 => (bytes, 0..10_u32, any::<u64>()).prop_map(|(bytes, bits, phase)| {
            let align = SLOT << bits;
            Step::Take { bytes, align, phase: phase % align }
        }),
        2 => any::<usize>().prop_map(Step::Give),
    ]
}

/// The pool's memory slot by slot: whose each is.
struct Reference {
    slots: BTreeMap<u64, bool>,
}

impl Reference {
    fn new(pool: &Pool) -> Self {
        let of =
            |set: &Set| (0..u64::from(set.slots)).map(|slot| (set.phys.get() + slot * SLOT, false)).collect::<Vec<_>>();
        Self { slots: pool.sets.iter().flat_map(of).collect() }
    }

    fn run(first: u64, count: u64) -> impl Iterator<Item = u64> {
        (0..count).map(move |slot| first + slot * SLOT)
    }

    /// Whether there is a run, in one set.
    fn has(&self, pool: &Pool, count: u64, align: u64, phase: u64) -> bool {
        let fits = |first: &u64| {
            let set = pool.sets.iter().find(|set| set.range().contains(PhysAddr::new(*first)));
            let inside = |slot| set.is_some_and(|set| set.range().contains(PhysAddr::new(slot)));
            first % align == phase / SLOT * SLOT
                && Self::run(*first, count).all(|slot| inside(slot) && self.slots.get(&slot) == Some(&false))
        };
        self.slots.keys().any(fits)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Caught: `take` that does not clear the whole run; a spill that leaves out an area; `aligned` without the address of the set.
    #[test]
    fn a_run_is_had_exactly_when_there_is_one_and_is_nobody_elses(
        steps in prop::collection::vec(step(), 1..150),
        kind in 0..3_u8,
    ) {
        let pool = match kind {
            0 => pool(2 * MAX_RUN),
            1 => carve_out(0, 3 * MAX_RUN),
            _ => carve_out(3, MAX_RUN + 5 * PAGE_SIZE),
        };
        let mut reference = Reference::new(&pool);
        let mut taken: Vec<Run> = Vec::new();
        for step in steps {
            match step {
                Step::Take { bytes, align, phase } => {
                    let count = bytes.div_ceil(SLOT);
                    let expected = bytes <= MAX_RUN && reference.has(&pool, count, align, phase);
                    let run = pool.take(bytes, align, phase);
                    prop_assert_eq!(run.is_some(), expected);
                    let Some(run) = run else { continue };
                    let memory = pool.memory_of(run).unwrap();
                    prop_assert_eq!(memory.bytes, count * SLOT);
                    prop_assert_eq!(memory.phys.get() % align, phase / SLOT * SLOT);
                    for slot in Reference::run(memory.phys.get(), count) {
                        prop_assert_eq!(reference.slots.insert(slot, true), Some(false));
                    }
                    taken.push(run);
                }
                Step::Give(which) if !taken.is_empty() => {
                    let run = taken.swap_remove(which % taken.len());
                    let memory = pool.memory_of(run).unwrap();
                    for slot in Reference::run(memory.phys.get(), memory.bytes / SLOT) {
                        reference.slots.insert(slot, false);
                    }
                    pool.give(run);
                }
                Step::Give(_) => {}
            }
            prop_assert_eq!(pool.used(), reference.slots.values().filter(|taken| **taken).count() as u64 * SLOT);
        }
        for run in taken {
            pool.give(run);
        }
        prop_assert_eq!(pool.used(), 0);
    }
}

/// Caught: `take` that does not clear the whole run.
#[test]
fn no_slot_is_two_cores_at_once() {
    use std::sync::atomic::AtomicBool;
    let pool = Arc::new(pool(4 * MAX_RUN));
    let slots: Arc<Vec<AtomicBool>> = Arc::new((0..pool.len() / SLOT).map(|_| AtomicBool::new(false)).collect());
    let number = |run: Run| run.set as usize * SLOTS as usize + usize::from(run.first);
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| {
            let (pool, slots) = (pool.clone(), slots.clone());
            std::thread::spawn(move || {
                let mut seed = thread + 1;
                let mut held: Vec<Run> = Vec::new();
                for _ in 0..20_000 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let bytes = 1 + (seed >> 33) % (12 * SLOT);
                    match pool.take(bytes, SLOT << ((seed >> 20) % 4), 0) {
                        Some(run) if seed >> 62 != 0 || held.len() < 4 => {
                            for slot in 0..usize::from(run.count) {
                                assert!(!slots[number(run) + slot].swap(true, Ordering::SeqCst));
                            }
                            held.push(run);
                        }
                        Some(run) => pool.give(run),
                        None => {}
                    }
                    if held.len() > 60 || (seed >> 40) % 3 == 0 {
                        let Some(run) = held.pop() else { continue };
                        for slot in 0..usize::from(run.count) {
                            assert!(slots[number(run) + slot].swap(false, Ordering::SeqCst));
                        }
                        pool.give(run);
                    }
                }
                for run in held {
                    for slot in 0..usize::from(run.count) {
                        assert!(slots[number(run) + slot].swap(false, Ordering::SeqCst));
                    }
                    pool.give(run);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(pool.used(), 0);
    assert!(pool.take(MAX_RUN, MAX_RUN, 0).is_some());
}

#[test]
fn an_area_that_is_full_is_helped_out_by_the_others() {
    let pool = pool(3 * MAX_RUN);
    assert_eq!(pool.areas.len(), 3);
    let runs: Vec<Run> = (0..3).map(|_| pool.take(MAX_RUN, SLOT, 0).unwrap()).collect();
    assert!(pool.take(1, SLOT, 0).is_none());
    for run in runs {
        pool.give(run);
    }
    assert_eq!(pool.used(), 0);
}

#[test]
fn a_run_that_comes_back_twice_is_given_once() {
    let pool = pool(MAX_RUN);
    let run = pool.take(5 * SLOT, SLOT, 0).unwrap();
    pool.give(run);
    let other = pool.take(5 * SLOT, SLOT, 0).unwrap();
    assert_eq!(run, other);
    pool.give(other);
    pool.give(other);
    assert_eq!(pool.used(), 0);
}

#[test]
fn a_pool_is_as_large_as_memory_allows_and_refused_where_there_is_none() {
    let range = PhysRange::new(PhysAddr::new(0x4000_0000), 5 * MAX_RUN / 2).unwrap();
    let memory = FakeMemory::new(FakeMemoryConfig { range, gap: 0, snooped: true });
    let pool = Pool::new("small", memory, 10 * MAX_RUN, PhysAddr::new(u64::MAX)).unwrap();
    assert_eq!(pool.len(), 2 * MAX_RUN);
    assert_eq!(Pool::new("none", memory, 1, PhysAddr::new(0xfff)).unwrap_err(), Error::OutOfMemory);
    drop(pool);
    assert_eq!((memory.live_allocations(), memory.violations().len()), (0, 0));
}

#[test]
fn memory_of_a_restricted_pool_comes_and_goes_within_its_limits() {
    let pool: &'static Pool = alloc::boxed::Box::leak(alloc::boxed::Box::new(carve_out(0, MAX_RUN)));
    let chunk = Chunk::zeroed(pool, PageRequest::anywhere(3 * PAGE_SIZE)).unwrap();
    assert!(pool.covers(chunk.run()) && pool.used() == 3 * PAGE_SIZE);
    assert!(!pool.covers(PhysRange::new(PhysAddr::new(0x1_0000_0000), MAX_RUN + 1).unwrap()));
    assert!(Chunk::zeroed(pool, PageRequest { below: PhysAddr::new(0xffff), ..PageRequest::anywhere(4096) }).is_err());
    assert!(Chunk::zeroed(pool, PageRequest::anywhere(MAX_RUN)).is_err());
    drop(chunk);
    assert_eq!(pool.used(), 0);
}
