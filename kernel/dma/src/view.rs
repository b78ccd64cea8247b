//! Looking at memory that a device has (rule R4).
//!
//! A view copies in and out by atomic accesses and never makes a reference, so it is sound however the device behaves. What
//! it shows may change at any moment. See [`crate::copy`] for what is never torn.

#![expect(unsafe_code, reason = "copies memory that a device may be using")]

use crate::bounce::Bounced;
use crate::buffer::{Spans, for_each_span};
use crate::{DeviceReads, DeviceWrites, Direction, Error, copy};
use core::marker::PhantomData;

/// Access of the CPU to memory that a device has, in direction `D`: [`View::read`] where the device writes, [`View::write`]
/// where it reads. Lives no longer than the borrow of the mapping.
pub struct View<'a, D: Direction, M: Spans> {
    memory: &'a M,
    /// What the device has in its place.
    copy: Option<&'a Bounced>,
    direction: PhantomData<D>,
}

impl<'a, D: Direction, M: Spans> View<'a, D, M> {
    /// For memory whose references are all gone: it is owned by a loan.
    #[inline]
    pub(crate) fn new(memory: &'a M) -> Self {
        Self::of(memory, None)
    }

    /// For memory of which the device may have a `copy`.
    #[inline]
    pub(crate) fn of(memory: &'a M, copy: Option<&'a Bounced>) -> Self {
        Self { memory, copy, direction: PhantomData }
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.memory.spans_len()
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<D: DeviceWrites, M: Spans> View<'_, D, M> {
    /// Copies the bytes from `offset` on to `to`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        match self.copy {
            None => read(self.memory, offset, to),
            Some(copy) => read(copy, offset, to),
        }
    }

    /// The `N` bytes at `offset`, in one access where they are a naturally aligned field.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`].
    pub fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

impl<D: DeviceReads, M: Spans> View<'_, D, M> {
    /// Copies `from` to the bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        match self.copy {
            None => write(self.memory, offset, from),
            // The buffer too: so it comes back the same whoever had what.
            Some(copy) => write(self.memory, offset, from).and_then(|()| write(copy, offset, from)),
        }
    }
}

/// Copies out of memory that no reference points into.
#[inline]
pub(crate) fn read<M: Spans>(memory: &M, offset: u64, to: &mut [u8]) -> Result<(), Error> {
    let mut done = 0;
    for_each_span(memory, offset, to.len() as u64, |span| {
        let Some(now) = to.get_mut(done..) else { return };
        // SAFETY: the span is valid as long as `memory` (contract of Spans), whose bytes are reached through this module and
        // by devices only: views exist of memory that a loan or a shared buffer owns, and those make no references.
        unsafe { copy::load(span, now) };
        done += span.bytes;
    })
}

/// Copies into memory that no reference points into.
#[inline]
pub(crate) fn write<M: Spans>(memory: &M, offset: u64, from: &[u8]) -> Result<(), Error> {
    let mut done = 0;
    for_each_span(memory, offset, from.len() as u64, |span| {
        let Some(now) = from.get(done..) else { return };
        // SAFETY: as for `read`.
        unsafe { copy::store(span, now) };
        done += span.bytes;
    })
}
