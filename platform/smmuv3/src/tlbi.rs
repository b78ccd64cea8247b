//! Splitting an address range into range-based TLB invalidations (IHI 0070, 4.4.1.1).
//!
//! A range command covers `(NUM + 1) * 2^SCALE` pages. The split is exact (never a page less, never one more) and takes the
//! largest piece first; pieces start where the one before ended and are multiples of every power of two that the whole is a
//! multiple of, so that a level hint that is right for the whole is right for each piece.

use crate::spec::command::TlbiRange;
use iommu::IovaRange;

/// The largest multiplier of one command (NUM + 1).
const NUM_MAX: u64 = 32;
/// The largest SCALE (five bits, as IDR5.DS is not used).
const SCALE_MAX: u32 = 31;

/// The largest `num * 2^scale` that is at most `pages`; on a tie the larger scale. `None` for nothing.
const fn piece(pages: u64) -> Option<(u64, u32)> {
    if pages == 0 {
        return None;
    }
    // The five highest bits are what one command can express; a tie (such as 32 = 32 * 2^0 = 1 * 2^5) moves into the scale.
    let bits = u64::BITS - pages.leading_zeros();
    let mut scale = bits.saturating_sub(5);
    if scale > SCALE_MAX {
        scale = SCALE_MAX;
    }
    let mut num = pages >> scale;
    if num > NUM_MAX {
        num = NUM_MAX;
    }
    let even = num.trailing_zeros();
    let room = SCALE_MAX - scale;
    let shift = if even < room { even } else { room };
    Some((num >> shift, scale + shift))
}

/// The pieces of a range, as an iterator of `(address, range)`.
#[derive(Clone, Debug)]
pub struct Split {
    address: u64,
    pages: u64,
    shift: u32,
    tg: u8,
    ttl: u8,
}

impl Split {
    /// Splits `range` into invalidations of pages of 2^`shift` bytes (12, 14 or 16). `ttl` is the level of all leaf entries in
    /// the range, or 0 if they differ or are not known.
    ///
    /// The ends are rounded outwards to pages: to invalidate more is always right.
    pub fn new(range: IovaRange, shift: u32, ttl: u8) -> Self {
        let page = 1_u64 << shift;
        let start = range.start().get() & !(page - 1);
        let bytes = range.end().get() - start;
        let tg = match shift {
            12 => 1,
            14 => 2,
            _ => 3,
        };
        // Level 1 of the 16K granule has no block without 52-bit addresses: the encoding is reserved.
        let ttl = if tg == 2 && ttl == 1 { 0 } else { ttl };
        Self { address: start, pages: if range.is_empty() { 0 } else { bytes.div_ceil(page) }, shift, tg, ttl }
    }
}

impl Split {
    /// The only piece of `range`, where it is whole pages, as many as one power of two: what [`Split::new`] would find.
    #[inline]
    pub fn whole(range: IovaRange, shift: u32, ttl: u8) -> Option<(u64, TlbiRange)> {
        let shift = shift & 63;
        let pages = range.len() >> shift;
        if !pages.is_power_of_two() || (range.start().get() | range.len()) & ((1 << shift) - 1) != 0 {
            return None;
        }
        let scale = pages.trailing_zeros();
        if scale > SCALE_MAX {
            return None;
        }
        let tg = (shift / 2).wrapping_sub(5) as u8;
        let ttl = if tg == 2 && ttl == 1 { 0 } else { ttl };
        if scale == 0 && ttl == 0 {
            return Some((range.start().get(), TlbiRange::SINGLE));
        }
        Some((range.start().get(), TlbiRange { num: 0, scale: scale as u8, tg, ttl }))
    }
}

impl Iterator for Split {
    type Item = (u64, TlbiRange);

    fn next(&mut self) -> Option<Self::Item> {
        let (num, scale) = piece(self.pages)?;
        let address = self.address;
        let pages = num << scale;
        self.pages -= pages;
        self.address = self.address.wrapping_add(pages << self.shift);
        // A range of one page without a level hint is a reserved encoding: there the plain form says the same.
        let range = if num == 1 && scale == 0 && self.ttl == 0 {
            TlbiRange::SINGLE
        } else {
            #[allow(clippy::cast_possible_truncation)] // At most 32 and 31.
            TlbiRange { num: (num - 1) as u8, scale: scale as u8, tg: self.tg, ttl: self.ttl }
        };
        Some((address, range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::Iova;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn pieces(mut pages: u64) -> Vec<(u32, u64)> {
        let mut all = Vec::new();
        while let Some((num, scale)) = piece(pages) {
            all.push((scale, num));
            pages -= num << scale;
        }
        all
    }

    #[test]
    fn a_range_is_split_into_the_fewest_largest_pieces() {
        assert_eq!(pieces(0), vec![]);
        assert_eq!(pieces(1), vec![(0, 1)]);
        assert_eq!(pieces(3), vec![(0, 3)]);
        assert_eq!(pieces(6), vec![(1, 3)]);
        assert_eq!(pieces(7), vec![(0, 7)]);
        assert_eq!(pieces(10), vec![(1, 5)]);
        assert_eq!(pieces(31), vec![(0, 31)]);
        assert_eq!(pieces(32), vec![(5, 1)]);
        assert_eq!(pieces(33), vec![(5, 1), (0, 1)]);
        assert_eq!(pieces(62), vec![(1, 31)]);
        assert_eq!(pieces(63), vec![(1, 31), (0, 1)]);
        assert_eq!(pieces(1023), vec![(5, 31), (0, 31)]);
        assert_eq!(pieces(4095), vec![(7, 31), (2, 31), (0, 3)]);
        assert_eq!(pieces(1 << 32), vec![(31, 2)]);
    }

    #[test]
    fn one_page_without_a_level_is_the_plain_form_because_the_range_form_is_reserved() {
        let range = IovaRange::new(Iova::new(0x5000), 0x1000).unwrap();
        assert_eq!(Split::new(range, 12, 0).collect::<Vec<_>>(), vec![(0x5000, TlbiRange::SINGLE)]);
        let hinted = Split::new(range, 12, 3).next().unwrap().1;
        assert_eq!((hinted.tg, hinted.ttl, hinted.num, hinted.scale), (1, 3, 0, 0));
    }

    #[test]
    fn the_reserved_level_of_the_16k_granule_is_not_used() {
        let range = IovaRange::new(Iova::new(0), 1 << 36).unwrap();
        assert!(Split::new(range, 14, 1).all(|(_, range)| range.ttl == 0));
    }

    proptest! {
        #[test]
        fn the_pieces_cover_the_range_exactly(
            start in 0_u64..(1 << 36), pages in 0_u64..(1 << 36), shift in prop::sample::select(vec![12_u32, 14, 16])
        ) {
            let start = start << shift;
            let Some(range) = IovaRange::new(Iova::new(start), pages << shift) else { return Ok(()) };
            let mut next = start;
            for (address, range) in Split::new(range, shift, 0) {
                prop_assert_eq!(address, next);
                let reserved = range.num == 0 && range.scale == 0 && range.ttl == 0 && range.tg != 0;
                prop_assert!(!reserved && range.scale <= 31 && range.num <= 31);
                next += (u64::from(range.num) + 1) << (u32::from(range.scale) + shift);
            }
            prop_assert_eq!(next, range.end().get());
        }

        #[test]
        fn a_range_of_one_piece_is_that_piece(
            start in 0_u64..(1 << 36), log2 in 0_u32..34, more in prop::option::weighted(0.2, 1_u64..100_000),
            shift in prop::sample::select(vec![12_u32, 14, 16]), ttl in 0_u8..4,
        ) {
            let len = (1_u64 << log2 << shift) + more.unwrap_or(0);
            let Some(range) = IovaRange::new(Iova::new(start << shift), len) else { return Ok(()) };
            if let Some(piece) = Split::whole(range, shift, ttl) {
                prop_assert_eq!(Split::new(range, shift, ttl).collect::<Vec<_>>(), vec![piece]);
            } else {
                prop_assert!(more.is_some() || log2 > SCALE_MAX);
            }
        }

        #[test]
        fn no_piece_of_a_range_of_blocks_starts_inside_a_block(start in 0_u64..1000, blocks in 1_u64..5000) {
            let range = IovaRange::new(Iova::new(start << 21), blocks << 21).unwrap();
            for (address, range) in Split::new(range, 12, 2) {
                prop_assert_eq!(address % (1 << 21), 0);
                prop_assert_eq!(((u64::from(range.num) + 1) << range.scale) % 512, 0);
            }
        }
    }
}
