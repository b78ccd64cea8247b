//! As `fail_nth`, over the real translation tables: address space, domain, device and all that it is lent are made with the n-th
//! allocation failing, for every n until none fails. Tables come from a memory that fails with the rest. After each: no table, no
//! page, no mapping and no byte of the heap is left.

use base::failing::{self, Failing, Spared};
use base::{Deadline, fallible};
use dma::fakes::{FakeMemory, FakeMemoryConfig};
use dma::{
    Bidirectional, Carved, Device, DeviceConfig, Error, FromDevice, Gather, Ladder, Limits, PageSet, Part, Placement,
    SharedBuffer, Stages, ToDevice,
};
use iommu::contract::{AddressSpace, Aperture, Iommu, TableBlock, TableMemory};
use iommu::domain::{Domain, DomainKind};
use iommu::group::Group;
use iommu::pgtable::{Geometry, Granule, PageTable, Stage};
use iommu::{
    AttachError, Iova, IovaError, IovaRange, MapError, OutOfMemory, PhysAddr, PhysRange, Prot, RevokeError, StreamId,
};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fmt;
use std::ptr::slice_from_raw_parts;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

#[global_allocator]
static FAILING: Failing = Failing;

const PAGE: u64 = 4096;

/// Tables on the heap, of which each may be the one that is not to be had.
struct Tables {
    live: AtomicUsize,
}

static TABLES: Tables = Tables { live: AtomicUsize::new(0) };

fn layout(words: usize) -> Layout {
    Layout::from_size_align(words * 8, words * 8).unwrap()
}

// SAFETY: zeroed blocks of the heap of their own, aligned to their size, at the addresses that stand for physical ones; nothing walks
// them but the tables themselves.
unsafe impl TableMemory for Tables {
    fn allocate(&'static self, bytes: usize) -> Result<TableBlock, OutOfMemory> {
        if failing::fails() {
            return Err(OutOfMemory);
        }
        let _memory = Spared::enter();
        // SAFETY: the layout has a size.
        let words = unsafe { alloc_zeroed(layout(bytes / 8)) }.cast::<AtomicU64>();
        assert!(!words.is_null());
        self.live.fetch_add(1, Ordering::SeqCst);
        // SAFETY: just allocated, initialized, and nobody else's until it comes back through `free`.
        let all = unsafe { &*slice_from_raw_parts(words, bytes / 8) };
        // Within the 48 bits of an output address.
        let phys = PhysAddr::new(words.addr() as u64 & ((1 << 48) - 1));
        // SAFETY: as above.
        Ok(unsafe { TableBlock::new(phys, all, self) })
    }
    fn free(&self, _: PhysAddr, words: &'static [AtomicU64]) {
        let _memory = Spared::enter();
        self.live.fetch_sub(1, Ordering::SeqCst);
        // SAFETY: a block of `allocate`, whole, that nobody uses any more.
        unsafe { dealloc(words.as_ptr().cast::<u8>().cast_mut(), layout(words.len())) };
    }
    fn publish(&self, _: &[AtomicU64]) {}
}

/// Real tables that no device walks.
struct Space(PageTable);

// SAFETY: there is no device that could reach anything.
unsafe impl AddressSpace for Space {
    fn aperture(&self) -> Aperture {
        self.0.geometry().aperture()
    }
    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        self.0.map_exclusively::<false>(iova, runs, prot)
    }
    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // SAFETY: the caller's promise.
        unsafe { self.map(iova, runs, prot) }
    }
    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        for range in ranges {
            if let Some(missing) = self.0.unmap(*range)?.missing {
                return Err(RevokeError::NotMapped(missing));
            }
        }
        Ok(())
    }
    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        self.0.translate(iova)
    }
    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tables of a test")
    }
}

struct Nobody;

// SAFETY: it has no streams.
unsafe impl Iommu for Nobody {
    fn name(&self) -> &str {
        "nobody"
    }
    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        Ok(space()?)
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

fn space() -> Result<Arc<dyn AddressSpace>, OutOfMemory> {
    let geometry = Geometry::new(Granule::K4, Stage::One, 48, 48).unwrap();
    let space = Space(PageTable::new(geometry, &TABLES)?);
    Ok(fallible::arc(space).map_err(|_| OutOfMemory)?)
}

/// A device in an address space of its own, with all that belongs to it.
fn device(memory: &'static FakeMemory, coherent: bool) -> Result<Device, Error> {
    let domain = Domain::new(DomainKind::Dma, space()?, IovaRange::new(Iova::new(0), 1 << 48).unwrap_or_default())?;
    let domain = fallible::arc(domain).map_err(|_| Error::OutOfMemory)?;
    let iommu: Arc<dyn Iommu> = fallible::arc(Nobody).map_err(|_| Error::OutOfMemory)?;
    let group = fallible::arc(Group::new(iommu, Vec::new())).map_err(|_| Error::OutOfMemory)?;
    group.attach_default(domain)?;
    // SAFETY: the group has no bus master.
    unsafe { Device::new(DeviceConfig { name: "device", group, limits: Limits::NONE, coherent, memory }) }
}

/// Everything that puts leaves into tables, at addresses far from each other.
fn lend_all(device: &Device, memory: &'static FakeMemory) -> Result<(), Error> {
    let scattered = |pages: u64| PageSet::zeroed(memory, pages * PAGE, Ladder::SINGLE_PAGES);
    let far = |gib: u64| Iova::new((gib << 30) + (2 << 20) - 2 * PAGE);
    let near = device.map::<FromDevice, _>(scattered(5)?)?;
    // Across two last-level tables, under tables of their own.
    let one = device.map_at::<ToDevice, _>(far(3), scattered(4)?)?;
    let two = device.map_at::<Bidirectional, _>(far(700), scattered(4)?)?;
    let mut list = device.scatter_list(2)?;
    list.push_part(device.pages(2 * PAGE)?, 100, 5000)?;
    list.push(device.pages(PAGE)?)?;
    let list = device.map_list::<FromDevice, _>(list)?;
    let ring = device.coherent::<[AtomicU64; 1000]>()?;
    let buffer = SharedBuffer::try_new("shared", scattered(3)?)?;
    let attachment = buffer.attach::<ToDevice>(device)?;

    let reservation = device.reserve(1 << 30, Placement::At(Iova::new(900 << 30)))?;
    let link = reservation.link::<FromDevice, _>((4 << 20) - PAGE, scattered(2)?)?;
    let mut staged = reservation.stage::<FromDevice, _>((64 << 20) - PAGE, Part::of(scattered(4)?)?)?;
    let mut other = reservation.stage::<ToDevice, _>(512 << 20, device.pages(PAGE)?)?;
    reservation.sync::<&mut dyn Stages>(&mut [&mut staged, &mut other])?;
    let carved = staged.linked().map_err(|_| Error::BadSize(0))?.carve(PAGE, PAGE)?;
    let Carved { before, part, after } = carved;
    part.unlink()?;
    drop((before, after, other));
    link.unlink()?;
    assert!(reservation.release().is_ok());

    let mut gather = Gather::<_, 2>::new();
    assert!(gather.push(near).is_ok());
    for pages in gather.finish() {
        pages?;
    }
    let lapsing = one.unmap_lazy();
    two.unmap()?;
    list.unmap()?;
    ring.release()?;
    attachment.detach()?;
    assert!(lapsing.take(Deadline::after_millis(10_000)).is_ok());
    Ok(())
}

/// Caught: a `map_runs` that does not give back what it claimed before a table that is not to be had (what is lent then finds the page
/// mapped); a `map_at` that keeps its range when the tables refuse.
#[test]
fn whatever_is_lent_through_real_tables_survives_every_failure() {
    for snooped in [true, false] {
        let memory = FakeMemory::new(FakeMemoryConfig { snooped, ..FakeMemoryConfig::default() });
        let (mut count, mut tables) = (0, 0);
        // Once without: lists that are for the whole system, and kept.
        for n in [u64::MAX].into_iter().chain(0..) {
            let heap = failing::heap();
            failing::arm(n);
            let mut lent = None;
            let result = (|| {
                let device = device(memory, snooped)?;
                let before = TABLES.live.load(Ordering::SeqCst);
                let result = lend_all(&device, memory);
                failing::unfailing(|| device.flush(Deadline::after_millis(10_000))).unwrap();
                tables = TABLES.live.load(Ordering::SeqCst) - before;
                lent = Some(device.stats().live_mappings);
                // Whatever failed, everything can be lent now.
                failing::unfailing(|| lend_all(&device, memory)).unwrap();
                result
            })();
            let failed = failing::disarm();
            assert!(matches!(lent, None | Some(0)), "failure {n} leaves a mapping");
            assert_eq!((memory.live_allocations(), memory.violations()), (0, Vec::new()), "failure {n}: {result:?}");
            assert_eq!(TABLES.live.load(Ordering::SeqCst), 0, "failure {n} leaves a table");
            if n == u64::MAX {
                result.unwrap();
                continue;
            }
            match &result {
                Ok(()) if !failed => {
                    count = n;
                    break;
                }
                Ok(()) => (),
                Err(error) => assert!(
                    failed
                        && matches!(
                            error,
                            Error::OutOfMemory
                                | Error::Attributes(_)
                                | Error::Iova(IovaError::OutOfMemory)
                                | Error::Attach(AttachError::OutOfMemory)
                        ),
                    "failure {n}: {error}"
                ),
            }
            drop(result);
            assert_eq!(failing::heap(), heap, "failure {n} leaks heap");
        }
        assert!(count > 60 && tables > 10, "{count} allocations, {tables} tables");
    }
}
