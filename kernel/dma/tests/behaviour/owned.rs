//! Owned memory while nobody but its owner has it.

use dma::fakes::{FakeMemory, FakeMemoryConfig};
use dma::{Buffer, Error, Ladder, PageRequest, PageSet, Pages};
use iommu::{PAGE_SIZE, PhysAddr, PhysRange};

fn neighbours(range: PhysRange) -> &'static FakeMemory {
    FakeMemory::new(FakeMemoryConfig { range, gap: 0, snooped: true })
}

fn range(start: u64, len: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(start), len).unwrap()
}

#[test]
fn pages_are_zeroed_rounded_up_and_freed_when_dropped() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let mut pages = Pages::zeroed(memory, 1).unwrap();
    assert_eq!((pages.len(), pages.as_slice()), (PAGE_SIZE, &[0; 4096][..]));
    pages.as_mut_slice()[4095] = 1;
    assert_eq!(pages.phys_runs()[0].len(), PAGE_SIZE);
    assert_eq!(Pages::zeroed(memory, 2 * PAGE_SIZE + 1).unwrap().len(), 3 * PAGE_SIZE);
    drop(pages);
    assert_eq!((memory.live_allocations(), memory.violations().len()), (0, 0));
}

#[test]
fn sizes_that_cannot_be_are_errors() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    assert_eq!(Pages::zeroed(memory, 0).unwrap_err(), Error::BadSize(0));
    assert_eq!(Pages::zeroed(memory, u64::MAX).unwrap_err(), Error::BadSize(u64::MAX));
    assert_eq!(PageSet::zeroed(memory, 0, Ladder::DEFAULT).unwrap_err(), Error::BadSize(0));
    assert_eq!(Pages::zeroed(memory, 1 << 62).unwrap_err(), Error::OutOfMemory);
    let request = PageRequest { bytes: 4096, align: 3, below: PhysAddr::new(u64::MAX) };
    assert_eq!(Pages::allocate(memory, request).unwrap_err(), Error::BadSize(4096));
    assert_eq!(memory.live_allocations(), 0);
}

#[test]
fn a_ladder_takes_the_largest_chunks_first_each_aligned_to_its_size() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let set = PageSet::zeroed(memory, (2 << 20) + (3 << 16) + 5 * 4096 - 1, Ladder::DEFAULT).unwrap();
    let sizes: Vec<usize> = set.chunks().map(<[u8]>::len).collect();
    assert_eq!(sizes, [&[1 << 20; 2][..], &[1 << 16; 3], &[4096; 5]].concat());
    assert_eq!(set.len(), (2 << 20) + (3 << 16) + 5 * 4096);
    for run in set.runs() {
        assert!(run.start().is_aligned(run.len()), "{run}");
    }
}

#[test]
fn memory_without_large_chunks_gives_smaller_ones() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    memory.fail_after(0);
    let set = PageSet::zeroed(memory, 1 << 20, Ladder::DEFAULT).unwrap();
    assert_eq!(set.chunks().map(<[u8]>::len).collect::<Vec<_>>(), [1 << 16; 16]);
}

#[test]
fn a_ladder_without_small_steps_still_ends_in_pages() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let ladder = const { Ladder::new(&[1 << 20]).unwrap() };
    assert_eq!(PageSet::zeroed(memory, (1 << 20) + 1, ladder).unwrap().chunks().count(), 2);
    assert_eq!(Ladder::new(&[4096, 1 << 20]), None);
    assert_eq!(Ladder::new(&[6000]), None);
    assert_eq!(Ladder::new(&[1024]), None);
}

#[test]
fn chunks_that_touch_are_one_run() {
    let memory = neighbours(range(0x10_0000, 1 << 30));
    let set = PageSet::zeroed(memory, 8 * 4096, Ladder::SINGLE_PAGES).unwrap();
    assert_eq!(set.chunks().count(), 8);
    assert_eq!(Buffer::runs(&set), [range(0x10_0000, 8 * 4096)]);
}

#[test]
fn reading_and_writing_at_an_offset_crosses_chunks_and_stays_inside() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let mut set = PageSet::zeroed(memory, 4 * 4096, Ladder::SINGLE_PAGES).unwrap();
    let data: Vec<u8> = (0..9000_u32).map(|i| (i % 251) as u8).collect();
    set.write_at(3000, &data).unwrap();
    let mut back = vec![0; data.len()];
    set.read_at(3000, &mut back).unwrap();
    assert_eq!(back, data);
    assert_eq!(set.chunks().flatten().skip(3000).take(9000).copied().collect::<Vec<_>>(), data);
    assert!(set.chunks().flatten().take(3000).all(|byte| *byte == 0));
    let out = Error::OutOfRange { offset: 4 * 4096 - 1, len: 2, size: 4 * 4096 };
    assert_eq!(set.write_at(4 * 4096 - 1, &[1; 2]), Err(out.clone()));
    assert_eq!(set.read_at(4 * 4096 - 1, &mut [0; 2]), Err(out));
    assert!(set.read_at(u64::MAX, &mut [0; 2]).is_err());
    set.read_at(4 * 4096, &mut []).unwrap();
}

#[test]
fn memory_comes_from_below_the_limit_or_not_at_all() {
    let memory = neighbours(range(0xffff_e000, 1 << 20));
    let below = PhysAddr::new(0xffff_ffff);
    let request = |bytes| PageRequest { below, ..PageRequest::anywhere(bytes) };
    let set = PageSet::allocate(memory, request(2 * 4096), Ladder::SINGLE_PAGES).unwrap();
    assert_eq!(set.runs(), [range(0xffff_e000, 0x2000)]);
    let more = PageSet::allocate(memory, request(4096), Ladder::SINGLE_PAGES);
    assert_eq!(more.unwrap_err(), Error::OutOfMemory);
}

#[test]
fn no_chunk_is_smaller_than_the_smallest_page_of_the_device() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let request = PageRequest { align: 1 << 16, ..PageRequest::anywhere((1 << 20) + (1 << 16)) };
    let set = PageSet::allocate(memory, request, Ladder::DEFAULT).unwrap();
    assert_eq!(set.chunks().map(<[u8]>::len).collect::<Vec<_>>(), [1 << 20, 1 << 16]);
    let uneven = PageRequest { align: 1 << 16, ..PageRequest::anywhere((1 << 16) + 4096) };
    assert!(matches!(PageSet::allocate(memory, uneven, Ladder::DEFAULT), Err(Error::BadSize(_))));
}

#[test]
fn contiguous_pages_can_be_used_as_scattered_ones() {
    let memory = FakeMemory::new(FakeMemoryConfig::default());
    let mut pages = Pages::zeroed(memory, 8192).unwrap();
    pages.as_mut_slice()[5000] = 9;
    let set = PageSet::from(pages);
    let mut byte = [0];
    set.read_at(5000, &mut byte).unwrap();
    assert_eq!((byte, set.len(), set.chunks().count()), ([9], 8192, 1));
    drop(set);
    assert_eq!((memory.live_allocations(), memory.violations().len()), (0, 0));
}
