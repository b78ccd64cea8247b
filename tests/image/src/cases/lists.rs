//! Scatter lists, with a disk: parts that begin and end inside pages are one transfer.

use super::pattern;
use crate::bench::soon;
use alloc::sync::Arc;
use base::block_on;
use dma::{FromDevice, Lent, Pages, ScatterList, ToDevice};
use kernel::class::Disk;
use ktest::{Outcome, expect, expect_eq, ktest};

/// Pages, offset and length of the parts: a first one that begins inside a page, whole ones, one in the middle that does not fill
/// its page, and a last one that ends inside one. Together 32 sectors.
const PARTS: [(u64, u64, u64); 5] = [(1, 3584, 512), (1, 0, 4096), (2, 1024, 4096), (1, 0, 4096), (1, 0, 3584)];
const LEN: u64 = 32 * 512;

fn list(device: &dma::Device) -> Result<ScatterList<Pages>, Outcome> {
    let mut list = device.scatter_list(PARTS.len())?;
    for (count, offset, len) in PARTS {
        list.push_part(device.pages(count * 4096)?, offset, len).map_err(|rejected| rejected.error)?;
    }
    expect_eq!(list.len(), LEN);
    Ok(list)
}

ktest! {
    fn a_list_of_parts_is_written_and_read_as_one_transfer(bench) {
        let disk = bench.disk()?;
        let device = disk.device();
        let sector = disk.block().geometry().sectors - 4096;
        let bytes = pattern(51, LEN as usize);
        let mut out = list(device)?;
        out.write_at(0, &bytes)?;
        let out = Arc::new(device.map_list::<ToDevice, _>(out).map_err(|rejected| rejected.error)?);
        // The part that begins inside a page begins anew, and the one after it does.
        expect_eq!(out.segments().len(), 3);
        block_on(soon(), disk.block().write(sector, &out, 0..LEN)?)??;
        block_on(soon(), disk.block().flush()?)??;
        let into = Arc::new(device.map_list::<FromDevice, _>(list(device)?).map_err(|rejected| rejected.error)?);
        block_on(soon(), disk.block().read(sector, &into, 0..LEN)?)??;
        // Any part of it, too: from inside one part into the next.
        block_on(soon(), disk.block().read(sector + 8, &into, 4096..8192)?)??;
        let mapped = Arc::try_unwrap(into).map_err(|_| board::Error::Missing("last owner of a loan"))?;
        let back = mapped.unmap()?;
        let mut found = alloc::vec![0; bytes.len()];
        back.read_at(0, &mut found)?;
        expect!(found == bytes);
        // What lies beside the parts is as it was.
        let first = back.buffers().next().ok_or(board::Error::Missing("first buffer"))?;
        expect!(first.as_slice()[..3584].iter().all(|byte| *byte == 0));
        drop(out);
        disk.stop()?;
        Ok(())
    }
}
