//! What every IOMMU must do, whatever it is: the same cases on an SMMUv3 and on a virtio-iommu.
//!
//! A virtio-iommu does not say of an unmapped address whether it was read or written; everything else must be exact on both.

use super::pattern;
use crate::Bench;
use crate::bench::soon;
use alloc::sync::Arc;
use base::Instant;
use board::EduStray;
use dma::{Error, FromDevice, Mapped, Pages, ToDevice};
use iommu::domain::{Domain, DomainKind};
use iommu::{Access, FaultReason, Iova, IovaRange, PAGE_SIZE, Prot};
use kernel::faults::Noted;
use ktest::{Outcome, TestResult, expect, expect_eq};
use testdev::edu::Completion;

/// Registers each case for both machines.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_an_smmuv3 {
            $(ktest::ktest! { fn $name(bench) { super::$name(bench) } })*
        }
        mod on_a_virtio_iommu {
            $(ktest::ktest! { fn $name(bench) { super::$name(bench) } machine: viommu })*
        }
    };
}

on_both!(
    a_device_reaches_what_it_was_lent_and_only_as_long,
    memory_at_its_physical_address_is_not_reached,
    what_was_lent_to_be_read_cannot_be_written,
    a_blocked_device_reaches_nothing,
    an_owned_domain_replaces_the_default_one_and_owned_domains_each_other,
    the_disk_reads_while_pages_are_mapped_and_revoked,
);

fn group(edu: &EduStray) -> Result<Arc<iommu::group::Group>, Outcome> {
    Ok(edu.master().group().cloned().ok_or(board::Error::Missing("group"))?)
}

fn lent(edu: &EduStray, pages: Pages) -> Result<Mapped<FromDevice, Pages>, Outcome> {
    Ok(edu.master().device().map(pages).map_err(|rejected| rejected.error)?)
}

/// Fills edu's buffer with `seed`'s pattern.
fn load(edu: &EduStray, seed: u32, len: u32) -> Result<(), Outcome> {
    let mut pages = edu.master().device().pages(PAGE_SIZE)?;
    let bytes = pattern(seed, len as usize);
    pages.as_mut_slice()[..bytes.len()].copy_from_slice(&bytes);
    let source: Mapped<ToDevice, Pages> = edu.master().device().map(pages).map_err(|rejected| rejected.error)?;
    edu.edu().dma_to_device(source.iova(), len, Completion::Polling, soon())?;
    source.unmap()?;
    Ok(())
}

/// Has edu write its buffer.
fn store(edu: &EduStray, target: Iova, len: u32) -> Result<(), Outcome> {
    Ok(edu.edu().dma_from_device(target, len, Completion::Polling, soon())?)
}

/// The first fault of edu since `since`, which must be a stopped write of this kind.
fn stopped(bench: &Bench, edu: &EduStray, since: Instant, reason: FaultReason, at: Iova) -> Result<Noted, Outcome> {
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    expect!(noted.fault.access != Some(Access::Read));
    expect_eq!(noted.fault.reason, reason);
    expect_eq!(noted.fault.iova, Some(at));
    expect!(edu.master().streams().contains(&noted.fault.stream));
    Ok(noted)
}

fn a_device_reaches_what_it_was_lent_and_only_as_long(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    let since = bench.watch();
    load(&edu, 1, 64)?;
    let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
    let iova = target.iova();
    store(&edu, iova, 64)?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    let mut pages = target.unmap()?;
    expect!(pages.as_slice()[..64] == pattern(1, 64));
    pages.as_mut_slice().fill(0);
    let since = bench.watch();
    store(&edu, iova, 64)?;
    expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
    stopped(bench, &edu, since, FaultReason::NotMapped, iova)?;
    edu.stop()?;
    Ok(())
}

fn memory_at_its_physical_address_is_not_reached(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    load(&edu, 3, 64)?;
    let pages = edu.master().device().pages(PAGE_SIZE)?;
    let phys = Iova::new(pages.phys_runs()[0].start().get());
    let since = bench.watch();
    store(&edu, phys, 64)?;
    expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
    stopped(bench, &edu, since, FaultReason::NotMapped, phys)?;
    edu.stop()?;
    Ok(())
}

fn what_was_lent_to_be_read_cannot_be_written(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    load(&edu, 5, 64)?;
    let pages = edu.master().device().pages(PAGE_SIZE)?;
    let target: Mapped<ToDevice, Pages> = edu.master().device().map(pages).map_err(|rejected| rejected.error)?;
    let since = bench.watch();
    store(&edu, target.iova(), 64)?;
    let noted = stopped(bench, &edu, since, FaultReason::Permission, target.iova())?;
    expect_eq!(noted.fault.access, Some(Access::Write));
    let pages = target.unmap()?;
    expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
    edu.stop()?;
    Ok(())
}

fn a_blocked_device_reaches_nothing(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    load(&edu, 7, 64)?;
    let target = lent(&edu, edu.master().device().pages(PAGE_SIZE)?)?;
    let phys = target.iova();
    group(&edu)?.block()?;
    let since = bench.watch();
    store(&edu, phys, 64)?;
    let pages = target.unmap()?;
    expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0));
    if bench.hardware.smmus().is_empty() {
        // An aborting STE makes no record; a virtio-iommu makes one.
        stopped(bench, &edu, since, FaultReason::Blocked, phys)?;
    }
    let refused = edu.master().device().map::<FromDevice, _>(edu.master().device().pages(PAGE_SIZE)?);
    expect!(matches!(refused, Err(rejected) if matches!(rejected.error, Error::NotAttached { .. })));
    edu.stop()?;
    Ok(())
}

/// Three address spaces, the same address in each, another page behind it: the device writes to the one that is attached, and
/// never to none.
fn an_owned_domain_replaces_the_default_one_and_owned_domains_each_other(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    let device = edu.master().device();
    let group = group(&edu)?;
    let target = lent(&edu, device.pages(PAGE_SIZE)?)?;
    let iova = IovaRange::new(target.iova(), PAGE_SIZE).unwrap_or_default();
    load(&edu, 9, 64)?;
    let (mut domains, mut behind) = (alloc::vec::Vec::new(), alloc::vec::Vec::new());
    for _ in 0..2 {
        let pages = device.pages(PAGE_SIZE)?;
        let space = group.iommu().create()?;
        // SAFETY: `behind` keeps the page until its range has been revoked, and it is read only after that.
        unsafe { space.map(iova, pages.phys_runs(), Prot::READ | Prot::WRITE) }?;
        let window = space.aperture().range;
        domains.push(Arc::new(Domain::new(DomainKind::Owned, space, window)?));
        behind.push(pages);
    }
    let since = bench.watch();
    store(&edu, iova.start(), 16)?;
    group.attach_owned(domains[0].clone())?;
    let refused = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?);
    expect!(matches!(refused, Err(rejected) if matches!(rejected.error, Error::OwnedDomain(_))));
    for round in 0..6 {
        let (from, to) = (&domains[round % 2], &domains[(round + 1) % 2]);
        store(&edu, Iova::new(iova.start().get() + 64 * (round as u64 + 1)), 16)?;
        group.swap_owned(from, to.clone())?;
    }
    group.detach_owned()?;
    store(&edu, Iova::new(iova.start().get() + 1024), 16)?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    for domain in &domains {
        domain.space().revoke(&[iova])?;
    }
    let default = target.unmap()?;
    let expected = pattern(9, 16);
    for (index, pages) in [&default, &behind[0], &behind[1]].into_iter().enumerate() {
        for slot in (0..PAGE_SIZE as usize).step_by(64) {
            let mine = match slot / 64 {
                0 | 16 => index == 0,
                round @ 1..=6 => index == 1 + (round + 1) % 2,
                _ => false,
            };
            let bytes = &pages.as_slice()[slot..slot + 16];
            expect!(
                if mine { bytes == expected } else { bytes.iter().all(|byte| *byte == 0) },
                "page {index}, {slot:#x}"
            );
        }
    }
    edu.stop()?;
    Ok(())
}

fn the_disk_reads_while_pages_are_mapped_and_revoked(bench: &Bench) -> TestResult {
    let disk = bench.disk()?;
    let since = bench.watch();
    let device = disk.master().device();
    let mut first = None;
    for round in 0..32_u64 {
        let set = device.page_set(8 << 12, dma::Ladder::SINGLE_PAGES)?;
        let loan = Arc::new(device.map::<FromDevice, _>(set).map_err(|rejected| rejected.error)?);
        let mut transfer = disk.block().read(0, &loan, 0..8 << 12)?;
        // Something else comes and goes in the same address space meanwhile.
        let other = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
        transfer.wait(soon())?;
        other.unmap()?;
        drop(transfer);
        let Ok(loan) = Arc::try_unwrap(loan) else {
            return Err(Outcome::failed(format_args!("still lent in {round}")));
        };
        let mut bytes = alloc::vec![0; 8 << 12];
        loan.unmap()?.read_at(0, &mut bytes)?;
        expect!(bytes.iter().any(|byte| *byte != 0));
        expect!(*first.get_or_insert_with(|| bytes.clone()) == bytes, "round {round} read something else");
    }
    expect!(!bench.has_faulted(disk.master().streams(), since));
    disk.stop()?;
    Ok(())
}
