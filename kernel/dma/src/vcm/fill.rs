//! Buffers made of chunks.

use crate::memory::DmaMemory;
use crate::{Error, Ladder, PageSet, SharedBuffer};
use alloc::vec::Vec;
use core::fmt;
use iommu::PAGE_SIZE;

/// What a buffer is made of: sizes in bytes, the largest first, and how many chunks there are of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunks(Vec<(u64, u64)>);

impl Chunks {
    fn of(set: &PageSet, ladder: Ladder) -> Result<Self, Error> {
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(ladder.sizes().len() + 1)?;
        let smallest = (!ladder.sizes().contains(&PAGE_SIZE)).then_some(PAGE_SIZE);
        chunks.extend(ladder.sizes().iter().copied().chain(smallest).map(|size| (size, 0)));
        for chunk in set.chunks() {
            if let Some((_, count)) = chunks.iter_mut().find(|(size, _)| *size == chunk.len() as u64) {
                *count += 1;
            }
        }
        Ok(Self(chunks))
    }

    /// Sizes in bytes, and how many chunks there are of each: all of the ladder's, the largest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().copied()
    }

    /// How many chunks there are.
    pub fn count(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }
}

impl fmt::Display for Chunks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (size, count)) in self.0.iter().enumerate() {
            write!(f, "{}{count} x {} KiB", if index == 0 { "" } else { ", " }, size >> 10)?;
        }
        Ok(())
    }
}

/// Makes a zeroed buffer of `length` bytes, rounded up to pages, of chunks of `ladder`, each aligned to its size: as many of the
/// largest as there are, then of the next. Says what it got.
///
/// # Errors
///
/// [`Error::OutOfMemory`], [`Error::BadSize`].
pub fn fill(
    name: &str,
    memory: &'static dyn DmaMemory,
    length: u64,
    ladder: Ladder,
) -> Result<(SharedBuffer, Chunks), Error> {
    let set = PageSet::zeroed(memory, length, ladder)?;
    let chunks = Chunks::of(&set, ladder)?;
    Ok((SharedBuffer::try_new(name, set)?, chunks))
}
