//! The proof of the fence must be able to fail: every verdict, from a device that behaves accordingly.

use base::Deadline;
use dma::Device;
use dma::fakes::{FakeDevice, FakeSystem};
use iommu::{FaultSink, Iova, PhysAddr, StreamId};
use kernel::class::Stray;
use kernel::demo::{Verdict, prove};
use kernel::faults::FaultLog;

/// What the device does when it is sent astray.
#[derive(Clone, Copy)]
enum Way {
    /// Through the IOMMU, which reports.
    Translated,
    /// Through the IOMMU, whose report is lost.
    Silent,
    /// Through the IOMMU at another address, which is reported.
    Elsewhere,
    /// Around the IOMMU.
    Around,
    /// Around the IOMMU, with a report all the same.
    AroundAndReported,
    /// Not at all.
    Refuses,
}

struct Astray<'a> {
    system: &'a FakeSystem,
    device: &'a FakeDevice,
    faults: &'a FaultLog,
    way: Way,
}

impl Stray for Astray<'_> {
    fn device(&self) -> &Device {
        &self.device.device
    }

    fn stray(&self, target: Iova, _: Deadline) -> Result<(), String> {
        let through = |at: Iova| self.device.master.write(at, &[0x5a; 64]).expect_err("nothing is lent there");
        let around = || assert!(self.system.memory.bus_write(PhysAddr::new(target.get()), &[0x5a; 64]));
        match self.way {
            Way::Translated => self.faults.fault(&through(target)),
            Way::Silent => _ = through(target),
            Way::Elsewhere => self.faults.fault(&through(Iova::new(0x7000_0000_0000))),
            Way::Around => around(),
            Way::AroundAndReported => {
                self.faults.fault(&through(target));
                around();
            }
            Way::Refuses => return Err("busy".into()),
        }
        Ok(())
    }
}

fn verdict(way: Way) -> Verdict {
    let system = FakeSystem::new();
    let device = system.device("stray").unwrap();
    let faults = FaultLog::new();
    let streams: Vec<StreamId> = device.group.streams().to_vec();
    let astray = Astray { system: &system, device: &device, faults: &faults, way };
    let proof = prove(&astray, &streams, &faults).unwrap();
    assert_eq!(proof.device, "stray");
    assert_eq!(proof.verdict.held(), matches!(proof.verdict, Verdict::Stopped { .. }));
    proof.verdict
}

#[test]
fn an_access_that_was_stopped_and_reported_is_proof() {
    assert!(matches!(verdict(Way::Translated), Verdict::Stopped { .. }));
}

#[test]
fn an_access_that_nobody_reported_is_no_proof() {
    assert_eq!(verdict(Way::Silent), Verdict::NotReported);
}

#[test]
fn a_report_of_another_address_is_no_proof() {
    assert_eq!(verdict(Way::Elsewhere), Verdict::NotReported);
}

#[test]
fn memory_that_has_changed_is_a_breach_whatever_was_reported() {
    assert_eq!(verdict(Way::Around), Verdict::Breached);
    assert_eq!(verdict(Way::AroundAndReported), Verdict::Breached);
}

#[test]
fn a_device_that_does_not_try_proves_nothing() {
    assert_eq!(verdict(Way::Refuses), Verdict::NotTried("busy".into()));
}
