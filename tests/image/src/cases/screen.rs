//! virtio-gpu, and one buffer that two devices have.

use super::pattern;
use crate::bench::soon;
use alloc::sync::Arc;
use base::block_on;
use dma::{CpuReads, FromDevice, Ladder, SharedBuffer, ToDevice};
use kernel::class::{Disk, Frame, PixelOrder, Screen};
use ktest::{expect, expect_eq, ktest};

ktest! {
    fn the_display_says_how_large_it_is(bench) {
        let screen = bench.gpu()?;
        let (width, height) = screen.size(soon())?;
        expect!(width >= 640 && height >= 480, "{width} x {height}");
        let edid = block_on(soon(), screen.gpu().edid(0))??;
        expect!(edid.is_valid());
        expect_eq!(edid.preferred().map(|mode| (mode.width, mode.height)), Some((width, height)));
        screen.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_picture_from_scattered_rows_is_shown_and_its_memory_comes_back(bench) {
        let screen = bench.gpu()?;
        let (width, height) = (320_u32, 200_u32);
        let bytes = pattern(21, (width * height * 4) as usize);
        for upside_down in [false, true] {
            let mut pages = screen.device().page_set(bytes.len() as u64, Ladder::SINGLE_PAGES)?;
            pages.write_at(0, &bytes)?;
            let loan = Arc::new(screen.device().map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?);
            let row = u64::from(width) * 4;
            let rows: alloc::vec::Vec<_> = (0..u64::from(height))
                .map(|index| if upside_down { u64::from(height) - 1 - index } else { index })
                .map(|index| index * row..(index + 1) * row)
                .collect();
            let frame = Frame { width, height, order: PixelOrder::Bgrx, loan: &loan, rows: &rows };
            let shown = screen.show(&frame, soon())?;
            screen.hide(shown, soon())?;
            expect_eq!(screen.gpu().resources(), 0);
            let mapped = Arc::try_unwrap(loan).map_err(|_| board::Error::Missing("last owner of a loan"))?;
            mapped.unmap()?;
        }
        screen.stop()?;
        Ok(())
    }
}

ktest! {
    fn disk_and_screen_have_the_same_pages_at_once(bench) {
        let (disk, screen) = (bench.disk()?, bench.gpu()?);
        let buffer = SharedBuffer::new("shared", disk.device().page_set(64 << 10, Ladder::SINGLE_PAGES)?);
        let filled = Arc::new(buffer.attach::<FromDevice>(disk.device())?);
        let shown = Arc::new(buffer.attach::<ToDevice>(screen.device())?);
        expect!(buffer.cpu_access::<CpuReads>().is_err());
        block_on(soon(), disk.block().read(0, &filled, 0..64 << 10)?)??;
        let rows = 0..64 << 10;
        let rows = core::slice::from_ref(&rows);
        let frame = Frame { width: 128, height: 128, order: PixelOrder::Bgrx, loan: &shown, rows };
        let picture = screen.show(&frame, soon())?;
        screen.hide(picture, soon())?;
        Arc::try_unwrap(shown).map_err(|_| board::Error::Missing("last owner of a loan"))?.detach()?;
        Arc::try_unwrap(filled).map_err(|_| board::Error::Missing("last owner of a loan"))?.detach()?;
        expect!(buffer.cpu_access::<CpuReads>().is_ok());
        expect!(buffer.into_pages().is_ok());
        screen.stop()?;
        disk.stop()?;
        Ok(())
    }
}
