//! What a mapping is made of: for reports.

use super::{LAST, PageTable, descriptor};
use crate::IovaRange;
use core::fmt;
use core::sync::atomic::Ordering;

/// Leaves by their size, in bytes, the largest first; places that are not used have a size of 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaves {
    /// How many there are of a size.
    pub by_size: [(u64, u64); 4],
    /// Leaves of any size that carry the Contiguous bit.
    pub contiguous: u64,
}

impl Leaves {
    /// Counts one more.
    pub fn add(&mut self, size: u64, contiguous: bool) {
        self.contiguous += u64::from(contiguous);
        if let Some((_, count)) = self.by_size.iter_mut().find(|(known, _)| *known == size) {
            *count += 1;
            return;
        }
        if let Some(free) = self.by_size.iter_mut().find(|(known, _)| *known == 0) {
            *free = (size, 1);
        }
        self.by_size.sort_unstable_by_key(|(size, _)| core::cmp::Reverse(*size));
    }

    /// How many there are of `size` bytes.
    pub fn of(&self, size: u64) -> u64 {
        self.by_size.iter().find(|(known, _)| *known == size).map_or(0, |(_, count)| *count)
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.by_size.iter().map(|(_, count)| count).sum()
    }
}

impl fmt::Display for Leaves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (size, count) in self.by_size.iter().filter(|(size, _)| *size != 0) {
            write!(f, "{count} of {size:#x}, ")?;
        }
        write!(f, "{} contiguous", self.contiguous)
    }
}

impl PageTable {
    /// Counts the leaves that map a byte of `range`.
    pub fn leaves(&self, range: IovaRange) -> Leaves {
        let mut leaves = Leaves::default();
        let end = range.end().get().min(self.geometry.input_end());
        let mut at = range.start().get();
        while at < end {
            let (level, entry) = match self.leaf_table(at) {
                Some(node) => (LAST, node.entry(self.geometry.index(LAST, at)).load(Ordering::Acquire)),
                None => {
                    let place = self.place(at);
                    (place.level, place.node.entry(place.index).load(Ordering::Acquire))
                }
            };
            let size = self.geometry.level(level).size();
            if descriptor::is_leaf(entry, level) {
                leaves.add(size, descriptor::is_contiguous(entry));
            }
            // An entry of size 2^n: to the next multiple.
            at = (at | (size - 1)).saturating_add(1);
        }
        leaves
    }
}
