//! The way of one page through the API allocates nothing: counted by the allocator of a process of its own.

use dma::fakes::{FakeMemory, FakeMemoryConfig};
use dma::{Device, DeviceConfig, FromDevice, Limits, Pages, ToDevice};
use iommu::contract::{AddressSpace, Aperture, Iommu};
use iommu::domain::{Domain, DomainKind};
use iommu::group::Group;
use iommu::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError, StreamId};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is the system's allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A space in which nothing is ever translated, so that nobody reaches anything.
struct Nowhere;

// SAFETY: no device reaches anything through it.
unsafe impl AddressSpace for Nowhere {
    fn aperture(&self) -> Aperture {
        let range = IovaRange::new(Iova::new(0), 1 << 32).unwrap();
        Aperture { range, page_sizes: 0x4020_1000, output_max: PhysAddr::new((1 << 48) - 1) }
    }
    unsafe fn map(&self, _: IovaRange, _: &[PhysRange], _: Prot) -> Result<(), MapError> {
        Ok(())
    }
    unsafe fn map_unsynced(&self, _: IovaRange, _: &[PhysRange], _: Prot) -> Result<(), MapError> {
        Ok(())
    }
    fn revoke(&self, _: &[IovaRange]) -> Result<(), RevokeError> {
        Ok(())
    }
    fn translate(&self, _: Iova) -> Option<(PhysAddr, Prot)> {
        None
    }
    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nowhere")
    }
}

struct Nothing;

// SAFETY: it has no streams.
unsafe impl Iommu for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }
    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        Ok(Arc::new(Nowhere))
    }
    fn attach(&self, _: StreamId, _: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        Ok(())
    }
    fn block(&self, _: StreamId) -> Result<(), AttachError> {
        Ok(())
    }
    unsafe fn bypass(&self, _: StreamId) -> Result<(), AttachError> {
        Ok(())
    }
}

/// Caught: `Loan` with its segments in a vector.
#[test]
fn mapping_and_unmapping_one_page_allocates_nothing() {
    dma::tracker::enable(false);
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let window = IovaRange::new(Iova::new(0), 1 << 32).unwrap();
    let domain = Domain::new(DomainKind::Dma, Arc::new(Nowhere), window).unwrap();
    let group = Arc::new(Group::new(Arc::new(Nothing), vec![]));
    group.attach_default(Arc::new(domain)).unwrap();
    let config = DeviceConfig { name: "device", group, limits: Limits::NONE, coherent: true, memory };
    // SAFETY: the group has no bus master.
    let device = unsafe { Device::new(config) }.unwrap();

    let mut pages = Pages::zeroed(memory, 4096).unwrap();
    // The first time, the address allocator sets up its cache for this core.
    pages = device.map::<ToDevice, _>(pages).unwrap().unmap().unwrap();
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        let mapped = device.map::<ToDevice, _>(pages).unwrap();
        assert_ne!(mapped.iova(), Iova::new(0));
        pages = mapped.unmap().unwrap();
        pages = device.map::<FromDevice, _>(pages).unwrap().unmap().unwrap();
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
