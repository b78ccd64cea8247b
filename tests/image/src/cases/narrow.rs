//! Devices with few address lines, in a machine with more memory than they reach: behind the SMMU they get low addresses, let
//! through it they get copies, and their driver does the same in both cases. QEMU's edu cuts an address to its lines, so that a
//! wrong one ends in other memory.

use super::pattern;
use crate::Bench;
use crate::bench::soon;
use alloc::boxed::Box;
use board::{EduStray, Error, Treatment};
use core::ptr::NonNull;
use dma::{Bidirectional, Bytes, Device, FromDevice, Ladder, Limits, PageSet, Pages, Pool, ToDevice};
use iommu::{Iova, PhysAddr};
use ktest::{Outcome, TestResult, expect, expect_eq, ktest};
use testdev::edu::Completion;

const FOUR_GIB: u64 = 1 << 32;

/// The edu in slot 1 has 28 address lines, that in slot 5 has 32.
fn narrow(bench: &Bench, bits: u32, treatment: &Treatment) -> Result<EduStray, Outcome> {
    let (vendor, device) = testdev::edu::ID;
    let (host, function) = bench.function(vendor, device, usize::from(bits == 32))?;
    let master = bench.hardware.attach_as(host, &function, "edu", Limits::address_bits(bits), treatment)?;
    Ok(EduStray::start(master)?)
}

fn passthrough() -> Treatment {
    Treatment { passthrough: true, ..Treatment::default() }
}

/// A buffer above 4 GiB.
fn high(device: &Device) -> Result<Pages, Outcome> {
    let pages = Pages::zeroed(device.memory(), 8192)?;
    if pages.phys_runs()[0].start() < PhysAddr::new(FOUR_GIB) {
        return Err(Error::Missing("memory above 4 GiB").into());
    }
    Ok(pages)
}

/// What a driver does: lends a page for the device to read and another for it to write, and compares.
fn copies_by_dma(edu: &EduStray) -> TestResult {
    let device = edu.master().device();
    let mask = device.limits().address_mask;
    let bytes = pattern(31, 3000);
    let mut source = high(device)?;
    source.as_mut_slice()[4000..7000].copy_from_slice(&bytes);
    let source = device.map::<ToDevice, _>(source).map_err(|rejected| rejected.error)?;
    let mut target = high(device)?;
    target.as_mut_slice().fill(0x11);
    let target = device.map::<FromDevice, _>(target).map_err(|rejected| rejected.error)?;
    expect!(source.iova().get() + 8191 <= mask && target.iova().get() + 8191 <= mask);
    let at = |iova: Iova, offset| iova.checked_add(offset).ok_or(Error::Missing("address"));
    edu.edu().dma_to_device(at(source.iova(), 4000)?, 3000, Completion::Interrupt, soon())?;
    edu.edu().dma_from_device(at(target.iova(), 100)?, 3000, Completion::Interrupt, soon())?;
    target.sync_for_cpu(100, 3000)?;
    let mut seen = [0; 3000];
    target.view().read(100, &mut seen)?;
    expect!(seen[..] == bytes[..]);
    source.unmap()?;
    let target = target.unmap()?;
    expect!(target.as_slice()[100..3100] == bytes[..]);
    expect!(target.as_slice()[..100].iter().chain(&target.as_slice()[3100..]).all(|byte| *byte == 0x11));
    expect_eq!(device.stats().live_mappings, 0);
    Ok(())
}

ktest! {
    fn behind_the_smmu_a_device_with_28_address_lines_gets_low_addresses_and_no_copy(bench) {
        let edu = narrow(bench, 28, &Treatment::default())?;
        copies_by_dma(&edu)?;
        expect_eq!(edu.master().device().copies(), 0);
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    fn let_through_the_smmu_a_device_with_32_address_lines_gets_copies_and_its_driver_does_not_know(bench) {
        let edu = narrow(bench, 32, &passthrough())?;
        expect!(!edu.master().device().is_isolated());
        copies_by_dma(&edu)?;
        expect_eq!(edu.master().device().copies(), 2);
        // What it allocates itself is where it reaches it, at its own address, and not copied.
        let device = edu.master().device();
        let pages = device.pages(4096)?;
        let phys = pages.phys_runs()[0].start();
        let mapped = device.map::<Bidirectional, _>(pages).map_err(|rejected| rejected.error)?;
        expect_eq!((mapped.iova().get(), device.copies()), (phys.get(), 2));
        expect!(phys.get() + 4095 < FOUR_GIB);
        mapped.unmap()?;
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    fn without_an_iommu_a_device_with_32_address_lines_gets_copies_and_one_with_28_is_told_that_it_reaches_no_memory(bench) {
        expect!(narrow(bench, 32, &Treatment::default()).is_err());
        let allowed = Treatment { allow_unprotected: true, ..Treatment::default() };
        let edu = narrow(bench, 32, &allowed)?;
        expect!(!edu.master().device().is_isolated());
        copies_by_dma(&edu)?;
        expect_eq!(edu.master().device().copies(), 2);
        edu.stop()?;
        let edu = narrow(bench, 28, &allowed)?;
        let device = edu.master().device();
        let rejected = device.map::<ToDevice, _>(high(device)?).err().ok_or(Error::Missing("error"))?;
        expect!(matches!(rejected.error, dma::Error::Unreachable { .. }));
        expect!(matches!(device.pages(4096), Err(dma::Error::OutOfMemory)));
        Ok(edu.stop()?)
    }
    machine: bare
}

ktest! {
    /// All of this machine's memory lies above 1 GiB.
    fn let_through_the_smmu_a_device_with_28_address_lines_is_told_that_it_reaches_no_memory(bench) {
        let edu = narrow(bench, 28, &passthrough())?;
        let device = edu.master().device();
        let rejected = device.map::<ToDevice, _>(high(device)?).err().ok_or(Error::Missing("error"))?;
        expect!(matches!(rejected.error, dma::Error::Unreachable { .. }));
        expect!(matches!(device.pages(4096), Err(dma::Error::OutOfMemory)));
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    fn forced_copies_reach_a_device_behind_the_smmu_in_one_range(bench) {
        let edu = narrow(bench, 28, &Treatment { bounce: true, ..Treatment::default() })?;
        copies_by_dma(&edu)?;
        let device = edu.master().device();
        expect_eq!(device.copies(), 2);
        let scattered = PageSet::zeroed(device.memory(), 64 * 4096, Ladder::SINGLE_PAGES)?;
        let mapped = device.map::<Bidirectional, _>(scattered).map_err(|rejected| rejected.error)?;
        expect_eq!(mapped.segments().len(), 1);
        mapped.unmap()?;
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    /// The group is blocked when its device is given up, wherever it was.
    fn a_device_that_was_let_through_is_translated_again_when_it_is_attached_anew(bench) {
        let edu = narrow(bench, 32, &passthrough())?;
        copies_by_dma(&edu)?;
        edu.stop()?;
        let edu = narrow(bench, 32, &Treatment::default())?;
        expect!(edu.master().device().is_isolated());
        copies_by_dma(&edu)?;
        expect_eq!(edu.master().device().copies(), 0);
        let since = bench.watch();
        let target = high(edu.master().device())?;
        let phys = target.phys_runs()[0].start().get() & (FOUR_GIB - 1);
        edu.edu().dma_from_device(Iova::new(phys), 64, Completion::Polling, soon())?;
        expect!(bench.fault(edu.master().streams(), since).is_some());
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    fn two_functions_that_the_iommu_cannot_tell_apart_are_not_passed_through_one_by_one(bench) {
        let (vendor, device) = testdev::edu::ID;
        let (host, function) = bench.function(vendor, device, 1)?;
        let attached = bench.hardware.attach_as(host, &function, "edu", Limits::NONE, &passthrough());
        expect!(matches!(attached, Err(Error::Passthrough { .. })));
        Ok(())
    }
    machine: groups
}

ktest! {
    fn a_restricted_device_finds_its_buffers_in_its_pool_wherever_its_driver_has_them(bench) {
        let frames = kernel::mm::alloc_aligned(256, 1 << 20, kernel::mm::Zone::Any)?;
        let ptr = NonNull::new(kernel::mm::pointer(frames.start())).ok_or(Error::Missing("linear map"))?;
        // SAFETY: the frames are never given back, so nobody else uses them; they are in the linear map.
        let pool = unsafe { Pool::carve_out("pool of the test", frames, ptr, &board::COHERENT) }?;
        let pool: &'static Pool = Box::leak(Box::new(pool));
        let edu = narrow(bench, 28, &Treatment { restricted: Some(pool), ..Treatment::default() })?;
        let device = edu.master().device();
        // From elsewhere: copied.
        let mut source = Pages::zeroed(&board::COHERENT, 4096)?;
        let bytes = pattern(32, 500);
        source.as_mut_slice()[..500].copy_from_slice(&bytes);
        let source = device.map::<ToDevice, _>(source).map_err(|rejected| rejected.error)?;
        // Its own: in the pool already.
        let target = device.map::<FromDevice, _>(device.pages(4096)?).map_err(|rejected| rejected.error)?;
        expect_eq!((device.copies(), pool.used()), (1, 8192));
        edu.edu().dma_to_device(source.iova(), 500, Completion::Polling, soon())?;
        edu.edu().dma_from_device(target.iova(), 500, Completion::Polling, soon())?;
        expect!(target.unmap()?.as_slice()[..500] == bytes[..]);
        source.unmap()?;
        expect_eq!(pool.used(), 0);
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    fn bytes_beside_a_buffer_are_out_of_the_devices_reach(bench) {
        let edu = narrow(bench, 28, &Treatment::default())?;
        let device = edu.master().device();
        let mut pages = Pages::zeroed(device.memory(), 4096)?;
        pages.as_mut_slice().fill(0x5e);
        let mut parts = Bytes::cut(pages, &[1000, 500, 1000])?;
        let (after, middle) = (parts.pop(), parts.pop());
        let middle = middle.ok_or(Error::Missing("part"))?;
        let mapped = device.map_bytes::<FromDevice>(middle).map_err(|rejected| rejected.error)?;
        expect_eq!((mapped.iova().get() % 4096, device.copies()), (1000, 1));
        // All of the page, not only the 500 bytes.
        let mut known = device.pages(4096)?;
        known.as_mut_slice().fill(0x33);
        let known = device.map::<ToDevice, _>(known).map_err(|rejected| rejected.error)?;
        edu.edu().dma_to_device(known.iova(), 4092, Completion::Polling, soon())?;
        edu.edu().dma_from_device(mapped.iova().align_down(4096), 4092, Completion::Polling, soon())?;
        let middle = mapped.unmap()?;
        expect!(middle.as_slice().iter().all(|byte| *byte == 0x33));
        parts.extend(after);
        expect!(parts.iter().all(|part| part.as_slice().iter().all(|byte| *byte == 0x5e)));
        known.unmap()?;
        Ok(edu.stop()?)
    }
    machine: narrow
}

ktest! {
    /// The liveness register of edu inverts what is written to it.
    fn a_device_writes_a_register_of_its_neighbour_while_it_was_lent_and_not_after(bench) {
        const LIVENESS: u64 = 4;
        let (writer, neighbour) =
            (narrow(bench, 28, &Treatment::default())?, narrow(bench, 32, &Treatment::default())?);
        let registers = neighbour.master().function().bar_part(0, 0, 0x100)?;
        let device = writer.master().device();
        let mut value = device.pages(4096)?;
        value.as_mut_slice()[..4].copy_from_slice(&0x1234_5678_u32.to_le_bytes());
        let value = device.map::<ToDevice, _>(value).map_err(|rejected| rejected.error)?;
        writer.edu().dma_to_device(value.iova(), 4, Completion::Polling, soon())?;
        let range = neighbour.master().peer_range(0)?;
        let mapped = device.map_peer::<FromDevice>(range).map_err(|rejected| rejected.error)?;
        let at = mapped.iova().checked_add(LIVENESS).ok_or(Error::Missing("address"))?;
        writer.edu().dma_from_device(at, 4, Completion::Polling, soon())?;
        expect_eq!(registers.read32(LIVENESS as usize), !0x1234_5678);
        registers.write32(LIVENESS as usize, 0);
        mapped.unmap()?;
        let since = bench.watch();
        writer.edu().dma_from_device(at, 4, Completion::Polling, soon())?;
        expect!(bench.fault(writer.master().streams(), since).is_some());
        expect_eq!(registers.read32(LIVENESS as usize), !0);
        value.unmap()?;
        neighbour.stop()?;
        Ok(writer.stop()?)
    }
    machine: narrow
}
