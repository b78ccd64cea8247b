//! What is on record of one address range: the mapping that has it, or what became of the last one.
//!
//! # Locking
//!
//! None. Who owns an entry writes it, with plain stores; whoever explains a fault reads it at any moment, and takes what he has read
//! only if neither the tag nor the number of uses has changed meanwhile.

use super::{EndedMapping, LiveMapping};
use crate::site::{AtomicSite, Site};
use base::time::Stamp;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, fence};
use iommu::{Iova, IovaRange, PAGE_SIZE, Prot};

/// Bits of a tag. It is 0 as long as nothing was ever mapped here.
const LIVE: u64 = 1;
/// Somebody is writing. (Beside the one above: the two are looked for together.)
const BUSY: u64 = 1 << 1;
const ENDED: u64 = 1 << 2;
/// It has ended by a flush: where its driver said so was not noted.
const LAPSED: u64 = 1 << 3;
/// The permissions stand above those bits, the page's address above the permissions.
const PROT_SHIFT: u32 = 4;

/// One of them.
#[repr(C)]
pub(crate) struct Entry {
    tag: AtomicU64,
    len: AtomicU64,
    mapped_at: AtomicSite,
    /// When the mapping ended ([`Stamp`]).
    when: AtomicU64,
    unmapped_at: AtomicSite,
    /// Mappings that have been here.
    uses: AtomicU64,
}

/// The address of a page, as it stands in a tag.
#[inline(always)]
fn page(start: Iova) -> u64 {
    start.get() & !(PAGE_SIZE - 1)
}

impl Entry {
    pub(crate) const fn new() -> Self {
        Self {
            tag: AtomicU64::new(0),
            len: AtomicU64::new(0),
            mapped_at: AtomicSite::new(),
            when: AtomicU64::new(0),
            unmapped_at: AtomicSite::new(),
            uses: AtomicU64::new(0),
        }
    }

    /// Where the range begins.
    #[inline(always)]
    pub(crate) fn start(&self) -> Iova {
        Iova::new(self.tag.load(Relaxed) & !(PAGE_SIZE - 1))
    }

    /// Its bytes.
    #[inline(always)]
    pub(crate) fn bytes(&self) -> u64 {
        self.len.load(Relaxed)
    }

    /// Mappings that have been here.
    pub(crate) fn uses(&self) -> u64 {
        self.uses.load(Acquire)
    }

    /// Forgets how many there were: they have been counted elsewhere. By its owner.
    pub(crate) fn forget_uses(&self) {
        self.uses.store(0, Relaxed);
    }

    /// Whether somebody may become the owner, at this moment.
    #[inline(always)]
    pub(super) fn is_free(&self) -> bool {
        self.tag.load(Relaxed) & (LIVE | BUSY) == 0
    }

    /// Becomes the owner and records a mapping, unless there is a live one. Returns whether there was something about another page,
    /// which is forgotten.
    #[inline(always)]
    pub(super) fn claim(&self, range: IovaRange, prot: Prot, site: Site) -> Option<bool> {
        let old = self.tag.load(Relaxed);
        if old & (LIVE | BUSY) != 0 || self.tag.compare_exchange(old, BUSY, Acquire, Relaxed).is_err() {
            return None;
        }
        // Who sees what is written from here on sees that somebody is writing.
        fence(Release);
        self.len.store(range.len(), Relaxed);
        self.mapped_at.store(site);
        self.count();
        let forgets = old != 0 && (old ^ range.start().get()) / PAGE_SIZE != 0;
        self.live(page(range.start()), prot);
        Some(forgets)
    }

    /// Records another mapping of the same range, which begins at `start`. By its owner.
    #[inline(always)]
    pub(crate) fn begin(&self, start: Iova, prot: Prot, site: Site) {
        self.count();
        // Who sees what is written from here on sees that there is one use more.
        fence(Release);
        self.mapped_at.store(site);
        self.live(start.get(), prot);
    }

    /// A plain addition: by the owner.
    #[inline(always)]
    fn count(&self) {
        self.uses.store(self.uses.load(Relaxed).wrapping_add(1), Relaxed);
    }

    #[inline(always)]
    fn live(&self, page: u64, prot: Prot) {
        self.tag.store(page | (u64::from(prot.bits()) << PROT_SHIFT) | LIVE, Release);
    }

    /// Notes the end of the mapping, of whose range the first page begins at `start`. By its owner, who may not be it any more then.
    #[inline(always)]
    pub(crate) fn end(&self, start: Iova, when: Stamp, unmapped_at: Site) {
        // Nobody reads these two while the mapping lives.
        self.when.store(when.as_raw(), Relaxed);
        self.unmapped_at.store(unmapped_at);
        self.tag.store(start.get() | ENDED, Release);
    }

    /// As [`Entry::end`], of a mapping that has lapsed: where, is not known.
    #[inline(always)]
    pub(crate) fn end_lapsed(&self, when: Stamp) {
        self.when.store(when.as_raw(), Relaxed);
        self.tag.store(self.start().get() | LAPSED | ENDED, Release);
    }

    /// Knows nothing, as at first. By its owner.
    pub(crate) fn clear(&self) {
        self.tag.store(0, Relaxed);
        self.forget_uses();
    }

    /// Is that of `range` from here on, of which nothing is known. By its owner. Returns whether something is forgotten.
    pub(crate) fn assign(&self, range: IovaRange) -> bool {
        let forgets = self.tag.load(Relaxed) & ENDED != 0;
        // Who sees what is written from here on sees that there is nothing to be read.
        self.tag.store(0, Relaxed);
        fence(Release);
        self.len.store(range.len(), Relaxed);
        self.tag.store(page(range.start()), Release);
        forgets
    }

    /// The mapping, if it is live.
    pub(crate) fn live_mapping(&self) -> Option<LiveMapping> {
        self.read(LIVE, |tag, range| {
            let prot = Prot::from_bits_truncate((tag >> PROT_SHIFT) as u8);
            LiveMapping { range, prot, site: self.mapped_at.load(), since: None }
        })
    }

    /// The mapping that has ended here last, if none is live.
    pub(crate) fn ended_mapping(&self) -> Option<EndedMapping> {
        self.read(ENDED, |tag, range| EndedMapping {
            range,
            mapped_at: self.mapped_at.load(),
            unmapped_at: if tag & LAPSED == 0 { self.unmapped_at.load() } else { None },
            when: Stamp::from_raw(self.when.load(Relaxed)).instant(),
        })
    }

    /// Reads it, if its tag has `state` and it did not change meanwhile.
    fn read<T>(&self, state: u64, f: impl FnOnce(u64, IovaRange) -> T) -> Option<T> {
        let tag = self.tag.load(Acquire);
        if tag & state == 0 {
            return None;
        }
        let uses = self.uses.load(Relaxed);
        let range = IovaRange::new(Iova::new(tag).align_down(PAGE_SIZE), self.len.load(Relaxed));
        let value = f(tag, range?);
        fence(Acquire);
        (self.tag.load(Relaxed) == tag && self.uses.load(Relaxed) == uses).then_some(value)
    }
}
