//! Domain identifiers: who has which, and until when.
//!
//! A domain exists in the device from the first `ATTACH` that names it until its last endpoint leaves. Requests that name it may
//! be on their way at that moment; each of them holds the [`DomainId`], so that the number is not given out again, and to another
//! address space, before the last of them has been answered. Where an answer never came the number is never used again.
//!
//! # Locking
//!
//! One [`IrqMutex`], a leaf but for the heap's.

use ::iommu::AttachError;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::{AtomicBool, Ordering};

/// The identifiers of one device.
pub(super) struct DomainIds {
    range: (u32, u32),
    state: IrqMutex<State>,
}

struct State {
    next: u32,
    /// Sorted.
    used: Vec<u32>,
}

impl DomainIds {
    /// `range`: first and last, in that order.
    pub fn new(range: (u32, u32)) -> Arc<Self> {
        Arc::new(Self { range, state: IrqMutex::new(State { next: range.0, used: Vec::new() }) })
    }

    /// Gives out a number that nobody has.
    pub fn allocate(self: &Arc<Self>) -> Result<Arc<DomainId>, AttachError> {
        let (first, last) = self.range;
        let number = {
            let mut state = self.state.lock();
            state.used.try_reserve(1).map_err(|_| AttachError::OutOfMemory)?;
            let mut candidate = state.next;
            // Among one more number than are used, one is free.
            let tries = (state.used.len() as u64 + 1).min(u64::from(last - first) + 1);
            let mut free = None;
            for _ in 0..tries {
                if let Err(place) = state.used.binary_search(&candidate) {
                    free = Some(place);
                    break;
                }
                candidate = if candidate == last { first } else { candidate + 1 };
            }
            let place = free.ok_or(AttachError::NoIdentifier)?;
            state.used.insert(place, candidate);
            state.next = if candidate == last { first } else { candidate + 1 };
            candidate
        };
        let id = DomainId { number, leaving: AtomicBool::new(false), ids: self.clone() };
        // Dropped, it gives its number back.
        base::fallible::arc(id).map_err(|_| AttachError::OutOfMemory)
    }
}

/// A domain of the device's. The number is free again when this is dropped.
pub(super) struct DomainId {
    number: u32,
    /// Its last endpoint is being taken away: that it does not exist (any more) is no surprise.
    leaving: AtomicBool,
    ids: Arc<DomainIds>,
}

impl DomainId {
    /// The number.
    pub fn get(&self) -> u32 {
        self.number
    }

    /// Whether it may be gone.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Sets whether it may be gone.
    pub fn set_leaving(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::Release);
    }
}

impl Drop for DomainId {
    fn drop(&mut self) {
        let mut state = self.ids.state.lock();
        if let Ok(place) = state.used.binary_search(&self.number) {
            state.used.remove(place);
        }
    }
}
