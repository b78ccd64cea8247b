//! Accesses that an IOMMU stopped: the first of each kind whole, all of them counted.
//!
//! One stopped transfer can make a thousand records. A [`FaultLog`] keeps a bounded number of different ones (by stream, page
//! and reason) and counts the rest, so that a flood loses neither the first record nor time.
//!
//! # Locking
//!
//! One [`IrqMutex`], a leaf, taken by the IOMMU's interrupt handler. Nothing is allocated under it.

#![forbid(unsafe_code)]

use base::{Deadline, Instant, IrqMutex, wait_until};
use iommu::{Fault, FaultSink, PAGE_SIZE, StreamId};

/// Different faults that are kept.
const KEPT: usize = 64;

/// A fault, and how often it came.
#[derive(Clone, Copy, Debug)]
pub struct Noted {
    /// The first record.
    pub fault: Fault,
    /// How many records were alike: same stream, page, access and reason.
    pub count: u64,
    /// When the first came.
    pub first: Instant,
    /// When the latest came.
    pub latest: Instant,
}

#[derive(Debug)]
struct State {
    noted: [Option<Noted>; KEPT],
    total: u64,
    unkept: u64,
}

/// Takes note of faults.
#[derive(Debug)]
pub struct FaultLog {
    state: IrqMutex<State>,
}

impl Default for FaultLog {
    fn default() -> Self {
        Self::new()
    }
}

impl FaultLog {
    /// Makes an empty log.
    pub const fn new() -> Self {
        Self { state: IrqMutex::new(State { noted: [None; KEPT], total: 0, unkept: 0 }) }
    }

    /// The number of records that came in all.
    pub fn total(&self) -> u64 {
        self.state.lock().total
    }

    /// The number of records that were counted without being kept, because too many were different.
    pub fn unkept(&self) -> u64 {
        self.state.lock().unkept
    }

    /// The `index`-th kept fault, in the order in which they first came.
    pub fn get(&self, index: usize) -> Option<Noted> {
        self.state.lock().noted.get(index).copied().flatten()
    }

    /// All kept faults, in the order in which they first came.
    pub fn iter(&self) -> impl Iterator<Item = Noted> + '_ {
        (0..KEPT).map_while(|index| self.get(index))
    }

    /// Forgets the kept faults, so that what is kept from now on is new. The counts go on.
    pub fn forget(&self) {
        self.state.lock().noted = [None; KEPT];
    }

    /// Sleeps until there is a fault of one of `streams` of which a record came at `since` or later; `None` when `deadline` passes
    /// first.
    pub fn wait_for(&self, streams: &[StreamId], since: Instant, deadline: Deadline) -> Option<Noted> {
        let mut found = None;
        // Out of time or not: what was found last is the answer.
        let _ = wait_until(deadline, || {
            found = self.iter().find(|noted| streams.contains(&noted.fault.stream) && noted.latest >= since);
            found.is_some()
        });
        found
    }
}

fn alike(a: &Fault, b: &Fault) -> bool {
    let page = |fault: &Fault| fault.iova.map(|iova| iova.align_down(PAGE_SIZE));
    a.stream == b.stream && a.reason == b.reason && a.access == b.access && page(a) == page(b)
}

impl FaultSink for FaultLog {
    fn fault(&self, fault: &Fault) {
        let at = Instant::now();
        let mut state = self.state.lock();
        state.total += 1;
        for place in &mut state.noted {
            match place {
                Some(noted) if alike(&noted.fault, fault) => {
                    noted.count += 1;
                    noted.latest = at;
                    return;
                }
                Some(_) => {}
                None => {
                    *place = Some(Noted { fault: *fault, count: 1, first: at, latest: at });
                    return;
                }
            }
        }
        state.unkept += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::{Access, FaultReason, Iova};

    fn fault(stream: u32, iova: u64) -> Fault {
        Fault {
            stream: StreamId::new(stream),
            iova: Some(Iova::new(iova)),
            access: Some(Access::Write),
            reason: FaultReason::NotMapped,
            event: "F_TRANSLATION",
        }
    }

    #[test]
    fn a_flood_keeps_its_first_record_and_counts_the_rest() {
        let log = FaultLog::new();
        for word in 0..1024 {
            log.fault(&fault(8, 0x5000 + 4 * word));
        }
        let first = log.get(0).unwrap();
        assert_eq!((first.fault.iova, first.count, log.total()), (Some(Iova::new(0x5000)), 1024, 1024));
        assert!(log.get(1).is_none());
        log.forget();
        log.fault(&fault(8, 0x5040));
        assert_eq!(log.get(0).unwrap().fault.iova, Some(Iova::new(0x5040)));
    }

    #[test]
    fn faults_of_others_are_kept_apart_and_the_log_is_bounded() {
        let log = FaultLog::new();
        for page in 0..100 {
            log.fault(&fault(8, page * PAGE_SIZE));
        }
        assert_eq!((log.iter().count(), log.unkept(), log.total()), (KEPT, 100 - KEPT as u64, 100));
        assert!(log.wait_for(&[StreamId::new(9)], Instant::from_nanos(0), Deadline::after_millis(1)).is_none());
        assert!(log.wait_for(&[StreamId::new(8)], Instant::from_nanos(0), Deadline::after_millis(1)).is_some());
    }
}
