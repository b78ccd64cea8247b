//! A run of bits in a register or a descriptor word.

/// Bits `low..=high` of a 64-bit word, the way the architecture's tables name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    low: u32,
    width: u32,
}

impl Field {
    /// The bits from `high` down to `low`, both included.
    ///
    /// # Panics
    ///
    /// If `high` is below `low` or above 63; all fields are constants, so this fails the build.
    pub const fn new(high: u32, low: u32) -> Self {
        assert!(high >= low && high < 64, "a field ends before it starts");
        Self { low, width: high - low + 1 }
    }

    /// One bit.
    pub const fn bit(bit: u32) -> Self {
        Self::new(bit, bit)
    }

    /// The largest value that fits.
    #[inline(always)]
    pub const fn max(self) -> u64 {
        if self.width == 64 { u64::MAX } else { (1 << self.width) - 1 }
    }

    /// The field's bits, all one, in place.
    #[inline(always)]
    pub const fn mask(self) -> u64 {
        self.max() << self.low
    }

    /// Reads the field out of `word`.
    #[inline(always)]
    pub const fn get(self, word: u64) -> u64 {
        (word >> self.low) & self.max()
    }

    /// Whether any bit of the field is set in `word`.
    #[inline(always)]
    pub const fn is_set(self, word: u64) -> bool {
        word & self.mask() != 0
    }

    /// `value` shifted into place. Bits that do not fit are cut off, never spilled into a neighbour.
    #[inline(always)]
    pub const fn put(self, value: u64) -> u64 {
        debug_assert!(value <= self.max(), "a value does not fit its field");
        (value & self.max()) << self.low
    }

    /// `word` with the field replaced by `value`.
    #[must_use]
    #[inline(always)]
    pub const fn set(self, word: u64, value: u64) -> u64 {
        (word & !self.mask()) | self.put(value)
    }

    /// An address in place: its bits that the field covers, unshifted.
    #[inline(always)]
    pub const fn address(self, address: u64) -> u64 {
        address & self.mask()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_touches_its_own_bits_only() {
        const F: Field = Field::new(11, 6);
        assert_eq!(F.mask(), 0xfc0);
        assert_eq!(F.get(0xffff), 0x3f);
        assert_eq!(F.set(u64::MAX, 0), !0xfc0);
        assert_eq!(Field::new(63, 0).put(u64::MAX), u64::MAX);
    }
}
