//! Foreign drivers: what their interface does here, however they use it.

use core::ptr::NonNull;
use dma::fakes::{FakeDevice, FakeSystem};
use dma::hal::{ForeignHal, HasSlot, Misuse, Report, Slot};
use dma::{Bidirectional, BusWindow, Device, DirectConfig, Error, Limits};
use iommu::Iova;
use iommu::group::AttachmentState;
use virtio_drivers::BufferDirection::{self, Both, DeviceToDriver, DriverToDevice};
use virtio_drivers::Hal;

fn share<S: HasSlot>(bytes: &mut [u8], direction: BufferDirection) -> Iova {
    // SAFETY: a borrowed slice.
    Iova::new(unsafe { ForeignHal::<S>::share(NonNull::from(bytes), direction) })
}

fn unshare<S: HasSlot>(address: Iova, bytes: &mut [u8], direction: BufferDirection) {
    // SAFETY: a borrowed slice; whether the address is right is what some tests are about.
    unsafe { ForeignHal::<S>::unshare(address.get(), NonNull::from(bytes), direction) }
}

fn allocate<S: HasSlot>(pages: usize, direction: BufferDirection) -> (Iova, NonNull<u8>) {
    let (address, start) = ForeignHal::<S>::dma_alloc(pages, direction);
    (Iova::new(address), start)
}

fn free<S: HasSlot>(address: Iova, start: NonNull<u8>, pages: usize) {
    // SAFETY: whether they are the right ones is what some tests are about; those who pass them do not use them any more.
    assert_eq!(unsafe { ForeignHal::<S>::dma_dealloc(address.get(), start, pages) }, 0);
}

fn install<S: HasSlot>(system: &FakeSystem) -> FakeDevice {
    let device = system.device("foreign").unwrap();
    S::slot().install(&device.device).unwrap();
    device
}

/// What must hold at the end: the driver has left nothing, and nobody touched what is not his.
fn ends_clean(slot: &Slot, system: &FakeSystem) -> Report {
    let report = slot.remove().unwrap();
    assert_eq!((report.shares, report.rings, report.quarantined), (0, 0, 0), "{report}");
    assert_eq!((system.memory.live_allocations(), system.memory.violations()), (0, Vec::new()));
    report
}

/// Caught: a copy back in every direction, none at all, and no copy to begin with.
#[test]
fn a_share_is_a_copy_that_the_device_has_until_it_is_unshared() {
    dma::foreign_driver! { Blk }
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = install::<Blk>(&system);
        let mut around = [0x55; 3 * 4096];
        let mut page = [0; 4096];

        let address = share::<Blk>(&mut around[100..200], DriverToDevice);
        blk.master.read(address, &mut page).unwrap();
        // The buffer, and nothing of what lies beside it.
        assert!(page[..100].iter().all(|byte| *byte == 0x55) && page[100..].iter().all(|byte| *byte == 0));
        assert!(blk.master.write(address, b"x").is_err());
        around[100..200].fill(0x66);
        unshare::<Blk>(address, &mut around[100..200], DriverToDevice);
        assert!(around[100..200].iter().all(|byte| *byte == 0x66));
        assert!(blk.master.read(address, &mut page).is_err());

        let address = share::<Blk>(&mut around[100..200], DeviceToDriver);
        blk.master.write(address, b"a part").unwrap();
        assert_eq!(around[100], 0x66);
        unshare::<Blk>(address, &mut around[100..200], DeviceToDriver);
        assert_eq!(&around[99..106], b"\x55a part");
        assert!(around[106..200].iter().all(|byte| *byte == 0x66));
        assert!(blk.master.write(address, b"x").is_err());

        let address = share::<Blk>(&mut around[..5000], Both);
        blk.master.read(address, &mut page).unwrap();
        assert_eq!(page[..], around[..4096]);
        blk.master.write(address.checked_add(4999).unwrap(), b"z").unwrap();
        unshare::<Blk>(address, &mut around[..5000], Both);
        assert_eq!(around[4998..5001], *b"\x55z\x55");
        let report = ends_clean(Blk::slot(), &system);
        assert_eq!((report.failures, report.misuses), (0, 0));
    }
}

/// Caught: rings that the device may write in every direction.
#[test]
fn a_ring_is_zeroed_pages_that_the_device_uses_as_their_direction_says() {
    dma::foreign_driver! { Blk }
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let blk = install::<Blk>(&system);
        for direction in [DriverToDevice, DeviceToDriver, Both] {
            let (address, start) = allocate::<Blk>(2, direction);
            assert_eq!((address.get() % 4096, start.addr().get() % 4096), (0, 0));
            let mut seen = [1; 8192];
            blk.master.read(address, &mut seen).unwrap();
            assert_eq!(seen, [0; 8192]);
            // SAFETY: the ring's second page, which is the driver's too.
            let second = unsafe { start.add(4096) };
            // SAFETY: as above; the fake device does not access it meanwhile.
            unsafe { second.write_volatile(7) };
            blk.master.read(address, &mut seen).unwrap();
            assert_eq!(seen[4096], 7);
            assert_eq!(blk.master.write(address, b"used").is_ok(), direction != DriverToDevice);
            // SAFETY: as above.
            let first = unsafe { start.read_volatile() };
            assert_eq!(first, if direction == DriverToDevice { 0 } else { b'u' });
            free::<Blk>(address, start, 2);
            assert!(blk.master.read(address, &mut seen).is_err());
        }
        ends_clean(Blk::slot(), &system);
    }
}

#[test]
fn two_drivers_have_two_address_spaces() {
    dma::foreign_driver! { One Other }
    let system = FakeSystem::new();
    let (one, other) = (install::<One>(&system), install::<Other>(&system));
    let (mut of_one, mut of_other) = ([1; 16], [2; 16]);
    let (a, b) = (share::<One>(&mut of_one, Both), share::<Other>(&mut of_other, Both));
    // The same number, and different memory.
    assert_eq!(a, b);
    one.master.write(a, &[3; 16]).unwrap();
    unshare::<Other>(b, &mut of_other, Both);
    assert_eq!((of_other, other.master.read(b, &mut [0]).is_err()), ([2; 16], true));
    unshare::<One>(a, &mut of_one, Both);
    assert_eq!(of_one, [3; 16]);
    assert_eq!(One::slot().remove().unwrap().misuses, 0);
    ends_clean(Other::slot(), &system);
}

/// Caught: shares and rings that are found by their address alone (the copy went to the other buffer).
#[test]
fn what_a_driver_ends_wrongly_is_named_and_has_no_effect_on_memory() {
    dma::foreign_driver! { Bad }
    let system = FakeSystem::new();
    let bad = install::<Bad>(&system);
    let mut misuses = 0;
    let mut noted = |misuse| {
        misuses += 1;
        let report = Bad::slot().report();
        assert_eq!((report.misuses, report.last_misuse), (misuses, Some(misuse)));
    };
    let (mut buffer, mut other) = ([1; 64], [2; 64]);
    // Never shared.
    let never = Iova::new(0x77_0000);
    unshare::<Bad>(never, &mut buffer, DeviceToDriver);
    noted(Misuse::NotShared(never));
    // Twice, and somewhere in the middle.
    let address = share::<Bad>(&mut buffer, DeviceToDriver);
    let middle = address.checked_add(16).unwrap();
    unshare::<Bad>(middle, &mut buffer, DeviceToDriver);
    noted(Misuse::NotShared(middle));
    bad.master.write(address, &[9; 64]).unwrap();
    unshare::<Bad>(address, &mut buffer, DeviceToDriver);
    assert_eq!(buffer, [9; 64]);
    buffer.fill(1);
    unshare::<Bad>(address, &mut buffer, DeviceToDriver);
    noted(Misuse::NotShared(address));
    assert_eq!(buffer, [1; 64]);
    // Another buffer, less of it, more of it, or another direction: the device loses it, and nothing is copied.
    let mut long = [5; 128];
    for case in 0..4 {
        let address = share::<Bad>(&mut long[..64], Both);
        bad.master.write(address, &[9; 64]).unwrap();
        match case {
            0 => unshare::<Bad>(address, &mut other, Both),
            1 => unshare::<Bad>(address, &mut long[..63], Both),
            2 => unshare::<Bad>(address, &mut long, Both),
            _ => unshare::<Bad>(address, &mut long[..64], DeviceToDriver),
        }
        noted(Misuse::OtherBuffer(address));
        assert_eq!((long, other), ([5; 128], [2; 64]));
        assert!(bad.master.read(address, &mut [0]).is_err());
    }
    // Rings.
    let (address, start) = allocate::<Bad>(2, Both);
    free::<Bad>(never, start, 2);
    noted(Misuse::NotAllocated(never));
    free::<Bad>(address, start, 1);
    noted(Misuse::OtherPages(address));
    // SAFETY: the ring's second page.
    let second = unsafe { start.add(4096) };
    free::<Bad>(address, second, 2);
    noted(Misuse::OtherPages(address));
    // The driver has it still, and so has the device.
    bad.master.write(address, b"x").unwrap();
    free::<Bad>(address, start, 2);
    free::<Bad>(address, start, 2);
    noted(Misuse::NotAllocated(address));
    ends_clean(Bad::slot(), &system);
}

/// Caught: addresses for failures that are not set aside, but free for others.
#[test]
fn whatever_runs_out_the_driver_gets_an_address_that_faults_and_nothing_is_left() {
    dma::foreign_driver! { Poor }
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let poor = install::<Poor>(&system);
        let mut buffer = [1; 3 * 4096];
        for by_memory in [true, false] {
            for n in 0.. {
                let arm = || if by_memory { system.memory.fail_after(n) } else { system.iommu.fail_map_after(n) };
                let disarm = || (system.memory.heal(), system.iommu.fail_map_after(u64::MAX));
                let failures = Poor::slot().report().failures;
                arm();
                let address = share::<Poor>(&mut buffer, DeviceToDriver);
                disarm();
                if Poor::slot().report().failures == failures {
                    assert!(n > 0, "nothing failed");
                    unshare::<Poor>(address, &mut buffer, DeviceToDriver);
                    break;
                }
                assert_eq!((Poor::slot().report().shares, system.memory.live_allocations()), (0, 0), "failure {n}");
                // What is shared next is not there, and nothing can be put there.
                let mut next = [2; 16 * 4096];
                let others: Vec<Iova> = (0..20).map(|_| share::<Poor>(&mut next, Both)).collect();
                let pages = poor.device.pages(4096).unwrap();
                poor.device.map_at::<Bidirectional, _>(address, pages).unwrap_err();
                for page in 0..3 {
                    let at = address.checked_add(page * 4096).unwrap();
                    assert!(poor.master.write(at, b"x").is_err() && poor.master.read(at, &mut [0]).is_err());
                }
                others.into_iter().for_each(|other| unshare::<Poor>(other, &mut next, Both));
                // The driver cannot know, and ends it as any other.
                unshare::<Poor>(address, &mut buffer, DeviceToDriver);
                assert_eq!((buffer, Poor::slot().report().misuses), ([1; 3 * 4096], 0));
            }
            if by_memory {
                system.memory.fail_after(0)
            } else {
                system.iommu.fail_map_after(0)
            }
            assert_eq!(allocate::<Poor>(1, Both).0, Iova::new(0));
            system.memory.heal();
            system.iommu.fail_map_after(u64::MAX);
            assert_eq!((Poor::slot().report().rings, system.memory.live_allocations()), (0, 0));
        }
        assert_eq!(allocate::<Poor>(0, Both).0, Iova::new(0));
        assert_eq!(allocate::<Poor>(usize::MAX, Both).0, Iova::new(0));
        let report = ends_clean(Poor::slot(), &system);
        assert!(report.failures > 0 && report.misuses == 0, "{report}");
        assert_eq!(poor.device.stats().live_mappings, 0);
    }
}

/// Caught: handing out what is set aside also where it is too short.
#[test]
fn a_device_that_could_run_past_what_is_set_aside_is_put_out_of_use() {
    dma::foreign_driver! { Long }
    let system = FakeSystem::new();
    // 1 MiB: so only 64 KiB are set aside.
    let long = system.device_with("long", Limits::address_bits(20)).unwrap();
    Long::slot().install(&long.device).unwrap();
    let mut buffer = vec![1; 65536];
    system.iommu.fail_map_after(0);
    share::<Long>(&mut buffer, Both);
    assert_eq!(long.group.current(), AttachmentState::Default);
    buffer.push(1);
    system.iommu.fail_map_after(0);
    share::<Long>(&mut buffer, Both);
    assert_eq!(long.group.current(), AttachmentState::Blocked);
    assert_eq!(Long::slot().report().failures, 2);
    ends_clean(Long::slot(), &system);
}

/// Caught: lists with more room than they are to have.
#[test]
fn a_driver_that_shares_without_end_comes_to_an_end() {
    dma::foreign_driver! { Leaky }
    let system = FakeSystem::new();
    let leaky = install::<Leaky>(&system);
    let mut byte = [1];
    let addresses: Vec<Iova> = (0..600).map(|_| share::<Leaky>(&mut byte, Both)).collect();
    let report = Leaky::slot().report();
    assert_eq!((report.shares, report.failures, report.last_failure), (512, 88, Some(Error::TooMany(512))));
    for (number, address) in addresses.iter().enumerate() {
        assert_eq!(leaky.master.read(*address, &mut [0]).is_ok(), number < 512);
    }
    addresses.into_iter().for_each(|address| unshare::<Leaky>(address, &mut byte, Both));
    let rings: Vec<_> = (0..70).map(|_| allocate::<Leaky>(1, Both)).collect();
    let (given, refused) = rings.split_at(64);
    assert!(given.iter().all(|(address, _)| address.get() != 0));
    assert!(refused.iter().all(|(address, _)| address.get() == 0));
    given.iter().for_each(|(address, start)| free::<Leaky>(*address, *start, 1));
    assert_eq!(ends_clean(Leaky::slot(), &system).misuses, 0);
}

/// Caught: freeing rings at the removal (the driver still points to them), leaving them with the device, and leaving shares.
#[test]
fn when_its_device_is_removed_it_loses_all_that_the_driver_left_and_the_driver_keeps_its_rings() {
    dma::foreign_driver! { Gone }
    for system in [FakeSystem::new(), FakeSystem::non_coherent()] {
        let gone = install::<Gone>(&system);
        let mut buffer = [1; 100];
        let address = share::<Gone>(&mut buffer, DeviceToDriver);
        let (ring, start) = allocate::<Gone>(1, Both);
        gone.master.write(address, &[9; 100]).unwrap();
        assert_eq!(Gone::slot().lent().map(|range| range.start()).collect::<Vec<_>>(), [ring, address]);
        let report = Gone::slot().remove().unwrap();
        assert_eq!((report.shares, report.rings, report.misuses), (1, 1, 0));
        assert_eq!(report.device.as_deref(), Some("foreign"));
        for revoked in [address, ring] {
            assert!(gone.master.read(revoked, &mut [0]).is_err());
        }
        assert_eq!((gone.device.stats().live_mappings, Gone::slot().lent().count()), (0, 0));
        // SAFETY: the driver's until it is freed.
        unsafe { start.write_volatile(1) };
        assert_eq!(system.memory.live_allocations(), 1);
        assert!(Gone::slot().remove().is_none());

        // What the driver does from now on has no effect; and another device in its place is not touched by it.
        let next = install::<Gone>(&system);
        let mut of_next = [3; 100];
        let again = share::<Gone>(&mut of_next, Both);
        let (other, other_start) = allocate::<Gone>(1, Both);
        free::<Gone>(ring, start, 1);
        assert_eq!(system.memory.live_allocations(), 2);
        for lent in [again, other] {
            next.master.read(lent, &mut [0]).unwrap();
        }
        free::<Gone>(other, other_start, 1);
        unshare::<Gone>(again, &mut of_next, Both);
        assert_eq!(buffer, [1; 100]);
        assert_eq!(ends_clean(Gone::slot(), &system).misuses, 0);
        // Without a device nothing is shared.
        let nowhere = share::<Gone>(&mut buffer, Both);
        assert!(next.master.read(nowhere, &mut [0]).is_err() && gone.master.read(nowhere, &mut [0]).is_err());
        unshare::<Gone>(nowhere, &mut buffer, Both);
        assert_eq!(allocate::<Gone>(1, Both).0, Iova::new(0));
        assert_eq!(Gone::slot().report().last_failure, Some(Error::SlotEmpty));
    }
}

/// Caught: rings that are freed at the removal though their revocation failed.
#[test]
fn a_revocation_that_fails_leaves_the_buffer_alone_and_is_counted() {
    dma::foreign_driver! { Stuck }
    let system = FakeSystem::new();
    let stuck = install::<Stuck>(&system);
    let mut buffer = [1; 16];
    let address = share::<Stuck>(&mut buffer, DeviceToDriver);
    let (ring, start) = allocate::<Stuck>(1, Both);
    stuck.master.write(address, &[9; 16]).unwrap();
    stuck.master.write(ring, &[9; 16]).unwrap();
    system.iommu.wedge(true);
    unshare::<Stuck>(address, &mut buffer, DeviceToDriver);
    assert_eq!((buffer, Stuck::slot().report().quarantined), ([1; 16], 1));
    let report = Stuck::slot().remove().unwrap();
    assert_eq!((report.shares, report.rings, report.quarantined), (0, 1, 2));
    system.iommu.wedge(false);
    // Both are never freed, and nobody is hurt by what the device still writes.
    free::<Stuck>(ring, start, 1);
    stuck.master.write(ring, b"x").unwrap();
    assert_eq!((system.memory.live_allocations(), system.memory.violations()), (2, Vec::new()));
    assert_eq!(Stuck::slot().report().misuses, 0);
}

#[test]
fn a_slot_takes_one_device_and_only_behind_an_iommu() {
    dma::foreign_driver! { Full }
    let system = FakeSystem::new();
    let first = install::<Full>(&system);
    let other = system.device("other").unwrap();
    assert_eq!(Full::slot().install(&other.device), Err(Error::SlotTaken("foreign".into())));
    assert_eq!(Full::slot().install(&first.device), Err(Error::SlotTaken("foreign".into())));
    // The addresses that were set aside in vain are free again.
    let lowest = Iova::new(4096);
    drop(other.device.map_at::<Bidirectional, _>(lowest, other.device.pages(4096).unwrap()).unwrap());
    first.device.map_at::<Bidirectional, _>(lowest, first.device.pages(4096).unwrap()).unwrap_err();
    ends_clean(Full::slot(), &system);
    let windows = [BusWindow::identity()];
    let config =
        DirectConfig { name: "direct", windows: &windows, limits: Limits::NONE, coherent: true, memory: system.memory };
    // SAFETY: it does nothing at all.
    let direct = unsafe { Device::direct(config) }.unwrap();
    assert_eq!(Full::slot().install(&direct), Err(Error::NotIsolated("direct".into())));
}
