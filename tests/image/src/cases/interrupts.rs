//! Interrupts by message, through the SMMU and the ITS.

use crate::bench::soon;
use alloc::sync::Arc;
use base::Deadline;
use board::EduStray;
use iommu::domain::{Domain, DomainKind};
use iommu::{Access, FaultReason};
use ktest::{expect, expect_eq, ktest};

ktest! {
    fn a_message_passes_the_smmu_and_becomes_an_interrupt(bench) {
        let edu = bench.edu()?;
        let before = edu.edu().interrupts();
        for bit in [1, 2, 0x80] {
            edu.edu().raise_interrupt(bit, soon())?;
        }
        expect_eq!(edu.edu().interrupts(), before + 3);
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    /// In a domain without the doorbell a message is a write to nowhere: it is stopped like any other.
    fn a_message_to_an_unmapped_doorbell_is_stopped(bench) {
        let edu = bench.edu()?;
        let group = edu.master().group().cloned().ok_or(board::Error::Missing("group"))?;
        let space = group.iommu().create()?;
        let window = space.aperture().range;
        let bare = Arc::new(Domain::new(DomainKind::Owned, space, window)?);
        group.attach_owned(bare)?;
        let since = bench.watch();
        expect!(edu.edu().raise_interrupt(1, Deadline::after_millis(50)).is_err());
        let doorbell = edu.master().doorbell().ok_or(board::Error::Missing("doorbell"))?;
        let noted = bench.fault(group.streams(), since).ok_or(board::Error::Missing("fault record"))?;
        expect_eq!(noted.fault.iova.map(iommu::Iova::get), Some(doorbell.get()));
        expect_eq!(noted.fault.access, Some(Access::Write));
        expect_eq!(noted.fault.reason, FaultReason::NotMapped);
        group.detach_owned()?;
        edu.edu().raise_interrupt(2, soon())?;
        edu.stop()?;
        Ok(())
    }
}

ktest! {
    fn a_driver_gives_its_interrupt_back(bench) {
        // More than there are interrupts for one device: each start takes one, each stop gives it back.
        for _ in 0..300 {
            let edu = bench.edu()?;
            edu.stop()?;
        }
        let edu: EduStray = bench.edu()?;
        edu.edu().raise_interrupt(1, soon())?;
        edu.stop()?;
        Ok(())
    }
}
