//! Stream table entries and level-1 stream table descriptors (IHI 0070, 5.1 and 5.2).
//!
//! An STE is eight 64-bit words. Fields are grouped by word.

use super::Field;

/// 64-bit words of an STE.
pub const WORDS: usize = 8;
/// Bytes of an STE.
pub const SIZE: usize = WORDS * 8;

/// An STE as its words.
pub type Ste = [u64; WORDS];

/// Word 0: the entry is valid.
pub const V: Field = Field::bit(0);
/// Word 0: what becomes of the stream's transactions.
pub const CONFIG: Field = Field::new(3, 1);
/// Word 0: format of the CD table (0 is linear).
pub const S1FMT: Field = Field::new(5, 4);
/// Word 0: address of the CD or CD table.
pub const S1CONTEXTPTR: Field = Field::new(51, 6);
/// Word 0: log2 of the number of CDs.
pub const S1CDMAX: Field = Field::new(63, 59);

/// Word 1: what becomes of transactions without SubstreamID when there are several CDs.
pub const S1DSS: Field = Field::new(1, 0);
/// Word 1: CD fetches, inner cacheability.
pub const S1CIR: Field = Field::new(3, 2);
/// Word 1: CD fetches, outer cacheability.
pub const S1COR: Field = Field::new(5, 4);
/// Word 1: CD fetches, shareability.
pub const S1CSH: Field = Field::new(7, 6);
/// Word 1: merge events.
pub const MEV: Field = Field::bit(19);
/// Word 1: stage 2 forced write-back.
pub const S2FWB: Field = Field::bit(25);
/// Word 1: stage 1 may not stall.
pub const S1STALLD: Field = Field::bit(27);
/// Word 1: PCIe ATS.
pub const EATS: Field = Field::new(29, 28);
/// Word 1: StreamWorld (0 is NS-EL1).
pub const STRW: Field = Field::new(31, 30);
/// Word 1: memory attribute override.
pub const MEMATTR: Field = Field::new(35, 32);
/// Word 1: use `MEMATTR`.
pub const MTCFG: Field = Field::bit(36);
/// Word 1: allocation hint override.
pub const ALLOCCFG: Field = Field::new(40, 37);
/// Word 1: shareability override (1 is "use incoming").
pub const SHCFG: Field = Field::new(45, 44);
/// Word 1: security override.
pub const NSCFG: Field = Field::new(47, 46);
/// Word 1: privilege override.
pub const PRIVCFG: Field = Field::new(49, 48);
/// Word 1: instruction/data override.
pub const INSTCFG: Field = Field::new(51, 50);

/// Word 2: VMID.
pub const S2VMID: Field = Field::new(15, 0);
/// Word 2: stage 2 input size, 64 minus bits.
pub const S2T0SZ: Field = Field::new(37, 32);
/// Word 2: stage 2 start level.
pub const S2SL0: Field = Field::new(39, 38);
/// Word 2: stage 2 walks, inner cacheability.
pub const S2IR0: Field = Field::new(41, 40);
/// Word 2: stage 2 walks, outer cacheability.
pub const S2OR0: Field = Field::new(43, 42);
/// Word 2: stage 2 walks, shareability.
pub const S2SH0: Field = Field::new(45, 44);
/// Word 2: stage 2 granule (0 4K, 1 64K, 2 16K).
pub const S2TG: Field = Field::new(47, 46);
/// Word 2: stage 2 output size.
pub const S2PS: Field = Field::new(50, 48);
/// Word 2: stage 2 tables are VMSAv8-64.
pub const S2AA64: Field = Field::bit(51);
/// Word 2: stage 2 tables are big-endian.
pub const S2ENDI: Field = Field::bit(52);
/// Word 2: stage 2 access flag faults are off.
pub const S2AFFD: Field = Field::bit(53);
/// Word 2: protected table walk.
pub const S2PTW: Field = Field::bit(54);
/// Word 2: stage 2 faults stall.
pub const S2S: Field = Field::bit(57);
/// Word 2: stage 2 faults are recorded.
pub const S2R: Field = Field::bit(58);

/// Word 3: stage 2 table address.
pub const S2TTB: Field = Field::new(51, 4);

/// `CONFIG`: abort, silently.
pub const CONFIG_ABORT: u64 = 0b000;
/// `CONFIG`: bypass both stages.
pub const CONFIG_BYPASS: u64 = 0b100;
/// `CONFIG`: stage 1 translates, stage 2 is bypassed.
pub const CONFIG_S1: u64 = 0b101;
/// `CONFIG`: stage 2 translates, stage 1 is bypassed.
pub const CONFIG_S2: u64 = 0b110;
/// `CONFIG`: both stages translate.
pub const CONFIG_NESTED: u64 = 0b111;
/// `S1FMT`: one table of CDs.
pub const S1FMT_LINEAR: u64 = 0;
/// `S1FMT`: two levels, with second levels of 4 KiB (64 CDs).
pub const S1FMT_4K: u64 = 1;
/// `S1FMT`: two levels, with second levels of 64 KiB (1024 CDs).
pub const S1FMT_64K: u64 = 2;
/// `EATS`: translation requests are answered, with physical addresses.
pub const EATS_FULL: u64 = 1;
/// `EATS`: translation requests are answered with stage 1 only.
pub const EATS_SPLIT: u64 = 2;
/// `S1DSS`: transactions without SubstreamID are terminated.
pub const S1DSS_TERMINATE: u64 = 0;
/// `S1DSS`: transactions without SubstreamID bypass stage 1.
pub const S1DSS_BYPASS: u64 = 1;
/// `S1DSS`: transactions without SubstreamID use CD 0.
pub const S1DSS_SSID0: u64 = 2;
/// `STRW`: NS-EL1.
pub const STRW_NSEL1: u64 = 0;
/// `PRIVCFG`: whatever is accessed is accessed with privilege.
pub const PRIVCFG_PRIVILEGED: u64 = 3;
/// `S1CIR`, `S1COR`, `S2IR0`, `S2OR0`: write-back, read-allocate.
pub const CACHE_WBRA: u64 = 1;
/// Non-cacheable.
pub const CACHE_NC: u64 = 0;
/// Outer shareable.
pub const SH_OSH: u64 = 2;
/// Inner shareable.
pub const SH_ISH: u64 = 3;
/// `SHCFG`: use the incoming shareability.
pub const SHCFG_INCOMING: u64 = 1;

/// Level-1 stream table descriptor: log2 of the second level's STEs, plus one; 0 for "none".
pub const L1STD_SPAN: Field = Field::new(4, 0);
/// Level-1 stream table descriptor: address of the second level.
pub const L1STD_L2PTR: Field = Field::new(51, 6);

const _: () = {
    assert!(SIZE == 64 && size_of::<Ste>() == SIZE);
    assert!(V.mask() | CONFIG.mask() | S1FMT.mask() == 0x3f);
    assert!(S1DSS.mask() | S1CIR.mask() | S1COR.mask() | S1CSH.mask() == 0xff);
    assert!(
        S2T0SZ.mask() | S2SL0.mask() | S2IR0.mask() | S2OR0.mask() | S2SH0.mask() | S2TG.mask() | S2PS.mask()
            == Field::new(50, 32).mask()
    );
};
