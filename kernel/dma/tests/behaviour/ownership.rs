//! R2, R3: a device reaches memory from `map` until a successful revocation, and nobody else has it meanwhile.

use dma::fakes::FakeSystem;
use dma::{
    Bidirectional, BusWindow, Device, DirectConfig, Error, FromDevice, Ladder, Lent, Limits, PageSet, Pages, Stray,
    ToDevice, quarantine, slice,
};
use iommu::{FaultReason, Iova, RevokeError};
use std::sync::Arc;

/// Caught: `Held::take_back` returning the memory without `Loan::end` (the late write then reaches the pages).
#[test]
fn what_the_device_wrote_is_in_the_pages_after_unmap_and_it_writes_no_more() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(8192).unwrap()).unwrap();
    let iova = mapped.iova();
    blk.master.write(iova.checked_add(4090).unwrap(), b"across pages").unwrap();
    let pages = mapped.unmap().unwrap();
    assert_eq!(&pages.as_slice()[4090..4102], b"across pages");
    assert_eq!(blk.master.write(iova, b"late").unwrap_err().reason, FaultReason::NotMapped);
    assert_eq!(&pages.as_slice()[..4], [0; 4]);
    assert!(system.memory.violations().is_empty());
}

/// Caught: `Held` without its `Drop` (the pages then leak and stay reachable).
#[test]
fn a_dropped_mapping_is_revoked_and_its_pages_are_freed() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<Bidirectional, _>(blk.device.pages(4096).unwrap()).unwrap();
    let iova = mapped.iova();
    blk.master.write(iova, b"x").unwrap();
    assert_eq!(system.memory.live_allocations(), 1);
    drop(mapped);
    assert_eq!(system.memory.live_allocations(), 0);
    assert_eq!(blk.master.read(iova, &mut [0]).unwrap_err().reason, FaultReason::NotMapped);
    assert_eq!(blk.device.stats().live_mappings, 0);
    assert!(system.memory.violations().is_empty());
}

#[test]
fn a_forgotten_mapping_leaks_and_nothing_else() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    let iova = mapped.iova();
    std::mem::forget(mapped);
    // The device still has what it was lent: into memory that is still allocated.
    blk.master.write(iova, b"still mine").unwrap();
    assert_eq!((system.memory.live_allocations(), blk.device.stats().live_mappings), (1, 1));
    let other = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    assert_ne!(other.iova(), iova);
    assert!(system.memory.violations().is_empty());
}

/// Caught: dropping the memory instead of forgetting it after a failed revocation (a freed page is then reached: a violation),
/// and giving the address range back (the next mapping then gets it).
#[test]
fn a_revocation_that_fails_puts_the_pages_into_quarantine() {
    let system = FakeSystem::new();
    let blk = system.device("blk in quarantine").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(3 * 4096).unwrap()).unwrap();
    let iova = mapped.iova();
    blk.master.write(iova, b"translated before").unwrap();
    system.iommu.wedge(true);
    let lost = mapped.unmap().unwrap_err();
    assert_eq!((lost.cause, lost.range.start(), lost.range.len()), (RevokeError::TimedOut, iova, 3 * 4096));
    system.iommu.wedge(false);

    // The device uses what it had translated: into pages that nobody got.
    blk.master.write(iova, b"after").unwrap();
    assert_eq!(system.memory.violations(), Vec::<String>::new());
    assert_eq!((system.memory.live_allocations(), blk.device.stats().quarantined_pages), (1, 3));
    assert_eq!(blk.device.stats().live_mappings, 1);
    let report = quarantine::report();
    assert!(report.pages >= 3);
    assert!(report.names.contains(&lost), "{report}");
    assert!(lost.to_string().contains("blk in quarantine") && lost.to_string().contains("ownership.rs"), "{lost}");

    // The address is never given out again, to buffers of its size or any other.
    for pages in (0..600).map(|round| if round % 2 == 0 { 3 } else { 1 }) {
        let next = blk.device.map::<FromDevice, _>(blk.device.pages(pages * 4096).unwrap()).unwrap();
        assert!(next.iova() >= lost.range.end() || next.iova().get() + next.len() <= iova.get());
        std::mem::forget(next);
    }
}

/// Caught: `Loan::end` that gives the address range back before it has revoked it.
#[test]
fn an_address_is_given_out_again_only_after_its_revocation_is_complete() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let allocator = blk.domain.clone();
    system.iommu.on_revoke(move |range| {
        let limit = Iova::new(u64::MAX);
        let next = allocator.iova().allocate(range.len(), range.len(), limit).unwrap();
        assert!(!next.overlaps(range), "{next} was given out while {range} was being revoked");
        allocator.iova().free(next).unwrap();
    });
    for pages in [1, 2, 4, 1024] {
        let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(pages * 4096).unwrap()).unwrap();
        mapped.unmap().unwrap();
    }
}

#[test]
fn dropping_a_mapping_whose_revocation_fails_puts_the_pages_into_quarantine_too() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    let iova = mapped.iova();
    blk.master.write(iova, b"before").unwrap();
    system.iommu.wedge(true);
    drop(mapped);
    system.iommu.wedge(false);
    blk.master.write(iova, b"after").unwrap();
    assert!(system.memory.violations().is_empty());
    assert_eq!(blk.device.stats().quarantined_pages, 1);
}

#[test]
fn scattered_memory_is_one_contiguous_range_for_the_device() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let set = PageSet::zeroed(system.memory, 16 * 4096, Ladder::SINGLE_PAGES).unwrap();
    assert_eq!(set.runs().len(), 16);
    let mapped = blk.device.map::<Bidirectional, _>(set).unwrap();
    assert_eq!(mapped.segments().len(), 1);
    assert_eq!((mapped.segments()[0].iova, mapped.segments()[0].len), (mapped.iova(), 16 * 4096));
    let data: Vec<u8> = (0..16 * 4096_u32).map(|i| (i * 7 / 3) as u8).collect();
    blk.master.write(mapped.iova(), &data).unwrap();
    let mut viewed = vec![0; data.len()];
    mapped.view().read(0, &mut viewed).unwrap();
    assert_eq!(viewed, data);
    let set = mapped.unmap().unwrap();
    assert_eq!(set.chunks().flatten().copied().collect::<Vec<_>>(), data);
}

#[test]
fn unmapping_any_amount_takes_one_revocation() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let set = PageSet::zeroed(system.memory, 1 << 20, Ladder::SINGLE_PAGES).unwrap();
    let mapped = blk.device.map::<ToDevice, _>(set).unwrap();
    assert_eq!(mapped.unmap().unwrap().runs().len(), 256);
    assert_eq!((system.iommu.maps(), system.iommu.revocations()), (1, 1));
}

#[test]
fn a_mapping_outlives_every_handle_of_its_device_harmlessly() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mapped = blk.device.map::<FromDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    let (iova, master) = (mapped.iova(), blk.master);
    blk.device.shut_down().unwrap();
    drop((blk.device, blk.group, blk.domain));
    assert_eq!(master.write(iova, b"x").unwrap_err().reason, FaultReason::Blocked);
    assert_eq!(mapped.device().name(), "blk");
    mapped.unmap().unwrap();
    assert_eq!(system.memory.live_allocations(), 0);
}

/// Caught: `Device::map` without the look at the group's state.
#[test]
fn while_a_driver_owns_the_address_space_the_dma_api_refuses_and_gives_the_buffer_back() {
    use iommu::IovaRange;
    use iommu::contract::Iommu;
    use iommu::domain::{Domain, DomainKind};
    let system = FakeSystem::new();
    let gpu = system.device("gpu").unwrap();
    let kept = gpu.device.map::<FromDevice, _>(gpu.device.pages(4096).unwrap()).unwrap();
    let window = IovaRange::new(Iova::new(0), 1 << 32).unwrap();
    let own = Domain::new(DomainKind::Owned, system.iommu.create().unwrap(), window).unwrap();
    gpu.group.attach_owned(Arc::new(own)).unwrap();

    let mut pages = gpu.device.pages(4096).unwrap();
    pages.as_mut_slice()[0] = 42;
    let rejected = gpu.device.map::<ToDevice, _>(pages).unwrap_err();
    assert!(matches!(rejected.error, Error::OwnedDomain(_)), "{rejected}");
    assert_eq!(rejected.buffer.as_slice()[0], 42);
    assert!(gpu.device.coherent::<core::sync::atomic::AtomicU32>().is_err());
    // Nothing of the default domain is reachable, and back in it, what was mapped is again.
    assert!(gpu.master.write(kept.iova(), b"x").is_err());
    gpu.group.detach_owned().unwrap();
    gpu.master.write(kept.iova(), b"x").unwrap();
    gpu.device.map::<ToDevice, _>(rejected.buffer).unwrap().unmap().unwrap();
}

/// Caught: `check_loan` that accepts everything.
#[test]
fn a_loan_to_one_device_is_refused_by_another() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let mapped = blk.device.map::<ToDevice, _>(blk.device.pages(4096).unwrap()).unwrap();
    blk.device.check_loan(&mapped).unwrap();
    blk.device.clone().check_loan(&mapped).unwrap();
    let error = gpu.device.check_loan(&mapped).unwrap_err();
    assert_eq!(error.to_string(), "memory was lent to blk, not to gpu");
    assert_eq!(gpu.master.read(mapped.iova(), &mut [0]).unwrap_err().reason, FaultReason::NotMapped);
}

#[test]
fn a_stray_loan_leads_nowhere_and_exists_only_behind_an_iommu() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let stray = Stray::new(&blk.device, Iova::new(0x7000_0000), 512).unwrap();
    blk.device.check_loan(&stray).unwrap();
    let segment = slice(&stray, 0, 512).unwrap().next().unwrap();
    assert_eq!(blk.master.write(segment.iova, b"x").unwrap_err().reason, FaultReason::NotMapped);
    assert_eq!(Stray::new(&blk.device, Iova::new(0), 0).unwrap_err(), Error::BadSize(0));
    assert!(Stray::new(&blk.device, Iova::new(u64::MAX), 2).is_err());
    let (windows, limits) = (&[BusWindow::identity()], Limits::NONE);
    let config = DirectConfig { name: "legacy", windows, limits, coherent: true, memory: system.memory };
    // SAFETY: there is no bus master at all.
    let direct = unsafe { Device::direct(config) }.unwrap();
    assert!(matches!(Stray::new(&direct, Iova::new(0x7000_0000), 512), Err(Error::NotIsolated(_))));
}

#[test]
fn a_loan_shared_among_requests_comes_back_when_the_last_has_returned_it() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let loan = Arc::new(blk.device.map::<FromDevice, _>(blk.device.pages(8192).unwrap()).unwrap());
    let in_flight: Arc<dyn Lent> = loan.clone();
    let iova = loan.iova();
    let loan = Arc::try_unwrap(loan).unwrap_err();
    drop(loan);
    blk.master.write(iova, b"late, but lent").unwrap();
    drop(in_flight);
    assert!(blk.master.write(iova, b"too late").is_err());
    assert!(system.memory.violations().is_empty());
}

#[test]
fn an_unmapped_buffer_can_be_mapped_again_and_keeps_its_contents() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let mut pages: Pages = blk.device.pages(4096).unwrap();
    for round in 0..50_u8 {
        pages.as_mut_slice().fill(round);
        let mapped = blk.device.map::<ToDevice, _>(pages).unwrap();
        let mut seen = [0; 4096];
        blk.master.read(mapped.iova(), &mut seen).unwrap();
        assert!(seen.iter().all(|byte| *byte == round));
        pages = mapped.unmap().unwrap();
    }
    let stats = blk.device.stats();
    assert_eq!((stats.total_mappings, stats.live_mappings, stats.total_bytes), (50, 0, 50 * 4096));
}
