//! Loans that end together: one completion, and no page a moment earlier.

use dma::fakes::{FakeDevice, FakeSystem};
use dma::{
    BusWindow, Device, DirectConfig, Ending, FromDevice, Gather, Ladder, Limits, Mapped, PageSet, Pages, SharedBuffer,
    ToDevice, end_together, quarantine,
};
use iommu::{FaultReason, IovaRange, RevokeError};
use std::sync::{Arc, Mutex};

type Read = Mapped<FromDevice, Pages>;

fn read(of: &FakeDevice, pages: u64) -> Read {
    of.device.map(of.device.pages(pages * 4096).unwrap()).unwrap()
}

/// The ranges of each revocation of `system` from here on.
fn revoked(system: &FakeSystem) -> Arc<Mutex<Vec<IovaRange>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let list = seen.clone();
    system.iommu.on_revoke(move |range| list.lock().unwrap().push(range));
    seen
}

/// Caught: `end_all` that takes each place's range for a revocation of its own (32 revocations), and one that settles the
/// places without revoking (the late write then reaches the pages).
#[test]
fn many_mappings_end_with_one_revocation_of_few_ranges_and_give_back_their_pages_in_order() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut gather = Gather::<Read, 32>::new();
    let mut at = Vec::new();
    for i in 0..32_u8 {
        let mapped = read(&blk, 1);
        blk.master.write(mapped.iova(), &[i]).unwrap();
        at.push(mapped.iova());
        gather.push(mapped).unwrap();
    }
    let ranges = revoked(&system);
    let back: Vec<_> = gather.finish().map(Result::unwrap).collect();
    assert_eq!((system.iommu.revocations(), ranges.lock().unwrap().len()), (1, 1), "32 neighbours are one range");
    for (i, pages) in (0..).zip(&back) {
        assert_eq!(pages.as_slice()[0], i);
    }
    for iova in at {
        assert_eq!(blk.master.write(iova, b"late").unwrap_err().reason, FaultReason::NotMapped);
    }
    assert_eq!(blk.device.stats().live_mappings, 0);
    assert_eq!(system.memory.live_allocations(), 32);
    drop(back);
    assert_eq!(system.memory.live_allocations(), 0);
    assert!(system.memory.violations().is_empty());
}

#[test]
fn the_device_has_the_memory_until_the_gather_ends() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = read(&blk, 1);
    let iova = mapped.iova();
    let mut gather = Gather::<Read, 4>::new();
    gather.push(mapped).unwrap();
    blk.master.write(iova, b"in time").unwrap();
    assert_eq!(blk.device.stats().live_mappings, 1);
    let pages = gather.finish().next().unwrap().unwrap();
    assert_eq!(&pages.as_slice()[..7], b"in time");
}

/// Caught: a `Gather` without its end in `drop` (each place then revokes for itself: three revocations).
#[test]
fn a_dropped_gather_ends_its_loans_together() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut gather = Gather::<Read, 4>::new();
    let at: Vec<_> =
        (0..3).map(|_| read(&blk, 2)).map(|mapped| (mapped.iova(), gather.push(mapped).unwrap()).0).collect();
    drop(gather);
    assert_eq!(system.iommu.revocations(), 1);
    assert_eq!((system.memory.live_allocations(), blk.device.stats().live_mappings), (0, 0));
    for iova in at {
        assert!(blk.master.write(iova, b"late").is_err());
    }
}

#[test]
fn a_full_gather_gives_the_mapping_back_and_a_drained_one_takes_more() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut gather = Gather::<Read, 2>::new();
    gather.push(read(&blk, 1)).unwrap();
    gather.push(read(&blk, 1)).unwrap();
    assert!(gather.is_full());
    let third = gather.push(read(&blk, 1)).unwrap_err();
    assert_eq!(gather.drain().count(), 2);
    assert!(gather.is_empty());
    gather.push(third).unwrap();
    // What is not taken is freed.
    drop(gather.drain());
    assert_eq!((system.memory.live_allocations(), blk.device.stats().live_mappings), (0, 0));
    assert_eq!(system.iommu.revocations(), 2);
}

/// Caught: grouping by device instead of by address space is seen in the count; a group that takes in the ranges of another
/// space is seen by the pages of the second device, which then stay reachable.
#[test]
fn mappings_of_several_devices_end_with_one_revocation_for_each() {
    let system = FakeSystem::new();
    let (a, b) = (system.device("a").unwrap(), system.device("b").unwrap());
    let mut gather = Gather::<Read, 8>::new();
    let mut at = Vec::new();
    for i in 0..8 {
        let of = if i % 3 == 0 { &a } else { &b };
        let mapped = read(of, 1);
        of.master.write(mapped.iova(), &[i]).unwrap();
        at.push((of, mapped.iova()));
        gather.push(mapped).unwrap();
    }
    let first: Vec<_> = gather.finish().map(|pages| pages.unwrap().as_slice()[0]).collect();
    assert_eq!(first, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(system.iommu.revocations(), 2);
    for (of, iova) in at {
        assert!(of.master.write(iova, b"late").is_err());
    }
    assert!(system.memory.violations().is_empty());
}

/// Caught: `settle` called with `Ok` whatever the outcome (the pages are then freed while the device reaches them: a
/// violation).
#[test]
fn a_revocation_that_fails_quarantines_all_that_it_was_to_cover_and_nothing_else() {
    let (system, other) = (FakeSystem::new(), FakeSystem::new());
    let (blk, fine) = (system.device("gather-blk").unwrap(), other.device("gather-fine").unwrap());
    let mut gather = Gather::<Read, 4>::new();
    let mut at = Vec::new();
    for of in [&blk, &fine, &blk] {
        let mapped = read(of, 2);
        of.master.write(mapped.iova(), b"cached").unwrap();
        at.push(mapped.iova());
        gather.push(mapped).unwrap();
    }
    system.iommu.wedge(true);
    let back: Vec<_> = gather.finish().collect();
    let lost: Vec<_> = back.iter().filter_map(|back| back.as_ref().err()).collect();
    assert_eq!(
        lost.iter().map(|lost| (&*lost.device, lost.range.start(), lost.cause)).collect::<Vec<_>>(),
        [("gather-blk", at[0], RevokeError::TimedOut), ("gather-blk", at[2], RevokeError::TimedOut)]
    );
    assert!(back[1].is_ok());
    drop(back);
    assert_eq!(blk.device.stats().quarantined_pages, 4);
    assert_eq!(quarantine::report().names.iter().filter(|name| &*name.device == "gather-blk").count(), 2);
    // The device reaches them still: nobody else has them.
    for iova in [at[0], at[2]] {
        blk.master.write(iova, b"late").unwrap();
    }
    assert!(system.memory.violations().is_empty());
    assert_eq!((system.memory.live_allocations(), other.memory.live_allocations()), (2, 0));
}

#[test]
fn loans_of_several_types_end_with_one_revocation() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let shared = SharedBuffer::new("frame", PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap());
    let mut read = Ending::new(read(&blk, 1));
    let written = PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap();
    let mut written = Ending::new(blk.device.map::<ToDevice, _>(written).unwrap());
    let mut attachment = Ending::new(shared.attach::<FromDevice>(&blk.device).unwrap());
    end_together(&mut [&mut read, &mut written, &mut attachment]);
    assert_eq!(system.iommu.revocations(), 1);
    assert_eq!(shared.users().device_writers, 1, "as long as nobody took it");
    attachment.take().unwrap();
    assert_eq!((read.take().unwrap().len(), written.take().unwrap().len()), (4096, 8192));
    assert_eq!(shared.users(), Default::default());
    assert!(shared.into_pages().is_ok());
}

#[test]
fn more_separate_ranges_than_fit_one_revocation_all_end() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let (mut ending, mut kept) = (Vec::new(), Vec::new());
    for i in 0..200 {
        let mapped = read(&blk, 1);
        if i % 2 == 0 { ending.push(Ending::new(mapped)) } else { kept.push(mapped) }
    }
    end_together(&mut ending.iter_mut().map(|ending| ending as _).collect::<Vec<_>>());
    assert_eq!(system.iommu.revocations(), 2);
    assert!(ending.into_iter().all(|ending| ending.take().is_ok()));
    assert_eq!(blk.device.stats().live_mappings, 100);
    for mapped in kept {
        blk.master.write(mapped.iova(), b"mine").unwrap();
    }
    assert!(system.memory.violations().is_empty());
}

#[test]
fn an_ending_that_was_never_ended_together_ends_by_itself() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let (taken, dropped) = (read(&blk, 1), read(&blk, 1));
    let at = [taken.iova(), dropped.iova()];
    assert!(Ending::new(taken).take().is_ok());
    drop(Ending::new(dropped));
    assert!(at.iter().all(|iova| blk.master.write(*iova, b"late").is_err()));
    assert_eq!(system.memory.live_allocations(), 0);
}

#[test]
fn devices_that_nothing_translates_for_end_with_the_others() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let windows = [BusWindow::identity()];
    let config =
        DirectConfig { name: "direct", windows: &windows, limits: Limits::NONE, coherent: true, memory: system.memory };
    // SAFETY: the device does not exist.
    let direct = unsafe { Device::direct(config) }.unwrap();
    let mut gather = Gather::<Read, 4>::new();
    gather.push(direct.map(direct.pages(4096).unwrap()).unwrap()).unwrap();
    gather.push(read(&blk, 1)).unwrap();
    assert!(gather.finish().all(|pages| pages.is_ok()));
    assert_eq!(system.iommu.revocations(), 1);
    assert_eq!((direct.stats().live_mappings, blk.device.stats().live_mappings), (0, 0));
}
