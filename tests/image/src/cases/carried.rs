//! A bus that carries few addresses (`dma-ranges`): no other is ever given out, and those that are, are all of them.
//!
//! Seen red: no holes; no hull; a hole one page short at either end.

use super::pattern;
use crate::bench::soon;
use alloc::vec::Vec;
use board::EduStray;
use dma::{Bidirectional, Error};
use iommu::domain::ReservedKind;
use iommu::{Iova, IovaError, IovaRange, PAGE_SIZE};
use ktest::{expect, expect_eq, ktest};
use testdev::edu::Completion;

/// What the device tree of this machine says: first address and bytes.
const CARRIED: [(u64, u64); 3] = [(0x0808_0000, 0x2_0000), (0x4000_0000, 0x1_0000), (0x4002_0000, 0x1_0000)];
/// The doorbell of the ITS, in the first piece.
const DOORBELL: u64 = 0x0809_0000;

fn range(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap_or_default()
}

ktest! {
    fn the_dma_api_gives_out_what_the_bus_carries_to_the_last_page_and_nothing_else(bench) {
        let edu = EduStray::start(bench.edu_master(0)?)?;
        let device = edu.master().device();
        let domain = edu.master().group().and_then(|group| group.domain()).ok_or(board::Error::Missing("domain"))?;
        expect!(domain.reserved().any(|region| region.kind == ReservedKind::MsiDoorbell && region.range == range(DOORBELL, PAGE_SIZE)));
        let since = bench.watch();
        let mut loans = Vec::new();
        let ended = loop {
            match device.map::<Bidirectional, _>(device.pages(PAGE_SIZE)?) {
                Ok(loan) => loans.push(loan),
                Err(rejected) => break rejected.error,
            }
            expect!(loans.len() <= 1000, "there is no end to the addresses");
        };
        expect!(matches!(ended, Error::Iova(IovaError::NoSpace { .. })), "{ended:?}");
        for loan in &loans {
            let given = range(loan.iova().get(), PAGE_SIZE);
            expect!(CARRIED.iter().any(|&(start, len)| range(start, len).covers(given)), "{given} is not carried");
            expect!(given.start() != Iova::new(DOORBELL));
        }
        let carried: u64 = CARRIED.iter().map(|(_, len)| len / PAGE_SIZE).sum();
        expect_eq!(loans.len() as u64, carried - 1);
        // Every one of them works: there and back.
        for (seed, loan) in (1..).zip(&mut loans) {
            loan.view().write(0, &pattern(seed, 64))?;
            edu.edu().dma_to_device(loan.iova(), 64, Completion::Interrupt, soon())?;
            edu.edu().dma_from_device(loan.iova().checked_add(PAGE_SIZE - 64).unwrap_or_default(), 64, Completion::Interrupt, soon())?;
            let mut seen = [0; 64];
            loan.view().read(PAGE_SIZE - 64, &mut seen)?;
            expect!(seen[..] == pattern(seed, 64)[..]);
        }
        expect!(!bench.has_faulted(edu.master().streams(), since));
        // Nor can what is not carried be had by asking for it.
        loans.pop().ok_or(board::Error::Missing("loan"))?.unmap()?;
        for at in [0x0807_f000, 0x080a_0000, 0x3fff_f000, 0x4001_0000, 0x4001_f000, 0x4003_0000] {
            let refused = device.map_at::<Bidirectional, _>(Iova::new(at), device.pages(PAGE_SIZE)?);
            expect!(matches!(refused, Err(rejected) if matches!(rejected.error, Error::Iova(_))), "{at:#x}");
        }
        for loan in loans {
            loan.unmap()?;
        }
        Ok(edu.stop()?)
    }
    machine: carried
}
