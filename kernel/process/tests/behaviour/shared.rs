//! What a process has together with others: shared buffers, events, memory that is always there.
//!
//! Seen red: an access that ends before its mapping has gone; a mapping with the right to write in an access that reads; a handle, and a
//! process, whose end leaves the access; an access that is not counted; one whose wait does not look whether the process is to end;
//! caches that are not cleaned at the end; a move that is not waited for; addresses that are used again although the tables have not let go
//! of them; memory that is not cached and mapped as if it were, or mapped although the CPU may not have it; rights that were not given.

use crate::machine::World;
use abi::{ALIGNMENT_MAX, Call, ErrorCode, PAGE, READ, WRITE};
use base::Deadline;
use dma::fakes::FakeSystem;
use dma::{
    BusyWith, Cacheability, CarvedOut, CoherentPages, CpuReads, CpuWrites, Error as DmaError, FromDevice, Job, Ladder,
    OpenPages, PageSet, SharedBuffer, ToDevice,
};
use iommu::Prot;
use process::{Event, Next, Quota};
use std::sync::Arc;
use std::time::Duration;

const BOTH: u64 = READ | WRITE;
/// Bytes of the buffers here.
const LEN: u64 = 4 * PAGE;

fn pages(system: &FakeSystem) -> PageSet {
    PageSet::zeroed(system.memory, LEN, Ladder::SINGLE_PAGES).unwrap()
}

fn now() -> Deadline {
    Deadline::after_millis(0)
}

fn soon() -> Deadline {
    Deadline::after_millis(20_000)
}

/// A world whose process has opened a buffer with these rights: with the buffer, the handle, and its addresses.
fn sharing_on(system: FakeSystem, rights: u64) -> (World, SharedBuffer, u64, u64) {
    let mut world = World::on(system, Quota::default());
    let buffer = SharedBuffer::new("shared", pages(&world.system));
    let number = world.process.share(buffer.clone(), rights).unwrap();
    let handle = world.call(Call::OpenBuffer, [number]).unwrap();
    let at = world.call(Call::MapBuffer, [handle, PAGE]).unwrap();
    (world, buffer, handle, at)
}

fn sharing(rights: u64) -> (World, SharedBuffer, u64, u64) {
    sharing_on(FakeSystem::new(), rights)
}

fn busy(error: DmaError) -> BusyWith {
    match error {
        DmaError::Busy { by, .. } => by,
        other => panic!("{other}"),
    }
}

#[test]
fn the_memory_is_there_within_an_access_and_at_no_other_time() {
    let (mut world, buffer, handle, at) = sharing(BOTH);
    assert_eq!(world.call(Call::BufferSize, [handle]), Ok(LEN));
    assert_eq!(world.tables.at(at), None);
    for _ in 0..2 {
        world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
        let runs = buffer.extents().unwrap();
        assert_eq!(world.tables.at(at), Some((runs.runs()[0].start(), Prot::READ | Prot::WRITE)));
        assert!(world.tables.at(at + LEN - PAGE).is_some());
        drop(runs);
        world.process.space().copy_out(at + PAGE - 2, b"from the process").unwrap();
        world.call(Call::EndAccess, [handle]).unwrap();
        assert!(world.tables.pages.lock().unwrap().is_empty());
        assert!(world.process.space().copy_out(at, b"x").is_err());
        let mut seen = [0; 16];
        buffer.cpu_access::<CpuReads>().unwrap().read_at(PAGE - 2, &mut seen).unwrap();
        assert_eq!(&seen, b"from the process");
    }
}

#[test]
fn an_access_that_reads_does_not_write_and_none_has_more_rights_than_were_given() {
    let (mut world, buffer, handle, at) = sharing(READ);
    for rights in [BOTH, WRITE, 0, 4, 7, u64::MAX] {
        assert_eq!(world.call(Call::BeginAccess, [handle, rights, 0]), Err(ErrorCode::BadRights));
    }
    world.call(Call::BeginAccess, [handle, READ, 0]).unwrap();
    assert_eq!(world.tables.at(at).unwrap().1, Prot::READ);
    assert!(world.process.space().copy_out(at, b"x").is_err());
    // Others read meanwhile.
    drop(buffer.cpu_access::<CpuReads>().unwrap());
    assert_eq!(busy(buffer.cpu_access::<CpuWrites>().err().unwrap()), BusyWith::CpuReads);
    for rights in [WRITE, 0, 4] {
        assert!(world.process.share(buffer.clone(), rights).is_err(), "{rights}");
    }
}

#[test]
fn what_a_device_begins_waits_for_the_access_and_an_access_for_what_devices_do() {
    let (mut world, buffer, handle, _) = sharing(BOTH);
    let gpu = world.system.device("gpu").unwrap();
    let shown = Arc::new(buffer.attach::<ToDevice>(&gpu.device).unwrap());
    world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
    assert_eq!(busy(Job::begin(&shown, now()).err().unwrap()), BusyWith::CpuWrites);
    world.call(Call::EndAccess, [handle]).unwrap();
    let job = Job::begin(&shown, now()).unwrap().unwrap();
    assert_eq!(world.call(Call::BeginAccess, [handle, BOTH, 1000]), Err(ErrorCode::TimedOut));
    // It reads, as the access does.
    world.call(Call::BeginAccess, [handle, READ, 0]).unwrap();
    world.call(Call::EndAccess, [handle]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(20));
            drop(job);
        });
        let arguments = [handle, BOTH, 20_000_000_000, 0, 0, 0];
        let begun = world.process.call(Call::BeginAccess as u64, arguments, soon());
        assert!(matches!(begun, Next::Return(0, waited) if waited >= 10_000_000), "{begun:?}");
    });
    drop(shown);
    assert!(buffer.attach::<FromDevice>(&gpu.device).is_err(), "a device that writes came in");
}

/// Calls `begin` without end, and tells the process to end meanwhile.
fn stopped(world: &mut World, handle: u64) -> Next {
    let control = world.process.control().clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            control.stop();
        });
        world.process.call(Call::BeginAccess as u64, [handle, BOTH, u64::MAX, 0, 0, 0], soon())
    })
}

#[test]
fn the_end_of_a_process_ends_its_wait_for_an_access() {
    let over = Next::Return(ErrorCode::TimedOut as u64, 0);
    let begun = std::time::Instant::now();
    let (mut world, buffer, handle, _) = sharing(BOTH);
    let access = buffer.cpu_access::<CpuWrites>().unwrap();
    assert_eq!(stopped(&mut world, handle), over);
    drop(access);
    let (mut world, buffer, handle, _) = sharing(BOTH);
    let device = world.system.device("worker").unwrap();
    let loan = Arc::new(buffer.attach::<ToDevice>(&device.device).unwrap());
    let job = Job::begin(&loan, now()).unwrap();
    assert_eq!(stopped(&mut world, handle), over);
    drop(job);
    assert!(begun.elapsed() < Duration::from_secs(20));
}

/// However it comes to an end: whoever waits for the access is let in after the mapping has gone.
#[test]
fn an_access_ends_after_its_mapping_has_gone() {
    for how in 0..4 {
        let (mut world, buffer, handle, _) = sharing(BOTH);
        world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
        let (seen, watched) = (Arc::new(std::sync::Mutex::new(0)), buffer.clone());
        let count = seen.clone();
        world.tables.on_unmap(move |_| {
            assert_eq!(watched.users().cpu_writers, 1, "it has ended");
            assert_eq!(watched.users().spaces, 1);
            *count.lock().unwrap() += 1;
        });
        match how {
            0 => drop(world.call(Call::EndAccess, [handle]).unwrap()),
            1 => drop(world.call(Call::Close, [handle]).unwrap()),
            2 => assert!(world.process.end()),
            _ => drop(world.process),
        }
        assert_eq!(*seen.lock().unwrap(), 1, "{how}");
        assert_eq!(buffer.users(), dma::Users::default(), "{how}");
        assert!(world.tables.pages.lock().unwrap().is_empty());
        *world.tables.on_unmap.lock().unwrap() = None;
        assert!(how < 2 || buffer.into_pages().is_ok());
    }
}

#[test]
fn what_the_tables_do_not_let_go_of_stays_accessed_for_ever() {
    let (mut world, buffer, handle, at) = sharing(BOTH);
    world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
    *world.tables.stuck.lock().unwrap() = true;
    assert_eq!(world.call(Call::EndAccess, [handle]), Err(ErrorCode::Failed));
    *world.tables.stuck.lock().unwrap() = false;
    assert_eq!(busy(buffer.cpu_access::<CpuReads>().err().unwrap()), BusyWith::CpuWrites);
    assert_eq!(world.call(Call::BeginAccess, [handle, BOTH, 0]), Err(ErrorCode::Busy));
    assert_eq!(world.call(Call::EndAccess, [handle]), Err(ErrorCode::NotMapped));
    world.call(Call::Close, [handle]).unwrap();
    // Nothing else gets the addresses.
    let handle = world.call(Call::OpenBuffer, [0]).unwrap();
    assert_ne!(world.call(Call::MapBuffer, [handle, PAGE]), Ok(at));
    world.process.end();
    assert!(buffer.users().cpu_writers == 1 && buffer.into_pages().is_err());
}

#[test]
fn the_buffer_moves_between_accesses_and_not_within() {
    let (mut world, buffer, handle, at) = sharing(BOTH);
    world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
    world.process.space().copy_out(at + PAGE, b"wherever").unwrap();
    let before = world.tables.at(at + PAGE).unwrap().0;
    let other = pages(&world.system);
    let rejected = buffer.relocate(other, now()).unwrap_err();
    assert_eq!(busy(rejected.error), BusyWith::CpuWrites);
    world.call(Call::EndAccess, [handle]).unwrap();
    let old = buffer.relocate(rejected.buffer, now()).unwrap();
    world.call(Call::BeginAccess, [handle, READ, 0]).unwrap();
    assert_ne!(world.tables.at(at + PAGE).unwrap().0, before);
    let mut seen = [0; 8];
    world.process.space().copy_in(at + PAGE, &mut seen).unwrap();
    assert_eq!(&seen, b"wherever");
    drop(old);
}

/// A move that has begun keeps newcomers out; it goes on when the access has ended.
#[test]
fn a_move_waits_for_an_access_and_an_access_for_a_move() {
    let (mut world, buffer, handle, _) = sharing(BOTH);
    for round in 0..20 {
        world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
        let other = pages(&world.system);
        std::thread::scope(|scope| {
            let moved = scope.spawn(|| buffer.relocate(other, soon()));
            while !buffer.users().moving {
                std::thread::yield_now();
            }
            world.call(Call::EndAccess, [handle]).unwrap();
            let arguments = [handle, BOTH, 20_000_000_000, 0, 0, 0];
            let begun = world.process.call(Call::BeginAccess as u64, arguments, soon());
            assert!(matches!(begun, Next::Return(0, _)), "round {round}: {begun:?}");
            assert!(moved.join().unwrap().is_ok());
        });
        world.call(Call::EndAccess, [handle]).unwrap();
    }
}

#[test]
fn memory_is_mapped_as_it_is_or_not_at_all() {
    let mut world = World::new(Quota::default());
    for (cacheability, result) in [
        (Cacheability::WriteBack, Ok(Prot::READ | Prot::WRITE)),
        (Cacheability::NonCacheable, Ok(Prot::READ | Prot::WRITE | Prot::NON_COHERENT)),
        (Cacheability::Unmapped, Err(ErrorCode::Unsupported)),
    ] {
        let carved = CarvedOut::allocate(world.system.memory, LEN, cacheability).unwrap();
        let buffer = SharedBuffer::export("carved", carved).unwrap();
        let number = world.process.share(buffer, BOTH).unwrap();
        let handle = world.call(Call::OpenBuffer, [number]).unwrap();
        let at = world.call(Call::MapBuffer, [handle, PAGE]).unwrap();
        let begun = world.call(Call::BeginAccess, [handle, BOTH, 0]);
        assert_eq!(begun.map(|_| world.tables.at(at).unwrap().1), result);
    }
}

/// What the process wrote is in memory when a device that does not snoop looks.
#[test]
fn a_device_that_does_not_snoop_sees_what_the_process_wrote() {
    let (mut world, buffer, handle, at) = sharing_on(FakeSystem::non_coherent(), BOTH);
    let gpu = world.system.device("gpu").unwrap();
    let shown = Arc::new(buffer.attach::<ToDevice>(&gpu.device).unwrap());
    world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
    world.process.space().copy_out(at + 3, b"drawn").unwrap();
    world.call(Call::EndAccess, [handle]).unwrap();
    let mut seen = [0; 5];
    gpu.master.read(iommu::Iova::new(shown.iova().get() + 3), &mut seen).unwrap();
    assert_eq!(&seen, b"drawn");
}

#[test]
fn addresses_are_aligned_as_asked_and_counted() {
    let quota = Quota { shared: 3 * LEN, handles: 8, ..Quota::default() };
    let mut world = World::new(quota);
    let buffer = SharedBuffer::new("shared", pages(&world.system));
    world.process.share(buffer, BOTH).unwrap();
    let handle = world.call(Call::OpenBuffer, [0]).unwrap();
    for alignment in [0, 1, PAGE / 2, PAGE + 1, 3 * PAGE, 2 * ALIGNMENT_MAX, 1 << 63, u64::MAX] {
        assert_eq!(world.call(Call::MapBuffer, [handle, alignment]), Err(ErrorCode::Misaligned), "{alignment:#x}");
    }
    assert_eq!(world.call(Call::BeginAccess, [handle, READ, 0]), Err(ErrorCode::NotMapped));
    let mut handles = vec![handle];
    for alignment in [ALIGNMENT_MAX, PAGE, 1 << 21] {
        let handle = *handles.last().unwrap();
        let at = world.call(Call::MapBuffer, [handle, alignment]).unwrap();
        assert!(at.is_multiple_of(alignment) && process::MAPS.contains(&at));
        assert_eq!(world.call(Call::MapBuffer, [handle, alignment]), Err(ErrorCode::Overlap));
        // Nobody but the handle gives them back.
        assert_eq!(world.call(Call::Unmap, [at, LEN]), Err(ErrorCode::NotMapped));
        world.call(Call::BeginAccess, [handle, READ, 0]).unwrap();
        assert_eq!(world.call(Call::Unmap, [at, LEN]), Err(ErrorCode::NotMapped));
        assert_eq!(world.call(Call::BeginAccess, [handle, READ, 0]), Err(ErrorCode::Busy));
        handles.push(world.call(Call::OpenBuffer, [0]).unwrap());
    }
    let last = handles.pop().unwrap();
    assert_eq!(world.call(Call::MapBuffer, [last, PAGE]), Err(ErrorCode::Quota));
    world.call(Call::Close, [handles[0]]).unwrap();
    world.call(Call::MapBuffer, [last, PAGE]).unwrap();
    assert_eq!(world.process.space().mapped_pages(), 0, "it is not the process's own memory");
}

#[test]
fn what_is_shared_is_not_lent_to_a_device_of_the_processs() {
    let (mut world, _, handle, at) = sharing(BOTH);
    let device = world.open();
    world.call(Call::BeginAccess, [handle, BOTH, 0]).unwrap();
    assert_eq!(world.call(Call::Lend, [device, 0x5000_0000, at, PAGE, READ]), Err(ErrorCode::BadAddress));
}

#[test]
fn a_handle_is_of_one_kind() {
    let (mut world, _, buffer, _) = sharing(BOTH);
    let device = world.open();
    let number = world.process.put_event(Arc::default()).unwrap();
    let event = world.call(Call::OpenEvent, [number]).unwrap();
    let of_devices = [Call::Config, Call::Registers, Call::BarSize, Call::Lend, Call::TakeBack, Call::Connect];
    let of_buffers = [Call::BufferSize, Call::MapBuffer, Call::EndAccess];
    for handle in [buffer, event] {
        for call in of_devices {
            assert_eq!(world.call(call, [handle, 0, PAGE, PAGE, READ]), Err(ErrorCode::BadHandle), "{call:?}");
        }
        assert_eq!(world.call(Call::Acknowledge, [handle]), Err(ErrorCode::BadHandle));
    }
    for handle in [device, event] {
        for call in of_buffers {
            assert_eq!(world.call(call, [handle, PAGE]), Err(ErrorCode::BadHandle), "{call:?}");
        }
        assert_eq!(world.call(Call::BeginAccess, [handle, READ, 0]), Err(ErrorCode::BadHandle));
    }
    for handle in [device, buffer] {
        assert_eq!(world.call(Call::Raise, [handle]), Err(ErrorCode::BadHandle));
    }
    assert_eq!(world.call(Call::Wait, [buffer, 0]), Err(ErrorCode::BadHandle));
    for call in [Call::OpenBuffer, Call::OpenEvent, Call::MapMemory, Call::MemorySize] {
        for number in [1, u64::MAX] {
            assert_eq!(world.call(call, [number, READ]), Err(ErrorCode::NotPutBy), "{call:?}");
        }
    }
}

#[test]
fn an_event_goes_both_ways() {
    let mut world = World::new(Quota::default());
    let event = Arc::new(Event::default());
    let number = world.process.put_event(event.clone()).unwrap();
    let handle = world.call(Call::OpenEvent, [number]).unwrap();
    assert_eq!(world.call(Call::Wait, [handle, 0]), Err(ErrorCode::TimedOut));
    event.raise();
    event.raise();
    assert_eq!(world.call(Call::Wait, [handle, 0]), Ok(2));
    world.call(Call::Raise, [handle]).unwrap();
    assert_eq!(event.take(), 1);
    world.call(Call::Close, [handle]).unwrap();
    assert_eq!(world.call(Call::Raise, [handle]), Err(ErrorCode::BadHandle));
}

#[test]
fn memory_that_was_put_by_is_there_until_it_is_unmapped() {
    let quota = Quota { shared: 2 * LEN, ..Quota::default() };
    let mut world = World::new(quota);
    let memory = Arc::new(OpenPages::zeroed(world.system.memory, LEN, Ladder::DEFAULT).unwrap());
    assert_eq!(world.process.put_memory(memory.clone(), READ).unwrap(), 0);
    assert_eq!(world.process.put_memory(memory.clone(), BOTH).unwrap(), 1);
    assert_eq!(world.call(Call::MemorySize, [0]), Ok(LEN));
    assert_eq!(world.call(Call::MapMemory, [0, BOTH]), Err(ErrorCode::BadRights));
    let (first, second) = (world.call(Call::MapMemory, [0, READ]), world.call(Call::MapMemory, [1, BOTH]));
    let (first, second) = (first.unwrap(), second.unwrap());
    world.process.space().copy_out(second + 5, b"both see it").unwrap();
    let mut seen = [0; 11];
    world.process.space().copy_in(first + 5, &mut seen).unwrap();
    assert_eq!(&seen, b"both see it");
    assert_eq!(world.call(Call::MapMemory, [1, READ]), Err(ErrorCode::Quota));
    world.call(Call::Unmap, [first, LEN]).unwrap();
    world.call(Call::MapMemory, [1, READ]).unwrap();
    assert_eq!(world.process.space().mapped_pages(), 0);
}

/// Device, kernel and process have it at the same time; the device until nobody holds it.
#[test]
fn coherent_memory_is_its_devices_as_long_as_a_process_has_it_mapped() {
    for (system, attributes) in [(FakeSystem::new(), Prot::empty()), (FakeSystem::non_coherent(), Prot::NON_COHERENT)] {
        let mut world = World::on(system, Quota::default());
        let fake = world.system.device("device").unwrap();
        let pages = Arc::new(CoherentPages::new(&fake.device, 2 * PAGE).unwrap());
        let (iova, phys) = (pages.iova(), pages.runs()[0].start());
        world.process.put_memory(pages.clone(), BOTH).unwrap();
        let at = world.call(Call::MapMemory, [0, BOTH]).unwrap();
        assert_eq!(world.tables.at(at), Some((phys, Prot::READ | Prot::WRITE | attributes)));
        fake.master.write(iova, b"device").unwrap();
        world.process.space().copy_out(at + 6, b" process").unwrap();
        pages.write_at(14, b" kernel").unwrap();
        let mut seen = [[0; 21]; 3];
        fake.master.read(iova, &mut seen[0]).unwrap();
        world.process.space().copy_in(at, &mut seen[1]).unwrap();
        pages.read_at(0, &mut seen[2]).unwrap();
        assert_eq!(seen, [*b"device process kernel"; 3]);
        // The kernel's driver has gone.
        drop(pages);
        fake.master.write(iova, b"D").unwrap();
        let live = world.system.memory.live_bytes();
        world.call(Call::Unmap, [at, 2 * PAGE]).unwrap();
        fake.master.write(iova, b"D").unwrap();
        assert!(world.process.end());
        assert!(fake.master.write(iova, b"D").is_err());
        assert_eq!(world.system.memory.live_bytes() + 2 * PAGE, live);
        assert!(world.system.memory.violations().is_empty());
    }
}

/// Memory that a device does not snoop has no cached alias.
#[test]
fn coherent_memory_that_is_not_cached_is_not_cached_in_a_process() {
    let mut world = World::new(Quota::default());
    let fake = world.system.device("device").unwrap();
    let pages = Arc::new(CoherentPages::not_cached(&fake.device, 1).unwrap());
    assert_eq!(world.system.memory.cacheability_at(pages.runs()[0].start()), Some(Cacheability::NonCacheable));
    world.process.put_memory(pages, READ).unwrap();
    assert_eq!(world.call(Call::MapMemory, [0, BOTH]), Err(ErrorCode::BadRights));
    let at = world.call(Call::MapMemory, [0, READ]).unwrap();
    assert_eq!(world.tables.at(at).unwrap().1, Prot::READ | Prot::NON_COHERENT);
}
