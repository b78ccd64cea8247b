//! Importers that let go: the memory behind a buffer can be exchanged under them.

#![expect(unsafe_code, reason = "replaces the store when nobody looks at it")]

use super::{Attachment, Attributes, Conflict, Inner, SharedBuffer, Store, count};
use crate::buffer::Spans;
use crate::error::BusyWith;
use crate::site::Site;
use crate::{Device, Direction, Error, PageSet, Rejected, view};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{Deadline, IrqMutex, fallible};
use core::fmt;
use core::mem;
use core::panic::Location;
use core::sync::atomic::{AtomicBool, Ordering};
use iommu::PhysRange;

/// Bytes that are copied at a time when a buffer moves.
const CHUNK: usize = 512;

/// Who has a buffer mapped and can do without for a while: a driver, or the address space of a process. Called without a lock.
pub trait Importer: Send + Sync {
    /// Takes the mapping away, or has it end with the work that is under way: [`SharedBuffer::relocate`] waits for that.
    fn let_go(&self);
    /// May map again: the buffer has been moved, or stays where it is after all.
    fn moved(&self) {}
}

/// What an address space that is no device's maps: the buffer's memory, kept alive and where it is until this is dropped. Whoever
/// maps it drops it after no access by that mapping is possible any more.
pub struct Extents {
    pub(super) buffer: Arc<Inner>,
}

impl Extents {
    /// The physical extents, in the order of the buffer's bytes; whole pages.
    pub fn runs(&self) -> &[PhysRange] {
        self.buffer.store_of_user().spans_runs()
    }

    /// How they are to be mapped: other attributes would see other bytes.
    pub fn attributes(&self) -> Attributes {
        self.buffer.store_of_user().attributes()
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.buffer.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer.
    pub fn buffer(&self) -> SharedBuffer {
        SharedBuffer(self.buffer.clone())
    }
}

impl Drop for Extents {
    fn drop(&mut self) {
        self.buffer.leave(|users| users.spaces -= 1);
    }
}

impl fmt::Debug for Extents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extents({}, {:?} {:?})", self.buffer.name, self.attributes(), self.runs())
    }
}

impl SharedBuffer {
    /// Where the buffer is, for an address space that is no device's. Accesses through it are ordered with devices and others by
    /// [`SharedBuffer::cpu_access_by`], begun and ended by whoever the address space belongs to.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while it is being moved.
    pub fn extents(&self) -> Result<Extents, Error> {
        self.0.enter(|users| {
            users.check_moving()?;
            count(&mut users.spaces)
        })?;
        Ok(Extents { buffer: self.0.clone() })
    }

    /// Has `importer` told when the buffer is to be moved, for as long as it lives.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn tell(&self, importer: Weak<dyn Importer>) -> Result<(), Error> {
        let mut state = self.0.state.lock();
        // A weak reference is freed with a strong one that is dropped elsewhere, or here: it has memory only.
        state.importers.retain(|known| known.strong_count() != 0);
        state.importers.try_reserve(1)?;
        state.importers.push(importer);
        Ok(())
    }

    /// Imports the buffer for `device`, which has it only while it is mapped ([`Import::map`]) and lets go of it when the buffer
    /// moves. `driver`, if there is one, is told too, before and after.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    #[track_caller]
    pub fn import<D: Direction>(
        &self,
        device: &Device,
        driver: Option<Weak<dyn Importer>>,
    ) -> Result<Import<D>, Error> {
        let (mapping, wanted) = (IrqMutex::new(None), AtomicBool::new(false));
        let member =
            Member { buffer: self.clone(), device: device.clone(), mapping, wanted, driver, site: Location::caller() };
        let member = fallible::arc(member).map_err(|_| Error::OutOfMemory)?;
        let weak: Weak<Member<D>> = Arc::downgrade(&member);
        self.tell(weak)?;
        Ok(Import(member))
    }

    /// Moves the buffer's contents to `pages`, and returns the pages that it had. Tells importers to let go, waits until nobody has
    /// it any more, copies, and lets them come back.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives `pages` back: [`Error::Busy`] while it is being moved already, and with who has it attached, is at work
    /// on it or accesses it at `deadline`; [`Error::Immovable`] where it is not made of pages; [`Error::BadSize`] for another size.
    pub fn relocate(&self, pages: PageSet, deadline: Deadline) -> Result<PageSet, Rejected<PageSet>> {
        let mut pages = pages;
        match self.try_relocate(&mut pages, deadline) {
            Ok(()) => Ok(pages),
            Err(error) => Err(Rejected { buffer: pages, error }),
        }
    }

    fn try_relocate(&self, pages: &mut PageSet, deadline: Deadline) -> Result<(), Error> {
        if !self.is_pages() {
            return Err(Error::Immovable(self.0.name.clone()));
        }
        if pages.len() != self.len() {
            return Err(Error::BadSize(pages.len()));
        }
        let moving = Moving::begin(&self.0)?;
        moving.importers.iter().for_each(|importer| importer.let_go());
        if self.0.wait_until(deadline, |users| !users.is_used()).is_err() {
            let users = self.users();
            return Err(self.0.busy(match users {
                _ if users.device_writers != 0 => BusyWith::DeviceWrites,
                _ if users.cpu_writers != 0 => BusyWith::CpuWrites,
                _ if users.cpu_readers != 0 => BusyWith::CpuReads,
                _ => BusyWith::Mapped,
            }));
        }
        {
            // SAFETY: `moving` is set and nobody is counted: nobody else replaces the store.
            let store = unsafe { &*self.0.store.get() };
            let mut chunk = [0; CHUNK];
            for at in (0..self.len()).step_by(CHUNK) {
                view::read(store, at, &mut chunk)?;
                pages.write_at(at, &chunk)?;
            }
        }
        let looking = self.0.state.lock();
        // SAFETY: nobody is counted, so that nobody looks at the store (invariant), nor will; who asks what it is made of looks under
        // the lock only, and keeps no reference.
        if let Store::Pages(old) = unsafe { &mut *self.0.store.get() } {
            mem::swap(old, pages);
        }
        drop(looking);
        drop(moving);
        Ok(())
    }
}

/// The right to move a buffer, and the duty to let its users come back.
struct Moving<'a> {
    buffer: &'a Inner,
    importers: Vec<Arc<dyn Importer>>,
}

impl<'a> Moving<'a> {
    fn begin(buffer: &'a Inner) -> Result<Self, Error> {
        let mut importers = Vec::new();
        buffer.admit(|state| {
            state.users.check_moving()?;
            importers.try_reserve_exact(state.importers.len()).map_err(|_| Conflict::OutOfMemory)?;
            importers.extend(state.importers.iter().filter_map(Weak::upgrade));
            state.users.moving = true;
            Ok(())
        })?;
        Ok(Self { buffer, importers })
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.buffer.leave(|users| users.moving = false);
        self.importers.iter().for_each(|importer| importer.moved());
    }
}

struct Member<D: Direction> {
    buffer: SharedBuffer,
    device: Device,
    mapping: IrqMutex<Option<Arc<Attachment<D>>>>,
    /// It was mapped when it had to let go.
    wanted: AtomicBool,
    driver: Option<Weak<dyn Importer>>,
    site: Site,
}

impl<D: Direction> Member<D> {
    fn map(&self) -> Result<Arc<Attachment<D>>, Error> {
        if let Some(mapping) = self.mapping.lock().as_ref() {
            return Ok(mapping.clone());
        }
        let made = self.buffer.attach_at::<D>(&self.device, self.site)?;
        let made = fallible::arc(made).map_err(|_| Error::OutOfMemory)?;
        loop {
            let mut mapping = self.mapping.lock();
            if let Some(other) = mapping.as_ref() {
                // Somebody else was faster; what was made goes when the lock has gone.
                let other = other.clone();
                drop(mapping);
                return Ok(other);
            }
            *mapping = Some(made.clone());
            drop(mapping);
            if !self.is_moving() || !self.let_go_again() {
                return Ok(made);
            }
        }
    }

    fn is_moving(&self) -> bool {
        self.buffer.0.state.lock().users.moving
    }

    /// Gives up what was stored while the buffer was told to move: nobody may have seen it, and the move would wait for it. Who mapped it
    /// has it as work under way. Returns whether the move is over without it, so that it is to be stored anew.
    #[cold]
    fn let_go_again(&self) -> bool {
        let Some(mapping) = self.unmap() else { return false };
        self.wanted.store(true, Ordering::Relaxed);
        drop(mapping);
        // A move that is not over will see that it is wanted; of one that is, somebody has to take it back.
        !self.is_moving() && self.wanted.swap(false, Ordering::Relaxed)
    }

    fn unmap(&self) -> Option<Arc<Attachment<D>>> {
        self.mapping.lock().take()
    }

    fn driver(&self) -> Option<Arc<dyn Importer>> {
        self.driver.as_ref()?.upgrade()
    }
}

impl<D: Direction> Importer for Member<D> {
    fn let_go(&self) {
        if let Some(driver) = self.driver() {
            driver.let_go();
        }
        // (Never back to false: somebody who came late may have let go already.)
        if self.unmap().is_some() {
            self.wanted.store(true, Ordering::Relaxed);
        }
    }

    fn moved(&self) {
        if self.wanted.swap(false, Ordering::Relaxed)
            && let Err(error) = self.map()
        {
            // It is mapped when it is asked for, then.
            log::debug!("{}: {} is not mapped again: {error}", self.device.name(), self.buffer.name());
        }
        if let Some(driver) = self.driver() {
            driver.moved();
        }
    }
}

/// A device's interest in a buffer. Clones are the same; when the last is dropped the mapping ends with the work under way.
#[derive(Clone)]
pub struct Import<D: Direction>(Arc<Member<D>>);

impl<D: Direction> Import<D> {
    /// Maps the buffer for the device, or returns the mapping that there is. The buffer stays where it is until all that have the
    /// result have dropped it and [`Import::unmap`] was called, or it was told to let go.
    ///
    /// # Errors
    ///
    /// As [`SharedBuffer::attach`]; [`Error::Busy`] while the buffer is being moved.
    pub fn map(&self) -> Result<Arc<Attachment<D>>, Error> {
        self.0.map()
    }

    /// As [`Import::map`], and waits while the buffer is being moved or the CPU has an access that conflicts.
    ///
    /// # Errors
    ///
    /// As [`Import::map`], after `deadline`.
    pub fn map_by(&self, deadline: Deadline) -> Result<Arc<Attachment<D>>, Error> {
        loop {
            let before = self.0.buffer.users();
            match self.0.map() {
                Err(error @ Error::Busy { .. }) => {
                    self.0.buffer.0.wait_until(deadline, |users| *users != before).map_err(|_| error)?;
                }
                result => return result,
            }
        }
    }

    /// Lets go of the mapping. It ends when nobody else has it any more.
    pub fn unmap(&self) {
        drop(self.0.unmap());
    }

    /// Whether the device has it mapped.
    pub fn is_mapped(&self) -> bool {
        self.0.mapping.lock().is_some()
    }

    /// The buffer.
    pub fn buffer(&self) -> &SharedBuffer {
        &self.0.buffer
    }
}

impl<D: Direction> fmt::Debug for Import<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mapped = if self.is_mapped() { "mapped" } else { "not mapped" };
        write!(f, "Import({} by {}, {mapped})", self.0.buffer.name(), self.0.device.name())
    }
}
