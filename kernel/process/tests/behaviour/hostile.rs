//! A process that calls whatever it likes, and a model of what may come of it.
//!
//! After every call the tables hold what the model says and nothing else, and the device reaches what the model says and nothing
//! else. Memory of others keeps its contents, and is not mapped anywhere.
//!
//! Caught, each seen red: `unmap` without its check of loans; a loan that is found by its start alone; a `lend` that does not check
//! that the process may write; rights of `map` that are not checked; a region that is not charged to the quota; registers that
//! outlive the device's handle; a device that is stopped only after its loans were revoked.

use crate::machine::World;
use abi::{Call, ErrorCode, PAGE, READ, WRITE};
use base::Deadline;
use dma::fakes::FakeMemory;
use dma::{Ladder, PageSet};
use iommu::{Iova, Prot};
use process::{MAPS, Next, Quota};
use std::collections::{BTreeMap, BTreeSet};

/// Pseudo-random numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

struct Region {
    len: u64,
    rights: u64,
    lent: u32,
    registers: bool,
}

struct Loan {
    len: u64,
    /// The region, and where in it.
    region: u64,
    offset: u64,
    rights: u64,
}

/// What should be so.
#[derive(Default)]
struct Model {
    regions: BTreeMap<u64, Region>,
    loans: BTreeMap<u64, Loan>,
    open: Option<u64>,
    opened: bool,
}

const QUOTA: Quota = Quota { pages: 96, regions: 24, handles: 4, loans: 12 };

impl Model {
    fn pages(&self) -> u64 {
        self.regions.values().filter(|region| !region.registers).map(|region| region.len / PAGE).sum()
    }

    /// The region in which all of the range lies.
    fn region(&self, at: u64, len: u64) -> Option<(u64, &Region)> {
        let (start, region) = self.regions.range(..=at).next_back()?;
        (at.checked_add(len)? <= start + region.len).then_some((*start, region))
    }

    fn is_range(at: u64, len: u64) -> bool {
        at.is_multiple_of(PAGE) && len != 0 && len.is_multiple_of(PAGE) && at.checked_add(len).is_some()
    }

    /// Whether a call should succeed, but for what only the machine knows.
    fn allows(&self, call: Call, a: &[u64; 6]) -> bool {
        let handle = |handle| self.open == Some(handle);
        match call {
            Call::Exit => false,
            Call::Time | Call::Sleep => true,
            Call::Write => {
                let readable = |at: u64| self.region(at, 1).is_some_and(|(_, region)| !region.registers);
                // Regions never touch: there is a page between them.
                a[1] == 0 || a[1] <= abi::LINE && readable(a[0]) && self.region(a[0], a[1]).is_some()
            }
            Call::Map => {
                Self::is_range(0, a[0])
                    && matches!(a[1], 1 | 3)
                    && self.pages() + a[0] / PAGE <= QUOTA.pages
                    && self.regions.len() < QUOTA.regions
            }
            Call::Unmap => {
                Self::is_range(a[0], a[1])
                    && self.regions.get(&a[0]).is_some_and(|region| region.len == a[1] && region.lent == 0)
            }
            Call::Open => !self.opened && a[0] == 0 && a[1] == 0,
            Call::Close | Call::Acknowledge => handle(a[0]),
            Call::Wait => false,
            Call::Config => handle(a[0]) && a[1] < 4096 && a[1].is_multiple_of(4),
            Call::Registers => handle(a[0]) && a[1] == 0 && self.regions.len() < QUOTA.regions,
            Call::BarSize | Call::Connect => handle(a[0]) && a[1] == 0,
            Call::Lend => {
                let [device, iova, at, len, rights, _] = *a;
                let free = |(start, loan): (&u64, &Loan)| *start >= iova + len || start + loan.len <= iova;
                handle(device)
                    && Self::is_range(iova, len)
                    && Self::is_range(at, len)
                    && (1..=3).contains(&rights)
                    // Not the doorbell; not 0, which a domain keeps; below 48 bits.
                    && (iova + len <= crate::machine::DOORBELL || iova > crate::machine::DOORBELL)
                    && iova + len <= 1 << 48
                    && self.loans.len() < QUOTA.loans
                    && self.loans.iter().all(free)
                    && self.region(at, len).is_some_and(|(_, region)| !region.registers && rights & !region.rights == 0)
            }
            Call::TakeBack => {
                handle(a[0]) && Self::is_range(a[1], a[2]) && self.loans.get(&a[1]).is_some_and(|loan| loan.len == a[2])
            }
        }
    }

    /// What a successful call has changed.
    fn apply(&mut self, call: Call, a: &[u64; 6], value: u64) {
        match call {
            Call::Map => {
                self.regions.insert(value, Region { len: a[0], rights: a[1], lent: 0, registers: false });
            }
            Call::Registers => {
                self.regions.insert(value, Region { len: 2 * PAGE, rights: 3, lent: 0, registers: true });
            }
            Call::Unmap => {
                self.regions.remove(&a[0]);
            }
            Call::Open => (self.open, self.opened) = (Some(value), true),
            Call::Close => {
                self.open = None;
                self.loans.clear();
                self.regions.retain(|_, region| !region.registers);
                self.regions.values_mut().for_each(|region| region.lent = 0);
            }
            Call::Lend => {
                let (region, _) = self.region(a[2], a[3]).unwrap();
                self.regions.get_mut(&region).unwrap().lent += 1;
                self.loans.insert(a[1], Loan { len: a[3], region, offset: a[2] - region, rights: a[4] });
            }
            Call::TakeBack => {
                let loan = self.loans.remove(&a[1]).unwrap();
                self.regions.get_mut(&loan.region).unwrap().lent -= 1;
            }
            _ => {}
        }
    }
}

/// Arguments that are sometimes right.
fn arguments(random: &mut Random, model: &Model) -> [u64; 6] {
    let regions: Vec<u64> = model.regions.keys().copied().collect();
    let loans: Vec<u64> = model.loans.keys().copied().collect();
    std::array::from_fn(|_| match random.below(12) {
        0 => random.next(),
        1 => random.of(&[0, 1, 2, 3, 4, 5]),
        2 => PAGE * random.below(9),
        3 if !regions.is_empty() => random.of(&regions) + PAGE * random.below(4),
        4 if !regions.is_empty() => random.of(&regions),
        5 if !loans.is_empty() => random.of(&loans),
        6 => random.of(&[u64::MAX, u64::MAX - PAGE + 1, 1 << 63, 1 << 48, (1 << 48) - PAGE, 0xffff_0000_0000_0000]),
        7 => model.open.unwrap_or(7) + random.below(2) * 0x1_0000,
        8 => crate::machine::DOORBELL - PAGE + PAGE * random.below(3),
        9 => MAPS.start + PAGE * random.below(64),
        10 => 0x5000_0000 + PAGE * random.below(64),
        _ => random.below(600),
    })
}

/// The arguments of a call that is meant to work.
fn meant(random: &mut Random, model: &Model, call: Call) -> [u64; 6] {
    let mut a = arguments(random, model);
    let handle = model.open.unwrap_or(0);
    let some = |random: &mut Random, keys: Vec<u64>| if keys.is_empty() { 0 } else { random.of(&keys) };
    match call {
        Call::Map => (a[0], a[1]) = (PAGE * (1 + random.below(8)), random.of(&[READ, READ | WRITE])),
        Call::Unmap => {
            a[0] = some(random, model.regions.keys().copied().collect());
            a[1] = model.regions.get(&a[0]).map_or(PAGE, |region| region.len);
        }
        Call::Open => (a[0], a[1]) = (0, 0),
        Call::Lend => {
            let at = some(random, model.regions.keys().copied().collect());
            let pages = model.regions.get(&at).map_or(1, |region| region.len / PAGE);
            let first = random.below(pages);
            let iova = 0x5000_0000 + PAGE * random.below(64);
            let len = PAGE * (1 + random.below(pages - first));
            a = [handle, iova, at + first * PAGE, len, random.of(&[1, 2, 3]), 0];
        }
        Call::TakeBack => {
            let iova = some(random, model.loans.keys().copied().collect());
            let len = model.loans.get(&iova).map_or(PAGE, |loan| loan.len);
            a = [handle, iova, random.of(&[len, len, len, PAGE, 2 * PAGE]), 0, 0, 0];
        }
        // Closed once, late: a device is not opened twice.
        Call::Close => a[0] = if random.below(20_000) == 0 { handle } else { handle + 0x1_0000 },
        _ => a[0] = handle,
    }
    a
}

/// Everything that the tables and the device's address space say, against the model.
fn compare(world: &World, model: &Model, others: &BTreeSet<u64>, random: &mut Random) {
    let pages = world.tables.pages.lock().unwrap();
    let wanted: u64 = model.regions.values().map(|region| region.len / PAGE).sum();
    assert_eq!(pages.len() as u64, wanted);
    for (start, region) in &model.regions {
        for at in (*start..start + region.len).step_by(PAGE as usize) {
            let (phys, prot) = pages[&at];
            assert_eq!(prot.contains(Prot::WRITE), region.rights & WRITE != 0, "{at:#x}");
            assert_eq!(prot.contains(Prot::MMIO), region.registers, "{at:#x}");
            assert!(!others.contains(&phys.get()), "another's memory at {at:#x}");
            let bar = (crate::machine::BAR..crate::machine::BAR + 2 * PAGE).contains(&phys.get());
            assert_eq!(bar, region.registers, "{at:#x}");
        }
    }
    let Some(domain) = world.story.lock().unwrap().domain.clone() else {
        assert!(model.loans.is_empty());
        return;
    };
    for (iova, loan) in &model.loans {
        for offset in (0..loan.len).step_by(PAGE as usize) {
            let (phys, prot) = domain.iova_to_phys(Iova::new(iova + offset)).expect("it is lent");
            assert_eq!(phys, pages[&(loan.region + loan.offset + offset)].0, "{iova:#x}");
            assert_eq!(prot.contains(Prot::WRITE), loan.rights & WRITE != 0, "{iova:#x}");
        }
    }
    // Wherever nothing is lent nothing is reached.
    for _ in 0..16 {
        let at = random.of(&[0, PAGE, MAPS.start, 0x5000_0000]) + PAGE * random.below(72);
        let lent = model.loans.iter().any(|(start, loan)| (*start..start + loan.len).contains(&at));
        assert_eq!(domain.iova_to_phys(Iova::new(at)).is_some(), lent, "{at:#x}");
    }
}

/// Memory of somebody else.
fn canary(memory: &'static FakeMemory) -> PageSet {
    let mut pages = PageSet::zeroed(memory, 8 * PAGE, Ladder::SINGLE_PAGES).unwrap();
    pages.chunks_mut().for_each(|chunk| chunk.fill(0xc5));
    pages
}

fn play(seed: u64, calls: u64) {
    let mut random = Random(seed);
    let mut world = World::new(QUOTA);
    let before = canary(world.system.memory);
    let baseline = world.system.memory.live_allocations();
    let mut model = Model::default();
    let others: BTreeSet<u64> =
        before.runs().iter().flat_map(|run| (run.start().get()..run.end().get()).step_by(PAGE as usize)).collect();
    let (mut fine, mut codes) = (0_u64, BTreeMap::new());
    for number in 0..calls {
        let call = random.of(Call::ALL);
        let call = if call == Call::Exit { Call::Map } else { call };
        let a = if random.below(2) == 0 { meant(&mut random, &model, call) } else { arguments(&mut random, &model) };
        // Now and then a number that is none.
        let code = if random.below(50) == 0 { random.next() | 64 } else { call as u64 };
        let allowed = code == call as u64 && model.allows(call, &a);
        match world.process.call(code, a, Deadline::after_millis(0)) {
            Next::Return(0, value) => {
                // Sleeping has an end of its own: the deadline.
                assert!(allowed, "call {number}: {call:?} {a:x?} succeeded");
                model.apply(call, &a, value);
                fine += 1;
            }
            Next::Return(code, value) => {
                let code = ErrorCode::from_number(code).expect("a code");
                assert!(!allowed, "call {number}: {call:?} {a:x?}: {code:?}");
                assert_eq!(value, 0);
                *codes.entry(code as u64).or_insert(0_u64) += 1;
            }
            Next::Exit(_) => panic!("call {number}: {call:?} {a:x?} ended the process"),
        }
        // The device does what it likes as well.
        if random.below(8) == 0 {
            let at = 0x5000_0000 + PAGE * random.below(72);
            let lent = model.loans.iter().find(|(start, loan)| (**start..**start + loan.len).contains(&at));
            let wrote = world.master.write(Iova::new(at), &[0x5a; 16]).is_ok();
            assert_eq!(wrote, lent.is_some_and(|(_, loan)| loan.rights & WRITE != 0), "{at:#x}");
        }
        if number % 16 == 0 || number + 1 == calls {
            compare(&world, &model, &others, &mut random);
        }
    }
    assert!(before.chunks().all(|chunk| chunk.iter().all(|byte| *byte == 0xc5)), "another's memory has changed");
    // It was a test: enough calls went well, and in many ways wrong.
    assert!(fine > calls / 20, "{fine} of {calls}");
    assert!(codes.len() >= 10, "{codes:?}");
    assert!(world.system.memory.violations().is_empty(), "{:?}", world.system.memory.violations());
    let World { process, system, tables, story, .. } = world;
    assert!(process.end());
    assert!(tables.pages.lock().unwrap().is_empty());
    assert!(!model.opened || story.lock().unwrap().stopped);
    assert!(system.memory.live_allocations() <= baseline, "memory was lost");
}

#[test]
fn a_hundred_thousand_random_calls_change_nothing_outside_the_process() {
    play(0x9e37_79b9_7f4a_7c15, 100_000);
}

#[test]
fn other_random_calls_neither() {
    (1..=20_u64).for_each(|seed| play(seed.wrapping_mul(0x1234_5678_9abc_def1), 3_000));
}
