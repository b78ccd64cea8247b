//! The resources that the device has or may have, and the loans behind them.
//!
//! # Invariants
//!
//! An entry is in the table from before the device can have heard of its resource, with its loans, until the device has
//! confirmed that the resource (for the loans: its backing) is gone, or has been reset.

use crate::Error;
use alloc::sync::Arc;
use alloc::vec::Vec;
use dma::Lent;

/// What keeps the memory of a picture lent.
pub(super) type Holds = Vec<Arc<dyn Lent>>;

/// One resource.
pub(super) struct Entry {
    id: u32,
    holds: Holds,
    /// One bit for each scanout that shows it, or may.
    scanouts: u16,
    /// Nobody holds its handle.
    orphan: bool,
}

pub(super) struct Table {
    entries: Vec<Entry>,
    last_id: u32,
    closed: bool,
}

impl Table {
    pub const fn new() -> Self {
        Self { entries: Vec::new(), last_id: 0, closed: false }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Takes in the loans of a new resource and returns its identifier, which was never used before. Gives the loans back with
    /// an error, to be dropped without the lock.
    pub fn insert(&mut self, holds: Holds) -> Result<u32, (Error, Holds)> {
        if self.closed {
            return Err((Error::ShutDown, holds));
        }
        let Some(id) = self.last_id.checked_add(1) else { return Err((Error::OutOfIds, holds)) };
        if self.entries.try_reserve(1).is_err() {
            return Err((Error::OutOfMemory, holds));
        }
        self.last_id = id;
        self.entries.push(Entry { id, holds, scanouts: 0, orphan: false });
        Ok(id)
    }

    fn entry(&mut self, id: u32) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    /// Notes that `scanout` shows resource `id`, or is about to.
    pub fn may_show(&mut self, id: u32, scanout: u32) {
        if let Some(entry) = self.entry(id) {
            entry.scanouts |= 1 << scanout;
        }
    }

    /// Notes that the device has confirmed that `scanout` shows resource `id` (0 for none), and so no other.
    pub fn shows(&mut self, id: u32, scanout: u32) {
        for entry in self.entries.iter_mut().filter(|entry| entry.id != id) {
            entry.scanouts &= !(1 << scanout);
        }
    }

    /// A scanout that shows resource `id`, or may.
    pub fn scanout_of(&self, id: u32) -> Option<u32> {
        let entry = self.entries.iter().find(|entry| entry.id == id)?;
        (entry.scanouts != 0).then(|| entry.scanouts.trailing_zeros())
    }

    /// The device has confirmed that the backing is detached: takes the loans out, to be dropped without the lock.
    pub fn detached(&mut self, id: u32) -> Holds {
        self.entry(id).map(|entry| core::mem::take(&mut entry.holds)).unwrap_or_default()
    }

    /// The device has confirmed that the resource is gone. What is left is to be dropped without the lock.
    pub fn remove(&mut self, id: u32) -> Option<Entry> {
        let index = self.entries.iter().position(|entry| entry.id == id)?;
        Some(self.entries.swap_remove(index))
    }

    /// Notes that nobody holds the handle of resource `id` any more.
    pub fn orphan(&mut self, id: u32) {
        if let Some(entry) = self.entry(id) {
            entry.orphan = true;
        }
    }

    /// A resource whose handle nobody held; the caller does from here on.
    pub fn take_orphan(&mut self) -> Option<u32> {
        let entry = self.entries.iter_mut().find(|entry| entry.orphan)?;
        entry.orphan = false;
        Some(entry.id)
    }

    /// Takes everything out and lets nothing in any more: the device has been reset.
    pub fn close(&mut self) -> Vec<Entry> {
        self.closed = true;
        core::mem::take(&mut self.entries)
    }
}
