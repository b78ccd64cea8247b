//! What the records of the berths say: for reports.

use super::{Berth, Berths, ENDED, LIVE, PROT_SHIFT};
use crate::record::{EndedMapping, LiveMapping, Sums};
use base::time::Stamp;
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::fence;
use iommu::{Iova, IovaRange, PAGE_SIZE, Prot};

impl Berth {
    /// Reads the record, if its tag has `state` and it did not change meanwhile.
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

impl Berths {
    /// Calls `f` with each live mapping that has a berth, in no order.
    pub(crate) fn for_each_live(&self, mut f: impl FnMut(LiveMapping)) {
        for berth in self.berths.iter() {
            let read = |tag: u64, range| {
                let prot = Prot::from_bits_truncate((tag >> PROT_SHIFT) as u8);
                LiveMapping { range, prot, site: berth.mapped_at.load(), since: None }
            };
            if let Some(live) = berth.read(LIVE, read) {
                f(live);
            }
        }
    }

    /// The mappings that have ended last in each berth whose range has `address`.
    pub(crate) fn ended(&self, address: Iova) -> impl Iterator<Item = EndedMapping> {
        let read = |berth: &Berth| {
            berth.read(ENDED, |_, range| EndedMapping {
                range,
                mapped_at: berth.mapped_at.load(),
                unmapped_at: berth.unmapped_at.load(),
                when: Stamp::from_raw(berth.when.load(Relaxed)).instant(),
            })
        };
        self.berths.iter().filter_map(read).filter(move |ended| ended.range.contains(address))
    }

    /// Whether a mapping has ended here that [`Self::ended`] does not know any more.
    pub(crate) fn has_forgotten(&self) -> bool {
        self.forgotten.load(Relaxed)
    }

    /// Adds all mappings that have had a berth to `sums`, but for those that are live, which have to be counted besides.
    pub(crate) fn add_to(&self, sums: &mut Sums) {
        for berth in self.berths.iter() {
            let uses = berth.uses.load(Acquire);
            sums.total += uses;
            sums.total_bytes += uses.wrapping_mul(berth.len.load(Relaxed));
        }
        let [mappings, bytes] = &self.before;
        sums.total += mappings.load(Acquire);
        sums.total_bytes += bytes.load(Acquire);
    }
}
