//! Splitting an address range into invalidations of a device's translation cache (IHI 0070, 3.9.1 and 4.5).
//!
//! CMD_ATC_INV covers a power of two of 4 KiB pages, aligned to its size. The split is exact and has the fewest such pieces.

use iommu::IovaRange;

/// The unit of CMD_ATC_INV, whatever the granule.
const PAGE_SHIFT: u32 = 12;
/// `log2` of an invalidation of everything (4.5.1).
pub(crate) const EVERYTHING: u8 = 52;

/// The pieces of a range, as an iterator of `(address, log2 of the pages)`.
#[derive(Clone, Debug)]
pub(crate) struct Spans {
    page: u64,
    end: u64,
}

impl Spans {
    /// Splits `range`, whose ends are rounded outwards to pages.
    pub fn new(range: IovaRange) -> Self {
        let page = range.start().get() >> PAGE_SHIFT;
        let end = range.end().get().div_ceil(1 << PAGE_SHIFT);
        Self { page, end: if range.is_empty() { page } else { end } }
    }
}

impl Iterator for Spans {
    type Item = (u64, u8);

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.end - self.page;
        if left == 0 {
            return None;
        }
        // As far as the alignment of the address goes, and no further than the end.
        let log2 = self.page.trailing_zeros().min(left.ilog2());
        let address = self.page << PAGE_SHIFT;
        self.page += 1 << log2;
        Some((address, u8::try_from(log2).unwrap_or(EVERYTHING)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::Iova;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn spans(start: u64, pages: u64) -> Vec<(u64, u8)> {
        Spans::new(IovaRange::new(Iova::new(start << 12), pages << 12).unwrap()).collect()
    }

    #[test]
    fn a_range_is_split_into_the_fewest_aligned_powers_of_two() {
        assert_eq!(spans(5, 0), vec![]);
        assert_eq!(spans(5, 1), vec![(0x5000, 0)]);
        assert_eq!(spans(8, 8), vec![(0x8000, 3)]);
        assert_eq!(spans(0, 8), vec![(0, 3)]);
        // The case of the PCIe specification's readers: 7 to 10 is no power of two.
        assert_eq!(spans(7, 4), vec![(0x7000, 0), (0x8000, 1), (0xa000, 0)]);
        assert_eq!(spans(1, 7), vec![(0x1000, 0), (0x2000, 1), (0x4000, 2)]);
    }

    proptest! {
        #[test]
        fn the_pieces_cover_the_range_exactly_and_are_aligned(start in 0_u64..(1 << 36), pages in 0_u64..(1 << 35)) {
            let mut next = start << 12;
            let pieces = spans(start, pages);
            for &(address, log2) in &pieces {
                prop_assert_eq!(address, next);
                prop_assert_eq!((address >> 12) % (1 << log2), 0);
                next += 1 << (u32::from(log2) + 12);
            }
            prop_assert_eq!(next, (start + pages) << 12);
            // No two neighbours could have been one.
            for pair in pieces.windows(2) {
                prop_assert!(pair[0].1 != pair[1].1 || (pair[0].0 >> 12) % (2 << pair[0].1) != 0);
            }
        }
    }
}
