//! Devices far from the first root bus.

use crate::Bench;
use crate::bench::soon;
use alloc::vec::Vec;
use board::{EduStray, Error};
use dma::{FromDevice, Limits};
use iommu::{Iova, PAGE_SIZE};
use ktest::{TestResult, expect, expect_eq, ktest};
use testdev::edu::Completion;

/// The edu on a bus of which `is` holds, fenced like any other.
fn fenced(bench: &Bench, is: impl Fn(u8) -> bool) -> TestResult {
    let mut edus = bench.hardware.functions().filter(|(_, function)| testdev::edu::Edu::matches(function));
    let (host, function) = edus.find(|(_, function)| is(function.bdf().bus())).ok_or(Error::Missing("edu there"))?;
    let edu = EduStray::start(bench.hardware.attach(host, function, "edu", Limits::NONE, false)?)?;
    let requester = edu.master().function().bdf().requester_id().get();
    let streams: Vec<u32> = edu.master().streams().iter().map(|stream| stream.get()).collect();
    expect_eq!(streams, [u32::from(requester)]);
    edu.edu().raise_interrupt(1, soon())?;
    let device = edu.master().device();
    let lent = device.map::<FromDevice, _>(device.pages(PAGE_SIZE)?).map_err(|rejected| rejected.error)?;
    let since = bench.watch();
    edu.edu().dma_from_device(lent.iova(), 64, Completion::Interrupt, soon())?;
    expect!(!bench.has_faulted(edu.master().streams(), since));
    edu.edu().dma_from_device(Iova::new(0x1234_5000), 64, Completion::Interrupt, soon())?;
    let noted = bench.fault(edu.master().streams(), since).ok_or(Error::Missing("fault record"))?;
    expect_eq!(noted.fault.iova, Some(Iova::new(0x1234_5000)));
    drop(lent);
    edu.stop()?;
    Ok(())
}

ktest! {
    fn a_device_behind_a_further_host_bridge_has_its_stream_its_messages_and_its_fence(bench) {
        fenced(bench, |bus| bus > 0x80)
    }
    machine: far
}

ktest! {
    fn a_device_behind_a_switch_has_its_stream_its_messages_and_its_fence(bench) {
        fenced(bench, |bus| (1..0x80).contains(&bus))
    }
    machine: far
}
