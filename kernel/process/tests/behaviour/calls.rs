//! Single calls.

use crate::machine::{BAR, DOORBELL, World};
use abi::{Call, ErrorCode, PAGE, READ, WRITE};
use iommu::{Iova, PhysAddr, PhysRange};
use process::{Error, Quota, RegisterWindow, window};

const IOVA: u64 = 0x5000_0000;

fn lent(world: &mut World, rights: u64) -> (u64, u64) {
    let handle = world.open();
    let at = world.call(Call::Map, [2 * PAGE, READ | WRITE]).unwrap();
    world.call(Call::Lend, [handle, IOVA, at + PAGE, PAGE, rights]).unwrap();
    (handle, at)
}

#[test]
fn a_device_reaches_what_was_lent_for_as_long_as_it_is() {
    let mut world = World::new(Quota::default());
    let (handle, at) = lent(&mut world, READ | WRITE);
    world.master.write(Iova::new(IOVA + 8), b"from the device").unwrap();
    let mut seen = [0; 15];
    world.process.space().copy_in(at + PAGE + 8, &mut seen).unwrap();
    assert_eq!(&seen, b"from the device");
    world.call(Call::TakeBack, [handle, IOVA, PAGE]).unwrap();
    assert!(world.master.write(Iova::new(IOVA), b"x").is_err());
}

/// Red without the count of loans in the region.
#[test]
fn memory_that_is_lent_stays_where_it_is() {
    let mut world = World::new(Quota::default());
    let (handle, at) = lent(&mut world, READ);
    assert_eq!(world.call(Call::Unmap, [at, 2 * PAGE]), Err(ErrorCode::Busy));
    world.call(Call::TakeBack, [handle, IOVA, PAGE]).unwrap();
    assert_eq!(world.call(Call::Unmap, [at, 2 * PAGE]), Ok(0));
}

#[test]
fn a_loan_has_the_rights_that_were_given() {
    let mut world = World::new(Quota::default());
    lent(&mut world, READ);
    let mut seen = [0; 4];
    world.master.read(Iova::new(IOVA), &mut seen).unwrap();
    assert!(world.master.write(Iova::new(IOVA), b"x").is_err());
}

#[test]
fn what_is_set_aside_for_the_device_cannot_be_mapped_over() {
    let mut world = World::new(Quota::default());
    let (handle, at) = lent(&mut world, READ);
    for iova in [DOORBELL, DOORBELL - PAGE] {
        let lend = world.call(Call::Lend, [handle, iova, at, 2 * PAGE, READ]);
        assert_eq!(lend, Err(ErrorCode::Reserved));
    }
    assert_eq!(world.call(Call::Lend, [handle, IOVA - PAGE, at, 2 * PAGE, READ]), Err(ErrorCode::Overlap));
}

/// When the process ends the device is stopped before anything of its memory is freed. Red when `end` frees first.
#[test]
fn the_end_of_a_process_stops_its_device_and_gives_everything_back() {
    let mut world = World::new(Quota::default());
    let before = world.system.memory.live_allocations();
    lent(&mut world, READ | WRITE);
    let story = world.story.clone();
    world.system.iommu.on_revoke(move |_| assert!(story.lock().unwrap().stopped, "revoked under a running device"));
    let World { process, master, system, story, tables, .. } = world;
    assert!(process.end());
    assert!(story.lock().unwrap().stopped);
    assert!(master.write(Iova::new(IOVA), b"x").is_err());
    assert!(tables.pages.lock().unwrap().is_empty());
    assert!(system.memory.live_allocations() <= before, "{} after {before}", system.memory.live_allocations());
}

/// Red when the memory is freed whatever the revocation says.
#[test]
fn memory_that_cannot_be_revoked_is_never_used_again() {
    let mut world = World::new(Quota::default());
    let (handle, at) = lent(&mut world, READ | WRITE);
    world.master.write(Iova::new(IOVA), b"x").unwrap();
    world.system.iommu.wedge(true);
    assert_eq!(world.call(Call::TakeBack, [handle, IOVA, PAGE]), Err(ErrorCode::Failed));
    assert_eq!(world.call(Call::Unmap, [at, 2 * PAGE]), Err(ErrorCode::Busy));
    let live = world.system.memory.live_allocations();
    // What the device has translated before it still reaches: memory that is nobody else's.
    world.master.write(Iova::new(IOVA), b"y").unwrap();
    assert_eq!(world.system.memory.live_allocations(), live);
    world.system.iommu.wedge(false);
}

/// As above, for the process's own tables.
#[test]
fn memory_that_the_tables_do_not_let_go_of_is_never_used_again() {
    let mut world = World::new(Quota::default());
    let at = world.call(Call::Map, [PAGE, READ]).unwrap();
    let live = world.system.memory.live_bytes();
    *world.tables.stuck.lock().unwrap() = true;
    assert_eq!(world.call(Call::Unmap, [at, PAGE]), Err(ErrorCode::Failed));
    assert_eq!(world.system.memory.live_bytes(), live);
    assert_eq!(world.call(Call::Unmap, [at, PAGE]), Err(ErrorCode::NotMapped));
    *world.tables.stuck.lock().unwrap() = false;
    // Nor are its addresses.
    assert_ne!(world.call(Call::Map, [PAGE, READ]), Ok(at));
}

#[test]
fn registers_go_with_the_device() {
    let mut world = World::new(Quota::default());
    let handle = world.open();
    let at = world.call(Call::Registers, [handle, 0]).unwrap();
    let first = world.tables.pages.lock().unwrap()[&at];
    assert_eq!(first.0, PhysAddr::new(BAR));
    assert!(first.1.contains(iommu::Prot::MMIO));
    // The kernel reads no register on a process's behalf, and lends none.
    assert_eq!(world.call(Call::Write, [at, 8]), Err(ErrorCode::BadAddress));
    assert_eq!(world.call(Call::Lend, [handle, IOVA, at, PAGE, READ]), Err(ErrorCode::BadAddress));
    world.call(Call::Close, [handle]).unwrap();
    assert!(world.tables.pages.lock().unwrap().is_empty());
    assert_eq!(world.call(Call::Config, [handle, 0]), Err(ErrorCode::BadHandle));
    assert_eq!(world.call(Call::Open, [0, 0]), Err(ErrorCode::Busy));
}

/// Red when a place in the table of handles does not count how often it was used.
#[test]
fn a_handle_that_was_closed_does_not_name_what_comes_after_it() {
    let mut world = World::new(Quota::default());
    let first = world.open();
    world.call(Call::Close, [first]).unwrap();
    let number = world.another_device();
    let second = world.call(Call::Open, [number, 0]).unwrap();
    assert_ne!(first, second);
    assert_eq!(world.call(Call::Config, [first, 0]), Err(ErrorCode::BadHandle));
    assert_eq!(world.call(Call::Config, [second, 4]), Ok(4));
}

#[test]
fn a_quota_is_kept() {
    let mut world = World::new(Quota { pages: 4, regions: 3, handles: 1, loans: 1, ..Quota::default() });
    assert_eq!(world.call(Call::Map, [5 * PAGE, READ]), Err(ErrorCode::Quota));
    let at = world.call(Call::Map, [3 * PAGE, READ]).unwrap();
    assert_eq!(world.call(Call::Map, [2 * PAGE, READ]), Err(ErrorCode::Quota));
    world.call(Call::Map, [PAGE, READ]).unwrap();
    assert_eq!(world.call(Call::Map, [PAGE, READ]), Err(ErrorCode::Quota));
    let handle = world.open();
    world.call(Call::Registers, [handle, 0]).unwrap();
    assert_eq!(world.call(Call::Registers, [handle, 0]), Err(ErrorCode::Quota));
    world.call(Call::Lend, [handle, IOVA, at, PAGE, READ]).unwrap();
    assert_eq!(world.call(Call::Lend, [handle, IOVA + PAGE, at, PAGE, READ]), Err(ErrorCode::Quota));
}

/// Tables stay as long as the address space. Red when what a loan may need is not charged, or given back with the loan.
#[test]
fn a_process_that_lends_everywhere_is_stopped_by_its_quota() {
    let mut world = World::new(Quota { tables: 100, ..Quota::default() });
    let handle = world.open();
    let at = world.call(Call::Map, [PAGE, READ]).unwrap();
    let mut lend = |iova| {
        world.call(Call::Lend, [handle, iova, at, PAGE, READ])?;
        world.call(Call::TakeBack, [handle, iova, PAGE]).map(drop)
    };
    let lent = (0..1000).take_while(|place| lend(IOVA + (place << 30)).is_ok()).count();
    assert_eq!(lent, 8);
    assert_eq!(lend(IOVA + (10 << 30)), Err(ErrorCode::Quota));
    assert_eq!(lend(IOVA), Ok(()));
}

/// What was refused last is there for whoever reports its end.
#[test]
fn a_process_that_goes_on_talking_is_told_so_and_its_last_words_are_kept() {
    let mut world = World::new(Quota { lines: 5, ..Quota::default() });
    let at = world.call(Call::Map, [PAGE, READ | WRITE]).unwrap();
    // Lines come back with time: one for each call at most would need a tenth of a second each.
    let said = (0..1000).filter(|_| world.call(Call::Write, [at, 8]).is_ok()).count();
    assert!((5..1000).contains(&said), "{said}");
    let mut refused = 0;
    while world.call(Call::Write, [at, 4]) != Err(ErrorCode::Quota) {
        refused += 1;
        assert!(refused < 1000);
    }
    let (unsaid, last) = world.process.unsaid();
    assert!(unsaid as usize >= 1000 - said && last == Some("????"), "{unsaid} {last:?}");
}

#[test]
fn an_event_is_waited_for_with_a_deadline() {
    let mut world = World::new(Quota::default());
    let handle = world.open();
    assert_eq!(world.call(Call::Wait, [handle, 1000]), Err(ErrorCode::TimedOut));
    world.event.raise();
    world.event.raise();
    assert_eq!(world.call(Call::Wait, [handle, u64::MAX]), Ok(2));
    assert_eq!(world.call(Call::Wait, [handle, u64::MAX]), Err(ErrorCode::TimedOut));
}

#[test]
fn a_window_is_whole_pages_and_nobody_elses() {
    let range = |start, len| PhysRange::new(PhysAddr::new(start), len).unwrap();
    let check =
        |own, others: &[PhysRange]| window(RegisterWindow { bar: 0, range: own, others: &mut others.iter().copied() });
    assert!(check(range(0x1000, 0x1000), &[range(0, 0x1000), range(0x2000, 0x10)]).is_ok());
    for (own, others) in [
        (range(0x1000, 0x100), vec![]),
        (range(0x1800, 0x1000), vec![]),
        (range(0x1000, 0), vec![]),
        (range(0x1000, 0x1000), vec![range(0x1ff0, 0x10)]),
    ] {
        assert!(matches!(check(own, &others), Err(Error::Window { .. })), "{own} {others:?}");
    }
}
