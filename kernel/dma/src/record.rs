//! Who has what lent to a device, and who had: what a fault report needs, at the cost of a few relaxed stores per mapping.
//!
//! Live mappings stand in a table of fixed size, found by a hash of their address. A mapping that finds its places taken is not
//! recorded, only counted. Ended mappings stand in a ring, the newest overwriting the oldest.
//!
//! # Locking
//!
//! None. Writers own the slot that they claimed; readers check that a slot did not change under them. The reports are for
//! people: nothing that must be safe is decided here.

use crate::Error;
use crate::site::{AtomicSite, Site};
use alloc::boxed::Box;
use alloc::vec::Vec;
use base::Instant;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use iommu::{Iova, IovaRange, PAGE_SIZE, Prot};

/// Places for live mappings, a power of two.
const LIVE: usize = 1024;
/// Places that one mapping tries.
const PROBES: usize = 8;
/// Places for ended mappings, a power of two.
const ENDED: usize = 256;

/// The tag of a place that is being filled.
const BUSY: u64 = 2;
/// Bit 0 of the tag of a place in use; the permissions stand above it, the page's address above those.
const USED: u64 = 1;
const PROT_SHIFT: u32 = 4;

/// A live mapping as the records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LiveMapping {
    pub range: IovaRange,
    pub prot: Prot,
    pub site: Option<Site>,
}

/// An ended mapping as the records show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndedMapping {
    pub range: IovaRange,
    pub mapped_at: Option<Site>,
    pub unmapped_at: Option<Site>,
    pub when: Instant,
}

/// Where a live mapping is recorded, if it is.
#[derive(Clone, Copy)]
pub(crate) struct Slot(u32);

impl Slot {
    const NONE: Self = Self(u32::MAX);
}

#[repr(align(32))]
struct Live {
    tag: AtomicU64,
    len: AtomicU64,
    site: AtomicSite,
}

#[repr(align(64))]
struct Ended {
    /// 0 while it is being written, otherwise its number in the row of all, from 1.
    sequence: AtomicU64,
    start: AtomicU64,
    len: AtomicU64,
    when: AtomicU64,
    mapped_at: AtomicSite,
    unmapped_at: AtomicSite,
}

/// Sums over all mappings of a device.
#[derive(Default)]
#[repr(align(64))]
pub(crate) struct Counters {
    pub mappings: AtomicU64,
    pub bytes: AtomicU64,
    pub ended: AtomicU64,
    pub ended_bytes: AtomicU64,
    pub unrecorded: AtomicU64,
    pub quarantined: AtomicU64,
    pub quarantined_bytes: AtomicU64,
}

/// The records of one device.
pub(crate) struct Records {
    live: Box<[Live; LIVE]>,
    ended: Box<[Ended; ENDED]>,
    pub counters: Counters,
}

impl Records {
    /// How many ended mappings are remembered.
    pub(crate) const REMEMBERED: u64 = ENDED as u64;

    pub(crate) fn new() -> Result<Self, Error> {
        let mut live = Vec::new();
        live.try_reserve_exact(LIVE)?;
        live.resize_with(LIVE, || Live { tag: AtomicU64::new(0), len: AtomicU64::new(0), site: AtomicSite::new() });
        let mut ended = Vec::new();
        ended.try_reserve_exact(ENDED)?;
        ended.resize_with(ENDED, || Ended {
            sequence: AtomicU64::new(0),
            start: AtomicU64::new(0),
            len: AtomicU64::new(0),
            when: AtomicU64::new(0),
            mapped_at: AtomicSite::new(),
            unmapped_at: AtomicSite::new(),
        });
        // Both have the length that was asked for.
        let live = live.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)?;
        let ended = ended.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)?;
        Ok(Self { live, ended, counters: Counters::default() })
    }

    /// Takes note of a mapping that has been made.
    #[inline]
    pub(crate) fn begin(&self, range: IovaRange, prot: Prot, site: Site) -> Slot {
        self.counters.mappings.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes.fetch_add(range.len(), Ordering::Relaxed);
        let page = range.start().get() / PAGE_SIZE;
        let first = (page ^ (page >> 10)) as usize;
        for probe in 0..PROBES {
            let index = first.wrapping_add(probe) & (LIVE - 1);
            let Some(place) = self.live.get(index) else { break };
            if place.tag.load(Ordering::Relaxed) == 0
                && place.tag.compare_exchange(0, BUSY, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                place.len.store(range.len(), Ordering::Relaxed);
                place.site.store(site);
                let tag = (page * PAGE_SIZE) | (u64::from(prot.bits()) << PROT_SHIFT) | USED;
                place.tag.store(tag, Ordering::Release);
                return Slot(index as u32);
            }
        }
        self.counters.unrecorded.fetch_add(1, Ordering::Relaxed);
        Slot::NONE
    }

    /// Takes note of a mapping that has been revoked.
    #[inline]
    pub(crate) fn end(&self, slot: Slot, range: IovaRange, mapped_at: Site, unmapped_at: Site) {
        self.counters.ended_bytes.fetch_add(range.len(), Ordering::Relaxed);
        let number = self.counters.ended.fetch_add(1, Ordering::Relaxed);
        if let Some(place) = self.ended.get(number as usize & (ENDED - 1)) {
            place.sequence.store(0, Ordering::Relaxed);
            fence(Ordering::Release);
            place.start.store(range.start().get(), Ordering::Relaxed);
            place.len.store(range.len(), Ordering::Relaxed);
            place.when.store(Instant::now().as_nanos(), Ordering::Relaxed);
            place.mapped_at.store(mapped_at);
            place.unmapped_at.store(unmapped_at);
            place.sequence.store(number + 1, Ordering::Release);
        }
        // Last: until then the address is in one of the two, never in none.
        if let Some(place) = self.live.get(slot.0 as usize) {
            place.tag.store(0, Ordering::Release);
        }
    }

    /// The live mappings that are recorded, in no order.
    pub(crate) fn live(&self) -> impl Iterator<Item = LiveMapping> {
        self.live.iter().filter_map(|place| {
            let tag = place.tag.load(Ordering::Acquire);
            let (len, site) = (place.len.load(Ordering::Relaxed), place.site.load());
            fence(Ordering::Acquire);
            if tag & USED == 0 || place.tag.load(Ordering::Relaxed) != tag {
                return None;
            }
            let range = IovaRange::new(Iova::new(tag).align_down(PAGE_SIZE), len)?;
            Some(LiveMapping { range, prot: Prot::from_bits_truncate((tag >> PROT_SHIFT) as u8), site })
        })
    }

    /// The mapping with `address` that ended last.
    pub(crate) fn last_ended(&self, address: Iova) -> Option<EndedMapping> {
        let read = |place: &Ended| {
            let sequence = place.sequence.load(Ordering::Acquire);
            let range =
                IovaRange::new(Iova::new(place.start.load(Ordering::Relaxed)), place.len.load(Ordering::Relaxed))?;
            let ended = EndedMapping {
                range,
                mapped_at: place.mapped_at.load(),
                unmapped_at: place.unmapped_at.load(),
                when: Instant::from_nanos(place.when.load(Ordering::Relaxed)),
            };
            fence(Ordering::Acquire);
            let whole = sequence != 0 && place.sequence.load(Ordering::Relaxed) == sequence;
            (whole && range.contains(address)).then_some((sequence, ended))
        };
        self.ended.iter().filter_map(read).max_by_key(|(sequence, _)| *sequence).map(|(_, ended)| ended)
    }
}
