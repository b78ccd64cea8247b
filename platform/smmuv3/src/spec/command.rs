//! Commands (IHI 0070, chapter 4): two 64-bit words each.

use super::Field;
use core::fmt;

/// 64-bit words of a command.
pub const WORDS: usize = 2;
/// Bytes of a command.
pub const SIZE: usize = WORDS * 8;

/// Word 0: opcode.
pub const OPCODE: Field = Field::new(7, 0);
/// Word 0: the command concerns the Secure world.
pub const SSEC: Field = Field::bit(10);
/// Word 0 of CMD_ATC_INV: all SubstreamIDs.
pub const GLOBAL: Field = Field::bit(9);
/// Word 0: the command has a SubstreamID.
pub const SSV: Field = Field::bit(11);
/// Word 0: SubstreamID.
pub const SSID: Field = Field::new(31, 12);
/// Word 0: StreamID.
pub const SID: Field = Field::new(63, 32);
/// Word 0: range: one less than the count.
pub const NUM: Field = Field::new(16, 12);
/// Word 0: range: log2 of the unit in pages.
pub const SCALE: Field = Field::new(24, 20);
/// Word 0: VMID.
pub const VMID: Field = Field::new(47, 32);
/// Word 0: ASID.
pub const ASID: Field = Field::new(63, 48);
/// Word 0 of CMD_SYNC: how completion is signalled (0 not, 1 interrupt, 2 SEV).
pub const CS: Field = Field::new(13, 12);
/// Word 0 of CMD_SYNC: the message's shareability.
pub const MSH: Field = Field::new(23, 22);
/// Word 0 of CMD_SYNC: the message's memory attributes.
pub const MSI_ATTR: Field = Field::new(27, 24);
/// Word 0 of CMD_SYNC: the message.
pub const MSI_DATA: Field = Field::new(63, 32);
/// Word 1 of CMD_SYNC: where the message is written to.
pub const MSI_ADDRESS: Field = Field::new(51, 2);
/// Word 1 of CMD_PRI_RESP: page request group.
pub const PRG_INDEX: Field = Field::new(8, 0);
/// Word 1 of CMD_PRI_RESP: the answer.
pub const RESP: Field = Field::new(13, 12);
/// Word 1: only leaf entries.
pub const LEAF: Field = Field::bit(0);
/// Word 1 of CFGI_STE_RANGE: log2 of the number of STEs, less one.
pub const RANGE: Field = Field::new(4, 0);
/// Word 1: level of the leaf entries, 0 for unknown.
pub const TTL: Field = Field::new(9, 8);
/// Word 1: granule of a range: 0 none, 1 4K, 2 16K, 3 64K.
pub const TG: Field = Field::new(11, 10);
/// Word 1 of CMD_ATC_INV: log2 of the number of 4 KiB pages.
pub const SIZE_LOG2: Field = Field::new(5, 0);
/// Word 1: address.
pub const ADDR: Field = Field::new(63, 12);

/// Opcodes, with the architecture's names.
#[allow(missing_docs)]
pub mod opcode {
    pub const PREFETCH_CONFIG: u64 = 0x01;
    pub const PREFETCH_ADDR: u64 = 0x02;
    pub const CFGI_STE: u64 = 0x03;
    pub const CFGI_STE_RANGE: u64 = 0x04;
    pub const CFGI_CD: u64 = 0x05;
    pub const CFGI_CD_ALL: u64 = 0x06;
    pub const TLBI_NH_ALL: u64 = 0x10;
    pub const TLBI_NH_ASID: u64 = 0x11;
    pub const TLBI_NH_VA: u64 = 0x12;
    pub const TLBI_NH_VAA: u64 = 0x13;
    pub const TLBI_EL2_ALL: u64 = 0x20;
    pub const TLBI_S12_VMALL: u64 = 0x28;
    pub const TLBI_S2_IPA: u64 = 0x2a;
    pub const TLBI_NSNH_ALL: u64 = 0x30;
    pub const ATC_INV: u64 = 0x40;
    pub const PRI_RESP: u64 = 0x41;
    pub const RESUME: u64 = 0x44;
    pub const STALL_TERM: u64 = 0x45;
    pub const SYNC: u64 = 0x46;
}

/// What of a range a `TLBI_NH_VA` or `TLBI_S2_IPA` addresses (4.4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbiRange {
    /// One less than the number of units.
    pub num: u8,
    /// log2 of the unit in pages.
    pub scale: u8,
    /// The granule: 1 for 4K, 2 for 16K, 3 for 64K; 0 for a single address of any granule.
    pub tg: u8,
    /// The level of the leaf entries, 0 for unknown.
    pub ttl: u8,
}

impl TlbiRange {
    /// A single address, of whatever granule and level.
    pub const SINGLE: Self = Self { num: 0, scale: 0, tg: 0, ttl: 0 };
}

/// A command that this driver issues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Command {
    /// Forget the STE of one stream and the CDs found through it; with `leaf` false the L1STD too.
    CfgiSte { sid: u32, leaf: bool },
    /// Forget the STEs (and their CDs) of 2^(`range` + 1) streams, aligned.
    CfgiSteRange { sid: u32, range: u8 },
    /// Forget all configuration.
    CfgiAll,
    /// Forget the CD of one stream's SubstreamID.
    CfgiCd { sid: u32, ssid: u32, leaf: bool },
    /// Forget the CDs of all of one stream's SubstreamIDs, and the L1CDs.
    CfgiCdAll { sid: u32 },
    /// Have the device forget the translations of 2^`log2` pages of 4 KiB at `addr` (aligned to its size) that it holds for a
    /// SubstreamID, or for accesses without one.
    AtcInv { sid: u32, ssid: Option<u32>, addr: u64, log2: u8 },
    /// Forget the stage 1 translations of an ASID.
    TlbiNhAsid { vmid: u16, asid: u16 },
    /// Forget stage 1 translations of an ASID by address.
    TlbiNhVa { vmid: u16, asid: u16, addr: u64, range: TlbiRange, leaf: bool },
    /// Forget all stage 1 translations of a VMID.
    TlbiNhAll { vmid: u16 },
    /// Forget all translations of a VMID, of both stages.
    TlbiS12Vmall { vmid: u16 },
    /// Forget stage 2 translations of a VMID by address.
    TlbiS2Ipa { vmid: u16, addr: u64, range: TlbiRange, leaf: bool },
    /// Forget all EL2 translations.
    TlbiEl2All,
    /// Forget all non-secure, non-EL2 translations.
    TlbiNsnhAll,
    /// Answer a page request group.
    PriResp { sid: u32, ssid: Option<u32>, group: u16, response: PriResponse },
    /// Wait for all earlier commands.
    Sync,
    /// The same, and end WFE on every processor.
    SyncEvent,
    /// The same, and write `data` to `address`, in memory that the SMMU shares coherently.
    SyncMessage { address: u64, data: u32 },
}

/// The answer to a page request group (4.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PriResponse {
    /// A permanent error that has nothing to do with the pages: ask no more.
    ResponseFailure,
    /// One or more of the pages could not be made present.
    InvalidRequest,
    /// All pages are present.
    Success,
}

impl Command {
    /// Encodes the command.
    pub const fn encode(self) -> [u64; WORDS] {
        match self {
            Self::CfgiSte { sid, leaf } => [op(opcode::CFGI_STE) | SID.put(sid as u64), LEAF.put(leaf as u64)],
            Self::CfgiSteRange { sid, range } => {
                [op(opcode::CFGI_STE_RANGE) | SID.put(sid as u64), RANGE.put(range as u64)]
            }
            Self::CfgiAll => [op(opcode::CFGI_STE_RANGE), RANGE.put(31)],
            Self::CfgiCd { sid, ssid, leaf } => {
                [op(opcode::CFGI_CD) | SID.put(sid as u64) | SSID.put(ssid as u64), LEAF.put(leaf as u64)]
            }
            Self::CfgiCdAll { sid } => [op(opcode::CFGI_CD_ALL) | SID.put(sid as u64), 0],
            Self::AtcInv { sid, ssid, addr, log2 } => {
                let substream = match ssid {
                    Some(ssid) => SSV.mask() | SSID.put(ssid as u64),
                    None => 0,
                };
                [op(opcode::ATC_INV) | SID.put(sid as u64) | substream, ADDR.address(addr) | SIZE_LOG2.put(log2 as u64)]
            }
            Self::TlbiNhAsid { vmid, asid } => {
                [op(opcode::TLBI_NH_ASID) | VMID.put(vmid as u64) | ASID.put(asid as u64), 0]
            }
            Self::TlbiNhVa { vmid, asid, addr, range, leaf } => tlbi_nh_va(vmid, asid, addr, range, leaf),
            Self::TlbiNhAll { vmid } => [op(opcode::TLBI_NH_ALL) | VMID.put(vmid as u64), 0],
            Self::TlbiS12Vmall { vmid } => [op(opcode::TLBI_S12_VMALL) | VMID.put(vmid as u64), 0],
            Self::TlbiS2Ipa { vmid, addr, range, leaf } => by_address(opcode::TLBI_S2_IPA, vmid, addr, range, leaf),
            Self::TlbiEl2All => [op(opcode::TLBI_EL2_ALL), 0],
            Self::TlbiNsnhAll => [op(opcode::TLBI_NSNH_ALL), 0],
            Self::PriResp { sid, ssid, group, response } => {
                let substream = match ssid {
                    Some(ssid) => SSV.mask() | SSID.put(ssid as u64),
                    None => 0,
                };
                let answer = match response {
                    PriResponse::ResponseFailure => 0,
                    PriResponse::InvalidRequest => 1,
                    PriResponse::Success => 2,
                };
                [op(opcode::PRI_RESP) | substream | SID.put(sid as u64), PRG_INDEX.put(group as u64) | RESP.put(answer)]
            }
            Self::Sync => [op(opcode::SYNC), 0],
            Self::SyncEvent => [op(opcode::SYNC) | CS.put(2), 0],
            Self::SyncMessage { address, data } => {
                // Write-back cacheable, inner shareable.
                let how = CS.put(1) | MSH.put(3) | MSI_ATTR.put(0xf);
                [op(opcode::SYNC) | how | MSI_DATA.put(data as u64), MSI_ADDRESS.address(address)]
            }
        }
    }
}

const fn op(opcode: u64) -> u64 {
    OPCODE.put(opcode)
}

/// Encodes [`Command::TlbiNhVa`], without a look at the others.
#[inline]
pub const fn tlbi_nh_va(vmid: u16, asid: u16, addr: u64, range: TlbiRange, leaf: bool) -> [u64; WORDS] {
    let [w0, w1] = by_address(opcode::TLBI_NH_VA, vmid, addr, range, leaf);
    [w0 | ASID.put(asid as u64), w1]
}

/// The command whose first word, with a range of one page, is `word0`, of leaf entries: with another range.
#[inline]
pub const fn with_range(word0: u64, addr: u64, range: TlbiRange) -> [u64; WORDS] {
    [
        word0 & !(NUM.mask() | SCALE.mask()) | NUM.put(range.num as u64) | SCALE.put(range.scale as u64),
        ADDR.address(addr) | TG.put(range.tg as u64) | TTL.put(range.ttl as u64) | LEAF.mask(),
    ]
}

#[inline]
const fn by_address(opcode: u64, vmid: u16, addr: u64, range: TlbiRange, leaf: bool) -> [u64; WORDS] {
    [
        op(opcode) | VMID.put(vmid as u64) | NUM.put(range.num as u64) | SCALE.put(range.scale as u64),
        ADDR.address(addr) | TG.put(range.tg as u64) | TTL.put(range.ttl as u64) | LEAF.put(leaf as u64),
    ]
}

/// The architecture's name of an opcode.
pub const fn name(opcode: u8) -> &'static str {
    match opcode as u64 {
        opcode::PREFETCH_CONFIG => "CMD_PREFETCH_CONFIG",
        opcode::PREFETCH_ADDR => "CMD_PREFETCH_ADDR",
        opcode::CFGI_STE => "CMD_CFGI_STE",
        opcode::CFGI_STE_RANGE => "CMD_CFGI_STE_RANGE",
        opcode::CFGI_CD => "CMD_CFGI_CD",
        opcode::CFGI_CD_ALL => "CMD_CFGI_CD_ALL",
        opcode::TLBI_NH_ALL => "CMD_TLBI_NH_ALL",
        opcode::TLBI_NH_ASID => "CMD_TLBI_NH_ASID",
        opcode::TLBI_NH_VA => "CMD_TLBI_NH_VA",
        opcode::TLBI_NH_VAA => "CMD_TLBI_NH_VAA",
        opcode::TLBI_EL2_ALL => "CMD_TLBI_EL2_ALL",
        opcode::TLBI_S12_VMALL => "CMD_TLBI_S12_VMALL",
        opcode::TLBI_S2_IPA => "CMD_TLBI_S2_IPA",
        opcode::TLBI_NSNH_ALL => "CMD_TLBI_NSNH_ALL",
        opcode::ATC_INV => "CMD_ATC_INV",
        opcode::PRI_RESP => "CMD_PRI_RESP",
        opcode::RESUME => "CMD_RESUME",
        opcode::STALL_TERM => "CMD_STALL_TERM",
        opcode::SYNC => "CMD_SYNC",
        _ => "an unknown command",
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(u8::try_from(OPCODE.get(self.encode()[0])).unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_architectures_bits() {
        assert_eq!(Command::CfgiSte { sid: 0x18, leaf: true }.encode(), [0x18_0000_0003, 1]);
        assert_eq!(Command::CfgiAll.encode(), [0x04, 31]);
        assert_eq!(Command::TlbiNhAsid { vmid: 0, asid: 7 }.encode(), [0x0007_0000_0000_0011, 0]);
        assert_eq!(Command::TlbiNsnhAll.encode(), [0x30, 0]);
        assert_eq!(Command::CfgiCdAll { sid: 0x18 }.encode(), [0x18_0000_0006, 0]);
        assert_eq!(Command::CfgiCd { sid: 0x18, ssid: 3, leaf: false }.encode(), [0x18_0000_3005, 0]);
        assert_eq!(Command::AtcInv { sid: 8, ssid: None, addr: 0x8000, log2: 3 }.encode(), [0x8_0000_0040, 0x8003]);
        assert_eq!(Command::AtcInv { sid: 8, ssid: Some(5), addr: 0, log2: 52 }.encode(), [0x8_0000_5840, 52]);
        assert_eq!(Command::Sync.encode(), [0x46, 0]);
        assert_eq!(Command::SyncEvent.encode(), [0x2046, 0]);
        assert_eq!(
            Command::SyncMessage { address: 0x1_2345_6788, data: 0xdead_beef }.encode(),
            [0xdead_beef_0fc0_1046, 0x1_2345_6788]
        );
        let failure = PriResponse::ResponseFailure;
        assert_eq!(
            Command::PriResp { sid: 0x18, ssid: Some(5), group: 0x1ff, response: failure }.encode(),
            [0x18_0000_5841, 0x1ff]
        );
        let success = PriResponse::Success;
        assert_eq!(
            Command::PriResp { sid: 0x18, ssid: None, group: 3, response: success }.encode(),
            [0x18_0000_0041, 0x2003]
        );
        let range = TlbiRange { num: 30, scale: 7, tg: 1, ttl: 3 };
        assert_eq!(
            Command::TlbiNhVa { vmid: 0, asid: 0x1234, addr: 0xffff_f000, range, leaf: true }.encode(),
            [0x1234_0000_0071_e012, 0xffff_f701]
        );
    }
}
