//! Memory that was lost because its revocation failed.
//!
//! A device may reach such memory for ever. It is therefore never freed, its DMA address is never given out again, and the
//! address space stays. It is counted and named: a leak on purpose is better than somebody else's memory overwritten, but it
//! is never silent.
//!
//! # Locking
//!
//! One [`IrqMutex`], a leaf: nothing is allocated, freed or called while it is held.

use crate::site::Site;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use core::fmt;
use iommu::{IovaRange, PAGE_SIZE, RevokeError};

/// The names that are kept; beyond that only the sums grow.
const NAMES: usize = 32;

/// Memory that a device could not be shown to have lost. It is never used again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} pages at {range} stay lent to {device} for ever: {cause} (mapped at {mapped_at})", range.len() / PAGE_SIZE)]
pub struct Quarantined {
    /// Who may still reach it.
    pub device: Arc<str>,
    /// Where it is for the device.
    pub range: IovaRange,
    /// Why the revocation gave no guarantee.
    pub cause: RevokeError,
    /// Where the loan was made.
    pub mapped_at: Site,
}

/// What is in quarantine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Pages of [`PAGE_SIZE`].
    pub pages: u64,
    /// The pages by name, the newest last; the oldest are left out where there are many.
    pub names: Vec<Quarantined>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages in quarantine", self.pages)?;
        self.names.iter().try_for_each(|name| write!(f, "\n  {name}"))
    }
}

struct Registry {
    pages: u64,
    next: usize,
    names: [Option<Quarantined>; NAMES],
}

static REGISTRY: IrqMutex<Registry> = IrqMutex::new(Registry { pages: 0, next: 0, names: [const { None }; NAMES] });

/// Says what is in quarantine, in the whole system.
pub fn report() -> Report {
    let mut names = Vec::new();
    // Without memory the pages are counted and not named.
    let room = names.try_reserve_exact(NAMES).is_ok();
    let registry = REGISTRY.lock();
    let (newer, older) = registry.names.split_at(registry.next % NAMES);
    if room {
        names.extend(older.iter().chain(newer).flatten().cloned());
    }
    Report { pages: registry.pages, names }
}

/// Takes note of lost memory.
pub(crate) fn add(lost: &Quarantined) {
    log::error!("dma: {lost}");
    let name = lost.clone();
    let mut registry = REGISTRY.lock();
    registry.pages += lost.range.len() / PAGE_SIZE;
    let next = registry.next % NAMES;
    registry.next = next + 1;
    let replaced = registry.names.get_mut(next).and_then(|place| place.replace(name));
    drop(registry);
    drop(replaced);
}
