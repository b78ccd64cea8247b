//! Which DMA addresses a host's bus carries: what `dma-ranges` says, as it is needed for an allocator of addresses.

use super::{DmaRange, PcieHost};
use alloc::vec::Vec;
use iommu::{Iova, IovaRange, OutOfMemory};

impl PcieHost {
    /// From the lowest to the highest DMA address that the bus carries. `None` where it carries all.
    pub fn carried(&self) -> Option<IovaRange> {
        let ranges = self.dma_ranges.as_deref()?;
        let spans = || ranges.iter().filter_map(span);
        // An empty range, which no address is in, where there is nothing: not all of them.
        let (start, end) = (spans().map(|(start, _)| start).min(), spans().map(|(_, end)| end).max());
        Some(start.zip(end).and_then(|(start, end)| IovaRange::between(start, end)).unwrap_or_default())
    }

    /// What the bus does not carry between the addresses that it does, in order.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn not_carried(&self) -> Result<Vec<IovaRange>, OutOfMemory> {
        let ranges = self.dma_ranges.as_deref().unwrap_or_default();
        let (mut sorted, mut holes) = (Vec::new(), Vec::new());
        sorted.try_reserve_exact(ranges.len()).map_err(|_| OutOfMemory)?;
        holes.try_reserve_exact(ranges.len()).map_err(|_| OutOfMemory)?;
        sorted.extend(ranges.iter().filter_map(span));
        sorted.sort_unstable();
        let mut reached: Option<Iova> = None;
        for (start, end) in sorted {
            let hole = reached.and_then(|reached| IovaRange::between(reached, start));
            holes.extend(hole.filter(|hole| !hole.is_empty()));
            reached = reached.max(Some(end));
        }
        Ok(holes)
    }
}

/// Its first DMA address, and the one after the last. `None` where that is beyond the 64-bit space: no such range can be used.
fn span(range: &DmaRange) -> Option<(Iova, Iova)> {
    Some((range.dma, range.dma.checked_add(range.cpu.len())?))
}
