//! The in-flight table and the shadow of the descriptor area: pure bookkeeping, and the judge of what the device returns.
//!
//! # Invariants
//!
//! - Every descriptor is either in the free list or in the chain of exactly one slot that is not [`Phase::Free`].
//! - `loans` of a slot are present from before its descriptors are published until after the device has returned them
//!   ([`Phase::Done`]) or has been reset ([`Phase::Retired`]).

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
    /// Nobody will take the result.
    abandoned: bool,
}

pub(super) struct Slots {
    slots: Box<[Slot]>,
    /// The shadow of the descriptors' `next`: chains, and the free list.
    next: Box<[u16]>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Abandoned requests that the device has returned.
    reapable: u16,
}

impl Slots {
    /// All `size` descriptors free.
    pub fn new(size: u16) -> Result<Self, Error> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(usize::from(size)).map_err(|_| Error::OutOfMemory)?;
        let mut next = Vec::new();
        next.try_reserve_exact(usize::from(size)).map_err(|_| Error::OutOfMemory)?;
        for index in 0..size {
            let phase = Phase::Free;
            slots.push(Slot { phase, chain: 0, writable: 0, loans: Loans::none(), waker: None, abandoned: false });
            next.push(index.wrapping_add(1));
        }
        let (slots, next) = (slots.into_boxed_slice(), next.into_boxed_slice());
        Ok(Self { slots, next, free_head: 0, free: size, in_flight: 0, reapable: 0 })
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
        let head = self.free_head;
        let mut tail = head;
        for _ in 1..chain {
            tail = self.next(tail);
        }
        self.free_head = self.next(tail);
        self.free -= chain;
        self.in_flight += 1;
        let slot = &mut self.slots[usize::from(head)];
        *slot = Slot { phase: Phase::InFlight, chain, writable, loans, waker: None, abandoned: false };
        Ok(head)
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

    /// Frees the descriptors of a request that the device does not have any more. The loans are to be dropped without the lock.
    pub fn end(&mut self, head: u16) -> Loans {
        let slot = &mut self.slots[usize::from(head)];
        debug_assert!(matches!(slot.phase, Phase::Done(_) | Phase::Retired));
        slot.phase = Phase::Free;
        let chain = slot.chain;
        let loans = core::mem::take(&mut slot.loans);
        let mut tail = head;
        for _ in 1..chain {
            tail = self.next(tail);
        }
        self.next[usize::from(tail)] = self.free_head;
        self.free_head = head;
        self.free += chain;
        loans
    }

    /// Notes that nobody will take the result of the request. Gives back its listener, and the loans if it is over.
    pub fn abandon(&mut self, head: u16) -> (Option<Waker>, Loans) {
        let slot = &mut self.slots[usize::from(head)];
        slot.abandoned = true;
        let waker = slot.waker.take();
        match slot.phase {
            Phase::Done(_) | Phase::Retired => (waker, self.end(head)),
            _ => (waker, Loans::none()),
        }
    }

    /// Ends one abandoned request that the device has returned, if there is one.
    pub fn reap(&mut self) -> Option<Loans> {
        if self.reapable == 0 {
            return None;
        }
        let done = |slot: &Slot| slot.abandoned && matches!(slot.phase, Phase::Done(_));
        let head = self.slots.iter().position(done)?;
        self.reapable -= 1;
        // The table has at most 32768 entries.
        Some(self.end(head as u16))
    }

    /// Ends the device's part in one request that it had, if it has any: it has been reset. The slot stays reserved for whoever
    /// holds the request, unless that is nobody.
    pub fn retire(&mut self) -> Option<(Option<Waker>, Loans)> {
        let head = self.slots.iter().position(|slot| slot.phase == Phase::InFlight)?;
        self.in_flight -= 1;
        let slot = &mut self.slots[head];
        slot.phase = Phase::Retired;
        let waker = slot.waker.take();
        if slot.abandoned {
            return Some((waker, self.end(head as u16)));
        }
        Some((waker, core::mem::take(&mut slot.loans)))
    }
}
