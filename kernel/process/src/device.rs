//! Devices in the hands of processes.
//!
//! [`Assigned`] is one device that the board has put by for a process. It is stopped when the board makes it. [`Held`] is such a
//! device that was opened, with all that its process has lent to it.

use crate::Error;
use crate::contract::Extent;
use crate::event::Event;
use crate::space::{Space, pages, prot};
use crate::touched::Touched;
use abi::{Mode, PAGE, READ, Rights, Signal, WRITE};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use dma::{Bidirectional, FromDevice, OpenPages, OwnedDomain, Placed, ToDevice};
use iommu::{IovaRange, PhysRange, Prot};

/// A device that a process may have, as the machine has it.
///
/// Whoever implements it sees to it that nobody else has the device meanwhile.
pub trait Assigned: Send {
    /// Its name in reports.
    fn name(&self) -> &str;

    /// 32 bits of its configuration space at byte `offset`, all ones outside. Reading them changes nothing.
    fn config(&self, offset: u16) -> u32;

    /// Bytes of memory BAR `bar`.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`].
    fn bar_size(&self, bar: u8) -> Result<u64, Error>;

    /// The registers of memory BAR `bar`: all of them and nothing else.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`]; [`Error::Window`] for a BAR that cannot be had by itself.
    fn registers(&self, bar: u8) -> Result<Arc<dyn Extent>, Error>;

    /// Gives the device its address space, of its own or that of the process, and lets it loose.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`], [`Error::Dma`], [`Error::Device`]; it is stopped then.
    fn start(&mut self, mode: Mode) -> Result<(), Error>;

    /// Stops the device for good, however far it has come: reset where it has a reset, off the bus, blocked. Interrupts are
    /// disconnected. What was lent to it is still mapped, and can be revoked.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where it did not do what it was told. It is blocked all the same.
    fn stop(&mut self) -> Result<(), Error>;

    /// Its address space, if it is started and has one of its own.
    fn domain(&self) -> Option<&OwnedDomain>;

    /// Addresses that are not memory to it, or that it needs for itself.
    fn reserved(&self) -> &[IovaRange];

    /// Has interrupt `vector` raise the event. Says how the device interrupts.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`], [`Error::Unsupported`], [`Error::OutOfMemory`], [`Error::Device`].
    fn connect(&mut self, vector: u16) -> Result<Signal, Error>;

    /// What its interrupts raise. Each masks itself.
    fn event(&self) -> &Arc<Event>;

    /// Lets it interrupt again.
    fn acknowledge(&mut self);
}

/// The registers of a BAR.
pub struct RegisterWindow<'a> {
    /// Its number.
    pub bar: u8,
    /// Where it lies for the CPU.
    pub range: PhysRange,
    /// All other ranges on the bus: other BARs of the function, and of others.
    pub others: &'a mut dyn Iterator<Item = PhysRange>,
}

/// Registers that can be given away by the page. There is no other way to have one than [`window`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window(PhysRange);

impl Window {
    /// Where it lies for the CPU.
    pub fn range(&self) -> &PhysRange {
        &self.0
    }
}

/// Checks that a window of registers can be given away by the page: that it is whole pages, and none of them is anybody else's too.
///
/// # Errors
///
/// [`Error::Window`].
pub fn window(window: RegisterWindow<'_>) -> Result<Window, Error> {
    let RegisterWindow { bar, range, others } = window;
    if range.is_empty() || !range.is_aligned(PAGE) {
        return Err(Error::Window { bar, why: "it is not made of whole pages" });
    }
    let mut others = others;
    if Iterator::any(&mut others, |other| other.overlaps(range)) {
        return Err(Error::Window { bar, why: "others lie in its pages" });
    }
    Ok(Window(range))
}

/// Memory in a device's domain, in one of the directions.
enum Loaned {
    Both(Placed<Bidirectional, OpenPages>),
    In(Placed<ToDevice, OpenPages>),
    Out(Placed<FromDevice, OpenPages>),
}

impl Loaned {
    /// Revokes it.
    fn end(self) -> Result<(), dma::Quarantined> {
        match self {
            Self::Both(placed) => placed.unmap().map(drop),
            Self::In(placed) => placed.unmap().map(drop),
            Self::Out(placed) => placed.unmap().map(drop),
        }
    }
}

struct Loan {
    at: IovaRange,
    /// Where it is for the process.
    address: u64,
    memory: Loaned,
}

/// A device that a process has opened.
pub(crate) struct Held {
    device: Box<dyn Assigned>,
    loans: Vec<Loan>,
    loans_max: usize,
    touched: Touched,
}

impl Held {
    pub fn new(device: Box<dyn Assigned>, loans_max: usize, tables_max: u64) -> Self {
        Self { device, loans: Vec::new(), loans_max, touched: Touched::new(tables_max) }
    }

    pub fn device(&mut self) -> &mut dyn Assigned {
        &mut *self.device
    }

    /// Lends `range` of `space` to the device at `iova`.
    pub fn lend(&mut self, space: &mut Space, iova: u64, address: u64, len: u64, rights: Rights) -> Result<(), Error> {
        let at = pages(iova, len)?;
        let range = pages(address, len)?;
        // What the device may do, the process must be allowed to do.
        let need = match rights {
            WRITE => Prot::WRITE,
            rights => prot(rights)?,
        };
        if let Some(reserved) = self.device.reserved().iter().find(|reserved| reserved.overlaps(at)) {
            return Err(Error::Reserved(*reserved));
        }
        if self.loans.iter().any(|loan| loan.at.overlaps(at)) {
            return Err(Error::Overlap(at));
        }
        if self.loans.len() >= self.loans_max {
            return Err(Error::Quota("loans"));
        }
        self.loans.try_reserve(1)?;
        let domain = self.device.domain().ok_or(Error::Unsupported("lending by address"))?.clone();
        let pages = space.lend(range, need)?;
        if let Err(error) = self.touched.charge(at) {
            space.lent_back(address);
            return Err(error);
        }
        let placed = match rights {
            READ => domain.map_owned(at.start(), pages).map(Loaned::In).map_err(|rejected| rejected.error),
            WRITE => domain.map_owned(at.start(), pages).map(Loaned::Out).map_err(|rejected| rejected.error),
            _ => domain.map_owned(at.start(), pages).map(Loaned::Both).map_err(|rejected| rejected.error),
        };
        match placed {
            Ok(memory) => {
                self.loans.push(Loan { at, address, memory });
                Ok(())
            }
            Err(error) => {
                space.lent_back(address);
                Err(error.into())
            }
        }
    }

    /// Takes back what was lent at exactly this range.
    pub fn take_back(&mut self, space: &mut Space, iova: u64, len: u64) -> Result<(), Error> {
        let at = pages(iova, len)?;
        let index = self.loans.iter().position(|loan| loan.at == at).ok_or(Error::NotMapped(at))?;
        let Loan { address, memory, .. } = self.loans.swap_remove(index);
        match memory.end() {
            Ok(()) => {
                space.lent_back(address);
                Ok(())
            }
            Err(lost) => {
                // The count stays: the process cannot unmap what a device may have.
                log::error!("{}: {lost}", self.device.name());
                Err(Error::Device)
            }
        }
    }

    /// Stops the device and takes everything back.
    pub fn close(mut self, space: &mut Space) -> Result<(), Error> {
        let mut result = self.device.stop();
        for Loan { address, memory, .. } in self.loans.drain(..) {
            match memory.end() {
                Ok(()) => space.lent_back(address),
                Err(lost) => {
                    log::error!("{}: {lost}", self.device.name());
                    result = result.and(Err(Error::Device));
                }
            }
        }
        result
    }
}

impl core::fmt::Debug for Held {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} with {} loans", self.device.name(), self.loans.len())
    }
}

const _: () = assert!(iommu::PAGE_SIZE == PAGE);
