//! What processes have together with devices and the kernel: buffers within accesses, memory that is always there, virtually contiguous
//! memory.
//!
//! What was broken by hand to see it caught was broken on the host (`kernel/process/tests/behaviour/shared.rs`).

use super::{End, leaks_nothing, trial};
use crate::bench::{Bench, STEP, soon};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{Deadline, Instant, IrqMutex, wait_until};
use board::{EduStray, KERNEL_SPACE, Killer, UserProcess};
use dma::vcm::{self, Cpu};
use dma::{
    Bidirectional, CoherentPages, CpuReads, CpuWrites, FromDevice, Importer, Job, Ladder, PageSet, SharedBuffer,
    ToDevice, Users,
};
use iommu::{Iova, PAGE_SIZE, Prot};
use ktest::{Outcome, expect, expect_eq, ktest};
use process::{Event, MAPS, Quota};
use programs::TRIAL;
use testdev::edu::Completion;
use virt::cores;

const BOTH: u64 = abi::READ | abi::WRITE;

/// The word at `offset`, as the program has it.
fn word(seed: u64, offset: u64) -> [u8; 8] {
    (seed + offset).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

fn words(seed: u64, len: u64) -> Vec<u8> {
    (0..len).step_by(8).flat_map(|offset| word(seed, offset)).collect()
}

/// What a process and the kernel have together.
struct Shared {
    buffer: SharedBuffer,
    go: Arc<Event>,
    done: Arc<Event>,
}

impl Shared {
    fn new(pages: PageSet) -> Result<Self, Outcome> {
        let buffer = SharedBuffer::try_new("shared", pages).map_err(|rejected| rejected.error)?;
        Ok(Self { buffer, go: Arc::default(), done: Arc::default() })
    }

    /// A process that has it.
    fn process(&self, what: u64, value: u64, other: u64) -> Result<UserProcess, Outcome> {
        let mut process = UserProcess::new("sharing", TRIAL, [what, value, other], Quota::default())?;
        process.process().share(self.buffer.clone(), BOTH)?;
        process.process().put_event(self.go.clone())?;
        process.process().put_event(self.done.clone())?;
        Ok(process)
    }

    /// Waits until the process says that it has come so far.
    fn is_done(&self) -> Result<(), Outcome> {
        wait_until(soon(), || self.done.is_raised())?;
        expect_eq!(self.done.take(), 1);
        Ok(())
    }

    /// Nobody uses it any more.
    fn is_free(&self) -> Result<(), Outcome> {
        expect_eq!(self.buffer.users(), Users::default());
        Ok(())
    }
}

static GUEST: IrqMutex<Option<UserProcess>> = IrqMutex::new(None);
static ENDED: IrqMutex<Option<End>> = IrqMutex::new(None);

fn host(_core: usize) {
    let guest = GUEST.lock().take();
    if let Some(guest) = guest {
        let end = guest.run(soon());
        *ENDED.lock() = Some(end);
        base::notify();
    }
}

/// Runs `process` on another core.
fn elsewhere(process: UserProcess) -> Result<Killer, Outcome> {
    let killer = process.killer();
    *ENDED.lock() = None;
    *GUEST.lock() = Some(process);
    cores::run_on(1, host)?;
    Ok(killer)
}

/// The end of the process on the other core, awaited.
fn ended() -> Result<End, Outcome> {
    wait_until(soon(), || ENDED.lock().is_some())?;
    wait_until(soon(), || cores::is_idle(1))?;
    Ok(ENDED.lock().take().unwrap_or(End::TimedOut))
}

/// A while in which what should not happen would.
fn a_while() {
    let _ = wait_until(Deadline::after_millis(5), || false);
}

fn one_page(edu: &EduStray) -> Result<PageSet, Outcome> {
    Ok(edu.master().device().page_set(PAGE_SIZE, Ladder::DEFAULT)?)
}

/// Has edu move the `len` bytes that it gets by `from` to `to`: some at a time, since it has no room for a page.
fn carry(edu: &EduStray, from: Iova, to: Iova, len: u64) -> Result<(), Outcome> {
    for at in (0..len).step_by(2048) {
        let now = 2048.min(len - at) as u32;
        edu.edu().dma_to_device(Iova::new(from.get() + at), now, Completion::Interrupt, soon())?;
        edu.edu().dma_from_device(Iova::new(to.get() + at), now, Completion::Interrupt, soon())?;
    }
    Ok(())
}

ktest! {
    /// What the process draws a device reads and the kernel sees; what a device writes the process reads. Meanwhile the buffer has moved.
    fn a_process_and_a_device_take_turns_with_a_buffer_that_moves(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let edu = bench.edu()?;
        let device = edu.master().device();
        let shared = Shared::new(one_page(&edu)?)?;
        let turns = 4;
        elsewhere(shared.process(trial::THERE_AND_BACK, turns, 0)?)?;
        for turn in 0..turns {
            shared.is_done()?;
            let copy = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
            let shown = Arc::new(shared.buffer.attach::<ToDevice>(device)?);
            let job = Job::begin(&shown, soon())?;
            carry(&edu, shown.iova(), copy.iova(), 4096)?;
            drop((job, shown));
            expect!(copy.unmap()?.as_slice() == words(turn, PAGE_SIZE), "what the device read in turn {turn}");
            let mut seen = alloc::vec![0; 4096];
            shared.buffer.cpu_access_by::<CpuReads>(soon())?.read_at(0, &mut seen)?;
            expect!(seen == words(turn, PAGE_SIZE), "what the kernel sees in turn {turn}");

            let mut next = device.pages(PAGE_SIZE)?;
            next.as_mut_slice().copy_from_slice(&words(turn + 1000, PAGE_SIZE));
            let next = device.map::<ToDevice, _>(next).map_err(|rejected| rejected.error)?;
            let filled = Arc::new(shared.buffer.attach::<FromDevice>(device)?);
            let job = Job::begin(&filled, soon())?;
            carry(&edu, next.iova(), filled.iova(), 4096)?;
            drop((job, filled));
            drop(next.unmap()?);
            let before = shared.buffer.extents()?.runs().first().map(|run| run.start());
            let old = shared.buffer.relocate(one_page(&edu)?, soon()).map_err(|rejected| rejected.error)?;
            expect!(shared.buffer.extents()?.runs().first().map(|run| run.start()) != before);
            drop(old);
            shared.go.raise();
        }
        expect_eq!(ended()?, End::Exited(0));
        shared.is_free()?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_device_waits_for_a_process_and_a_process_for_a_device(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let edu = bench.edu()?;
        let shared = Shared::new(one_page(&edu)?)?;
        let shown = Arc::new(shared.buffer.attach::<ToDevice>(edu.master().device())?);
        let job = Job::begin(&shown, soon())?;
        elsewhere(shared.process(trial::HELD, 1, 0)?)?;
        a_while();
        expect!(!shared.done.is_raised(), "it has an access while a device is at work");
        drop(job);
        shared.is_done()?;
        let refused = Job::begin(&shown, Deadline::after_millis(5)).err().map(|error| alloc::format!("{error}"));
        expect!(refused.as_ref().is_some_and(|why| why.contains("the CPU writes it")), "{refused:?}");
        shared.go.raise();
        let job = Job::begin(&shown, soon())?;
        drop((job, shown));
        expect_eq!(ended()?, End::Exited(0));
        shared.is_free()?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// The process is not asked: where it may not look there is nothing.
    fn a_process_that_touches_a_buffer_out_of_turn_crashes_and_the_buffer_is_free(bench) {
        let edu = bench.edu()?;
        leaks_nothing(|| {
            let shared = Shared::new(one_page(&edu)?)?;
            for (when, offset) in [(0, 0), (0, 4088), (1, 0), (1, 2048), (2, 64), (3, 4096)] {
                let end = shared.process(trial::OUT_OF_TURN, when, offset)?.run(soon());
                let End::Crashed(crash) = end else { return Err(Outcome::failed(format_args!("{when}: {end}"))) };
                expect_eq!(crash.far, Some(MAPS.start + offset), "{when}: {crash}");
                let fault = crash.esr.is_some_and(|esr| match when {
                    2 => esr.is_permission_fault() && esr.is_write(),
                    _ => esr.is_translation_fault(),
                });
                expect!(fault, "{when}: {crash}");
                shared.is_free()?;
                shared.buffer.cpu_access::<CpuWrites>()?.write_at(0, b"others go on")?;
            }
            expect!(shared.buffer.into_pages().is_ok());
            Ok(())
        })?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// Killed within an access, and while it waits for one.
    fn a_process_that_is_killed_within_an_access_leaves_the_buffer_to_others(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let edu = bench.edu()?;
        leaks_nothing(|| {
            let shared = Shared::new(one_page(&edu)?)?;
            let shown = Arc::new(shared.buffer.attach::<ToDevice>(edu.master().device())?);
            let killer = elsewhere(shared.process(trial::HELD, 0, 0)?)?;
            shared.is_done()?;
            expect_eq!((shared.buffer.users().cpu_writers, shared.buffer.users().spaces), (1, 1));
            killer.kill();
            // By itself: nobody asks for it.
            drop(Job::begin(&shown, soon())?);
            expect_eq!(ended()?, End::Killed);
            drop(shown);
            shared.is_free()?;

            let access = shared.buffer.cpu_access::<CpuWrites>()?;
            let killer = elsewhere(shared.process(trial::HELD, 2, 0)?)?;
            shared.is_done()?;
            a_while();
            let begun = Instant::now();
            killer.kill();
            expect_eq!(ended()?, End::Killed);
            expect!(begun.elapsed() < base::time::Duration::from_millis(STEP / 2));
            drop(access);
            shared.is_free()
        })?;
        edu.stop()?;
        Ok(())
    }
}

/// Tells the process to go on when it is in the way of a move.
struct LetGo(Arc<Event>);

impl Importer for LetGo {
    fn let_go(&self) {
        self.0.raise();
    }
}

ktest! {
    fn a_move_says_that_a_process_is_in_the_way_and_waits_for_it(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let edu = bench.edu()?;
        let shared = Shared::new(one_page(&edu)?)?;
        elsewhere(shared.process(trial::HELD, 1, 0)?)?;
        shared.is_done()?;
        let rejected = shared.buffer.relocate(one_page(&edu)?, Deadline::after_millis(5));
        let why = rejected.err().map(|rejected| alloc::format!("{}", rejected.error));
        expect!(why.as_ref().is_some_and(|why| why.contains("the CPU writes it")), "{why:?}");
        let let_go = Arc::new(LetGo(shared.go.clone()));
        let weak: Weak<LetGo> = Arc::downgrade(&let_go);
        shared.buffer.tell(weak)?;
        drop(shared.buffer.relocate(one_page(&edu)?, soon()).map_err(|rejected| rejected.error)?);
        expect_eq!(ended()?, End::Exited(0));
        let mut seen = alloc::vec![0; 4096];
        shared.buffer.cpu_access::<CpuReads>()?.read_at(0, &mut seen)?;
        expect!(seen == words(6, PAGE_SIZE), "what it had written is not there");
        edu.stop()?;
        Ok(())
    }
}

/// A process, the kernel and edu with the same memory, all the time.
fn together(bench: &Bench, edu: &EduStray, pages: CoherentPages, cached: bool) -> Result<(), Outcome> {
    let (value, len) = (0x41, 3 * PAGE_SIZE);
    let pages = Arc::new(pages);
    let shared = Shared::new(one_page(edu)?)?;
    let mut process = shared.process(trial::WATCHED, value, BOTH)?;
    process.process().put_memory(pages.clone(), BOTH)?;
    let tables = process.tables().clone();
    elsewhere(process)?;
    shared.is_done()?;
    let (phys, prot) = tables.translate(MAPS.start).ok_or(board::Error::Missing("mapping"))?;
    expect_eq!(Some(phys), pages.runs().first().map(|run| run.start()));
    expect_eq!(prot.contains(Prot::NON_COHERENT), !cached);
    drop(tables);
    // From the kernel by the device to the process, while all of them have it.
    pages.write_at(PAGE_SIZE, &[value as u8; 8])?;
    let at = |offset: u64| Iova::new(pages.iova().get() + offset);
    carry(edu, at(PAGE_SIZE), at(0), 8)?;
    carry(edu, at(PAGE_SIZE), at(len - 8), 8)?;
    shared.go.raise();
    // And from the process by the device to the kernel.
    shared.is_done()?;
    carry(edu, at(PAGE_SIZE), at(0), 4096)?;
    let mut seen = alloc::vec![0; 4096];
    for offset in [PAGE_SIZE, 0] {
        pages.read_at(offset, &mut seen)?;
        expect!(seen.iter().all(|byte| *byte == value as u8 + 1), "at {offset:#x}");
    }
    expect_eq!(ended()?, End::Exited(0));
    let (since, start) = (bench.watch(), pages.iova());
    expect_eq!(Arc::strong_count(&pages), 1, "the process has gone");
    drop(pages);
    edu.edu().dma_from_device(start, 8, Completion::Interrupt, soon())?;
    expect!(bench.fault(edu.master().streams(), since).is_some(), "the device has it for ever");
    Ok(())
}

ktest! {
    fn a_device_the_kernel_and_a_process_have_coherent_memory_at_the_same_time(bench) {
        if bench.cores < 2 {
            ktest::skip!("one core");
        }
        let edu = bench.edu()?;
        let device = edu.master().device();
        for _ in 0..2 {
            together(bench, &edu, CoherentPages::new(device, 3 * PAGE_SIZE)?, true)?;
            together(bench, &edu, CoherentPages::not_cached(device, 3 * PAGE_SIZE)?, false)?;
        }
        board::trim_aliases();
        edu.stop()?;
        Ok(())
    }
}

const MIB: u64 = 1 << 20;
const MEDIUM: u64 = 64 << 10;
const LADDER: Ladder = match Ladder::new(&[2 * MIB, MEDIUM, PAGE_SIZE]) {
    Some(ladder) => ladder,
    None => Ladder::DEFAULT,
};

ktest! {
    /// The same chunks for a process, a device and the kernel: each has the leaves that its alignment allows, and all have the same bytes.
    fn virtually_contiguous_memory_is_in_a_process_by_the_largest_leaves(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let len = 2 * 2 * MIB + 3 * MEDIUM + 5 * PAGE_SIZE;
        let (buffer, chunks) = vcm::fill("chunks", device.memory(), len, LADDER)?;
        let got: Vec<(u64, u64)> = chunks.iter().collect();
        expect_eq!(got, [(2 * MIB, 2), (MEDIUM, 3), (PAGE_SIZE, 5)]);
        let places = [0, 2 * MIB - 1024, 4 * MIB - 1024, 4 * MIB + 3 * MEDIUM - 1024, len - 2048];
        let bytes = words(99, 2048);
        let inverted: Vec<u8> = bytes.iter().map(|byte| !byte).collect();

        let for_cpu = vcm::reserve(&Cpu(&KERNEL_SPACE), len, 2 * MIB)?;
        let for_cpu = for_cpu.back::<Bidirectional>(&buffer).map_err(|(_, error)| error)?;
        // So far up that no other test has mapped pages there.
        let mut area = vcm::reserve(device, len, 32 << 30)?;
        let mut next = device.pages(PAGE_SIZE)?;
        next.as_mut_slice()[..2048].copy_from_slice(&bytes);
        let next = device.map::<ToDevice, _>(next).map_err(|rejected| rejected.error)?;
        let copy = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;

        let whole = (2, 3 * 16 + 5, 3 * 16);
        for (alignment, before, expected) in [
            (2 * MIB, 0, whole),
            (2 * MIB, 2, whole),
            (MEDIUM, 1, (0, 2 * 512 + 3 * 16 + 5, 2 * 512 + 3 * 16)),
            (PAGE_SIZE, 1, (0, 2 * 512 + 3 * 16 + 5, 0)),
        ] {
            // The device fills it ...
            let filled = area.back::<FromDevice>(&buffer).map_err(|(_, error)| error)?;
            for place in places {
                carry(&edu, next.iova(), Iova::new(filled.iova().get() + place), 2048)?;
            }
            area = filled.unmap()?;
            // ... the process inverts it, while a device has it to read and the kernel has it mapped ...
            let shown = area.back::<ToDevice>(&buffer).map_err(|(_, error)| error)?;
            let shared = Shared { buffer: buffer.clone(), go: Arc::default(), done: Arc::default() };
            let mut process = shared.process(trial::ALIGNED, alignment, before)?;
            let End::Exited(at) = process.run_and_keep(soon()) else {
                return Err(Outcome::failed(format_args!("{alignment:#x}")));
            };
            expect!(MAPS.contains(&at) && at % alignment == 0, "{at:#x}");
            let leaves = process.process().space().leaves(at).ok_or(board::Error::Missing("leaves"))?;
            log::info!("process, aligned to {alignment:#x}: {leaves}");
            expect_eq!((leaves.of(2 * MIB), leaves.of(PAGE_SIZE), leaves.contiguous), expected);
            for (whose, leaves) in [("device", shown.leaves()), ("kernel", for_cpu.leaves())] {
                let leaves = leaves.ok_or(board::Error::Missing("leaves"))?;
                log::info!("{whose}: {leaves}");
                expect_eq!((leaves.of(2 * MIB), leaves.of(PAGE_SIZE), leaves.contiguous), whole, "{whose}");
            }
            // It ended within its access.
            expect!(buffer.cpu_access::<CpuReads>().is_err());
            drop(process);
            // ... and all see that.
            let mut seen = alloc::vec![0; 2048];
            for place in places {
                for_cpu.read_at(&buffer.cpu_access::<CpuReads>()?, place, &mut seen)?;
                expect!(seen == inverted, "the kernel at {place:#x}");
                carry(&edu, Iova::new(shown.iova().get() + place), copy.iova(), 2048)?;
                copy.view().read(0, &mut seen)?;
                expect!(seen == inverted, "the device at {place:#x}");
            }
            area = shown.unmap()?;
        }
        drop((area, for_cpu, next.unmap()?, copy.unmap()?));
        expect!(buffer.into_pages().is_ok());
        edu.stop()?;
        Ok(())
    }
}
