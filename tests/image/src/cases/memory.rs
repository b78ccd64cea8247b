//! Frames and heap.

use alloc::vec::Vec;
use iommu::PAGE_SIZE;
use kernel::mm::{self, Zone};
use ktest::{expect, expect_eq, ktest};

ktest! {
    fn frames_come_aligned_and_below_4_gib_on_request(bench) {
        if bench.boot.machine.memory.iter().all(|range| range.start().get() >= 1 << 32) {
            ktest::skip!("this machine's memory lies above 4 GiB");
        }
        let before = mm::stats().free;
        let range = mm::alloc_aligned(16, 1 << 16, Zone::Below4GiB)?;
        expect!(range.start().is_aligned(1 << 16));
        expect!(range.end().get() <= 1 << 32);
        expect_eq!(range.len(), 16 * PAGE_SIZE);
        // SAFETY: nothing uses the frames.
        unsafe { mm::free(range) }?;
        expect_eq!(mm::stats().free, before);
        Ok(())
    }
}

ktest! {
    fn frames_given_back_twice_are_refused(_bench) {
        let range = mm::alloc(4, Zone::Any)?;
        // SAFETY: nothing uses the frames.
        unsafe { mm::free(range) }?;
        // SAFETY: nothing uses the frames; they are not allocated, which is the point.
        expect!(unsafe { mm::free(range) }.is_err());
        Ok(())
    }
}

ktest! {
    fn all_memory_can_be_had_and_comes_back(_bench) {
        let before = mm::stats().free;
        let mut taken = Vec::new();
        // What the heap takes for the list of frames is memory too.
        taken.try_reserve_exact(before / 256 + 64)?;
        let free = mm::stats().free;
        while let Ok(range) = mm::alloc(256, Zone::Any) {
            taken.push(range);
        }
        let got: u64 = taken.iter().map(|range| range.len() / PAGE_SIZE).sum();
        expect!(got as usize > free / 2, "{got} frames of {free}");
        expect!(mm::alloc(256, Zone::Any).is_err());
        for range in taken.drain(..) {
            // SAFETY: nothing uses the frames.
            unsafe { mm::free(range) }?;
        }
        expect_eq!(mm::stats().free, free);
        Ok(())
    }
}

ktest! {
    fn the_heap_grows_by_frames_and_holds_what_is_put_there(_bench) {
        let mut blocks: Vec<Vec<u8>> = Vec::new();
        for index in 0..32_u8 {
            let mut block = Vec::new();
            block.try_reserve_exact(1 << 20)?;
            block.resize(1 << 20, index);
            blocks.push(block);
        }
        for (index, block) in blocks.iter().enumerate() {
            expect!(block.iter().all(|byte| usize::from(*byte) == index));
        }
        Ok(())
    }
}
