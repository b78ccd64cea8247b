//! Context descriptors (IHI 0070, 5.4). A CD is eight 64-bit words; fields are grouped by word.

use super::Field;

/// 64-bit words of a CD.
pub const WORDS: usize = 8;
/// Bytes of a CD.
pub const SIZE: usize = WORDS * 8;

/// A CD as its words.
pub type Cd = [u64; WORDS];

/// Word 0: TTB0's input size, 64 minus bits.
pub const T0SZ: Field = Field::new(5, 0);
/// Word 0: TTB0's granule (0 4K, 1 64K, 2 16K).
pub const TG0: Field = Field::new(7, 6);
/// Word 0: TTB0 walks, inner cacheability.
pub const IR0: Field = Field::new(9, 8);
/// Word 0: TTB0 walks, outer cacheability.
pub const OR0: Field = Field::new(11, 10);
/// Word 0: TTB0 walks, shareability.
pub const SH0: Field = Field::new(13, 12);
/// Word 0: TTB0 is not walked.
pub const EPD0: Field = Field::bit(14);
/// Word 0: tables are big-endian.
pub const ENDI: Field = Field::bit(15);
/// Word 0: TTB1's input size.
pub const T1SZ: Field = Field::new(21, 16);
/// Word 0: TTB1's granule (1 16K, 2 4K, 3 64K).
pub const TG1: Field = Field::new(23, 22);
/// Word 0: TTB1 is not walked.
pub const EPD1: Field = Field::bit(30);
/// Word 0: the descriptor is valid.
pub const V: Field = Field::bit(31);
/// Word 0: output size.
pub const IPS: Field = Field::new(34, 32);
/// Word 0: access flag faults are off.
pub const AFFD: Field = Field::bit(35);
/// Word 0: writable implies execute-never.
pub const WXN: Field = Field::bit(36);
/// Word 0: unprivileged-writable implies privileged execute-never.
pub const UWXN: Field = Field::bit(37);
/// Word 0: the top byte is ignored (TTB0).
pub const TBI0: Field = Field::bit(38);
/// Word 0: the top byte is ignored (TTB1).
pub const TBI1: Field = Field::bit(39);
/// Word 0: privileged access never.
pub const PAN: Field = Field::bit(40);
/// Word 0: tables are VMSAv8-64.
pub const AA64: Field = Field::bit(41);
/// Word 0: hardware dirty flag.
pub const HD: Field = Field::bit(42);
/// Word 0: hardware access flag.
pub const HA: Field = Field::bit(43);
/// Word 0: faults stall.
pub const S: Field = Field::bit(44);
/// Word 0: faults are recorded.
pub const R: Field = Field::bit(45);
/// Word 0: terminated transactions are aborted (not read-as-zero).
pub const A: Field = Field::bit(46);
/// Word 0: the ASID is not shared with the processors.
pub const ASET: Field = Field::bit(47);
/// Word 0: ASID.
pub const ASID: Field = Field::new(63, 48);

/// Word 1: hierarchical attributes of TTB0 are off.
pub const HAD0: Field = Field::bit(1);
/// Word 1: table address.
pub const TTB0: Field = Field::new(51, 4);
/// Word 2: table address.
pub const TTB1: Field = Field::new(51, 4);
/// Word 3: all of MAIR.
pub const MAIR: Field = Field::new(63, 0);

/// `TG0`: 4 KiB.
pub const TG0_4K: u64 = 0;
/// `TG0`: 64 KiB.
pub const TG0_64K: u64 = 1;
/// `TG0`: 16 KiB.
pub const TG0_16K: u64 = 2;

/// Level-1 context descriptor: there is a second level.
pub const L1CD_V: Field = Field::bit(0);
/// Level-1 context descriptor: address of the second level.
pub const L1CD_L2PTR: Field = Field::new(51, 12);

const _: () = {
    assert!(SIZE == 64 && size_of::<Cd>() == SIZE);
    assert!(V.mask() == 1 << 31 && AA64.mask() == 1 << 41 && ASID.mask() == 0xffff << 48);
};
