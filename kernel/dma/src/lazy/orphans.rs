//! Memory whose tokens were dropped before its mapping was revoked.
//!
//! Each array of berths has a list, and each flush frees what was left to it before it says that it is done: what lapsed on its core, which
//! nobody else flushes meanwhile.
//!
//! # Locking
//!
//! One [`IrqMutex`], held to put in one or take out one. Whoever puts one in looks under it whether the mapping is over, and whoever
//! flushes says that it is before he takes any out: so none stays behind. A place stays what it is while others are taken out.

use super::erased::Erased;
use crate::Error;
use crate::berth::Berth;
use alloc::vec::Vec;
use base::IrqMutex;
use core::mem;

/// Of each device. (One more is kept by who drops the token, until it is over.)
const ROOM: usize = 128;

struct Orphan {
    berth: &'static Berth,
    lapses: u64,
    /// On which core the mapping lapsed.
    core: usize,
    memory: Erased,
}

/// What dropped tokens have left.
pub(crate) struct Orphans(IrqMutex<Vec<Option<Orphan>>>);

impl Orphans {
    /// None, with room for [`ROOM`].
    pub(crate) fn new() -> Result<Self, Error> {
        let mut all = Vec::new();
        all.try_reserve_exact(ROOM)?;
        Ok(Self(IrqMutex::new(all)))
    }

    /// Leaves memory to the flush that will revoke what lapsed in `berth` after `lapses` others. Gives it back if that is over, if there is
    /// no room, or for memory that cannot be kept here.
    pub(super) fn leave<M: Send + 'static>(&self, berth: &'static Berth, lapses: u64, memory: M) -> Result<(), M> {
        let mut all = self.0.lock();
        // First: it is the core of that lapse if the lapse is not over.
        let core = berth.lapsed_on();
        if berth.is_revoked(lapses) || berth.is_lost() {
            return Err(memory);
        }
        let place = match all.len() < ROOM {
            true => None,
            false => match all.iter_mut().find(|place| place.is_none()) {
                Some(place) => Some(place),
                None => return Err(memory),
            },
        };
        let orphan = Some(Orphan { berth, lapses, core, memory: Erased::new(memory)? });
        match place {
            Some(place) => *place = orphan,
            // There is room: nothing is allocated.
            None => all.push(orphan),
        }
        Ok(())
    }

    /// Frees what lapsed on a core and has been revoked. What could not be is kept for ever.
    pub(crate) fn free(&self, core: usize) {
        while let Some((revoked, memory)) = self.take(core) {
            match revoked {
                true => drop(memory),
                false => mem::forget(memory),
            }
        }
    }

    /// Takes out one that is over, and says whether it was revoked.
    fn take(&self, core: usize) -> Option<(bool, Erased)> {
        let mut all = self.0.lock();
        let found = all.iter_mut().rev().find_map(|place| {
            let Orphan { berth, lapses, .. } = place.as_ref().filter(|orphan| orphan.core == core)?;
            let revoked = berth.is_revoked(*lapses);
            (revoked || berth.is_lost()).then(|| place.take().map(|orphan| (revoked, orphan.memory)))?
        });
        while let Some(None) = all.last() {
            all.pop();
        }
        found
    }
}

#[cfg(all(test, feature = "fakes"))]
mod tests {
    use super::*;
    use crate::berth::Berths;
    use crate::fakes::{FakeDevice, FakeSystem};
    use alloc::sync::Arc;
    use alloc::vec;

    fn berths() -> Arc<Berths> {
        let FakeDevice { domain, .. } = FakeSystem::new().device("disk").unwrap();
        Berths::new(domain, "disk".into()).unwrap()
    }

    /// Caught: memory that is taken in when its mapping is over, for a flush that has been.
    #[test]
    fn what_is_over_is_not_taken_in() {
        let berths = berths();
        let berth = berths.berth(1);
        berth.has_lapsed_on(0);
        let (orphans, lapses) = (Orphans::new().unwrap(), berth.lapses_so_far());
        let memory = Arc::new(());
        let mine = orphans.leave(berth, lapses.wrapping_sub(1), memory.clone());
        assert!(mine.is_err());
        assert!(orphans.leave(berth, lapses, memory.clone()).is_ok());
        drop(mine);
        orphans.free(0);
        assert_eq!(Arc::strong_count(&memory), 2, "it is kept");
        berth.one_more_lapse();
        orphans.free(0);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    /// Caught: another core's that is freed, whose flush may say that it is done before that has happened; what moves while another
    /// core's is taken out; room that does not come back.
    #[test]
    fn each_core_frees_what_was_left_to_it_and_nothing_else() {
        let berths = berths();
        let orphans = Orphans::new().unwrap();
        for round in 0..3 {
            let memory: Vec<_> = (0..ROOM).map(Arc::new).collect();
            let left: Vec<_> = memory.iter().map(|memory| (berths.berth(**memory as u32 + 1), memory)).collect();
            for (berth, memory) in &left {
                berth.has_lapsed_on(***memory % 3);
                assert!(orphans.leave(berth, berth.lapses_so_far(), (*memory).clone()).is_ok());
            }
            let more = berths.berth(ROOM as u32 + 1);
            assert!(orphans.leave(more, more.lapses_so_far(), memory[0].clone()).is_err(), "there is no room");
            let free = |core| {
                orphans.free(core);
                memory
                    .iter()
                    .filter(|memory| Arc::strong_count(memory) == 1)
                    .map(|memory| **memory % 3)
                    .collect::<Vec<_>>()
            };
            let of = |cores: &[usize]| {
                (0..ROOM).map(|number| number % 3).filter(|core| cores.contains(core)).collect::<Vec<_>>()
            };
            assert_eq!(free(0), vec![], "none is over");
            left.iter().for_each(|(berth, _)| berth.one_more_lapse());
            let [first, second, third] = [[0, 1, 2], [1, 2, 0], [2, 1, 0]][round];
            assert_eq!(free(first), of(&[first]));
            // The places that have become free are used.
            let again = berths.berth(ROOM as u32 + 2);
            again.has_lapsed_on(second);
            let kept = Arc::new(());
            assert!(orphans.leave(again, again.lapses_so_far(), kept.clone()).is_ok());
            assert_eq!(free(second), of(&[first, second]));
            assert_eq!(free(third), of(&[0, 1, 2]));
            assert_eq!(Arc::strong_count(&kept), 2);
            again.one_more_lapse();
            orphans.free(second);
            assert_eq!((Arc::strong_count(&kept), orphans.0.lock().len()), (1, 0));
        }
    }
}
