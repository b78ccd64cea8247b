//! Who has what lent to a device, and who had: what a fault report needs, at the cost of a few plain stores per mapping.
//!
//! A mapping stands in a table of fixed size, at a place found by a hash of its address. When it ends it stays there, with the
//! time and the call site of its end, until another mapping needs the place: each address keeps its own last history. A mapping
//! that finds its places taken is not recorded, only counted. There is one read-modify-write in all, the claim of the place;
//! the sums are those of the places, added up when somebody asks.
//!
//! What a device without an IOMMU has is only counted: nothing stops it, so no fault report will ever ask. Where the debug
//! tracker is on, the device has no table at all, and the way that a mapping without a place takes leads to
//! [`Exact`], which records every one: so the tracker costs nothing where it is off. What has ended
//! goes into a table of the same kind then, so that a report of a fault says no less.
//!
//! # Locking
//!
//! None for the table: writers own the place that they claimed; readers check that it did not change under them. A place is a cache
//! line, and what is only counted is counted by each core for itself. The reports are for people: nothing that must be safe is decided
//! here. [`Exact`] is under an [`IrqMutex`] of its device; its table grows under it, so the heap's lock comes after it.

mod entry;
mod tally;

pub(crate) use entry::Entry;
pub(crate) use tally::{ONE, Tally};

use crate::Error;
use crate::berth::{Berths, Number};
use crate::device::SHARDS;
use crate::lent::Segment;
use crate::site::Site;
use crate::tracker::Exact;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::Stamp;
use base::{Instant, IrqMutex, cpu};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use iommu::{Iova, IovaRange, PAGE_SIZE, Prot};

/// Places of the table, a power of two.
const PLACES: usize = 1024;
/// Places that one mapping tries.
const PROBES: usize = 8;

/// A live mapping as the records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LiveMapping {
    pub range: IovaRange,
    pub prot: Prot,
    pub site: Option<Site>,
    /// When it was made, where that is recorded.
    pub since: Option<Instant>,
}

/// An ended mapping as the records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndedMapping {
    pub range: IovaRange,
    pub mapped_at: Option<Site>,
    pub unmapped_at: Option<Site>,
    pub when: Instant,
}

/// Where a live mapping is recorded, if it is: below [`PLACES`] in the table, from [`Slot::EXACT`] on with the tracker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(u32);

impl Slot {
    /// Only counted, for want of a place.
    const NONE: Self = Self(u32::MAX);
    /// Only counted, because nothing translates.
    pub(crate) const COUNTED: Self = Self(u32::MAX - 1);
    const EXACT: u32 = 1 << 31;

    /// The slot of that number. A mapping that has a berth, and its record there, has the berth's.
    #[inline(always)]
    pub(crate) const fn of(number: Number) -> Self {
        Self(number)
    }

    /// Its number.
    #[inline(always)]
    pub(crate) const fn number(self) -> Number {
        self.0
    }
}

#[repr(C, align(64))]
struct Place {
    entry: Entry,
    /// Bytes in sum of the mappings that have been here.
    bytes: AtomicU64,
}

impl Place {
    const fn new() -> Self {
        Self { entry: Entry::new(), bytes: AtomicU64::new(0) }
    }

    /// Records a mapping here, unless there is a live one. Whatever ended here before is forgotten.
    #[inline(always)]
    fn claim(&self, range: IovaRange, prot: Prot, site: Site, forgotten: &AtomicBool) -> bool {
        let Some(forgets) = self.entry.claim(range, prot, site) else { return false };
        // A plain addition: the place is ours.
        self.bytes.store(self.bytes.load(Ordering::Relaxed).wrapping_add(range.len()), Ordering::Relaxed);
        if forgets {
            forgotten.store(true, Ordering::Relaxed);
        }
        true
    }

    /// Notes the end of the mapping that was recorded here.
    #[inline(always)]
    fn end(&self, start: Iova, unmapped_at: Site) {
        self.entry.end(start.align_down(PAGE_SIZE), Stamp::now(), unmapped_at);
    }
}

/// What a core counts of a device. Sums over all of them are what is of interest: a mapping may end on another core than it has begun on.
#[repr(align(128))]
pub(crate) struct OfCore {
    /// Loans that keep the device: where nothing translates these are all mappings that there are.
    pub(crate) tally: Tally,
    /// Mappings that found no place.
    unplaced: Tally,
}

impl OfCore {
    const fn new() -> Self {
        Self { tally: Tally::new(), unplaced: Tally::new() }
    }
}

/// Sums over all mappings of a device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    pub live: u64,
    pub live_bytes: u64,
    pub total: u64,
    pub total_bytes: u64,
}

/// The records of one device.
pub(crate) struct Records {
    name: Arc<str>,
    table: Option<Box<[Place; PLACES]>>,
    /// Those of mappings whose ranges are kept.
    berths: Option<Arc<Berths>>,
    cores: [OfCore; SHARDS],
    /// Every mapping, where the tracker is on.
    exact: Option<IrqMutex<Exact>>,
    /// What the table would remember if there were one.
    history: Option<Box<[Place; PLACES]>>,
    forgotten: AtomicBool,
    pub quarantined: AtomicU64,
}

impl Records {
    /// Makes the records of a device that something translates for, or nothing does.
    pub(crate) fn new(name: Arc<str>, translated: bool, berths: Option<Arc<Berths>>) -> Result<Self, Error> {
        let exact = crate::tracker::is_on().then(|| IrqMutex::new(Exact::new()));
        let (table, history) = match (translated, &exact) {
            (false, _) => (None, None),
            (true, None) => (Some(table()?), None),
            (true, Some(_)) => (None, Some(table()?)),
        };

        let cores = [const { OfCore::new() }; SHARDS];
        let forgotten = AtomicBool::new(false);
        Ok(Self { name, table, berths, cores, exact, history, forgotten, quarantined: AtomicU64::new(0) })
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Takes note of a mapping that has been made through an IOMMU.
    #[inline]
    pub(crate) fn begin(&self, range: IovaRange, prot: Prot, site: Site) -> Slot {
        let index = hash(range);
        if let Some(place) = self.table.as_deref().and_then(|table| table.get(index))
            && place.claim(range, prot, site, &self.forgotten)
        {
            return Slot(index as u32);
        }
        self.begin_elsewhere(range, prot, site)
    }

    /// Takes note of a mapping that nothing translates, if there is a tracker.
    pub(crate) fn begin_tracked(&self, segment: Segment, prot: Prot, site: Site) -> Option<Slot> {
        self.exact.as_ref()?;
        // It is where the memory is: its end is an address too.
        let range = IovaRange::new(segment.iova, segment.len).unwrap_or_default();
        Some(self.begin_elsewhere(range, prot, site))
    }

    /// What this core counts.
    #[inline(always)]
    pub(crate) fn of_this_core(&self) -> &OfCore {
        &self.cores[cpu::index() % SHARDS]
    }

    /// Lets no loan begin or end from here on without a word to who counts; returns how many there are.
    pub(crate) fn close_tallies(&self) -> u64 {
        Tally::close_all(self.cores.iter().map(|core| &core.tally))
    }

    /// The ways below save no registers: while a device has more mappings than there are places, each of them goes there.
    #[cold]
    #[inline(never)]
    fn begin_elsewhere(&self, range: IovaRange, prot: Prot, site: Site) -> Slot {
        if self.exact.is_some() { self.begin_exactly(range, prot, site) } else { self.probe(range, prot, site) }
    }

    #[inline(never)]
    fn begin_exactly(&self, range: IovaRange, prot: Prot, site: Site) -> Slot {
        match self.exact.as_ref().and_then(|exact| exact.lock().begin(range, prot, site)) {
            Some(index) => Slot(Slot::EXACT | index),
            None => self.probe(range, prot, site),
        }
    }

    /// Records a mapping whose first place is taken, or counts it. (Not cold, so that the loop is unrolled.)
    #[inline(never)]
    fn probe(&self, range: IovaRange, prot: Prot, site: Site) -> Slot {
        if let Some(table) = &self.table {
            for probe in 1..PROBES {
                let index = hash(range).wrapping_add(probe) & (PLACES - 1);
                if table[index].entry.is_free() {
                    return self.claim_from(probe, range, prot, site);
                }
            }
        }
        self.count(range)
    }

    /// As [`Records::probe`], from place `first` of them.
    #[cold]
    #[inline(never)]
    fn claim_from(&self, first: usize, range: IovaRange, prot: Prot, site: Site) -> Slot {
        if let Some(table) = &self.table {
            for probe in first..PROBES {
                let index = hash(range).wrapping_add(probe) & (PLACES - 1);
                if table[index].claim(range, prot, site, &self.forgotten) {
                    return Slot(index as u32);
                }
            }
        }
        self.count(range)
    }

    #[inline(always)]
    fn count(&self, range: IovaRange) -> Slot {
        self.of_this_core().unplaced.begin(Tally::word(range.len()));
        Slot::NONE
    }

    /// Takes note of a mapping that has been revoked.
    #[inline]
    pub(crate) fn end(&self, slot: Slot, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        match self.table.as_deref().and_then(|table| table.get(slot.0 as usize)) {
            Some(place) => place.end(range.start(), unmapped_at),
            None => self.end_elsewhere(slot, range, mapped_at, unmapped_at),
        }
    }

    #[cold]
    #[inline(never)]
    fn end_elsewhere(&self, slot: Slot, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        if slot != Slot::NONE && slot != Slot::COUNTED {
            return self.end_exactly(slot, range, mapped_at, unmapped_at);
        }
        self.of_this_core().unplaced.end(Tally::word(range.len()));
        self.forgotten.store(true, Ordering::Relaxed);
    }

    #[inline(never)]
    fn end_exactly(&self, slot: Slot, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        if let Some(exact) = &self.exact {
            exact.lock().end(slot.0 & !Slot::EXACT, range, mapped_at, unmapped_at);
            self.remember(range, mapped_at, unmapped_at);
        }
    }

    /// Has the address keep the history that it would have without the tracker. No place is live there: the first one will do, unless
    /// another core is writing it.
    fn remember(&self, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        let Some(history) = &self.history else { return };
        for probe in 0..PROBES {
            let place = history.get(hash(range).wrapping_add(probe) & (PLACES - 1));
            if let Some(place) = place.filter(|place| place.claim(range, Prot::empty(), mapped_at, &self.forgotten)) {
                place.end(range.start(), unmapped_at);
                return;
            }
        }
        self.forgotten.store(true, Ordering::Relaxed);
    }

    /// Calls `f` with each live mapping that is recorded, in no order.
    pub(crate) fn for_each_live(&self, mut f: impl FnMut(LiveMapping)) {
        self.places().filter_map(|place| place.entry.live_mapping()).for_each(&mut f);
        if let Some(berths) = &self.berths {
            berths.for_each_live(&mut f);
        }
        if let Some(exact) = &self.exact {
            exact.lock().live().for_each(f);
        }
    }

    /// The mapping with `address` that ended last.
    pub(crate) fn last_ended(&self, address: Iova) -> Option<EndedMapping> {
        let history = self.history.as_deref().into_iter().flatten();
        let in_table = self.places().chain(history).filter_map(|place| place.entry.ended_mapping());
        let in_table = in_table.filter(|ended| ended.range.contains(address));
        let in_berths = self.berths.iter().flat_map(|berths| berths.ended(address));
        let last = in_table.chain(in_berths).max_by_key(|ended| ended.when);
        let exact = self.exact.as_ref().and_then(|exact| exact.lock().last_ended(address));
        last.into_iter().chain(exact).max_by_key(|ended| ended.when)
    }

    /// Whether mappings have ended that [`Records::last_ended`] does not know any more.
    pub(crate) fn has_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
            || self.berths.as_ref().is_some_and(|berths| berths.has_forgotten())
            || self.exact.as_ref().is_some_and(|exact| exact.lock().has_forgotten())
    }

    /// Whether mappings are counted only, because nothing translates for the device and the tracker is off.
    pub(crate) fn only_counts(&self) -> bool {
        self.table.is_none() && self.exact.is_none()
    }

    /// Mappings that found no place, ever: where there are places, no others are counted.
    pub(crate) fn unrecorded(&self) -> u64 {
        if self.only_counts() { 0 } else { self.sum_counted().total }
    }

    /// Live mappings that [`Records::for_each_live`] does not show.
    pub(crate) fn unlisted(&self) -> u64 {
        self.sum_counted().live
    }

    /// Adds everything up. What comes and goes meanwhile is counted or not; who has seen all come to rest gets exact sums.
    pub(crate) fn sums(&self) -> Sums {
        let mut sums = self.sum_counted();
        for place in self.places() {
            sums.total += place.entry.uses();
            sums.total_bytes += place.bytes.load(Ordering::Relaxed);
        }
        if let Some(berths) = &self.berths {
            berths.add_to(&mut sums);
        }
        if let Some(exact) = &self.exact {
            let (total, total_bytes) = exact.lock().totals();
            sums.total += total;
            sums.total_bytes += total_bytes;
        }
        self.for_each_live(|live| {
            sums.live += 1;
            sums.live_bytes += live.range.len();
        });
        sums
    }

    fn sum_counted(&self) -> Sums {
        let tallies = self.only_counts();
        Tally::sums(|| self.cores.iter().map(|core| if tallies { &core.tally } else { &core.unplaced }))
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.table.as_deref().into_iter().flatten()
    }
}

#[inline(always)]
fn hash(range: IovaRange) -> usize {
    let page = range.start().get() / PAGE_SIZE;
    (page ^ (page >> 10)) as usize & (PLACES - 1)
}

fn table() -> Result<Box<[Place; PLACES]>, Error> {
    let mut table = Vec::new();
    table.try_reserve_exact(PLACES)?;
    table.resize_with(PLACES, Place::new);
    // It has the length that was asked for.
    table.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)
}
