//! The frame allocator's books: which frames are free, in two zones.
//!
//! # Invariants
//!
//! - A frame's bit in its region's map is 1 exactly while the frame is allocated. Frames outside all regions are never allocated.
//! - A frame that is not allocated is in its zone's buddy tree or in its shelf, and nowhere else.
//!
//! Single frames are what most want, and the shelf is what most of them come from and go to: those ways ([`Zones::take_at_hand`],
//! [`Zones::lay_at_hand`]) do nothing but what these invariants ask for, and touch no tree.
//!
//! Not locked: see `frames`.

use super::{Error, address_of, frame_of};
use alloc::vec::Vec;
use buddy_system_allocator::FrameAllocator;
use core::ops::Range;
use iommu::{PAGE_SIZE, PhysAddr, PhysRange};

/// The first frame that a device with 32 address bits cannot reach.
const HIGH: usize = 1 << 20;

/// Largest block: 2^(ORDER - 1) frames, 64 GiB.
const ORDER: usize = 25;

/// Single frames kept at hand in each zone, and how many move at once between the shelf and the tree.
const SHELF: usize = 128;
const SHELF_STEP: usize = 32;

/// Where frames come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// Anywhere; above 4 GiB first, to leave the rest to those who need it.
    Any,
    /// Below 4 GiB, for devices that cannot address more.
    Below4GiB,
    /// The area that is kept for large allocations: no other zone's allocations come from there.
    Area,
}

/// How many frames there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameStats {
    /// All frames that the allocator was given.
    pub total: usize,
    /// Free ones.
    pub free: usize,
    /// Free ones below 4 GiB.
    pub free_below_4gib: usize,
    /// Those of all frames that are in the area for large allocations.
    pub area: usize,
    /// Free ones there.
    pub free_in_area: usize,
}

/// A run of frames that the allocator was given, with a bit for each.
struct Region {
    frames: Range<usize>,
    allocated: &'static mut [u64],
    /// It is part of the area for large allocations.
    area: bool,
}

impl Region {
    #[inline]
    fn has(&self, frame: usize) -> bool {
        self.frames.start <= frame && frame < self.frames.end
    }

    /// The word of the map with the bit of a frame of the region, and that bit.
    #[inline]
    fn bit(&mut self, frame: usize) -> Option<(&mut u64, u64)> {
        let at = frame.wrapping_sub(self.frames.start);
        Some((self.allocated.get_mut(at / 64)?, 1 << (at % 64)))
    }

    /// Calls `f` with each word of the map that has a bit in `frames` and the mask of those bits; stops at the first false.
    fn all(&mut self, frames: &Range<usize>, mut f: impl FnMut(&mut u64, u64) -> bool) -> bool {
        let mut at = frames.start - self.frames.start;
        let end = frames.end - self.frames.start;
        while at < end {
            let (bit, left) = (at % 64, end - at);
            let bits = (64 - bit).min(left);
            let mask = (u64::MAX >> (64 - bits)) << bit;
            let Some(word) = self.allocated.get_mut(at / 64) else {
                return false;
            };
            if !f(word, mask) {
                return false;
            }
            at += bits;
        }
        true
    }
}

struct Tree {
    buddy: FrameAllocator<ORDER>,
    shelf: [usize; SHELF],
    on_shelf: usize,
    /// The region that a frame of the shelf lay in last.
    near: usize,
    total: usize,
    free: usize,
}

impl Tree {
    const fn new() -> Self {
        Self { buddy: FrameAllocator::new(), shelf: [0; SHELF], on_shelf: 0, near: 0, total: 0, free: 0 }
    }

    fn alloc_one(&mut self) -> Option<usize> {
        if self.on_shelf == 0 {
            match self.buddy.alloc(SHELF_STEP) {
                // The lowest last, so that it is taken first: consecutive allocations get consecutive frames.
                Some(first) => {
                    for frame in (first..first + SHELF_STEP).rev() {
                        self.shelve(frame);
                    }
                }
                None => return self.buddy.alloc(1),
            }
        }
        self.on_shelf = self.on_shelf.checked_sub(1)?;
        self.shelf.get(self.on_shelf).copied()
    }

    fn shelve(&mut self, frame: usize) {
        if let Some(place) = self.shelf.get_mut(self.on_shelf) {
            *place = frame;
            self.on_shelf += 1;
        }
    }

    fn free_one(&mut self, frame: usize) {
        if self.on_shelf == SHELF {
            self.clear_shelf(SHELF - SHELF_STEP);
        }
        self.shelve(frame);
    }

    /// Gives all but `keep` frames of the shelf back to the tree, where they can merge.
    fn clear_shelf(&mut self, keep: usize) {
        for &frame in self.shelf.get(keep..self.on_shelf).unwrap_or(&[]) {
            self.buddy.dealloc(frame, 1);
        }
        self.on_shelf = self.on_shelf.min(keep);
    }

    fn alloc_many(&mut self, count: usize, block: usize) -> Option<usize> {
        let first = match self.buddy.alloc(block) {
            Some(first) => first,
            None => {
                self.clear_shelf(0);
                self.buddy.alloc(block)?
            }
        };
        self.give_back(first + count..first + block);
        Some(first)
    }

    /// Puts a run of frames into the tree, as the largest aligned blocks it is made of.
    fn give_back(&mut self, mut frames: Range<usize>) {
        while !frames.is_empty() {
            let aligned = 1 << frames.start.trailing_zeros().min(ORDER as u32 - 1);
            let fits = 1 << frames.len().ilog2();
            let size = aligned.min(fits);
            self.buddy.dealloc(frames.start, size);
            frames.start += size;
        }
    }
}

/// The region of a frame: most often the one at `near`, where the last one was found.
#[inline]
fn region_near<'a>(regions: &'a mut [Region], near: &mut usize, frame: usize) -> Option<&'a mut Region> {
    if !regions.get(*near).is_some_and(|region| region.has(frame)) {
        *near = regions.iter().position(|region| region.has(frame))?;
    }
    regions.get_mut(*near)
}

/// All frames of the machine.
pub(super) struct Zones {
    regions: Vec<Region>,
    low: Tree,
    high: Tree,
    /// The area for large allocations, wherever it is. Nothing else comes from it.
    area: Tree,
}

impl Zones {
    /// Books without frames.
    pub(super) const fn new() -> Self {
        Self { regions: Vec::new(), low: Tree::new(), high: Tree::new(), area: Tree::new() }
    }

    /// How many words the map of `frames` frames has.
    pub(super) const fn map_words(frames: usize) -> usize {
        frames.div_ceil(64)
    }

    /// Adds `range`, made of whole frames which the caller gives away, with zeroed memory for its map. Only at the start. Ranges that
    /// touch are refused: the tree would merge free blocks over the border, and what is allocated there would lie in no region.
    pub(super) fn add(&mut self, range: PhysRange, map: &'static mut [u64]) -> Result<(), Error> {
        self.add_to(range, map, false)
    }

    /// As [`Zones::add`], to the area for large allocations.
    pub(super) fn add_area(&mut self, range: PhysRange, map: &'static mut [u64]) -> Result<(), Error> {
        self.add_to(range, map, true)
    }

    fn add_to(&mut self, range: PhysRange, map: &'static mut [u64], area: bool) -> Result<(), Error> {
        let frames = frame_of(range.start())..frame_of(range.end());
        // What is in another tree may touch: blocks do not merge there.
        let touches = self.regions.iter().any(|r| {
            let apart = r.frames.start > frames.end || frames.start > r.frames.end;
            let outside = r.frames.start >= frames.end || frames.start >= r.frames.end;
            if r.area == area { !apart } else { !outside }
        });
        if touches || map.len() < Self::map_words(frames.len()) {
            return Err(Error::BadRequest { count: frames.len(), alignment: PAGE_SIZE });
        }
        self.regions.try_reserve(1).map_err(|_| Error::TooLittle)?;
        for (tree, part) in self.parts(&frames, area) {
            if !part.is_empty() {
                tree.buddy.add_frame(part.start, part.end);
                tree.total += part.len();
                tree.free += part.len();
            }
        }
        self.regions.push(Region { frames, allocated: map, area });
        Ok(())
    }

    /// The numbers.
    pub(super) fn stats(&self) -> FrameStats {
        FrameStats {
            total: self.low.total + self.high.total + self.area.total,
            free: self.low.free + self.high.free + self.area.free,
            free_below_4gib: self.low.free,
            area: self.area.total,
            free_in_area: self.area.free,
        }
    }

    /// The trees that the free frames of a region are in, and which part of `frames` in each.
    fn parts(&mut self, frames: &Range<usize>, area: bool) -> [(&mut Tree, Range<usize>); 2] {
        if area {
            return [(&mut self.area, frames.clone()), (&mut self.low, 0..0)];
        }
        let (low, high) = (frames.start..frames.end.min(HIGH), frames.start.max(HIGH)..frames.end);
        [(&mut self.low, low), (&mut self.high, high)]
    }

    fn region(&mut self, frames: &Range<usize>) -> Option<&mut Region> {
        self.regions.iter_mut().find(|region| region.frames.start <= frames.start && frames.end <= region.frames.end)
    }

    /// Allocates a frame of the shelf that [`Zones::alloc`] would take it from. `None` where that is empty.
    #[inline]
    pub(super) fn take_at_hand(&mut self, zone: Zone) -> Option<PhysAddr> {
        let tree = match zone {
            Zone::Any if self.high.free != 0 => &mut self.high,
            Zone::Any | Zone::Below4GiB => &mut self.low,
            Zone::Area => return None,
        };
        let place = tree.on_shelf.checked_sub(1)?;
        let frame = *tree.shelf.get(place)?;
        let (word, mask) = region_near(&mut self.regions, &mut tree.near, frame)?.bit(frame)?;
        *word |= mask;
        tree.on_shelf = place;
        tree.free -= 1;
        Some(address_of(frame))
    }

    /// Takes a frame back to a shelf. `false`, and nothing has changed, where [`Zones::free`] has more to do or to say.
    #[inline]
    pub(super) fn lay_at_hand(&mut self, address: PhysAddr) -> bool {
        let frame = frame_of(address);
        let tree = if frame < HIGH { &mut self.low } else { &mut self.high };
        let Some(place) = tree.shelf.get_mut(tree.on_shelf) else { return false };
        let region = region_near(&mut self.regions, &mut tree.near, frame).filter(|region| !region.area);
        match region.and_then(|region| region.bit(frame)) {
            Some((word, mask)) if *word & mask != 0 && address.is_aligned(PAGE_SIZE) => {
                *word &= !mask;
                *place = frame;
                tree.on_shelf += 1;
                tree.free += 1;
                true
            }
            _ => false,
        }
    }

    /// Allocates exactly `count` frames in a row, the first aligned to `alignment` bytes.
    pub(super) fn alloc(&mut self, count: usize, alignment: u64, zone: Zone) -> Result<PhysRange, Error> {
        let bad = Error::BadRequest { count, alignment };
        let largest = 1_usize << (ORDER - 1);
        if count == 0 || count > largest || !alignment.is_power_of_two() || alignment / PAGE_SIZE > largest as u64 {
            return Err(bad);
        }
        // A buddy block is aligned to its size.
        let block = count.next_power_of_two().max((alignment / PAGE_SIZE) as usize);
        let take = |tree: &mut Tree| {
            let first = if block == 1 { tree.alloc_one() } else { tree.alloc_many(count, block) }?;
            tree.free -= count;
            Some(first)
        };
        let first = match zone {
            Zone::Any => take(&mut self.high).or_else(|| take(&mut self.low)),
            Zone::Below4GiB => take(&mut self.low),
            Zone::Area => take(&mut self.area),
        };
        let first = first.ok_or(Error::OutOfFrames { count, zone })?;
        let frames = first..first + count;
        // INVARIANT: what comes from a tree lies in one region (regions are added whole) and its bits are 0.
        if let Some(region) = self.region(&frames) {
            region.all(&frames, |word, mask| {
                *word |= mask;
                true
            });
        }
        PhysRange::new(address_of(first), count as u64 * PAGE_SIZE).ok_or(bad)
    }

    /// Takes `range` back: any run of allocated frames, whole allocations or parts of them.
    pub(super) fn free(&mut self, range: PhysRange) -> Result<(), Error> {
        let refused = Error::NotAllocated(range);
        if range.is_empty() || !range.is_aligned(PAGE_SIZE) {
            return Err(refused);
        }
        let frames = frame_of(range.start())..frame_of(range.end());
        let region = self.region(&frames).ok_or(refused)?;
        if !region.all(&frames, |word, mask| *word & mask == mask) {
            return Err(refused);
        }
        region.all(&frames, |word, mask| {
            *word &= !mask;
            true
        });
        let area = region.area;
        for (tree, part) in self.parts(&frames, area) {
            tree.free += part.len();
            if part.len() == 1 {
                tree.free_one(part.start);
            } else {
                tree.give_back(part);
            }
        }
        Ok(())
    }

    /// Whether the frame at `address` is allocated.
    #[cfg(test)]
    fn is_allocated(&mut self, address: PhysAddr) -> bool {
        let frame = frame_of(address);
        let frames = frame..frame + 1;
        self.region(&frames).is_some_and(|region| region.all(&frames, |word, mask| *word & mask == mask))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::collections::BTreeSet;

    fn zones(ranges: &[(u64, u64)]) -> Zones {
        let mut zones = Zones::new();
        for &(start, frames) in ranges {
            let range = PhysRange::new(PhysAddr::new(start), frames * PAGE_SIZE).unwrap();
            let map = Box::leak(std::vec![0_u64; Zones::map_words(frames as usize)].into_boxed_slice());
            zones.add(range, map).unwrap();
        }
        zones
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn high_memory_is_used_first_and_low_memory_when_asked_for() {
        let mut zones = zones(&[(4 * GIB - 64 * PAGE_SIZE, 128)]);
        assert!(zones.alloc(1, 1, Zone::Any).unwrap().start().get() >= 4 * GIB);
        assert!(zones.alloc(1, 1, Zone::Below4GiB).unwrap().end().get() <= 4 * GIB);
        // Blocks never merge over the border: each half can be had as a whole, once its single frames are back, but not both as one.
        assert!(zones.alloc(128, 1, Zone::Any).is_err());
    }

    #[test]
    fn a_range_that_touches_another_is_refused() {
        let mut zones = zones(&[(GIB, 256)]);
        for start in [GIB + 256 * PAGE_SIZE, GIB - 256 * PAGE_SIZE, GIB] {
            let range = PhysRange::new(PhysAddr::new(start), 256 * PAGE_SIZE).unwrap();
            assert!(zones.add(range, Box::leak(Box::new([0; 4]))).is_err());
        }
        let apart = PhysRange::new(PhysAddr::new(GIB + 257 * PAGE_SIZE), 256 * PAGE_SIZE).unwrap();
        zones.add(apart, Box::leak(Box::new([0; 4]))).unwrap();
    }

    #[test]
    fn any_falls_back_to_low_memory() {
        let mut zones = zones(&[(GIB, 2), (8 * GIB, 1)]);
        assert_eq!(zones.alloc(1, 1, Zone::Any).unwrap().start().get(), 8 * GIB);
        assert!(zones.alloc(2, 1, Zone::Any).unwrap().start().get() == GIB);
        assert_eq!(zones.alloc(1, 1, Zone::Any), Err(Error::OutOfFrames { count: 1, zone: Zone::Any }));
    }

    #[test]
    fn odd_counts_take_no_more_than_they_say() {
        let mut zones = zones(&[(GIB, 8)]);
        let five = zones.alloc(5, 1, Zone::Any).unwrap();
        assert_eq!(five.len(), 5 * PAGE_SIZE);
        assert_eq!(zones.stats().free, 3);
        let three: Vec<_> = (0..3).map(|_| zones.alloc(1, 1, Zone::Any).unwrap()).collect();
        assert!(zones.alloc(1, 1, Zone::Any).is_err());
        zones.free(five).unwrap();
        for frame in three {
            zones.free(frame).unwrap();
        }
        // All has merged again, the shelf's frames included.
        assert_eq!(zones.alloc(8, 1, Zone::Any).unwrap().len(), 8 * PAGE_SIZE);
    }

    #[test]
    fn alignment_beyond_the_size_is_kept() {
        let mut zones = zones(&[(GIB + PAGE_SIZE, 1023)]);
        let range = zones.alloc(3, 1 << 20, Zone::Any).unwrap();
        assert!(range.start().is_aligned(1 << 20));
        assert_eq!(zones.stats().free, 1020);
    }

    #[test]
    fn requests_that_cannot_be_met_are_errors() {
        let mut zones = zones(&[(GIB, 8)]);
        for (count, alignment) in [(0, 1), (usize::MAX, 1), (1, 0), (1, 3), (1, 1 << 63)] {
            assert_eq!(zones.alloc(count, alignment, Zone::Any), Err(Error::BadRequest { count, alignment }));
        }
        assert!(matches!(zones.alloc(9, 1, Zone::Any), Err(Error::OutOfFrames { .. })));
        assert!(matches!(zones.alloc(1, 1 << 30, Zone::Any), Err(Error::OutOfFrames { .. })));
    }

    /// Red when a frame was laid down whose bit was 0, one of the area, one that was not aligned, and when the bit was left as it was.
    #[test]
    fn a_frame_at_hand_is_taken_and_laid_down_as_any_other() {
        let mut zones = zones(&[(GIB, 256), (8 * GIB, 64)]);
        let area = PhysRange::new(PhysAddr::new(2 * GIB), 64 * PAGE_SIZE).unwrap();
        zones.add_area(area, Box::leak(Box::new([0; 1]))).unwrap();
        let all = zones.stats();
        // Nothing is at hand before the trees were asked.
        assert_eq!((zones.take_at_hand(Zone::Any), zones.take_at_hand(Zone::Below4GiB)), (None, None));
        let high = zones.alloc(1, 1, Zone::Any).unwrap().start();
        let low = zones.alloc(1, 1, Zone::Below4GiB).unwrap().start();
        let next = zones.take_at_hand(Zone::Any).unwrap();
        assert!(next.get() > 4 * GIB && next != high && zones.is_allocated(next));
        let next_low = zones.take_at_hand(Zone::Below4GiB).unwrap();
        assert!(next_low.get() < 4 * GIB && next_low != low && zones.is_allocated(next_low));
        assert_eq!((zones.stats().free, zones.stats().free_below_4gib), (all.free - 4, all.free_below_4gib - 2));
        for frame in [high, low, next, next_low] {
            assert!(!zones.lay_at_hand(PhysAddr::new(frame.get() + 1)));
            assert!(zones.lay_at_hand(frame) && !zones.is_allocated(frame));
            assert!(!zones.lay_at_hand(frame), "twice");
        }
        assert_eq!(zones.stats(), all);
        let large = zones.alloc(1, 1, Zone::Area).unwrap();
        assert!(!zones.lay_at_hand(large.start()), "it goes back to the area");
        assert_eq!(zones.take_at_hand(Zone::Area), None);
        zones.free(large).unwrap();
        assert!(!zones.lay_at_hand(PhysAddr::new(GIB - PAGE_SIZE)) && !zones.lay_at_hand(PhysAddr::new(u64::MAX)));
        // A full shelf takes no more.
        let many: Vec<_> = (0..200).map(|_| zones.alloc(1, 1, Zone::Below4GiB).unwrap().start()).collect();
        let laid = many.iter().filter(|frame| zones.lay_at_hand(**frame)).count();
        assert!(laid < SHELF, "{laid}");
    }

    #[test]
    fn what_is_not_allocated_cannot_be_freed() {
        let mut zones = zones(&[(GIB, 8)]);
        let pair = zones.alloc(2, 1, Zone::Any).unwrap();
        let longer = PhysRange::new(pair.start(), 3 * PAGE_SIZE).unwrap();
        assert_eq!(zones.free(longer), Err(Error::NotAllocated(longer)));
        zones.free(pair).unwrap();
        assert_eq!(zones.free(pair), Err(Error::NotAllocated(pair)));
        for (start, len) in [(0, PAGE_SIZE), (GIB + 1, PAGE_SIZE), (GIB, 0), (GIB - PAGE_SIZE, 2 * PAGE_SIZE)] {
            let range = PhysRange::new(PhysAddr::new(start), len).unwrap();
            assert_eq!(zones.free(range), Err(Error::NotAllocated(range)));
        }
        assert_eq!(zones.stats().free, 8);
    }

    #[test]
    fn an_allocation_can_be_freed_in_parts() {
        let mut zones = zones(&[(GIB, 64)]);
        let all = zones.alloc(64, 1, Zone::Any).unwrap();
        zones.free(all.part(PAGE_SIZE, 30 * PAGE_SIZE).unwrap()).unwrap();
        zones.free(all.part(31 * PAGE_SIZE, 33 * PAGE_SIZE).unwrap()).unwrap();
        zones.free(all.part(0, PAGE_SIZE).unwrap()).unwrap();
        assert_eq!(zones.alloc(64, 1, Zone::Any).unwrap(), all);
    }

    /// Red when `alloc` fell back from the other zones to the area, and when `free` put the area's frames into the low tree.
    #[test]
    fn large_runs_are_there_after_the_rest_was_fragmented_by_small_ones() {
        let mut zones = zones(&[(GIB, 4096), (GIB + (16 << 20) + (4 << 20), 2048), (5 * GIB, 2048)]);
        // Right behind the first region: what touches does not merge.
        let area = PhysRange::new(PhysAddr::new(GIB + (16 << 20)), 1024 * PAGE_SIZE).unwrap();
        zones.add_area(area, Box::leak(std::vec![0; Zones::map_words(1024)].into_boxed_slice())).unwrap();
        assert_eq!((zones.stats().area, zones.stats().free_in_area), (1024, 1024));
        let mut storm = Vec::new();
        let mut random = 1_u64;
        for zone in [Zone::Any, Zone::Below4GiB] {
            while let Ok(range) =
                zones.alloc(1 + (random % 5) as usize, PAGE_SIZE, zone).or_else(|_| zones.alloc(1, PAGE_SIZE, zone))
            {
                assert!(!area.overlaps(range), "a small allocation in the area");
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 1;
                storm.push(range);
            }
        }
        let mut kept = Vec::new();
        for (index, range) in storm.into_iter().enumerate() {
            if index % 2 == 0 { zones.free(range).unwrap() } else { kept.push(range) }
        }
        assert!(zones.stats().free > 3000, "half of it is free");
        for zone in [Zone::Any, Zone::Below4GiB] {
            assert!(zones.alloc(256, PAGE_SIZE, zone).is_err(), "and no megabyte of it in a row");
        }
        for _ in 0..3 {
            let runs: Vec<_> = (0..4).map(|_| zones.alloc(256, 1 << 20, Zone::Area).unwrap()).collect();
            assert!(zones.alloc(1, PAGE_SIZE, Zone::Area).is_err());
            assert!(runs.iter().all(|run| area.covers(*run)));
            for run in runs {
                zones.free(run).unwrap();
            }
            let whole = zones.alloc(1024, 4 << 20, Zone::Area).unwrap();
            assert_eq!(whole, area);
            zones.free(whole).unwrap();
        }
        for range in kept {
            zones.free(range).unwrap();
        }
        assert_eq!(zones.stats().free, zones.stats().total);
        zones.alloc(4096, PAGE_SIZE, Zone::Below4GiB).unwrap();
    }

    #[test]
    fn a_range_across_the_border_of_the_area_is_not_given_back() {
        let mut zones = zones(&[(GIB, 64)]);
        let area = PhysRange::new(PhysAddr::new(GIB + 64 * PAGE_SIZE), 64 * PAGE_SIZE).unwrap();
        zones.add_area(area, Box::leak(Box::new([0]))).unwrap();
        assert!(zones.add_area(area, Box::leak(Box::new([0]))).is_err());
        zones.alloc(64, PAGE_SIZE, Zone::Any).unwrap();
        zones.alloc(64, PAGE_SIZE, Zone::Area).unwrap();
        let both = PhysRange::new(PhysAddr::new(GIB + 63 * PAGE_SIZE), 2 * PAGE_SIZE).unwrap();
        assert_eq!(zones.free(both), Err(Error::NotAllocated(both)));
        assert_eq!(zones.alloc(1, PAGE_SIZE, Zone::Any), Err(Error::OutOfFrames { count: 1, zone: Zone::Any }));
    }

    proptest! {
        /// Against a set of frames: nothing is handed out twice, outside the regions, misaligned, or from the wrong zone; what is
        /// refused really does not fit; at the end all is free again.
        #[test]
        fn allocations_never_overlap(steps in prop::collection::vec((0_usize..40, 0_u32..6, any::<bool>(), any::<prop::sample::Index>()), 1..200)) {
            let regions = [(GIB + 3 * PAGE_SIZE, 200), (4 * GIB - 16 * PAGE_SIZE, 40), (6 * GIB, 77)];
            let mut zones = zones(&regions);
            let total: u64 = regions.iter().map(|region| region.1).sum();
            let mut live: Vec<PhysRange> = Vec::new();
            let mut taken = BTreeSet::new();
            for (count, shift, low, index) in steps {
                if count < 15 && !live.is_empty() {
                    let range = live.swap_remove(index.index(live.len()));
                    zones.free(range).unwrap();
                    for frame in frame_of(range.start())..frame_of(range.end()) {
                        assert!(taken.remove(&frame));
                    }
                } else {
                    let (count, alignment) = (count / 4 + 1, PAGE_SIZE << shift);
                    let zone = if low { Zone::Below4GiB } else { Zone::Any };
                    let Ok(range) = zones.alloc(count, alignment, zone) else { continue };
                    prop_assert_eq!(range.len(), count as u64 * PAGE_SIZE);
                    prop_assert!(range.start().is_aligned(alignment));
                    prop_assert!(!low || range.end().get() <= 4 * GIB);
                    for frame in frame_of(range.start())..frame_of(range.end()) {
                        let address = frame as u64 * PAGE_SIZE;
                        prop_assert!(regions.iter().any(|&(start, n)| (start..start + n * PAGE_SIZE).contains(&address)));
                        prop_assert!(taken.insert(frame), "frame handed out twice");
                        prop_assert!(zones.is_allocated(PhysAddr::new(address)));
                    }
                    live.push(range);
                }
                prop_assert_eq!(zones.stats().free as u64, total - taken.len() as u64);
            }
            for range in live {
                zones.free(range).unwrap();
            }
            // Every single frame can be had.
            for _ in 0..total {
                prop_assert!(zones.alloc(1, 1, Zone::Any).is_ok());
            }
            prop_assert!(zones.alloc(1, 1, Zone::Any).is_err());
        }
    }
}
