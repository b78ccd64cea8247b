//! The shape of a VMSAv8-64 table: granule, sizes, levels.
//!
//! Everything that a walk needs is computed here once, so that the walk itself shifts and masks and never divides.

use super::Leaf;
use crate::contract::Aperture;
use crate::{GeometryError, Iova, IovaRange, PhysAddr};
use core::fmt;

/// A shift of a u64, as the compiler must see it to leave out the check that it is less than 64. All are.
const SHIFT: u32 = 63;

/// The level whose entries are pages.
pub(super) const LAST: usize = 3;

/// The translation granule: the size of a page and of a full table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granule {
    /// 4 KiB pages, 2 MiB and 1 GiB blocks.
    K4,
    /// 16 KiB pages, 32 MiB blocks.
    K16,
    /// 64 KiB pages, 512 MiB blocks.
    K64,
}

impl Granule {
    /// log2 of the page size in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// The page size in bytes.
    pub const fn size(self) -> u64 {
        1 << self.shift()
    }

    /// Address bits that one level resolves.
    const fn bits(self) -> u32 {
        self.shift() - 3
    }

    /// The first level whose entries can be blocks.
    const fn first_leaf_level(self) -> usize {
        match self {
            Self::K4 => 1,
            Self::K16 | Self::K64 => 2,
        }
    }

    /// How many neighbouring entries of `level` one Contiguous bit ties together (DDI 0487, D8.7.1).
    const fn contiguous(self, level: usize) -> usize {
        match (self, level) {
            (Self::K4, _) => 16,
            (Self::K16, LAST) => 128,
            (Self::K16 | Self::K64, _) => 32,
        }
    }
}

/// Which of the two translations a table does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// From the device's address to an intermediate address (or to a physical one where there is no stage 2).
    One,
    /// From an intermediate address to a physical one.
    Two,
}

/// One level of lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Level {
    /// log2 of what one entry maps, in bytes.
    pub shift: u32,
    /// Entries in a table of this level, less one.
    pub mask: usize,
    /// How many entries one Contiguous bit ties together.
    pub contiguous: usize,
    /// Whether an entry may be a block or page.
    pub leaf: bool,
}

impl Level {
    /// Bytes that one entry maps.
    #[inline]
    pub const fn size(self) -> u64 {
        1 << (self.shift & SHIFT)
    }
}

/// The shape of a table, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    granule: Granule,
    stage: Stage,
    input_bits: u8,
    output_bits: u8,
    start: usize,
    levels: [Level; LAST + 1],
}

impl Geometry {
    /// Checks and completes a shape: `input_bits` (IAS) and `output_bits` (OAS) are 32 to 48.
    ///
    /// A stage 2 that would start with a table of at most 16 entries at a level which has no blocks starts one level lower
    /// instead, with as many concatenated tables: for 4K and 16K granules and some sizes the architecture demands it, nowhere
    /// does it forbid it, and it saves a level.
    ///
    /// # Errors
    ///
    /// [`GeometryError`] for sizes that the format (without LPA2 and LVA) does not have, and for a stage 2 whose input is
    /// larger than its output.
    pub fn new(granule: Granule, stage: Stage, input_bits: u8, output_bits: u8) -> Result<Self, GeometryError> {
        if !(32..=48).contains(&input_bits) {
            return Err(GeometryError::InputSize(input_bits));
        }
        if !(32..=48).contains(&output_bits) {
            return Err(GeometryError::OutputSize(output_bits));
        }
        if stage == Stage::Two && input_bits > output_bits {
            return Err(GeometryError::InputExceedsOutput { input: input_bits, output: output_bits });
        }
        let input = u32::from(input_bits);
        let mut levels = [Level::default(); LAST + 1];
        let mut start = 0;
        for (number, level) in levels.iter_mut().enumerate() {
            let below = (LAST - number) as u32;
            level.shift = granule.shift() + granule.bits() * below;
            level.mask = (1 << granule.bits()) - 1;
            level.contiguous = granule.contiguous(number);
            level.leaf = number >= granule.first_leaf_level();
            if level.shift >= input {
                start = number + 1;
            }
        }
        let concatenates = levels.get(start).is_some_and(|level| input - level.shift <= 4 && !level.leaf);
        if stage == Stage::Two && concatenates {
            start += 1;
        }
        if let Some(level) = levels.get_mut(start) {
            level.mask = (1 << (input - level.shift)) - 1;
        }
        Ok(Self { granule, stage, input_bits, output_bits, start, levels })
    }

    /// The translation granule.
    pub const fn granule(&self) -> Granule {
        self.granule
    }

    /// The stage of translation.
    pub const fn stage(&self) -> Stage {
        self.stage
    }

    /// Bits of an input address (IAS).
    pub const fn input_bits(&self) -> u8 {
        self.input_bits
    }

    /// Bits of an output address (OAS).
    pub const fn output_bits(&self) -> u8 {
        self.output_bits
    }

    /// The level of the first lookup, for S2SL0.
    pub const fn start_level(&self) -> u8 {
        self.start as u8
    }

    /// T0SZ or S2T0SZ.
    pub const fn tsz(&self) -> u8 {
        64 - self.input_bits
    }

    /// The sizes in bytes that one leaf can map, one bit for each. Runs under a Contiguous bit are not counted.
    pub fn page_sizes(&self) -> u64 {
        let leaves = self.levels.iter().skip(self.start).filter(|level| level.leaf);
        leaves.fold(0, |sizes, level| sizes | level.size())
    }

    /// What a table of this shape can translate.
    pub fn aperture(&self) -> Aperture {
        Aperture {
            range: IovaRange::new(Iova::new(0), self.input_end()).unwrap_or_default(),
            page_sizes: self.page_sizes(),
            output_max: PhysAddr::new(self.output_end() - 1),
        }
    }

    /// The bytes that a leaf of `level` (0 to 3) maps.
    pub const fn leaf_size(&self, level: u8) -> u64 {
        self.level(level as usize).size()
    }

    /// The bytes that are mapped by a leaf of that kind.
    pub const fn bytes_of(&self, leaf: Leaf) -> u64 {
        let level = self.level(leaf.level() as usize);
        match leaf {
            Leaf::GROUP => level.size() * level.contiguous as u64,
            _ => level.size(),
        }
    }

    /// The first input address that cannot be translated.
    #[inline]
    pub(super) const fn input_end(&self) -> u64 {
        1 << (self.input_bits as u32 & SHIFT)
    }

    /// The first output address that cannot be put out.
    #[inline]
    pub(super) const fn output_end(&self) -> u64 {
        1 << (self.output_bits as u32 & SHIFT)
    }

    /// The number of the first level.
    #[inline]
    pub(super) const fn start(&self) -> usize {
        self.start
    }

    /// The level of that number (0 to 3).
    #[inline]
    pub(super) const fn level(&self, number: usize) -> &Level {
        // The mask is the array's length less one: no bounds check, no panic.
        &self.levels[number & LAST]
    }

    /// Where `iova` is found in a table of `level`. Below the number of its entries for every address of the input range.
    #[inline]
    pub(super) const fn index(&self, level: usize, iova: u64) -> usize {
        let level = self.level(level);
        (iova >> (level.shift & SHIFT)) as usize & level.mask
    }

    /// Bytes of the root table (or tables): at least the 64 that the table base register can address.
    pub(super) const fn root_bytes(&self) -> usize {
        let bytes = (self.level(self.start).mask + 1) * 8;
        if bytes < 64 { 64 } else { bytes }
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::One => 1,
            Stage::Two => 2,
        };
        let kib = self.granule.size() >> 10;
        write!(f, "stage {stage}, {kib}K, {} to {} bits", self.input_bits, self.output_bits)
    }
}
