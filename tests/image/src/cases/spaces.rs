//! Address spaces that are exchanged under devices at work.
//!
//! Seen red, all three that swap: a group that blocks its streams before it attaches them to the new space. Then edu's bytes
//! reach neither page, and the disk finds nothing in its queue and stops.

use super::pattern;
use crate::bench::soon;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::block_on;
use board::{BlockDisk, EduStray};
use dma::{Bidirectional, Device, Ladder, Mapped, OwnedAttachment, OwnedDomain, PageSet, Pages, Placed};
use iommu::{Iova, IovaRange, PAGE_SIZE, PhysRange};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Direction;

/// Where the spaces' own pages lie.
const AT: Iova = Iova::new(0x4000_0000);
/// Requests in flight at once.
const DEPTH: u64 = 32;
/// Bytes of one request: two pages.
const REQUEST: u64 = 2 * PAGE_SIZE;
/// The DMA-API gives the lowest addresses out first: what the driver has is below this.
const DRIVERS: u64 = 64 << 20;
/// Swaps that a test has to see.
const SWAPS: u32 = 3_000;
/// The same where each is a request for every mapping.
const SWAPS_BY_REQUEST: u32 = 100;

/// Puts all that the DMA-API has mapped for `device` into `space` too, but for what lies in `but`.
fn mirror(
    device: &Device,
    space: &OwnedDomain,
    domain: &iommu::domain::Domain,
    but: &[IovaRange],
) -> Result<(), Outcome> {
    for page in (PAGE_SIZE..DRIVERS).step_by(PAGE_SIZE as usize) {
        let iova = IovaRange::new(Iova::new(page), PAGE_SIZE).unwrap_or_default();
        let Some((phys, prot)) = domain.space().translate(iova.start()) else { continue };
        if but.iter().any(|range| range.overlaps(iova)) {
            continue;
        }
        let run = PhysRange::new(phys, PAGE_SIZE).unwrap_or_default();
        // SAFETY: the page is lent to this very device, within these rights, for longer than the space lives.
        unsafe { space.map_raw(iova, &[run], prot) }
            .map_err(|error| Outcome::failed(format_args!("{} at {iova}: {error}", device.name())))?;
    }
    Ok(())
}

/// Buffers for requests at the same addresses in two spaces.
struct Buffers {
    /// Lent by the DMA-API; mirrored into the first space.
    lent: Vec<Arc<Mapped<Bidirectional, PageSet>>>,
    /// The second space's own.
    own: Vec<Placed<Bidirectional, PageSet>>,
}

/// Reads `REQUEST * DEPTH` bytes of the disk, request by request at once, while `swap` exchanges the spaces. Returns the swaps.
fn read_while(
    disk: &BlockDisk,
    first: u64,
    buffers: &Buffers,
    mut swap: impl FnMut() -> Result<(), Outcome>,
) -> Result<u32, Outcome> {
    let mut batch = disk.block().batch();
    let mut transfers = Vec::new();
    for (index, loan) in (0..).zip(&buffers.lent) {
        transfers.push(batch.read(first + index * REQUEST / 512, loan, 0..REQUEST)?);
    }
    drop(batch);
    let (mut swaps, patience) = (0, soon());
    while !transfers.iter().all(|transfer| transfer.is_over()) {
        swap()?;
        swaps += 1;
        expect!(!patience.has_passed(), "the disk has stopped in the middle of it");
    }
    for transfer in transfers {
        block_on(soon(), transfer)??;
    }
    Ok(swaps)
}

/// Every byte of every request is in one of the two buffers, and what is not there is as it was.
fn judge(buffers: &Buffers, bytes: &[u8], fill: u8) -> Result<[usize; 2], Outcome> {
    let mut arrived = [0; 2];
    for (index, loan) in buffers.lent.iter().enumerate() {
        let wanted = &bytes[index * REQUEST as usize..][..REQUEST as usize];
        let mut found = [[0; REQUEST as usize]; 2];
        loan.view().read(0, &mut found[0])?;
        match buffers.own.get(index) {
            Some(own) => own.view().read(0, &mut found[1])?,
            None => found[1].fill(fill),
        }
        for page in (0..REQUEST as usize).step_by(512) {
            let [old, new] = found.each_ref().map(|buffer| &buffer[page..page + 512]);
            let wanted = &wanted[page..page + 512];
            for (one, other) in old.iter().zip(new).zip(wanted).map(|((old, new), byte)| (*old == *byte, *new == *byte))
            {
                expect!(one || other, "request {index}: a byte of block {page:#x} arrived nowhere");
            }
            arrived[0] += usize::from(old == wanted);
            arrived[1] += usize::from(new == wanted);
            expect!(old == wanted || old.iter().zip(wanted).all(|(byte, wanted)| *byte == fill || byte == wanted));
            expect!(new == wanted || new.iter().zip(wanted).all(|(byte, wanted)| *byte == fill || byte == wanted));
        }
    }
    Ok(arrived)
}

fn refill(buffers: &Buffers, fill: u8) -> Result<(), Outcome> {
    let bytes = [fill; REQUEST as usize];
    for loan in &buffers.lent {
        loan.view().write(0, &bytes)?;
    }
    for own in &buffers.own {
        own.view().write(0, &bytes)?;
    }
    Ok(())
}

/// Swaps two spaces under a disk with a full queue: `apart` says whether they have buffers of their own.
fn swap_under_a_disk(bench: &crate::Bench, apart: bool, wanted: u32) -> Result<(), Outcome> {
    let disk = bench.disk()?;
    let device = disk.block().device().clone();
    let domain = disk.master().group().and_then(|group| group.domain()).ok_or(board::Error::Missing("domain"))?;
    let first = disk.block().geometry().sectors - 8192;
    let bytes = pattern(31, (REQUEST * DEPTH) as usize);
    let mut out = device.page_set(bytes.len() as u64, Ladder::DEFAULT)?;
    out.write_at(0, &bytes)?;
    let out = Arc::new(device.map::<dma::ToDevice, _>(out).map_err(|rejected| rejected.error)?);
    block_on(soon(), disk.block().write(first, &out, 0..bytes.len() as u64)?)??;
    drop(out);

    let mut buffers = Buffers { lent: Vec::new(), own: Vec::new() };
    for _ in 0..DEPTH {
        let pages = device.page_set(REQUEST, Ladder::SINGLE_PAGES)?;
        buffers.lent.push(Arc::new(device.map(pages).map_err(|rejected| rejected.error)?));
    }
    let spaces = [OwnedDomain::new("one", &device)?, OwnedDomain::new("two", &device)?];
    mirror(&device, &spaces[0], &domain, &[])?;
    if apart {
        let mut ranges = Vec::new();
        for loan in &buffers.lent {
            let pages = device.page_set(REQUEST, Ladder::SINGLE_PAGES)?;
            let own = spaces[1].map_owned(loan.iova(), pages).map_err(|rejected| rejected.error)?;
            ranges.push(own.range());
            buffers.own.push(own);
        }
        mirror(&device, &spaces[1], &domain, &ranges)?;
    } else {
        mirror(&device, &spaces[1], &domain, &[])?;
    }

    let since = bench.watch();
    let mut attachment: OwnedAttachment = spaces[0].attach(&device)?;
    let (mut swaps, mut arrived, mut rounds) = (0, [0; 2], 0_u32);
    while swaps < wanted {
        let fill = 0x80 | rounds as u8 & 0x7f;
        refill(&buffers, fill)?;
        swaps += read_while(&disk, first, &buffers, || {
            let other = usize::from(attachment.domain().name() == "one");
            Ok(attachment.swap(&spaces[other])?)
        })?;
        let came = judge(&buffers, &bytes, fill)?;
        arrived = [arrived[0] + came[0], arrived[1] + came[1]];
        rounds += 1;
        expect!(rounds < 4 * wanted, "the disk is faster than any swap");
    }
    expect!(!bench.has_faulted(disk.master().streams(), since));
    if apart {
        // Both were seen: otherwise nothing was shown.
        expect!(arrived[0] != 0 && arrived[1] != 0, "{arrived:?}");
    } else {
        expect_eq!(arrived[0], (u64::from(rounds) * DEPTH * REQUEST / 512) as usize);
    }
    attachment.detach()?;
    drop(spaces);
    drop(buffers);
    disk.stop()?;
    expect_eq!(dma::quarantine::report().pages, 0);
    Ok(())
}

ktest! {
    fn a_disk_at_work_sees_the_old_space_or_the_new_one(bench) {
        swap_under_a_disk(bench, true, SWAPS)
    }
}

ktest! {
    fn a_disk_at_work_does_not_notice_a_swap_for_a_space_with_the_same_pages(bench) {
        swap_under_a_disk(bench, false, SWAPS)
    }
}

fn placed(edu: &EduStray, space: &OwnedDomain, fill: u8) -> Result<Placed<Bidirectional, Pages>, Outcome> {
    let mut pages = edu.master().device().pages(PAGE_SIZE)?;
    pages.as_mut_slice().fill(fill);
    Ok(space.map_owned(AT, pages).map_err(|rejected| rejected.error)?)
}

/// With a swap that blocks in between, edu's transfers are lost or fault.
fn swap_under_edu(bench: &crate::Bench) -> Result<(), Outcome> {
    let edu = bench.edu()?;
    let device = edu.master().device();
    let spaces = [OwnedDomain::new("one", device)?, OwnedDomain::new("two", device)?];
    let pages = [placed(&edu, &spaces[0], 1)?, placed(&edu, &spaces[1], 2)?];
    let mut attachment = spaces[0].attach(device)?;
    let since = bench.watch();
    let mut swaps = 0;
    let mut rounds = 0;
    while rounds < 12 || swaps < SWAPS {
        let mut swap = || -> Result<(), Outcome> {
            let other = usize::from(attachment.domain().name() == "one");
            attachment.swap(&spaces[other])?;
            swaps += 1;
            Ok(())
        };
        // In: from either space, which hold different bytes. Out: to the second half of either.
        edu.edu().transfer_while(Direction::ToDevice, AT, 2048, soon(), &mut swap)?;
        edu.edu().transfer_while(Direction::FromDevice, Iova::new(AT.get() + 2048), 2048, soon(), &mut swap)?;
        let mut seen = [0; 2];
        for (number, page) in (0..).zip(&pages) {
            let mut half = [0; 2048];
            page.view().read(2048, &mut half)?;
            // Every byte is one that lies in one of the two, or what was there before.
            expect!(half.iter().all(|byte| matches!(byte, 1 | 2 | 0xee)), "page {number}");
            seen[number] = half.iter().filter(|byte| **byte != 0xee).count();
            page.view().write(2048, &[0xee; 2048])?;
        }
        expect_eq!(if rounds == 0 { 2048 } else { seen[0] + seen[1] }, 2048);
        rounds += 1;
        expect!(rounds < 200);
    }
    expect!(!bench.has_faulted(edu.master().streams(), since));
    attachment.detach()?;
    drop(pages);
    edu.stop()?;
    Ok(())
}

ktest! {
    fn edu_at_work_sees_the_old_space_or_the_new_one(bench) {
        swap_under_edu(bench)
    }
}

/// The same, with a virtio-iommu: an attachment in place of another is one request.
mod on_a_virtio_iommu {
    use super::{SWAPS_BY_REQUEST, swap_under_a_disk, swap_under_edu};
    use ktest::ktest;

    ktest! {
        fn a_disk_at_work_sees_the_old_space_or_the_new_one(bench) {
            swap_under_a_disk(bench, true, SWAPS_BY_REQUEST)
        }
        machine: viommu
    }

    ktest! {
        fn edu_at_work_sees_the_old_space_or_the_new_one(bench) {
            swap_under_edu(bench)
        }
        machine: viommu
    }
}

ktest! {
    fn an_address_that_a_driver_insists_on_is_its_own(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let pages = device.pages(PAGE_SIZE)?;
        let fixed = device.map_at::<dma::FromDevice, _>(Iova::new(0x2000), pages).map_err(|rejected| rejected.error)?;
        let mut others = Vec::new();
        for _ in 0..16 {
            let other = device.map::<dma::FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
            expect!(other.iova() != fixed.iova());
            others.push(other);
        }
        edu.edu().dma_from_device(fixed.iova(), 64, testdev::edu::Completion::Interrupt, soon())?;
        drop(others);
        fixed.unmap()?;
        edu.stop()?;
        Ok(())
    }
}
