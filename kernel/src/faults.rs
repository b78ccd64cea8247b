//! Accesses that an IOMMU stopped: the first of each kind whole, all of them counted.
//!
//! One stopped transfer can make a thousand records. A [`FaultLog`] keeps a bounded number of different ones (by stream, page
//! and reason) and counts the rest, so that a flood loses neither the first record nor time.
//!
//! # Containment
//!
//! Every stream has a budget of records. Who exceeds it is handed to [`FaultLog::take_exceeded`], once, and the function given to
//! [`FaultLog::on_exceeded`] is told, from the interrupt handler, that there is something to take: it has the rest done where
//! waiting is allowed. A device that is attached anew begins with a full budget ([`FaultLog::forgive`]).
//!
//! # Locking
//!
//! One [`IrqMutex`], a leaf, taken by the IOMMU's interrupt handler. Nothing is allocated under it.

#![forbid(unsafe_code)]

use base::{Deadline, Instant, IrqMutex, wait_until};
use iommu::{Fault, FaultSink, PAGE_SIZE, StreamId};
use spin::Once;

/// Different faults that are kept.
const KEPT: usize = 64;
/// Streams that are counted one by one.
const STREAMS: usize = 64;
/// Records that a stream may cause if nobody says otherwise. One stopped transfer can make a thousand.
pub const DEFAULT_BUDGET: u64 = 16_384;

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

/// What one stream has spent of its budget.
#[derive(Clone, Copy, Debug)]
struct Tally {
    stream: StreamId,
    count: u64,
    /// The record that was too much, until somebody takes it.
    exceeded: Option<Fault>,
}

/// A stream that has exceeded its budget.
#[derive(Clone, Copy, Debug)]
pub struct Exceeded {
    /// The record that was too much.
    pub fault: Fault,
    /// Records that the stream has caused.
    pub count: u64,
}

#[derive(Debug)]
struct State {
    noted: [Option<Noted>; KEPT],
    tallies: [Option<Tally>; STREAMS],
    budget: u64,
    total: u64,
    unkept: u64,
}

impl State {
    /// Keeps a fault, or counts it with those that are alike.
    fn note(&mut self, fault: &Fault, at: Instant) {
        for place in &mut self.noted {
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
        self.unkept += 1;
    }

    /// Counts a record of `stream`. Says whether it is the one that is too much.
    fn spend(&mut self, fault: &Fault) -> bool {
        let known = self.tallies.iter().position(|tally| tally.is_some_and(|tally| tally.stream == fault.stream));
        let place = known.or_else(|| {
            // Where all places are taken, whoever has spent least makes room.
            let spent = |place: &usize| self.tallies.get(*place).copied().flatten().map_or(0, |tally| tally.count);
            (0..STREAMS).min_by_key(spent)
        });
        let Some(tally) = place.and_then(|place| self.tallies.get_mut(place)) else { return false };
        if known.is_none() {
            *tally = None;
        }
        let tally = tally.get_or_insert(Tally { stream: fault.stream, count: 0, exceeded: None });
        tally.count = tally.count.saturating_add(1);
        let exceeded = self.budget != 0 && tally.count == self.budget.saturating_add(1);
        if exceeded {
            tally.exceeded = Some(*fault);
        }
        exceeded
    }
}

/// Takes note of faults.
#[derive(Debug)]
pub struct FaultLog {
    state: IrqMutex<State>,
    on_exceeded: Once<fn()>,
}

impl Default for FaultLog {
    fn default() -> Self {
        Self::new()
    }
}

impl FaultLog {
    /// Makes an empty log.
    pub const fn new() -> Self {
        let (noted, tallies) = ([None; KEPT], [None; STREAMS]);
        let state = State { noted, tallies, budget: DEFAULT_BUDGET, total: 0, unkept: 0 };
        Self { state: IrqMutex::new(state), on_exceeded: Once::new() }
    }

    /// Sets how many records a stream may cause before its device is contained; 0 is no limit.
    pub fn set_budget(&self, records: u64) {
        self.state.lock().budget = records;
    }

    /// Has `tell` called when a stream has exceeded its budget: from an interrupt handler, so it neither waits nor allocates. Only
    /// the first call counts.
    pub fn on_exceeded(&self, tell: fn()) {
        self.on_exceeded.call_once(|| tell);
    }

    /// Takes a stream that has exceeded its budget since somebody looked last.
    pub fn take_exceeded(&self) -> Option<Exceeded> {
        let mut state = self.state.lock();
        state.tallies.iter_mut().flatten().find_map(|tally| {
            let fault = tally.exceeded.take()?;
            Some(Exceeded { fault, count: tally.count })
        })
    }

    /// Gives back what [`FaultLog::take_exceeded`] gave, to be taken again later. Who was forgiven meanwhile stays so.
    pub fn put_back(&self, exceeded: &Exceeded) {
        let mut state = self.state.lock();
        let same = |tally: &&mut Tally| tally.stream == exceeded.fault.stream && tally.count >= exceeded.count;
        if let Some(tally) = state.tallies.iter_mut().flatten().find(same) {
            tally.exceeded = Some(exceeded.fault);
        }
    }

    /// Gives `streams` their full budget again.
    pub fn forgive(&self, streams: &[StreamId]) {
        for place in &mut self.state.lock().tallies {
            if place.is_some_and(|tally| streams.contains(&tally.stream)) {
                *place = None;
            }
        }
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
        let exceeded = {
            let mut state = self.state.lock();
            state.total += 1;
            state.note(fault, at);
            state.spend(fault)
        };
        if exceeded && let Some(tell) = self.on_exceeded.get() {
            tell();
        }
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

    /// Red when the count was not per stream, when every further record told again, and when `forgive` forgot nobody.
    #[test]
    fn a_stream_that_exceeds_its_budget_is_told_of_once_until_it_is_forgiven() {
        use core::sync::atomic::{AtomicU32, Ordering};
        static TOLD: AtomicU32 = AtomicU32::new(0);
        let log = FaultLog::new();
        log.set_budget(5);
        log.on_exceeded(|| _ = TOLD.fetch_add(1, Ordering::SeqCst));
        let told = || TOLD.swap(0, Ordering::SeqCst);
        for _ in 0..5 {
            log.fault(&fault(8, 0x5000));
            log.fault(&fault(9, 0x5000));
        }
        assert_eq!((told(), log.take_exceeded().is_none()), (0, true));
        for _ in 0..5 {
            log.fault(&fault(8, 0x6000));
        }
        let exceeded = log.take_exceeded().unwrap();
        assert_eq!((told(), exceeded.fault, exceeded.count), (1, fault(8, 0x6000), 10));
        assert!(log.take_exceeded().is_none());
        log.forgive(&[StreamId::new(8)]);
        for _ in 0..5 {
            log.fault(&fault(8, 0x7000));
        }
        assert_eq!(told(), 0);
        log.fault(&fault(8, 0x7000));
        assert_eq!((told(), log.take_exceeded().unwrap().count), (1, 6));
        log.fault(&fault(9, 0x7000));
        assert_eq!((told(), log.take_exceeded().unwrap().fault.stream), (1, StreamId::new(9)));
        log.set_budget(0);
        (0..100).for_each(|_| log.fault(&fault(10, 0x7000)));
        assert_eq!(told(), 0);
    }

    #[test]
    fn more_streams_than_can_be_counted_do_not_hide_a_flood() {
        let log = FaultLog::new();
        log.set_budget(50);
        for round in 0..51 {
            log.fault(&fault(1, 0x5000));
            (0..3).for_each(|other| log.fault(&fault(100 + 3 * round + other, 0x5000)));
        }
        assert_eq!(log.take_exceeded().unwrap().fault.stream, StreamId::new(1));
    }
}
