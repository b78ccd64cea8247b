//! What becomes of a device that does not stop faulting.
//!
//! The fault log counts each stream's records, in the IOMMU's interrupt handler. When a stream has exceeded its budget, the
//! device is *contained*: all functions of its group are taken off the bus, and the group is blocked. That takes invalidations
//! and waits, so it is left to a core that may wait ([`base::deferred`]). A device stays contained until everybody has let go of
//! its group and it is attached anew.
//!
//! # Locking
//!
//! One [`IrqMutex`] for the list of masters in use; the heap's lock comes after it. It is not held while devices are contained or
//! explained.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use base::deferred::{self, Ticket};
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use dma::Device;
use iommu::group::Group;
use iommu::{AttachError, Fault, StreamId};
use kernel::faults::{Exceeded, FaultLog};
use pci::Function;
use spin::Once;

/// The one of this machine, for the work that handlers leave.
static CONTAINMENT: Once<Arc<Containment>> = Once::new();

/// Who is contained, and how.
pub(crate) struct Containment {
    faults: Arc<FaultLog>,
    masters: IrqMutex<Vec<Entry>>,
    next: AtomicU64,
    ticket: Option<Ticket>,
    contained: AtomicU64,
}

/// A master in use.
#[derive(Clone)]
struct Entry {
    number: u64,
    function: Arc<Function>,
    device: Device,
    group: Arc<Group>,
}

/// A master's place on the list, for as long as it is in use.
pub(crate) struct Registration {
    containment: Arc<Containment>,
    number: u64,
}

impl Containment {
    /// Contains whoever exceeds the budget in `faults`.
    pub fn of(faults: &Arc<FaultLog>) -> Arc<Self> {
        let containment = CONTAINMENT.call_once(|| {
            let ticket = deferred::register(work);
            if ticket.is_none() {
                log::error!("devices that fault will not be contained: too much work is left by handlers already");
            }
            Arc::new(Self {
                faults: faults.clone(),
                masters: IrqMutex::default(),
                next: AtomicU64::new(0),
                ticket,
                contained: AtomicU64::new(0),
            })
        });
        faults.on_exceeded(raise);
        containment.clone()
    }

    /// Takes a master onto the list, with a full budget.
    pub fn register(
        self: &Arc<Self>,
        function: &Arc<Function>,
        device: &Device,
        group: &Arc<Group>,
    ) -> Result<Registration, crate::Error> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let entry = Entry { number, function: function.clone(), device: device.clone(), group: group.clone() };
        if group.users() <= 1 {
            self.faults.forgive(group.streams());
        }
        let mut masters = self.masters.lock();
        if masters.try_reserve(1).is_err() {
            drop(masters);
            drop(entry);
            return Err(crate::Error::OutOfMemory);
        }
        masters.push(entry);
        Ok(Registration { containment: self.clone(), number })
    }

    /// How often a device was contained.
    pub fn count(&self) -> u64 {
        self.contained.load(Ordering::SeqCst)
    }

    /// The masters that `stream` stands for, one by one in the order in which they came: no memory is needed for it.
    fn masters_of(&self, stream: StreamId) -> impl Iterator<Item = Entry> {
        let mut next = 0;
        core::iter::from_fn(move || {
            let masters = self.masters.lock();
            let of_stream = |entry: &&Entry| entry.number >= next && entry.group.streams().contains(&stream);
            let entry = masters.iter().filter(of_stream).min_by_key(|entry| entry.number).cloned()?;
            next = entry.number + 1;
            Some(entry)
        })
    }

    /// Says what the DMA-API knows of a fault: the device and the buffer.
    pub fn explain(&self, fault: &Fault) -> Option<String> {
        let text = Explanation(self, fault).to_string();
        (!text.is_empty()).then_some(text)
    }

    fn contain(&self, exceeded: &Exceeded) -> Result<(), AttachError> {
        let Exceeded { fault, count } = exceeded;
        let Some(first) = self.masters_of(fault.stream).next() else { return Ok(()) };
        for entry in self.masters_of(fault.stream) {
            if let Err(error) = entry.function.disable_bus_master() {
                log::error!("{}: {error}", entry.device.name());
            }
        }
        first.group.block()?;
        self.contained.fetch_add(1, Ordering::SeqCst);
        for entry in self.masters_of(fault.stream) {
            log::error!("{} is off the bus and blocked after {count} faults, the last: {fault}", entry.device.name());
        }
        log::error!("{}", Explanation(self, fault));
        base::notify();
        Ok(())
    }
}

/// What the DMA-API knows of a fault.
struct Explanation<'a>(&'a Containment, &'a Fault);

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut masters = self.0.masters_of(self.1.stream);
        let Some(iova) = self.1.iova else {
            return masters.next().map_or(Ok(()), |entry| f.write_str(entry.device.name()));
        };
        for (place, entry) in masters.enumerate() {
            // Masters with one name on the bus: it may have been any of them.
            let or = if place == 0 { "" } else { "; or " };
            write!(f, "{or}{}", entry.device.explain(iova))?;
        }
        Ok(())
    }
}

/// Called from the IOMMU's interrupt handler.
fn raise() {
    if let Some(ticket) = CONTAINMENT.get().and_then(|containment| containment.ticket) {
        ticket.raise();
    }
}

/// Done where waiting is allowed.
fn work() {
    let Some(containment) = CONTAINMENT.get() else { return };
    while let Some(exceeded) = containment.faults.take_exceeded() {
        match containment.contain(&exceeded) {
            Ok(()) => {}
            Err(AttachError::Busy) => {
                // Off the bus it is already; its group is being changed at this moment.
                containment.faults.put_back(&exceeded);
                raise();
                return;
            }
            Err(error) => log::error!("stream {} cannot be blocked: {error}", exceeded.fault.stream),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let entry = {
            let mut masters = self.containment.masters.lock();
            let place = masters.iter().position(|entry| entry.number == self.number);
            place.map(|place| masters.swap_remove(place))
        };
        // Perhaps the last handle of the device: giving it up may wait.
        drop(entry);
    }
}
