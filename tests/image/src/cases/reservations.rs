//! Reserved addresses, with memory linked into them: a device reaches what is linked, where it is linked, while it is.

use super::pattern;
use crate::bench::{Bench, soon};
use board::EduStray;
use dma::{Error, FromDevice, Placement, ToDevice};
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
    expect_eq!(noted.fault.access, Some(Access::Write));
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
