//! The 64 bits of an entry (DDI 0487, D8.3 and D8.5), and what a permission becomes in them.

use super::Stage;
use super::geometry::LAST;
use crate::{MapError, PhysAddr, Prot};

/// AttrIndx of write-back memory that the device shares coherently with the CPU.
pub const MAIR_WRITE_BACK: u8 = 0;
/// AttrIndx of normal non-cacheable memory.
pub const MAIR_NON_CACHEABLE: u8 = 1;
/// AttrIndx of registers: Device-nGnRE.
pub const MAIR_DEVICE: u8 = 2;
/// The MAIR that a context descriptor needs for tables of this module.
pub const MAIR: u64 = 0xff << (8 * MAIR_WRITE_BACK) | 0x44 << (8 * MAIR_NON_CACHEABLE) | 0x04 << (8 * MAIR_DEVICE);

const VALID: u64 = 1;
/// A table above the last level, a page on it. Clear on a valid entry above the last level: a block.
const TABLE_OR_PAGE: u64 = 1 << 1;
const KIND: u64 = VALID | TABLE_OR_PAGE;
const AF: u64 = 1 << 10;
const CONTIGUOUS: u64 = 1 << 52;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

const SH_OUTER: u64 = 0b10 << 8;
const SH_INNER: u64 = 0b11 << 8;

const S1_ATTR_SHIFT: u32 = 2;
const S1_ATTR: u64 = 0b111 << S1_ATTR_SHIFT;
const S1_AP_UNPRIVILEGED: u64 = 1 << 6;
const S1_AP_READ_ONLY: u64 = 1 << 7;
const S1_NG: u64 = 1 << 11;
const S1_PXN: u64 = 1 << 53;
const S1_UXN: u64 = 1 << 54;

const S2_ATTR: u64 = 0b1111 << 2;
const S2_ATTR_WRITE_BACK: u64 = 0b1111 << 2;
const S2_ATTR_NON_CACHEABLE: u64 = 0b0101 << 2;
const S2_ATTR_DEVICE: u64 = 0b0001 << 2;
const S2_AP_READ: u64 = 1 << 6;
const S2_AP_WRITE: u64 = 1 << 7;
const S2_XN: u64 = 1 << 54;

/// Nothing there.
pub(super) const EMPTY: u64 = 0;

/// Invalid to hardware (bit 0 is clear, the rest is software's), claimed by a mapping that is being made.
pub(super) const CLAIMED: u64 = TABLE_OR_PAGE;

/// What the leaves of one mapping have in common, as a page has it; the address is added to it.
#[derive(Clone, Copy)]
pub(super) struct Template(u64);

/// The templates of all permissions, so that mapping a page looks its attributes up.
pub(super) struct Templates([Template; PROTS]);

/// Combinations of permissions; [`Prot::PAGEWISE`], the bit above the others, is none.
const PROTS: usize = Prot::PAGEWISE.bits() as usize;

impl Templates {
    /// Encodes all permissions for `stage`.
    pub fn new(stage: Stage) -> Self {
        Self(core::array::from_fn(|bits| Template::new(stage, Prot::from_bits_truncate(bits as u8))))
    }

    /// The template for `prot`.
    ///
    /// # Errors
    ///
    /// [`MapError::BadProt`] without read and write, and for what could be both written and executed.
    #[inline]
    pub fn get(&self, prot: Prot) -> Result<Template, MapError> {
        let template = self.0[usize::from(prot.bits()) & (PROTS - 1)];
        if template.0 == EMPTY { Err(MapError::BadProt) } else { Ok(template) }
    }
}

impl Template {
    fn new(stage: Stage, prot: Prot) -> Self {
        let writable_code = prot.contains(Prot::WRITE | Prot::EXECUTE);
        if !prot.intersects(Prot::READ | Prot::WRITE) || writable_code {
            return Self(EMPTY);
        }
        let common = KIND | AF;
        Self(match stage {
            Stage::One => common | S1_NG | S1_PXN | stage1(prot),
            // (A stage 2 is no process's.)
            Stage::Two => common | S2_XN | stage2(prot),
        })
    }

    /// The block that maps to `phys`.
    #[inline]
    pub const fn block(self, phys: u64) -> u64 {
        self.0 & !TABLE_OR_PAGE | phys
    }

    /// The leaf of `level` that maps to `phys`.
    #[inline]
    pub const fn leaf(self, level: usize, phys: u64, contiguous: bool) -> u64 {
        let leaf = if level == LAST { self.0 } else { self.0 & !TABLE_OR_PAGE };
        let hint = if contiguous { CONTIGUOUS } else { 0 };
        leaf | hint | phys
    }
}

fn stage1(prot: Prot) -> u64 {
    let memory = if prot.contains(Prot::MMIO) {
        u64::from(MAIR_DEVICE) << S1_ATTR_SHIFT | SH_OUTER
    } else if prot.contains(Prot::NON_COHERENT) {
        u64::from(MAIR_NON_CACHEABLE) << S1_ATTR_SHIFT | SH_OUTER
    } else {
        u64::from(MAIR_WRITE_BACK) << S1_ATTR_SHIFT | SH_INNER
    };
    let read_only = if prot.contains(Prot::WRITE) { 0 } else { S1_AP_READ_ONLY };
    let unprivileged = if prot.contains(Prot::PRIVILEGED) { 0 } else { S1_AP_UNPRIVILEGED };
    let never_executed = if prot.contains(Prot::EXECUTE) { 0 } else { S1_UXN };
    memory | read_only | unprivileged | never_executed
}

fn stage2(prot: Prot) -> u64 {
    let memory = if prot.contains(Prot::MMIO) {
        S2_ATTR_DEVICE | SH_OUTER
    } else if prot.contains(Prot::NON_COHERENT) {
        S2_ATTR_NON_CACHEABLE | SH_OUTER
    } else {
        S2_ATTR_WRITE_BACK | SH_INNER
    };
    let read = if prot.contains(Prot::READ) { S2_AP_READ } else { 0 };
    let write = if prot.contains(Prot::WRITE) { S2_AP_WRITE } else { 0 };
    memory | read | write
}

/// Where in a leaf of either stage stand its permissions and memory type, and how many values they have.
const SAID_SHIFT: u32 = 2;
const SAID: usize = 1 << 6;

/// What leaves let a device do, so that translating looks it up.
pub(super) struct Said([Prot; SAID]);

impl Said {
    /// Decodes all that a leaf of `stage` can say.
    pub fn new(stage: Stage) -> Self {
        Self(core::array::from_fn(|bits| decode(stage, (bits as u64) << SAID_SHIFT)))
    }

    /// What `leaf` says.
    #[inline(always)]
    pub fn get(&self, leaf: u64) -> Prot {
        self.0[(leaf >> SAID_SHIFT) as usize % SAID]
    }
}

/// What a leaf lets a device do.
fn decode(stage: Stage, leaf: u64) -> Prot {
    let mut prot = Prot::empty();
    match stage {
        Stage::One => {
            prot |= Prot::READ;
            prot.set(Prot::WRITE, leaf & S1_AP_READ_ONLY == 0);
            prot.set(Prot::PRIVILEGED, leaf & S1_AP_UNPRIVILEGED == 0);
            let index = (leaf & S1_ATTR) >> S1_ATTR_SHIFT;
            prot.set(Prot::MMIO, index == u64::from(MAIR_DEVICE));
            prot.set(Prot::NON_COHERENT, index == u64::from(MAIR_NON_CACHEABLE));
        }
        Stage::Two => {
            prot.set(Prot::READ, leaf & S2_AP_READ != 0);
            prot.set(Prot::WRITE, leaf & S2_AP_WRITE != 0);
            prot.set(Prot::MMIO, leaf & S2_ATTR == S2_ATTR_DEVICE);
            prot.set(Prot::NON_COHERENT, leaf & S2_ATTR == S2_ATTR_NON_CACHEABLE);
        }
    }
    prot
}

/// The entry that links the table at `phys`.
#[inline]
pub(super) const fn table(phys: PhysAddr) -> u64 {
    KIND | phys.get()
}

/// Whether an entry above the last level links a table.
#[inline]
pub(super) const fn is_table(entry: u64) -> bool {
    entry & KIND == KIND
}

/// Whether an entry of `level` is a block or page.
#[inline]
pub(super) const fn is_leaf(entry: u64, level: usize) -> bool {
    entry & KIND == if level == LAST { KIND } else { VALID }
}

/// Whether all of the entries of the last level whose conjunction this is are pages.
#[inline]
pub(super) const fn all_leaves(conjunction: u64) -> bool {
    conjunction & KIND == KIND
}

/// Whether a leaf carries the Contiguous bit.
#[inline]
pub(super) const fn is_contiguous(entry: u64) -> bool {
    entry & CONTIGUOUS != 0
}

/// Whether an entry above the last level is a block without the Contiguous bit.
#[inline]
pub(super) const fn is_single_block(entry: u64) -> bool {
    entry & (KIND | CONTIGUOUS) == VALID
}

/// Whether an entry of the last level is a page without the Contiguous bit.
#[inline]
pub(super) const fn is_single_page(entry: u64) -> bool {
    entry & (KIND | CONTIGUOUS) == KIND
}

/// Whether an entry of the last level is a page with the Contiguous bit.
#[inline]
pub(super) const fn is_group(entry: u64) -> bool {
    entry & (KIND | CONTIGUOUS) == KIND | CONTIGUOUS
}

/// The output address of a leaf.
#[inline]
pub(super) const fn address(entry: u64) -> u64 {
    entry & ADDRESS
}
