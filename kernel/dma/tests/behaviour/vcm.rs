//! Virtual contiguous memory.
//!
//! Seen red: an area that keeps its addresses; one that is used no more although its revocation has failed, with what was behind it; one
//! that was not revoked; a user that stays counted; a chunk that is counted with another size's.

use base::IrqMutex;
use dma::fakes::{FakeMemory, FakeSystem};
use dma::vcm::{self, Area};
use dma::{
    Bidirectional, Device, DmaMemory, Error, FromDevice, Job, Ladder, Lent, OwnedDomain, PageRequest, PageSet,
    RawPages, SharedBuffer, ToDevice, Users,
};
use iommu::{FaultReason, Iova, IovaError, OutOfMemory, PAGE_SIZE};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn buffer(system: &FakeSystem, text: &[u8]) -> SharedBuffer {
    let mut pages = PageSet::zeroed(system.memory, 4 * PAGE_SIZE, Ladder::SINGLE_PAGES).unwrap();
    pages.write_at(4090, text).unwrap();
    SharedBuffer::new("virtual", pages)
}

#[test]
fn one_buffer_is_contiguous_in_several_spaces_at_the_alignment_of_each() {
    let system = FakeSystem::new();
    let (one, two) = (system.device("one").unwrap(), system.device("two").unwrap());
    let backing = buffer(&system, b"scattered");
    let len = backing.len();
    let area = vcm::reserve(&one.device, len, MIB).unwrap();
    let start = area.start();
    assert_eq!((start % MIB, area.len()), (0, len));
    // Reserved addresses are nobody else's, and reach nothing.
    assert!(matches!(vcm::reserve_at(&one.device, start, len), Err(Error::Iova(_))));
    assert_eq!(one.master.read(Iova::new(start), &mut [0]).unwrap_err().reason, FaultReason::NotMapped);

    let in_one = area.back::<ToDevice>(&backing).unwrap();
    let in_two = vcm::reserve(&two.device, len, 64 << 10).unwrap().back::<FromDevice>(&backing).unwrap();
    assert_eq!((in_one.iova().get(), in_one.segments().len(), in_two.iova().get() % (64 << 10)), (start, 1, 0));
    let mut seen = [0; 9];
    one.master.read(in_one.iova().checked_add(4090).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"scattered");
    two.master.write(in_two.iova().checked_add(4090).unwrap(), b"contiguou").unwrap();
    one.master.read(in_one.iova().checked_add(4090).unwrap(), &mut seen).unwrap();
    assert_eq!(&seen, b"contiguou");
    assert_eq!(one.master.write(in_one.iova(), b"x").unwrap_err().reason, FaultReason::Permission);
    // Fences are the buffer's, whatever the space.
    let (in_one, in_two) = (Arc::new(in_one), Arc::new(in_two));
    let writing = Job::begin(&in_two, base::Deadline::after_millis(0)).unwrap();
    assert!(Job::begin(&in_one, base::Deadline::after_millis(0)).is_err());
    drop(writing);

    // The area outlives what was behind it.
    let area = Arc::into_inner(in_one).unwrap().unmap().unwrap();
    assert_eq!(one.master.read(Iova::new(start), &mut [0]).unwrap_err().reason, FaultReason::NotMapped);
    let again = area.back::<Bidirectional>(&backing).unwrap();
    assert_eq!(again.iova().get(), start);
    drop((again, in_two));
    assert_eq!(backing.users(), Users::default());
    drop(vcm::reserve_at(&one.device, start, len).unwrap());
}

#[test]
fn areas_that_cannot_be_had_or_backed_are_given_back() {
    let system = FakeSystem::new();
    let one = system.device("one").unwrap();
    let backing = buffer(&system, b"");
    assert_eq!(vcm::reserve(&one.device, 0, 4096).unwrap_err(), Error::BadSize(0));
    assert_eq!(vcm::reserve(&one.device, 4096, 3).unwrap_err(), Error::BadSize(4096));
    assert!(matches!(vcm::reserve(&one.device, 1 << 60, 4096), Err(Error::Iova(_))));
    assert!(matches!(vcm::reserve(&one.device, 100, 4096), Err(Error::Iova(_))));
    let area = vcm::reserve(&one.device, 4096, 4096).unwrap();
    let start = area.start();
    let (area, error) = area.back::<ToDevice>(&backing).unwrap_err();
    assert_eq!(error, Error::OutOfRange { offset: 0, len: 16384, size: 4096 });
    drop(area);
    let area = vcm::reserve_at(&one.device, start, backing.len()).unwrap();
    system.iommu.fail_map_after(0);
    let (area, error) = area.back::<ToDevice>(&backing).unwrap_err();
    assert_eq!((error, backing.users()), (Error::OutOfMemory, Users::default()));
    assert!(area.back::<ToDevice>(&backing).is_ok());
}

/// What the ranges of a device hold changes with its address space, and back, in one step each.
#[test]
fn two_contents_of_the_same_addresses_are_exchanged_with_the_whole_address_space() {
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let one = system.device("one").unwrap();
        let domains = ["first", "second"].map(|name| OwnedDomain::new(name, &one.device).unwrap());
        let buffers = [buffer(&system, b"red"), buffer(&system, b"blu")];
        let at = vcm::reserve(&domains[0], 4 * PAGE_SIZE, MIB).unwrap();
        let start = at.start();
        let areas: [Area<OwnedDomain>; 2] = [at, vcm::reserve_at(&domains[1], start, 4 * PAGE_SIZE).unwrap()];
        let mut backed = Vec::new();
        for (area, buffer) in areas.into_iter().zip(&buffers) {
            backed.push(area.back::<Bidirectional>(buffer).unwrap());
        }
        let mut seen = [0; 3];
        let mut attached = domains[0].attach(&one.device).unwrap();
        for (index, wanted) in [(0, b"red"), (1, b"blu"), (0, b"red")] {
            attached.swap(&domains[index]).unwrap();
            one.master.read(Iova::new(start + 4090), &mut seen).unwrap();
            assert_eq!(&seen, wanted);
        }
        one.master.write(Iova::new(start + 4090), b"RED").unwrap();
        let first = backed.swap_remove(0);
        assert_eq!(first.range().start().get(), start);
        drop(first.unmap().unwrap());
        assert_eq!(one.master.read(Iova::new(start), &mut [0]).unwrap_err().reason, FaultReason::NotMapped);
        drop(attached);
        drop(backed);
        let [red, blue] = buffers;
        for (buffer, wanted) in [(red, b"RED"), (blue, b"blu")] {
            buffer.into_pages().unwrap().read_at(4090, &mut seen).unwrap();
            assert_eq!(&seen, wanted);
        }
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

#[test]
fn what_cannot_be_revoked_keeps_addresses_and_memory_for_ever() {
    let system = FakeSystem::new();
    let one = system.device("one").unwrap();
    let domain = OwnedDomain::new("own", &one.device).unwrap();
    let (in_domain, in_device) = (buffer(&system, b""), buffer(&system, b""));
    let placed = vcm::reserve(&domain, 4 * PAGE_SIZE, 4096).unwrap().back::<ToDevice>(&in_domain).unwrap();
    let lent = vcm::reserve(&one.device, 4 * PAGE_SIZE, 4096).unwrap().back::<ToDevice>(&in_device).unwrap();
    let starts = (placed.range().start().get(), lent.iova().get());
    system.iommu.wedge(true);
    placed.unmap().unwrap_err();
    lent.unmap().unwrap_err();
    system.iommu.wedge(false);
    assert!(vcm::reserve_at(&domain, starts.0, 4096).is_err());
    assert!(vcm::reserve_at(&one.device, starts.1, 4096).is_err());
    for kept in [in_domain, in_device] {
        assert_eq!(kept.users().device_readers, 1);
        drop(kept.into_pages().unwrap_err());
    }
    assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (8, 0));
}

/// Memory that has only so many runs of each size left.
struct Fragmented {
    memory: &'static FakeMemory,
    left: IrqMutex<BTreeMap<u64, u64>>,
}

// SAFETY: all is the fake's memory; it gives less of it.
unsafe impl DmaMemory for Fragmented {
    fn allocate(&self, request: PageRequest) -> Result<RawPages, OutOfMemory> {
        let mut left = self.left.lock();
        let count = left.get_mut(&request.bytes).filter(|count| **count != 0).ok_or(OutOfMemory)?;
        *count -= 1;
        drop(left);
        self.memory.allocate(request)
    }
    unsafe fn free(&self, pages: RawPages) {
        // SAFETY: the caller's promise.
        unsafe { self.memory.free(pages) };
    }
    fn clean(&self, ptr: NonNull<u8>, bytes: usize) {
        self.memory.clean(ptr, bytes);
    }
    fn invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.memory.invalidate(ptr, bytes);
    }
    fn clean_invalidate(&self, ptr: NonNull<u8>, bytes: usize) {
        self.memory.clean_invalidate(ptr, bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_ladder_fills_the_buffer_largest_first_with_what_there_is_and_says_so(
        megabytes in 0_u64..4, medium in 0_u64..40, pages in 1_u64..700,
    ) {
        let system = FakeSystem::new();
        let left = BTreeMap::from([(MIB, megabytes), (64 << 10, medium), (PAGE_SIZE, 64)]);
        let memory: &'static Fragmented = Box::leak(Box::new(Fragmented { memory: system.memory, left: IrqMutex::new(left) }));
        // By hand: as many of each as there are and fit.
        let mut rest = pages * PAGE_SIZE;
        let mut wanted = Vec::new();
        for (size, there) in [(MIB, megabytes), (64 << 10, medium), (PAGE_SIZE, 64)] {
            let count = there.min(rest / size);
            rest -= count * size;
            wanted.push((size, count));
        }
        match vcm::fill("fragmented", memory, pages * PAGE_SIZE, Ladder::DEFAULT) {
            Ok((buffer, chunks)) => {
                prop_assert_eq!(rest, 0);
                prop_assert_eq!(buffer.len(), pages * PAGE_SIZE);
                prop_assert_eq!(chunks.iter().collect::<Vec<_>>(), wanted);
                prop_assert_eq!(system.memory.live_allocations() as u64, chunks.count());
                let device: Device = system.device("one").unwrap().device;
                let lent = vcm::reserve(&device, buffer.len(), MIB).unwrap().back::<ToDevice>(&buffer).unwrap();
                prop_assert_eq!(lent.segments().len(), 1);
            }
            Err(error) => prop_assert_eq!((error, rest != 0), (Error::OutOfMemory, true)),
        }
        prop_assert_eq!(system.memory.live_allocations(), 0);
    }
}

/// Seen red: areas mapped in the domain's space past the domain's own books.
#[test]
fn what_was_lost_by_an_area_or_by_a_mapping_is_neither_ones_any_more() {
    let system = FakeSystem::new();
    let one = system.device("one").unwrap();
    let domain = OwnedDomain::new("own", &one.device).unwrap();
    let pages = || one.device.pages(PAGE_SIZE).unwrap();
    let by_area = vcm::reserve_at(&domain, 0x10_0000, 4 * PAGE_SIZE).unwrap();
    let by_area = by_area.back::<ToDevice>(&buffer(&system, b"")).unwrap();
    let by_mapping = domain.map_owned::<ToDevice, _>(Iova::new(0x20_0000), pages()).unwrap();
    system.iommu.wedge(true);
    by_area.unmap().unwrap_err();
    by_mapping.unmap().unwrap_err();
    system.iommu.wedge(false);
    let again = domain.map_owned::<ToDevice, _>(Iova::new(0x10_0000), pages()).unwrap_err();
    assert!(matches!(again.error, Error::Iova(IovaError::InUse(_))), "{again:?}");
    let area = vcm::reserve_at(&domain, 0x20_0000, 4 * PAGE_SIZE).unwrap();
    let rejected = area.back::<ToDevice>(&buffer(&system, b"")).unwrap_err();
    assert!(matches!(rejected.1, Error::Iova(IovaError::InUse(_))), "{:?}", rejected.1);
}
