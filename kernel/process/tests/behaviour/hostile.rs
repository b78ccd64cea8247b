//! A process that calls whatever it likes, and a model of what may come of it.
//!
//! After every call the tables hold what the model says and nothing else, and the device reaches what the model says and nothing
//! else. Memory of others keeps its contents, and is not mapped anywhere.
//!
//! Caught, each seen red: `unmap` without its check of loans; a loan that is found by its start alone; a `lend` that does not check
//! that the process may write; rights of `map` that are not checked; a region that is not charged to the quota; registers that
//! outlive the device's handle; a device that is stopped only after its loans were revoked; addresses that a process may unmap
//! although they were set aside; a buffer's handle that is closed and leaves its access.

use crate::machine::World;
use abi::{ALIGNMENT_MAX, Call, ErrorCode, PAGE, READ, WRITE};
use base::Deadline;
use dma::fakes::FakeMemory;
use dma::{Ladder, OpenPages, PageSet, SharedBuffer};
use iommu::{Iova, PhysRange, Prot};
use process::{Event, MAPS, Next, Quota};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Own,
    Registers,
    /// Memory that was put by, under this number.
    Memory(usize),
    /// Addresses of the buffer that this handle names. With rights within an access.
    Buffer(u64),
}

struct Region {
    len: u64,
    rights: u64,
    lent: u32,
    kind: Kind,
}

impl Region {
    /// Whether the kernel reads and writes it for the process.
    fn is_memory(&self) -> bool {
        self.kind != Kind::Registers && self.rights != 0
    }
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
    /// Handles of buffers: which buffer, and its addresses.
    buffers: BTreeMap<u64, (usize, Option<u64>)>,
    /// Handles of events.
    events: BTreeSet<u64>,
    raised: u64,
}

const QUOTA: Quota =
    Quota { pages: 96, regions: 24, handles: 5, loans: 12, tables: 1 << 20, shared: 40 * PAGE, lines: u32::MAX };

/// What is put by: bytes and rights of buffers, and of memory.
const BUFFERS: [(u64, u64); 2] = [(6 * PAGE, READ | WRITE), (3 * PAGE, READ)];
const MEMORY: [(u64, u64); 2] = [(2 * PAGE, READ | WRITE), (PAGE, READ)];

impl Model {
    fn pages(&self) -> u64 {
        self.regions.values().filter(|region| region.kind == Kind::Own).map(|region| region.len / PAGE).sum()
    }

    /// Whether addresses for `len` bytes more of what others have are within the quota.
    fn affords(&self, len: u64) -> bool {
        let others = |region: &&Region| matches!(region.kind, Kind::Memory(_) | Kind::Buffer(_));
        let shared: u64 = self.regions.values().filter(others).map(|region| region.len).sum();
        self.regions.len() < QUOTA.regions && shared + len <= QUOTA.shared
    }

    fn handles(&self) -> usize {
        self.buffers.len() + self.events.len() + usize::from(self.open.is_some())
    }

    /// Accesses to a buffer that read, and that write.
    fn accesses(&self, buffer: usize) -> (usize, usize) {
        let places = self.buffers.values().filter(|(which, _)| *which == buffer).filter_map(|(_, at)| *at);
        let rights: Vec<u64> = places.map(|at| self.regions[&at].rights).collect();
        (rights.iter().filter(|rights| **rights == READ).count(), rights.iter().filter(|rights| **rights == 3).count())
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
                let readable = |at: u64| self.region(at, 1).is_some_and(|(_, region)| region.is_memory());
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
                let fits = |region: &Region| region.len == a[1] && region.lent == 0;
                let gone = |region: &Region| fits(region) && !matches!(region.kind, Kind::Buffer(_));
                Self::is_range(a[0], a[1]) && self.regions.get(&a[0]).is_some_and(gone)
            }
            Call::Open => !self.opened && a[0] == 0 && a[1] == 0 && self.handles() < QUOTA.handles,
            Call::Close => handle(a[0]) || self.buffers.contains_key(&a[0]) || self.events.contains(&a[0]),
            Call::Acknowledge => handle(a[0]),
            Call::Wait => self.events.contains(&a[0]) && self.raised != 0,
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
                    && self.region(at, len).is_some_and(|(_, region)| region.kind == Kind::Own && rights & !region.rights == 0)
            }
            Call::TakeBack => {
                handle(a[0]) && Self::is_range(a[1], a[2]) && self.loans.get(&a[1]).is_some_and(|loan| loan.len == a[2])
            }
            Call::OpenBuffer => a[0] < BUFFERS.len() as u64 && self.handles() < QUOTA.handles,
            Call::BufferSize => self.buffers.contains_key(&a[0]),
            Call::MapBuffer => {
                a[1].is_power_of_two()
                    && (PAGE..=ALIGNMENT_MAX).contains(&a[1])
                    && self
                        .buffers
                        .get(&a[0])
                        .is_some_and(|(which, at)| at.is_none() && self.affords(BUFFERS[*which].0))
            }
            Call::BeginAccess => {
                let Some((which, Some(at))) = self.buffers.get(&a[0]) else { return false };
                let (readers, writers) = self.accesses(*which);
                let free = writers == 0 && (a[1] == READ || readers == 0);
                self.regions[at].rights == 0 && matches!(a[1], 1 | 3) && a[1] & !BUFFERS[*which].1 == 0 && free
            }
            Call::EndAccess => {
                self.buffers.get(&a[0]).and_then(|(_, at)| *at).is_some_and(|at| self.regions[&at].rights != 0)
            }
            Call::OpenEvent => a[0] == 0 && self.handles() < QUOTA.handles,
            Call::Raise => self.events.contains(&a[0]),
            Call::MapMemory => {
                let memory = usize::try_from(a[0]).ok().and_then(|number| MEMORY.get(number));
                matches!(a[1], 1 | 3) && memory.is_some_and(|(len, rights)| a[1] & !rights == 0 && self.affords(*len))
            }
            Call::MemorySize => a[0] < MEMORY.len() as u64,
        }
    }

    /// What a successful call has changed.
    fn apply(&mut self, call: Call, a: &[u64; 6], value: u64) {
        match call {
            Call::Map => {
                self.regions.insert(value, Region { len: a[0], rights: a[1], lent: 0, kind: Kind::Own });
            }
            Call::Registers => {
                self.regions.insert(value, Region { len: 2 * PAGE, rights: 3, lent: 0, kind: Kind::Registers });
            }
            Call::Unmap => {
                self.regions.remove(&a[0]);
            }
            Call::Open => (self.open, self.opened) = (Some(value), true),
            Call::Close if self.open == Some(a[0]) => {
                self.open = None;
                self.loans.clear();
                self.regions.retain(|_, region| region.kind != Kind::Registers);
                self.regions.values_mut().for_each(|region| region.lent = 0);
            }
            Call::Close => {
                self.events.remove(&a[0]);
                self.buffers.remove(&a[0]);
                self.regions.retain(|_, region| region.kind != Kind::Buffer(a[0]));
            }
            Call::OpenBuffer => drop(self.buffers.insert(value, (a[0] as usize, None))),
            Call::MapBuffer => {
                let (which, at) = self.buffers.get_mut(&a[0]).unwrap();
                *at = Some(value);
                assert_eq!(value % a[1], 0);
                let region = Region { len: BUFFERS[*which].0, rights: 0, lent: 0, kind: Kind::Buffer(a[0]) };
                self.regions.insert(value, region);
            }
            Call::BeginAccess | Call::EndAccess => {
                let at = self.buffers[&a[0]].1.unwrap();
                self.regions.get_mut(&at).unwrap().rights = if call == Call::BeginAccess { a[1] } else { 0 };
            }
            Call::OpenEvent => drop(self.events.insert(value)),
            Call::Raise => self.raised += 1,
            Call::Wait => assert_eq!(std::mem::take(&mut self.raised), value),
            Call::MapMemory => {
                let kind = Kind::Memory(a[0] as usize);
                self.regions.insert(value, Region { len: MEMORY[a[0] as usize].0, rights: a[1], lent: 0, kind });
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
    let handles: Vec<u64> = model.buffers.keys().chain(&model.events).copied().collect();
    std::array::from_fn(|_| match random.below(14) {
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
        11 if !handles.is_empty() => random.of(&handles) + 0x1_0000 * (random.below(8) / 7),
        12 => 1 << random.below(64),
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
        Call::Close if random.below(20_000) == 0 => a[0] = handle,
        Call::Close => {
            let others = model.buffers.keys().chain(&model.events).copied().collect();
            a[0] = if random.below(4) == 0 { some(random, others) } else { handle + 0x1_0000 };
        }
        Call::OpenBuffer | Call::OpenEvent => a[0] = random.below(3),
        Call::BufferSize | Call::EndAccess => a[0] = some(random, model.buffers.keys().copied().collect()),
        Call::MapBuffer => {
            a[0] = some(random, model.buffers.keys().copied().collect());
            a[1] = random.of(&[PAGE, 4 * PAGE, 1 << 16, 1 << 21, ALIGNMENT_MAX, 0, PAGE - 1, 3 * PAGE, 1 << 40]);
        }
        Call::BeginAccess => {
            a[0] = some(random, model.buffers.keys().copied().collect());
            (a[1], a[2]) = (random.of(&[READ, READ | WRITE, 0, WRITE, 7]), 0);
        }
        Call::Raise | Call::Wait => (a[0], a[1]) = (some(random, model.events.iter().copied().collect()), 0),
        Call::MapMemory | Call::MemorySize => (a[0], a[1]) = (random.below(3), random.of(&[READ, READ | WRITE, 2])),
        _ => a[0] = handle,
    }
    a
}

/// What was put by, and what nobody must reach.
struct Things {
    buffers: Vec<SharedBuffer>,
    memory: Vec<Arc<OpenPages>>,
    others: BTreeSet<u64>,
}

fn page_list(runs: &[PhysRange]) -> Vec<u64> {
    runs.iter().flat_map(|run| (run.start().get()..run.end().get()).step_by(PAGE as usize)).collect()
}

impl Things {
    fn put_by(world: &mut World, others: BTreeSet<u64>) -> Self {
        let memory = world.system.memory;
        let mut things = Self { buffers: Vec::new(), memory: Vec::new(), others };
        for (number, (len, rights)) in (0..).zip(BUFFERS) {
            let pages = PageSet::zeroed(memory, len, Ladder::SINGLE_PAGES).unwrap();
            things.buffers.push(SharedBuffer::new("shared", pages));
            assert_eq!(world.process.share(things.buffers.last().unwrap().clone(), rights).unwrap(), number);
        }
        for (number, (len, rights)) in (0..).zip(MEMORY) {
            things.memory.push(Arc::new(OpenPages::zeroed(memory, len, Ladder::SINGLE_PAGES).unwrap()));
            assert_eq!(world.process.put_memory(things.memory.last().unwrap().clone(), rights).unwrap(), number);
        }
        assert_eq!(world.process.put_event(Arc::new(Event::default())).unwrap(), 0);
        things
    }

    /// The pages that a region of this kind shows; none where they are just not those of others.
    fn pages(&self, model: &Model, kind: Kind) -> Option<Vec<u64>> {
        match kind {
            Kind::Own => None,
            Kind::Registers => Some(vec![crate::machine::BAR, crate::machine::BAR + PAGE]),
            Kind::Memory(number) => Some(page_list(self.memory[number].runs())),
            Kind::Buffer(handle) => Some(page_list(self.buffers[model.buffers[&handle].0].extents().unwrap().runs())),
        }
    }
}

/// Everything that the tables and the device's address space say, against the model.
fn compare(world: &World, model: &Model, things: &Things, random: &mut Random) {
    for (number, buffer) in things.buffers.iter().enumerate() {
        let (readers, writers) = model.accesses(number);
        let users = buffer.users();
        assert_eq!((users.cpu_readers as usize, users.cpu_writers as usize), (readers, writers));
        assert_eq!(users.spaces as usize, readers + writers);
    }
    let pages = world.tables.pages.lock().unwrap();
    let mapped = |region: &&Region| region.rights != 0;
    let wanted: u64 = model.regions.values().filter(mapped).map(|region| region.len / PAGE).sum();
    assert_eq!(pages.len() as u64, wanted);
    for (start, region) in model.regions.iter().filter(|(_, region)| region.rights != 0) {
        let known = things.pages(model, region.kind);
        for at in (*start..start + region.len).step_by(PAGE as usize) {
            let (phys, prot) = pages[&at];
            assert_eq!(prot.contains(Prot::WRITE), region.rights & WRITE != 0, "{at:#x}");
            assert_eq!(prot.contains(Prot::MMIO), region.kind == Kind::Registers, "{at:#x}");
            match &known {
                Some(known) => assert_eq!(known[((at - start) / PAGE) as usize], phys.get(), "{at:#x}"),
                None => assert!(!things.others.contains(&phys.get()), "another's memory at {at:#x}"),
            }
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
    let mut things = Things::put_by(&mut world, page_list(before.runs()).into_iter().collect());
    // What is put by is nobody's own either.
    for buffer in &things.buffers {
        things.others.extend(page_list(buffer.extents().unwrap().runs()));
    }
    things.others.extend(things.memory.iter().flat_map(|memory| page_list(memory.runs())));
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
            compare(&world, &model, &things, &mut random);
        }
    }
    assert!(before.chunks().all(|chunk| chunk.iter().all(|byte| *byte == 0xc5)), "another's memory has changed");
    // It was a test: enough calls went well, and in many ways wrong.
    assert!(fine > calls / 20, "{fine} of {calls}");
    assert!(codes.len() >= 10, "{codes:?}");
    assert!(world.system.memory.violations().is_empty(), "{:?}", world.system.memory.violations());
    let World { process, system, tables, story, .. } = world;
    assert!(process.end());
    let Things { buffers, memory, .. } = things;
    assert!(buffers.into_iter().all(|buffer| buffer.users() == dma::Users::default() && buffer.into_pages().is_ok()));
    drop(memory);
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
