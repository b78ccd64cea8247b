//! The Interrupt Translation Service: turns a device's message into an LPI at a core.
//!
//! # Locking
//!
//! Whoever changes what is mapped first becomes the only one that does (`Exclusive`: waited for with a deadline and with
//! interrupts enabled; never by a handler). While it is that, it takes `devices` for moments, and the command queue's own lock
//! inside [`CommandQueue::run`]; it waits holding neither.
//!
//! # Invariants
//!
//! An EventID and its LPI are given out again only after a DISCARD and a SYNC have been consumed. After a command that did
//! not complete, what it was about is never used again: tables are leaked, numbers stay taken.

pub(crate) mod command;
mod queue;
mod tables;

use crate::GicError;
use crate::regs::{Registers, STEP_MILLIS, poll};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use base::{Deadline, IrqMutex};
use command::{Command, Target};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use iommu::PhysAddr;
use iommu::contract::{TableBlock, TableMemory};
use queue::CommandQueue;
use tables::{Kind, Table};

const CTLR: usize = 0x0;
const TYPER: usize = 0x8;
const CTLR_ENABLED: u32 = 1 << 0;
const CTLR_QUIESCENT: u32 = 1 << 31;
const TYPER_PHYSICAL: u64 = 1 << 0;

/// The doorbell's offset in the ITS's registers.
pub(crate) const TRANSLATER: u64 = 0x1_0040;

/// PCI requester IDs have 16 bits; a device table for more is not made.
const MAX_DEVICES: u64 = 1 << 16;

/// The fewest EventIDs that a device's table is made for, so that functions that share a DeviceID find room.
const MIN_EVENTS: u32 = 32;

/// The most EventIDs of a device: as many as MSI-X has vectors.
const MAX_EVENTS: u32 = 2048;

/// One device's interrupt translation table and what is taken of it.
struct Device {
    _table: TableBlock,
    /// The LPI of each EventID.
    events: Vec<Option<u32>>,
}

pub(crate) struct Its {
    regs: Box<dyn Registers>,
    doorbell: PhysAddr,
    memory: &'static dyn TableMemory,
    queue: CommandQueue,
    _tables: Vec<TableBlock>,
    device_limit: u64,
    collection_limit: u64,
    event_bits: u32,
    entry_bytes: u64,
    targets_by_address: bool,
    exclusive: AtomicBool,
    devices: IrqMutex<BTreeMap<u32, Device>>,
    /// Collections whose cached configuration must be invalidated before the next command.
    stale: AtomicU64,
}

/// An event of a device, as the ITS knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub device: u32,
    pub event: u32,
}

/// The right to change what is mapped.
struct Exclusive<'a>(&'a Its);

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.0.exclusive.store(false, Ordering::Release);
    }
}

impl Its {
    /// Resets and enables the ITS whose registers are `regs`, found at `phys`.
    pub fn new(
        regs: Box<dyn Registers>,
        phys: PhysAddr,
        memory: &'static dyn TableMemory,
        cores: u64,
    ) -> Result<Self, GicError> {
        let typer = regs.read64(TYPER);
        if typer & TYPER_PHYSICAL == 0 {
            return Err(GicError::NoMsi);
        }
        regs.write32(CTLR, 0);
        poll("the ITS did not come to rest", || regs.read32(CTLR) & CTLR_QUIESCENT != 0)?;
        let collection_bits = if typer & 1 << 36 != 0 { (typer >> 32 & 0xf) + 1 } else { 16 };
        let mut device_limit = MAX_DEVICES.min(2 << (typer >> 13 & 0x1f));
        // Collections that the ITS holds in itself; a table comes on top.
        let mut collection_limit = typer >> 24 & 0xff;
        let mut snoops = true;
        let mut blocks = Vec::new();
        for index in 0..8 {
            let kind = tables::kind(regs.read64(tables::register(index)));
            let entries = match kind {
                Kind::Devices => device_limit,
                Kind::Collections => cores,
                Kind::Other => continue,
            };
            let Table { block, entries, snoops: table } = tables::install(&*regs, index, entries, memory)?;
            match kind {
                Kind::Devices => device_limit = entries,
                Kind::Collections => collection_limit += entries,
                Kind::Other => {}
            }
            snoops &= table;
            blocks.try_reserve(1).map_err(|_| GicError::OutOfMemory)?;
            blocks.push(block);
        }
        let queue = CommandQueue::new(&*regs, memory)?;
        if !(snoops && queue.snoops()) {
            log::warn!("ITS: does not snoop the caches; its tables must be cleaned to memory");
        }
        regs.write32(CTLR, CTLR_ENABLED);
        let doorbell = phys.checked_add(TRANSLATER).ok_or(GicError::WindowTooSmall("ITS"))?;
        Ok(Self {
            regs,
            doorbell,
            memory,
            queue,
            _tables: blocks,
            device_limit,
            collection_limit: collection_limit.min(1 << collection_bits),
            event_bits: (typer >> 8 & 0x1f) as u32 + 1,
            entry_bytes: (typer >> 4 & 0xf) + 1,
            targets_by_address: typer & 1 << 19 != 0,
            exclusive: AtomicBool::new(false),
            devices: IrqMutex::new(BTreeMap::new()),
            stale: AtomicU64::new(0),
        })
    }

    /// Where devices write their EventIDs to.
    pub fn doorbell(&self) -> PhysAddr {
        self.doorbell
    }

    /// Spells a redistributor's name as this ITS wants it.
    pub fn target(&self, phys: PhysAddr, number: u16) -> Target {
        if self.targets_by_address {
            Target(phys.get() & 0x000f_ffff_ffff_0000)
        } else {
            Target(u64::from(number) << 16)
        }
    }

    /// Maps a core's collection to its redistributor.
    pub fn map_collection(&self, collection: u16, target: Target) -> Result<(), GicError> {
        if u64::from(collection) >= self.collection_limit {
            return Err(GicError::Unsupported("an ITS collection for every core"));
        }
        let _exclusive = self.exclusive()?;
        self.run(&[Command::mapc(collection, target), Command::invall(collection), Command::sync(target)])
    }

    fn exclusive(&self) -> Result<Exclusive<'_>, GicError> {
        let take = || self.exclusive.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let deadline = Deadline::after_millis(4 * STEP_MILLIS);
        while !take() {
            if deadline.has_passed() {
                return Err(GicError::TimedOut("another core keeps the ITS"));
            }
            core::hint::spin_loop();
        }
        Ok(Exclusive(self))
    }

    fn run(&self, commands: &[Command]) -> Result<(), GicError> {
        let stale = self.stale.swap(0, Ordering::SeqCst);
        for collection in (0..64).filter(|collection| stale & 1 << collection != 0) {
            self.queue.run(&*self.regs, &[Command::invall(collection)])?;
        }
        self.queue.run(&*self.regs, commands)
    }

    /// Maps `lpis.len()` consecutive EventIDs of `device`, the first aligned to their number rounded up to a power of two (as
    /// multiple-message MSI wants them), to `lpis`. Returns the first EventID.
    ///
    /// On an error after a command, the EventIDs stay taken; see [`Mapped`] for the LPIs.
    pub fn map(&self, device: u32, lpis: &[u32], collection: u16, target: Target) -> Result<u32, Mapped> {
        let fresh = |error| Mapped { error, clean: true };
        let count = u32::try_from(lpis.len()).ok().filter(|count| (1..=MAX_EVENTS).contains(count));
        let count = count.ok_or(fresh(GicError::NoEvent(device)))?;
        if u64::from(device) >= self.device_limit {
            return Err(fresh(GicError::NoSuchDevice(device)));
        }
        let _exclusive = self.exclusive().map_err(fresh)?;
        if !self.devices.lock().contains_key(&device) {
            self.add_device(device, count).map_err(fresh)?;
        }
        let first = self.take_events(device, lpis).ok_or(fresh(GicError::NoEvent(device)))?;
        let dirty = |error| Mapped { error, clean: false };
        let mut commands = Vec::new();
        commands.try_reserve_exact(lpis.len() + 1).map_err(|_| {
            self.forget_events(device, first, count);
            fresh(GicError::OutOfMemory)
        })?;
        commands.extend((first..).zip(lpis).map(|(event, lpi)| Command::mapti(device, event, *lpi, collection)));
        commands.push(Command::sync(target));
        self.run(&commands).map_err(dirty)?;
        Ok(first)
    }

    /// Gives a device a translation table for `count` events or more.
    fn add_device(&self, device: u32, count: u32) -> Result<(), GicError> {
        let capacity = count.max(MIN_EVENTS).next_power_of_two();
        // The Size field holds the bits less one; EventIDs of a single bit are never asked for (`MIN_EVENTS`).
        if capacity.ilog2() > self.event_bits {
            return Err(GicError::NoEvent(device));
        }
        let bytes = (u64::from(capacity) * self.entry_bytes).next_power_of_two().max(256);
        let table = self.memory.allocate(usize::try_from(bytes).map_err(|_| GicError::OutOfMemory)?)?;
        let mut events = Vec::new();
        events.try_reserve_exact(capacity as usize).map_err(|_| GicError::OutOfMemory)?;
        events.resize(capacity as usize, None);
        if let Err(error) = self.run(&[Command::mapd(device, table.phys(), capacity.ilog2())]) {
            // The ITS may have taken the table all the same.
            core::mem::forget(table);
            return Err(error);
        }
        self.devices.lock().insert(device, Device { _table: table, events });
        Ok(())
    }

    fn take_events(&self, device: u32, lpis: &[u32]) -> Option<u32> {
        let mut devices = self.devices.lock();
        let events = &mut devices.get_mut(&device)?.events;
        let step = lpis.len().next_power_of_two();
        let is_free =
            |first: &usize| events.get(*first..first + lpis.len()).is_some_and(|run| run.iter().all(Option::is_none));
        let first = (0..events.len()).step_by(step).find(is_free)?;
        for (event, lpi) in events.iter_mut().skip(first).zip(lpis) {
            *event = Some(*lpi);
        }
        u32::try_from(first).ok()
    }

    fn forget_events(&self, device: u32, first: u32, count: u32) {
        let mut devices = self.devices.lock();
        let Some(device) = devices.get_mut(&device) else { return };
        for event in device.events.iter_mut().skip(first as usize).take(count as usize) {
            *event = None;
        }
    }

    /// Unmaps an event. On `Ok` its EventID may be given out again and its LPI is pending nowhere.
    pub fn unmap(&self, event: Event, target: Target) -> Result<(), GicError> {
        let _exclusive = self.exclusive()?;
        let Event { device, event } = event;
        self.run(&[Command::inv(device, event), Command::discard(device, event), Command::sync(target)])?;
        self.forget_events(device, event, 1);
        Ok(())
    }

    /// Lets an event's new LPI configuration take effect.
    pub fn invalidate(&self, event: Event, target: Target) -> Result<(), GicError> {
        self.run(&[Command::inv(event.device, event.event), Command::sync(target)])
    }

    /// Moves an event from one core's collection to another's.
    pub fn move_to(&self, event: Event, from: Target, collection: u16, to: Target) -> Result<(), GicError> {
        let _exclusive = self.exclusive()?;
        self.run(&[Command::movi(event.device, event.event, collection), Command::sync(from), Command::sync(to)])
    }

    /// Lets a collection's new LPI configuration take effect soon. For handlers: takes no lock that it would have to wait for.
    pub fn invalidate_soon(&self, collection: u16) {
        if !self.queue.try_put(&*self.regs, Command::invall(collection)) {
            self.stale.fetch_or(1 << (collection & 63), Ordering::SeqCst);
        }
    }
}

/// Why events were not mapped.
pub(crate) struct Mapped {
    pub error: GicError,
    /// Whether the LPIs certainly are not mapped, so that they may be used for something else.
    pub clean: bool,
}
