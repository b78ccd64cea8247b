//! Arithmetic of queue indexes (IHI 0070, 3.5.1).
//!
//! An index register holds the position in the queue and, one bit above it, a wrap bit that flips each time around: equal
//! indexes with equal wrap bits are an empty queue, with different ones a full queue.

/// The size of a queue of 2^`log2` entries, and arithmetic on its indexes.
///
/// Kept as the mask, so that what is done for each command neither shifts nor checks a shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSize {
    /// The bits of position and wrap bit: twice the number of entries, less one.
    mask: u32,
}

impl QueueSize {
    /// The architecture's limit (IDR1.CMDQS and EVENTQS).
    pub const MAX_LOG2: u32 = 19;

    /// A queue of 2^`log2` entries; larger than the architecture allows is clamped.
    pub const fn new(log2: u32) -> Self {
        let log2 = if log2 > Self::MAX_LOG2 { Self::MAX_LOG2 } else { log2 };
        Self { mask: (2 << log2) - 1 }
    }

    /// log2 of the number of entries.
    pub const fn log2(self) -> u32 {
        self.mask.trailing_ones() - 1
    }

    /// The number of entries.
    #[inline]
    pub const fn entries(self) -> u32 {
        (self.mask >> 1) + 1
    }

    /// The bits of an index register that count: position and wrap bit.
    #[inline]
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// Where in the queue `index` points.
    #[inline]
    pub const fn slot(self, index: u32) -> usize {
        (index & (self.mask >> 1)) as usize
    }

    /// The index `count` entries after `index`.
    pub const fn advance(self, index: u32, count: u32) -> u32 {
        index.wrapping_add(count) & self.mask()
    }

    /// Entries from `from` to `to`. More than [`Self::entries`] can only come of indexes that do not belong together.
    #[inline]
    pub const fn distance(self, from: u32, to: u32) -> u32 {
        to.wrapping_sub(from) & self.mask()
    }

    /// Whether nothing is left to read.
    pub const fn is_empty(self, prod: u32, cons: u32) -> bool {
        self.distance(cons, prod) == 0
    }

    /// Whether no entry can be written.
    pub const fn is_full(self, prod: u32, cons: u32) -> bool {
        self.distance(cons, prod) >= self.entries()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_queue_is_full_when_only_the_wrap_bit_differs() {
        let q = QueueSize::new(2);
        assert!(q.is_empty(0, 0) && q.is_empty(5, 5) && q.is_full(4, 0) && q.is_full(1, 5));
        assert_eq!(q.advance(7, 1), 0);
        assert_eq!((q.slot(3), q.slot(4), q.slot(7)), (3, 0, 3));
    }

    #[test]
    fn bits_above_the_wrap_bit_do_not_count() {
        let q = QueueSize::new(3);
        assert!(q.is_empty(0x8000_0003, 3));
    }

    proptest! {
        #[test]
        fn indexes_behave_like_a_counter(log2 in 0_u32..20, start: u32, count in 0_u32..(1 << 20)) {
            let q = QueueSize::new(log2);
            let start = start & q.mask();
            let count = count.min(q.entries());
            let end = q.advance(start, count);
            prop_assert_eq!(q.distance(start, end), count);
            prop_assert_eq!(q.is_empty(end, start), count == 0);
            prop_assert_eq!(q.is_full(end, start), count == q.entries());
            prop_assert_eq!(q.slot(end), (q.slot(start) + count as usize) % q.entries() as usize);
        }
    }
}
