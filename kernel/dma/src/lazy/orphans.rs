//! Memory whose tokens were dropped before its mapping was revoked.
//!
//! # Locking
//!
//! One [`IrqMutex`], held to put in one or take out one. Whoever puts one in looks under it whether the mapping is over, and whoever
//! flushes says that it is before he takes any out: so none stays behind.

use super::erased::Erased;
use crate::Error;
use crate::berth::Berth;
use alloc::vec::Vec;
use base::IrqMutex;
use core::mem;

/// Of each device that is there. (One more is kept by who drops the token, until it is over.)
const ROOM: usize = 128;

struct Orphan {
    berth: &'static Berth,
    lapses: u64,
    memory: Erased,
}

struct Orphans {
    all: Vec<Orphan>,
    /// For so many nothing need be allocated.
    room: usize,
}

static ORPHANS: IrqMutex<Orphans> = IrqMutex::new(Orphans { all: Vec::new(), room: 0 });

/// Room for the orphans of one device.
pub(crate) struct Room(());

impl Room {
    /// Makes it.
    pub(crate) fn new() -> Result<Self, Error> {
        let mut orphans = ORPHANS.lock();
        let room = orphans.room.saturating_add(ROOM);
        let missing = room.saturating_sub(orphans.all.len());
        orphans.all.try_reserve(missing)?;
        orphans.room = room;
        Ok(Self(()))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut orphans = ORPHANS.lock();
        orphans.room = orphans.room.saturating_sub(ROOM);
    }
}

/// Leaves memory to the flush that will revoke what lapsed in `berth` after `lapses` others. Gives it back if that is over, if there is
/// no room, or for memory that cannot be kept here.
pub(super) fn leave<M: Send + 'static>(berth: &'static Berth, lapses: u64, memory: M) -> Result<(), M> {
    let mut orphans = ORPHANS.lock();
    let full = orphans.all.len() >= orphans.room.min(orphans.all.capacity());
    if full || berth.is_revoked(lapses) || berth.is_lost() {
        return Err(memory);
    }
    let memory = Erased::new(memory)?;
    orphans.all.push(Orphan { berth, lapses, memory });
    Ok(())
}

/// Frees what has been revoked. What could not be is kept for ever.
pub(crate) fn free() {
    let mut index = 0;
    loop {
        let mut orphans = ORPHANS.lock();
        let Some(Orphan { berth, lapses, .. }) = orphans.all.get(index) else { return };
        let (revoked, lost) = (berth.is_revoked(*lapses), berth.is_lost());
        if !revoked && !lost {
            index += 1;
            continue;
        }
        let Orphan { memory, .. } = orphans.all.swap_remove(index);
        drop(orphans);
        match revoked {
            true => drop(memory),
            false => mem::forget(memory),
        }
    }
}

#[cfg(all(test, feature = "fakes"))]
mod tests {
    use super::*;
    use crate::berth::Berths;
    use crate::fakes::{FakeDevice, FakeSystem};
    use alloc::sync::Arc;

    /// Caught: memory that is taken in when its mapping is over, for a flush that has been.
    #[test]
    fn what_is_over_is_not_taken_in() {
        let FakeDevice { domain, .. } = FakeSystem::new().device("disk").unwrap();
        let berths = Berths::new(domain, "disk".into()).unwrap();
        let berth = berths.berth(1);
        let lapses = berth.lapses_so_far();
        let memory = Arc::new(());
        let mine = leave(berth, lapses.wrapping_sub(1), memory.clone());
        assert!(mine.is_err());
        assert!(leave(berth, lapses, memory.clone()).is_ok());
        drop(mine);
        free();
        assert_eq!(Arc::strong_count(&memory), 2, "it is kept");
        berth.one_more_lapse();
        free();
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
