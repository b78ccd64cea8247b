//! Copies: when there are some, what they show to whom, and what becomes of them when something goes wrong.

use crate::backends::{direct, memory_at, restricted, window};
use core::sync::atomic::AtomicU32;
use dma::fakes::{FakeMemoryConfig, FakeSystem};
use dma::{
    AttributeError, Bidirectional, Bounce, BusWindow, Cacheability, CarvedOut, CpuReads, Error, FromDevice, Ladder,
    Lent, Limits, PageSet, Pages, Policy, Pool, PoolSource, SharedBuffer, ToDevice, slice,
};
use iommu::PhysAddr;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const OWN: PoolSource = PoolSource::Own(MIB);

fn always() -> Policy {
    Policy { bounce: Bounce::Always(OWN), trusted: false }
}

#[test]
fn a_device_that_reaches_the_buffer_gets_no_copy_and_has_no_pool() {
    let memory = memory_at(0x4000_0000, true);
    let (device, _) = direct(memory, &[BusWindow::identity()], Limits::address_bits(32), Bounce::Needed(OWN));
    let mapped = device.map::<ToDevice, _>(device.pages(4096).unwrap()).unwrap();
    assert_eq!((device.copies(), memory.live_bytes()), (0, 4096));
    drop(mapped);
}

/// Caught: `Direct::near` without the device's alignment; `bounce::lend` without the copy.
#[test]
fn a_buffer_with_the_wrong_alignment_is_copied_to_where_it_is_right() {
    let memory = memory_at(0x4000_1000, true);
    let limits = Limits { min_align: 1 << 16, ..Limits::NONE };
    let (device, master) = direct(memory, &[BusWindow::identity()], limits, Bounce::Needed(OWN));
    let mut pages = Pages::zeroed(memory, 8192).unwrap();
    pages.as_mut_slice()[5000] = 9;
    assert_ne!(pages.phys_runs()[0].start().get() % limits.min_align, 0);
    let mapped = device.map::<ToDevice, _>(pages).unwrap();
    assert_eq!((mapped.iova().get() % limits.min_align, device.copies()), (0, 1));
    let mut seen = [0];
    master.read(mapped.iova().checked_add(5000).unwrap(), &mut seen);
    assert_eq!(seen, [9]);
    // What the device allocates itself is where it needs it.
    drop(device.map::<ToDevice, _>(device.pages(4096).unwrap()).unwrap());
    assert_eq!(device.copies(), 1);
}

/// Caught: `bounce::lend` without its maintenance, `take_over` without its, and without its copy.
#[test]
fn what_a_pool_held_before_is_seen_by_nobody() {
    for snooped in [true, false] {
        let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
        let (one, other) = (
            system.device_with_policy("one", Limits::NONE, always()).unwrap(),
            Arc::new(Pool::new("shared", system.memory, MIB, PhysAddr::new(u64::MAX)).unwrap()),
        );
        drop(one);
        let policy = || Policy { bounce: Bounce::Always(PoolSource::Shared(other.clone())), trusted: false };
        let (one, two) = (
            system.device_with_policy("one", Limits::NONE, policy()).unwrap(),
            system.device_with_policy("two", Limits::NONE, policy()).unwrap(),
        );
        let mut secret = Pages::zeroed(system.memory, 4096).unwrap();
        secret.as_mut_slice().fill(0x5e);
        drop(one.device.map::<ToDevice, _>(secret).unwrap());
        let mapped = two.device.map::<FromDevice, _>(Pages::zeroed(system.memory, 4096).unwrap()).unwrap();
        two.master.write(mapped.iova(), b"short").unwrap();
        let pages = mapped.unmap().unwrap();
        assert!(&pages.as_slice()[..5] == b"short" && pages.as_slice()[5..].iter().all(|byte| *byte == 0));
        assert_eq!(other.used(), 0);
    }
}

/// Caught: a `Bounced` that does not give its runs back when it is dropped.
#[test]
fn a_pool_that_is_exhausted_says_so_by_name_and_recovers() {
    let system = FakeSystem::new();
    let pool = Arc::new(Pool::new("tight", system.memory, MIB, PhysAddr::new(u64::MAX)).unwrap());
    let policy = Policy { bounce: Bounce::Always(PoolSource::Shared(pool.clone())), trusted: false };
    let dev = system.device_with_policy("dev", Limits::NONE, policy).unwrap();
    assert_eq!(dev.device.max_mapping_size(), MIB);
    let buffer = |bytes| PageSet::zeroed(system.memory, bytes, Ladder::SINGLE_PAGES).unwrap();
    let most = dev.device.map::<Bidirectional, _>(buffer(MIB - 4096)).unwrap();
    let error = dev.device.map::<ToDevice, _>(buffer(3 * 4096)).unwrap_err().error;
    assert_eq!(error, Error::PoolExhausted { pool: "tight".into(), len: 3 * 4096, size: MIB });
    assert!(error.to_string().contains("tight"));
    assert_eq!(pool.used(), MIB - 4096);
    drop(most);
    assert_eq!(pool.used(), 0);
    let whole = dev.device.map::<ToDevice, _>(buffer(MIB)).unwrap();
    assert_eq!(whole.segments().len(), 1);
    drop(whole);
    let never = dev.device.map::<ToDevice, _>(buffer(MIB + 4096)).unwrap_err().error;
    assert!(matches!(never, Error::PoolExhausted { .. }));
    assert_eq!((pool.used(), dev.device.stats().live_mappings), (0, 0));
}

/// Caught: `Bounced::take` that insists on one run.
#[test]
fn a_pool_in_pieces_still_takes_a_large_buffer() {
    let memory = memory_at(0x4000_0000, true);
    let (device, master) = direct(memory, &[BusWindow::identity()], Limits::NONE, Bounce::Always(OWN));
    let mut small: Vec<_> =
        (0..256).map(|_| Some(device.map::<ToDevice, _>(Pages::zeroed(memory, 4096).unwrap()).unwrap())).collect();
    small.iter_mut().step_by(2).for_each(|mapped| drop(mapped.take()));
    let mut large = PageSet::zeroed(memory, MIB / 2, Ladder::SINGLE_PAGES).unwrap();
    large.write_at(300_000, b"far in").unwrap();
    let mapped = device.map::<ToDevice, _>(large).unwrap();
    assert_eq!(mapped.segments().len(), 128);
    let mut seen = [0; 6];
    master.read(slice(&mapped, 300_000, 6).unwrap().next().unwrap().iova, &mut seen);
    assert_eq!(&seen, b"far in");
}

/// Caught: `Held::end` that gives the runs of a copy back when its revocation failed.
#[test]
fn a_copy_that_cannot_be_revoked_is_lost_and_the_buffer_itself_is_not() {
    let system = FakeSystem::new();
    let pool = Arc::new(Pool::new("shared", system.memory, MIB, PhysAddr::new(u64::MAX)).unwrap());
    let policy = Policy { bounce: Bounce::Always(PoolSource::Shared(pool.clone())), trusted: false };
    let dev = system.device_with_policy("dev", Limits::NONE, policy).unwrap();
    let before = system.memory.live_allocations();
    let mapped = dev.device.map::<FromDevice, _>(Pages::zeroed(system.memory, 4096).unwrap()).unwrap();
    let iova = mapped.iova();
    dev.master.write(iova, b"x").unwrap();
    system.iommu.wedge(true);
    assert!(mapped.unmap().is_err());
    system.iommu.wedge(false);
    // The device still has the copy, and nobody else ever gets it.
    dev.master.write(iova, b"late").unwrap();
    assert_eq!((pool.used(), system.memory.live_allocations()), (4096, before));
    let other = dev.device.map::<FromDevice, _>(Pages::zeroed(system.memory, MIB - 8 * 4096).unwrap()).unwrap();
    dev.master.write(iova, &[0xee; 4096]).unwrap();
    assert!(other.unmap().unwrap().as_slice().iter().all(|byte| *byte == 0));
}

/// Caught: `lend` of a restricted device without `Copying::check`; `with_policy` that keeps the memory of the config.
#[test]
fn a_restricted_device_reaches_its_pool_and_nothing_else() {
    let system = FakeSystem::new();
    let pool = restricted(&system, MIB);
    let policy = Policy { bounce: Bounce::Restricted(pool), trusted: false };
    let dev = system.device_with_policy("dev", Limits::NONE, policy).unwrap();
    let in_pool = |lent: &dyn Lent| {
        let phys = |iova| dev.domain.space().translate(iova).unwrap().0.get();
        lent.segments().iter().all(|segment| {
            let of = |at| phys(segment.iova.checked_add(at).unwrap());
            (0..segment.len).step_by(4096).all(|at| (0x4000_0000..0x4000_0000 + MIB).contains(&of(at)))
        })
    };
    let own = dev.device.map::<Bidirectional, _>(dev.device.pages(8192).unwrap()).unwrap();
    assert!(in_pool(&own) && dev.device.copies() == 0 && pool.used() == 8192);
    let scattered = dev.device.page_set(MIB / 4, Ladder::DEFAULT).unwrap();
    let scattered = dev.device.map::<Bidirectional, _>(scattered).unwrap();
    assert!(in_pool(&scattered) && dev.device.copies() == 0);
    let ring = dev.device.coherent_slice::<AtomicU32>(100).unwrap();
    assert!(in_pool(&ring));
    let foreign = PageSet::zeroed(system.memory, 12288, Ladder::SINGLE_PAGES).unwrap();
    let foreign = dev.device.map::<Bidirectional, _>(foreign).unwrap();
    assert!(in_pool(&foreign) && dev.device.copies() == 1);
    let mut borrowed = [1; 100];
    dev.device.with_mapped::<ToDevice, _>(&mut borrowed, |scoped| assert!(in_pool(&**scoped.loan()))).unwrap();
    assert_eq!(dev.device.pages(MIB).unwrap_err(), Error::OutOfMemory);
    drop((own, scattered, ring, foreign));
    assert_eq!((pool.used(), system.memory.live_allocations()), (0, 1));
}

/// Caught: `Copying::check` that looks at the first run alone; `Pool::covers` that looks at where a run begins.
#[test]
fn what_is_only_partly_of_the_pool_is_copied() {
    let system = FakeSystem::with_memory(FakeMemoryConfig { gap: 0, ..FakeMemoryConfig::default() });
    let pool = restricted(&system, MIB);
    let policy = Policy { bounce: Bounce::Restricted(pool), trusted: false };
    let dev = system.device_with_policy("dev", Limits::NONE, policy).unwrap();
    let next = Pages::zeroed(system.memory, 4096).unwrap();
    let end = next.phys_runs()[0].start();
    let other = Pages::zeroed(system.memory, 4096).unwrap();
    // The last page of the pool and what follows it: one run. A page of the pool and one from elsewhere: two.
    let sets: Vec<_> = (0..4).map(|_| dev.device.pages(MIB / 4).unwrap()).collect();
    let last = sets.into_iter().find(|set| set.phys_runs()[0].end() == end).unwrap();
    let mut one = dev.device.scatter_list(2).unwrap();
    one.push_part(last, MIB / 4 - 4096, 4096).unwrap();
    one.push(next).unwrap();
    let mut two = dev.device.scatter_list(2).unwrap();
    two.push(dev.device.pages(4096).unwrap()).unwrap();
    two.push(other).unwrap();
    for (count, list) in (1..).zip([one, two]) {
        let mapped = dev.device.map_list::<Bidirectional, _>(list).unwrap();
        assert_eq!(dev.device.copies(), count);
        for at in [0, 4096] {
            let iova = slice(&mapped, at, 1).unwrap().next().unwrap().iova;
            assert!(dev.domain.space().translate(iova).unwrap().0 < end);
        }
    }
}

/// The one alias of a pool is cached.
#[test]
fn a_restricted_device_that_does_not_snoop_is_told_that_its_pool_has_no_uncached_memory() {
    let system = FakeSystem::non_coherent();
    let pool = restricted(&system, MIB);
    let policy = Policy { bounce: Bounce::Restricted(pool), trusted: false };
    let dev = system.device_with_policy("dev", Limits::NONE, policy).unwrap();
    let unsupported = Error::Attributes(AttributeError::Unsupported);
    assert_eq!(dev.device.coherent::<AtomicU32>().unwrap_err(), unsupported);
    assert_eq!(dev.device.coherent_init_slice::<AtomicU32>(8).unwrap_err(), unsupported);
    assert_eq!(dev.device.write_combined(4096).unwrap_err(), unsupported);
    assert_eq!(dev.device.hidden(4096).unwrap_err(), unsupported);
    // What is left is memory that is synced.
    let shared = dev.device.non_coherent(4096).unwrap();
    shared.view().write(0, b"ping").and_then(|()| shared.sync_for_device(0, 4)).unwrap();
    let mut seen = [0; 4];
    dev.master.read(shared.iova(), &mut seen).unwrap();
    assert_eq!(&seen, b"ping");
    drop(shared);
    assert_eq!((pool.used(), system.memory.violations()), (0, Vec::new()));
}

/// Caught: `bounce::sync_for_cpu` that copies all; syncs without their maintenance.
#[test]
fn a_sync_of_a_shared_buffer_copies_exactly_the_part_it_names() {
    for snooped in [true, false] {
        let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
        let (copied, straight) =
            (system.device_with_policy("copied", Limits::NONE, always()).unwrap(), system.device("straight").unwrap());
        let set = PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap();
        let shared = SharedBuffer::new("shared", set);
        let writer = shared.attach::<FromDevice>(&copied.device).unwrap();
        let reader = shared.attach::<ToDevice>(&straight.device).unwrap();
        let at = |iova: iommu::Iova, offset| iova.checked_add(offset).unwrap();
        let sees = |offset, len: usize| {
            let mut seen = vec![0; len];
            straight.master.read(at(reader.iova(), offset), &mut seen).unwrap();
            seen
        };
        copied.master.write(at(writer.iova(), 4090), b"one and two").unwrap();
        assert_eq!(sees(4090, 11), [0; 11]);
        writer.sync_for_cpu(4090, 3).unwrap();
        assert_eq!(sees(4090, 11), b"one\0\0\0\0\0\0\0\0");
        writer.sync_for_cpu(4098, 3).unwrap();
        assert_eq!(sees(4090, 11), b"one\0\0\0\0\0two");
        writer.detach().unwrap();
        assert_eq!(sees(4090, 11), b"one and two");
        reader.detach().unwrap();

        let reader = shared.attach::<ToDevice>(&copied.device).unwrap();
        let writer = shared.attach::<FromDevice>(&straight.device).unwrap();
        straight.master.write(at(writer.iova(), 0), b"back").unwrap();
        writer.sync_for_cpu(0, 4).unwrap();
        let mut seen = [0; 4];
        copied.master.read(reader.iova(), &mut seen).unwrap();
        assert_eq!(seen, [0; 4]);
        reader.sync_for_device(0, 2).unwrap();
        copied.master.read(reader.iova(), &mut seen).unwrap();
        assert_eq!(&seen, b"ba\0\0");
        drop((reader, writer));
        let mut seen = [0; 4];
        shared.cpu_access::<CpuReads>().unwrap().read_at(0, &mut seen).unwrap();
        assert_eq!(&seen, b"back");
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

/// Caught: `SharedBuffer::attach` without `write_alone`; a second writer let in beside the one with a copy.
#[test]
fn a_writer_with_a_copy_is_the_only_writer() {
    let system = FakeSystem::new();
    let (copied, straight) =
        (system.device_with_policy("copied", Limits::NONE, always()).unwrap(), system.device("straight").unwrap());
    let shared = SharedBuffer::new("shared", PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES).unwrap());
    let straight_writes = shared.attach::<FromDevice>(&straight.device).unwrap();
    straight.master.write(straight_writes.iova(), b"mine").unwrap();
    assert!(matches!(shared.attach::<FromDevice>(&copied.device), Err(Error::Busy { .. })));
    straight_writes.detach().unwrap();
    let copy_written = shared.attach::<FromDevice>(&copied.device).unwrap();
    assert!(matches!(shared.attach::<Bidirectional>(&straight.device), Err(Error::Busy { .. })));
    copied.master.write(copy_written.iova(), b"MI").unwrap();
    copy_written.detach().unwrap();
    assert_eq!(&shared.into_pages().unwrap().chunks().next().unwrap()[..4], b"MIne");
}

/// Caught: `SharedBuffer::attach` without `discard_copy`.
#[test]
fn a_writer_that_is_refused_leaves_nothing_of_its_copy() {
    let system = FakeSystem::new();
    let (copied, straight) =
        (system.device_with_policy("copied", Limits::NONE, always()).unwrap(), system.device("straight").unwrap());
    let shared = SharedBuffer::new("shared", PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES).unwrap());
    let writer = shared.attach::<FromDevice>(&straight.device).unwrap();
    // After the other's copy was made, before it is given up.
    let (master, iova) = (straight.master.clone(), writer.iova());
    system.iommu.on_revoke(move |_| assert!(master.write(iova, b"meanwhile").is_ok()));
    assert!(matches!(shared.attach::<Bidirectional>(&copied.device), Err(Error::Busy { .. })));
    system.iommu.on_revoke(|_| ());
    drop(writer);
    assert_eq!(&shared.into_pages().unwrap().chunks().next().unwrap()[..9], b"meanwhile");
}

/// Caught: `coherent_request`, `lend_coherent`, and the quick way past no IOMMU, with the mask for streaming mappings.
#[test]
fn coherent_memory_has_address_lines_of_its_own() {
    let limits = Limits { coherent_mask: 0xf_ffff, ..Limits::address_bits(32) };
    let system = FakeSystem::new();
    let dev = system.device_with("dev", limits).unwrap();
    let kept: Vec<_> = (0..64).map(|_| dev.device.coherent_slice::<AtomicU32>(1024).unwrap()).collect();
    assert!(kept.iter().all(|ring| ring.iova().get() + 4095 <= 0xf_ffff));
    assert!(dev.device.map::<ToDevice, _>(Pages::zeroed(system.memory, 2 * MIB).unwrap()).is_ok());

    let memory = memory_at(0x8000_0000, true);
    let windows = [window(0x8000_0000, 0x1000_0000, 0)];
    let limits = Limits { coherent_mask: 0x1fff, ..Limits::NONE };
    let (device, _) = direct(memory, &windows, limits, Bounce::default());
    let ring = device.coherent_slice::<AtomicU32>(1024).unwrap();
    assert_eq!(ring.iova().get(), 0);
    assert_eq!(device.coherent_slice::<AtomicU32>(1024).unwrap_err(), Error::OutOfMemory);
    assert!(device.map::<ToDevice, _>(device.pages(4096).unwrap()).is_ok());
    // What nobody could copy, and has not been asked of memory for this device.
    let attach = |kind| {
        let carved = CarvedOut::allocate(memory, 4096, kind).unwrap();
        SharedBuffer::export("carved", carved).unwrap().attach::<ToDevice>(&device).map(drop)
    };
    assert_eq!(attach(Cacheability::WriteBack), Ok(()));
    assert!(matches!(attach(Cacheability::Unmapped), Err(Error::Unreachable { .. })));
    assert_eq!(device.copies(), 0);
}

#[test]
fn a_device_that_reaches_no_memory_at_all_is_told_what_it_cannot_reach() {
    let memory = memory_at(0x4000_0000, true);
    let (device, _) = direct(memory, &[BusWindow::identity()], Limits::address_bits(28), Bounce::default());
    let rejected = device.map::<ToDevice, _>(Pages::zeroed(memory, 4096).unwrap()).unwrap_err();
    assert!(matches!(rejected.error, Error::Unreachable { .. }), "{rejected}");
    assert_eq!(device.pages(4096).unwrap_err(), Error::OutOfMemory);
}

#[test]
fn a_device_that_is_asked_says_what_its_limits_are() {
    let system = FakeSystem::new();
    let limits = Limits { optimal_size: 64 << 10, max_segments: 3, ..Limits::address_bits(40) };
    let dev = system.device_with("dev", limits).unwrap().device;
    assert_eq!((dev.optimal_mapping_size(), dev.limits().max_segments), (64 << 10, 3));
    assert!(dev.max_mapping_size() > 1 << 39);
    assert_eq!(system.device("free").unwrap().device.optimal_mapping_size(), 64 * 4096);
    let forced = system.device_with_policy("forced", Limits::NONE, always()).unwrap().device;
    assert_eq!((forced.max_mapping_size(), forced.is_trusted(), forced.is_isolated()), (MIB, false, true));
    let memory = memory_at(0x4000_0000, true);
    let all = [BusWindow::identity()];
    let (narrow, _) = direct(memory, &all, Limits::address_bits(32), Bounce::Needed(OWN));
    assert_eq!(narrow.max_mapping_size(), MIB);
    let (wide, _) = direct(memory, &all, Limits::NONE, Bounce::Needed(OWN));
    assert!(wide.max_mapping_size() > 1 << 60);
}
