//! The registers of the model, and the rules for writing them (IHI 0070, 6.3).

use super::{Consumption, Model, State};
use crate::spec::registers::{self as reg, Cr0, Gerror, cmdq_cons, gbpa, strtab_base_cfg};
use alloc::format;

/// Register values.
#[derive(Default)]
pub(super) struct Regs {
    pub cr0: u32,
    pub cr0ack: u32,
    pub cr1: u32,
    pub cr2: u32,
    pub gbpa: u32,
    pub irq_ctrl: u32,
    pub irq_ctrlack: u32,
    pub gerror: u32,
    pub gerrorn: u32,
    pub strtab_base: u64,
    pub strtab_base_cfg: u32,
    pub cmdq_base: u64,
    pub cmdq_prod: u32,
    pub cmdq_cons: u32,
    pub eventq_base: u64,
    pub eventq_prod: u32,
    pub eventq_cons: u32,
}

impl Regs {
    pub fn on(&self, what: Cr0) -> bool {
        self.cr0 & what.bits() != 0
    }

    pub fn active(&self) -> Gerror {
        Gerror::from_bits_truncate(self.gerror ^ self.gerrorn)
    }
}

impl Model {
    pub(super) fn load(&self, offset: usize) -> u32 {
        let mut state = self.state.lock();
        self.speculate(&mut state);
        match offset {
            reg::IDR0 => self.traits.idr0,
            reg::IDR1 => self.traits.idr1,
            reg::IDR3 => self.traits.idr3,
            reg::IDR5 => self.traits.idr5,
            reg::AIDR => self.traits.aidr,
            reg::IDR2 | reg::IDR4 | reg::IIDR => 0,
            reg::CR0 => state.regs.cr0,
            reg::CR0ACK => {
                if state.acknowledging {
                    state.acknowledging = state.behaviour.slow_acknowledgements
                        && state.adversary.as_mut().is_none_or(|adversary| !adversary.rng.chance(3));
                    if !state.acknowledging {
                        state.regs.cr0ack = state.regs.cr0;
                    }
                }
                state.regs.cr0ack
            }
            reg::CR1 => state.regs.cr1,
            reg::CR2 => state.regs.cr2,
            reg::GBPA => {
                if self.traits.gbpa {
                    state.regs.gbpa
                } else {
                    0
                }
            }
            reg::IRQ_CTRL => state.regs.irq_ctrl,
            reg::IRQ_CTRLACK => {
                if let Some(left) = state.behaviour.late_records.checked_sub(1) {
                    state.behaviour.late_records = left;
                    self.flood(&mut state);
                }
                state.regs.irq_ctrlack
            }
            reg::GERROR => state.regs.gerror,
            reg::GERRORN => state.regs.gerrorn,
            reg::STRTAB_BASE_CFG => state.regs.strtab_base_cfg,
            reg::CMDQ_PROD => state.regs.cmdq_prod,
            reg::CMDQ_CONS => {
                let count = match state.behaviour.consumption {
                    _ if state.behaviour.stall != 0 => {
                        state.behaviour.stall -= 1;
                        0
                    }
                    Consumption::PerLook(count) => count,
                    Consumption::Random => state.adversary.as_mut().and_then(|a| a.rng.below(4)).unwrap_or(1),
                    Consumption::Immediate | Consumption::Stuck => 0,
                };
                for _ in 0..count {
                    self.consume(&mut state);
                }
                state.behaviour.lie.unwrap_or(state.regs.cmdq_cons)
            }
            reg::EVENTQ_PROD => state.regs.eventq_prod,
            reg::EVENTQ_CONS => state.regs.eventq_cons,
            _ => self.load_output(&state, offset).unwrap_or_else(|| {
                state.violation(format!("32-bit read of offset {offset:#x}"));
                0
            }),
        }
    }

    pub(super) fn load64(&self, offset: usize) -> u64 {
        let mut state = self.state.lock();
        match offset {
            reg::STRTAB_BASE => state.regs.strtab_base,
            reg::CMDQ_BASE => state.regs.cmdq_base,
            reg::EVENTQ_BASE => state.regs.eventq_base,
            _ => {
                state.violation(format!("64-bit read of offset {offset:#x}"));
                0
            }
        }
    }

    pub(super) fn store64(&self, offset: usize, value: u64) {
        let mut state = self.state.lock();
        self.speculate(&mut state);
        match offset {
            reg::STRTAB_BASE => {
                only_while(&mut state, Cr0::SMMUEN, "STRTAB_BASE");
                state.regs.strtab_base = value;
            }
            reg::CMDQ_BASE => {
                only_while(&mut state, Cr0::CMDQEN, "CMDQ_BASE");
                state.regs.cmdq_base = value;
                self.check_base(&mut state, value, 16, self.traits.idr1 >> 21 & 0x1f);
            }
            reg::EVENTQ_BASE => {
                only_while(&mut state, Cr0::EVENTQEN, "EVENTQ_BASE");
                state.regs.eventq_base = value;
                self.check_base(&mut state, value, 32, self.traits.idr1 >> 16 & 0x1f);
            }
            _ if self.store_output(&mut state, offset, value) => {}
            _ => state.violation(format!("64-bit write of offset {offset:#x}")),
        }
    }

    fn check_base(&self, state: &mut State, value: u64, entry: u64, limit: u32) {
        let log2 = (value & 0x1f) as u32;
        if log2 > limit {
            state.violation(format!("a queue of 2^{log2} entries, of 2^{limit}"));
        }
        if !(value & reg::queue_base::ADDR.mask()).is_multiple_of((entry << log2).max(32)) {
            state.violation(format!("a queue that is not aligned to its size: {value:#x}"));
        }
    }

    pub(super) fn store(&self, offset: usize, value: u32) {
        let mut state = self.state.lock();
        self.speculate(&mut state);
        match offset {
            reg::CR0 => self.write_cr0(&mut state, value),
            reg::CR1 => {
                only_while(&mut state, Cr0::SMMUEN | Cr0::CMDQEN | Cr0::EVENTQEN, "CR1");
                state.regs.cr1 = value;
            }
            reg::CR2 => {
                only_while(&mut state, Cr0::SMMUEN, "CR2");
                if value & !7 != 0 {
                    state.violation(format!("reserved bits in CR2: {value:#x}"));
                }
                state.regs.cr2 = value;
            }
            reg::GBPA if !self.traits.gbpa => {}
            reg::GBPA => {
                let update = gbpa::UPDATE.mask() as u32;
                if state.regs.gbpa & update != 0 {
                    state.violation("GBPA written during an update".into());
                }
                if value & update != 0 {
                    state.regs.gbpa = if state.behaviour.gbpa_updates { value & !update } else { value };
                }
            }
            reg::IRQ_CTRL => {
                if state.regs.irq_ctrl != state.regs.irq_ctrlack {
                    state.violation("IRQ_CTRL written before the last change was acknowledged".into());
                }
                if value & !7 != 0 {
                    state.violation(format!("reserved bits in IRQ_CTRL: {value:#x}"));
                }
                state.regs.irq_ctrl = value;
                if state.behaviour.acknowledges {
                    state.regs.irq_ctrlack = value;
                }
            }
            reg::GERRORN => {
                let toggled = Gerror::from_bits_truncate(value ^ state.regs.gerrorn);
                if !state.regs.active().contains(toggled) {
                    state.violation(format!("GERRORN acknowledges {toggled:?}, which is not active"));
                }
                state.regs.gerrorn = value;
                self.consume_if_immediate(&mut state);
            }
            reg::STRTAB_BASE_CFG => {
                only_while(&mut state, Cr0::SMMUEN, "STRTAB_BASE_CFG");
                state.regs.strtab_base_cfg = value;
            }
            reg::CMDQ_PROD => {
                let size = state.command_queue();
                let on = state.regs.on(Cr0::CMDQEN);
                if on && size.distance(state.regs.cmdq_cons & 0xf_ffff, value) > size.entries() {
                    state.violation(format!("CMDQ_PROD {value:#x} passes CMDQ_CONS"));
                }
                let cons = state.regs.cmdq_cons & 0xf_ffff;
                if on && size.distance(cons, value) < size.distance(cons, state.regs.cmdq_prod) {
                    state.violation(format!("CMDQ_PROD {value:#x} goes back"));
                }
                state.regs.cmdq_prod = value;
                self.consume_if_immediate(&mut state);
            }
            reg::CMDQ_CONS => {
                only_while(&mut state, Cr0::CMDQEN, "CMDQ_CONS");
                state.regs.cmdq_cons = value;
            }
            reg::EVENTQ_PROD => {
                only_while(&mut state, Cr0::EVENTQEN, "EVENTQ_PROD");
                state.regs.eventq_prod = value;
            }
            reg::EVENTQ_CONS => {
                let size = state.event_queue();
                let prod = state.regs.eventq_prod;
                let left = size.distance(value, prod);
                if left > size.distance(state.regs.eventq_cons, prod) {
                    state.violation(format!("EVENTQ_CONS {value:#x} moves backwards or past EVENTQ_PROD"));
                }
                state.regs.eventq_cons = value;
                if let Some(left) = state.behaviour.flood.checked_sub(1) {
                    state.behaviour.flood = left;
                    self.flood(&mut state);
                }
            }
            _ if self.store_output(&mut state, offset, u64::from(value)) => {}
            _ => state.violation(format!("32-bit write of offset {offset:#x}")),
        }
    }

    fn write_cr0(&self, state: &mut State, value: u32) {
        let rising = value & !state.regs.cr0;
        if state.regs.cr0 != state.regs.cr0ack {
            state.violation("CR0 written before the last change was acknowledged".into());
        }
        if rising & Cr0::SMMUEN.bits() != 0 {
            self.check_stream_table(state);
            if !state.caches.is_empty() {
                state.violation("translation switched on with something cached from before".into());
            }
        }
        if value & !0x1df != 0 {
            state.violation(format!("reserved bits in CR0: {value:#x}"));
        }
        let queues = Cr0::CMDQEN.bits() | Cr0::EVENTQEN.bits();
        if rising & queues != 0 && state.regs.cmdq_base & reg::queue_base::ADDR.mask() == 0 {
            state.violation("a queue switched on without a base".into());
        }
        state.regs.cr0 = value;
        if state.behaviour.slow_acknowledgements && state.adversary.is_some() {
            state.acknowledging = true;
        } else if state.behaviour.acknowledges {
            state.regs.cr0ack = value;
        }
        if rising & Cr0::CMDQEN.bits() != 0 {
            state.regs.cmdq_cons &= cmdq_cons::RD.mask() as u32;
        }
        self.consume_if_immediate(state);
    }

    fn check_stream_table(&self, state: &mut State) {
        let config = u64::from(state.regs.strtab_base_cfg);
        let log2 = strtab_base_cfg::LOG2SIZE.get(config);
        if log2 > u64::from(self.traits.idr1 & 0x3f) {
            state.violation(format!("a stream table of 2^{log2} streams"));
        }
        let bytes = if strtab_base_cfg::FMT.get(config) == 1 {
            if self.traits.idr0 >> 27 & 3 != 1 {
                state.violation("a two-level stream table on an SMMU without".into());
            }
            8 << log2.saturating_sub(strtab_base_cfg::SPLIT.get(config))
        } else {
            64 << log2
        };
        if !reg::strtab_base::ADDR.address(state.regs.strtab_base).is_multiple_of(bytes) {
            state.violation("a stream table that is not aligned to its size".into());
        }
    }

    fn consume_if_immediate(&self, state: &mut State) {
        if state.behaviour.consumption == Consumption::Immediate {
            while self.consume(state) {}
        }
    }
}

/// Notes a write to a register that may only be written while `what` is off.
fn only_while(state: &mut State, what: Cr0, name: &str) {
    if (state.regs.cr0 | state.regs.cr0ack) & what.bits() != 0 {
        state.violation(format!("{name} written while {what:?} is on"));
    }
}
