//! Devices that nothing translates for: what they put on the bus is a physical address, at most shifted.
//!
//! A bus window says where a piece of physical memory lies for the device (`dma-ranges`): with physical 0x8000_0000 seen at
//! 0x4000_0000, that is exactly the address that a driver gets.

use crate::lent::{Segment, Segments};
use crate::{Error, Limits};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use iommu::group::{AttachmentState, Group};
use iommu::{AttachError, Iova, PAGE_SIZE, PhysAddr, PhysRange};

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

/// The way of a device that nothing translates for.
pub(crate) struct Direct {
    /// The first window, as far as the device's streaming address lines reach into it: most devices have one.
    first: Near,
    pub windows: Windows,
    group: Option<Membership>,
}

/// A window as the way of a mapping looks at it.
#[derive(Default)]
struct Near {
    start: u64,
    len: u64,
    bus: u64,
}

impl Direct {
    /// The way of a device; where `group` is given, an IOMMU lets it through.
    pub(crate) fn new(
        windows: &[BusWindow],
        limits: &Limits,
        group: Option<Arc<Group>>,
        device: &Arc<str>,
    ) -> Result<Self, Error> {
        let windows = Windows::new(windows)?;
        let near = |window: &BusWindow| Near {
            start: window.memory.start().get(),
            // Where an address must be more than a page's, nothing is near.
            len: if limits.min_align <= PAGE_SIZE { window.reached(limits.address_mask) } else { 0 },
            bus: window.bus.get(),
        };
        let first = windows.0.first().map(near).unwrap_or_default();
        let group = group.map(|group| Membership::new(group, device)).transpose()?;
        Ok(Self { first, windows, group })
    }

    /// The device's address of `run`, which begins where a page does, if it lies in the first window and meets the limits.
    #[inline]
    pub(crate) fn near(&self, run: PhysRange) -> Option<Iova> {
        let Near { start, len, bus } = self.first;
        let offset = run.start().get().wrapping_sub(start);
        // Past the window's end nothing is left of it, and a run has a byte.
        let fits = run.len() <= len.saturating_sub(offset);
        // No overflow: a window's end has an address. It begins where a page does.
        if fits { Some(Iova::new(bus.wrapping_add(offset))) } else { None }
    }

    /// Takes the device out of use: its group is blocked, if it has one and no other is in use.
    pub(crate) fn leave(&self) -> Result<(), AttachError> {
        self.group.as_ref().map_or(Ok(()), Membership::leave)
    }
}

/// A use of a group that an IOMMU lets through.
struct Membership {
    group: Arc<Group>,
    left: AtomicBool,
}

impl Membership {
    fn new(group: Arc<Group>, device: &Arc<str>) -> Result<Self, Error> {
        match group.current() {
            AttachmentState::Identity => {}
            state => return Err(Error::NotAttached { device: device.clone(), state }),
        }
        group.enter();
        Ok(Self { group, left: AtomicBool::new(false) })
    }

    fn leave(&self) -> Result<(), AttachError> {
        if self.left.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.group.leave().map(drop)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            log::error!("dma: a group could not be blocked when its last device was given up: {error}");
        }
    }
}

impl BusWindow {
    /// How many bytes of it a device with this address mask reaches.
    fn reached(&self, mask: u64) -> u64 {
        let below_mask = mask.checked_sub(self.bus.get()).map_or(0, |last| last.saturating_add(1));
        self.memory.len().min(below_mask)
    }
}

/// The windows of one device.
pub(crate) struct Windows(Vec<BusWindow>);

impl Windows {
    /// [`Windows::segments`] of what lies in the first window, meets the limits, and has no neighbours, as nearly all does: into
    /// `segments`, which is empty. `false` for the rest.
    pub(crate) fn fill(
        &self,
        runs: &[PhysRange],
        mask: u64,
        min_align: u64,
        segments: &mut Vec<Segment>,
    ) -> Result<bool, Error> {
        let Some(window) = self.0.first() else { return Ok(false) };
        let (start, reached, bus) = (window.memory.start().get(), window.reached(mask), window.bus.get());
        // All of it is looked at before it is judged: no branch for each run.
        let (mut last_end, mut unfit, mut bits) = (reached, runs.is_empty(), 0);
        for run in runs {
            let offset = run.start().get().wrapping_sub(start);
            unfit |= offset >= reached || run.len() > reached.wrapping_sub(offset) || last_end == offset;
            last_end = offset.wrapping_add(run.len());
            bits |= bus.wrapping_add(offset);
        }
        if unfit || bits & (min_align - 1) != 0 {
            return Ok(false);
        }
        segments.try_reserve(runs.len())?;
        // No overflow: a window's end has an address.
        segments.extend(runs.iter().map(|run| {
            let iova = Iova::new(bus.wrapping_add(run.start().get().wrapping_sub(start)));
            Segment { iova, len: run.len() }
        }));
        Ok(true)
    }

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

    /// The highest physical address that a device with this address mask reaches.
    pub(crate) fn reach(&self, mask: u64) -> PhysAddr {
        let last = |window: &BusWindow| window.memory.start().checked_add(window.reached(mask).checked_sub(1)?);
        self.0.iter().filter_map(last).max().unwrap_or_default()
    }

    /// Whether every address that memory can have is in a window, for a device without limits.
    pub(crate) fn is_all(&self) -> bool {
        self.0.iter().any(|window| window.bus.get() == 0 && window.memory == BusWindow::identity().memory)
    }

    /// What the device must put out to reach `runs`, no byte above `mask`: a segment for each run, neighbours merged.
    pub(crate) fn segments(
        &self,
        runs: &[PhysRange],
        mask: u64,
        min_align: u64,
        device: &Arc<str>,
    ) -> Result<Segments, Error> {
        if runs.len() > 1 {
            let mut many = Vec::new();
            if self.fill(runs, mask, min_align, &mut many)? {
                return Ok(Segments::Many(many));
            }
        }
        let mut segments = Segments::default();
        for run in runs {
            let unreachable = || Error::Unreachable { device: device.clone(), memory: *run };
            let mut left = *run;
            while !left.is_empty() {
                // Windows may overlap: one that is reached.
                let reaches = |window: &&BusWindow| {
                    let offset = left.start().get().wrapping_sub(window.memory.start().get());
                    offset < window.reached(mask)
                };
                let window = self.0.iter().find(reaches).ok_or_else(unreachable)?;
                let offset = left.start().get() - window.memory.start().get();
                let len = left.len().min(window.reached(mask) - offset);
                // Fits: a window's end does not overflow.
                let iova = Iova::new(window.bus.get() + offset);
                if !iova.is_aligned(min_align) {
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
        let segments = windows.segments(&[run(0x8000_0000, 0x1000)], u64::MAX, 1, &name).unwrap();
        assert_eq!(segments.as_slice(), [Segment { iova: Iova::new(0x4000_0000), len: 0x1000 }]);
        let outside = windows.segments(&[run(0x7fff_f000, 0x2000)], u64::MAX, 1, &name);
        assert!(matches!(outside, Err(Error::Unreachable { .. })));
        let across = windows.segments(&[run(0xbfff_f000, 0x2000)], u64::MAX, 1, &name);
        assert!(matches!(across, Err(Error::Unreachable { .. })));
    }

    #[test]
    fn memory_beyond_the_address_lines_is_unreachable() {
        let windows = Windows::new(&[BusWindow::identity()]).unwrap();
        let (limits, name) = (Limits::address_bits(32), "device".into());
        assert_eq!(windows.reach(limits.address_mask), PhysAddr::new(0xffff_ffff));
        assert!(windows.segments(&[run(0xffff_f000, 0x1000)], limits.address_mask, 1, &name).is_ok());
        let beyond = windows.segments(&[run(0xffff_f000, 0x2000)], limits.address_mask, 1, &name);
        assert!(matches!(beyond, Err(Error::Unreachable { .. })));
    }

    /// The quick way of one run and the general one, at each end of the window. Caught: a bound that wraps, or that the run's beginning alone
    /// meets.
    #[test]
    fn a_run_is_near_if_all_of_it_is_in_the_first_window_and_reached() {
        let windows = [
            BusWindow { memory: run(0x10_0000, 0x10_0000), bus: Iova::new(0x4000_0000) },
            BusWindow { memory: run(0x20_0000, 0x1000), bus: Iova::new(0x8000_0000) },
        ];
        let name = "device".into();
        let direct = |limits: Limits| Direct::new(&windows, &limits, None, &name).unwrap();
        let at = |bus| Some(Iova::new(bus));
        let limited = Limits { address_mask: 0x4000_2fff, ..Limits::NONE };
        for (first, len, near, below) in [
            (0x10_0000, 0x1000, at(0x4000_0000), at(0x4000_0000)),
            (0x10_2000, 0x1000, at(0x4000_2000), at(0x4000_2000)),
            (0x10_2000, 0x2000, at(0x4000_2000), None),
            (0x10_0000, 0x10_0000, at(0x4000_0000), None),
            (0x1f_f000, 0x1000, at(0x400f_f000), None),
            (0x1f_f000, 0x2000, None, None),
            (0x20_0000, 0x1000, None, None),
            (0x0f_f000, 0x1000, None, None),
            (0x0f_f000, 0x2000, None, None),
            (0, 0x20_0000, None, None),
        ] {
            let memory = run(first, len);
            assert_eq!(direct(Limits::NONE).near(memory), near, "{memory}");
            assert_eq!(direct(limited).near(memory), below, "{memory}");
            assert_eq!(direct(Limits { min_align: 0x2000, ..Limits::NONE }).near(memory), None, "{memory}");
        }
    }

    /// The quick way and the general one. Red with each of the four conditions of the quick way left out.
    #[test]
    fn many_runs_in_one_window_are_found_as_they_are_one_by_one() {
        let windows = Windows::new(&[
            BusWindow { memory: run(0x10_0000, 0x10_0000), bus: Iova::new(0x4000_0000) },
            BusWindow { memory: run(0x20_0000, 0x1000), bus: Iova::new(0x8000_0000) },
        ])
        .unwrap();
        let name = "device".into();
        let fits = [run(0x10_3000, 0x1000), run(0x10_1000, 0x1000), run(0x1f_e000, 0x2000)];
        let filled = |runs: &[PhysRange], mask, align| {
            let mut list = Vec::new();
            windows.fill(runs, mask, align, &mut list).unwrap().then_some(list)
        };
        let at = |bus, len| Segment { iova: Iova::new(bus), len };
        let expected = [at(0x4000_3000, 0x1000), at(0x4000_1000, 0x1000), at(0x400f_e000, 0x2000)];
        assert_eq!(filled(&fits, u64::MAX, 0x1000).unwrap(), expected);
        assert_eq!(windows.segments(&fits, u64::MAX, 0x1000, &name).unwrap().as_slice(), expected);
        // Another window, past the end of one, beyond the mask, misaligned, neighbours, nothing.
        let unfit = [
            (vec![fits[0], run(0x20_0000, 0x1000)], u64::MAX, 1),
            (vec![run(0x1f_f000, 0x2000), fits[1]], u64::MAX, 1),
            (vec![run(0xf_f000, 0x1000), fits[1]], u64::MAX, 1),
            (fits.to_vec(), 0x400f_efff, 1),
            (fits.to_vec(), u64::MAX, 0x2000),
            (vec![fits[1], run(0x10_2000, 0x1000), fits[0]], u64::MAX, 1),
            (vec![], u64::MAX, 1),
        ];
        for (runs, mask, align) in unfit {
            assert_eq!(filled(&runs, mask, align), None, "{runs:?}");
        }
        let apart = [fits[0], run(0x20_0000, 0x1000)];
        let expected = [at(0x4000_3000, 0x1000), at(0x8000_0000, 0x1000)];
        assert_eq!(windows.segments(&apart, u64::MAX, 1, &name).unwrap().as_slice(), expected);
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
        let segments = windows.segments(&runs, u64::MAX, 1, &name).unwrap();
        assert_eq!(
            segments.as_slice(),
            [Segment { iova: Iova::new(0x9000), len: 0x2000 }, Segment { iova: Iova::new(0x9000), len: 0x1000 }]
        );
    }
}
