//! An honest disk.

use super::*;
use crate::fakes::Behaviour;
use crate::spec::blk::{config, feature as blk, request};
use crate::spec::feature;
use dma::{FromDevice, ToDevice};
use iommu::Iova;

#[test]
fn a_read_fills_scattered_pages_by_one_segment() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(16 * 1024);
    block.read(3, &loan, 0..16 * 1024).unwrap().wait(soon()).unwrap();
    assert_eq!(take_back(loan), expected(3, 16 * 1024));
    assert_eq!(rig.disk.log(), [(request::IN, 3, 1)]);
    assert_eq!(rig.system.iommu.faults(), []);
    rig.check();
}

#[test]
fn a_write_reaches_the_disk_and_a_flush_follows_it() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let mut pages = rig.pages(4096);
    pages.write_at(512, &[7; 1024]).unwrap();
    let loan = Arc::new(rig.host.device.map::<ToDevice, _>(pages).unwrap());
    block.write(9, &loan, 512..1536).unwrap().wait(soon()).unwrap();
    block.flush().unwrap().wait(soon()).unwrap();
    assert_eq!(rig.disk.bytes(8 * 512, 512), expected(8, 512));
    assert_eq!(rig.disk.bytes(9 * 512, 1024), [7; 1024]);
    assert_eq!(rig.disk.bytes(11 * 512, 512), expected(11, 512));
    assert_eq!(rig.disk.flushes(), 1);
    rig.check();
}

#[test]
fn a_disk_without_a_cache_is_flushed_without_asking_it() {
    let rig = Rig::new(64, |registers| registers.features &= !blk::FLUSH);
    let block = rig.start(16).unwrap();
    let mut flush = block.flush().unwrap();
    assert!(flush.is_over());
    assert_eq!(flush.wait(now()), Ok(()));
    assert_eq!(rig.disk.flushes(), 0);
}

#[test]
fn the_identification_string_is_read_without_its_padding() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let id = block.id().unwrap().wait(soon()).unwrap();
    assert_eq!(&id[..10], b"fake-disk\0");
}

#[test]
fn sub_ranges_of_one_loan_are_filled_by_many_requests_that_end_in_any_order() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(8 * 512);
    rig.device.plan(&[Behaviour::Keep; 8]);
    let mut transfers: Vec<_> = (0..8).map(|i| block.read(i, &loan, i * 512..(i + 1) * 512).unwrap()).collect();
    assert_eq!(rig.device.kept(), 8);
    while rig.device.release(rig.device.kept() / 2) {}
    transfers.iter_mut().for_each(|transfer| transfer.wait(soon()).unwrap());
    assert_eq!(take_back(loan)[..8 * 512], expected(0, 8 * 512));
    rig.check();
}

#[test]
fn the_ring_wraps_many_times() {
    for indirect in [true, false] {
        let drop_indirect = if indirect { 0 } else { feature::INDIRECT_DESC };
        let rig = Rig::new(64, |registers| registers.features &= !drop_indirect);
        let block = rig.start(4).unwrap();
        for round in 0..70_000_u64 {
            // More rounds than the 16-bit indices have values.
            let mut flush = block.flush().unwrap();
            assert!(flush.is_over(), "round {round}");
            flush.wait(now()).unwrap();
        }
        let loan = rig.lend(512);
        block.read(5, &loan, 0..512).unwrap().wait(now()).unwrap();
        assert_eq!(take_back(loan)[..512], expected(5, 512));
    }
}

#[test]
fn without_indirect_descriptors_requests_are_chains() {
    let rig = Rig::new(64, |registers| {
        registers.features &= !feature::INDIRECT_DESC;
        registers.features |= blk::SIZE_MAX;
        registers.config[config::SIZE_MAX..][..4].copy_from_slice(&4096_u32.to_le_bytes());
    });
    let block = rig.start(16).unwrap();
    let loan = rig.lend(4 * 4096);
    block.read(0, &loan, 0..4 * 4096).unwrap().wait(soon()).unwrap();
    assert_eq!(take_back(loan), expected(0, 4 * 4096));
    assert_eq!(rig.disk.log(), [(request::IN, 0, 4)]);
}

#[test]
fn transfers_are_cut_to_size_max_and_refused_beyond_seg_max() {
    let rig = Rig::new(64, |registers| {
        registers.features |= blk::SIZE_MAX;
        registers.config[config::SIZE_MAX..][..4].copy_from_slice(&2048_u32.to_le_bytes());
        registers.config[config::SEG_MAX..][..4].copy_from_slice(&3_u32.to_le_bytes());
    });
    let block = rig.start(16).unwrap();
    let loan = rig.lend(8192);
    assert_eq!(block.largest_transfer(&*loan, 0), 6144);
    block.read(0, &loan, 0..6144).unwrap().wait(soon()).unwrap();
    assert_eq!(rig.disk.log(), [(request::IN, 0, 3)]);
    let refused = block.read(0, &loan, 0..6656).map(drop);
    assert_eq!(refused, Err(Error::TooManySegments { count: 4, max: 3 }));
    assert_eq!(block.largest_transfer(&*loan, 8192 - 512), 512);
    assert_eq!(block.largest_transfer(&*loan, 9000), 0);
}

#[test]
fn a_batch_rings_the_doorbell_once() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(8 * 512);
    let mut batch = block.batch();
    let mut transfers: Vec<_> = (0..8).map(|i| batch.read(i, &loan, i * 512..(i + 1) * 512).unwrap()).collect();
    assert_eq!(rig.device.notified(), 0);
    drop(batch);
    assert_eq!(rig.device.notified(), 1);
    transfers.iter_mut().for_each(|transfer| transfer.wait(soon()).unwrap());
}

#[test]
fn a_device_that_asked_not_to_be_notified_is_not_until_its_index() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    rig.device.set_eager(false);
    rig.device.ask(0, 2);
    let one = block.flush().unwrap();
    let two = block.flush().unwrap();
    assert_eq!(rig.device.notified(), 0);
    let three = block.flush().unwrap();
    assert_eq!(rig.device.notified(), 1);
    assert_eq!(rig.device.run(9), 3);
    assert!(one.is_over() && two.is_over() && three.is_over());
}

#[test]
fn a_full_ring_is_an_error_and_can_be_waited_for() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(4).unwrap();
    rig.device.plan(&[Behaviour::Keep; 4]);
    let transfers: Vec<_> = (0..4).map(|_| block.flush().unwrap()).collect();
    assert_eq!(block.flush().map(drop), Err(Error::QueueFull));
    assert_eq!(block.wait_for_room(now()), Err(Error::TimedOut));
    rig.device.release(2);
    // The result has not been taken: the descriptor is still the request's.
    assert_eq!(block.flush().map(drop), Err(Error::QueueFull));
    drop(transfers);
    block.wait_for_room(now()).unwrap();
    block.flush().unwrap().wait(soon()).unwrap();
}

#[test]
fn an_interrupt_ends_no_loan_the_waiter_does() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    let mut transfer = block.read(0, &loan, 0..512).unwrap();
    assert!(transfer.is_over());
    assert_eq!(Arc::strong_count(&loan), 2, "the handler must not drop the loan");
    transfer.wait(now()).unwrap();
    assert_eq!(Arc::strong_count(&loan), 1);
    assert_eq!(transfer.wait(now()), Err(Error::AlreadyTaken));
}

#[test]
fn a_dropped_future_leaves_the_loan_with_the_device_until_it_is_done() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    let iova = loan.iova();
    rig.device.plan(&[Behaviour::Keep]);
    drop(block.read(0, &loan, 0..512).unwrap());
    drop(loan);
    block.flush().unwrap().wait(soon()).unwrap();
    assert!(rig.reaches(iova), "the device still has the request");
    rig.device.release(0);
    assert!(rig.reaches(iova), "the handler must not end loans");
    block.flush().unwrap().wait(soon()).unwrap();
    assert!(!rig.reaches(iova), "the next request ends it");
    assert_eq!(rig.host.device.stats().quarantined_pages, 0);
}

#[test]
fn a_forgotten_future_only_leaks() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    let iova = loan.iova();
    rig.device.plan(&[Behaviour::Keep]);
    core::mem::forget(block.read(0, &loan, 0..512).unwrap());
    drop(loan);
    rig.device.release(0);
    block.flush().unwrap().wait(soon()).unwrap();
    assert!(rig.reaches(iova));
}

#[test]
fn what_is_wrong_with_a_transfer_is_found_before_the_device_sees_it() {
    let rig = Rig::new(64, |registers| {
        registers.config[config::BLK_SIZE..][..4].copy_from_slice(&4096_u32.to_le_bytes());
    });
    let block = rig.start(16).unwrap();
    let other = rig.system.device("other").unwrap();
    let foreign: Arc<Loan> = Arc::new(other.device.map(rig.pages(4096)).unwrap());
    assert_eq!(block.read(0, &foreign, 0..4096).map(drop), Err(Error::ForeignDevice));
    let to = Arc::new(rig.host.device.map::<ToDevice, _>(rig.pages(4096)).unwrap());
    assert_eq!(block.read(0, &to, 0..4096).map(drop), Err(Error::WrongDirection("write")));
    let from = Arc::new(rig.host.device.map::<FromDevice, _>(rig.pages(4096)).unwrap());
    assert_eq!(block.write(0, &from, 0..4096).map(drop), Err(Error::WrongDirection("read")));
    let loan = rig.lend(8192);
    let outside = Error::OutsideLoan { offset: 4096, len: 8192, loan: 8192 };
    assert_eq!(block.read(0, &loan, 4096..12288).map(drop), Err(outside));
    #[expect(clippy::reversed_empty_ranges, reason = "that is the point")]
    let reversed = block.read(0, &loan, 4096..0).map(drop);
    assert_eq!(reversed, Err(Error::OutsideLoan { offset: 4096, len: 0, loan: 8192 }));
    for (sector, range) in [(0, 0..512), (1, 0..4096), (0, 0..0)] {
        assert_eq!(block.read(sector, &loan, range).map(drop), Err(Error::Misaligned { block: 4096 }));
    }
    for sector in [64, 56 + 8, u64::MAX - 7] {
        let outside = Error::OutsideDisk { sector, count: 8, capacity: 64 };
        assert_eq!(block.read(sector, &loan, 0..4096).map(drop), Err(outside));
    }
    assert_eq!(rig.device.notified(), 0);
    block.read(56, &loan, 0..4096).unwrap().wait(soon()).unwrap();
    assert_eq!(Arc::strong_count(&loan), 1);
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let rig = Rig::new(64, |registers| registers.features |= blk::RO);
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    assert_eq!(block.write(0, &loan, 0..512).map(drop), Err(Error::ReadOnly));
    block.read(0, &loan, 0..512).unwrap().wait(soon()).unwrap();
}

#[test]
fn shutting_down_ends_every_mapping() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let handler = block.queue_handler();
    let loan = rig.lend(512);
    rig.device.plan(&[Behaviour::Keep]);
    let mut transfer = block.read(0, &loan, 0..512).unwrap();
    block.shut_down(soon()).unwrap();
    assert_eq!(transfer.wait(now()), Err(Error::ShutDown));
    take_back(loan);
    assert_eq!(rig.host.device.stats().live_mappings, 0, "rings are freed although the handler lives");
    base::irq::Handler::handle(&*handler);
    rig.check();
}

#[test]
fn dropping_the_driver_resets_the_device_first() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(512);
    let iova = loan.iova();
    rig.device.plan(&[Behaviour::Keep]);
    let mut transfer = block.read(0, &loan, 0..512).unwrap();
    let resets = rig.device.resets();
    drop(loan);
    drop(block);
    assert_eq!(rig.device.resets(), resets + 1);
    assert!(!rig.reaches(iova));
    assert_eq!(transfer.wait(now()), Err(Error::ShutDown));
}

#[test]
fn futures_are_woken_by_the_interrupt_of_a_device_on_another_core() {
    let rig = Rig::new(256, |_| {});
    let block = rig.start(8).unwrap();
    rig.device.set_eager(false);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                if rig.device.run(3) == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let readers: Vec<_> = (0..3_u64)
            .map(|reader| {
                let (rig, block) = (&rig, &block);
                scope.spawn(move || {
                    for round in 0..100_u64 {
                        let sector = (reader * 37 + round) % 200;
                        let loan = rig.lend(4096);
                        let transfer = loop {
                            match block.read(sector, &loan, 0..4096) {
                                Err(Error::QueueFull) => block.wait_for_room(soon()).unwrap(),
                                other => break other.unwrap(),
                            }
                        };
                        base::block_on(soon(), transfer).unwrap().unwrap();
                        assert_eq!(take_back(loan), expected(sector, 4096));
                    }
                })
            })
            .collect();
        let results: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        assert!(results.iter().all(Result::is_ok));
    });
    assert_eq!(block.stats().completed, 300);
    assert_eq!(rig.system.iommu.faults(), []);
    rig.check();
}

#[test]
fn rings_of_a_device_that_does_not_snoop_are_seen_by_it() {
    let system = FakeSystem::non_coherent();
    let host = system.device("disk").unwrap();
    let disk = MemoryDisk::new(64);
    let device = FakeDevice::new(disk.registers(), disk, Arc::new(host.master.clone()));
    let block = Block::new(device, host.device.clone(), &Options::default(), soon()).unwrap();
    let pages = PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES).unwrap();
    let loan: Arc<Loan> = Arc::new(host.device.map(pages).unwrap());
    block.read(1, &loan, 0..4096).unwrap().wait(soon()).unwrap();
    assert_eq!(take_back(loan), expected(1, 4096));
    assert_eq!(block.shut_down(soon()), Ok(()));
    assert!(host.master.read(Iova::new(0), &mut [0]).is_err());
}

#[test]
fn a_transfer_of_any_length_is_cut_into_requests_that_the_disk_takes() {
    let rig = Rig::new(4096, |registers| {
        registers.features |= blk::SIZE_MAX;
        registers.config[config::SIZE_MAX..][..4].copy_from_slice(&4096_u32.to_le_bytes());
        registers.config[config::SEG_MAX..][..4].copy_from_slice(&3_u32.to_le_bytes());
    });
    let block = rig.start(16).unwrap();
    let loan = rig.lend(1 << 20);
    let range = 512..(1 << 20) - 512;
    base::block_on(soon(), block.read_all(7, &loan, range.clone())).unwrap().unwrap();
    assert_eq!(rig.disk.log().len(), 86);
    base::block_on(soon(), block.write_all(8, &loan, range.clone())).unwrap().unwrap();
    assert_eq!(rig.disk.bytes(8 * 512, (1 << 20) - 1024), expected(7, (1 << 20) - 1024));
    let bytes = take_back(loan);
    assert_eq!(bytes[512..(1 << 20) - 512], expected(7, (1 << 20) - 1024));
    assert_eq!((&bytes[..512], &bytes[(1 << 20) - 512..]), (&[0; 512][..], &[0; 512][..]));
    assert!(rig.device.notified() < 40, "{} doorbells for 172 requests", rig.device.notified());
    rig.check();
}

#[test]
fn a_bulk_transfer_ends_with_the_first_error() {
    let rig = Rig::new(64, |_| {});
    let block = rig.start(16).unwrap();
    let loan = rig.lend(64 * 1024);
    let run = |sector, range| base::block_on(soon(), block.read_all(sector, &loan, range)).unwrap();
    assert_eq!(run(0, 0..0), Err(Error::Misaligned { block: 512 }));
    assert_eq!(run(0, 0..700), Err(Error::Misaligned { block: 512 }));
    assert!(matches!(run(0, 0..64 * 1024), Err(Error::OutsideDisk { .. })));
    assert!(matches!(run(0, 65_536..66_048), Err(Error::OutsideLoan { .. })));
    assert!(matches!(run(0, u64::MAX - 511..u64::MAX), Err(Error::OutsideLoan { .. })));
    rig.disk.answer(&[1]);
    assert_eq!(run(0, 0..512), Err(Error::Io));
    rig.device.plan(&[Behaviour::WrongId(99)]);
    assert!(matches!(run(0, 0..512), Err(Error::DeviceMisbehaved { .. })));
}
