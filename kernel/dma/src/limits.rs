//! What a bus master can put on the bus.

use crate::{Error, Segment};

/// The limits of one bus master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The highest DMA address that the device can put out (its last byte): `2^n - 1` for `n` address bits. For streaming
    /// mappings.
    pub address_mask: u64,
    /// The same for coherent memory: some devices take the address of a ring in fewer bits than that of a buffer.
    pub coherent_mask: u64,
    /// The longest segment that one descriptor can name, in bytes. [`slice`](crate::slice) cuts longer ones.
    pub max_segment: u64,
    /// The most segments that one request can have. For drivers: they make their requests small enough.
    pub max_segments: usize,
    /// A power of two that no segment crosses a multiple of. [`slice`](crate::slice) cuts there.
    pub boundary: Option<u64>,
    /// A power of two that every mapping's DMA address is a multiple of.
    pub min_align: u64,
    /// The size of mappings, in bytes, beyond which the device gains nothing: for drivers that may choose.
    pub optimal_size: u64,
}

impl Limits {
    /// No limits: those of a PCI Express function and of a modern virtio device. The first puts out 64 address bits, in packets that
    /// the bus cuts for itself; the second takes addresses of 64 bits and lengths of 32, for rings and buffers alike (the legacy
    /// interface, with its page numbers of 32 bits, is not used), and its driver has the segments of a request counted against
    /// what the device says (`seg_max`, the size of the queue). What a function cannot do is its driver's to say, or the board's.
    pub const NONE: Self = Self {
        address_mask: u64::MAX,
        coherent_mask: u64::MAX,
        max_segment: u64::MAX,
        max_segments: usize::MAX,
        boundary: None,
        min_align: 1,
        optimal_size: u64::MAX,
    };

    /// A device with `bits` address lines and no other limit.
    pub const fn address_bits(bits: u32) -> Self {
        let address_mask = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        Self { address_mask, coherent_mask: address_mask, ..Self::NONE }
    }

    /// Checks a segment that a driver has made by itself. Those of [`slice`](crate::slice) are right by construction.
    ///
    /// # Errors
    ///
    /// [`Error::SegmentTooLong`], [`Error::AcrossBoundary`], [`Error::BadSize`] for a segment of nothing or past the end of the
    /// address space.
    pub fn check_segment(&self, segment: Segment) -> Result<(), Error> {
        let Segment { iova, len } = segment;
        let last = len.checked_sub(1).and_then(|last| iova.checked_add(last)).ok_or(Error::BadSize(len))?;
        if len > self.max_segment {
            return Err(Error::SegmentTooLong { len, max: self.max_segment });
        }
        match self.boundary {
            Some(boundary) if iova.get() / boundary != last.get() / boundary => {
                Err(Error::AcrossBoundary { iova, len, boundary })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.max_segment == 0 || self.max_segments == 0 || self.optimal_size == 0 {
            return Err(Error::BadLimits("a device that takes no segment"));
        }
        if self.boundary.is_some_and(|boundary| !boundary.is_power_of_two()) {
            return Err(Error::BadLimits("the boundary is not a power of two"));
        }
        if !self.min_align.is_power_of_two() {
            return Err(Error::BadLimits("the alignment is not a power of two"));
        }
        Ok(())
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::NONE
    }
}
