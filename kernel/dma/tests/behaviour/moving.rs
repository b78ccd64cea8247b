//! Buffers whose memory is exchanged under their importers, and exporters of several kinds.
//!
//! Seen red: `relocate` that does not tell importers; that does not wait until nobody has the buffer; that does not copy;
//! `enter` that lets somebody in meanwhile; an importer that is not mapped again; another space that is not counted; registers lent
//! as memory; an importer that keeps what it stored after it was told to let go, or that is not mapped again then.

use base::Deadline;
use dma::fakes::FakeSystem;
use dma::{
    Attributes, BusyWith, Cacheability, CarvedOut, CpuReads, CpuWrites, Error, Extents, FromDevice, Importer, Ladder,
    Lent, PageSet, PeerRange, SharedBuffer, ToDevice, Users,
};
use iommu::{FaultReason, PhysAddr, PhysRange};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

fn now() -> Deadline {
    Deadline::after_millis(0)
}

fn soon() -> Deadline {
    Deadline::after_millis(20_000)
}

fn pages(system: &FakeSystem) -> PageSet {
    PageSet::zeroed(system.memory, 3 * 4096, Ladder::SINGLE_PAGES).unwrap()
}

fn busy(error: Error) -> BusyWith {
    match error {
        Error::Busy { by, .. } => by,
        other => panic!("{other}"),
    }
}

#[test]
fn a_buffer_moves_under_its_importers_and_each_finds_the_same_bytes_elsewhere() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
        let mut set = pages(&system);
        set.write_at(4090, b"the contents").unwrap();
        let picture = SharedBuffer::new("picture", set);
        let showing = picture.import::<ToDevice>(&gpu.device, None).unwrap();
        let idle = picture.import::<FromDevice>(&blk.device, None).unwrap();
        let before = showing.map().unwrap().iova();
        assert!(Arc::ptr_eq(&showing.map().unwrap(), &showing.map().unwrap()));
        let read = |at: iommu::Iova| {
            let mut seen = [0; 12];
            gpu.master.read(at.checked_add(4090).unwrap(), &mut seen).map(|()| seen)
        };
        assert_eq!(&read(before).unwrap(), b"the contents");
        let revoked = system.iommu.revocations();
        let old = picture.relocate(pages(&system), now()).unwrap();
        assert_eq!(system.iommu.revocations(), revoked + 1, "one importer had it mapped");
        assert!(showing.is_mapped() && !idle.is_mapped());
        // The old pages are nobody's any more.
        drop(old);
        let after = showing.map().unwrap();
        assert_eq!(&read(after.iova()).unwrap(), b"the contents");
        drop(after);
        showing.unmap();
        assert_eq!(picture.users(), Users::default());
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

/// Takes addresses when a buffer has moved: importers come back in the order in which they came.
struct Taker(dma::Device, Mutex<Option<dma::Mapped<ToDevice, dma::Pages>>>);

impl Importer for Taker {
    fn let_go(&self) {}
    fn moved(&self) {
        *self.1.lock().unwrap() = Some(self.0.map(self.0.pages(3 * 4096).unwrap()).unwrap());
    }
}

#[test]
fn what_a_device_was_told_before_a_move_faults_afterwards() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let picture = SharedBuffer::new("picture", pages(&system));
    // So that the buffer does not come back to the same address.
    let taker = Arc::new(Taker(gpu.device.clone(), Mutex::new(None)));
    let weak: Weak<Taker> = Arc::downgrade(&taker);
    picture.tell(weak).unwrap();
    let import = picture.import::<FromDevice>(&gpu.device, None).unwrap();
    let told = import.map().unwrap().iova();
    gpu.master.write(told, b"x").unwrap();
    let old = picture.relocate(pages(&system), now()).unwrap();
    let fault = gpu.master.write(told, b"late").unwrap_err();
    assert_eq!(fault.reason, FaultReason::Permission, "what lies there now is another's, to be read");
    let mut seen = [0; 4];
    old.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"x\0\0\0");
    gpu.master.write(import.map().unwrap().iova(), b"good").unwrap();
}

#[test]
fn who_has_a_buffer_attached_accessed_or_mapped_keeps_it_where_it_is() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let picture = SharedBuffer::new("picture", pages(&system));
    let refused = |why| {
        let rejected = picture.relocate(pages(&system), now()).unwrap_err();
        assert_eq!((rejected.buffer.len(), busy(rejected.error)), (3 * 4096, why));
        assert!(!picture.users().moving);
    };
    let attached = picture.attach::<FromDevice>(&gpu.device).unwrap();
    refused(BusyWith::DeviceWrites);
    drop(attached);
    let access = picture.cpu_access::<CpuReads>().unwrap();
    refused(BusyWith::CpuReads);
    drop(access);
    let access = picture.cpu_access::<CpuWrites>().unwrap();
    refused(BusyWith::CpuWrites);
    drop(access);
    let extents = picture.extents().unwrap();
    refused(BusyWith::Mapped);
    drop(extents);
    // What is under way is waited for.
    let import = picture.import::<ToDevice>(&gpu.device, None).unwrap();
    let in_flight = import.map().unwrap();
    refused(BusyWith::Mapped);
    assert!(import.is_mapped(), "it may come back");
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| picture.relocate(pages(&system), soon()).map(drop));
        drop(in_flight);
        moving.join().unwrap().unwrap();
    });
    let small = PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES).unwrap();
    assert_eq!(picture.relocate(small, now()).unwrap_err().error, Error::BadSize(4096));
}

/// Seen red: an access that leaves as access alone; as mapping alone; as mapping twice; one that does not come as mapping.
#[test]
fn an_access_from_another_address_space_comes_and_goes_as_an_access_and_as_a_mapping() {
    let system = FakeSystem::new();
    let picture = SharedBuffer::new("picture", pages(&system));
    for (writes, why) in [(false, BusyWith::CpuReads), (true, BusyWith::CpuWrites)] {
        let (cpu_readers, cpu_writers) = (u32::from(!writes), u32::from(writes));
        let access = picture.access_from_space(writes, now(), &|| false).unwrap();
        assert_eq!(picture.users(), Users { cpu_readers, cpu_writers, spaces: 1, ..Users::default() });
        assert_eq!(busy(picture.relocate(pages(&system), now()).unwrap_err().error), why);
        let other = picture.extents().unwrap();
        assert_eq!(access.extents().runs(), other.runs());
        assert_eq!(picture.users().spaces, 2);
        drop(access);
        assert_eq!(picture.users(), Users { spaces: 1, ..Users::default() });
        assert_eq!(busy(picture.relocate(pages(&system), now()).unwrap_err().error), BusyWith::Mapped);
        drop(other);
        assert_eq!(picture.users(), Users::default());
        picture.relocate(pages(&system), now()).unwrap();
    }
}

/// What a process does with a buffer that it has mapped.
struct Space {
    buffer: SharedBuffer,
    extents: Mutex<Option<Extents>>,
    told: AtomicU32,
    /// What became of somebody who came in the middle.
    attempt: Mutex<Option<Error>>,
}

impl Importer for Space {
    fn let_go(&self) {
        self.told.fetch_add(1, Ordering::SeqCst);
        *self.extents.lock().unwrap() = None;
        *self.attempt.lock().unwrap() = self.buffer.extents().err();
    }
    fn moved(&self) {
        *self.extents.lock().unwrap() = Some(self.buffer.extents().unwrap());
    }
}

#[test]
fn another_address_space_is_told_maps_the_new_extents_and_nobody_comes_in_between() {
    let system = FakeSystem::new();
    let buffer = SharedBuffer::new("picture", pages(&system));
    let extents = buffer.extents().unwrap();
    let first = extents.runs().to_vec();
    assert_eq!((first.len(), extents.attributes()), (3, Attributes::Memory(Cacheability::WriteBack)));
    let (told, attempt) = (AtomicU32::new(0), Mutex::new(None));
    let space = Arc::new(Space { buffer: buffer.clone(), extents: Mutex::new(Some(extents)), told, attempt });
    let weak: Weak<Space> = Arc::downgrade(&space);
    buffer.tell(weak).unwrap();
    let old = buffer.relocate(pages(&system), now()).unwrap();
    assert_eq!(busy(space.attempt.lock().unwrap().take().unwrap()), BusyWith::Moving);
    let now_at = space.extents.lock().unwrap().as_ref().unwrap().runs().to_vec();
    assert_eq!((old.runs(), space.told.load(Ordering::SeqCst)), (&first[..], 1));
    assert!(now_at.iter().all(|run| !first.contains(run)));
    // A space keeps the memory, whoever else has let go of it.
    let kept = space.extents.lock().unwrap().take().unwrap();
    drop((space, buffer, old));
    assert_eq!(system.memory.live_allocations(), 3);
    drop(kept);
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
}

/// Notes that everybody before it has been told to let go.
#[derive(Default)]
struct Last(AtomicBool);

impl Importer for Last {
    fn let_go(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One core maps an import, and is in the middle of it when another one tells all importers to let go.
#[test]
fn a_move_that_begins_while_an_import_is_being_mapped_waits_for_that_work_and_no_longer() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let picture = SharedBuffer::new("picture", pages(&system));
    let import = picture.import::<ToDevice>(&gpu.device, None).unwrap();
    let last = Arc::new(Last::default());
    let weak: Weak<Last> = Arc::downgrade(&last);
    picture.tell(weak).unwrap();
    let moving = Arc::new(Mutex::new(None));
    let (begin, new, started) = (picture.clone(), Mutex::new(Some(pages(&system))), moving.clone());
    system.iommu.on_map(move |_| {
        let Some(new) = new.lock().unwrap().take() else { return };
        let picture = begin.clone();
        let moves = move || picture.relocate(new, Deadline::after_millis(5_000)).map(drop).map_err(|no| no.error);
        *started.lock().unwrap() = Some(std::thread::spawn(moves));
        while !last.0.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    });
    let mapped = import.map().unwrap();
    gpu.master.read(mapped.iova(), &mut [0]).unwrap();
    assert!(!import.is_mapped(), "the buffer is on its way");
    drop(mapped);
    let moving = moving.lock().unwrap().take().unwrap();
    assert_eq!(moving.join().unwrap(), Ok(()));
    assert!(import.is_mapped(), "it was wanted, and so it comes back");
    import.unmap();
    assert_eq!(picture.users(), Users::default());
}

#[test]
fn a_carve_out_is_shared_like_pages_with_the_attributes_that_it_has() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
        for kind in [Cacheability::NonCacheable, Cacheability::Unmapped, Cacheability::WriteBack] {
            let carved = CarvedOut::allocate(system.memory, 8000, kind).unwrap();
            let buffer = SharedBuffer::export("carved", carved).unwrap();
            assert_eq!((buffer.len(), buffer.attributes()), (8192, Attributes::Memory(kind)));
            let written = buffer.attach::<FromDevice>(&blk.device).unwrap();
            let shown = buffer.attach::<ToDevice>(&gpu.device).unwrap();
            blk.master.write(written.iova().checked_add(4094).unwrap(), b"pixels").unwrap();
            written.detach().unwrap();
            let mut seen = [0; 6];
            gpu.master.read(shown.iova().checked_add(4094).unwrap(), &mut seen).unwrap();
            assert_eq!(&seen, b"pixels");
            match buffer.cpu_access::<CpuReads>() {
                Ok(access) => {
                    access.read_at(4094, &mut seen).unwrap();
                    assert_eq!((&seen, kind == Cacheability::Unmapped), (b"pixels", false));
                }
                Err(error) => {
                    assert_eq!((error, kind), (Error::NotForCpu("carved".into()), Cacheability::Unmapped));
                }
            }
            // The refused access has left nothing behind.
            assert_eq!(
                buffer.users(),
                Users { device_readers: 1, unsnooping: buffer.users().unsnooping, ..Users::default() }
            );
            let rejected = buffer.relocate(PageSet::zeroed(system.memory, 8192, Ladder::DEFAULT).unwrap(), now());
            assert_eq!(rejected.unwrap_err().error, Error::Immovable("carved".into()));
            drop(shown);
            assert!(buffer.into_pages().is_err());
        }
        assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    }
}

#[test]
fn another_devices_window_is_a_buffer_for_devices_only() {
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let registers = PhysRange::new(PhysAddr::new(0x1000_0000), 8192).unwrap();
    // SAFETY: there is nothing there.
    let window = unsafe { PeerRange::new(registers) }.unwrap();
    let buffer = SharedBuffer::export("window", window).unwrap();
    assert_eq!((buffer.len(), buffer.attributes()), (8192, Attributes::Registers));
    let reaching = buffer.attach::<ToDevice>(&gpu.device).unwrap();
    let (phys, prot) = gpu.domain.space().translate(reaching.iova().checked_add(4100).unwrap()).unwrap();
    assert_eq!((phys.get(), prot.contains(iommu::Prot::MMIO)), (0x1000_1004, true));
    assert_eq!(buffer.cpu_access::<CpuReads>().err().unwrap(), Error::NotForCpu("window".into()));
    assert_eq!(reaching.segments().len(), 1);
    let at = reaching.iova();
    reaching.detach().unwrap();
    assert!(gpu.domain.space().translate(at).is_none());
}
