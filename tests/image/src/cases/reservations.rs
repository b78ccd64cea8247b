//! Reserved addresses, with memory linked into them: a device reaches what is linked, where it is linked, while it is.

use super::pattern;
use crate::bench::{Bench, soon};
use board::EduStray;
use dma::{Bidirectional, Carved, Ending, Error, FromDevice, Part, Placement, Stages, ToDevice, end_together};
use iommu::domain::ReservedKind;
use iommu::{Access, FaultReason, Iova, IovaError};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

/// The address that the tests insist on.
const AT: Iova = Iova::new(0x5234_5000);

fn at(offset: u64) -> Iova {
    Iova::new(AT.get() + offset)
}

fn strays(bench: &Bench, edu: &EduStray, at: Iova) -> Result<(), Outcome> {
    let since = bench.watch();
    edu.edu().dma_from_device(at, 64, Completion::Interrupt, soon())?;
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    // A virtio-iommu need not say which way it was.
    expect!(noted.fault.access != Some(Access::Read), "{:?}", noted.fault);
    expect_eq!(noted.fault.iova, Some(at));
    expect!(matches!(noted.fault.reason, FaultReason::NotMapped | FaultReason::Permission));
    Ok(())
}

ktest! {
    fn memory_is_linked_at_a_chosen_address_and_unlinked(bench) {
        let edu = bench.edu()?;
        let device = edu.master().device();
        let reservation = device.reserve(8 * 4096, Placement::At(AT))?;
        expect_eq!(reservation.iova(), AT);
        let domain = edu.master().group().and_then(|group| group.domain());
        let window = domain.and_then(|domain| domain.reserved().find(|region| region.kind == ReservedKind::PciWindow));
        let Some(window) = window else { return Err(Outcome::failed(format_args!("no window of a host bridge is reserved"))) };
        let kept = device.reserve(4096, Placement::At(window.range.start()));
        expect!(matches!(kept, Err(Error::Iova(IovaError::InUse(_)))), "{kept:?}");
        strays(bench, &edu, AT)?;
        let bytes = pattern(41, 64);
        let mut source = device.pages(4096)?;
        source.as_mut_slice()[..64].copy_from_slice(&bytes);
        let source = reservation.link::<ToDevice, _>(0, source).map_err(|rejected| rejected.error)?;
        let target = reservation.link::<FromDevice, _>(6 * 4096, device.pages(2 * 4096)?).map_err(|rejected| rejected.error)?;
        // Nobody else gets a part of it, linked or not.
        let mine = device.map_at::<ToDevice, _>(at(2 * 4096), device.pages(4096)?);
        expect!(matches!(mine.map_err(|rejected| rejected.error), Err(Error::Iova(_))));
        let since = bench.watch();
        edu.edu().dma_to_device(AT, 64, Completion::Interrupt, soon())?;
        // Across its two pages.
        edu.edu().dma_from_device(at(7 * 4096 - 32), 64, Completion::Interrupt, soon())?;
        expect!(!bench.has_faulted(edu.master().streams(), since));
        // What lies between is reserved, and nothing more; what the device reads it does not write.
        strays(bench, &edu, at(3 * 4096))?;
        strays(bench, &edu, AT)?;
        let pages = target.unlink()?;
        expect!(pages.as_slice()[4096 - 32..][..64] == bytes[..]);
        strays(bench, &edu, at(6 * 4096))?;
        expect!(source.unlink()?.as_slice()[..64] == bytes[..]);
        expect!(reservation.release().is_ok());
        let again = device.map_at::<ToDevice, _>(AT, device.pages(8 * 4096)?).map_err(|rejected| rejected.error)?;
        again.unmap()?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// Links of several kinds with one sync, one of them of another device's registers; then a page out of the middle of one, while the
    /// rest stays.
    fn links_are_made_together_and_unlinked_in_parts(bench) {
        links_in_parts(bench)
    }
}

ktest! {
    /// As above, where mappings are requests to a device.
    fn links_are_made_together_and_unlinked_in_parts_by_a_virtio_iommu(bench) {
        links_in_parts(bench)
    }
    machine: viommu
}

fn links_in_parts(bench: &Bench) -> Result<(), Outcome> {
    let edu = bench.edu()?;
    let disk = bench.disk_master()?;
    let device = edu.master().device();
    let reservation = device.reserve(16 * 4096, Placement::At(AT))?;
    let bytes = pattern(43, 64);
    let mut source = device.pages(4096)?;
    source.as_mut_slice()[..64].copy_from_slice(&bytes);
    let registers = disk.peer_range(4)?;
    let mut source = reservation.stage::<ToDevice, _>(0, source).map_err(|rejected| rejected.error)?;
    let whole = Part::of(device.pages(5 * 4096)?).map_err(|rejected| rejected.error)?;
    let mut target = reservation.stage::<FromDevice, _>(2 * 4096, whole).map_err(|rejected| rejected.error)?;
    let mut peer = reservation.stage::<Bidirectional, _>(8 * 4096, registers).map_err(|rejected| rejected.error)?;
    strays(bench, &edu, AT)?;
    strays(bench, &edu, at(3 * 4096))?;
    reservation.sync::<&mut dyn Stages>(&mut [&mut source, &mut target, &mut peer])?;
    let not_linked = |_| Outcome::failed(format_args!("not linked"));
    let (source, target) = (source.linked().map_err(|_| not_linked(()))?, target.linked().map_err(|_| not_linked(()))?);
    let peer = peer.linked().map_err(|_| not_linked(()))?;
    let since = bench.watch();
    let to = |page: u64| edu.edu().dma_from_device(at(page * 4096 + 100), 64, Completion::Interrupt, soon());
    edu.edu().dma_to_device(source.iova(), 64, Completion::Interrupt, soon())?;
    (2..7).try_for_each(to)?;
    // What edu writes to the disk's first register is found there.
    let register = disk.function().bar_part(4, 0, 4)?;
    register.write32(0, 0);
    expect_eq!(register.read32(0), 0);
    edu.edu().dma_from_device(peer.iova(), 4, Completion::Interrupt, soon())?;
    expect_eq!(register.read32(0), u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    expect!(!bench.has_faulted(edu.master().streams(), since));

    let Carved { before: Some(before), part, after: Some(after) } =
        target.carve(2 * 4096, 4096).map_err(|rejected| rejected.error)?
    else {
        return Err(Outcome::failed(format_args!("a part has no neighbours")));
    };
    let page = part.unlink()?;
    expect!(page.chunks().next().is_some_and(|chunk| chunk.len() == 4096 && chunk[100..164] == bytes[..]));
    strays(bench, &edu, at(4 * 4096))?;
    let since = bench.watch();
    edu.edu().dma_to_device(source.iova(), 64, Completion::Interrupt, soon())?;
    [2, 3, 5, 6].into_iter().try_for_each(to)?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    // The others with one completion.
    let (mut before, mut after, mut peer) = (Ending::new(before), Ending::new(after), Ending::new(peer));
    end_together(&mut [&mut before, &mut after, &mut peer]);
    for page in [2, 3, 5, 6, 8] {
        strays(bench, &edu, at(page * 4096))?;
    }
    drop((before.take()?, page, peer.take()?));
    let whole = after.take()?.into_whole().map_err(|_| Outcome::failed(format_args!("a part is still somewhere")))?;
    expect!(whole.as_slice().chunks(4096).all(|page| page[100..164] == bytes[..]));
    drop(source);
    expect!(reservation.release().is_ok());
    expect_eq!(device.stats().quarantined_pages, 0);
    disk.arrest()?;
    Ok(edu.stop()?)
}
