//! A range of CPU physical addresses whose end is known not to wrap.

use core::fmt;

/// A non-empty range of CPU physical addresses.
///
/// # Invariants
///
/// `size` is not 0, and `base + size - 1` does not overflow: the last byte has an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    base: u64,
    size: u64,
}

impl AddressRange {
    /// Makes the range of `size` bytes at `base`; `None` if it is empty or runs past the end of the address space.
    pub const fn new(base: u64, size: u64) -> Option<Self> {
        if size == 0 || base.checked_add(size - 1).is_none() {
            return None;
        }
        Some(Self { base, size })
    }

    /// Gives the address of the first byte.
    pub const fn base(self) -> u64 {
        self.base
    }

    /// Gives the length in bytes, never 0.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Gives the address of the last byte. (The address after it may not exist.)
    pub const fn last(self) -> u64 {
        // INVARIANT: `base + size - 1` does not overflow.
        self.base + (self.size - 1)
    }

    /// Says whether all of `other` lies in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.base <= other.base && other.last() <= self.last()
    }

    /// Says whether `address` lies in this range.
    pub const fn contains_address(self, address: u64) -> bool {
        self.base <= address && address <= self.last()
    }

    /// Says whether the two ranges have a byte in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.base, self.last())
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_or_wrapping_range_cannot_be_made() {
        assert_eq!(AddressRange::new(5, 0), None);
        assert_eq!(AddressRange::new(u64::MAX, 2), None);
        assert_eq!(AddressRange::new(u64::MAX, 1).map(AddressRange::last), Some(u64::MAX));
        assert_eq!(AddressRange::new(0, u64::MAX).map(AddressRange::last), Some(u64::MAX - 1));
    }

    #[test]
    fn neighbours_do_not_overlap_and_a_range_contains_itself() {
        let (a, b) = (AddressRange::new(0, 16).unwrap(), AddressRange::new(16, 16).unwrap());
        assert!(!a.overlaps(b) && !b.overlaps(a));
        assert!(a.contains(a) && !a.contains(b));
        assert!(a.contains_address(15) && !a.contains_address(16));
    }
}
