//! What devices do with a shared buffer, and who waits for it.
//!
//! Seen red: `Jobs::check` that finds nothing; that looks for writers only; that does not leave a device's own work out; the CPU let
//! in without it; a fence that is over although its queue has not said so; a settled fence whose contents were not fetched; a
//! job whose device was not shown what others wrote; a turn that keeps what it has while it waits; a wait that looks a second time
//! instead of keeping what it saw; a job out of the books while somebody takes over what it wrote; a failed job out of the books while the
//! device has it; a watched job that went well although its watch has not said so; a failure that is forgotten, told twice, or
//! told although it is known, or its like from each of many jobs.

use base::{Deadline, TimedOut};
use core::ptr::NonNull;
use dma::fakes::{FakeDevice, FakeMemory, FakeSystem};
use dma::{
    Attachment, Bounce, BusyWith, CpuReads, CpuWrites, DmaMemory, Error, FromDevice, Job, Ladder, Lent, Limits,
    PageRequest, PageSet, Policy, Pool, PoolSource, RawPages, SharedBuffer, ToDevice, Turn, Watch,
};
use iommu::OutOfMemory;
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

/// A queue's word: 0 for a device at work, 1 for done, 2 for failed.
#[derive(Default)]
struct Queue(AtomicU8);

impl Queue {
    fn says(&self, word: u8) {
        self.0.store(word, Ordering::SeqCst);
        base::notify();
    }
}

impl Watch for Queue {
    fn outcome(&self) -> Option<bool> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            word => Some(word == 1),
        }
    }
}

fn now() -> Deadline {
    Deadline::after_millis(0)
}

fn soon() -> Deadline {
    Deadline::after_millis(20_000)
}

fn buffer(system: &FakeSystem, name: &str) -> SharedBuffer {
    SharedBuffer::new(name, PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap())
}

fn busy(error: Error) -> BusyWith {
    match error {
        Error::Busy { by, .. } => by,
        other => panic!("{other}"),
    }
}

struct World {
    system: FakeSystem,
    blk: FakeDevice,
    gpu: FakeDevice,
    picture: SharedBuffer,
    written: Arc<Attachment<FromDevice>>,
    shown: Arc<Attachment<ToDevice>>,
}

impl World {
    fn new(system: FakeSystem) -> Self {
        let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
        let picture = buffer(&system, "picture");
        let written = Arc::new(picture.attach(&blk.device).unwrap());
        let shown = Arc::new(picture.attach(&gpu.device).unwrap());
        Self { system, blk, gpu, picture, written, shown }
    }
}

#[test]
fn a_reader_waits_for_the_writer_until_its_queue_says_that_it_is_done() {
    let world = World::new(FakeSystem::new());
    let writing = Job::begin(&world.written, now()).unwrap().unwrap();
    assert_eq!(busy(Job::begin(&world.shown, now()).err().unwrap()), BusyWith::AtWork);
    let queue = Arc::new(Queue::default());
    writing.watch(queue.clone());
    assert_eq!(busy(Job::begin(&world.shown, now()).err().unwrap()), BusyWith::AtWork);
    assert_eq!(writing.fence().wait(now()), Err(TimedOut));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let reading = Job::begin(&world.shown, soon()).unwrap().unwrap();
            let mut seen = [0; 6];
            world.gpu.master.read(reading.segments()[0].iova, &mut seen).unwrap();
            seen
        });
        world.blk.master.write(world.written.iova(), b"pixels").unwrap();
        // Nobody takes the result: the queue still has the job.
        queue.says(1);
        assert_eq!(&reader.join().unwrap(), b"pixels");
    });
    assert_eq!(writing.fence().outcome(), Some(true));
}

#[test]
fn a_job_is_over_at_the_latest_when_the_queue_lets_go_of_it() {
    let world = World::new(FakeSystem::new());
    let writing = Job::begin(&world.written, now()).unwrap().unwrap();
    let (in_flight, fence): (Arc<dyn Lent>, _) = (writing.clone(), writing.fence());
    drop(writing);
    assert_eq!(fence.outcome(), None);
    assert!(Job::begin(&world.shown, now()).is_err());
    drop(in_flight);
    assert_eq!(fence.outcome(), Some(true));
    assert!(Job::begin(&world.shown, now()).is_ok());
}

#[test]
fn readers_go_side_by_side_a_writer_waits_for_all_of_them_and_a_device_never_for_itself() {
    let world = World::new(FakeSystem::new());
    let third = world.system.device("scanout").unwrap();
    let also = Arc::new(world.picture.attach::<ToDevice>(&third.device).unwrap());
    let reading = Job::begin(&world.shown, now()).unwrap().unwrap();
    let also_reading = Job::begin(&also, now()).unwrap().unwrap();
    assert_eq!(busy(Job::begin(&world.written, now()).err().unwrap()), BusyWith::AtWork);
    drop(reading);
    assert_eq!(busy(Job::begin(&world.written, now()).err().unwrap()), BusyWith::AtWork);
    drop(also_reading);
    let first = Job::begin(&world.written, now()).unwrap().unwrap();
    let second = Job::begin(&world.written, now()).unwrap().unwrap();
    drop(first);
    assert_eq!(busy(Job::begin(&world.shown, now()).err().unwrap()), BusyWith::AtWork);
    drop(second);
    assert!(Job::begin(&world.shown, now()).is_ok());
}

#[test]
fn who_waits_for_what_fails_is_told_and_so_is_who_comes_before_the_job_is_gone() {
    let world = World::new(FakeSystem::new());
    let writing = Job::begin(&world.written, now()).unwrap().unwrap();
    let queue = Arc::new(Queue::default());
    writing.watch(queue.clone());
    queue.says(2);
    for _ in 0..2 {
        let error = Job::begin(&world.shown, soon()).err().unwrap();
        assert_eq!(error.to_string(), "what a device was doing to picture has failed");
    }
    // It is still the device's, as far as anybody knows.
    drop(writing);
    assert!(Job::begin(&world.shown, now()).is_ok());
}

#[test]
fn the_cpu_writes_only_while_no_device_reads_and_no_device_begins_while_the_cpu_writes() {
    let World { gpu: _gpu, picture, written, shown, system: _system, .. } = World::new(FakeSystem::new());
    drop(written);
    let reading = Job::begin(&shown, now()).unwrap().unwrap();
    assert_eq!(busy(picture.cpu_access::<CpuWrites>().err().unwrap()), BusyWith::AtWork);
    drop(picture.cpu_access::<CpuReads>().unwrap());
    drop(reading);
    let writes = picture.cpu_access::<CpuWrites>().unwrap();
    assert_eq!(busy(Job::begin(&shown, now()).err().unwrap()), BusyWith::CpuWrites);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| Job::begin(&shown, soon()).map(drop));
        drop(writes);
        reader.join().unwrap().unwrap();
    });
}

#[test]
fn an_access_of_the_cpu_waits_for_the_device_and_then_sees_all_that_it_wrote() {
    let world = World::new(FakeSystem::non_coherent());
    let World { blk, picture, written, .. } = world;
    assert_eq!(busy(picture.cpu_access_by::<CpuReads>(now()).err().unwrap()), BusyWith::DeviceWrites);
    blk.master.write(written.iova(), b"pixels").unwrap();
    std::thread::scope(|scope| {
        let picture = &picture;
        let reader = scope.spawn(move || {
            let mut seen = [0; 6];
            picture.cpu_access_by::<CpuReads>(soon()).unwrap().read_at(0, &mut seen).unwrap();
            seen
        });
        drop(written);
        assert_eq!(&reader.join().unwrap(), b"pixels");
    });
}

/// The disk does not snoop, and the display has a copy: nobody but the jobs moves the bytes.
#[test]
fn what_a_device_wrote_is_where_the_next_one_reads_it_whatever_lies_between_them() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = system.device("blk").unwrap();
        let pool = Arc::new(Pool::new("pool", system.memory, 1 << 16, iommu::PhysAddr::new(u64::MAX)).unwrap());
        let policy = Policy { bounce: Bounce::Always(PoolSource::Shared(pool)), ..Policy::default() };
        let gpu = system.device_with_policy("gpu", Limits::NONE, policy).unwrap();
        let picture = buffer(&system, "picture");
        let written = Arc::new(picture.attach::<FromDevice>(&blk.device).unwrap());
        let shown = Arc::new(picture.attach::<ToDevice>(&gpu.device).unwrap());
        for round in 0..3_u8 {
            let writing = Job::begin(&written, now()).unwrap().unwrap();
            let queue = Arc::new(Queue::default());
            writing.watch(queue.clone());
            blk.master.write(written.iova().checked_add(5000).unwrap(), &[round + 1; 40]).unwrap();
            queue.says(1);
            let reading = Job::begin(&shown, soon()).unwrap().unwrap();
            let mut seen = [0; 40];
            gpu.master.read(shown.iova().checked_add(5000).unwrap(), &mut seen).unwrap();
            assert_eq!(seen, [round + 1; 40]);
            drop((writing, reading));
        }
        drop((written, shown));
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

#[test]
fn what_is_no_shared_buffer_has_no_fences() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = Arc::new(blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap());
    assert!(Job::begin(&mapped, now()).unwrap().is_none());
    assert_eq!(Turn::take(&[mapped], now()).unwrap().fences().count(), 0);
}

/// Two workers want the same two buffers in opposite orders, a thousand times.
#[test]
fn turns_of_several_buffers_do_not_wait_for_each_other_in_a_circle() {
    let system = FakeSystem::new();
    let (one, two) = (system.device("one").unwrap(), system.device("two").unwrap());
    let (a, b) = (buffer(&system, "a"), buffer(&system, "b"));
    let at_work = AtomicU8::new(0);
    std::thread::scope(|scope| {
        for (device, buffers) in [(&one, [&a, &b]), (&two, [&b, &a])] {
            let at_work = &at_work;
            scope.spawn(move || {
                let loans = buffers
                    .map(|buffer| Arc::new(buffer.attach::<FromDevice>(&device.device).unwrap()) as Arc<dyn Lent>);
                for _ in 0..1000 {
                    let turn = Turn::take(&loans, soon()).unwrap();
                    assert_eq!(at_work.fetch_add(1, Ordering::SeqCst), 0, "two have the same buffers");
                    assert_eq!(turn.fences().count(), 2);
                    at_work.fetch_sub(1, Ordering::SeqCst);
                    drop(turn);
                }
            });
        }
    });
}

/// A queue that notes when somebody asks.
#[derive(Default)]
struct Asked(AtomicU8, Queue);

impl Watch for Asked {
    fn outcome(&self) -> Option<bool> {
        self.0.store(1, Ordering::SeqCst);
        self.1.outcome()
    }
}

#[test]
fn while_a_turn_waits_for_one_buffer_the_others_are_free() {
    let system = FakeSystem::new();
    let (one, two) = (system.device("one").unwrap(), system.device("two").unwrap());
    let (a, b) = (buffer(&system, "a"), buffer(&system, "b"));
    let lend =
        |buffer: &SharedBuffer, device: &FakeDevice| Arc::new(buffer.attach::<FromDevice>(&device.device).unwrap());
    let (first, second) = (lend(&a, &one), lend(&b, &one));
    let loans: [Arc<dyn Lent>; 2] = [lend(&a, &two), lend(&b, &two)];
    // One of the two comes after the other, whichever.
    for (busy_one, free) in [(&first, &second), (&second, &first)] {
        let work = Job::begin(busy_one, now()).unwrap().unwrap();
        let queue = Arc::new(Asked::default());
        work.watch(queue.clone());
        std::thread::scope(|scope| {
            let turn = scope.spawn(|| Turn::take(&loans, soon()).map(drop));
            while queue.0.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let free = Job::begin(free, now());
            queue.1.says(1);
            drop(work);
            assert!(free.is_ok());
            drop(free);
            turn.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_turn_that_waits_has_nothing_and_one_that_is_in_its_own_way_is_refused() {
    let system = FakeSystem::new();
    let (one, two) = (system.device("one").unwrap(), system.device("two").unwrap());
    let (a, b) = (buffer(&system, "a"), buffer(&system, "b"));
    let lend =
        |buffer: &SharedBuffer, device: &FakeDevice| Arc::new(buffer.attach::<FromDevice>(&device.device).unwrap());
    let (first, second) = (lend(&a, &one), lend(&b, &one));
    let others = [lend(&a, &two), lend(&b, &two)];
    for busy_one in [&first, &second] {
        let free = if Arc::ptr_eq(busy_one, &first) { &second } else { &first };
        let work = Job::begin(busy_one, now()).unwrap().unwrap();
        let loans: Vec<Arc<dyn Lent>> = others.iter().map(|loan| loan.clone() as _).collect();
        assert_eq!(busy(Turn::take(&loans, now()).err().unwrap()), BusyWith::AtWork);
        // Neither before nor after: the other buffer is nobody's.
        drop(Job::begin(free, now()).unwrap());
        drop(work);
    }
    let both: [Arc<dyn Lent>; 2] = [first.clone(), others[0].clone()];
    assert_eq!(busy(Turn::take(&both, soon()).err().unwrap()), BusyWith::AtWork);
    assert!(Job::begin(&first, now()).is_ok());
}

/// Memory in which somebody who takes over what a device wrote can be held up.
struct Gated {
    memory: &'static FakeMemory,
    closed: AtomicBool,
    /// Somebody stands before it.
    reached: AtomicBool,
}

impl Gated {
    /// A buffer of two pages in such memory, and the gate, open.
    fn buffer(system: &FakeSystem) -> (SharedBuffer, &'static Self) {
        let (closed, reached) = (AtomicBool::new(false), AtomicBool::new(false));
        let gate: &'static Self = Box::leak(Box::new(Self { memory: system.memory, closed, reached }));
        (SharedBuffer::new("picture", PageSet::zeroed(gate, 8192, Ladder::SINGLE_PAGES).unwrap()), gate)
    }

    fn wait_until_reached(&self) {
        while !self.reached.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

// SAFETY: all is the fake memory's, which keeps the contract; it takes its time.
unsafe impl DmaMemory for Gated {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        self.memory.allocate(request)
    }
    unsafe fn free(&self, pages: RawPages) {
        // SAFETY: the caller's promise; `allocate` took it from there.
        unsafe { self.memory.free(pages) };
    }
    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        self.memory.clean(ptr, bytes);
    }
    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        while self.closed.load(Ordering::SeqCst) {
            self.reached.store(true, Ordering::SeqCst);
            std::thread::yield_now();
        }
        self.memory.invalidate(ptr, bytes);
    }
    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.memory.clean_invalidate(ptr, bytes);
    }
}

/// A queue that has something happen when it is asked, once, and then says that the work is done.
struct Script(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Watch for Script {
    fn outcome(&self) -> Option<bool> {
        let act = self.0.lock().unwrap().take();
        if let Some(act) = act {
            act();
        }
        Some(true)
    }
}

#[test]
fn who_saw_that_a_job_is_done_waits_for_whoever_takes_over_from_that_moment_on() {
    let system = FakeSystem::non_coherent();
    let blk = system.device("blk").unwrap();
    let (picture, gate) = Gated::buffer(&system);
    let written = Arc::new(picture.attach::<FromDevice>(&blk.device).unwrap());
    let writing = Job::begin(&written, now()).unwrap().unwrap();
    gate.closed.store(true, Ordering::SeqCst);
    let (fence, seen) = (writing.fence(), Arc::new(AtomicBool::new(false)));
    let script = {
        let seen = seen.clone();
        move || {
            // Between the look of one and what it does next, another begins to take over.
            std::thread::spawn(move || fence.wait(soon()));
            gate.wait_until_reached();
            seen.store(true, Ordering::SeqCst);
        }
    };
    writing.watch(Arc::new(Script(Mutex::new(Some(Box::new(script))))));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !seen.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            // Long enough for a second look.
            std::thread::sleep(std::time::Duration::from_millis(20));
            gate.closed.store(false, Ordering::SeqCst);
        });
        assert_eq!(writing.fence().wait(soon()), Ok(true));
    });
}

#[test]
fn what_is_being_taken_over_is_in_the_way_of_others_though_the_queue_has_let_go() {
    let system = FakeSystem::non_coherent();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let (picture, gate) = Gated::buffer(&system);
    let written = Arc::new(picture.attach::<FromDevice>(&blk.device).unwrap());
    let shown = Arc::new(picture.attach::<ToDevice>(&gpu.device).unwrap());
    let writing = Job::begin(&written, now()).unwrap().unwrap();
    let queue = Arc::new(Queue::default());
    writing.watch(queue.clone());
    queue.says(1);
    gate.closed.store(true, Ordering::SeqCst);
    let fence = writing.fence();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| fence.wait(soon()));
        gate.wait_until_reached();
        drop(writing);
        let early = Job::begin(&shown, now()).map(drop);
        gate.closed.store(false, Ordering::SeqCst);
        assert_eq!(busy(early.unwrap_err()), BusyWith::AtWork);
        assert_eq!(waiter.join().unwrap(), Ok(true));
    });
    drop(Job::begin(&shown, now()).unwrap());
}

fn failed(result: Result<Option<Arc<Job<Attachment<ToDevice>>>>, Error>) {
    match result.err().unwrap() {
        Error::JobFailed(buffer) => assert_eq!(&*buffer, "picture"),
        other => panic!("{other}"),
    }
}

/// The queue is dead, the disk is not: it has not been reset.
#[test]
fn a_failed_job_is_in_the_way_for_as_long_as_the_device_may_be_at_it() {
    let world = World::new(FakeSystem::new());
    for known in [false, true] {
        let writing = Job::begin(&world.written, now()).unwrap().unwrap();
        let queue = Arc::new(Queue::default());
        writing.watch(queue.clone());
        queue.says(2);
        let fence = writing.fence();
        if known {
            fence.known_to_have_failed()
        } else {
            fence.fail()
        }
        for _ in 0..3 {
            failed(Job::begin(&world.shown, now()));
        }
        assert!(Turn::take(&[world.shown.clone() as Arc<dyn Lent>], now()).is_err());
        world.blk.master.write(world.written.iova(), b"late").unwrap();
        drop(writing);
        drop(Job::begin(&world.shown, now()).unwrap());
    }
}

#[test]
fn a_watched_job_that_nobody_saw_go_well_has_failed_and_the_first_who_comes_is_told() {
    let world = World::new(FakeSystem::new());
    let ends = |word| {
        let writing = Job::begin(&world.written, now()).unwrap().unwrap();
        let queue = Arc::new(Queue::default());
        writing.watch(queue.clone());
        queue.says(word);
        let fence = writing.fence();
        drop(writing);
        fence
    };
    assert_eq!(ends(1).outcome(), Some(true));
    drop(Job::begin(&world.shown, now()).unwrap());
    // It failed, or nobody can say.
    for word in [2, 0] {
        // The device's own work is its driver's business, and each failure like another.
        for _ in 0..3 {
            assert_eq!(ends(word).outcome(), Some(false));
        }
        failed(Job::begin(&world.shown, now()));
        drop(Job::begin(&world.shown, now()).unwrap());
        // Who asked for it has been told already.
        ends(word).known_to_have_failed();
        drop(Job::begin(&world.shown, now()).unwrap());
        assert_eq!(ends(word).wait(now()), Ok(false));
        drop(Job::begin(&world.shown, now()).unwrap());
    }
}

#[test]
fn a_reader_that_failed_leaves_nothing_behind_and_the_cpu_is_told_of_a_writer_as_devices_are() {
    let World { picture, written, shown, system: _system, .. } = World::new(FakeSystem::new());
    let reading = Job::begin(&shown, now()).unwrap().unwrap();
    reading.watch(Arc::new(Queue::default()));
    drop(reading);
    let writing = Job::begin(&written, now()).unwrap().unwrap();
    writing.watch(Arc::new(Queue::default()));
    drop((writing, written));
    assert_eq!(picture.cpu_access::<CpuReads>().err().unwrap(), Error::JobFailed("picture".into()));
    drop(picture.cpu_access::<CpuReads>().unwrap());
}

/// A device's loan, in one of the two directions.
enum Loan {
    Writes(Arc<Attachment<FromDevice>>),
    Reads(Arc<Attachment<ToDevice>>),
}

impl Loan {
    fn begin(&self) -> Result<Box<dyn std::any::Any>, Error> {
        Ok(match self {
            Self::Writes(loan) => Box::new(Job::begin(loan, now())?.unwrap()),
            Self::Reads(loan) => Box::new(Job::begin(loan, now())?.unwrap()),
        })
    }
}

/// A loan's device, whether it writes, the loan, its jobs.
type OneLoan = (usize, bool, Loan, Vec<Box<dyn std::any::Any>>);

/// What a sequence of a property test does next.
#[derive(Clone, Debug)]
enum Step {
    Attach { device: usize, writes: bool },
    Detach(usize),
    Begin(usize),
    End(usize),
    CpuReads,
    CpuWrites,
    CpuEnds(usize),
    Map,
    Unmap,
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_usize..3, any::<bool>()).prop_map(|(device, writes)| Step::Attach { device, writes }),
        any::<usize>().prop_map(Step::Detach),
        any::<usize>().prop_map(Step::Begin),
        any::<usize>().prop_map(Step::Begin),
        any::<usize>().prop_map(Step::End),
        Just(Step::CpuReads),
        Just(Step::CpuWrites),
        any::<usize>().prop_map(Step::CpuEnds),
        Just(Step::Map),
        Just(Step::Unmap),
        Just(Step::Move),
    ]
}

proptest! {
    /// Who is let in is what the rules say, written down once more over lists of who is in.
    #[test]
    fn any_sequence_of_users_is_admitted_by_the_rules(steps in prop::collection::vec(step(), 1..60)) {
        let system = FakeSystem::new();
        let devices = ["a", "b", "c"].map(|name| system.device(name).unwrap());
        let shared = buffer(&system, "shared");
        let mut loans: Vec<OneLoan> = Vec::new();
        let (mut reads, mut writes, mut spaces) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Attach { device, writes: writer } => {
                    let may = writes.is_empty() && (!writer || reads.is_empty());
                    let on = &devices[device].device;
                    let loan = if writer {
                        shared.attach(on).map(|loan| Loan::Writes(Arc::new(loan)))
                    } else {
                        shared.attach(on).map(|loan| Loan::Reads(Arc::new(loan)))
                    };
                    prop_assert_eq!(loan.is_ok(), may);
                    loans.extend(loan.ok().map(|loan| (device, writer, loan, Vec::new())));
                }
                Step::Detach(index) if !loans.is_empty() => drop(loans.swap_remove(index % loans.len())),
                Step::Begin(index) if !loans.is_empty() => {
                    let index = index % loans.len();
                    let (device, writer, loan, _) = &loans[index];
                    let conflicts = |other: &OneLoan| {
                        other.0 != *device && !other.3.is_empty() && (*writer || other.1)
                    };
                    let may = writes.is_empty() && (!*writer || reads.is_empty()) && !loans.iter().any(conflicts);
                    let job = loan.begin();
                    prop_assert_eq!(job.is_ok(), may);
                    loans[index].3.extend(job.ok());
                }
                Step::End(index) if !loans.is_empty() => {
                    let index = index % loans.len();
                    drop(loans[index].3.pop());
                }
                Step::CpuReads => {
                    let may = writes.is_empty() && loans.iter().all(|loan| !loan.1);
                    let access = shared.cpu_access::<CpuReads>();
                    prop_assert_eq!(access.is_ok(), may);
                    reads.extend(access.ok());
                }
                Step::CpuWrites => {
                    let idle = loans.iter().all(|loan| !loan.1 && loan.3.is_empty());
                    let may = writes.is_empty() && reads.is_empty() && idle;
                    let access = shared.cpu_access::<CpuWrites>();
                    prop_assert_eq!(access.is_ok(), may);
                    writes.extend(access.ok());
                }
                Step::CpuEnds(index) => {
                    drop(writes.pop());
                    if !reads.is_empty() {
                        drop(reads.swap_remove(index % reads.len()));
                    }
                }
                Step::Map => spaces.push(shared.extents().unwrap()),
                Step::Unmap => drop(spaces.pop()),
                Step::Move => {
                    let may = loans.is_empty() && reads.is_empty() && writes.is_empty() && spaces.is_empty();
                    let pages = PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap();
                    prop_assert_eq!(shared.relocate(pages, now()).is_ok(), may);
                }
                Step::Detach(_) | Step::Begin(_) | Step::End(_) => {}
            }
        }
        drop((loans, reads, writes, spaces));
        prop_assert_eq!(shared.users(), dma::Users::default());
        drop(shared);
        prop_assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}
