//! Interrupts by message, through the SMMU: to an ITS, and to a GICv2m frame.

use crate::Bench;
use crate::bench::soon;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, wait_until};
use board::{EduStray, Error, Signal};
use core::sync::atomic::{AtomicU64, Ordering};
use gic::{Priority, Source, Trigger};
use iommu::domain::{Domain, DomainKind};
use iommu::{Access, FaultReason};
use ktest::{TestResult, expect, expect_eq, ktest};

fn messages_pass(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    expect_eq!(edu.signal(), Signal::Message);
    let before = edu.edu().interrupts();
    for bit in [1, 2, 0x80] {
        edu.edu().raise_interrupt(bit, soon())?;
    }
    expect_eq!(edu.edu().interrupts(), before + 3);
    edu.stop()?;
    Ok(())
}

/// In a domain without the doorbell a message is a write to nowhere: it is stopped like any other.
fn messages_to_nowhere_are_stopped(bench: &Bench) -> TestResult {
    let edu = bench.edu()?;
    let group = edu.master().group().cloned().ok_or(Error::Missing("group"))?;
    let space = group.iommu().create()?;
    let window = space.aperture().range;
    let bare = Arc::new(Domain::new(DomainKind::Owned, space, window)?);
    group.attach_owned(bare)?;
    let since = bench.watch();
    expect!(edu.edu().raise_interrupt(1, Deadline::after_millis(50)).is_err());
    let doorbell = edu.master().doorbell().ok_or(Error::Missing("doorbell"))?;
    let noted = bench.fault(group.streams(), since).ok_or(Error::Missing("fault record"))?;
    expect_eq!(noted.fault.iova.map(iommu::Iova::get), Some(doorbell.get()));
    expect_eq!(noted.fault.access, Some(Access::Write));
    expect_eq!(noted.fault.reason, FaultReason::NotMapped);
    group.detach_owned()?;
    edu.edu().raise_interrupt(2, soon())?;
    edu.stop()?;
    Ok(())
}

/// More than there are interrupts for one device: each start takes one, each stop gives it back.
fn interrupts_come_back(bench: &Bench) -> TestResult {
    for _ in 0..300 {
        let edu = bench.edu()?;
        edu.stop()?;
    }
    let edu: EduStray = bench.edu()?;
    edu.edu().raise_interrupt(1, soon())?;
    edu.stop()?;
    Ok(())
}

ktest! {
    fn a_message_passes_the_smmu_and_becomes_an_interrupt(bench) {
        messages_pass(bench)
    }
}

ktest! {
    fn a_message_passes_the_smmu_to_a_gicv2m_frame(bench) {
        messages_pass(bench)
    }
    machine: gicv2
}

ktest! {
    fn a_message_to_an_unmapped_doorbell_is_stopped(bench) {
        messages_to_nowhere_are_stopped(bench)
    }
}

ktest! {
    fn a_message_to_the_unmapped_doorbell_of_a_frame_is_stopped(bench) {
        messages_to_nowhere_are_stopped(bench)
    }
    machine: gicv2
}

ktest! {
    fn a_driver_gives_its_interrupt_back(bench) {
        interrupts_come_back(bench)
    }
}

ktest! {
    fn a_driver_gives_its_interrupt_back_to_the_frame(bench) {
        interrupts_come_back(bench)
    }
    machine: gicv2
}

ktest! {
    /// A frame has few interrupts: who gets none uses its wire.
    fn a_device_for_which_no_message_is_left_interrupts_by_wire(bench) {
        let gic = board::gic().ok_or(Error::Missing("GIC"))?;
        let frame = Source::Frame(0);
        let mut taken = Vec::new();
        while gic.can_allocate(frame, 1) {
            taken.extend(gic.allocate_msi(frame, 1, 0)?);
        }
        expect!(taken.len() >= 32, "{} interrupts", taken.len());
        let edu = bench.edu()?;
        expect_eq!(edu.signal(), Signal::Wire);
        let before = edu.edu().interrupts();
        for bit in [1, 2, 0x80] {
            edu.edu().raise_interrupt(bit, soon())?;
        }
        expect_eq!(edu.edu().interrupts(), before + 3);
        edu.stop()?;
        for msi in taken {
            gic.free_msi(msi)?;
        }
        messages_pass(bench)
    }
    machine: gicv2
}

/// Which cores have slept until their own timer woke them.
static WOKEN: AtomicU64 = AtomicU64::new(0);

ktest! {
    /// A GICv2's private interrupts are banked: each core sets up its own.
    fn every_core_has_its_own_timer(bench) {
        expect_eq!(bench.cores, 8);
        WOKEN.store(1, Ordering::SeqCst);
        super::boot::on_other_cores(bench.cores, |core| {
            // Nobody notifies: what ends it is the core's own timer.
            if wait_until(Deadline::after_millis(20), || false).is_err() {
                WOKEN.fetch_or(1 << core, Ordering::SeqCst);
            }
        })?;
        expect_eq!(WOKEN.load(Ordering::SeqCst), (1 << bench.cores) - 1);
        Ok(())
    }
    machine: gicv2
}

ktest! {
    fn a_private_interrupt_comes_and_goes_on_all_cores(_bench) {
        // The physical timer's, which is not running.
        let (gic, id) = (board::gic().ok_or(Error::Missing("GIC"))?, gic::ppi(14)?);
        for _ in 0..10 {
            gic.enable(id, Trigger::Level, Priority::NORMAL, Arc::new(|| {}))?;
            gic.disable(id)?;
        }
        expect_eq!(gic.stray().unknown, 0);
        Ok(())
    }
    machine: gicv2
}
