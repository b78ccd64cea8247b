//! R8: several cores map, unmap and look at once, while the device does what it wants.

use dma::fakes::FakeSystem;
use dma::{Bidirectional, FromDevice, Ladder, PageSet, SharedBuffer, ToDevice};
use std::sync::atomic::{AtomicBool, Ordering};

/// Caught: `Held::end` without `Loan::end`.
#[test]
fn threads_that_share_a_device_do_not_get_into_each_others_memory() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (blk, system) = (&blk, &system);
            scope.spawn(move || {
                let mut set = PageSet::zeroed(system.memory, 3 * 4096, Ladder::SINGLE_PAGES).unwrap();
                for round in 0..400_u32 {
                    let value = [thread, round as u8, (round >> 8) as u8, 0x5a];
                    let mapped = blk.device.map::<FromDevice, _>(set).unwrap();
                    let iova = mapped.iova();
                    blk.master.write(iova.checked_add(4094).unwrap(), &value).unwrap();
                    assert_eq!(mapped.view().read_array::<4>(4094).unwrap(), value);
                    set = mapped.unmap().unwrap();
                    let mut seen = [0; 4];
                    set.read_at(4094, &mut seen).unwrap();
                    assert_eq!(seen, value);
                    if round % 50 == 0 {
                        assert!(!blk.device.explain(iova).to_string().is_empty());
                    }
                }
            });
        }
    });
    let stats = blk.device.stats();
    assert_eq!((stats.live_mappings, stats.live_bytes, stats.total_mappings), (0, 0, 1600));
    assert_eq!(system.memory.violations(), Vec::<String>::new());
    assert_eq!(system.memory.live_allocations(), 0);
}

#[test]
fn a_hostile_device_that_writes_all_the_time_reaches_only_what_is_lent() {
    let system = FakeSystem::new();
    let blk = system.device("blk").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut page = 0;
            while !stop.load(Ordering::SeqCst) {
                page = (page + 1) % 64;
                let _ = blk.master.write(iommu::Iova::new(page * 4096), &[0xff; 64]);
            }
        });
        let mut pages = blk.device.pages(4096).unwrap();
        for _ in 0..2_000 {
            let mapped = blk.device.map::<Bidirectional, _>(pages).unwrap();
            let _ = mapped.view().read_array::<64>(0).unwrap();
            pages = mapped.unmap().unwrap();
            // Ours again: nothing changes any more.
            pages.as_mut_slice().fill(0);
            assert!(pages.as_slice().iter().all(|byte| *byte == 0));
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(system.memory.violations(), Vec::<String>::new());
}

#[test]
fn attachments_and_accesses_of_many_threads_keep_the_rules_of_a_shared_buffer() {
    let system = FakeSystem::new();
    let (blk, gpu) = (system.device("blk").unwrap(), system.device("gpu").unwrap());
    let picture = SharedBuffer::new("picture", PageSet::zeroed(system.memory, 4096, Ladder::SINGLE_PAGES).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (picture, blk, gpu) = (&picture, &blk, &gpu);
            scope.spawn(move || {
                for _ in 0..500 {
                    match thread {
                        0 => drop(picture.attach::<FromDevice>(&blk.device)),
                        1 => drop(picture.attach::<ToDevice>(&gpu.device)),
                        2 => {
                            if let Ok(access) = picture.cpu_access::<dma::CpuReads>() {
                                let mut bytes = [0; 16];
                                access.read_at(0, &mut bytes).unwrap();
                                let users = picture.users();
                                assert_eq!((users.device_writers, users.cpu_writers), (0, 0));
                            }
                        }
                        _ => {
                            if let Ok(mut access) = picture.cpu_access::<dma::CpuWrites>() {
                                access.write_at(0, &[1; 16]).unwrap();
                                let users = picture.users();
                                assert_eq!((users.device_writers, users.cpu_readers), (0, 0));
                            }
                        }
                    }
                }
            });
        }
    });
    assert_eq!(picture.users(), dma::Users::default());
    picture.into_pages().unwrap();
    assert_eq!(system.memory.violations(), Vec::<String>::new());
}
