//! An IOMMU that keeps to the contract, or fails in the ways that the contract allows, and the devices behind it.

#![expect(unsafe_code, reason = "implements the unsafe traits of the contract")]

use super::{FakeMemory, Hardware, tables};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::any::Any;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use iommu::contract::{AddressSpace, Aperture, Iommu};
use iommu::pgtable::{Anchor, Leaves, PageTable};
use iommu::{
    Access, AttachError, Fault, FaultReason, Iova, IovaRange, MapError, PAGE_SIZE, PhysAddr, PhysRange, Prot,
    RevokeError, StreamId,
};

/// What tests may change.
struct Knobs {
    wedged: AtomicBool,
    no_privileges: AtomicBool,
    caching: AtomicBool,
    sync_fails: AtomicBool,
    maps_until_failure: AtomicU64,
    maps: AtomicU64,
    syncs: AtomicU64,
    revocations: AtomicU64,
    on_revoke: IrqMutex<Option<OnRange>>,
    on_clear: IrqMutex<Option<OnRange>>,
    on_map: IrqMutex<Option<OnRange>>,
}

/// What a test does while a mapping or a revocation has begun and is not complete.
type OnRange = Arc<dyn Fn(IovaRange) + Send + Sync>;

fn tell(listener: &IrqMutex<Option<OnRange>>, ranges: &[IovaRange]) {
    let listener = listener.lock().clone();
    if let Some(f) = listener {
        ranges.iter().for_each(|range| f(*range));
    }
}

/// An IOMMU for tests.
pub struct FakeIommu {
    name: String,
    /// Address spaces are real tables.
    tables: bool,
    knobs: Arc<Knobs>,
    streams: IrqMutex<BTreeMap<StreamId, Stream>>,
    faults: IrqMutex<Vec<Fault>>,
}

enum Stream {
    Space(Arc<dyn AddressSpace>),
    Bypass,
}

impl FakeIommu {
    /// Makes an IOMMU that blocks every stream.
    pub fn new(name: &str) -> Arc<Self> {
        Self::make(name, false)
    }

    /// As [`FakeIommu::new`], with address spaces that are the tables of [`iommu::pgtable`], with anchors in them. A mapping through
    /// an anchor is found at once, and neither counted nor told to [`FakeIommu::on_map`]; where IOMMUs are [caching](FakeIommu::caching)
    /// there are no anchors.
    pub fn with_tables(name: &str) -> Arc<Self> {
        Self::make(name, true)
    }

    fn make(name: &str, tables: bool) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            tables,
            knobs: Arc::new(Knobs {
                no_privileges: AtomicBool::new(false),
                caching: AtomicBool::new(false),
                sync_fails: AtomicBool::new(false),
                wedged: AtomicBool::new(false),
                maps_until_failure: AtomicU64::new(u64::MAX),
                maps: AtomicU64::new(0),
                syncs: AtomicU64::new(0),
                revocations: AtomicU64::new(0),
                on_revoke: IrqMutex::new(None),
                on_clear: IrqMutex::new(None),
                on_map: IrqMutex::new(None),
            }),
            streams: IrqMutex::default(),
            faults: IrqMutex::default(),
        })
    }

    /// Lets every revocation time out from now on (or no longer): table entries are cleared, but what a device has translated
    /// before it keeps.
    pub fn wedge(&self, wedged: bool) {
        self.knobs.wedged.store(wedged, Ordering::SeqCst);
    }

    /// Leaves out of mappings that they are for privileged transactions only, as formats do that cannot say so.
    pub fn without_privileges(&self, unable: bool) {
        self.knobs.no_privileges.store(unable, Ordering::SeqCst);
    }

    /// Lets the next `maps` mappings succeed and the one after them fail for lack of memory, once.
    pub fn fail_map_after(&self, maps: u64) {
        self.knobs.maps_until_failure.store(maps, Ordering::SeqCst);
    }

    /// Remembers of pages that they are not mapped (or no longer), until that is invalidated: a mapping is not found before its sync.
    pub fn caching(&self, caching: bool) {
        self.knobs.caching.store(caching, Ordering::SeqCst);
    }

    /// Lets the next sync fail, after it has reached half of its ranges.
    pub fn fail_sync(&self) {
        self.knobs.sync_fails.store(true, Ordering::SeqCst);
    }

    /// Calls `f` with each range that is being revoked, before its revocation has any effect.
    pub fn on_revoke(&self, f: impl Fn(IovaRange) + Send + Sync + 'static) {
        *self.knobs.on_revoke.lock() = Some(Arc::new(f));
    }

    /// Calls `f` with each range that is being revoked, when it is no longer mapped and devices still reach what they have translated.
    pub fn on_clear(&self, f: impl Fn(IovaRange) + Send + Sync + 'static) {
        *self.knobs.on_clear.lock() = Some(Arc::new(f));
    }

    /// Calls `f` with each range that is being mapped, before that has any effect.
    pub fn on_map(&self, f: impl Fn(IovaRange) + Send + Sync + 'static) {
        *self.knobs.on_map.lock() = Some(Arc::new(f));
    }

    /// Mappings made.
    pub fn maps(&self) -> u64 {
        self.knobs.maps.load(Ordering::SeqCst)
    }

    /// Completions of mappings: one for each mapping by itself, one for each sync of many.
    pub fn syncs(&self) -> u64 {
        self.knobs.syncs.load(Ordering::SeqCst)
    }

    /// Revocations carried out, each with one completion.
    pub fn revocations(&self) -> u64 {
        self.knobs.revocations.load(Ordering::SeqCst)
    }

    /// Accesses that were stopped.
    pub fn faults(&self) -> Vec<Fault> {
        self.faults.lock().clone()
    }

    /// Lets `stream` access the byte at `iova` and calls `f` with the physical address. No revocation completes meanwhile, as
    /// one waits for the accesses that are under way.
    fn access(
        &self,
        stream: StreamId,
        iova: Iova,
        (access, privileged): (Access, bool),
        f: impl FnOnce(PhysAddr),
    ) -> Result<(), Fault> {
        let streams = self.streams.lock();
        let result = match streams.get(&stream) {
            None => Err(FaultReason::Blocked),
            Some(Stream::Bypass) => {
                f(PhysAddr::new(iova.get()));
                Ok(())
            }
            Some(Stream::Space(space)) => match fake(space) {
                None => Err(FaultReason::Configuration),
                Some(space) => space.access(iova, (access, privileged), f),
            },
        };
        drop(streams);
        result.map_err(|reason| {
            let _hardware = Hardware::enter();
            let fault = Fault { stream, iova: Some(iova), access: Some(access), reason, event: "FAKE" };
            self.faults.lock().push(fault);
            fault
        })
    }
}

fn fake(space: &Arc<dyn AddressSpace>) -> Option<&FakeSpace> {
    let any: &dyn Any = &**space;
    any.downcast_ref()
}

// SAFETY: a stream that is not in the map is blocked, and replacing or removing its entry takes effect before the call returns:
// the lock is held while a device translates.
unsafe impl Iommu for FakeIommu {
    fn name(&self) -> &str {
        &self.name
    }

    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        // The kernel's, as a driver's objects are.
        let real = if self.tables { Some(tables::make()?) } else { None };
        let space = FakeSpace { knobs: self.knobs.clone(), state: IrqMutex::default(), real };
        Ok(base::fallible::arc(space).map_err(|_| AttachError::OutOfMemory)?)
    }

    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        let _hardware = Hardware::enter();
        if fake(space).is_none() {
            return Err(AttachError::ForeignSpace);
        }
        let replaced = self.streams.lock().insert(stream, Stream::Space(space.clone()));
        drop(replaced);
        Ok(())
    }

    fn block(&self, stream: StreamId) -> Result<(), AttachError> {
        let _hardware = Hardware::enter();
        let removed = self.streams.lock().remove(&stream);
        drop(removed);
        Ok(())
    }

    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError> {
        let _hardware = Hardware::enter();
        let replaced = self.streams.lock().insert(stream, Stream::Bypass);
        drop(replaced);
        Ok(())
    }
}

/// An address space of a [`FakeIommu`].
pub struct FakeSpace {
    knobs: Arc<Knobs>,
    state: IrqMutex<Tables>,
    /// In place of [`Tables::table`] and [`Tables::units`].
    real: Option<Arc<PageTable>>,
}

type Pages = BTreeMap<u64, (u64, Prot)>;

#[derive(Default)]
struct Tables {
    table: Pages,
    /// What devices have translated: an entry stays until an invalidation completes.
    tlb: Pages,
    /// Pages that are in the table, and of which it is remembered that they are not.
    absent: BTreeSet<u64>,
    /// The last page, by the first, of what is mapped as one: it is revoked as one.
    units: BTreeMap<u64, u64>,
}

impl Tables {
    /// Where the mapping begins that `page` and the page after it are both of, and that cannot be divided.
    fn cut(&self, page: u64) -> Option<u64> {
        let (first, last) = self.units.range(..=page).next_back()?;
        (*last > page).then_some(*first)
    }
}

impl Drop for FakeSpace {
    fn drop(&mut self) {
        let _hardware = Hardware::enter();
        *self.state.get_mut() = Tables::default();
    }
}

impl FakeSpace {
    fn access(
        &self,
        iova: Iova,
        (access, privileged): (Access, bool),
        f: impl FnOnce(PhysAddr),
    ) -> Result<(), FaultReason> {
        let _hardware = Hardware::enter();
        let page = iova.align_down(PAGE_SIZE).get();
        let mut state = self.state.lock();
        let cached = state.tlb.get(&page).copied();
        let walked = || match &self.real {
            Some(real) => real.translate(Iova::new(page)).map(|(phys, prot)| (phys.get(), prot)),
            None => state.table.get(&page).copied(),
        };
        let (phys, prot) = match cached.or_else(walked) {
            Some(entry) if !state.absent.contains(&page) => entry,
            _ => return Err(FaultReason::NotMapped),
        };
        state.tlb.insert(page, (phys, prot));
        let needed = match access {
            Access::Read => Prot::READ,
            Access::Write => Prot::WRITE,
        };
        if !prot.contains(needed) || (prot.contains(Prot::PRIVILEGED) && !privileged) {
            return Err(FaultReason::Permission);
        }
        f(PhysAddr::new(phys + (iova.get() - page)));
        Ok(())
    }

    /// Has devices find what is mapped in `ranges`.
    fn complete(&self, ranges: &[IovaRange]) {
        let _hardware = Hardware::enter();
        self.knobs.syncs.fetch_add(1, Ordering::SeqCst);
        let mut state = self.state.lock();
        let within = |page: &u64| ranges.iter().any(|range| range.contains(Iova::new(*page)));
        state.absent.retain(|page| !within(page));
    }

    /// Pages that are mapped.
    pub fn mapped_pages(&self) -> usize {
        match &self.real {
            None => self.state.lock().table.len(),
            Some(real) => {
                let leaves = real.leaves(self.aperture().range).by_size;
                leaves.iter().map(|(size, count)| (size * count / PAGE_SIZE) as usize).sum()
            }
        }
    }

    fn map_really(&self, real: &PageTable, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let caching = self.knobs.caching.load(Ordering::SeqCst);
        let mut state = self.state.lock();
        real.map_exclusively::<true>(iova, runs, prot)?;
        if caching {
            state.absent.extend((iova.start().get()..iova.end().get()).step_by(PAGE_SIZE as usize));
        }
        self.knobs.maps.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Clears what is mapped in `range`. Returns what was not.
    fn clear(&self, range: IovaRange) -> Result<Option<Iova>, RevokeError> {
        if let Some(real) = &self.real {
            return Ok(real.unmap(range)?.missing);
        }
        let mut missing = None;
        let mut state = self.state.lock();
        for page in (range.start().get()..range.end().get()).step_by(PAGE_SIZE as usize) {
            state.units.remove(&page);
            if state.table.remove(&page).is_none() {
                missing = missing.or(Some(Iova::new(page)));
            }
        }
        Ok(missing)
    }

    /// Has devices forget what they have translated in `ranges`, which was cleared.
    fn invalidate(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        tell(&self.knobs.on_clear, ranges);
        let wedged = self.knobs.wedged.load(Ordering::SeqCst);
        let within = |page: &u64| ranges.iter().any(|range| range.contains(Iova::new(*page)));
        let mut state = self.state.lock();
        state.absent.retain(|page| !within(page));
        if wedged {
            return Err(RevokeError::TimedOut);
        }
        state.tlb.retain(|page, _| !within(page));
        drop(state);
        self.knobs.revocations.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

// SAFETY: devices translate through the table and through what they took from it; a revocation removes the range from both
// before it returns `Ok`, under the lock that a translation takes.
unsafe impl AddressSpace for FakeSpace {
    fn aperture(&self) -> Aperture {
        let range = IovaRange::new(Iova::new(0), 1 << 48).unwrap_or_default();
        Aperture { range, page_sizes: 0x4020_1000, output_max: PhysAddr::new((1 << 48) - 1) }
    }

    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // SAFETY: the caller's promise.
        unsafe { self.map_unsynced(iova, runs, prot) }?;
        self.complete(&[iova]);
        Ok(())
    }

    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let on_map = self.knobs.on_map.lock().clone();
        if let Some(f) = on_map {
            f(iova);
        }
        let count = |left| match left {
            u64::MAX => None,
            0 => Some(u64::MAX),
            left => Some(left - 1),
        };
        if self.knobs.maps_until_failure.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count) == Ok(0) {
            return Err(MapError::OutOfMemory);
        }
        if Hardware::fails() {
            return Err(MapError::OutOfMemory);
        }
        let _hardware = Hardware::enter();
        if !self.aperture().range.covers(iova) {
            return Err(MapError::OutOfAperture(iova));
        }
        if !prot.intersects(Prot::READ | Prot::WRITE) {
            return Err(MapError::BadProt);
        }
        if !iova.is_aligned(PAGE_SIZE) || runs.iter().any(|run| !run.is_aligned(PAGE_SIZE)) {
            return Err(MapError::Misaligned(PAGE_SIZE));
        }
        let physical = runs.iter().map(|run| run.len()).sum();
        if physical != iova.len() {
            return Err(MapError::LengthMismatch { iova: iova.len(), physical });
        }
        let unable = self.knobs.no_privileges.load(Ordering::SeqCst);
        let pagewise = prot.contains(Prot::PAGEWISE);
        if let Some(real) = &self.real {
            return self.map_really(real, iova, runs, if unable { prot - Prot::PRIVILEGED } else { prot });
        }
        let prot = if unable { prot - Prot::PRIVILEGED } else { prot } - Prot::PAGEWISE;
        let mut state = self.state.lock();
        if let Some((page, _)) = state.table.range(iova.start().get()..iova.end().get()).next() {
            return Err(MapError::AlreadyMapped(Iova::new(*page)));
        }
        let mut page = iova.start().get();
        for run in runs {
            for phys in (run.start().get()..run.end().get()).step_by(PAGE_SIZE as usize) {
                state.table.insert(page, (phys, prot));
                if self.knobs.caching.load(Ordering::SeqCst) {
                    state.absent.insert(page);
                }
                page += PAGE_SIZE;
            }
        }
        if !pagewise {
            state.units.insert(iova.start().get(), page - PAGE_SIZE);
        }
        self.knobs.maps.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn sync(&self, ranges: &[IovaRange]) -> Result<(), MapError> {
        let _hardware = Hardware::enter();
        if self.knobs.sync_fails.swap(false, Ordering::SeqCst) {
            let (half, _) = ranges.split_at(ranges.len() / 2);
            self.complete(half);
            return Err(MapError::Refused);
        }
        self.complete(ranges);
        Ok(())
    }

    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        let _hardware = Hardware::enter();
        {
            let state = self.state.lock();
            let ends = |range: &IovaRange| [range.start().get().wrapping_sub(PAGE_SIZE), range.end().get() - PAGE_SIZE];
            if let Some(first) = ranges.iter().flat_map(ends).find_map(|page| state.cut(page)) {
                return Err(RevokeError::SplitsBlock(Iova::new(first)));
            }
        }
        tell(&self.knobs.on_revoke, ranges);
        let mut missing = None;
        for range in ranges {
            missing = missing.or(self.clear(*range)?);
        }
        self.invalidate(ranges)?;
        missing.map_or(Ok(()), |iova| Err(RevokeError::NotMapped(iova)))
    }

    fn anchor(&self, range: IovaRange) -> Option<Anchor> {
        if self.knobs.caching.load(Ordering::SeqCst) {
            return None;
        }
        self.real.as_ref()?.anchor(range)
    }

    unsafe fn revoke_anchored(&self, anchor: &Anchor) -> Result<(), RevokeError> {
        let _hardware = Hardware::enter();
        let range = anchor.range();
        if !self.real.as_ref().is_some_and(|real| anchor.is_of(real)) {
            return Err(RevokeError::OutOfAperture(range));
        }
        tell(&self.knobs.on_revoke, &[range]);
        anchor.clear();
        self.invalidate(&[range])
    }

    fn leaves(&self, range: IovaRange) -> Option<Leaves> {
        self.real.as_ref().map(|real| real.leaves(range))
    }

    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        if let Some(real) = &self.real {
            return real.translate(iova);
        }
        let page = iova.align_down(PAGE_SIZE).get();
        let (phys, prot) = *self.state.lock().table.get(&page)?;
        Some((PhysAddr::new(phys + (iova.get() - page)), prot))
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a space of a test")
    }
}

/// A device that issues DMA through a [`FakeIommu`] to a [`FakeMemory`].
#[derive(Clone)]
pub struct FakeBusMaster {
    iommu: Arc<FakeIommu>,
    memory: &'static FakeMemory,
    stream: StreamId,
    privileged: bool,
    snoops: bool,
}

impl FakeBusMaster {
    /// The same master, snooping the caches where others do not.
    pub fn snooping(&self) -> Self {
        Self { snoops: true, ..self.clone() }
    }

    /// The same master, issuing privileged transactions.
    pub fn privileged(&self) -> Self {
        Self { privileged: true, ..self.clone() }
    }

    /// Makes the master with this StreamID.
    pub fn new(iommu: Arc<FakeIommu>, memory: &'static FakeMemory, stream: StreamId) -> Self {
        Self { iommu, memory, stream, privileged: false, snoops: memory.is_snooped() }
    }

    /// Reads from `iova` on, page by page.
    ///
    /// # Errors
    ///
    /// The fault of the first page that it may not read.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), Fault> {
        let mut at = iova;
        let mut to = to;
        while !to.is_empty() {
            let (now, rest) = to.split_at_mut(rest_of_page(at).min(to.len()));
            self.iommu.access(self.stream, at, (Access::Read, self.privileged), |phys| {
                match self.snoops {
                    true => self.memory.snooping_read(phys, now),
                    false => self.memory.bus_read(phys, now),
                };
            })?;
            at = at.checked_add(now.len() as u64).unwrap_or_default();
            to = rest;
        }
        Ok(())
    }

    /// Writes `from` at `iova`, page by page.
    ///
    /// # Errors
    ///
    /// The fault of the first page that it may not write.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<(), Fault> {
        let mut at = iova;
        let mut from = from;
        while !from.is_empty() {
            let (now, rest) = from.split_at(rest_of_page(at).min(from.len()));
            self.iommu.access(self.stream, at, (Access::Write, self.privileged), |phys| {
                match self.snoops {
                    true => self.memory.snooping_write(phys, now),
                    false => self.memory.bus_write(phys, now),
                };
            })?;
            at = at.checked_add(now.len() as u64).unwrap_or_default();
            from = rest;
        }
        Ok(())
    }
}

fn rest_of_page(at: Iova) -> usize {
    (PAGE_SIZE - at.get() % PAGE_SIZE) as usize
}
