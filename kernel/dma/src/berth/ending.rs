//! Mappings that end together: their berths are ready by one exchange.

use super::{Berth, Berths, CLOSED, TOP};
use crate::site::Site;
use base::time::Stamp;
use core::sync::atomic::Ordering::{Relaxed, Release};
use iommu::Iova;

/// Berths of one size, linked as they will be on a stack, whose mappings have ended together.
pub(crate) struct Ending<'a> {
    berths: &'a Berths,
    when: Stamp,
    /// The uppermost and the lowest.
    ends: Option<(&'a Berth, &'a Berth)>,
}

impl Berths {
    /// As [`Berths::end`], of many at one moment.
    pub(crate) fn end_many(&self) -> Ending<'_> {
        Ending { berths: self, when: Stamp::now(), ends: None }
    }
}

impl<'a> Ending<'a> {
    /// Records that the range of a berth, which the caller has, has been revoked. It will be above those that came before.
    #[inline]
    pub(crate) fn add(&mut self, berth: &'a Berth, start: Iova, unmapped_at: Site) {
        berth.entry.end(start, self.when, unmapped_at);
        if let Some((top, bottom)) = self.ends {
            if top.class.load(Relaxed) == berth.class.load(Relaxed) {
                berth.next.store(top.number, Relaxed);
                self.ends = Some((berth, bottom));
                return;
            }
            self.put();
        }
        self.ends = Some((berth, berth));
    }

    /// Makes those that came so far ready.
    fn put(&mut self) {
        let Some((top, bottom)) = self.ends.take() else { return };
        let stack = self.berths.stack_of(top);
        let mut word = stack.0.load(Relaxed);
        while word & CLOSED == 0 {
            bottom.next.store((word & TOP) as u32, Relaxed);
            // Release: as in `push`.
            match stack.0.compare_exchange(word, (word & !TOP) | u64::from(top.number), Release, Relaxed) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
        let mut berth = top;
        loop {
            // Before it is on another stack.
            let next = self.berths.berth(berth.next.load(Relaxed));
            let last = core::ptr::eq(berth, bottom);
            self.berths.put_back(berth);
            if last {
                return;
            }
            berth = next;
        }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.put();
    }
}
