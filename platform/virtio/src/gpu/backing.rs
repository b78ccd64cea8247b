//! The memory behind a picture: ranges of loans, in the order in which the picture's bytes lie in them.
//!
//! The order is the caller's. A picture that is stored bottom-up is shown right way up by listing its rows from the last to the
//! first; rows with padding are listed one by one without it. Nothing is copied.

use super::exchange::Message;
use super::table::Holds;
use crate::Error;
use crate::queue::{Access, MAX_PIECE, Part, Parts, check_loan};
use crate::spec::gpu::{CTRL_HDR_SIZE, MAX_BACKING_ENTRIES, MEM_ENTRY_SIZE};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{Coherent, Device, Lent};

/// Entries that fit behind the command in the queue's own memory. Longer lists get memory of their own.
const INLINE: usize = 6;

/// Bytes of the longest command.
pub(super) const HEADER_MAX: usize = CTRL_HDR_SIZE + 8 + INLINE * MEM_ENTRY_SIZE;

/// Where a picture's first row lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// At the lowest address.
    TopDown,
    /// At the highest, as in most BMP files.
    BottomUp,
}

/// What a picture is made of.
#[derive(Default)]
pub struct Backing {
    holds: Holds,
    /// Index in `holds`, and bytes of that loan.
    pieces: Vec<(usize, Range<u64>)>,
    len: u64,
}

impl Backing {
    /// Nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { holds: Vec::new(), pieces: Vec::new(), len: 0 }
    }

    /// All of one loan.
    ///
    /// # Errors
    ///
    /// As [`Backing::push`].
    pub fn whole<L: Lent>(loan: &Arc<L>) -> Result<Self, Error> {
        let mut backing = Self::new();
        backing.push(loan, 0..loan.len())?;
        Ok(backing)
    }

    /// `rows` rows of `row_bytes` bytes each, which begin `pitch` bytes apart in `loan`, the first in memory at byte `start`.
    ///
    /// # Errors
    ///
    /// As [`Backing::push`]; [`Error::TooLong`] if the rows pass the end of what can be counted.
    pub fn rows<L: Lent>(
        loan: &Arc<L>,
        start: u64,
        pitch: u64,
        row_bytes: u64,
        rows: u32,
        order: RowOrder,
    ) -> Result<Self, Error> {
        let mut backing = Self::new();
        for row in 0..rows {
            let row = match order {
                RowOrder::TopDown => row,
                RowOrder::BottomUp => rows - 1 - row,
            };
            let at = pitch.checked_mul(u64::from(row)).and_then(|at| at.checked_add(start)).ok_or(Error::TooLong)?;
            let end = at.checked_add(row_bytes).ok_or(Error::TooLong)?;
            backing.push(loan, at..end)?;
        }
        Ok(backing)
    }

    /// Appends bytes `range` of `loan`.
    ///
    /// # Errors
    ///
    /// [`Error::OutsideLoan`], [`Error::WrongDirection`], [`Error::OutOfMemory`], [`Error::TooManySegments`].
    pub fn push<L: Lent>(&mut self, loan: &Arc<L>, range: Range<u64>) -> Result<(), Error> {
        check_loan(&**loan, loan.device(), Access::Read, &range)?;
        if range.is_empty() {
            return Ok(());
        }
        let same = |held: &Arc<dyn Lent>| core::ptr::addr_eq(Arc::as_ptr(held), Arc::as_ptr(loan));
        let index = match self.holds.iter().position(same) {
            Some(index) => index,
            None => {
                self.holds.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                self.holds.push(loan.clone());
                self.holds.len() - 1
            }
        };
        let len = self.len.checked_add(range.end - range.start).ok_or(Error::TooLong)?;
        match self.pieces.last_mut() {
            // Goes on where the last one ended.
            Some((last, before)) if *last == index && before.end == range.start => before.end = range.end,
            _ => {
                if self.pieces.len() == MAX_BACKING_ENTRIES {
                    return Err(Error::TooManySegments { count: self.pieces.len() + 1, max: MAX_BACKING_ENTRIES });
                }
                self.pieces.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                self.pieces.push((index, range));
            }
        }
        self.len = len;
        Ok(())
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn into_holds(self) -> Holds {
        self.holds
    }

    /// The entries as the device is told them, neighbours merged.
    #[track_caller]
    pub(super) fn list(&self, device: &Device) -> Result<List, Error> {
        let mut parts = Vec::<Part>::new();
        for (index, range) in &self.pieces {
            // Every index was made from `holds`, which only grows.
            let Some(loan) = self.holds.get(*index) else { continue };
            check_loan(&**loan, device, Access::Read, range)?;
            for part in Parts::new(&**loan, range, MAX_PIECE)? {
                if let Some(last) = parts.last_mut()
                    && last.iova.checked_add(u64::from(last.len)) == Some(part.iova)
                    && let Some(len) = last.len.checked_add(part.len)
                {
                    last.len = len;
                    continue;
                }
                if parts.len() == MAX_BACKING_ENTRIES {
                    return Err(Error::TooManySegments { count: parts.len() + 1, max: MAX_BACKING_ENTRIES });
                }
                parts.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
                parts.push(part);
            }
        }
        if parts.len() <= INLINE {
            return Ok(List { parts, memory: None });
        }
        let memory = device.coherent_slice::<AtomicU64>(2 * parts.len())?;
        for (words, part) in memory.chunks_exact(2).zip(&parts) {
            if let [address, len] = words {
                address.store(part.iova.get().to_le(), Ordering::Relaxed);
                len.store(u64::from(part.len).to_le(), Ordering::Relaxed);
            }
        }
        Ok(List { parts, memory: Some(base::fallible::arc(memory).map_err(|_| Error::OutOfMemory)?) })
    }
}

/// A backing's entries, ready for the device.
pub(super) struct List {
    parts: Vec<Part>,
    /// Where the device reads them, if they do not fit the command.
    memory: Option<Arc<Coherent<[AtomicU64]>>>,
}

impl List {
    /// How many there are; at most [`MAX_BACKING_ENTRIES`].
    pub fn entries(&self) -> u32 {
        self.parts.len() as u32
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        (self.parts.len() * MEM_ENTRY_SIZE) as u64
    }

    pub fn memory(&self) -> Option<&Arc<Coherent<[AtomicU64]>>> {
        self.memory.as_ref()
    }

    /// Appends the entries to the command itself.
    pub fn push_to(&self, message: &mut Message) -> Result<(), Error> {
        for part in &self.parts {
            message.push64(part.iova.get())?.push(part.len)?.push(0)?;
        }
        Ok(())
    }
}
