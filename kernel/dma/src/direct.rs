//! Devices that nothing translates for: what they put on the bus is a physical address, at most shifted.
//!
//! A bus window says where a piece of physical memory lies for the device (`dma-ranges`): with physical 0x8000_0000 seen at
//! 0x4000_0000, that is exactly the address that a driver gets.

use crate::lent::{Segment, Segments};
use crate::{Error, Limits};
use alloc::sync::Arc;
use alloc::vec::Vec;
use iommu::{Iova, PAGE_SIZE, PhysAddr, PhysRange};

/// Where a piece of physical memory lies for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusWindow {
    /// The memory.
    pub memory: PhysRange,
    /// Where the device finds its first byte.
    pub bus: Iova,
}

impl BusWindow {
    /// All of memory, where it is.
    pub fn identity() -> Self {
        let end = PhysAddr::new(u64::MAX).align_down(PAGE_SIZE);
        let memory = PhysRange::between(PhysAddr::new(0), end).unwrap_or_default();
        Self { memory, bus: Iova::new(0) }
    }
}

/// The windows of one device.
pub(crate) struct Windows(Vec<BusWindow>);

impl Windows {
    pub(crate) fn new(windows: &[BusWindow]) -> Result<Self, Error> {
        let mut copy = Vec::new();
        copy.try_reserve_exact(windows.len())?;
        for window in windows {
            let whole_pages = window.memory.is_aligned(PAGE_SIZE) && window.bus.is_aligned(PAGE_SIZE);
            if !whole_pages || window.bus.checked_add(window.memory.len()).is_none() {
                return Err(Error::BadWindow(window.memory));
            }
            copy.push(*window);
        }
        Ok(Self(copy))
    }

    /// The highest physical address that the device reaches.
    pub(crate) fn reach(&self, limits: &Limits) -> PhysAddr {
        let reach = |window: &BusWindow| {
            let below_mask = limits.address_mask.checked_sub(window.bus.get())?.saturating_add(1);
            let last = window.memory.len().min(below_mask).checked_sub(1)?;
            window.memory.start().checked_add(last)
        };
        self.0.iter().filter_map(reach).max().unwrap_or_default()
    }

    /// What the device must put out to reach `runs`: a segment for each run, neighbours merged.
    pub(crate) fn segments(&self, runs: &[PhysRange], limits: &Limits, device: &Arc<str>) -> Result<Segments, Error> {
        let mut segments = Segments::default();
        for run in runs {
            let unreachable = || Error::Unreachable { device: device.clone(), memory: *run };
            let mut left = *run;
            while !left.is_empty() {
                let window =
                    self.0.iter().find(|window| window.memory.contains(left.start())).ok_or_else(unreachable)?;
                let offset = left.start().get() - window.memory.start().get();
                let len = left.len().min(window.memory.len() - offset);
                // Both fit: a window's end does not overflow, and `offset + len` is inside the window.
                let iova = Iova::new(window.bus.get() + offset);
                if iova.get() + (len - 1) > limits.address_mask {
                    return Err(unreachable());
                }
                if !iova.is_aligned(limits.min_align) {
                    return Err(Error::Misaligned { device: device.clone(), address: iova });
                }
                segments.push(Segment { iova, len })?;
                left = left.part(len, left.len() - len).ok_or_else(unreachable)?;
            }
        }
        Ok(segments)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len: u64) -> PhysRange {
        PhysRange::new(PhysAddr::new(start), len).unwrap()
    }

    #[test]
    fn memory_at_2_gib_is_seen_at_1_gib_where_the_window_says_so() {
        let windows =
            Windows::new(&[BusWindow { memory: run(0x8000_0000, 0x4000_0000), bus: Iova::new(0x4000_0000) }]).unwrap();
        let name = "device".into();
        let segments = windows.segments(&[run(0x8000_0000, 0x1000)], &Limits::NONE, &name).unwrap();
        assert_eq!(segments.as_slice(), [Segment { iova: Iova::new(0x4000_0000), len: 0x1000 }]);
        let outside = windows.segments(&[run(0x7fff_f000, 0x2000)], &Limits::NONE, &name);
        assert!(matches!(outside, Err(Error::Unreachable { .. })));
        let across = windows.segments(&[run(0xbfff_f000, 0x2000)], &Limits::NONE, &name);
        assert!(matches!(across, Err(Error::Unreachable { .. })));
    }

    #[test]
    fn memory_beyond_the_address_lines_is_unreachable() {
        let windows = Windows::new(&[BusWindow::identity()]).unwrap();
        let (limits, name) = (Limits::address_bits(32), "device".into());
        assert_eq!(windows.reach(&limits), PhysAddr::new(0xffff_ffff));
        assert!(windows.segments(&[run(0xffff_f000, 0x1000)], &limits, &name).is_ok());
        let beyond = windows.segments(&[run(0xffff_f000, 0x2000)], &limits, &name);
        assert!(matches!(beyond, Err(Error::Unreachable { .. })));
    }

    #[test]
    fn runs_that_touch_on_the_bus_are_one_segment() {
        let windows = Windows::new(&[
            BusWindow { memory: run(0x1_0000, 0x1000), bus: Iova::new(0x9000) },
            BusWindow { memory: run(0x5_0000, 0x1000), bus: Iova::new(0xa000) },
        ])
        .unwrap();
        let name = "device".into();
        let runs = [run(0x1_0000, 0x1000), run(0x5_0000, 0x1000), run(0x1_0000, 0x1000)];
        let segments = windows.segments(&runs, &Limits::NONE, &name).unwrap();
        assert_eq!(
            segments.as_slice(),
            [Segment { iova: Iova::new(0x9000), len: 0x2000 }, Segment { iova: Iova::new(0x9000), len: 0x1000 }]
        );
    }
}
