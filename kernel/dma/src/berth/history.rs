//! What the records of the berths say: for reports.

use super::Berths;
use crate::record::{EndedMapping, LiveMapping, Sums};
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use iommu::Iova;

impl Berths {
    /// Calls `f` with each live mapping that has a berth, in no order.
    pub(crate) fn for_each_live(&self, f: impl FnMut(LiveMapping)) {
        self.rented.berths.iter().filter_map(|berth| berth.entry.live_mapping()).for_each(f);
    }

    /// The mappings that have ended last in each berth whose range has `address`.
    pub(crate) fn ended(&self, address: Iova) -> impl Iterator<Item = EndedMapping> {
        let ended = self.rented.berths.iter().filter_map(|berth| berth.entry.ended_mapping());
        ended.filter(move |ended| ended.range.contains(address))
    }

    /// Whether a mapping has ended here that [`Self::ended`] does not know any more.
    pub(crate) fn has_forgotten(&self) -> bool {
        self.forgotten.load(Relaxed)
    }

    /// Adds all mappings that have had a berth to `sums`, but for those that are live, which have to be counted besides.
    pub(crate) fn add_to(&self, sums: &mut Sums) {
        for berth in self.rented.berths.iter() {
            let uses = berth.entry.uses();
            sums.total += uses;
            sums.total_bytes += uses.wrapping_mul(berth.entry.bytes());
        }
        let [mappings, bytes] = &self.before;
        sums.total += mappings.load(Acquire);
        sums.total_bytes += bytes.load(Acquire);
    }
}
