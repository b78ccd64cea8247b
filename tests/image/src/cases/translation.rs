//! Kinds of address spaces, on the SMMU that this machine has: granules, stages, stage 1 over stage 2, and one space behind
//! two SMMUs. What a space cannot be here is skipped by name.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::sync::Arc;
use base::Instant;
use board::EduStray;
use dma::{PageRequest, Pages};
use iommu::contract::AddressSpace;
use iommu::domain::{Domain, DomainKind};
use iommu::pgtable::Granule;
use iommu::{Access, AttachError, FaultReason, Iova, IovaRange, PhysAddr, PhysRange, Prot};
use ktest::{Outcome, expect, expect_eq, ktest};
use smmuv3::{Request, Translation};
use testdev::edu::Completion;

const RW: Prot = Prot::READ.union(Prot::WRITE);
/// Where tests map, in the device's address space.
const AT: u64 = 0x8000_0000;

fn range(start: u64, len: u64) -> Result<IovaRange, Outcome> {
    IovaRange::new(Iova::new(start), len).ok_or_else(|| board::Error::Missing("range").into())
}

/// Makes a space of the first SMMU, or skips the test.
fn asked(bench: &Bench, request: &Request) -> Result<Arc<dyn AddressSpace>, Outcome> {
    let smmu = bench.hardware.smmus().first().ok_or(board::Error::Missing("SMMU"))?;
    match smmu.create_with(request) {
        Err(AttachError::Unsupported(what)) => Err(Outcome::skipped(format_args!("this SMMU has not {what}"))),
        made => Ok(made?),
    }
}

/// Memory for the device, aligned for every page size.
fn buffer(edu: &EduStray, bytes: u64) -> Result<Pages, Outcome> {
    let request = PageRequest { align: 1 << 16, ..PageRequest::anywhere(bytes) };
    Ok(Pages::allocate(edu.master().device().memory(), request)?)
}

fn give(edu: &EduStray, space: &Arc<dyn AddressSpace>) -> Result<(), Outcome> {
    let group = edu.master().group().ok_or(board::Error::Missing("group"))?;
    let window = space.aperture().range;
    Ok(group.attach_owned(Arc::new(Domain::new(DomainKind::Owned, space.clone(), window)?))?)
}

fn take_back(edu: EduStray) -> Result<(), Outcome> {
    edu.master().group().ok_or(board::Error::Missing("group"))?.detach_owned()?;
    Ok(edu.stop()?)
}

/// Has the device read 64 bytes at `from` and write them at `to`.
fn copy(edu: &EduStray, from: u64, to: u64) -> Result<(), Outcome> {
    // Its messages are not mapped in a space of the test's own: polled.
    edu.edu().dma_to_device(Iova::new(from), 64, Completion::Polling, soon())?;
    edu.edu().dma_from_device(Iova::new(to), 64, Completion::Polling, soon())?;
    Ok(())
}

fn stopped(bench: &Bench, edu: &EduStray, since: Instant, access: Access, at: u64) -> Result<(), Outcome> {
    let noted = bench.fault(edu.master().streams(), since).ok_or(board::Error::Missing("fault record"))?;
    expect_eq!(noted.fault.access, Some(access));
    expect_eq!(noted.fault.reason, FaultReason::NotMapped);
    expect_eq!(noted.fault.iova, Some(Iova::new(at)));
    Ok(())
}

/// Maps two pages of the space's size, sees the device reach both, takes the second away, and sees it stopped there and nowhere
/// else.
fn lends_and_takes(bench: &Bench, edu: &EduStray, space: &Arc<dyn AddressSpace>) -> Result<(), Outcome> {
    let page = space.aperture().page_size();
    let mut pages = buffer(edu, 2 * page)?;
    let run = pages.phys_runs()[0];
    let bytes = pattern(11, 64);
    pages.as_mut_slice()[..64].copy_from_slice(&bytes);
    // SAFETY: the pages are touched by nobody while they are mapped but the device, and read volatile; they are revoked below,
    // or kept for ever if that fails.
    unsafe { space.map(range(AT, 2 * page)?, &[run], RW) }?;
    let pages = core::mem::ManuallyDrop::new(pages);
    let since = bench.watch();
    copy(edu, AT, AT + page + 128)?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    space.revoke(&[range(AT + page, page)?])?;
    let seen = core::hint::black_box(pages.as_slice());
    let second = usize::try_from(page).unwrap_or(usize::MAX);
    expect!(seen[second + 128..][..64] == bytes);
    let since = bench.watch();
    copy(edu, AT, AT + page + 256)?;
    stopped(bench, edu, since, Access::Write, AT + page + 256)?;
    let since = bench.watch();
    copy(edu, AT, AT + 512)?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    space.revoke(&[range(AT, page)?])?;
    let seen = core::hint::black_box(pages.as_slice());
    expect!(seen[second + 256..][..64].iter().all(|byte| *byte == 0));
    expect!(seen[512..][..64] == bytes);
    drop(core::mem::ManuallyDrop::into_inner(pages));
    Ok(())
}

fn lends_and_takes_with(bench: &Bench, request: &Request) -> Result<(), Outcome> {
    let edu = bench.edu()?;
    let space = asked(bench, request)?;
    if let Some(granule) = request.granule {
        expect_eq!(space.aperture().page_size(), granule.size());
    }
    give(&edu, &space)?;
    lends_and_takes(bench, &edu, &space)?;
    take_back(edu)
}

ktest! {
    fn a_granule_of_4k_lends_faults_and_takes_back(bench) {
        lends_and_takes_with(bench, &Request { granule: Some(Granule::K4), ..Request::default() })
    }
}

ktest! {
    fn a_granule_of_16k_lends_faults_and_takes_back(bench) {
        lends_and_takes_with(bench, &Request { granule: Some(Granule::K16), ..Request::default() })
    }
}

ktest! {
    fn a_granule_of_64k_lends_faults_and_takes_back(bench) {
        lends_and_takes_with(bench, &Request { granule: Some(Granule::K64), ..Request::default() })
    }
}

ktest! {
    fn stage_2_of_every_granule_lends_faults_and_takes_back(bench) {
        for granule in [Granule::K4, Granule::K16, Granule::K64] {
            let granule = Some(granule);
            lends_and_takes_with(bench, &Request { translation: Translation::Stage2, granule, ..Request::default() })?;
        }
        Ok(())
    }
}

/// A stage 2 in which all of memory stands at its own address, for reading: what a walker of stage 1 needs.
fn parent(bench: &Bench) -> Result<Arc<dyn AddressSpace>, Outcome> {
    let parent = asked(bench, &Request { translation: Translation::Stage2, ..Request::default() })?;
    let page = parent.aperture().page_size();
    for bank in &bench.boot.machine.memory {
        let start = bank.start().get() & !(page - 1);
        let len = (bank.end().get() - start) & !(page - 1);
        let run = PhysRange::new(PhysAddr::new(start), len).ok_or(board::Error::Missing("memory bank"))?;
        // SAFETY: no stream is attached to the parent itself, and a space on top of it translates to this memory only where a
        // test maps it there.
        unsafe { parent.map(range(start, len)?, &[run], RW) }?;
    }
    Ok(parent)
}

ktest! {
    fn stage_1_over_stage_2_lends_faults_and_takes_back(bench) {
        let edu = bench.edu()?;
        let parent = parent(bench)?;
        let space = asked(bench, &Request { translation: Translation::Nested(parent), ..Request::default() })?;
        give(&edu, &space)?;
        lends_and_takes(bench, &edu, &space)?;
        take_back(edu)
    }
}

ktest! {
    /// Without NH_ALL behind S2_IPA the device still reaches the page: both stages are cached as one.
    fn what_the_stage_2_below_takes_back_is_out_of_reach_although_stage_1_still_has_it(bench) {
        let edu = bench.edu()?;
        let parent = parent(bench)?;
        let space = asked(bench, &Request { translation: Translation::Nested(parent.clone()), ..Request::default() })?;
        give(&edu, &space)?;
        let page = space.aperture().page_size();
        // An intermediate address where no memory is, so that stage 2 alone decides what is behind it.
        let intermediate = 0x20_0000_0000;
        let mut pages = buffer(&edu, page)?;
        let bytes = pattern(12, 64);
        pages.as_mut_slice()[..64].copy_from_slice(&bytes);
        let run = pages.phys_runs()[0];
        let half = PhysRange::new(run.start(), page).ok_or(board::Error::Missing("page"))?;
        let between = PhysRange::new(PhysAddr::new(intermediate), page).ok_or(board::Error::Missing("page"))?;
        // SAFETY: as in `lends_and_takes`.
        unsafe { parent.map(range(intermediate, page)?, &[half], RW) }?;
        // SAFETY: what is behind the intermediate address was just lent.
        unsafe { space.map(range(AT, page)?, &[between], RW) }?;
        let pages = core::mem::ManuallyDrop::new(pages);
        let since = bench.watch();
        copy(&edu, AT, AT + 128)?;
        expect!(!bench.has_faulted(edu.master().streams(), since));
        parent.revoke(&[range(intermediate, page)?])?;
        expect!(core::hint::black_box(pages.as_slice())[128..][..64] == bytes);
        let since = bench.watch();
        edu.edu().dma_from_device(Iova::new(AT + 256), 64, Completion::Polling, soon())?;
        stopped(bench, &edu, since, Access::Write, AT + 256)?;
        expect!(core::hint::black_box(pages.as_slice())[256..][..64].iter().all(|byte| *byte == 0));
        space.revoke(&[range(AT, page)?])?;
        drop(core::mem::ManuallyDrop::into_inner(pages));
        take_back(edu)
    }
}

ktest! {
    fn what_this_smmu_lacks_is_refused_by_name(bench) {
        let edu = bench.edu()?;
        let smmu = bench.hardware.smmus().first().ok_or(board::Error::Missing("SMMU"))?;
        let stream = *edu.master().streams().first().ok_or(board::Error::Missing("stream"))?;
        if smmu.features().substream_id_bits == 0 {
            let refused = smmu.attach_substream(stream, 1, &smmu.create_with(&Request::default())?);
            expect_eq!(refused, Err(AttachError::Unsupported("substreams")));
        }
        if !smmu.features().ats {
            expect_eq!(smmu.enable_ats(stream), Err(AttachError::Unsupported("ATS")));
        }
        let wide = smmu.create_with(&Request { input_bits: Some(52), ..Request::default() });
        expect!(matches!(wide, Err(AttachError::Unsupported(_))));
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_space_behind_two_smmus_is_shared_and_revoked_from_both(bench) {
        if bench.hardware.smmus().len() < 2 {
            ktest::skip!("this machine has one SMMU");
        }
        let edus = [EduStray::start(bench.edu_master(0)?)?, EduStray::start(bench.edu_master(1)?)?];
        let names = [&edus[0], &edus[1]].map(|edu| edu.master().group().map(|group| alloc::string::String::from(group.iommu().name())));
        expect!(names[0] != names[1] && names[0].is_some() && names[1].is_some(), "{names:?}");
        let space = smmuv3::Fleet::new(bench.hardware.smmus().iter().cloned()).create(&Request::default())?;
        let page = space.aperture().page_size();
        let mut pages = buffer(&edus[0], 2 * page)?;
        let bytes = pattern(13, 64);
        pages.as_mut_slice()[..64].copy_from_slice(&bytes);
        let run = pages.phys_runs()[0];
        for edu in &edus {
            give(edu, &space)?;
        }
        // SAFETY: as in `lends_and_takes`.
        unsafe { space.map(range(AT, 2 * page)?, &[run], RW) }?;
        let pages = core::mem::ManuallyDrop::new(pages);
        let second = usize::try_from(page).unwrap_or(usize::MAX);
        // Each reads what the other wrote: first from memory to the second page, then from there on.
        let since = bench.watch();
        copy(&edus[0], AT, AT + page)?;
        copy(&edus[1], AT + page, AT + page + 64)?;
        copy(&edus[0], AT + page + 64, AT + page + 128)?;
        expect!(core::hint::black_box(pages.as_slice())[second + 128..][..64] == bytes);
        for edu in &edus {
            expect!(!bench.has_faulted(edu.master().streams(), since));
        }
        space.revoke(&[range(AT + page, page)?])?;
        for (edu, place) in edus.iter().zip([256, 512]) {
            let since = bench.watch();
            copy(edu, AT, AT + page + place)?;
            stopped(bench, edu, since, Access::Write, AT + page + place)?;
        }
        space.revoke(&[range(AT, page)?])?;
        let seen = core::hint::black_box(pages.as_slice());
        expect!(seen[second + 192..].iter().all(|byte| *byte == 0));
        drop(core::mem::ManuallyDrop::into_inner(pages));
        // A space of one SMMU means nothing to the other.
        let own = bench.hardware.smmus()[0].create_with(&Request::default())?;
        let stream = *edus[1].master().streams().first().ok_or(board::Error::Missing("stream"))?;
        let group = edus[1].master().group().ok_or(board::Error::Missing("group"))?;
        expect_eq!(group.iommu().attach(stream, &own), Err(AttachError::ForeignSpace));
        for edu in edus {
            take_back(edu)?;
        }
        Ok(())
    }
    machine: two_smmus
}
