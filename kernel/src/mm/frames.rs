//! The frame allocator.
//!
//! # Locking
//!
//! One [`IrqMutex`]. The buddy trees allocate nodes while it is held; `heap::keeping_books` sends those to their own arena, which
//! [`init`] makes large enough for the worst fragmentation. So neither can giving memory back fail for want of memory, nor does the
//! heap grow while frames are being counted.

#![allow(unsafe_code)] // Memory becomes a map or a frame is zeroed here, by its address in the linear map.

use super::zones::{FrameStats, Zone, Zones};
use super::{Error, LINEAR, heap, pointer};
use alloc::vec::Vec;
use base::IrqMutex;
use core::sync::atomic::Ordering;
use iommu::{PAGE_SIZE, PhysAddr, PhysRange};

static ZONES: IrqMutex<Option<Zones>> = IrqMutex::new(None);

/// Bytes of book-keeping for each frame at worst. Free blocks number at most half the frames; a node of the trees' sets has at
/// least 5 entries of 8 bytes and takes 128 bytes of the arena, and one inner node serves at least 5 more: below 34 bytes an entry.
const BOOKS_PER_FRAME: u64 = 17;
/// And for all of them together.
const BOOKS: u64 = 64 << 10;

/// What [`init`] needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Frames<'a> {
    /// What is added to a physical address to reach it: all of `memory` is mapped there, for good.
    pub linear: u64,
    /// All memory.
    pub memory: &'a [PhysRange],
    /// What of it is not to be handed out: the image, the device tree, and what the machine reserves. In any order; may overlap, and
    /// may lie outside `memory`.
    pub reserved: &'a [PhysRange],
    /// The area that is kept for large allocations: part of `memory`, and of nothing else that is in `reserved`. Whole pages.
    pub area: Option<PhysRange>,
}

/// Gives the allocator its memory. Called once.
///
/// # Safety
///
/// What is in `memory` and not in `reserved` is RAM, mapped at `linear` plus its address, writable, and used by nobody.
///
/// # Errors
///
/// [`Error::TooLittle`] if too little is left over, [`Error::AlreadySetUp`] the second time.
pub unsafe fn init(frames: Frames<'_>) -> Result<(), Error> {
    // Before the lock: the list is allocated from the heap, which may ask for frames.
    let area = frames.area.filter(|area| frames.memory.iter().any(|range| range.covers(*area)));
    let mut reserved = Vec::new();
    reserved.try_reserve(frames.reserved.len() + 1).map_err(|_| Error::TooLittle)?;
    reserved.extend(frames.reserved.iter().copied().chain(area));
    let mut free = subtract(frames.memory, &reserved)?;
    let mut zones = ZONES.lock();
    if zones.is_some() {
        return Err(Error::AlreadySetUp);
    }
    LINEAR.store(frames.linear, Ordering::Relaxed);

    // The books, at the end of the largest range: an arena for the trees, and the maps.
    let round = |bytes: u64| bytes.next_multiple_of(PAGE_SIZE);
    let all = || free.iter().chain(area.as_ref());
    let arena = round(all().map(|range| range.len() / PAGE_SIZE).sum::<u64>() * BOOKS_PER_FRAME + BOOKS);
    let maps = round(all().map(|range| Zones::map_words((range.len() / PAGE_SIZE) as usize) as u64 * 8).sum());
    let largest = free.iter_mut().max_by_key(|range| range.len()).ok_or(Error::TooLittle)?;
    let keep = largest.len().checked_sub(arena + maps).ok_or(Error::TooLittle)?;
    let books = largest.part(keep, arena + maps).ok_or(Error::TooLittle)?;
    *largest = largest.part(0, keep).ok_or(Error::TooLittle)?;
    let [arena, maps] = [books.part(0, arena), books.part(arena, maps)].map(|part| part.unwrap_or_default());
    // SAFETY: free memory that is mapped and ours (the caller's promise), given to the arena for good.
    unsafe { heap::give_books(pointer(arena.start()), arena.len() as usize) };

    let map = pointer(maps.start()).cast::<u64>();
    let words = (maps.len() / 8) as usize;
    // SAFETY: as for the arena; page-aligned, and any bytes are integers.
    unsafe { map.write_bytes(0, words) };
    // SAFETY: initialised just now, ours for good, and referenced nowhere else.
    let mut map: &'static mut [u64] = unsafe { core::slice::from_raw_parts_mut(map, words) };

    let mut books = Zones::new();
    heap::keeping_books(|| {
        for range in free.iter().filter(|range| !range.is_empty()) {
            let words = Zones::map_words((range.len() / PAGE_SIZE) as usize);
            let (own, rest) = core::mem::take(&mut map).split_at_mut_checked(words).ok_or(Error::TooLittle)?;
            map = rest;
            books.add(*range, own)?;
        }
        if let Some(area) = area {
            let words = Zones::map_words((area.len() / PAGE_SIZE) as usize);
            let (own, _) = core::mem::take(&mut map).split_at_mut_checked(words).ok_or(Error::TooLittle)?;
            books.add_area(area, own)?;
        }
        *zones = Some(books);
        Ok(())
    })
}

/// `memory` without `reserved` (in any order, overlapping or not), in whole pages, sorted; what touches is one range. (A machine
/// with several nodes describes one stretch of memory in pieces.)
///
/// # Errors
///
/// [`Error::TooLittle`] if there is no memory for the list.
pub fn subtract(memory: &[PhysRange], reserved: &[PhysRange]) -> Result<Vec<PhysRange>, Error> {
    let between = |start: PhysAddr, end: PhysAddr| {
        let range = PhysRange::between(start.align_up(PAGE_SIZE)?, end.align_down(PAGE_SIZE))?;
        (!range.is_empty()).then_some(range)
    };
    let mut holes: Vec<PhysRange> = Vec::new();
    holes.try_reserve(reserved.len()).map_err(|_| Error::TooLittle)?;
    holes.extend(reserved.iter().filter(|range| !range.is_empty()));
    holes.sort_unstable();
    let mut free = Vec::new();
    free.try_reserve(memory.len() * (holes.len() + 1)).map_err(|_| Error::TooLittle)?;
    for range in memory {
        let mut start = range.start();
        for hole in holes.iter().filter(|hole| hole.overlaps(*range)) {
            free.extend(between(start, hole.start()));
            start = start.max(hole.end());
        }
        free.extend(between(start, range.end()));
    }
    free.sort_unstable();
    free.dedup_by(|next, last| match PhysRange::between(last.start(), next.end()) {
        Some(both) if last.end() == next.start() => {
            *last = both;
            true
        }
        _ => false,
    });
    Ok(free)
}

fn with<R>(f: impl FnOnce(&mut Zones) -> Result<R, Error>) -> Result<R, Error> {
    let mut zones = ZONES.lock();
    let zones = zones.as_mut().ok_or(Error::TooEarly)?;
    heap::keeping_books(|| f(zones))
}

/// Allocates exactly `count` frames in a row. Their contents are whatever they were.
///
/// # Errors
///
/// [`Error::OutOfFrames`], [`Error::BadRequest`], [`Error::TooEarly`].
pub fn alloc(count: usize, zone: Zone) -> Result<PhysRange, Error> {
    alloc_aligned(count, PAGE_SIZE, zone)
}

/// Allocates exactly `count` frames in a row, the first aligned to `alignment` bytes (a power of two).
///
/// # Errors
///
/// As [`alloc`](fn@alloc).
pub fn alloc_aligned(count: usize, alignment: u64, zone: Zone) -> Result<PhysRange, Error> {
    if count == 1
        && alignment == PAGE_SIZE
        && let Some(frame) = alloc_at_hand(zone).and_then(|frame| PhysRange::new(frame, PAGE_SIZE))
    {
        return Ok(frame);
    }
    with(|zones| zones.alloc(count, alignment, zone))
}

/// Allocates one of the frames that are kept at hand: what [`alloc`](fn@alloc) of one would return, if it need not look further. `None`
/// where it need, or there is none.
#[inline]
pub fn alloc_at_hand(zone: Zone) -> Option<PhysAddr> {
    ZONES.lock().as_mut()?.take_at_hand(zone)
}

/// Allocates exactly `count` frames in a row from the area that is kept for large allocations.
///
/// # Errors
///
/// As [`alloc`](fn@alloc).
pub fn alloc_in_area(count: usize, alignment: u64) -> Result<PhysRange, Error> {
    alloc_aligned(count, alignment, Zone::Area)
}

/// Allocates exactly `count` frames in a row and fills them with zeros.
///
/// # Errors
///
/// As [`alloc`](fn@alloc).
pub fn alloc_zeroed(count: usize, zone: Zone) -> Result<PhysRange, Error> {
    let range = alloc(count, zone)?;
    // SAFETY: the frames are ours alone, and mapped in the linear map.
    unsafe { pointer(range.start()).write_bytes(0, range.len() as usize) };
    Ok(range)
}

/// Gives frames back: what an allocation returned, or whole frames of it.
///
/// # Safety
///
/// Nobody uses the memory any more, no device either: its address spaces have been revoked.
///
/// # Errors
///
/// [`Error::NotAllocated`] if it was not allocated (any more); nothing has changed then.
#[inline]
pub unsafe fn free(range: PhysRange) -> Result<(), Error> {
    if range.len() == PAGE_SIZE && ZONES.lock().as_mut().is_some_and(|zones| zones.lay_at_hand(range.start())) {
        return Ok(());
    }
    free_many(range)
}

#[inline(never)]
fn free_many(range: PhysRange) -> Result<(), Error> {
    with(|zones| zones.free(range))
}

/// How many frames there are; zeros before [`init`].
pub fn stats() -> FrameStats {
    ZONES.lock().as_ref().map_or_else(FrameStats::default, Zones::stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PhysRange {
        PhysRange::between(PhysAddr::new(start), PhysAddr::new(end)).unwrap()
    }

    #[test]
    fn reserved_memory_is_left_out_page_by_page() {
        let memory = [range(0x8000_0000, 0x9000_0000), range(0x4000_0000, 0x5000_0800)];
        let reserved = [
            range(0x4100_0010, 0x4100_0020),
            range(0x4100_0018, 0x4200_0000),
            range(0x7000_0000, 0x8000_0001),
            range(1, 1),
        ];
        assert_eq!(
            subtract(&memory, &reserved).unwrap(),
            [range(0x4000_0000, 0x4100_0000), range(0x4200_0000, 0x5000_0000), range(0x8000_1000, 0x9000_0000)]
        );
    }

    #[test]
    fn memory_in_pieces_that_touch_is_one_range() {
        let memory = [range(0x3000, 0x5000), range(0x1000, 0x3000), range(0x6000, 0x7000)];
        assert_eq!(subtract(&memory, &[]).unwrap(), [range(0x1000, 0x5000), range(0x6000, 0x7000)]);
        assert_eq!(
            subtract(&memory, &[range(0x2000, 0x3000)]).unwrap(),
            [range(0x1000, 0x2000), range(0x3000, 0x5000), range(0x6000, 0x7000)]
        );
    }

    #[test]
    fn memory_that_is_all_reserved_leaves_nothing() {
        let memory = [range(0x1000, 0x3000)];
        assert_eq!(subtract(&memory, &[range(0, 0x1800), range(0x1700, 0x2801)]).unwrap(), []);
    }

    #[test]
    fn frames_come_from_the_memory_given_and_are_reached_through_the_linear_map() {
        // The host's own memory stands for the machine's; the linear map is the identity.
        let layout = std::alloc::Layout::from_size_align(4 << 20, 4096).unwrap();
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc(layout) };
        let start = memory.expose_provenance() as u64;
        let memory = range(start, start + (4 << 20));
        let reserved = range(start + 0x1000, start + 0x5000);
        let frames = Frames { linear: 0, memory: &[memory], reserved: &[reserved], area: None };
        assert_eq!(alloc(1, Zone::Any), Err(Error::TooEarly));
        // SAFETY: allocated for this, never freed.
        unsafe { init(frames) }.unwrap();
        // SAFETY: refused.
        assert_eq!(unsafe { init(frames) }, Err(Error::AlreadySetUp));
        let total = stats().total;
        assert!(total > 900 && total < 1024 - 4);
        let got = alloc_zeroed(7, Zone::Any).unwrap();
        assert!(memory.covers(got) && !got.overlaps(reserved));
        let last = pointer(got.end()).wrapping_sub(1);
        // SAFETY: ours, and mapped.
        assert_eq!(unsafe { last.read() }, 0);
        assert_eq!(stats().free, total - 7);
        // SAFETY: not used any more.
        unsafe { free(got) }.unwrap();
        assert_eq!(stats().free, total);
    }
}
