//! Shared buffers between real devices: who waits for whom, what a move and a revocation leave to a device, buffers whose memory is no
//! page of the kernel's, and tiles.

use super::pattern;
use crate::bench::soon;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use base::{Deadline, IrqMutex, block_on};
use board::EduStray;
use dma::{
    Bidirectional, Cacheability, CarvedOut, CpuReads, CpuWrites, Device, FromDevice, Importer, Job, Ladder, Mapped,
    PageSet, Pages, SharedBuffer, TileView, Tiles, ToDevice,
};
use iommu::{Iova, PAGE_SIZE};
use kernel::class::{Disk, Frame, PixelOrder, Screen};
use ktest::{expect, expect_eq, ktest};
use testdev::edu::Completion;

ktest! {
    fn the_screen_waits_for_the_disk_and_the_disk_for_the_screen(bench) {
        let (disk, screen) = (bench.disk()?, bench.gpu()?);
        let len = 64 << 10;
        let buffer = SharedBuffer::new("shared", disk.device().page_set(len, Ladder::SINGLE_PAGES)?);
        let filled = Arc::new(buffer.attach::<FromDevice>(disk.device())?);
        let shown = Arc::new(buffer.attach::<ToDevice>(screen.device())?);
        let rows = 0..len;
        let rows = core::slice::from_ref(&rows);
        let frame = Frame { width: 128, height: 128, order: PixelOrder::Bgrx, loan: &shown, rows };

        // While work of the disk's does not end, the screen does not show.
        let writing = Job::begin(&filled, soon())?;
        expect!(writing.is_some());
        let refused = screen.show(&frame, Deadline::after_millis(300)).err().map(|error| alloc::format!("{error}"));
        expect!(refused.as_ref().is_some_and(|why| why.contains("a device is at work on it")), "{refused:?}");
        drop(writing);

        // Transfers that nobody takes the results of: the queue's completion is enough.
        let mut transfers = Vec::new();
        for part in 0..16 {
            transfers.push(disk.read(part * 8, &filled, part * 4096..(part + 1) * 4096)?);
        }
        let picture = screen.show(&frame, soon())?;
        // All is over by now: nothing is left to wait for.
        drop(Job::begin(&shown, Deadline::after_millis(0))?);
        for transfer in transfers {
            block_on(soon(), transfer)??;
        }
        // And the other way round.
        let reading = Job::begin(&shown, soon())?;
        expect!(Job::begin(&filled, Deadline::after_millis(0)).is_err());
        drop(reading);
        block_on(soon(), disk.read(0, &filled, 0..4096)?)??;
        screen.hide(picture, soon())?;
        drop((filled, shown));
        expect!(buffer.into_pages().is_ok());
        screen.stop()?;
        disk.stop()?;
        Ok(())
    }
}

/// Takes addresses when a buffer has moved, so that it does not come back to those that it had.
struct Taker(Device, IrqMutex<Option<Mapped<ToDevice, Pages>>>);

impl Importer for Taker {
    fn let_go(&self) {}
    fn moved(&self) {
        let taken = self.0.pages(PAGE_SIZE).ok().and_then(|pages| self.0.map(pages).ok());
        let replaced = core::mem::replace(&mut *self.1.lock(), taken);
        drop(replaced);
    }
}

ktest! {
    fn a_buffer_moves_under_a_device_and_what_the_device_was_told_before_faults(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let one_page = || PageSet::of(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error);
        let buffer = SharedBuffer::new("moving", one_page()?);
        let taker = Arc::new(Taker(device.clone(), IrqMutex::new(None)));
        let weak: Weak<Taker> = Arc::downgrade(&taker);
        buffer.tell(weak)?;
        let import = buffer.import::<Bidirectional>(device, None)?;
        buffer.cpu_access::<CpuWrites>()?.write_at(100, b"the contents stay")?;
        let told = import.map()?.iova();
        edu.edu().dma_to_device(told, 2048, Completion::Interrupt, soon())?;

        // In flight: a move waits, and gives up in time.
        let in_flight = import.map()?;
        expect!(buffer.relocate(one_page()?, Deadline::after_millis(20)).is_err());
        drop(in_flight);
        let old = buffer.relocate(one_page()?, soon()).map_err(|rejected| rejected.error)?;
        let now = import.map()?.iova();
        expect!(now != told, "the taker came too late");

        let since = bench.watch();
        edu.edu().dma_from_device(Iova::new(told.get() + 200), 64, Completion::Interrupt, soon())?;
        let noted = bench.fault(edu.master().streams(), since);
        expect_eq!(noted.and_then(|noted| noted.fault.iova), Some(Iova::new(told.get() + 200)));
        let mut seen = [0; 17];
        old.read_at(100, &mut seen)?;
        expect_eq!(&seen, b"the contents stay");
        let mut untouched = [0xff; 64];
        old.read_at(200, &mut untouched)?;
        expect_eq!(untouched, [0; 64]);

        // Where it is now, the device has the same bytes, and those that it wrote.
        edu.edu().dma_to_device(now, 2048, Completion::Interrupt, soon())?;
        edu.edu().dma_from_device(Iova::new(now.get() + 2048), 2048, Completion::Interrupt, soon())?;
        import.unmap();
        buffer.cpu_access::<CpuReads>()?.read_at(2048 + 100, &mut seen)?;
        expect_eq!(&seen, b"the contents stay");

        let since = bench.watch();
        edu.edu().dma_from_device(now, 64, Completion::Interrupt, soon())?;
        expect!(bench.fault(edu.master().streams(), since).is_some(), "reached after it was unmapped");
        drop((taker, import, buffer, old));
        edu.stop()?;
        expect_eq!(dma::quarantine::report().pages, 0);
        Ok(())
    }
}

ktest! {
    fn disk_and_edu_share_memory_that_is_not_cached_or_not_mapped_at_all(bench) {
        let (disk, edu) = (bench.disk()?, bench.edu()?);
        let mut first = alloc::vec![0; 512];
        {
            let buffer = SharedBuffer::new("plain", disk.device().page_set(PAGE_SIZE, Ladder::DEFAULT)?);
            let filled = Arc::new(buffer.attach::<FromDevice>(disk.device())?);
            block_on(soon(), disk.read(0, &filled, 0..512)?)??;
            drop(filled);
            buffer.cpu_access::<CpuReads>()?.read_at(0, &mut first)?;
        }
        for kind in [Cacheability::NonCacheable, Cacheability::Unmapped] {
            let carved = CarvedOut::allocate(edu.master().device().memory(), 2 * PAGE_SIZE, kind)?;
            let buffer = SharedBuffer::export("carved", carved)?;
            let filled = Arc::new(buffer.attach::<FromDevice>(disk.device())?);
            block_on(soon(), disk.read(0, &filled, 0..512)?)??;
            drop(filled);
            // The second device moves what the first one wrote to the second page.
            let both = Arc::new(buffer.attach::<Bidirectional>(edu.master().device())?);
            edu.edu().dma_to_device(both.iova(), 512, Completion::Interrupt, soon())?;
            edu.edu().dma_from_device(Iova::new(both.iova().get() + PAGE_SIZE), 512, Completion::Interrupt, soon())?;
            // And the disk's block, by way of edu, is in memory that only devices may reach.
            let (phys, copy) = (buffer.extents()?.runs()[0].start().get(), edu.master().device().pages(PAGE_SIZE)?);
            let copy = edu.master().device().map::<FromDevice, _>(copy).map_err(|rejected| rejected.error)?;
            edu.edu().dma_to_device(Iova::new(both.iova().get() + PAGE_SIZE), 512, Completion::Interrupt, soon())?;
            edu.edu().dma_from_device(copy.iova(), 512, Completion::Interrupt, soon())?;
            drop(both);
            let copy = copy.unmap()?;
            expect_eq!(&copy.as_slice()[..512], &first[..]);
            let mut seen = alloc::vec![0; 512];
            match buffer.cpu_access::<CpuReads>() {
                Ok(access) => {
                    access.read_at(PAGE_SIZE, &mut seen)?;
                    expect_eq!((kind, &seen), (Cacheability::NonCacheable, &first));
                }
                Err(error) => {
                    expect_eq!((kind, alloc::format!("{error}").as_str()), (Cacheability::Unmapped, "the CPU does not reach carved"));
                }
            }
            // It is in no linear map.
            let address = kernel::mm::phys_to_virt(iommu::PhysAddr::new(phys)).get();
            // SAFETY: memory: reading it changes nothing.
            let read = unsafe { arch::probe::read8(address) };
            expect!(read.is_err());
            drop(buffer);
        }
        board::trim_aliases();
        edu.stop()?;
        disk.stop()?;
        Ok(())
    }
    machine: pools
}

ktest! {
    fn the_disk_writes_tiles_and_reads_them_back_in_another_order(bench) {
        // The last blocks of the disk are the test's.
        let disk = bench.disk()?;
        let (width, height) = (64_u32, 96_u32);
        let len = u64::from(width * height * 4);
        let first = disk.block().geometry().sectors - 8192;
        let linear = pattern(77, len as usize);
        let mut out = disk.device().page_set(len, Ladder::DEFAULT)?;
        out.write_at(0, &linear)?;
        let out = Arc::new(disk.device().map::<ToDevice, _>(out).map_err(|rejected| rejected.error)?);
        block_on(soon(), disk.block().write(first, &out, 0..len)?)??;

        let picture = SharedBuffer::new("tiles", disk.device().page_set(len, Ladder::SINGLE_PAGES)?);
        let tiles = Tiles::new(0, width, height).ok_or(board::Error::Missing("tiles"))?;
        let filled = Arc::new(picture.attach_pieces::<FromDevice>(disk.device(), tiles.linear(TileView::Upright))?);
        let mut at = 0;
        while at < len {
            let now = disk.largest_transfer(&*filled, at).min(len - at);
            expect!(now != 0);
            block_on(soon(), disk.read((first * 512 + at) / 512, &filled, at..at + now)?)??;
            at += now;
        }
        Arc::try_unwrap(filled).map_err(|_| board::Error::Missing("last owner of a loan"))?.detach()?;
        let mut stored = alloc::vec![0; len as usize];
        picture.cpu_access::<CpuReads>()?.read_at(0, &mut stored)?;
        let stride = width as usize * 4;
        for (index, row) in stored.chunks_exact(128).enumerate() {
            let (tile, line) = (index / 32, index % 32);
            let (x, y) = (tile % 2 * 128, tile / 2 * 32 + line);
            expect!(row == &linear[y * stride + x..][..128], "row {line} of tile {tile}");
        }
        disk.stop()?;
        Ok(())
    }
}

ktest! {
    /// The liveness register of edu inverts what is written to it. (On the machine with an edu behind each of two root ports.)
    fn one_devices_registers_are_a_buffer_that_another_writes_until_it_is_detached(bench) {
        const LIVENESS: u64 = 4;
        let (writer, neighbour) =
            (bench.edu()?, EduStray::start(bench.edu_master(1)?)?);
        let registers = neighbour.master().function().bar_part(0, 0, 0x100)?;
        let device = writer.master().device();
        let value = SharedBuffer::new("value", device.page_set(PAGE_SIZE, Ladder::DEFAULT)?);
        value.cpu_access::<CpuWrites>()?.write_at(0, &0x1234_5678_u32.to_le_bytes())?;
        let value = value.attach::<ToDevice>(device)?;
        writer.edu().dma_to_device(value.iova(), 4, Completion::Polling, soon())?;
        let window = SharedBuffer::export("registers", neighbour.master().peer_range(0)?)?;
        expect!(window.cpu_access::<CpuReads>().is_err());
        let peer = window.attach::<FromDevice>(device)?;
        let at = Iova::new(peer.iova().get() + LIVENESS);
        writer.edu().dma_from_device(at, 4, Completion::Polling, soon())?;
        expect_eq!(registers.read32(LIVENESS as usize), !0x1234_5678);
        registers.write32(LIVENESS as usize, 0);
        peer.detach()?;
        let since = bench.watch();
        writer.edu().dma_from_device(at, 4, Completion::Polling, soon())?;
        expect!(bench.fault(writer.master().streams(), since).is_some());
        expect_eq!(registers.read32(LIVENESS as usize), !0);
        drop((value, window));
        neighbour.stop()?;
        writer.stop()?;
        Ok(())
    }
    machine: bridge
}
