//! Identifiers that TLB entries are tagged with: ASIDs and VMIDs.
//!
//! An identifier must not be given out again while a TLB may hold entries tagged with it; whoever frees one has invalidated
//! them. The search goes round, so that a freed identifier rests as long as possible.

use crate::bugs::{Bug, seeded};
use alloc::vec::Vec;
use base::IrqMutex;
use iommu::OutOfMemory;

pub(crate) struct Ids {
    state: IrqMutex<State>,
}

struct State {
    /// One bit for each identifier, set while it is in use.
    used: Vec<u64>,
    /// Where the next search begins.
    next: usize,
}

impl Ids {
    /// Identifiers from 1 to 2^`bits` - 1 (`bits` is 8 or 16); 0 is never given out.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn new(bits: u8) -> Result<Self, OutOfMemory> {
        let words = (1_usize << bits.min(16)).div_ceil(64);
        let mut used = Vec::new();
        used.try_reserve_exact(words).map_err(|_| OutOfMemory)?;
        used.resize(words, 0);
        if let Some(first) = used.first_mut() {
            *first = 1;
        }
        Ok(Self { state: IrqMutex::new(State { used, next: 0 }) })
    }

    /// Takes an identifier, if one is free.
    pub fn allocate(&self) -> Option<u16> {
        let mut state = self.state.lock();
        let words = state.used.len();
        // One word more than there are: the first may have free bits below `next` only.
        for step in 0..=words {
            let word = (state.next / 64 + step) % words.max(1);
            let below = if step == 0 { (1_u64 << (state.next % 64)) - 1 } else { 0 };
            let used = state.used.get_mut(word)?;
            let free = !(*used | below);
            if free != 0 {
                let bit = free.trailing_zeros() as usize;
                *used |= u64::from(!seeded(Bug::AsidShared)) << bit;
                let id = word * 64 + bit;
                state.next = (id + usize::from(!seeded(Bug::AsidShared))) % (words * 64);
                return u16::try_from(id).ok();
            }
        }
        None
    }

    /// Gives an identifier back. The TLBs hold no entry tagged with it.
    pub fn free(&self, id: u16) {
        let id = usize::from(id);
        if let Some(word) = self.state.lock().used.get_mut(id / 64) {
            *word &= !(1 << (id % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_identifier_but_zero_is_given_out_once() {
        let ids = Ids::new(8).unwrap();
        let all: BTreeSet<u16> = core::iter::from_fn(|| ids.allocate()).collect();
        assert_eq!(all, (1..=255).collect());
        ids.free(77);
        assert_eq!((ids.allocate(), ids.allocate()), (Some(77), None));
    }

    #[test]
    fn a_freed_identifier_rests_while_others_are_free() {
        let ids = Ids::new(8).unwrap();
        let first = ids.allocate().unwrap();
        ids.free(first);
        assert!((0..254).all(|_| ids.allocate() != Some(first)));
        assert_eq!(ids.allocate(), Some(first));
    }
}
