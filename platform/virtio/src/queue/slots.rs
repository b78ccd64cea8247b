//! The in-flight table and the shadow of the descriptor area: pure bookkeeping, and the judge of what the device returns.
//!
//! # Invariants
//!
//! - Every descriptor is either in the free list or in the chain of exactly one slot that is not [`Phase::Free`].
//! - `loans` of a slot are present from before its descriptors are published until after the device has returned them
//!   ([`Phase::Done`]) or has been reset ([`Phase::Retired`]). The loans of a lane's slots are with the lane; if that is given up
//!   before, its store comes here, and stays until none of its requests is in flight.
//! - A slot that is watched is free only after its loans have been dropped: who watches sees how the request went for as long as
//!   there is a loan that wants to know. (After a reset there is nothing to be seen.) A free slot is not watched.
//! - A slot of a lane is in the lane's list of returned requests exactly while it is `Done` or `Retired`, in the order of return.

use super::parts::Loans;
use crate::{Error, Misbehaviour};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::task::Waker;

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No request.
    Free,
    /// The device has it.
    InFlight,
    /// The device has returned it, having written this many bytes.
    Done(u32),
    /// The device was reset while it had the request.
    Retired,
}

struct Slot {
    phase: Phase,
    /// Descriptors in the chain that starts here.
    chain: u16,
    /// Bytes that the device may write.
    writable: u32,
    loans: Loans,
    waker: Option<Waker>,
    /// Nobody will take the result, and nobody has begun to end the request.
    abandoned: bool,
    /// Others than whoever has the request look at it.
    watched: bool,
    /// The lane that it belongs to, or [`NONE`]. In a lane there is neither loan nor waker.
    lane: u16,
    /// The request of the same lane that was returned after this one, or [`NONE`].
    later: u16,
    /// For what its memory has been shaped.
    shape: Shape,
}

/// What a slot's memory may be shaped for (see [`super::ring`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Words of the header.
    pub header: u16,
    /// Pieces of data.
    pub pieces: u16,
}

impl Shape {
    /// For nothing: no request is so long.
    pub const NONE: Self = Self { header: u16::MAX, pieces: u16::MAX };
}

/// No slot, no lane. (There are at most 32768 of each.)
const NONE: u16 = u16::MAX;

/// What an abandoned lane leaves behind.
pub(super) type Store = Box<dyn Send + Sync>;

/// A lane's requests.
struct Lane {
    /// The first and the last request that was returned and has not been taken yet.
    first: u16,
    last: u16,
    returned: u16,
    in_flight: u16,
    state: LaneState,
}

enum LaneState {
    /// Nobody has it.
    Closed,
    /// It has an owner.
    Open,
    /// Its owner has gone.
    Abandoned(Store),
}

/// A request of a lane that is over.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Returned {
    pub head: u16,
    /// Bytes that the device wrote, of those that it may write; `None` if it was reset.
    pub written: Option<u32>,
    pub writable: u32,
    /// The first byte of its answer.
    pub status: u8,
}

/// What a used entry ends.
pub(super) enum Completed {
    /// A request of the lane that asks.
    Here(Returned),
    /// Another, and who is to be woken.
    Elsewhere(Option<Waker>),
}

/// What is left of a request that is over, to be given to [`Queue::let_go`](super::Queue).
pub(super) struct Ended {
    pub loans: Loans,
    /// The slot, which is to be freed after the loans.
    pub kept: Option<u16>,
}

pub(super) struct Slots {
    slots: Box<[Slot]>,
    /// How many watched requests each slot has had.
    generations: Box<[u32]>,
    /// The shadow of the descriptors' `next`: chains, and the free list.
    next: Box<[u16]>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Abandoned requests and lanes that the device has returned.
    reapable: u16,
    lanes: Vec<Lane>,
    /// Requests of lanes in flight.
    laned: u16,
}

impl Slots {
    /// All `size` descriptors free.
    pub fn new(size: u16) -> Result<Self, Error> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(usize::from(size)).map_err(|_| Error::OutOfMemory)?;
        let mut next = Vec::new();
        next.try_reserve_exact(usize::from(size)).map_err(|_| Error::OutOfMemory)?;
        let mut generations = Vec::new();
        generations.try_reserve_exact(usize::from(size)).map_err(|_| Error::OutOfMemory)?;
        generations.resize(usize::from(size), 0);
        for index in 0..size {
            let phase = Phase::Free;
            let (loans, waker, abandoned, watched) = (Loans::none(), None, false, false);
            let (lane, later, shape) = (NONE, NONE, Shape::NONE);
            slots.push(Slot { phase, chain: 0, writable: 0, loans, waker, abandoned, watched, lane, later, shape });
            next.push(index.wrapping_add(1));
        }
        let (slots, next) = (slots.into_boxed_slice(), next.into_boxed_slice());
        let generations = generations.into_boxed_slice();
        let (in_flight, reapable, lanes, laned) = (0, 0, Vec::new(), 0);
        Ok(Self { slots, generations, next, free_head: 0, free: size, in_flight, reapable, lanes, laned })
    }

    pub fn free(&self) -> u16 {
        self.free
    }

    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    pub fn reapable(&self) -> u16 {
        self.reapable
    }

    /// The descriptor after `index` in its chain.
    #[inline]
    pub fn next(&self, index: u16) -> u16 {
        self.next[usize::from(index)]
    }

    pub fn phase(&self, head: u16) -> Phase {
        self.slots[usize::from(head)].phase
    }

    /// Takes `chain` descriptors (at least 1) out of the free list for one request, which holds `loans` from here on. The chain
    /// starts at the returned head and goes on by [`Slots::next`]. Gives the loans back if there are not enough descriptors.
    pub fn begin(&mut self, chain: u16, writable: u32, loans: Loans) -> Result<u16, Loans> {
        if chain > self.free {
            return Err(loans);
        }
        let head = self.take_chain(chain);
        let slot = &mut self.slots[usize::from(head)];
        let (phase, waker, abandoned, watched) = (Phase::InFlight, None, false, false);
        let (lane, later, shape) = (NONE, NONE, Shape::NONE);
        *slot = Slot { phase, chain, writable, loans, waker, abandoned, watched, lane, later, shape };
        Ok(head)
    }

    /// Takes `chain` descriptors, which are free.
    #[inline]
    fn take_chain(&mut self, chain: u16) -> u16 {
        let head = self.free_head;
        let mut tail = head;
        for _ in 1..chain {
            tail = self.next(tail);
        }
        self.free_head = self.next(tail);
        self.free -= chain;
        self.in_flight += 1;
        head
    }

    /// Opens a lane.
    pub fn open_lane(&mut self) -> Result<u16, Error> {
        let open = Lane { first: NONE, last: NONE, returned: 0, in_flight: 0, state: LaneState::Open };
        let closed = |lane: &Lane| matches!(lane.state, LaneState::Closed);
        if let Some(index) = self.lanes.iter().position(closed) {
            self.lanes[index] = open;
            return Ok(index as u16);
        }
        if self.lanes.len() >= self.slots.len() {
            return Err(Error::QueueFull);
        }
        self.lanes.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        self.lanes.push(open);
        // No more lanes than slots.
        Ok((self.lanes.len() - 1) as u16)
    }

    /// As [`Slots::begin`] for a request of a lane, whose loan the lane keeps. Gives the head, and whether the slot has been shaped
    /// as `shape` says already; it is taken for shaped so from here on. `None` if there are not enough descriptors.
    #[inline]
    pub fn begin_in_lane(&mut self, lane: u16, chain: u16, writable: u32, shape: Shape) -> Option<(u16, bool)> {
        if chain > self.free {
            return None;
        }
        let head = self.take_chain(chain);
        let slot = &mut self.slots[usize::from(head)];
        // INVARIANT: free slots have neither loans nor waker, and are not watched.
        (slot.phase, slot.chain, slot.writable) = (Phase::InFlight, chain, writable);
        (slot.abandoned, slot.lane, slot.later) = (false, lane, NONE);
        let shaped = slot.shape == shape;
        slot.shape = shape;
        self.laned += 1;
        self.lanes[usize::from(lane)].in_flight += 1;
        Some((head, shaped))
    }

    /// Puts a request of a lane that is over into the lane's list; nobody will ask for that of an abandoned lane.
    fn return_to_lane(&mut self, head: u16) {
        let index = usize::from(head);
        let lane = &mut self.lanes[usize::from(self.slots[index].lane)];
        self.laned -= 1;
        lane.in_flight -= 1;
        match lane.state {
            LaneState::Open => {
                match lane.last {
                    NONE => lane.first = head,
                    last => self.slots[usize::from(last)].later = head,
                }
                lane.last = head;
                lane.returned += 1;
            }
            _ => {
                self.reapable += u16::from(lane.in_flight == 0);
                self.free_chain(head);
            }
        }
    }

    /// How many requests of a lane have been returned and not been taken.
    pub fn returned(&self, lane: u16) -> u16 {
        self.lanes[usize::from(lane)].returned
    }

    /// Whether there are lanes, and every request in flight is of one.
    pub fn all_in_lanes(&self) -> bool {
        !self.lanes.is_empty() && self.laned == self.in_flight
    }

    /// As [`Slots::all_in_lanes`], and every lane has an owner, or nothing in flight.
    pub fn all_in_open_lanes(&self) -> bool {
        self.all_in_lanes() && !self.lanes.iter().any(|lane| matches!(lane.state, LaneState::Abandoned(_)))
    }

    /// Whether any request in flight is of a lane.
    pub fn any_in_lanes(&self) -> bool {
        self.laned != 0
    }

    /// Whether every request in flight is of this lane.
    #[inline]
    pub fn all_in_lane(&self, lane: u16) -> bool {
        self.lanes[usize::from(lane)].in_flight == self.in_flight
    }

    /// Takes the next returned request out of a lane's list and frees its descriptors. (Its status byte is for the caller to
    /// read.)
    pub fn take_returned(&mut self, lane: u16) -> Option<Returned> {
        let lane = &mut self.lanes[usize::from(lane)];
        let head = lane.first;
        if head == NONE {
            return None;
        }
        let slot = &self.slots[usize::from(head)];
        lane.first = slot.later;
        if lane.first == NONE {
            lane.last = NONE;
        }
        lane.returned -= 1;
        let written = match slot.phase {
            Phase::Done(len) => Some(len),
            _ => None,
        };
        let returned = Returned { head, written, writable: slot.writable, status: 0 };
        self.free_chain(head);
        Some(returned)
    }

    /// Closes a lane. The store comes back at once if nothing of the lane is in flight; otherwise it is kept until then.
    pub fn abandon_lane(&mut self, lane: u16, store: Store) -> Option<Store> {
        while self.take_returned(lane).is_some() {}
        let lane = &mut self.lanes[usize::from(lane)];
        if lane.in_flight == 0 {
            lane.state = LaneState::Closed;
            return Some(store);
        }
        lane.state = LaneState::Abandoned(store);
        None
    }

    /// Judges a used entry for the owner of a lane: what is of the lane is over, and its descriptors are free.
    #[inline]
    pub fn complete_in(&mut self, lane: u16, id: u32, len: u32) -> Result<Completed, Misbehaviour> {
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        match self.slots.get_mut(index) {
            // A lane's slots have neither loans nor waker, and nobody else waits for them.
            Some(slot) if slot.phase == Phase::InFlight && slot.lane == lane => {
                let (chain, writable) = (slot.chain, slot.writable);
                slot.phase = Phase::Free;
                // The table has at most 32768 entries.
                let head = index as u16;
                self.in_flight -= 1;
                self.laned -= 1;
                self.lanes[usize::from(lane)].in_flight -= 1;
                self.give_back(head, chain);
                Ok(Completed::Here(Returned { head, written: Some(len.min(writable)), writable, status: 0 }))
            }
            _ => self.complete(id, len).map(Completed::Elsewhere),
        }
    }

    /// Judges a used entry. `Ok` is who to wake.
    pub fn complete(&mut self, id: u32, len: u32) -> Result<Option<Waker>, Misbehaviour> {
        let index = usize::try_from(id).unwrap_or(usize::MAX);
        let slot = self.slots.get_mut(index).ok_or(Misbehaviour::NoSuchDescriptor(id))?;
        if slot.phase != Phase::InFlight {
            // The table has at most 32768 entries.
            return Err(Misbehaviour::NotInFlight(index as u16));
        }
        slot.phase = Phase::Done(len.min(slot.writable));
        self.in_flight -= 1;
        if slot.lane != NONE {
            self.return_to_lane(index as u16);
            return Ok(None);
        }
        if slot.abandoned {
            self.reapable += 1;
        }
        Ok(slot.waker.take())
    }

    /// Sets who is woken when the device returns the request, and gives back who was to be woken before (to be dropped without
    /// the lock).
    pub fn listen(&mut self, head: u16, waker: Waker) -> Option<Waker> {
        self.slots[usize::from(head)].waker.replace(waker)
    }

    /// Whether the waker that is set already wakes the same task.
    pub fn listens(&self, head: u16, waker: &Waker) -> bool {
        self.slots[usize::from(head)].waker.as_ref().is_some_and(|old| old.will_wake(waker))
    }

    /// Any listener of a request that the device still has.
    pub fn take_listener(&mut self) -> Option<Waker> {
        self.slots.iter_mut().find_map(|slot| slot.waker.take())
    }

    /// Has others look at the request. They see it while this does not change.
    pub fn watch(&mut self, head: u16) -> u32 {
        self.slots[usize::from(head)].watched = true;
        self.generation(head)
    }

    /// Which of the watched requests of a slot is the one that it has, or will have next.
    pub fn generation(&self, head: u16) -> u32 {
        self.generations[usize::from(head)]
    }

    /// Frees the descriptors of a request that the device does not have any more, at once if nobody watches it. The loans are to be
    /// dropped without the lock.
    fn end(&mut self, head: u16) -> Ended {
        let slot = &mut self.slots[usize::from(head)];
        let loans = core::mem::take(&mut slot.loans);
        if slot.watched {
            return self.end_watched(head, loans);
        }
        self.free_chain(head);
        Ended { loans, kept: None }
    }

    #[cold]
    fn end_watched(&mut self, head: u16, loans: Loans) -> Ended {
        let slot = &mut self.slots[usize::from(head)];
        // Nobody else ends it.
        slot.abandoned = false;
        if loans.is_empty() {
            self.free_watched(head);
            return Ended { loans, kept: None };
        }
        Ended { loans, kept: Some(head) }
    }

    /// Frees the descriptors of a request that was watched, after its loans have been dropped.
    pub fn free_watched(&mut self, head: u16) {
        self.slots[usize::from(head)].watched = false;
        let generation = &mut self.generations[usize::from(head)];
        *generation = generation.wrapping_add(1);
        self.free_chain(head);
    }

    /// Gives the descriptors of a request that the device does not have any more back to the free list.
    fn free_chain(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        debug_assert!(matches!(slot.phase, Phase::Done(_) | Phase::Retired));
        slot.phase = Phase::Free;
        let chain = slot.chain;
        self.give_back(head, chain);
    }

    /// Puts `chain` descriptors, from `head` on, into the free list.
    #[inline]
    fn give_back(&mut self, head: u16, chain: u16) {
        let mut tail = head;
        for _ in 1..chain {
            tail = self.next(tail);
        }
        self.next[usize::from(tail)] = self.free_head;
        self.free_head = head;
        self.free += chain;
    }

    /// Notes that nobody will take the result of the request. Gives back its listener, and the loans if it is over.
    pub fn abandon(&mut self, head: u16) -> (Option<Waker>, Ended) {
        let slot = &mut self.slots[usize::from(head)];
        slot.abandoned = true;
        let waker = slot.waker.take();
        match slot.phase {
            Phase::Done(_) | Phase::Retired => (waker, self.end(head)),
            _ => (waker, Ended { loans: Loans::none(), kept: None }),
        }
    }

    /// Ends one abandoned request, or lane, that the device has returned, if there is one.
    pub fn reap(&mut self) -> Option<(Ended, Option<Store>)> {
        if self.reapable == 0 {
            return None;
        }
        let over = |lane: &&mut Lane| lane.in_flight == 0 && matches!(lane.state, LaneState::Abandoned(_));
        if let Some(lane) = self.lanes.iter_mut().find(over)
            && let LaneState::Abandoned(store) = core::mem::replace(&mut lane.state, LaneState::Closed)
        {
            self.reapable -= 1;
            return Some((Ended { loans: Loans::none(), kept: None }, Some(store)));
        }
        let done = |slot: &Slot| slot.abandoned && matches!(slot.phase, Phase::Done(_));
        let head = self.slots.iter().position(done)?;
        self.reapable -= 1;
        // The table has at most 32768 entries.
        Some((self.end(head as u16), None))
    }

    /// Ends the device's part in one request that it had, if it has any: it has been reset. The slot stays reserved for whoever
    /// holds the request, unless that is nobody.
    pub fn retire(&mut self) -> Option<(Option<Waker>, Ended)> {
        let head = self.slots.iter().position(|slot| slot.phase == Phase::InFlight)?;
        self.in_flight -= 1;
        let slot = &mut self.slots[head];
        slot.phase = Phase::Retired;
        if slot.lane != NONE {
            self.return_to_lane(head as u16);
            return Some((None, Ended { loans: Loans::none(), kept: None }));
        }
        let waker = slot.waker.take();
        if slot.abandoned {
            return Some((waker, self.end(head as u16)));
        }
        Some((waker, Ended { loans: core::mem::take(&mut slot.loans), kept: None }))
    }
}
