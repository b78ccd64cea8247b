//! What a process has together with others: shared buffers, events, and memory that is always there.
//!
//! # Invariants
//!
//! - What is put by says with which rights; a process gets no more.
//! - The memory of a shared buffer is in the tables only within an access that has begun. The access ends when the tables have let
//!   go of the memory: by [`Opened::end`], by the end of the handle, or of the process. Where they do not let go, it does not end.
//!
//! A device that walks the process's tables (`abi::Mode::Shared`) sees what the process sees, with the same rights and as long: the
//! tables let go for both before an access ends.

use crate::contract::Extent;
use crate::event::Event;
use crate::space::{Space, Whose, pages, prot};
use crate::{Error, Process};
use abi::{ALIGNMENT_MAX, PAGE, Rights};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::Instant;
use base::{Deadline, fallible};
use dma::SharedBuffer;
use iommu::IovaRange;

/// What was put by for a process, each kind numbered from 0 on.
#[derive(Default)]
pub(crate) struct PutBy {
    buffers: Vec<(SharedBuffer, Rights)>,
    events: Vec<Arc<Event>>,
    memory: Vec<(Arc<dyn Extent>, Rights)>,
}

/// The one with this number.
fn numbered<T>(list: &[T], number: u64) -> Result<&T, Error> {
    usize::try_from(number).ok().and_then(|index| list.get(index)).ok_or(Error::NotPutBy(number))
}

/// Adds one, and says its number.
fn put<T>(list: &mut Vec<T>, one: T) -> Result<u64, Error> {
    list.try_reserve(1)?;
    list.push(one);
    Ok(list.len() as u64 - 1)
}

/// Checks that `wanted` is no more than `given`.
fn within(wanted: Rights, given: Rights) -> Result<(), Error> {
    if wanted & !given == 0 { Ok(()) } else { Err(Error::BadRights(wanted)) }
}

impl Process {
    /// Puts a buffer by for the process, which may open it under the number that is returned, any number of times, and have it with no
    /// more than `rights`.
    ///
    /// # Errors
    ///
    /// [`Error::BadRights`], [`Error::OutOfMemory`].
    pub fn share(&mut self, buffer: SharedBuffer, rights: Rights) -> Result<u64, Error> {
        prot(rights)?;
        put(&mut self.put_by.buffers, (buffer, rights))
    }

    /// Puts an event by for the process, which may open it under the number that is returned, wait for it and raise it.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn put_event(&mut self, event: Arc<Event>) -> Result<u64, Error> {
        put(&mut self.put_by.events, event)
    }

    /// Puts memory by for the process that others have too, all the time: memory that is coherent for a device, say. The process may map
    /// it under the number that is returned, with no more than `rights`.
    ///
    /// # Errors
    ///
    /// [`Error::BadRights`], [`Error::OutOfMemory`].
    pub fn put_memory(&mut self, memory: Arc<dyn Extent>, rights: Rights) -> Result<u64, Error> {
        prot(rights)?;
        if rights & abi::WRITE != 0 && !memory.writable() {
            return Err(Error::BadRights(rights));
        }
        put(&mut self.put_by.memory, (memory, rights))
    }
}

impl PutBy {
    /// Opens the buffer with this number.
    pub fn buffer(&self, number: u64) -> Result<Opened, Error> {
        let (buffer, rights) = numbered(&self.buffers, number)?;
        Ok(Opened { buffer: buffer.clone(), rights: *rights, at: None })
    }

    /// The event with this number.
    pub fn event(&self, number: u64) -> Result<Arc<Event>, Error> {
        numbered(&self.events, number).cloned()
    }

    /// Maps the memory with this number.
    pub fn map(&self, space: &mut Space, number: u64, rights: Rights) -> Result<u64, Error> {
        let (memory, given) = numbered(&self.memory, number)?;
        let prot = prot(rights)?;
        within(rights, *given)?;
        space.map(memory.clone(), prot, Whose::Others)
    }

    /// Bytes of the memory with this number.
    pub fn memory_size(&self, number: u64) -> Result<u64, Error> {
        numbered(&self.memory, number).map(|(memory, _)| memory.len())
    }
}

/// A shared buffer that a process has opened.
#[derive(Debug)]
pub(crate) struct Opened {
    buffer: SharedBuffer,
    rights: Rights,
    /// The addresses that were set aside for it.
    at: Option<IovaRange>,
}

impl Opened {
    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.buffer.len()
    }

    /// Sets addresses aside, which belong to `handle`.
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`] for what is no alignment; [`Error::Overlap`] where they have been; as [`Space::set_aside`].
    pub fn map(&mut self, space: &mut Space, handle: u64, alignment: u64) -> Result<u64, Error> {
        if !alignment.is_power_of_two() || !(PAGE..=ALIGNMENT_MAX).contains(&alignment) {
            return Err(Error::Misaligned(alignment));
        }
        if let Some(at) = self.at {
            return Err(Error::Overlap(at));
        }
        let start = space.set_aside(self.len(), alignment, handle)?;
        self.at = Some(pages(start, self.len())?);
        Ok(start)
    }

    /// The addresses that were set aside.
    fn place(&self) -> Result<IovaRange, Error> {
        self.at.ok_or(Error::NotMapped(IovaRange::default()))
    }

    /// Begins an access. Waits until `deadline`, and not after the process was told to stop. Returns nanoseconds.
    ///
    /// # Errors
    ///
    /// [`Error::BadRights`], [`Error::NotMapped`] without addresses, [`Error::Busy`] within an access, [`Error::Dma`] with who was
    /// in the way, and as [`Space::fill`].
    pub fn begin(
        &mut self,
        space: &mut Space,
        rights: Rights,
        deadline: Deadline,
        stopped: &dyn Fn() -> bool,
    ) -> Result<u64, Error> {
        let prot = prot(rights)?;
        within(rights, self.rights)?;
        let at = self.place()?;
        if space.is_filled(at) {
            return Err(Error::Busy);
        }
        let begun = Instant::now();
        let access = self.buffer.access_from_space(rights & abi::WRITE != 0, deadline, stopped)?;
        let waited = begun.elapsed();
        let access = fallible::arc(access).map_err(|_| Error::OutOfMemory)?;
        space.fill(at, access, prot)?;
        Ok(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Ends an access.
    ///
    /// # Errors
    ///
    /// [`Error::NotMapped`] where none has begun; [`Error::Revoke`] where the tables do not let go of the memory: then the access
    /// lasts for ever, and the addresses are not used again.
    pub fn end(&mut self, space: &mut Space) -> Result<(), Error> {
        space.empty(self.place()?)
    }
}
