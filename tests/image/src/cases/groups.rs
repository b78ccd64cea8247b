//! Devices that the SMMU cannot tell or keep apart, and streams that nobody has attached.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::sync::Arc;
use board::{EduStray, Error, Master};
use dma::{FromDevice, Mapped, OwnedDomain, Pages};
use iommu::group::AttachmentState;
use iommu::{Access, AttachError, FaultReason, Iova, PAGE_SIZE};
use ktest::{Outcome, expect, expect_eq, ktest};
use pci::{Function, RequesterId};
use testdev::edu::{Completion, Edu};

/// Two edus of one group: behind a bridge to conventional PCI, where they have one name on the bus, or in one device, where they
/// have two.
fn pair(bench: &Bench, one_name: bool) -> Result<(Master, Master), Outcome> {
    let edus = || bench.hardware.functions().map(|(_, function)| function).filter(|function| Edu::matches(function));
    let siblings = |one: &Arc<Function>, other: &Arc<Function>| {
        one.group() == other.group()
            && one.bdf() < other.bdf()
            && (one.requester_id() == other.requester_id()) == one_name
    };
    let found = edus().find_map(|one| Some((one, edus().find(|other| siblings(one, other))?)));
    let (one, other) = found.ok_or(Error::Missing("pair of edus"))?;
    let attach = |function| bench.hardware.attach(0, function, "edu", dma::Limits::NONE, false);
    Ok((attach(one)?, attach(other)?))
}

fn lent(edu: &EduStray) -> Result<Mapped<FromDevice, Pages>, Outcome> {
    let device = edu.master().device();
    Ok(device.map(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?)
}

/// Has `edu` write 64 bytes of its buffer, which it reads from `from` first.
fn copy(edu: &EduStray, from: Iova, to: Iova) -> Result<(), Outcome> {
    edu.edu().dma_to_device(from, 64, Completion::Interrupt, soon())?;
    edu.edu().dma_from_device(to, 64, Completion::Interrupt, soon())?;
    Ok(())
}

/// What holds for both kinds of pairs. Red when each function got a group of its own, and when an arrest blocked the group.
fn siblings_move_together(bench: &Bench, one: Master, other: Master) -> Result<(), Outcome> {
    let group = one.group().cloned().ok_or(Error::Missing("group"))?;
    expect!(other.group().is_some_and(|same| Arc::ptr_eq(same, &group)));
    expect_eq!(group.users(), 2);
    let (one, other) = (EduStray::start(one)?, EduStray::start(other)?);
    // Neither can have the address space for itself.
    let own = OwnedDomain::new("own", one.master().device())?;
    expect!(matches!(own.attach(one.master().device()), Err(dma::Error::Attach(AttachError::Shared(2)))));

    // What is lent to one, the other reaches too: nothing could keep it from that.
    let mut source = one.master().device().pages(PAGE_SIZE)?;
    source.as_mut_slice()[..64].copy_from_slice(&pattern(21, 64));
    let source: Mapped<dma::ToDevice, _> = one.master().device().map(source).map_err(|rejected| rejected.error)?;
    let target = lent(&one)?;
    copy(&other, source.iova(), target.iova())?;
    expect!(target.unmap()?.as_slice()[..64] == pattern(21, 64));
    // A third does not.
    let stranger = bench.edu()?;
    expect!(!stranger.master().group().is_some_and(|other| Arc::ptr_eq(other, &group)));
    let since = bench.watch();
    stranger.edu().dma_to_device(source.iova(), 4, Completion::Interrupt, soon())?;
    let noted = bench.fault(stranger.master().streams(), since).ok_or(Error::Missing("fault record"))?;
    expect_eq!((noted.fault.iova, noted.fault.event), (Some(source.iova()), "F_TRANSLATION"));
    stranger.stop()?;
    source.unmap()?;

    // When one is arrested the other goes on.
    let function = one.master().function().clone();
    one.stop()?;
    expect!(!function.is_bus_master());
    expect_eq!((group.current(), group.users()), (AttachmentState::Default, 1));
    let since = bench.watch();
    let source = lent(&other)?;
    let target = lent(&other)?;
    copy(&other, source.iova(), target.iova())?;
    expect!(!bench.has_faulted(group.streams(), since));
    target.unmap()?;
    source.unmap()?;
    other.stop()?;
    expect_eq!((group.current(), group.users()), (AttachmentState::Blocked, 0));
    Ok(())
}

ktest! {
    fn functions_behind_a_bridge_to_conventional_pci_share_a_name_and_a_group(bench) {
        let (one, other) = pair(bench, true)?;
        expect_eq!(one.function().requester_id(), other.function().requester_id());
        siblings_move_together(bench, one, other)
    }
    machine: groups
}

ktest! {
    fn functions_of_one_device_without_access_control_share_a_group_with_both_names(bench) {
        let (one, other) = pair(bench, false)?;
        expect_eq!(one.streams().len(), 2);
        siblings_move_together(bench, one, other)
    }
    machine: groups
}

/// What a kernel would have that attaches nothing and lets devices loose all the same.
struct LetLoose;

// SAFETY: the function of the test that uses it has a stream that no IOMMU has ever been told of, and is therefore stopped: that
// is what the test shows. It is off the bus again when the test ends.
unsafe impl pci::Attached for LetLoose {
    fn covers(&self, _: RequesterId) -> bool {
        true
    }
}

ktest! {
    /// The second level of the stream table has no entry for its bus: C_BAD_STREAMID.
    fn a_stream_that_was_never_attached_reaches_nothing_and_is_reported_as_unknown(bench) {
        // The last edu, behind a root port of its own.
        let edus = bench.hardware.functions().filter(|(_, function)| Edu::matches(function));
        let alone = edus.filter(|(_, function)| function.bdf().bus() != 0 && function.group() == function.bdf());
        let (host, function) = alone.last().ok_or(Error::Missing("edu behind a root port"))?;
        let stream = bench.boot.machine.pcie[host].stream_of(function.requester_id().get());
        let (_, stream) = stream.ok_or(Error::Missing("stream"))?;
        let mut pages = Pages::zeroed(&board::COHERENT, PAGE_SIZE)?;
        pages.as_mut_slice().fill(0x5a);
        let phys = Iova::new(pages.phys_runs()[0].start().get());
        let since = bench.watch();
        function.enable_bus_master(&LetLoose)?;
        let edu = Edu::new(function.clone(), None)?;
        edu.dma_from_device(phys, 16, Completion::Polling, soon())?;
        function.disable_bus_master()?;
        let noted = bench.fault(&[stream], since).ok_or(Error::Missing("fault record"))?;
        expect_eq!((noted.fault.event, noted.fault.reason), ("C_BAD_STREAMID", FaultReason::Blocked));
        expect_eq!((noted.fault.iova, noted.fault.access), (None, None));
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0x5a));
        Ok(())
    }
    machine: groups
}

ktest! {
    /// The other edus' group is blocked; its STE aborts, which makes no record.
    fn a_stream_that_was_attached_once_reaches_nothing_and_is_silent(bench) {
        let master = bench.edu_master(0)?;
        let (function, streams) = (master.function().clone(), master.streams().to_vec());
        master.arrest()?;
        drop(master);
        let mut pages = Pages::zeroed(&board::COHERENT, PAGE_SIZE)?;
        pages.as_mut_slice().fill(0x5a);
        let phys = Iova::new(pages.phys_runs()[0].start().get());
        let since = bench.watch();
        function.enable_bus_master(&LetLoose)?;
        let edu = Edu::new(function.clone(), None)?;
        edu.dma_from_device(phys, 16, Completion::Polling, soon())?;
        function.disable_bus_master()?;
        expect!(core::hint::black_box(pages.as_slice()).iter().all(|byte| *byte == 0x5a));
        expect!(!bench.has_faulted(&streams, since));
        Ok(())
    }
    machine: groups
}

ktest! {
    /// Two devices in one address space see the same; a third sees its own.
    fn devices_that_share_a_domain_see_the_same_and_another_does_not(bench) {
        let [one, two, other] = [EduStray::start(bench.edu_master(0)?)?, EduStray::start(bench.edu_master(1)?)?, EduStray::start(bench.edu_master(2)?)?];
        let at = Iova::new(0x4000_0000);
        let shared = OwnedDomain::new("shared", one.master().device())?;
        let mut pages = one.master().device().pages(PAGE_SIZE)?;
        pages.as_mut_slice()[..64].copy_from_slice(&pattern(22, 64));
        let placed = shared.map_owned::<dma::Bidirectional, _>(at, pages).map_err(|rejected| rejected.error)?;
        let first = shared.attach(one.master().device())?;
        let second = shared.attach(two.master().device())?;
        copy(&one, at, Iova::new(at.get() + 64))?;
        copy(&two, Iova::new(at.get() + 64), Iova::new(at.get() + 128))?;
        expect_eq!(placed.view().read_array::<64>(128)?[..], pattern(22, 64)[..]);
        let since = bench.watch();
        other.edu().dma_from_device(at, 4, Completion::Interrupt, soon())?;
        let noted = bench.fault(other.master().streams(), since).ok_or(Error::Missing("fault record"))?;
        expect_eq!((noted.fault.event, noted.fault.access), ("F_TRANSLATION", Some(Access::Write)));
        expect_eq!(noted.fault.iova, Some(at));
        expect!(!bench.has_faulted(one.master().streams(), since) && !bench.has_faulted(two.master().streams(), since));
        // The mapping ends for both at once.
        placed.unmap()?;
        for edu in [&one, &two] {
            let since = bench.watch();
            edu.edu().dma_to_device(at, 4, Completion::Interrupt, soon())?;
            let noted = bench.fault(edu.master().streams(), since).ok_or(Error::Missing("fault record"))?;
            expect_eq!((noted.fault.event, noted.fault.iova), ("F_TRANSLATION", Some(at)));
        }
        drop((first, second));
        for edu in [one, two, other] {
            edu.stop()?;
        }
        Ok(())
    }
    machine: bridge
}

ktest! {
    /// What the SMMU has cached for the one device it must not use for the other, as it would if their spaces had one ASID.
    fn the_same_address_of_two_devices_is_each_ones_own_although_both_are_cached(bench) {
        let edus = [EduStray::start(bench.edu_master(0)?)?, EduStray::start(bench.edu_master(1)?)?];
        let at = Iova::new(0x4000_0000);
        let mut loans = alloc::vec::Vec::new();
        for (edu, seed) in edus.iter().zip([61, 62]) {
            let mut pages = edu.master().device().pages(PAGE_SIZE)?;
            pages.as_mut_slice()[..64].copy_from_slice(&pattern(seed, 64));
            let loan = edu.master().device().map_at::<dma::Bidirectional, _>(at, pages);
            loans.push(loan.map_err(|rejected| rejected.error)?);
        }
        let since = bench.watch();
        for _ in 0..2 {
            for edu in &edus {
                copy(edu, at, Iova::new(at.get() + 1024))?;
            }
        }
        for edu in &edus {
            expect!(!bench.has_faulted(edu.master().streams(), since));
        }
        for (loan, seed) in loans.into_iter().zip([61, 62]) {
            expect!(loan.unmap()?.as_slice()[1024..][..64] == pattern(seed, 64));
        }
        for edu in edus {
            edu.stop()?;
        }
        Ok(())
    }
    machine: bridge
}
