//! Devices that do not snoop the caches: only maintenance moves data, and the API does all that is needed.

use core::sync::atomic::{AtomicU32, Ordering};
use dma::fakes::FakeSystem;
use dma::{
    Bidirectional, CpuReads, CpuWrites, FromDevice, Job, Ladder, Lent, PageSet, Placement, SharedBuffer, ToDevice,
};
use iommu::{Iova, Prot};

/// Caught: `Held::lend` without `prepare` (the device then reads what memory contained before).
#[test]
fn what_the_cpu_wrote_before_map_reaches_the_device() {
    let system = FakeSystem::non_coherent();
    let blk = system.device("blk").unwrap();
    let mut set = PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap();
    set.write_at(4090, b"from the cpu").unwrap();
    let mapped = blk.device.map::<ToDevice, _>(set).unwrap();
    let mut seen = [0; 12];
    blk.master.read(mapped.iova().checked_add(4090).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"from the cpu");
}

/// Caught: `Held::end` without `fetch`, and `Held::lend` without `prepare`.
#[test]
fn what_the_device_wrote_is_there_after_unmap_and_the_rest_is_as_it_was() {
    let system = FakeSystem::non_coherent();
    let blk = system.device("blk").unwrap();
    let mut pages = blk.device.pages(4096).unwrap();
    pages.as_mut_slice().fill(1);
    let mapped = blk.device.map::<FromDevice, _>(pages).unwrap();
    blk.master.write(mapped.iova().checked_add(100).unwrap(), &[2; 100]).unwrap();
    let pages = mapped.unmap().unwrap();
    assert!(pages.as_slice()[100..200].iter().all(|byte| *byte == 2));
    assert!(pages.as_slice()[..100].iter().chain(&pages.as_slice()[200..]).all(|byte| *byte == 1));
}

/// Caught: each of the two syncs doing nothing.
#[test]
fn a_sync_moves_exactly_the_data_it_names() {
    let system = FakeSystem::non_coherent();
    let net = system.device("net").unwrap();
    let mapped = net.device.map::<Bidirectional, _>(net.device.pages(8192).unwrap()).unwrap();
    let (view, iova) = (mapped.view(), mapped.iova());

    net.master.write(iova, b"one").unwrap();
    net.master.write(iova.checked_add(4096).unwrap(), b"two").unwrap();
    assert_eq!(view.read_array::<3>(0).unwrap(), [0; 3]);
    mapped.sync_for_cpu(0, 3).unwrap();
    assert_eq!(&view.read_array::<3>(0).unwrap(), b"one");
    assert_eq!(view.read_array::<3>(4096).unwrap(), [0; 3]);
    mapped.sync_for_cpu(4096, 3).unwrap();
    assert_eq!(&view.read_array::<3>(4096).unwrap(), b"two");

    let mut seen = [0; 4];
    view.write(4096, b"back").unwrap();
    net.master.read(iova.checked_add(4096).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"two\0");
    mapped.sync_for_device(0, 4096).unwrap();
    net.master.read(iova.checked_add(4096).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"two\0");
    mapped.sync_for_device(4096, 4).unwrap();
    net.master.read(iova.checked_add(4096).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"back");
}

#[test]
fn a_sync_towards_a_reading_device_does_not_discard_what_the_cpu_wrote_elsewhere() {
    let system = FakeSystem::non_coherent();
    let gpu = system.device("gpu").unwrap();
    let mapped = gpu.device.map::<ToDevice, _>(gpu.device.pages(4096).unwrap()).unwrap();
    mapped.view().write(0, b"kept").unwrap();
    mapped.sync_for_device(2048, 64).unwrap();
    mapped.sync_for_device(0, 4).unwrap();
    let mut seen = [0; 4];
    gpu.master.read(mapped.iova(), &mut seen).unwrap();
    assert_eq!(&seen, b"kept");
}

/// Caught: `CoherentPages` that leaves the memory cacheable, and that frees it without restoring it.
#[test]
fn coherent_memory_needs_no_sync_and_is_cacheable_again_when_it_is_freed() {
    let system = FakeSystem::non_coherent();
    let net = system.device("net").unwrap();
    let ring = net.device.coherent_slice::<AtomicU32>(16).unwrap();
    assert!(ring.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    let mut seen = [1; 64];
    net.master.read(ring.iova(), &mut seen).unwrap();
    assert_eq!(seen, [0; 64]);
    ring[3].store(0x1234_5678, Ordering::Release);
    let mut word = [0; 4];
    net.master.read(ring.iova_of(&ring[3]).unwrap(), &mut word).unwrap();
    assert_eq!(u32::from_ne_bytes(word), 0x1234_5678);
    net.master.write(ring.iova(), &7_u32.to_ne_bytes()).unwrap();
    assert_eq!(ring[0].load(Ordering::Acquire), 7);
    drop(ring);
    assert_eq!(system.memory.live_allocations(), 0);
    assert_eq!(system.memory.violations(), Vec::<String>::new());
}

/// Caught: `CpuAccess::write_at` without its maintenance.
#[test]
fn a_picture_drawn_while_it_is_scanned_out_reaches_the_screen() {
    let system = FakeSystem::non_coherent();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let picture = SharedBuffer::new("picture", PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap());

    let reading = picture.attach::<FromDevice>(&blk.device).unwrap();
    blk.master.write(reading.iova(), b"pixels").unwrap();
    reading.detach().unwrap();
    let mut seen = [0; 6];
    picture.cpu_access::<CpuReads>().unwrap().read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"pixels");

    let showing = picture.attach::<ToDevice>(&gpu.device).unwrap();
    gpu.master.read(showing.iova(), &mut seen).unwrap();
    assert_eq!(&seen, b"pixels");
    picture.cpu_access::<CpuWrites>().unwrap().write_at(4094, b"cursor").unwrap();
    gpu.master.read(showing.iova().checked_add(4094).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"cursor");
}

/// The IOMMU must not make accesses cacheable that nobody snoops. Caught: `lend_reserved` and `translate` without
/// `Prot::NON_COHERENT`.
#[test]
fn the_address_space_is_told_which_devices_do_not_snoop() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let net = system.device("net").unwrap();
        let marked = |iova| net.domain.space().translate(iova).unwrap().1.contains(Prot::NON_COHERENT);
        let pages = || net.device.pages(4096).unwrap();
        let mapped = net.device.map::<ToDevice, _>(pages()).unwrap();
        let fixed = net.device.map_at::<FromDevice, _>(Iova::new(0x7000_0000), pages()).unwrap();
        let ring = net.device.coherent::<AtomicU32>().unwrap();
        let reservation = net.device.reserve(4096, Placement::Anywhere).unwrap();
        let link = reservation.link::<Bidirectional, _>(0, pages()).unwrap();
        for iova in [mapped.iova(), fixed.iova(), ring.iova(), link.iova()] {
            assert_eq!(marked(iova), !system.memory.is_snooped());
        }
    }
}

/// What is newer than memory when a device that does not snoop begins to write would be written back over its bytes, or be lost with
/// its neighbours.
///
/// Caught: `supply` that does nothing for loans that the device only writes, of each of the kinds; a detachment that discards what
/// others wrote after the device's work.
#[test]
fn of_two_writers_one_of_which_does_not_snoop_neither_loses_a_byte() {
    let now = base::Deadline::after_millis(0);
    for kind in 0..3 {
        let system = FakeSystem::non_coherent();
        let (nic, blk) = (system.snooping_device("nic").unwrap(), system.device("blk").unwrap());
        let shared = SharedBuffer::new("shared", PageSet::zeroed(system.memory, 8192, Ladder::SINGLE_PAGES).unwrap());
        let a = std::sync::Arc::new(shared.attach::<FromDevice>(&nic.device).unwrap());
        let a_writes = |byte: u8, at: u64, len: usize| {
            let job = Job::begin(&a, now).unwrap().unwrap();
            nic.master.write(a.iova().checked_add(at).unwrap(), &vec![byte; len]).unwrap();
            drop(job);
        };
        let b: std::sync::Arc<dyn Lent> = match kind {
            0 => std::sync::Arc::new(shared.attach::<FromDevice>(&blk.device).unwrap()),
            1 => {
                std::sync::Arc::new(shared.attach_pieces::<FromDevice>(&blk.device, core::iter::once(0..8192)).unwrap())
            }
            _ => {
                let area = dma::vcm::reserve(&blk.device, 8192, 4096).unwrap();
                std::sync::Arc::new(area.back::<FromDevice>(&shared).map_err(|_| "not mapped").unwrap())
            }
        };
        a_writes(1, 0, 8192);
        let turn = dma::Turn::take(core::slice::from_ref(&b), now).unwrap();
        let at = b.segments()[0].iova;
        blk.master.write(at.checked_add(4000).unwrap(), &[2; 200]).unwrap();
        drop(turn);
        a_writes(3, 4100, 10);
        drop(b);
        drop(a);
        let mut seen = [0; 8192];
        shared.cpu_access::<CpuReads>().unwrap().read_at(0, &mut seen).unwrap();
        let expected = |at: usize| match at {
            4100..4110 => 3,
            4000..4200 => 2,
            _ => 1,
        };
        for (at, byte) in seen.iter().enumerate() {
            assert_eq!(*byte, expected(at), "byte {at}, kind {kind}");
        }
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}
