//! One process, and what becomes of its system calls.

use crate::contract::Tables;
use crate::device::{Assigned, Held};
use crate::handles::{Handles, Named};
use crate::lines::Lines;
use crate::shared::PutBy;
use crate::space::{Space, Whose, pages, prot};
use crate::{Error, Start, elf};
use abi::{Call, LINE, Mode};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::{Duration, Instant};
use base::{Deadline, fallible, wait_until};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use dma::DmaMemory;
use iommu::Prot;

/// How much a process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Pages of memory.
    pub pages: u64,
    /// Mappings.
    pub regions: usize,
    /// Handles, below 2^16.
    pub handles: usize,
    /// Ranges lent to one device.
    pub loans: usize,
    /// Pages of tables for the addresses at which it lends to one device: one for each 2 MiB in which something was ever lent, and
    /// ten for each GiB and each 512 GiB.
    pub tables: u64,
    /// Bytes of addresses for what others have too: shared buffers, and memory that was put by.
    pub shared: u64,
    /// Lines in the log at once. One more comes back with each [`crate::REFILL`].
    pub lines: u32,
}

impl Default for Quota {
    /// 16 MiB, and as many of everything as a driver needs.
    fn default() -> Self {
        Self { pages: 4096, regions: 128, handles: 16, loans: 256, tables: 1024, shared: 256 << 20, lines: 100 }
    }
}

/// What others may do with a process that runs.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    /// The core on which it runs, plus 1.
    core: AtomicUsize,
}

impl Control {
    /// Tells the process to end: it does when it next leaves EL0, or ends a wait. Returns the core to interrupt, if it runs.
    pub fn stop(&self) -> Option<usize> {
        self.stop.store(true, Ordering::SeqCst);
        base::notify();
        self.core.load(Ordering::SeqCst).checked_sub(1)
    }

    /// Whether it has been told to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// What is looked at before EL0 is entered.
    pub fn flag(&self) -> &AtomicBool {
        &self.stop
    }

    /// Notes where it runs.
    pub fn runs_on(&self, core: Option<usize>) {
        self.core.store(core.map_or(0, |core| core + 1), Ordering::SeqCst);
    }
}

/// What follows a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The process goes on, with these in x0 and x1.
    Return(u64, u64),
    /// It has ended, with this code.
    Exit(u64),
}

/// A process.
pub struct Process {
    // In the order of dropping: `end` has emptied the handles.
    handles: Handles,
    space: Space,
    name: Arc<str>,
    memory: &'static dyn DmaMemory,
    control: Arc<Control>,
    offered: Vec<Option<Box<dyn Assigned>>>,
    pub(crate) put_by: PutBy,
    quota: Quota,
    calls: u64,
    lines: Lines,
}

impl Process {
    /// Makes a process without a program, in an address space of `tables`, with memory from `memory`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(
        name: &str,
        tables: Arc<dyn Tables>,
        memory: &'static dyn DmaMemory,
        quota: Quota,
    ) -> Result<Self, Error> {
        Ok(Self {
            handles: Handles::new(quota.handles.min(0xffff)),
            space: Space::new(tables, quota.pages, quota.regions, quota.shared),
            name: fallible::text(name).ok_or(Error::OutOfMemory)?,
            memory,
            control: fallible::arc(Control::default()).map_err(|_| Error::OutOfMemory)?,
            offered: Vec::new(),
            put_by: PutBy::default(),
            quota,
            calls: 0,
            lines: Lines::new(quota.lines),
        })
    }

    /// Loads a program: the bytes of an ELF.
    ///
    /// # Errors
    ///
    /// [`Error::Elf`] and others; the process is good for nothing then.
    pub fn load(&mut self, file: &[u8]) -> Result<Start, Error> {
        elf::load(file, &mut self.space, self.memory)
    }

    /// Puts a device by for the process, which may open it under the number that is returned.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn assign(&mut self, device: Box<dyn Assigned>) -> Result<u64, Error> {
        self.offered.try_reserve(1)?;
        self.offered.push(Some(device));
        Ok(self.offered.len() as u64 - 1)
    }

    /// Its name in reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How to end it from elsewhere.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Its address space.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// How many system calls it has made.
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// How many lines it was not let say in the log, and its last one if that is among them.
    pub fn unsaid(&self) -> (u64, Option<&str>) {
        self.lines.refused()
    }

    /// Does what the process asks for: `number` is in x8, `arguments` in x0 to x5. Waits no longer than `deadline`.
    pub fn call(&mut self, number: u64, arguments: [u64; 6], deadline: Deadline) -> Next {
        self.calls += 1;
        let Some(call) = Call::from_number(number) else {
            return Next::Return(Error::NoSuchCall(number).code() as u64, 0);
        };
        if call == Call::Exit {
            return Next::Exit(arguments[0]);
        }
        match self.answer(call, arguments, deadline) {
            Ok(value) => Next::Return(0, value),
            Err(error) => {
                log::trace!("{}: {call:?}: {error}", self.name);
                Next::Return(error.code() as u64, 0)
            }
        }
    }

    fn answer(&mut self, call: Call, [a, b, c, d, e, _]: [u64; 6], deadline: Deadline) -> Result<u64, Error> {
        match call {
            Call::Exit => Ok(0),
            Call::Write => self.write(a, b),
            Call::Map => self.map(a, b),
            Call::Unmap => self.space.unmap(pages(a, b)?).map(|()| 0),
            Call::Time => Ok(Instant::now().as_nanos()),
            Call::Sleep => self.wait(a, deadline, || false).or_else(|error| match error {
                Error::TimedOut => Ok(0),
                other => Err(other),
            }),
            Call::Open => self.open(a, b),
            Call::Close => self.close(a).map(|()| 0),
            Call::Config => {
                let offset = u16::try_from(b).ok().filter(|offset| *offset < 4096 && offset.is_multiple_of(4));
                let offset = offset.ok_or(Error::BadAddress { address: b, len: 4 })?;
                Ok(self.handles.device(a)?.device().config(offset).into())
            }
            Call::Registers => {
                let extent = self.handles.device(a)?.device().registers(bar(b)?)?;
                self.space.map(extent, Prot::READ | Prot::WRITE, Whose::Handle(a))
            }
            Call::BarSize => self.handles.device(a)?.device().bar_size(bar(b)?),
            Call::Lend => self.handles.device(a)?.lend(&mut self.space, b, c, d, e).map(|()| 0),
            Call::TakeBack => self.handles.device(a)?.take_back(&mut self.space, b, c).map(|()| 0),
            Call::Connect => {
                let vector = u16::try_from(b).map_err(|_| Error::NoSuchDevice("vector"))?;
                self.handles.device(a)?.device().connect(vector).map(|signal| signal as u64)
            }
            Call::Wait => {
                let event = self.handles.awaited(a)?;
                self.wait(b, deadline, || event.is_raised())?;
                Ok(event.take())
            }
            Call::Acknowledge => {
                self.handles.device(a)?.device().acknowledge();
                Ok(0)
            }
            Call::OpenBuffer => {
                let handle = self.handles.next()?;
                self.handles.fill(handle, Named::Buffer(self.put_by.buffer(a)?));
                Ok(handle)
            }
            Call::BufferSize => Ok(self.handles.buffer(a)?.len()),
            Call::MapBuffer => self.handles.buffer(a)?.map(&mut self.space, a, b),
            Call::BeginAccess => {
                let until = Deadline::after(Duration::from_nanos(c)).min(deadline);
                self.handles.buffer(a)?.begin(&mut self.space, b, until, &|| self.control.is_stopped())
            }
            Call::EndAccess => self.handles.buffer(a)?.end(&mut self.space).map(|()| 0),
            Call::OpenEvent => {
                let handle = self.handles.next()?;
                self.handles.fill(handle, Named::Event(self.put_by.event(a)?));
                Ok(handle)
            }
            Call::Raise => {
                self.handles.event(a)?.raise();
                Ok(0)
            }
            Call::MapMemory => self.put_by.map(&mut self.space, a, b),
            Call::MemorySize => self.put_by.memory_size(a),
        }
    }

    fn write(&mut self, address: u64, len: u64) -> Result<u64, Error> {
        if len > LINE {
            return Err(Error::BadLength(len));
        }
        let mut bytes = [0; LINE as usize];
        let bytes = bytes.get_mut(..len as usize).ok_or(Error::BadLength(len))?;
        self.space.copy_in(address, bytes)?;
        // Whatever it is, it is one line of the log, and cannot be taken for another's.
        bytes.iter_mut().filter(|byte| !(b' '..=b'~').contains(*byte)).for_each(|byte| *byte = b'?');
        if !self.lines.may_say(bytes, Instant::now()) {
            return Err(Error::Quota("lines in the log"));
        }
        log::info!("{}: {}", self.name, core::str::from_utf8(bytes).unwrap_or_default());
        Ok(0)
    }

    fn map(&mut self, len: u64, rights: u64) -> Result<u64, Error> {
        let range = pages(0, len)?;
        let prot = prot(rights)?;
        let memory = elf::fresh(&self.space, self.memory, range.len())?;
        self.space.map(elf::shared(memory)?, prot, Whose::Own)
    }

    fn open(&mut self, number: u64, mode: u64) -> Result<u64, Error> {
        let mode = Mode::from_number(mode).ok_or(Error::Unsupported("this mode"))?;
        let handle = self.handles.next()?;
        let slot = usize::try_from(number).ok().and_then(|index| self.offered.get_mut(index));
        let slot = slot.ok_or(Error::NoSuchDevice("device"))?;
        let mut device = slot.take().ok_or(Error::Busy)?;
        let ready = if mode == Mode::Shared { self.space.reserve(device.reserved()) } else { Ok(()) };
        match ready.and_then(|()| device.start(mode)) {
            Ok(()) => {
                self.handles.fill(handle, Named::Device(Held::new(device, self.quota.loans, self.quota.tables)));
                Ok(handle)
            }
            Err(error) => {
                *slot = Some(device);
                Err(error)
            }
        }
    }

    /// Waits until `condition` holds, for `nanoseconds` at most, or until the process is to end.
    fn wait(&self, nanoseconds: u64, deadline: Deadline, condition: impl Fn() -> bool) -> Result<u64, Error> {
        let until = Deadline::after(Duration::from_nanos(nanoseconds)).min(deadline);
        wait_until(until, || self.control.is_stopped() || condition()).map_err(|_| Error::TimedOut)?;
        if condition() { Ok(0) } else { Err(Error::TimedOut) }
    }

    /// Gives up what `handle` names, and all that belongs to it.
    fn close(&mut self, handle: u64) -> Result<(), Error> {
        let result = match self.handles.take(handle)? {
            Named::Device(held) => held.close(&mut self.space),
            // An access ends when its mapping has gone, which belongs to the handle.
            Named::Buffer(_) | Named::Event(_) => Ok(()),
        };
        result.and(self.space.remove_owned(handle))
    }

    /// Ends the process: stops its devices, takes back what it has lent, ends its accesses to what it shares, and gives its memory back.
    /// Says whether all of that was done; what was not is logged, and never used again.
    pub fn end(mut self) -> bool {
        self.close_all()
    }

    fn close_all(&mut self) -> bool {
        let mut done = true;
        // Devices come first.
        while let Some(handle) = self.handles.any() {
            if let Err(error) = self.close(handle) {
                log::error!("{}: {error}", self.name);
                done = false;
            }
        }
        done
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.close_all();
    }
}

fn bar(number: u64) -> Result<u8, Error> {
    u8::try_from(number).ok().filter(|bar| *bar < 6).ok_or(Error::NoSuchDevice("BAR"))
}

impl core::fmt::Debug for Process {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "process {}, {} pages", self.name, self.space.mapped_pages())
    }
}
