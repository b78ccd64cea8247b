//! Consuming commands (IHI 0070, chapter 4 and 7.1).

use super::cache::{Invalidation, TlbTag};
use super::output::{Line, interrupt};
use super::{Model, State};
use crate::spec::Field;
use crate::spec::command::{self, TlbiRange, opcode};
use crate::spec::registers::{
    CERROR_ABT, CERROR_ATC_INV_SYNC, CERROR_ILL, Cr0, Gerror, cmdq_cons, idr0, idr1, idr3, queue_base, strtab_base_cfg,
};
use alloc::format;

/// Word 0 of CMD_ATC_INV and CMD_PREFETCH_*: there is a SubstreamID.
const SSV: Field = Field::bit(11);
/// Word 0 of CMD_ATC_INV: whatever the SubstreamID.
const GLOBAL: Field = Field::bit(9);
/// Word 1 of CMD_ATC_INV: log2 of the pages.
const ATC_SIZE: Field = Field::new(5, 0);
/// Word 0 of CMD_SYNC: the message's data.
const MSI_DATA: Field = Field::new(63, 32);
/// Word 1 of CMD_SYNC: the message's address.
const MSI_ADDR: Field = Field::new(51, 2);

/// What became of a command.
enum Done {
    Nothing,
    Pending(Invalidation),
    Sync { message: Option<(u64, u32)> },
    Illegal,
}

/// The bits that a command may have set.
fn defined(number: u64) -> [u64; 2] {
    let sid = command::OPCODE.mask() | command::SID.mask();
    let vmid = command::OPCODE.mask() | command::VMID.mask();
    let range = command::NUM.mask() | command::SCALE.mask();
    let by_address = command::LEAF.mask() | command::TTL.mask() | command::TG.mask() | command::ADDR.mask();
    let ssid = command::SSID.mask() | SSV.mask();
    match number {
        opcode::CFGI_STE => [sid, command::LEAF.mask()],
        opcode::CFGI_STE_RANGE => [sid, command::RANGE.mask()],
        opcode::CFGI_CD => [sid | command::SSID.mask(), command::LEAF.mask()],
        opcode::CFGI_CD_ALL => [sid, 0],
        opcode::TLBI_NH_ALL | opcode::TLBI_S12_VMALL => [vmid, 0],
        opcode::TLBI_NH_ASID => [vmid | command::ASID.mask(), 0],
        opcode::TLBI_NH_VA => [vmid | command::ASID.mask() | range, by_address],
        opcode::TLBI_NH_VAA | opcode::TLBI_S2_IPA => [vmid | range, by_address],
        opcode::TLBI_EL2_ALL | opcode::TLBI_NSNH_ALL => [command::OPCODE.mask(), 0],
        opcode::ATC_INV => [sid | ssid | GLOBAL.mask(), ATC_SIZE.mask() | command::ADDR.mask()],
        opcode::PRI_RESP => [sid | ssid, command::PRG_INDEX.mask() | command::RESP.mask()],
        opcode::SYNC => {
            // CS, MSH, MSIATTR, MSIDATA; MSIADDR.
            [command::OPCODE.mask() | 0x0fc0_3000 | MSI_DATA.mask(), MSI_ADDR.mask()]
        }
        _ => [u64::MAX; 2],
    }
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
        // The same command again at which it stopped, and nothing was done about it.
        let again = state.stopped.take() == Some((at, w0, w1));
        if again {
            state.violation(format!(
                "the error of {} was acknowledged, and the command is still there",
                command::name(number)
            ));
        }
        let refused = state.behaviour.refuse == Some(number);
        let done = if refused || again { Done::Illegal } else { self.execute(state, w0, w1) };
        match done {
            Done::Illegal => {
                if refused {
                    state.behaviour.refuse = None;
                } else if !again {
                    state.violation(format!("an illegal {}: {w0:#x} {w1:#x}", command::name(number)));
                }
                state.stopped = Some((at, w0, w1));
                stop(state, CERROR_ILL);
                return false;
            }
            Done::Pending(invalidation) => {
                state.unsynced_atc |= matches!(invalidation, Invalidation::Atc { .. });
                state.pending.push(invalidation);
            }
            Done::Sync { .. } if state.unsynced_atc && state.behaviour.atc_timeouts != 0 => {
                // The devices did not answer in time. The other invalidations are complete.
                state.behaviour.atc_timeouts -= 1;
                state.unsynced_atc = false;
                for invalidation in core::mem::take(&mut state.pending) {
                    if !matches!(invalidation, Invalidation::Atc { .. }) {
                        state.caches.invalidate(invalidation);
                    }
                }
                stop(state, CERROR_ATC_INV_SYNC);
                return false;
            }
            Done::Sync { message } => {
                for invalidation in core::mem::take(&mut state.pending) {
                    state.caches.invalidate(invalidation);
                }
                state.unsynced_atc = false;
                if let Some((to, data)) = message {
                    let lost = state.behaviour.lose_messages || self.memory.write32(to, data).is_err();
                    if lost {
                        raise(state, Gerror::MSI_CMDQ_ABT_ERR);
                    }
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
        let stage1 =
            matches!(number, opcode::CFGI_CD..=opcode::CFGI_CD_ALL | opcode::TLBI_NH_ALL..=opcode::TLBI_NH_VAA);
        let stage2 = matches!(number, opcode::TLBI_S12_VMALL | opcode::TLBI_S2_IPA);
        if stage1 && !has(idr0::S1P) || stage2 && !has(idr0::S2P) || number == opcode::ATC_INV && !has(idr0::ATS) {
            return Done::Illegal;
        }
        let [mask0, mask1] = defined(number);
        if w0 & !mask0 != 0 || w1 & !mask1 != 0 {
            state.violation(format!("reserved bits in a {}: {w0:#x} {w1:#x}", command::name(number as u8)));
        }
        let tlbi = stage2 || stage1 && number >= opcode::TLBI_NH_ALL;
        if tlbi && !has(idr0::S2P) && vmid != 0 {
            state.violation("a VMID where there is no stage 2".into());
        }
        if tlbi && !has(idr0::VMID16) && vmid > 0xff {
            state.violation("a VMID of 16 bits where there are 8".into());
        }
        let tags_asid = matches!(number, opcode::TLBI_NH_ASID | opcode::TLBI_NH_VA);
        if tags_asid && !has(idr0::ASID16) && command::ASID.get(w0) > 0xff {
            state.violation("an ASID of 16 bits where there are 8".into());
        }
        let ssid = command::SSID.get(w0) as u32;
        let substreams = idr1::SSIDSIZE.get(u64::from(self.traits.idr1));
        if number == opcode::CFGI_CD && u64::from(ssid) >> substreams != 0 {
            state.violation(format!("a CMD_CFGI_CD for SubstreamID {ssid:#x}, which cannot be"));
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
            opcode::CFGI_CD => Done::Pending(Invalidation::Cd { sid, ssid, leaf: command::LEAF.is_set(w1) }),
            opcode::CFGI_CD_ALL => Done::Pending(Invalidation::CdAll { sid }),
            opcode::TLBI_NH_ALL => Done::Pending(Invalidation::Vmid(vmid)),
            opcode::TLBI_NH_ASID => Done::Pending(Invalidation::Asid(asid)),
            opcode::TLBI_NH_VA => self.by_address(state, asid, false, w0, w1),
            opcode::TLBI_NH_VAA => self.by_address(state, asid, true, w0, w1),
            opcode::TLBI_S12_VMALL => Done::Pending(Invalidation::VmidBoth(vmid)),
            opcode::TLBI_S2_IPA => self.by_address(state, TlbTag { vmid, asid: None }, false, w0, w1),
            opcode::TLBI_EL2_ALL if has(idr0::HYP) => Done::Nothing,
            opcode::TLBI_NSNH_ALL => Done::Pending(Invalidation::All),
            opcode::ATC_INV => Self::atc(sid, w0, w1),
            opcode::PRI_RESP if has(idr0::PRI) && command::RESP.get(w1) != 3 => {
                state.output.answers.push([w0, w1]);
                Done::Nothing
            }
            opcode::SYNC if command::CS.get(w0) == 1 && !has(idr0::MSI) => Done::Illegal,
            opcode::SYNC if command::CS.get(w0) == 3 => Done::Illegal,
            opcode::SYNC => {
                let message = (MSI_ADDR.address(w1), MSI_DATA.get(w0) as u32);
                Done::Sync { message: (command::CS.get(w0) == 1 && message.0 != 0).then_some(message) }
            }
            _ => Done::Illegal,
        }
    }

    fn atc(sid: u32, w0: u64, w1: u64) -> Done {
        let size = ATC_SIZE.get(w1);
        let (addr, last) = if size >= 52 {
            (0, u64::MAX)
        } else {
            let last = (1 << (size + 12)) - 1;
            (command::ADDR.address(w1) & !last, last)
        };
        let ssid = SSV.is_set(w0).then(|| command::SSID.get(w0) as u32);
        Done::Pending(Invalidation::Atc { sid, ssid, global: GLOBAL.is_set(w0), addr, last })
    }

    /// An invalidation by address, with the rules of 4.4.1.1.
    fn by_address(&self, state: &mut State, tag: TlbTag, any_asid: bool, w0: u64, w1: u64) -> Done {
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
        Done::Pending(Invalidation::Address { tag, any_asid, addr, range, leaf: command::LEAF.is_set(w1) })
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
        interrupt(state, Line::Errors);
    }
}
