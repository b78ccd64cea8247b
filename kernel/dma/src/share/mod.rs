//! Buffers that several devices have at once: a device-independent buffer, mapped for each importer in its own address space.
//!
//! An [`Exporter`] has the memory; importers [`SharedBuffer::attach`] it: each gets it at an address of its own, with its own
//! limits and the rights of its direction. The CPU looks at it between [`SharedBuffer::cpu_access`] and the end of that; other
//! address spaces map its [`Extents`], or have it for the length of a [`SpaceAccess`].
//!
//! # Who may do what at a time
//!
//! Between devices and the CPU there is a rule, and breaking it is an error or a wait with a deadline, never a silent race: the CPU
//! has no access while a device may write, and a device gets no access that conflicts with one of the CPU's. The CPU may write
//! while devices only may read, but not while one of them is at work: by atomic copies, which a device sees whole or not at all,
//! field by field.
//!
//! What devices *do*, as opposed to what they may, is a [`Job`]: from its beginning until the queue has let go of it there is a fence
//! in the buffer, exclusive if the device writes, else shared. Whoever begins something that conflicts waits for it, without a
//! word from the driver that began it: so a display's reading waits for the disk's writing. See [`Job`] for several buffers
//! at a time.
//!
//! # Moving
//!
//! [`SharedBuffer::relocate`] gives a buffer other memory. Who has it attached keeps it where it is; an [`Import`] is told to let go,
//! and maps it anew afterwards. So does any other [`Importer`], such as the address space of a process.
//!
//! # Invariants
//!
//! Who looks at the store is counted in [`Users`]; it is replaced only while `moving` is set, nobody is counted, and so nobody can
//! come to be counted.
//!
//! # Locking
//!
//! One [`IrqMutex`] for each buffer, a leaf but for the heap's: who uses the buffer, jobs, importers. It is not held while mapping,
//! revoking, waiting, copying, or calling an importer or a [`Watch`].

#![expect(unsafe_code, reason = "shows the memory to those who are counted, and replaces it when nobody is")]

mod access;
mod attachment;
mod coherent;
mod import;
mod job;
mod remap;
mod space;
mod store;

pub use access::{CpuAccess, CpuIntent, CpuReads, CpuWrites};
pub use attachment::Attachment;
pub(crate) use attachment::{DeviceUser, supplied, synced};
pub use coherent::CoherentPages;
pub use import::{Extents, Import, Importer};
pub(crate) use job::Synced;
pub use job::{Fence, Job, Turn, Watch};
pub use remap::{Remapped, TILE, TileView, Tiles};
pub use space::SpaceAccess;
pub use store::{Attributes, CarvedOut, Exporter};

use crate::error::BusyWith;
use crate::{Error, PageSet, Rejected};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{Deadline, IrqMutex, TimedOut, fallible, wait_until};
use core::cell::UnsafeCell;
use core::fmt;
use job::{FenceState, Jobs};
pub(crate) use store::Store;

/// Memory that several devices may have at once. Clones are the same buffer.
#[derive(Clone)]
pub struct SharedBuffer(Arc<Inner>);

/// # Invariants
///
/// - Nobody makes a reference into the store's memory (only [`SharedBuffer::into_pages`] takes it out, alone).
/// - See the module for when `store` is looked at and replaced. `len` stays.
pub struct Inner {
    name: Arc<str>,
    len: u64,
    store: UnsafeCell<Store>,
    state: IrqMutex<State>,
}

// SAFETY: the store is Send and Sync, and replaced only while nobody looks at it (invariant).
unsafe impl Sync for Inner {}

#[derive(Default)]
pub(crate) struct State {
    users: Users,
    jobs: Jobs,
    importers: Vec<Weak<dyn Importer>>,
    /// Who waits for users to leave.
    waiting: u32,
}

/// Who uses a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Devices that may read, and no more.
    pub device_readers: u32,
    /// Devices that may write.
    pub device_writers: u32,
    /// Those among the writers that write a copy, which becomes the buffer's contents when they are done: one at most, and no
    /// other writer beside it.
    pub copied_writers: u32,
    /// Devices of either kind that do not snoop the caches.
    pub unsnooping: u32,
    /// Accesses of the CPU that read.
    pub cpu_readers: u32,
    /// Accesses of the CPU that write: one at most.
    pub cpu_writers: u32,
    /// Address spaces of other kinds that have it.
    pub spaces: u32,
    /// Whether it is being moved: nobody comes to use it.
    pub moving: bool,
}

impl Users {
    fn is_used(&self) -> bool {
        self.device_readers | self.device_writers | self.cpu_readers | self.cpu_writers | self.spaces != 0
    }

    #[inline]
    fn check_moving(&self) -> Result<(), BusyWith> {
        if self.moving { Err(BusyWith::Moving) } else { Ok(()) }
    }
}

/// Why somebody is not let in.
pub(crate) enum Conflict {
    Users(BusyWith),
    Job(Arc<FenceState>),
    /// Work has failed, of which nobody knew.
    Failed,
    OutOfMemory,
}

impl From<BusyWith> for Conflict {
    fn from(by: BusyWith) -> Self {
        Self::Users(by)
    }
}

impl SharedBuffer {
    /// Makes `pages` shareable. The `name` is for errors and reports.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the pages back where there is no memory for the handle.
    pub fn try_new(name: &str, pages: PageSet) -> Result<Self, Rejected<PageSet>> {
        let Some(name) = fallible::text(name) else {
            return Err(Rejected { buffer: pages, error: Error::OutOfMemory });
        };
        let len = pages.len();
        let (store, state) = (UnsafeCell::new(Store::Pages(pages)), IrqMutex::default());
        match fallible::arc(Inner { name, len, store, state }) {
            Ok(inner) => Ok(Self(inner)),
            Err(Inner { store, .. }) => match store.into_inner() {
                Store::Pages(pages) => Err(Rejected { buffer: pages, error: Error::OutOfMemory }),
                Store::Other { .. } => unreachable!("it was made of pages"),
            },
        }
    }

    /// As [`SharedBuffer::try_new`], for tests and the like: ends the program where there is no memory for the handle.
    pub fn new(name: &str, pages: PageSet) -> Self {
        let len = pages.len();
        let (store, state) = (UnsafeCell::new(Store::Pages(pages)), IrqMutex::default());
        Self(Arc::new(Inner { name: name.into(), len, store, state }))
    }

    /// A buffer of this store, not empty.
    fn of(name: Arc<str>, store: Store) -> Result<Self, Error> {
        let len = crate::buffer::Spans::spans_len(&store);
        let inner = fallible::arc(Inner { name, len, store: UnsafeCell::new(store), state: IrqMutex::default() });
        inner.map(Self).map_err(|_| Error::OutOfMemory)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The size in bytes, a multiple of the page size.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether there is no byte: never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Who uses it at this moment.
    pub fn users(&self) -> Users {
        self.0.state.lock().users
    }

    /// What its memory is.
    pub fn attributes(&self) -> Attributes {
        let _looking = self.0.state.lock();
        // SAFETY: it is replaced under the lock.
        unsafe { &*self.0.store.get() }.attributes()
    }

    /// Gives the pages back when nobody else has the buffer: no attachment, and no clone.
    ///
    /// # Errors
    ///
    /// The buffer, while somebody has it, for ever if the revocation of an attachment failed; or where it is not made of pages.
    pub fn into_pages(self) -> Result<PageSet, Self> {
        if !self.is_pages() {
            return Err(self);
        }
        match Arc::try_unwrap(self.0).map(|inner| inner.store.into_inner()) {
            Ok(Store::Pages(pages)) => Ok(pages),
            Ok(Store::Other { .. }) => unreachable!("it was looked at"),
            Err(shared) => Err(Self(shared)),
        }
    }

    fn is_pages(&self) -> bool {
        let _looking = self.0.state.lock();
        // SAFETY: it is replaced under the lock.
        matches!(unsafe { &*self.0.store.get() }, Store::Pages(_))
    }
}

impl fmt::Debug for SharedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBuffer({}, {:#x} bytes, {:?})", self.0.name, self.0.len, self.users())
    }
}

impl Inner {
    /// The store, for somebody who is counted among the users, and stays it while the result is used.
    #[inline]
    fn store_of_user(&self) -> &Store {
        // SAFETY: while somebody is counted it is not replaced (invariant); the callers, in this room, are.
        unsafe { &*self.store.get() }
    }

    /// Lets somebody in, if `admit` finds a way to count them. It changes nothing where it fails.
    #[inline]
    fn enter(&self, admit: impl FnOnce(&mut Users) -> Result<(), BusyWith>) -> Result<(), Error> {
        let admitted = admit(&mut self.state.lock().users);
        admitted.map_err(|by| self.busy(by))
    }

    /// As [`Inner::enter`], for those whom jobs concern too. Changes nothing where it fails.
    fn admit(&self, admit: impl FnOnce(&mut State) -> Result<(), Conflict>) -> Result<(), Error> {
        let admitted = admit(&mut self.state.lock());
        admitted.map_err(|conflict| self.refused(conflict))
    }

    /// As [`Inner::admit`], and waits for what stands in the way.
    fn admit_by(
        &self,
        deadline: Deadline,
        given_up: &dyn Fn() -> bool,
        mut admit: impl FnMut(&mut State) -> Result<(), Conflict>,
    ) -> Result<(), Error> {
        loop {
            let (conflict, before) = {
                let mut state = self.state.lock();
                match admit(&mut state) {
                    Ok(()) => return Ok(()),
                    Err(conflict) => (conflict, state.users),
                }
            };
            self.wait_for(conflict, before, deadline, given_up)?;
        }
    }

    /// Waits until a conflict, met when the users were those, may be over. `given_up` ends the wait as its deadline does: it is called
    /// with interrupts masked, and whoever makes it true wakes those who wait.
    fn wait_for(
        &self,
        conflict: Conflict,
        before: Users,
        deadline: Deadline,
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        match conflict {
            Conflict::Job(fence) => match fence.wait(deadline, given_up) {
                None => Err(self.busy(BusyWith::AtWork)),
                Some(true) => Ok(()),
                Some(false) => Err(Error::JobFailed(self.name.clone())),
            },
            Conflict::Users(by) => match self.wait_until(deadline, |users| *users != before || given_up()) {
                Ok(()) if !given_up() => Ok(()),
                _ => Err(self.busy(by)),
            },
            Conflict::Failed => Err(Error::JobFailed(self.name.clone())),
            Conflict::OutOfMemory => Err(Error::OutOfMemory),
        }
    }

    /// Waits until the users are as `enough` wants them.
    fn wait_until(&self, deadline: Deadline, enough: impl Fn(&Users) -> bool) -> Result<(), TimedOut> {
        // From here on whoever leaves tells.
        self.state.lock().waiting += 1;
        let result = wait_until(deadline, || enough(&self.state.lock().users));
        self.state.lock().waiting -= 1;
        result
    }

    /// Lets somebody out.
    #[inline]
    fn leave(&self, count_out: impl FnOnce(&mut Users)) {
        let mut state = self.state.lock();
        count_out(&mut state.users);
        let waiting = state.waiting;
        drop(state);
        if waiting != 0 {
            base::notify();
        }
    }

    #[cold]
    fn busy(&self, by: BusyWith) -> Error {
        Error::Busy { buffer: self.name.clone(), by }
    }

    #[cold]
    fn refused(&self, conflict: Conflict) -> Error {
        match conflict {
            Conflict::Users(by) => self.busy(by),
            Conflict::Job(fence) if fence.tell() => Error::JobFailed(self.name.clone()),
            Conflict::Failed => Error::JobFailed(self.name.clone()),
            Conflict::Job(_) => self.busy(BusyWith::AtWork),
            Conflict::OutOfMemory => Error::OutOfMemory,
        }
    }
}

/// For those who wait to the end.
fn never() -> bool {
    false
}

/// Counts one more user.
fn count(users: &mut u32) -> Result<(), BusyWith> {
    *users = users.checked_add(1).ok_or(BusyWith::TooMany)?;
    Ok(())
}
