//! Addresses of a device that firmware goes on using: `iommu-addresses` in reserved memory, named for the edu in slot 1.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::vec::Vec;
use board::EduStray;
use dma::{Bidirectional, Error, FromDevice, Mapped, OwnedDomain, Pages};
use iommu::domain::ReservedKind;
use iommu::{Access, FaultReason, Iova, IovaError, IovaRange, PAGE_SIZE, PhysAddr, PhysRange, Prot};
use ktest::{Outcome, expect, expect_eq, ktest};
use testdev::edu::Completion;

/// Firmware's memory, and its addresses for the device.
const SHARED: u64 = 0x5000_0000;
const SHARED_LEN: u64 = 0x4000;
/// Addresses of the device that lead nowhere, and which are to be left alone.
const HIDDEN: u64 = 0x20_4000;
const HIDDEN_LEN: u64 = 0x8000;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap_or_default()
}

fn edus(bench: &Bench) -> Result<[EduStray; 2], Outcome> {
    let edus = [EduStray::start(bench.edu_master(0)?)?, EduStray::start(bench.edu_master(1)?)?];
    expect_eq!((edus[0].master().function().bdf().device(), edus[1].master().function().bdf().device()), (1, 8));
    Ok(edus)
}

fn lent(edu: &EduStray, seed: u32) -> Result<Mapped<Bidirectional, Pages>, Outcome> {
    let mut pages = edu.master().device().pages(PAGE_SIZE)?;
    pages.as_mut_slice()[..64].copy_from_slice(&pattern(seed, 64));
    Ok(edu.master().device().map(pages).map_err(|rejected| rejected.error)?)
}

/// Has `edu` read 64 bytes at `from` and write them at `to`.
fn copy(edu: &EduStray, from: Iova, to: Iova) -> Result<(), Outcome> {
    edu.edu().dma_to_device(from, 64, Completion::Interrupt, soon())?;
    edu.edu().dma_from_device(to, 64, Completion::Interrupt, soon())?;
    Ok(())
}

ktest! {
    fn what_firmware_has_given_a_device_stays_mapped_one_to_one_for_it_and_for_nobody_else(bench) {
        let [mine, other] = edus(bench)?;
        let since = bench.watch();
        // The first and the last bytes of the region, there and back.
        for (seed, at) in [(41, SHARED), (42, SHARED + SHARED_LEN - 64)] {
            let (source, target) = (lent(&mine, seed)?, lent(&mine, 0)?);
            copy(&mine, source.iova(), Iova::new(at))?;
            copy(&mine, source.iova(), target.iova())?;
            copy(&mine, Iova::new(at), target.iova())?;
            expect!(target.unmap()?.as_slice()[..64] == pattern(seed, 64));
            source.unmap()?;
        }
        expect!(!bench.has_faulted(mine.master().streams(), since));

        // It is that very memory: another device finds the bytes there by their physical address, once it is let in.
        let space = OwnedDomain::new("look", other.master().device())?;
        let run = PhysRange::new(PhysAddr::new(SHARED), SHARED_LEN).unwrap_or_default();
        // SAFETY: reserved memory, which memory management gives to nobody; only edus are told of it here.
        unsafe { space.map_raw(range(0x8000_0000, SHARED_LEN), &[run], Prot::READ) }?;
        let target = space
            .map_owned::<FromDevice, _>(Iova::new(0x9000_0000), other.master().device().pages(PAGE_SIZE)?)
            .map_err(|rejected| rejected.error)?;
        let attachment = space.attach(other.master().device())?;
        for (seed, at) in [(41, 0), (42, SHARED_LEN - 64)] {
            other.edu().dma_to_device(Iova::new(0x8000_0000 + at), 64, Completion::Polling, soon())?;
            other.edu().dma_from_device(target.range().start(), 64, Completion::Polling, soon())?;
            let mut seen = [0; 64];
            target.view().read(0, &mut seen)?;
            expect!(seen[..] == pattern(seed, 64)[..]);
        }
        attachment.detach()?;
        drop((target, space));

        // In its own address space it does not reach it, nor does the first one reach what lies around the region.
        let source = lent(&other, 43)?;
        let outside = [(&mine, SHARED - 4), (&mine, SHARED + SHARED_LEN), (&other, SHARED), (&other, SHARED + SHARED_LEN - 4)];
        for (edu, at) in outside {
            for access in [Access::Read, Access::Write] {
                let since = bench.watch();
                match access {
                    Access::Read => edu.edu().dma_to_device(Iova::new(at), 4, Completion::Interrupt, soon())?,
                    Access::Write => edu.edu().dma_from_device(Iova::new(at), 4, Completion::Interrupt, soon())?,
                }
                let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
                expect_eq!((noted.fault.iova, noted.fault.access), (Some(Iova::new(at)), Some(access)));
                expect_eq!(noted.fault.reason, FaultReason::NotMapped);
            }
        }
        source.unmap()?;
        // And none of it has changed what firmware has there.
        let target = lent(&mine, 0)?;
        copy(&mine, Iova::new(SHARED), target.iova())?;
        expect!(target.unmap()?.as_slice()[..64] == pattern(41, 64));
        mine.stop()?;
        other.stop()?;
        Ok(())
    }
    machine: firmware
}

ktest! {
    fn the_dma_api_never_gives_out_what_firmware_uses(bench) {
        let [mine, other] = edus(bench)?;
        let domain = mine.master().group().and_then(|group| group.domain()).ok_or(board::Error::Missing("domain"))?;
        for firmwares in [range(SHARED, SHARED_LEN), range(HIDDEN, HIDDEN_LEN)] {
            expect!(domain.reserved().any(|region| region.kind == ReservedKind::Firmware && region.range == firmwares));
        }
        expect!(domain.space().translate(Iova::new(HIDDEN)).is_none());
        // The same requests of a device that firmware does not use lead there.
        let mut met = [0; 2];
        for (edu, met) in [&mine, &other].into_iter().zip(&mut met) {
            let (device, mut loans) = (edu.master().device(), Vec::new());
            for _ in 0..24 {
                let loan = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
                let given = range(loan.iova().get(), PAGE_SIZE);
                *met += u32::from(given.overlaps(range(HIDDEN, HIDDEN_LEN)) || given.overlaps(range(SHARED, SHARED_LEN)));
                loans.push(loan);
            }
        }
        expect!(met[0] == 0 && met[1] != 0, "{met:?}");
        let device = mine.master().device();
        // Nor are they to be had by asking for them; another device has the same addresses to itself.
        for at in [HIDDEN, HIDDEN + HIDDEN_LEN - PAGE_SIZE, SHARED, SHARED + SHARED_LEN - PAGE_SIZE] {
            let refused = device.map_at::<FromDevice, _>(Iova::new(at), device.pages(PAGE_SIZE)?);
            expect!(matches!(refused, Err(rejected) if matches!(rejected.error, Error::Iova(IovaError::InUse(_)))), "{at:#x}");
            let theirs = other.master().device();
            let given = theirs.map_at::<FromDevice, _>(Iova::new(at), theirs.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
            given.unmap()?;
        }
        mine.stop()?;
        other.stop()?;
        Ok(())
    }
    machine: firmware
}
