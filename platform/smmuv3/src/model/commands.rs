//! Consuming commands (IHI 0070, chapter 4 and 7.1).

use super::cache::{Invalidation, TlbTag};
use super::{Model, State};
use crate::spec::Field;
use crate::spec::command::{self, TlbiRange, opcode};
use crate::spec::registers::{
    CERROR_ABT, CERROR_ILL, Cr0, Gerror, IrqCtrl, cmdq_cons, idr0, idr3, queue_base, strtab_base_cfg,
};
use alloc::format;

/// What became of a command.
enum Done {
    Nothing,
    Pending(Invalidation),
    Sync,
    Illegal,
}

impl Model {
    /// Consumes one command. Says whether it could.
    pub(super) fn consume(&self, state: &mut State) -> bool {
        let size = state.command_queue();
        let cons = state.regs.cmdq_cons & cmdq_cons::RD.mask() as u32;
        let stopped = state.regs.active().contains(Gerror::CMDQ_ERR);
        if !state.regs.on(Cr0::CMDQEN) || stopped || size.is_empty(state.regs.cmdq_prod, cons) {
            return false;
        }
        self.prefetch(state);
        let base = queue_base::ADDR.address(state.regs.cmdq_base);
        let at = base + size.slot(cons) as u64 * command::SIZE as u64;
        if state.behaviour.abort_fetches != 0 {
            state.behaviour.abort_fetches -= 1;
            stop(state, CERROR_ABT);
            return false;
        }
        let (Ok(w0), Ok(w1)) = (self.memory.read(at), self.memory.read(at + 8)) else {
            state.violation(format!("the command queue is not in memory at {at:#x}"));
            stop(state, CERROR_ABT);
            return false;
        };
        let number = command::OPCODE.get(w0) as u8;
        let refused = state.behaviour.refuse == Some(number);
        let done = if refused { Done::Illegal } else { self.execute(state, w0, w1) };
        match done {
            Done::Illegal => {
                if refused {
                    state.behaviour.refuse = None;
                } else {
                    state.violation(format!("an illegal {}: {w0:#x} {w1:#x}", command::name(number)));
                }
                stop(state, CERROR_ILL);
                return false;
            }
            Done::Pending(invalidation) => state.pending.push(invalidation),
            Done::Sync => {
                for invalidation in core::mem::take(&mut state.pending) {
                    state.caches.invalidate(invalidation);
                }
            }
            Done::Nothing => {}
        }
        state.log.push(number);
        let error = state.regs.cmdq_cons & cmdq_cons::ERR.mask() as u32;
        state.regs.cmdq_cons = size.advance(cons, 1) | error;
        true
    }

    fn execute(&self, state: &mut State, w0: u64, w1: u64) -> Done {
        if command::SSEC.is_set(w0) {
            return Done::Illegal;
        }
        let sid = command::SID.get(w0) as u32;
        let vmid = command::VMID.get(w0) as u16;
        let has = |feature: Field| feature.is_set(u64::from(self.traits.idr0));
        let asid = TlbTag { vmid, asid: Some(command::ASID.get(w0) as u16) };
        let number = command::OPCODE.get(w0);
        let stage1 = matches!(number, opcode::CFGI_CD..=opcode::CFGI_CD_ALL | opcode::TLBI_NH_ALL..=opcode::TLBI_NH_VA);
        let stage2 = matches!(number, opcode::TLBI_S12_VMALL | opcode::TLBI_S2_IPA);
        if stage1 && !has(idr0::S1P) || stage2 && !has(idr0::S2P) {
            return Done::Illegal;
        }
        if stage1 && !has(idr0::S2P) && number >= opcode::TLBI_NH_ALL && vmid != 0 {
            state.violation("a VMID where there is no stage 2".into());
        }
        match number {
            opcode::PREFETCH_CONFIG => Done::Nothing,
            opcode::CFGI_STE => {
                let l1 = (!command::LEAF.is_set(w1)).then(|| (self.l1_index(state, sid), self.l1_index(state, sid)));
                Done::Pending(Invalidation::Config { first: sid, last: sid, l1 })
            }
            opcode::CFGI_STE_RANGE => {
                let mask = u32::MAX >> (31 - command::RANGE.get(w1) as u32);
                let (first, last) = (sid & !mask, sid | mask);
                let l1 = Some((self.l1_index(state, first), self.l1_index(state, last)));
                Done::Pending(Invalidation::Config { first, last, l1 })
            }
            opcode::CFGI_CD | opcode::CFGI_CD_ALL => Done::Pending(Invalidation::Cd { sid }),
            opcode::TLBI_NH_ALL => Done::Pending(Invalidation::Vmid(vmid)),
            opcode::TLBI_NH_ASID => Done::Pending(Invalidation::Asid(asid)),
            opcode::TLBI_NH_VA => self.by_address(state, asid, w0, w1),
            opcode::TLBI_S12_VMALL => Done::Pending(Invalidation::VmidBoth(vmid)),
            opcode::TLBI_S2_IPA => self.by_address(state, TlbTag { vmid, asid: None }, w0, w1),
            opcode::TLBI_EL2_ALL if has(idr0::HYP) => Done::Nothing,
            opcode::TLBI_NSNH_ALL => Done::Pending(Invalidation::All),
            opcode::SYNC => Done::Sync,
            _ => Done::Illegal,
        }
    }

    /// An invalidation by address, with the rules of 4.4.1.1.
    fn by_address(&self, state: &mut State, tag: TlbTag, w0: u64, w1: u64) -> Done {
        let range = TlbiRange {
            num: command::NUM.get(w0) as u8,
            scale: command::SCALE.get(w0) as u8,
            tg: command::TG.get(w1) as u8,
            ttl: command::TTL.get(w1) as u8,
        };
        let addr = command::ADDR.address(w1);
        let ranges = idr3::RIL.is_set(u64::from(self.traits.idr3));
        if range.tg == 0 || !ranges {
            if range != TlbiRange::SINGLE {
                state.violation("range fields in an invalidation without a range".into());
            }
        } else {
            if range.num == 0 && range.scale == 0 && range.ttl == 0 || range.tg == 2 && range.ttl == 1 {
                return Done::Illegal;
            }
            let granule = super::cache::granule_shift(range.tg);
            let level = if range.ttl == 0 { 3 } else { range.ttl };
            let unit = granule + (granule - 3) * u32::from(3 - level);
            if addr & ((1 << unit) - 1) != 0 {
                state.violation(format!(
                    "an invalidation of {addr:#x}, which the level hint {level} makes unpredictable"
                ));
            }
        }
        Done::Pending(Invalidation::Address { tag, addr, range, leaf: command::LEAF.is_set(w1) })
    }

    /// Where the L1STD of a StreamID is.
    pub(super) fn l1_index(&self, state: &State, sid: u32) -> u32 {
        let split = strtab_base_cfg::SPLIT.get(u64::from(state.regs.strtab_base_cfg));
        sid >> split
    }
}

/// Stops at the present command.
fn stop(state: &mut State, error: u64) {
    let index = state.regs.cmdq_cons & cmdq_cons::RD.mask() as u32;
    state.regs.cmdq_cons = index | cmdq_cons::ERR.put(error) as u32;
    raise(state, Gerror::CMDQ_ERR);
}

/// Makes a global error active, unless it is.
pub(super) fn raise(state: &mut State, error: Gerror) {
    if !state.regs.active().contains(error) {
        state.regs.gerror ^= error.bits();
        if state.regs.irq_ctrl & IrqCtrl::GERROR_IRQEN.bits() != 0 {
            state.interrupts.errors = true;
        }
    }
}
