//! A range of numbers on some bus, before it is known to be CPU addresses.

/// A non-empty range of addresses on a bus.
///
/// # Invariants
///
/// `size` is not 0, and `base + size` does not overflow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span {
    base: u64,
    size: u64,
}

impl Span {
    /// Makes the range of `size` bytes at `base`; `None` if it is empty or passes the end of the 64-bit space.
    pub const fn new(base: u64, size: u64) -> Option<Self> {
        if size == 0 || base.checked_add(size).is_none() {
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

    /// Gives the address after the last byte.
    pub const fn end(self) -> u64 {
        // INVARIANT: does not overflow.
        self.base + self.size
    }

    /// Says whether all of `other` lies in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.base <= other.base && other.end() <= self.end()
    }

    /// Says whether the two ranges have a byte in common.
    pub const fn overlaps(self, other: Self) -> bool {
        self.base < other.end() && other.base < self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_or_wrapping_range_cannot_be_made() {
        assert!(Span::new(5, 0).is_none());
        assert!(Span::new(u64::MAX, 1).is_none());
        assert_eq!(Span::new(0, u64::MAX).map(Span::end), Some(u64::MAX));
    }

    #[test]
    fn neighbours_do_not_overlap_and_a_range_contains_itself() {
        let (a, b) = (Span::new(0, 16).unwrap(), Span::new(16, 16).unwrap());
        assert!(!a.overlaps(b) && !b.overlaps(a));
        assert!(a.contains(a) && !a.contains(b));
        assert!(a.overlaps(Span::new(15, 1).unwrap()));
    }
}
