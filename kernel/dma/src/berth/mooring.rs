//! How ranges get a berth, and how they are given up.

#![expect(
    unsafe_code,
    reason = "changes the anchor of a berth that it has, and gives up the device when it comes back"
)]

use super::{Berth, Berths, CLOSED, COUNT, LONGEST, Stack, class};
use crate::device::{Body, SHARDS};
use base::cpu;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::{AcqRel, Relaxed};
use iommu::contract::AddressSpace;
use iommu::iova::Keep;
use iommu::{IovaRange, PAGE_SIZE};

impl Berths {
    /// Berths a range that was allocated and has been revoked, if there is room. `false`: it is the caller's as before.
    #[inline(never)]
    pub(crate) fn moor(&self, range: IovaRange, space: &dyn AddressSpace) -> bool {
        if range.len() > LONGEST || !range.is_aligned(PAGE_SIZE) {
            return false;
        }
        let Some(berth) = self.pop(&self.vacant).or_else(|| self.vacate_one(range.len())) else { return false };
        let anchor = space.anchor(range);
        if anchor.is_some() {
            self.anchored.store(true, Relaxed);
        } else if range.len() == LONGEST && self.anchored.load(Relaxed) {
            // Tables are linked in the place of its block: the next mapping that could be one had better be elsewhere.
            self.give_back(berth);
            return false;
        }
        // SAFETY: the berth was taken off a stack: it is the caller's alone (invariant).
        unsafe { *berth.anchor.get() = anchor };
        if berth.entry.assign(range) {
            self.forgotten.store(true, Relaxed);
        }
        berth.class.store(class(range.len()) as u32, Relaxed);
        self.put_back(berth);
        true
    }

    /// Gives up a range of another size that is ready on this core.
    #[cold]
    fn vacate_one(&self, len: u64) -> Option<&Berth> {
        let core = &self.cores[cpu::index() % SHARDS];
        let others = core.ready.iter().enumerate().filter(|(number, _)| *number != class(len));
        let berth = others.into_iter().find_map(|(_, stack)| self.pop(stack))?;
        self.vacate(berth);
        Some(berth)
    }

    /// Gives up the range of a berth that the caller has.
    #[cold]
    pub(super) fn vacate(&self, berth: &Berth) {
        let (start, len, uses) = (berth.entry.start(), berth.entry.bytes(), berth.entry.uses());
        let [mappings, bytes] = &self.before;
        // The sums first: who adds up meanwhile counts some twice rather than not at all.
        mappings.fetch_add(uses, AcqRel);
        bytes.fetch_add(uses.wrapping_mul(len), AcqRel);
        // What was last there stays on record until another range is here.
        berth.entry.forget_uses();
        // SAFETY: the caller has the berth.
        unsafe { *berth.anchor.get() = None };
        let Some(range) = IovaRange::new(start, len) else { return };
        if let Err(error) = self.domain.iova().free(range) {
            log::error!("dma: address range {range} is lost: {error}");
        }
    }

    /// Keeps nothing from here on: gives up what is ready, and what is in use when its mapping ends.
    pub(crate) fn close(&self) {
        for stack in self.all_ready() {
            stack.0.fetch_or(CLOSED, Relaxed);
        }
        self.give_up();
    }

    /// Says whose they are: once, before any of them is used.
    pub(crate) fn belong_to(&self, body: NonNull<Body>) {
        self.body.store(body.as_ptr(), Relaxed);
    }

    /// Has every berth leave the device's body, those that are out when they come back. Each of them is one of what holds the body.
    pub(crate) fn close_for_good(&self) {
        self.close_lapsed();
        self.close();
        self.vacant.0.fetch_or(CLOSED, Relaxed);
        while self.pop(&self.vacant).is_some() {
            self.leave();
        }
    }

    /// Makes a berth without a range vacant, which the caller has. He uses neither the berths nor the device any more, unless he
    /// keeps them.
    pub(super) fn give_back(&self, berth: &Berth) {
        if !self.push(&self.vacant, berth) {
            self.leave();
        }
    }

    fn leave(&self) {
        if let Some(body) = NonNull::new(self.body.load(Relaxed)) {
            // SAFETY: a berth that was out is one of its holds, and comes back once (invariant).
            unsafe { Body::leave(body) };
        }
    }

    fn all_ready(&self) -> impl Iterator<Item = &Stack> {
        self.cores.iter().flat_map(|core| &core.ready)
    }
}

impl Keep for Berths {
    fn give_up(&self) {
        for stack in self.all_ready() {
            // No more than there are: their core may go on berthing.
            for _ in 0..COUNT {
                let Some(berth) = self.pop(stack) else { break };
                self.vacate(berth);
                self.give_back(berth);
            }
        }
    }
}
