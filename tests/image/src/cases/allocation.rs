//! Kinds of memory on the real tables: pages that are not cached, or not reached, have no other alias on any core.

use super::boot::on_other_cores;
use super::pattern;
use crate::bench::{Bench, soon};
use alloc::vec::Vec;
use base::IrqMutex;
use board::{COHERENT, CarveOut, EduStray, Treatment};
use core::sync::atomic::{AtomicU64, Ordering};
use dma::{BusWindow, Device, DeviceConfig, DirectConfig, DmaMemory, Lent, Limits, PageRequest};
use iommu::{FaultReason, PAGE_SIZE, PhysAddr, PhysRange, Prot};
use kernel::mm::{self, Zone};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

type Page = [AtomicU64; 512];

/// The edu, for the DMA-API as a device that does not snoop the caches.
fn non_coherent(edu: &EduStray) -> Result<Device, Outcome> {
    let group = edu.master().group().ok_or(board::Error::Missing("group"))?.clone();
    let config = DeviceConfig {
        name: "edu that does not snoop",
        group,
        limits: Limits::NONE,
        coherent: false,
        memory: &COHERENT,
    };
    // SAFETY: the master's one stream is in its group; that it snoops although this is denied does no harm.
    Ok(unsafe { Device::new(config) }?)
}

/// Where the first byte of a loan is.
fn phys(edu: &EduStray, lent: &dyn Lent) -> Result<PhysAddr, Outcome> {
    let domain = edu.master().group().and_then(|group| group.domain()).ok_or(board::Error::Missing("domain"))?;
    let iova = lent.segments().first().ok_or(board::Error::Missing("segment"))?.iova;
    Ok(domain.space().translate(iova).ok_or(board::Error::Missing("translation"))?.0)
}

/// Whether the page at `phys` can be read in the linear map by this core.
fn in_linear_map(phys: u64) -> bool {
    let address = mm::phys_to_virt(PhysAddr::new(phys)).get();
    // SAFETY: memory: reading it changes nothing.
    let read = unsafe { arch::probe::read8(address) };
    read.is_ok()
}

static PROBED: AtomicU64 = AtomicU64::new(0);
static REACHED: AtomicU64 = AtomicU64::new(0);

fn probe(_core: usize) {
    REACHED.fetch_add(u64::from(in_linear_map(PROBED.load(Ordering::Acquire))), Ordering::AcqRel);
}

/// How many of the cores can read the page at `phys` in the linear map.
fn reached_by(bench: &Bench, phys: PhysAddr) -> Result<u64, Outcome> {
    PROBED.store(phys.get(), Ordering::Release);
    REACHED.store(0, Ordering::Release);
    on_other_cores(bench.cores, probe)?;
    probe(0);
    Ok(REACHED.load(Ordering::Acquire))
}

fn uncached_pages(bench: &Bench) -> Result<(), Outcome> {
    let edu = bench.edu()?;
    let device = non_coherent(&edu)?;
    // Every core has translated the address, so that its TLB has it.
    let cores = bench.cores as u64;
    let ring = device.coherent::<Page>()?;
    let at = phys(&edu, &ring)?;
    expect_eq!(reached_by(bench, at)?, 0);
    expect!(ring.iter().all(|word| word.load(Ordering::Relaxed) == 0));
    // Shared in both directions, without any maintenance.
    ring[3].store(0x1122_3344_5566_7788, Ordering::Relaxed);
    base::barrier::device_write();
    edu.edu().dma_to_device(ring.iova_of(&ring[3])?, 8, Completion::Polling, soon())?;
    edu.edu().dma_from_device(ring.iova_of(&ring[7])?, 8, Completion::Polling, soon())?;
    expect_eq!(ring[7].load(Ordering::Relaxed), 0x1122_3344_5566_7788);
    ring.release()?;
    // The block is kept for the next, out of the linear map, until it is trimmed.
    expect_eq!(reached_by(bench, at)?, 0);
    expect!(board::trim_aliases());
    expect_eq!(reached_by(bench, at)?, cores);
    // And once more, now that every TLB has the block in the linear map.
    let again = device.coherent::<Page>()?;
    expect_eq!(reached_by(bench, phys(&edu, &again)?)?, 0);
    drop(again);
    board::trim_aliases();
    device.shut_down()?;
    drop(device);
    Ok(edu.stop()?)
}

ktest! {
    /// Red without the TLB invalidation of `leave_linear` (the second time), and when it was for this core only.
    fn uncached_pages_are_out_of_the_linear_map_for_every_core(bench) {
        uncached_pages(bench)
    }
}

ktest! {
    fn uncached_pages_are_out_of_the_linear_map_for_eight_cores(bench) {
        uncached_pages(bench)
    }
    machine: smp8
}

ktest! {
    fn every_kind_of_memory_comes_back_and_nothing_leaks(bench) {
        let edu = bench.edu()?;
        let device = non_coherent(&edu)?;
        let round = |size: u64| -> Result<(), Outcome> {
            let ring = device.coherent::<Page>()?;
            let (frame, hidden) = (device.write_combined(size)?, device.hidden(size)?);
            expect!(mm::stats().free > 0 && board::alias_stats().used >= PAGE_SIZE + 2 * size);
            let places = [phys(&edu, &ring)?, phys(&edu, &frame)?, phys(&edu, &hidden)?];
            for place in places {
                expect!(!in_linear_map(place.get()));
            }
            drop((ring, frame, hidden));
            expect_eq!(board::alias_stats().used, 0);
            board::trim_aliases();
            expect_eq!(board::alias_stats().taken, 0);
            for place in places {
                expect!(in_linear_map(place.get()));
            }
            Ok(())
        };
        // The first time, tables are made, which stay.
        for size in [PAGE_SIZE, 5 << 20] {
            round(size)?;
            round(size)?;
            let before = mm::stats().free;
            round(size)?;
            expect_eq!(mm::stats().free, before);
        }
        drop(device);
        Ok(edu.stop()?)
    }
}

ktest! {
    fn a_device_reads_what_was_streamed_and_uses_what_is_hidden(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let bytes = pattern(31, 256);
        let (frame, hidden) = (device.write_combined(3 * PAGE_SIZE)?, device.hidden(2 * PAGE_SIZE)?);
        frame.write(PAGE_SIZE + 512, &bytes)?;
        frame.flush();
        let out = device.coherent::<[AtomicU64; 64]>()?;
        let at = |lent: &dyn Lent, offset| dma::slice(lent, offset, 256).ok().and_then(|mut slices| slices.next());
        let place = |lent: &dyn Lent, offset| at(lent, offset).ok_or(board::Error::Missing("segment"));
        let since = bench.watch();
        for (from, to) in [
            (place(&frame, PAGE_SIZE + 512)?, place(&hidden, PAGE_SIZE)?),
            (place(&hidden, PAGE_SIZE)?, place(&out, 0)?),
            // What nobody has written is zeros.
            (place(&hidden, 0)?, place(&out, 256)?),
        ] {
            edu.edu().dma_to_device(from.iova, 256, Completion::Polling, soon())?;
            edu.edu().dma_from_device(to.iova, 256, Completion::Polling, soon())?;
        }
        expect!(!bench.has_faulted(edu.master().streams(), since));
        let seen: Vec<u8> = out.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        expect!(seen[..256] == bytes[..] && seen[256..].iter().all(|byte| *byte == 0));
        let (hidden_at, frame_at) = (hidden.iova(), frame.iova());
        drop((hidden, frame, out));
        for iova in [hidden_at, frame_at] {
            let since = bench.watch();
            edu.edu().dma_to_device(iova, 64, Completion::Polling, soon())?;
            let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
            expect_eq!(noted.fault.reason, FaultReason::NotMapped);
        }
        Ok(edu.stop()?)
    }
}

ktest! {
    /// QEMU's SMMU does not look at AP[1] of a leaf, so what can be seen here is that it stands there; the fault is a matter of the
    /// host tests.
    fn privileged_memory_has_leaves_for_privileged_transactions(bench) {
        let edu = bench.edu()?;
        let domain = edu.master().group().and_then(|group| group.domain()).ok_or(board::Error::Missing("domain"))?;
        let secret = edu.master().device().coherent_privileged::<Page>()?;
        let shared = edu.master().device().coherent::<Page>()?;
        let prot = |iova| domain.space().translate(iova).map(|(_, prot)| prot.contains(Prot::PRIVILEGED));
        expect_eq!((prot(secret.iova()), prot(shared.iova())), (Some(true), Some(false)));
        drop((secret, shared));
        Ok(edu.stop()?)
    }
}

static DEVICE: IrqMutex<Option<Device>> = IrqMutex::new(None);
static WRONG: AtomicU64 = AtomicU64::new(0);

fn take_and_give(core: usize) {
    let Some(device) = DEVICE.lock().clone() else { return };
    for round in 0..60_u64 {
        let mark = (core as u64) << 32 | round;
        let intact = (|| {
            let ring = device.coherent::<Page>().ok()?;
            let hidden = device.hidden(PAGE_SIZE << (round % 4)).ok()?;
            let frame = device.write_combined(PAGE_SIZE * (1 + round % 7)).ok()?;
            ring.iter().for_each(|word| word.store(mark, Ordering::Relaxed));
            frame.write(100, &[7; 3000]).ok()?;
            drop((frame, hidden));
            let cached = device.pages(PAGE_SIZE * (1 + round % 5)).ok()?;
            let fresh = cached.as_slice().iter().all(|byte| *byte == 0);
            Some(fresh && ring.iter().all(|word| word.load(Ordering::Relaxed) == mark))
        })();
        WRONG.fetch_add(u64::from(intact != Some(true)), Ordering::Relaxed);
        if round % 16 == core as u64 {
            board::trim_aliases();
        }
    }
}

ktest! {
    fn eight_cores_take_and_give_blocks_of_the_linear_map_at_once(bench) {
        let edu = bench.edu()?;
        *DEVICE.lock() = Some(non_coherent(&edu)?);
        WRONG.store(0, Ordering::Relaxed);
        on_other_cores(bench.cores, take_and_give)?;
        take_and_give(0);
        *DEVICE.lock() = None;
        expect_eq!(WRONG.load(Ordering::Relaxed), 0);
        board::trim_aliases();
        expect_eq!(board::alias_stats(), mm::PoolStats::default());
        Ok(edu.stop()?)
    }
    machine: smp8
}

ktest! {
    fn a_carve_out_is_mapped_as_it_is_used_and_never_twice(bench) {
        let edu = bench.edu()?;
        // As firmware would set it aside: memory that is in no linear map. It stays so.
        let block = mm::alloc_aligned(512, mm::BLOCK, Zone::Any)?;
        let range = block.start().get()..block.end().get();
        // SAFETY: just allocated; nobody uses it.
        unsafe { arch::mmu::leave_linear(range) }?;
        // SAFETY: nobody else's, for good, and mapped nowhere.
        let carve_out = unsafe { CarveOut::new(block) }?;
        let group = edu.master().group().ok_or(board::Error::Missing("group"))?.clone();
        let config = DeviceConfig { name: "carved", group, limits: Limits::NONE, coherent: true, memory: carve_out };
        // SAFETY: the master's one stream is in its group, and it snoops.
        let device = unsafe { Device::new(config) }?;
        let (ring, frame) = (device.coherent::<Page>()?, device.write_combined(PAGE_SIZE)?);
        for lent in [&ring as &dyn Lent, &frame] {
            let place = phys(&edu, lent)?;
            expect!(block.contains(place) && !in_linear_map(place.get()));
        }
        ring[0].store(77, Ordering::Relaxed);
        edu.edu().dma_to_device(ring.iova(), 8, Completion::Polling, soon())?;
        edu.edu().dma_from_device(ring.iova_at(8)?, 8, Completion::Polling, soon())?;
        expect_eq!(ring[1].load(Ordering::Relaxed), 77);
        // Streaming memory is ordinary memory, and what does not fit is an error.
        expect!(!block.overlaps(device.pages(PAGE_SIZE)?.phys_runs()[0]));
        expect!(matches!(device.hidden(2 << 20), Err(dma::Error::OutOfMemory)));
        drop((ring, frame));
        let all = device.hidden(2 << 20)?;
        expect_eq!(carve_out.stats().used, 2 << 20);
        drop(all);
        expect_eq!(carve_out.stats(), mm::PoolStats { taken: 2 << 20, used: 0 });
        drop(device);
        Ok(edu.stop()?)
    }
}

ktest! {
    /// The device tree of this machine has 4 MiB at 0x5000_0000 for the edu in slot 1, and asks for 24 MiB somewhere for large
    /// allocations.
    fn a_device_has_its_coherent_memory_where_the_device_tree_says(bench) {
        let carve_out = PhysRange::new(PhysAddr::new(0x5000_0000), 4 << 20).unwrap_or_default();
        expect_eq!(mm::stats().area as u64 * PAGE_SIZE, 24 << 20);
        expect!(bench.boot.machine.pools().all(|pool| pool.range.is_some()));
        let edu = bench.edu()?;
        let device = edu.master().device();
        let (ring, frame, hidden) = (device.coherent::<Page>()?, device.write_combined(PAGE_SIZE)?, device.hidden(PAGE_SIZE)?);
        for lent in [&ring as &dyn Lent, &frame, &hidden] {
            let place = phys(&edu, lent)?;
            expect!(carve_out.contains(place), "{place}");
            expect_eq!(reached_by(bench, place)?, 0);
        }
        // Nobody has any of it in the linear map: the tree says `no-map`.
        expect_eq!(reached_by(bench, carve_out.start())?, 0);
        ring[5].store(99, Ordering::Relaxed);
        edu.edu().dma_to_device(ring.iova_of(&ring[5])?, 8, Completion::Polling, soon())?;
        edu.edu().dma_from_device(ring.iova_of(&ring[6])?, 8, Completion::Polling, soon())?;
        expect_eq!(ring[6].load(Ordering::Relaxed), 99);
        let disk = bench.disk_master()?;
        expect!(!core::ptr::addr_eq(disk.device().memory(), device.memory()));
        expect!(core::ptr::addr_eq(disk.device().memory(), &COHERENT));
        // What is used up is an error, and comes back.
        let rest = device.hidden((4 << 20) - 3 * PAGE_SIZE)?;
        expect!(matches!(device.coherent::<Page>(), Err(dma::Error::OutOfMemory)));
        drop((ring, rest));
        drop(device.coherent::<Page>()?);
        drop((frame, hidden));
        disk.arrest()?;
        Ok(edu.stop()?)
    }
    machine: pools
}

ktest! {
    /// As above, with nothing that translates.
    fn a_device_that_is_let_through_has_its_coherent_memory_where_the_device_tree_says_too(bench) {
        let carve_out = PhysRange::new(PhysAddr::new(0x5000_0000), 4 << 20).unwrap_or_default();
        let (host, function) = bench.function(testdev::edu::ID.0, testdev::edu::ID.1, 0)?;
        let treatment = Treatment { passthrough: true, ..Treatment::default() };
        let edu = EduStray::start(bench.hardware.attach_as(host, &function, "edu", Limits::NONE, &treatment)?)?;
        let device = edu.master().device();
        expect!(!device.is_isolated());
        let (ring, frame) = (device.coherent::<Page>()?, device.write_combined(PAGE_SIZE)?);
        for lent in [&ring as &dyn Lent, &frame] {
            let place = lent.segments().first().map(|segment| PhysAddr::new(segment.iova.get())).unwrap_or_default();
            expect!(carve_out.contains(place), "{place}");
            expect_eq!(reached_by(bench, place)?, 0);
        }
        ring[5].store(99, Ordering::Relaxed);
        edu.edu().dma_to_device(ring.iova_of(&ring[5])?, 8, Completion::Polling, soon())?;
        edu.edu().dma_from_device(ring.iova_of(&ring[6])?, 8, Completion::Polling, soon())?;
        expect_eq!(ring[6].load(Ordering::Relaxed), 99);
        expect!(!carve_out.overlaps(device.pages(PAGE_SIZE)?.phys_runs()[0]));
        drop((ring, frame));
        Ok(edu.stop()?)
    }
    machine: pools
}

ktest! {
    /// Single frames until there is none, every second one given back: no two in a row are free, and megabytes still can be had.
    fn large_runs_are_had_after_heavy_fragmentation(_bench) {
        board::trim_aliases();
        let area = mm::stats().area as u64 * PAGE_SIZE;
        expect!(area >= 8 << 20, "{area:#x}");
        let before = mm::stats();
        let mut frames = Vec::new();
        frames.try_reserve_exact(before.free)?;
        while let Ok(frame) = mm::alloc(1, Zone::Any) {
            frames.push(frame);
        }
        expect_eq!(mm::stats().free_in_area, before.free_in_area);
        frames.sort_unstable();
        let (mut kept, mut index) = (Vec::new(), 0);
        kept.try_reserve_exact(1)?;
        frames.retain(|frame| {
            index += 1;
            if frame.start().is_aligned(2 * PAGE_SIZE) {
                return true;
            }
            // SAFETY: nothing uses the frame.
            if unsafe { mm::free(*frame) }.is_err() {
                kept.push(*frame);
            }
            false
        });
        expect!(kept.is_empty() && index > 1000);
        expect!(mm::alloc(2, Zone::Any).is_err(), "no two frames in a row are free");
        let request = PageRequest { align: 1 << 20, ..PageRequest::anywhere(1 << 20) };
        let mut large = Vec::new();
        while let Ok(pages) = COHERENT.allocate_contiguous(request) {
            large.push(pages);
        }
        let got = large.len() as u64;
        let small = COHERENT.allocate_contiguous(PageRequest::anywhere(2 * PAGE_SIZE)).is_err();
        for pages in large {
            // SAFETY: nothing uses the pages.
            unsafe { DmaMemory::free(&COHERENT, pages) };
        }
        for frame in frames {
            // SAFETY: nothing uses the frame.
            unsafe { mm::free(frame) }?;
        }
        expect_eq!(got, area >> 20);
        expect!(small, "a small allocation entered the area");
        expect_eq!(mm::stats().free_in_area, before.free_in_area);
        Ok(())
    }
}

ktest! {
    fn privileged_memory_for_a_device_without_iommu_is_refused(_bench) {
        let windows = [BusWindow::identity()];
        let config =
            DirectConfig { name: "nobody", windows: &windows, limits: Limits::NONE, coherent: true, memory: &COHERENT };
        // SAFETY: there is no such device.
        let device = unsafe { Device::direct(config) }?;
        expect!(matches!(device.coherent_privileged::<Page>(), Err(dma::Error::Unsupported { .. })));
        Ok(())
    }
}
