//! What goes out of the SMMU besides events: interrupts, by wire or by message, and page requests (IHI 0070, 3.18 and 8).

use super::{Model, State};
use crate::spec::page_request;
use crate::spec::queue::QueueSize;
use crate::spec::registers::{self as reg, Cr0, Gerror, IrqCtrl, OVFLG, idr0, idr1, irq_cfg2, queue_base};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

/// Who interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    Events,
    PageRequests,
    Errors,
}

/// The registers of the PRI queue and of messages, and what was sent.
#[derive(Default)]
pub(super) struct Output {
    base: u64,
    prod: u32,
    cons: u32,
    /// The `*_IRQ_CFG`s by offset.
    config: BTreeMap<usize, u64>,
    /// Messages sent: address and data.
    sent: Vec<(u64, u32)>,
    /// CMD_PRI_RESPs consumed.
    pub answers: Vec<[u64; 2]>,
    /// Page requests that the SMMU answered for itself.
    dropped: u64,
}

impl Line {
    const fn enable(self) -> IrqCtrl {
        match self {
            Self::Events => IrqCtrl::EVENTQ_IRQEN,
            Self::PageRequests => IrqCtrl::PRIQ_IRQEN,
            Self::Errors => IrqCtrl::GERROR_IRQEN,
        }
    }

    /// The offset of `*_IRQ_CFG0`; the others are 8 and 12 bytes further.
    const fn config(self) -> usize {
        match self {
            Self::Events => reg::EVENTQ_IRQ_CFG0,
            Self::PageRequests => reg::PRIQ_IRQ_CFG0,
            Self::Errors => reg::GERROR_IRQ_CFG0,
        }
    }

    /// Whose configuration register that is.
    const fn of(offset: usize) -> Option<Self> {
        match offset {
            reg::EVENTQ_IRQ_CFG0 | reg::EVENTQ_IRQ_CFG1 | reg::EVENTQ_IRQ_CFG2 => Some(Self::Events),
            reg::PRIQ_IRQ_CFG0 | reg::PRIQ_IRQ_CFG1 | reg::PRIQ_IRQ_CFG2 => Some(Self::PageRequests),
            reg::GERROR_IRQ_CFG0 | reg::GERROR_IRQ_CFG1 | reg::GERROR_IRQ_CFG2 => Some(Self::Errors),
            _ => None,
        }
    }
}

/// Interrupts: by message if there is an address, else by wire. An edge, gone when it is off.
pub(super) fn interrupt(state: &mut State, source: Line) {
    if state.regs.irq_ctrl & state.regs.irq_ctrlack & source.enable().bits() == 0 {
        return;
    }
    let at = |offset: usize| state.output.config.get(&(source.config() + offset)).copied().unwrap_or(0);
    match irq_cfg2::ADDRESS.address(at(0)) {
        0 => match source {
            Line::Events => state.interrupts.events = true,
            Line::PageRequests => state.interrupts.page_requests = true,
            Line::Errors => state.interrupts.errors = true,
        },
        address => {
            let data = at(8) as u32;
            state.output.sent.push((address, data));
        }
    }
}

impl Model {
    /// Interrupt messages sent since the last call, as address and data.
    pub fn take_messages(&self) -> Vec<(u64, u32)> {
        core::mem::take(&mut self.state.lock().output.sent)
    }

    /// CMD_PRI_RESPs consumed since the last call, and how many page requests were dropped ever.
    pub fn take_answers(&self) -> (Vec<[u64; 2]>, u64) {
        let mut state = self.state.lock();
        (core::mem::take(&mut state.output.answers), state.output.dropped)
    }

    /// Asks for a page, as a device does with PRI: `record` goes into the PRI queue.
    pub fn page_request(&self, record: [u64; page_request::WORDS]) {
        let mut state = self.state.lock();
        let size = QueueSize::new((state.output.base & 0x1f) as u32);
        let (prod, cons) = (state.output.prod, state.output.cons);
        let overflowed = (prod ^ cons) & OVFLG.mask() as u32 != 0;
        let aborted = state.regs.active().contains(Gerror::PRIQ_ABT_ERR);
        if !state.regs.on(Cr0::PRIQEN) || !state.regs.on(Cr0::SMMUEN) || overflowed || aborted {
            state.output.dropped += 1;
        } else if size.is_full(prod, cons) {
            state.output.dropped += 1;
            state.output.prod = prod ^ OVFLG.mask() as u32;
        } else {
            let at = queue_base::ADDR.address(state.output.base) + (size.slot(prod) * page_request::SIZE) as u64;
            for (i, word) in (0..).zip(record) {
                if let Err(bad) = self.memory.write(at + i * 8, word) {
                    state.violation(format!("the PRI queue is not in memory: {bad:?}"));
                }
            }
            state.output.prod = size.advance(prod, 1) | prod & OVFLG.mask() as u32;
            if size.is_empty(prod, cons) {
                interrupt(&mut state, Line::PageRequests);
            }
        }
    }

    /// Reads a register of this module's.
    pub(super) fn load_output(&self, state: &State, offset: usize) -> Option<u32> {
        let pri = idr0::PRI.is_set(u64::from(self.traits.idr0));
        match offset {
            reg::PRIQ_PROD if pri => Some(state.output.prod),
            reg::PRIQ_CONS if pri => Some(state.output.cons),
            _ => None,
        }
    }

    /// Writes one. Says whether there is one.
    pub(super) fn store_output(&self, state: &mut State, offset: usize, value: u64) -> bool {
        let feature = |field: crate::spec::Field| field.is_set(u64::from(self.traits.idr0));
        if let Some(source) = Line::of(offset) {
            if !feature(idr0::MSI) || source == Line::PageRequests && !feature(idr0::PRI) {
                state.violation(format!("a message configured at {offset:#x} on an SMMU without"));
            }
            if (state.regs.irq_ctrl | state.regs.irq_ctrlack) & source.enable().bits() != 0 {
                state.violation(format!("a message configured at {offset:#x} while its interrupt is on"));
            }
            state.output.config.insert(offset, value);
            return true;
        }
        let on = (state.regs.cr0 | state.regs.cr0ack) & Cr0::PRIQEN.bits() != 0;
        if on && matches!(offset, reg::PRIQ_BASE | reg::PRIQ_PROD) {
            state.violation(format!("offset {offset:#x} written while the PRI queue is on"));
        }
        match offset {
            _ if !feature(idr0::PRI) => return false,
            reg::PRIQ_BASE => {
                if value & 0x1f > idr1::PRIQS.get(u64::from(self.traits.idr1)) {
                    state.violation(format!("a PRI queue of 2^{}", value & 0x1f));
                }
                state.output.base = value;
            }
            reg::PRIQ_PROD => state.output.prod = value as u32,
            reg::PRIQ_CONS => {
                let size = QueueSize::new((state.output.base & 0x1f) as u32);
                let (prod, cons) = (state.output.prod, state.output.cons);
                if size.distance(value as u32, prod) > size.distance(cons, prod) {
                    state.violation(format!("PRIQ_CONS {value:#x} moves backwards or past PRIQ_PROD"));
                }
                state.output.cons = value as u32;
            }
            _ => return false,
        }
        true
    }
}
