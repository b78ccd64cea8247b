//! How a loan was made, in one word that is in a register from a mapping's beginning to its end: what the quick ways ask of it is one bit.
//!
//! | bits | of a loan that is recorded, or has a berth | of one that is passed |
//! |---|---|---|
//! | 0..32 | its [`Kind`] | its [`Kind`], which is what one loan is in a [`Tally`] |
//! | 32..64 | its [`Slot`] | its pages |
//!
//! So the word of a loan that is passed is at once what it is counted by.

use crate::record::{ONE, Slot, Tally};

/// A kind that has a berth.
const BERTH: u32 = 1 << 2;
/// One whose berth has an anchor that knows its leaf.
const ANCHOR: u32 = 1 << 0;

/// How an address range was had: a bit each, but that what is anchored has a berth too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Kind {
    /// It was kept for the device, and is mapped by the leaf that its anchor knows; its berth is the loan's.
    Anchored = ANCHOR | BERTH,
    /// It was kept for the device, and is mapped otherwise; its berth is the loan's.
    Berthed = BERTH,
    /// It was allocated.
    Plain = 1 << 3,
    /// Its driver wanted it: it was reserved.
    Fixed = 1 << 4,
    /// Somebody else reserved it.
    Reserved = 1 << 5,
    /// It is where the memory is: nothing translates.
    Direct = 1 << 6,
    /// Likewise, and nothing is special about the device or the loan, nor is it recorded.
    Passed = ONE as u32,
}

const _: () = assert!(Kind::Passed as u64 == ONE && ONE == 1 << 1, "a bit of its own");

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct How(u64);

impl How {
    #[inline(always)]
    pub(super) const fn new(slot: Slot, kind: Kind) -> Self {
        Self((slot.number() as u64) << 32 | kind as u64)
    }

    /// Of a loan of `len` bytes, whole pages, that is passed.
    #[inline(always)]
    pub(super) fn passed(len: u64) -> Self {
        Self(Tally::word_of_pages(len))
    }

    /// The slot, unless it is passed.
    #[inline(always)]
    pub(super) fn slot(self) -> Slot {
        Slot::of((self.0 >> 32) as u32)
    }

    #[inline(always)]
    pub(super) fn with_slot(self, slot: Slot) -> Self {
        Self(u64::from(self.0 as u32) | u64::from(slot.number()) << 32)
    }

    /// The [`Tally::word`], if it is passed.
    #[inline(always)]
    pub(super) fn word(self) -> u64 {
        self.0
    }

    /// The [`Tally::word`] of a loan of `len` bytes that was made so, unless it is counted by its berth.
    #[inline(always)]
    pub(super) fn counted(self, len: u64) -> Option<u64> {
        match self {
            _ if self.is_passed() => Some(self.word()),
            _ if self.has_berth() => None,
            _ => Some(Tally::word(len)),
        }
    }

    #[inline(always)]
    fn has(self, bits: u32) -> bool {
        self.0 & u64::from(bits) != 0
    }

    #[inline(always)]
    pub(super) fn is_anchored(self) -> bool {
        self.has(ANCHOR)
    }

    /// Whether the slot is the number of a berth.
    #[inline(always)]
    pub(super) fn has_berth(self) -> bool {
        self.has(BERTH)
    }

    #[inline(always)]
    pub(super) fn is_passed(self) -> bool {
        self.has(Kind::Passed as u32)
    }

    #[inline(always)]
    pub(super) fn is_plain(self) -> bool {
        self.has(Kind::Plain as u32)
    }

    #[inline(always)]
    pub(super) fn is_fixed(self) -> bool {
        self.has(Kind::Fixed as u32)
    }

    #[inline(always)]
    pub(super) fn translates(self) -> bool {
        !self.has(Kind::Direct as u32 | Kind::Passed as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::PAGE_SIZE;

    /// What is asked of each kind, whatever the slot; and that neither half shines through in the other.
    #[test]
    fn each_kind_is_told_from_all_others_whatever_its_slot() {
        use Kind::{Anchored, Berthed, Direct, Fixed, Passed, Plain, Reserved};
        let words = [0, 1, 511, 1 << 31, u32::MAX - 1, u32::MAX];
        for slot in words.map(Slot::of) {
            for kind in [Anchored, Berthed, Plain, Fixed, Reserved, Direct, Passed] {
                let how = How::new(slot, kind);
                assert_eq!(how.is_anchored(), kind == Anchored, "{kind:?}");
                assert_eq!(how.has_berth(), matches!(kind, Anchored | Berthed), "{kind:?}");
                assert_eq!(how.is_plain(), kind == Plain, "{kind:?}");
                assert_eq!(how.is_fixed(), kind == Fixed, "{kind:?}");
                assert_eq!(how.is_passed(), kind == Passed, "{kind:?}");
                assert_eq!(how.translates(), !matches!(kind, Direct | Passed), "{kind:?}");
                for other in words.map(Slot::of) {
                    assert_eq!(how.with_slot(other), How::new(other, kind));
                    assert!(how.with_slot(other).slot() == other);
                }
            }
        }
    }

    /// Caught: a word of a loan that is passed which is no [`Tally::word`]; berths that are counted twice.
    #[test]
    fn a_loan_is_counted_by_the_same_word_however_it_was_made_but_in_a_berth() {
        for pages in [1, 3, 512, u64::from(u32::MAX)] {
            let (len, slot) = (pages * PAGE_SIZE, Slot::of(7));
            let passed = How::passed(len);
            assert!(passed.is_passed() && !passed.has_berth() && !passed.is_anchored() && !passed.translates());
            for how in [passed, How::new(slot, Kind::Plain), How::new(Slot::COUNTED, Kind::Direct)] {
                assert_eq!(how.counted(len), Some(Tally::word(len)));
            }
            assert_eq!(How::new(slot, Kind::Berthed).counted(len), None);
            assert_eq!(How::new(slot, Kind::Anchored).counted(len), None);
            // A part of a page, as a copy has it, is in nobody's way.
            assert_eq!(How::new(slot, Kind::Direct).counted(len + 100), Some(Tally::word(len)));
        }
    }
}
