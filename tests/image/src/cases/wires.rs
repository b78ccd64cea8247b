//! Interrupts by wire: shared lines, of disks that send no messages or whose messages nothing takes.
//!
//! Three disks stand in slots 2, 6 and 10, whose INTA is one interrupt on QEMU's virt; one stands behind a switch and a bridge to
//! conventional PCI, one behind a further host bridge.

use super::pattern;
use crate::bench::{Bench, soon};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{Deadline, block_on};
use board::{BlockDisk, Signal};
use dma::{FromDevice, Ladder, Limits, Mapped, PageSet, ToDevice};
use kernel::class::Disk;
use ktest::{Outcome, TestResult, expect, expect_eq, ktest};
use pci::PciError;
use virtio::blk::{Block, Options};
use virtio::transport::PciTransport;

fn disk(bench: &Bench, nth: usize) -> Result<BlockDisk, Outcome> {
    let (host, function) = bench.function(0x1af4, 0x1042, nth)?;
    Ok(BlockDisk::start(bench.hardware.attach(host, &function, "virtio-blk", Limits::NONE, false)?)?)
}

fn lent(disk: &Block, len: u64) -> Result<Arc<Mapped<FromDevice, PageSet>>, Outcome> {
    let pages = disk.device().page_set(len, Ladder::SINGLE_PAGES)?;
    Ok(Arc::new(disk.device().map(pages).map_err(|rejected| rejected.error)?))
}

/// Reads one page, awaiting the interrupt.
fn read(disk: &BlockDisk) -> TestResult {
    let loan = lent(disk.block(), 4096)?;
    block_on(soon(), disk.block().read(0, &loan, 0..4096)?)??;
    Ok(())
}

ktest! {
    fn what_was_written_is_what_is_read_with_an_interrupt_by_wire_for_each(bench) {
        let disk = disk(bench, 0)?;
        // The end of the disk holds nothing but the backup partition table.
        let scratch = disk.block().geometry().sectors - 8192;
        expect_eq!(disk.signal(), Signal::Wire);
        expect!(disk.master().function().may_use_wire());
        for round in 0..50 {
            let bytes = pattern(round, 16 << 10);
            let mut pages = disk.device().page_set(bytes.len() as u64, Ladder::SINGLE_PAGES)?;
            pages.write_at(0, &bytes)?;
            let out = Arc::new(disk.device().map::<ToDevice, _>(pages).map_err(|rejected| rejected.error)?);
            block_on(soon(), disk.block().write(scratch, &out, 0..bytes.len() as u64)?)??;
            let into = lent(disk.block(), bytes.len() as u64)?;
            block_on(soon(), disk.block().read(scratch, &into, 0..bytes.len() as u64)?)??;
            let mapped = Arc::try_unwrap(into).map_err(|_| board::Error::Missing("last owner of a loan"))?;
            let mut found = alloc::vec![0; bytes.len()];
            mapped.unmap()?.read_at(0, &mut found)?;
            expect!(found == bytes, "round {round}");
        }
        expect!(disk.wire().is_some_and(|wire| wire.served() >= 100), "a write and a read in each round");
        let function = disk.master().function().clone();
        disk.stop()?;
        expect!(!function.may_use_wire());
        Ok(())
    }
    machine: intx
}

ktest! {
    fn disks_on_one_line_work_at_once_and_go_one_by_one(bench) {
        let mut disks = [disk(bench, 0)?, disk(bench, 1)?, disk(bench, 3)?].into_iter().collect::<Vec<_>>();
        let line = |disk: &BlockDisk| bench.boot.machine.pcie[0].intx.lookup(disk.master().function().bdf().device(), 1);
        expect!(line(&disks[0]).is_some() && line(&disks[0]) == line(&disks[1]) && line(&disks[1]) == line(&disks[2]));
        while !disks.is_empty() {
            let mut transfers = Vec::new();
            for index in 0..64 {
                for disk in &disks {
                    transfers.push(disk.block().read(index * 8, &lent(disk.block(), 4096)?, 0..4096)?);
                }
            }
            for transfer in transfers {
                block_on(soon(), transfer)??;
            }
            disks.swap_remove(0).stop()?;
        }
        Ok(())
    }
    machine: intx
}

ktest! {
    fn a_disk_interrupts_by_its_own_wire_wherever_it_stands(bench) {
        let mut places = Vec::new();
        for nth in 0..5 {
            let disk = disk(bench, nth)?;
            let served = |disk: &BlockDisk| disk.wire().map_or(0, pci::Wire::served);
            let before = served(&disk);
            read(&disk)?;
            expect!(served(&disk) > before, "disk {nth}");
            let function = disk.master().function();
            places.push((function.bdf().bus(), function.requester_id() != function.bdf().requester_id()));
            disk.stop()?;
        }
        expect!(places.contains(&(0, false)));
        expect!(places.iter().any(|(bus, alias)| *bus != 0 && *bus < 0x80 && *alias), "behind conventional PCI: {places:?}");
        expect!(places.iter().any(|(bus, _)| *bus > 0x80), "behind the further host bridge: {places:?}");
        Ok(())
    }
    machine: intx
}

ktest! {
    fn a_line_that_nobody_claims_is_masked_and_the_machine_goes_on(bench) {
        let (user, stranger) = (disk(bench, 0)?, bench.function(0x1af4, 0x1042, 1)?);
        read(&user)?;
        // A driver that lets its device use the wire, and does not serve it.
        let master = bench.hardware.attach(stranger.0, &stranger.1, "virtio-blk", Limits::NONE, false)?;
        master.release()?;
        let transport = Arc::new(PciTransport::new(master.function().clone())?);
        let block = Block::new(transport.clone(), master.device().clone(), &Options::default(), soon())?;
        let loan = lent(&block, 4096)?;
        master.function().set_wired_interrupt(true);
        let transfer = block.read(0, &loan, 0..4096)?;
        let _ = base::wait_until(Deadline::after_millis(300), || false);
        expect!(master.function().asserts_wire());
        // Who comes to the line is told, and nobody waits for ever.
        let refused = master.connect_wire(Arc::new(|| {}));
        expect!(matches!(refused, Err(board::Error::Pci { error: PciError::LineMasked, .. })));
        let lost = user.block().read(0, &lent(user.block(), 4096)?, 0..4096)?;
        drop(block_on(Deadline::after_millis(100), lost));
        user.stop()?;
        drop(transfer);
        block.shut_down(soon())?;
        master.function().set_wired_interrupt(false);
        master.arrest()?;
        drop(loan);
        // With all of its users gone the line is as new.
        let again = disk(bench, 0)?;
        read(&again)?;
        again.stop()?;
        Ok(())
    }
    machine: intx
}

ktest! {
    fn a_device_that_does_not_take_its_interrupt_back_loses_its_wire_and_no_other_does(bench) {
        let (user, stuck) = (disk(bench, 0)?, bench.function(0x1af4, 0x1042, 1)?);
        let master = bench.hardware.attach(stuck.0, &stuck.1, "virtio-blk", Limits::NONE, false)?;
        master.release()?;
        let transport = Arc::new(PciTransport::new(master.function().clone())?);
        let block = Block::new(transport, master.device().clone(), &Options::default(), soon())?;
        let wire = master.connect_wire(Arc::new(|| {}))?;
        let loan = lent(&block, 4096)?;
        drop(block.read(0, &loan, 0..4096)?);
        let _ = base::wait_until(soon(), || wire.line().trouble().is_some());
        expect_eq!(wire.line().trouble(), Some(PciError::WireStuck(master.function().bdf())));
        expect!(!master.function().may_use_wire());
        for _ in 0..10 {
            read(&user)?;
        }
        drop(wire);
        block.shut_down(soon())?;
        master.arrest()?;
        user.stop()?;
        Ok(())
    }
    machine: intx
}
