//! Buffers that are no whole pages, and ranges that are no memory.

use crate::backends::{direct, memory_at, restricted};
use dma::fakes::FakeSystem;
use dma::{
    Bidirectional, Bounce, BusWindow, Bytes, Error, FromDevice, Lent, Limits, Pages, PeerRange, Policy, PoolSource,
    ToDevice, slice,
};
use iommu::{PhysAddr, PhysRange, Prot};

/// Three neighbours, 100, 300 and 5000 bytes.
fn neighbours(system: &FakeSystem) -> [Bytes; 3] {
    let mut pages = Pages::zeroed(system.memory, 8192).unwrap();
    pages.as_mut_slice().fill(0x5e);
    Bytes::cut(pages, &[100, 300, 5000]).unwrap().try_into().unwrap()
}

fn policy(trusted: bool) -> Policy {
    Policy { trusted, bounce: Bounce::Needed(PoolSource::Own(1 << 20)) }
}

/// Caught: `bytes::lend` that lends the page to everybody; `Bounced` without `clear_padding`.
#[test]
fn a_device_that_is_not_trusted_sees_the_bytes_and_none_of_their_neighbours() {
    for snooped in [true, false] {
        let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
        let dev = system.device_with_policy("dev", Limits::NONE, policy(false)).unwrap();
        // What was in the pool before.
        let mut secret = Bytes::cut(Pages::zeroed(system.memory, 8192).unwrap(), &[6000]).unwrap().remove(0);
        secret.as_mut_slice().fill(0x99);
        drop(dev.device.map_bytes::<ToDevice>(secret).unwrap());
        let [before, mut middle, after] = neighbours(&system);
        middle.as_mut_slice().fill(0x33);
        let mapped = dev.device.map_bytes::<Bidirectional>(middle).unwrap();
        assert_eq!((mapped.iova().get() % 4096, mapped.len(), dev.device.copies()), (100, 300, 2));
        let mut page = [0; 4096];
        dev.master.read(mapped.iova().align_down(4096), &mut page).unwrap();
        assert!(page[..100].iter().chain(&page[400..]).all(|byte| *byte == 0), "padding");
        assert!(page[100..400].iter().all(|byte| *byte == 0x33));
        dev.master.write(mapped.iova().align_down(4096), &[0x44; 4096]).unwrap();
        mapped.sync_for_cpu(0, 300).unwrap();
        assert_eq!(mapped.view().read_array::<4>(296).unwrap(), [0x44; 4]);
        assert!(matches!(mapped.view().read_array::<4>(297), Err(Error::OutOfRange { .. })));
        let middle = mapped.unmap().unwrap();
        assert!(middle.as_slice().iter().all(|byte| *byte == 0x44));
        assert!(before.as_slice().iter().chain(after.as_slice()).all(|byte| *byte == 0x5e));
        drop((before, middle, after, dev));
        assert_eq!((system.memory.live_allocations(), system.memory.violations().len()), (0, 0));
    }
}

#[test]
fn a_device_that_is_trusted_has_the_bytes_where_they_are_and_their_page_with_them() {
    let system = FakeSystem::new();
    let dev = system.device_with_policy("dev", Limits::NONE, policy(true)).unwrap();
    let [before, middle, _after] = neighbours(&system);
    let mapped = dev.device.map_bytes::<FromDevice>(middle).unwrap();
    assert_eq!((mapped.iova().get() % 4096, dev.device.copies()), (100, 0));
    dev.master.write(mapped.iova(), &[7; 300]).unwrap();
    let middle = mapped.unmap().unwrap();
    assert!(middle.as_slice().iter().all(|byte| *byte == 7) && before.as_slice().iter().all(|byte| *byte == 0x5e));
}

/// Caught: `bytes::lend` without the look at coherence: the device's bytes or a neighbour's are then lost with the line.
#[test]
fn bytes_that_share_a_cache_line_are_copied_for_a_device_that_does_not_snoop_even_if_it_is_trusted() {
    let system = FakeSystem::non_coherent();
    let dev = system.device_with_policy("dev", Limits::NONE, policy(true)).unwrap();
    let [mut before, middle, _after] = neighbours(&system);
    let mapped = dev.device.map_bytes::<FromDevice>(middle).unwrap();
    dev.master.write(mapped.iova(), &[7; 300]).unwrap();
    before.as_mut_slice().fill(8);
    let middle = mapped.unmap().unwrap();
    assert!(middle.as_slice().iter().all(|byte| *byte == 7) && before.as_slice().iter().all(|byte| *byte == 8));
}

#[test]
fn without_an_iommu_bytes_are_where_they_are_or_copied_to_the_same_place_in_a_page() {
    let memory = memory_at(0x4000_0000, true);
    let all = [BusWindow::identity()];
    for (bounce, copies) in [(Bounce::Never, 0), (Bounce::Always(PoolSource::Own(1 << 20)), 1)] {
        let (device, master) = direct(memory, &all, Limits::NONE, bounce);
        for size in [1, 200, 2048, 5000] {
            let before = device.copies();
            let parts = Bytes::cut(Pages::zeroed(memory, 12288).unwrap(), &[3000, size]).unwrap();
            let [_, mut part]: [Bytes; 2] = parts.try_into().unwrap();
            part.as_mut_slice().fill(9);
            let mapped = device.map_bytes::<Bidirectional>(part).unwrap();
            assert_eq!((mapped.iova().get() % 4096, device.copies() - before), (3000, copies));
            for segment in slice(&mapped, 0, size).unwrap() {
                let mut seen = vec![0; segment.len as usize];
                master.read(segment.iova, &mut seen);
                assert!(seen.iter().all(|byte| *byte == 9));
                master.write(segment.iova, &vec![4; segment.len as usize]);
            }
            assert!(mapped.unmap().unwrap().as_slice().iter().all(|byte| *byte == 4));
        }
    }
}

#[test]
fn bytes_cannot_be_cut_where_there_are_none() {
    let system = FakeSystem::new();
    let cut = |sizes: &[u64]| Bytes::cut(Pages::zeroed(system.memory, 4096).unwrap(), sizes).map(|parts| parts.len());
    assert_eq!(cut(&[4096]), Ok(1));
    assert_eq!(cut(&[4000, 97]), Err(Error::OutOfRange { offset: 4000, len: 97, size: 4096 }));
    assert_eq!(cut(&[1, 0]), Err(Error::BadSize(0)));
    assert!(matches!(cut(&[1, u64::MAX]), Err(Error::OutOfRange { .. })));
    assert_eq!(system.memory.live_allocations(), 0);
}

fn bar() -> PeerRange {
    let range = PhysRange::new(PhysAddr::new(0x1000_0000), 0x2000).unwrap();
    // SAFETY: nothing is there.
    unsafe { PeerRange::new(range) }.unwrap()
}

/// Caught: `lend_peer` without `Prot::MMIO`; `translate` that adds the attributes of memory.
#[test]
fn a_peers_registers_are_mapped_as_such_with_the_rights_of_the_direction_and_come_back() {
    for snooped in [true, false] {
        let system = if snooped { FakeSystem::new() } else { FakeSystem::non_coherent() };
        let dev = system.device("dev").unwrap();
        let mapped = dev.device.map_peer::<ToDevice>(bar()).unwrap();
        let (phys, prot) = dev.domain.space().translate(mapped.iova()).unwrap();
        assert_eq!((phys, prot), (PhysAddr::new(0x1000_0000), Prot::READ | Prot::MMIO));
        assert_eq!((mapped.len(), mapped.device_writes()), (0x2000, false));
        let iova = mapped.iova();
        let range = mapped.unmap().unwrap();
        assert!(dev.domain.space().translate(iova).is_none());
        let mapped = dev.device.map_peer::<FromDevice>(range).unwrap();
        assert_eq!(dev.domain.space().translate(mapped.iova()).unwrap().1, Prot::WRITE | Prot::MMIO);
        system.iommu.wedge(true);
        assert!(mapped.unmap().is_err());
        assert_eq!(system.memory.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_peers_registers_are_never_copied_and_not_lent_to_a_restricted_device() {
    let system = FakeSystem::new();
    let always = Policy { trusted: false, bounce: Bounce::Always(PoolSource::Own(1 << 20)) };
    let dev = system.device_with_policy("dev", Limits::NONE, always).unwrap();
    assert!(dev.device.map_peer::<ToDevice>(bar()).is_ok());
    assert_eq!(dev.device.copies(), 0);
    let only = Policy { trusted: false, bounce: Bounce::Restricted(restricted(&system, 1 << 20)) };
    let dev = system.device_with_policy("only", Limits::NONE, only).unwrap();
    let rejected = dev.device.map_peer::<ToDevice>(bar()).unwrap_err();
    assert!(matches!(rejected.error, Error::Unreachable { .. }));
    assert_eq!(rejected.buffer.len(), 0x2000);
    // SAFETY: it is not made.
    assert!(unsafe { PeerRange::new(PhysRange::new(PhysAddr::new(0x1000_0100), 0x1000).unwrap()) }.is_err());
}
