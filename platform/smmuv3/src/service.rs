//! Serving the SMMU's interrupts, and what a flood leaves behind (IHI 0070, 3.18).
//!
//! # Who takes up a backlog
//!
//! All of the SMMU's interrupts are edges: the event queue's comes when the queue becomes non-empty, and a queue that is left
//! non-empty raises none. So a handler that has done its share and not seen the queue empty ([`EventQueue::drain`]) makes
//! certain that somebody comes back:
//!
//! - it switches the queue's interrupt off (a flood can raise as many as it has records) and enters *polling*;
//! - it calls [`Config::defer`], by which the board promises to call [`Smmu::serve_backlog`] a little later, from a timer: between
//!   two calls the kernel runs on, however long the flood goes on;
//! - when a call has seen the queues empty it switches the interrupt on again (*rearming*) and comes back once more. When the SMMU
//!   has acknowledged the interrupt the queues are looked at for what came in between, and then all is *calm*.
//!
//! While it polls, an overflow that is told as GERROR.EVENTQ_ABT_ERR is not acknowledged but by the polling: the SMMU neither
//! records nor interrupts meanwhile.
//!
//! A kernel that gives no [`Config::defer`] polls [`Smmu::has_backlog`] and [`Smmu::service`] itself; the interrupts stay on.
//!
//! # Locking
//!
//! One [`IrqMutex`], a leaf, around IRQ_CTRL.
//!
//! [`EventQueue::drain`]: crate::evtq::EventQueue::drain
//! [`Config::defer`]: crate::Config::defer
//! [`Smmu`]: crate::Smmu
//! [`Smmu::serve_backlog`]: crate::Smmu::serve_backlog
//! [`Smmu::has_backlog`]: crate::Smmu::has_backlog
//! [`Smmu::service`]: crate::Smmu::service

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::registers::Registers;
use crate::smmu::Shared;
use crate::spec::registers::{self as reg, Gerror, IrqCtrl, irq_cfg2};
use base::IrqMutex;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Interrupts are on, and serve.
const CALM: u8 = 0;
/// The queues are served by the deferred calls.
const POLLING: u8 = 1;
/// The same, and interrupts are being switched on.
const REARMING: u8 = 2;

/// Where the SMMU's interrupts stand.
#[derive(Default)]
pub(crate) struct Service {
    state: AtomicU8,
    /// A queue was left without having been seen empty.
    backlog: AtomicBool,
    control: IrqMutex<()>,
}

/// An interrupt by message: what is written where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The doorbell's physical address, a multiple of 4 and not 0.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// The messages of an SMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Messages {
    /// For [`Smmu::event_handler`](crate::Smmu::event_handler).
    pub events: Message,
    /// For [`Smmu::error_handler`](crate::Smmu::error_handler).
    pub errors: Message,
    /// For [`Smmu::page_request_handler`](crate::Smmu::page_request_handler), where the SMMU has a PRI queue.
    pub page_requests: Option<Message>,
}

impl Service {
    pub fn backlog(&self) -> bool {
        self.backlog.load(Ordering::Acquire)
    }

    fn is_calm(&self) -> bool {
        self.state.load(Ordering::Acquire) == CALM
    }
}

impl<R: Registers> Shared<R> {
    /// The interrupts that are on while all is calm.
    pub fn interrupts(&self) -> IrqCtrl {
        let pri = if self.page_requests.is_some() { IrqCtrl::PRIQ_IRQEN } else { IrqCtrl::empty() };
        IrqCtrl::GERROR_IRQEN | IrqCtrl::EVENTQ_IRQEN | pri
    }

    /// Serves both queues once. Says whether both were seen empty.
    fn drain(&self) -> bool {
        let events = self.events.drain(&self.registers, &self.counters, &*self.sink);
        let requests = self
            .page_requests
            .as_ref()
            .is_none_or(|queue| queue.drain(&self.registers, &self.commands, &self.counters, &*self.sink));
        self.service.backlog.store(!(events && requests), Ordering::Release);
        events && requests
    }

    /// The handler of the event queue's and the PRI queue's interrupts.
    pub fn serve_queues(&self) {
        // While polling, those who poll serve: this may be one of a flood of interrupts.
        if self.service.is_calm() && !self.drain() {
            self.flooded();
        }
    }

    /// The handler of the global error interrupt.
    pub fn serve_errors(&self) {
        let polling = !self.service.is_calm();
        let keep = if polling { Gerror::EVENTQ_ABT_ERR | Gerror::PRIQ_ABT_ERR } else { Gerror::empty() };
        let active = self.acknowledge_errors(keep);
        if active.intersects(Gerror::EVENTQ_ABT_ERR | Gerror::PRIQ_ABT_ERR) {
            self.serve_queues();
        }
        if !active.is_empty() || self.service.backlog() {
            base::notify();
        }
    }

    fn acknowledge_errors(&self, keep: Gerror) -> Gerror {
        let active = self.commands.acknowledge(&self.registers, &self.counters, keep).difference(keep);
        let told = Gerror::CMDQ_ERR | Gerror::EVENTQ_ABT_ERR | Gerror::PRIQ_ABT_ERR | Gerror::SFM_ERR;
        let counters = &self.counters;
        counters.event_overflows.add(u64::from(active.contains(Gerror::EVENTQ_ABT_ERR)));
        counters.page_request_overflows.add(u64::from(active.contains(Gerror::PRIQ_ABT_ERR)));
        counters.other_global_errors.add(u64::from(active.difference(told).bits().count_ones()));
        active
    }

    /// Enters polling, if there is somebody to poll.
    fn flooded(&self) {
        let Some(defer) = self.config.defer else { return };
        if self.service.state.swap(POLLING, Ordering::AcqRel) == CALM {
            self.counters.floods.add(1);
        }
        // If the SMMU is not ready for it the interrupts stay on: they find that the queue is polled.
        let _ = self.try_control(self.interrupts().difference(IrqCtrl::EVENTQ_IRQEN | IrqCtrl::PRIQ_IRQEN));
        defer();
    }

    /// The deferred call.
    pub fn serve_backlog(&self) {
        let state = self.service.state.load(Ordering::Acquire);
        if state == CALM {
            return;
        }
        self.acknowledge_errors(Gerror::empty());
        if !self.drain() {
            return self.flooded();
        }
        let on = state == REARMING && self.registers.read32(reg::IRQ_CTRLACK) == self.interrupts().bits();
        // Exchanged, because another core may have found a flood meanwhile: then the interrupt is off again.
        if on && self.service.state.compare_exchange(REARMING, CALM, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            // Interrupts serve from here on. What came in before they were on is looked at now.
            if !seeded(Bug::NoLookAfterFlood) {
                self.serve_queues();
            }
            return;
        }
        if !on && self.try_control(self.interrupts()) {
            self.service.state.store(REARMING, Ordering::Release);
        }
        if let Some(defer) = self.config.defer {
            defer();
        }
    }

    /// Writes IRQ_CTRL, unless the SMMU is still busy with the last write. Says whether it was written.
    fn try_control(&self, value: IrqCtrl) -> bool {
        let _writes = self.service.control.lock();
        let ready = self.registers.read32(reg::IRQ_CTRL) == self.registers.read32(reg::IRQ_CTRLACK);
        if ready {
            self.registers.write32(reg::IRQ_CTRL, value.bits());
        }
        ready
    }

    /// Has the SMMU's interrupts sent as messages.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the SMMU has no messages; [`Error::NoAcknowledge`].
    pub fn use_messages(&self, messages: &Messages) -> Result<(), Error> {
        if !self.features.msi {
            return Err(Error::Unsupported("interrupts by message"));
        }
        // The configuration may change only while the interrupts are off.
        self.control(IrqCtrl::empty())?;
        let registers = &self.registers;
        let program = |[cfg0, cfg1, cfg2]: [usize; 3], message: Message| {
            registers.write64(cfg0, irq_cfg2::ADDRESS.address(message.address));
            registers.write32(cfg1, message.data);
            // Device-nGnRE, as a doorbell wants it.
            #[allow(clippy::cast_possible_truncation)] // A 32-bit register.
            registers.write32(cfg2, irq_cfg2::MEMATTR.put(irq_cfg2::DEVICE_NGNRE) as u32);
        };
        program([reg::EVENTQ_IRQ_CFG0, reg::EVENTQ_IRQ_CFG1, reg::EVENTQ_IRQ_CFG2], messages.events);
        program([reg::GERROR_IRQ_CFG0, reg::GERROR_IRQ_CFG1, reg::GERROR_IRQ_CFG2], messages.errors);
        if let (Some(message), Some(_)) = (messages.page_requests, &self.page_requests) {
            program([reg::PRIQ_IRQ_CFG0, reg::PRIQ_IRQ_CFG1, reg::PRIQ_IRQ_CFG2], message);
        }
        self.control(self.interrupts())?;
        // What came in meanwhile raised no interrupt.
        self.serve_errors();
        self.serve_queues();
        Ok(())
    }
}
