//! The whole controller against a fake one.

#![allow(unsafe_code)] // Lays register windows over memory.

use crate::fake::{FakeRedistributor, Machine, Quirks, TYPER, build, distributor};
use crate::redistributor;
use crate::*;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use base::cpu::index;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};
use iommu::PhysAddr;
use std::thread;

const DEVICE: u32 = 0x10;

fn counter() -> (Arc<AtomicUsize>, Arc<dyn base::irq::Handler>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let handler = Arc::new(move || {
        seen.fetch_add(1, Ordering::SeqCst);
    });
    (count, handler)
}

fn one(machine: &Machine, device: u32) -> Msi {
    machine.gic.allocate_msi(its(device), 1, index()).unwrap().remove(0)
}

fn its(device: u32) -> Source {
    Source::Its { device }
}

fn device(msi: &Msi) -> u32 {
    let Source::Its { device } = msi.source() else { panic!("{msi:?} is not the ITS's") };
    device
}

fn raise(machine: &Machine, msi: &Msi) -> Option<(u16, u32)> {
    machine.its.0.lock().unwrap().raise(device(msi), msi.data())
}

fn opcodes(machine: &Machine) -> Vec<u8> {
    machine.its.0.lock().unwrap().log.iter().map(|command| command[0] as u8).collect()
}

#[test]
fn a_message_reaches_its_handler() {
    for by_address in [false, true] {
        let machine = Machine::new(Quirks { by_address, ..Default::default() });
        let msi = one(&machine, DEVICE);
        assert_eq!(msi.doorbell(), PhysAddr::new(0x809_0040));
        assert_eq!(raise(&machine, &msi), None, "disabled until it has a handler");
        let (count, handler) = counter();
        machine.gic.enable_msi(&msi, handler).unwrap();
        assert_eq!(raise(&machine, &msi), Some((index() as u16, msi.interrupt())));
        machine.take(msi.interrupt());
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert_eq!(cpu::ENDED.take(), [msi.interrupt()]);
        assert_eq!(machine.gic.stray(), Stray::default());
        let target = machine.its.0.lock().unwrap().collections[&(index() as u16)];
        assert_eq!(target, if by_address { 0x80a_0000 } else { 0 });
    }
}

#[test]
fn a_message_given_back_is_silent_and_its_numbers_return_after_discard_and_sync() {
    let machine = Machine::new(Quirks::default());
    let msi = one(&machine, DEVICE);
    let (event, lpi) = (msi.data(), msi.interrupt());
    let (count, handler) = counter();
    machine.gic.enable_msi(&msi, handler).unwrap();
    let before = opcodes(&machine).len();
    machine.gic.free_msi(msi).unwrap();
    assert_eq!(opcodes(&machine)[before..], [0x0c, 0x0f, 0x05]);
    assert_eq!(machine.its.0.lock().unwrap().raise(DEVICE, event), None);
    assert_eq!(Arc::strong_count(&count), 1, "the handler is dropped");
    let again = one(&machine, DEVICE);
    assert_eq!((again.data(), again.interrupt()), (event, lpi));
    assert_eq!(raise(&machine, &again), None, "the next owner's message starts disabled");
}

#[test]
fn a_message_can_be_moved_to_another_core() {
    let machine = Machine::new(Quirks::default());
    let mut msi = one(&machine, DEVICE);
    machine.gic.enable_msi(&msi, Arc::new(|| {})).unwrap();
    let other = thread::scope(|scope| scope.spawn(|| machine.start(1)).join().unwrap());
    machine.gic.route_msi(&mut msi, other).unwrap();
    assert_eq!(raise(&machine, &msi), Some((other as u16, msi.interrupt())));
    assert_eq!(opcodes(&machine)[opcodes(&machine).len() - 3..], [0x01, 0x05, 0x05]);
    // Indices of threads that have ended are given out again, so this thread's may be any.
    let offline = (0..).find(|core| ![index(), other].contains(core)).unwrap();
    assert_eq!(machine.gic.route_msi(&mut msi, offline), Err(GicError::CoreOffline(offline)));
    machine.gic.free_msi(msi).unwrap();
}

#[test]
fn several_messages_are_consecutive_and_aligned_and_share_a_device() {
    let machine = Machine::new(Quirks::default());
    let first = machine.gic.allocate_msi(its(DEVICE), 1, index()).unwrap();
    let three = machine.gic.allocate_msi(its(DEVICE), 3, index()).unwrap();
    let four = machine.gic.allocate_msi(its(DEVICE), 4, index()).unwrap();
    let data = |all: &[Msi]| all.iter().map(Msi::data).collect::<Vec<_>>();
    assert_eq!((data(&first), data(&three), data(&four)), (vec![0], vec![4, 5, 6], vec![8, 9, 10, 11]));
    let mut lpis: Vec<_> = first.iter().chain(&three).chain(&four).map(Msi::interrupt).collect();
    lpis.dedup();
    assert_eq!(lpis.len(), 8);
    let mapped = opcodes(&machine).iter().filter(|opcode| **opcode == 0x08).count();
    assert_eq!(mapped, 1, "one MAPD for one device");
}

#[test]
fn requests_that_cannot_be_met_are_errors_and_leave_nothing_behind() {
    let machine = Machine::new(Quirks::default());
    let gic = &machine.gic;
    assert_eq!(gic.allocate_msi(its(0x1_0000), 1, index()), Err(GicError::NoSuchDevice(0x1_0000)));
    assert_eq!(gic.allocate_msi(its(DEVICE), 0, index()), Err(GicError::NoEvent(DEVICE)));
    assert_eq!(gic.allocate_msi(its(DEVICE), 2049, index()), Err(GicError::NoEvent(DEVICE)));
    assert_eq!(gic.allocate_msi(its(DEVICE), 8193, index()), Err(GicError::NoLpi));
    assert_eq!(gic.allocate_msi(its(DEVICE), 1, 63), Err(GicError::CoreOffline(63)));
    let full: Vec<_> = (0..4).flat_map(|device| gic.allocate_msi(its(device), 2048, index()).unwrap()).collect();
    assert_eq!(full.iter().map(Msi::interrupt).max(), Some(8192 + 8191));
    assert_eq!(gic.allocate_msi(its(9), 1, index()), Err(GicError::NoLpi));
    for msi in full {
        gic.free_msi(msi).unwrap();
    }
    assert_eq!(gic.allocate_msi(its(0), 2048, index()).map(|all| all.len()), Ok(2048));
    assert_eq!(gic.allocate_msi(its(0), 1, index()), Err(GicError::NoEvent(0)));
}

#[test]
fn the_command_queue_wraps_around() {
    let machine = Machine::new(Quirks::default());
    for _ in 0..1_500 {
        let msi = one(&machine, DEVICE);
        machine.gic.enable_msi(&msi, Arc::new(|| {})).unwrap();
        assert!(raise(&machine, &msi).is_some());
        machine.gic.free_msi(msi).unwrap();
    }
    assert!(opcodes(&machine).len() > 3 * 2048);
}

#[test]
fn cores_allocate_and_free_at_once() {
    let machine = Machine::new(Quirks::default());
    let core = index();
    thread::scope(|scope| {
        for device in 0..4 {
            let machine = &machine;
            scope.spawn(move || {
                for round in 0..200 {
                    let all = machine.gic.allocate_msi(its(device / 2), 1 + round % 3, core).unwrap();
                    for msi in &all {
                        machine.gic.enable_msi(msi, Arc::new(|| {})).unwrap();
                        assert!(raise(machine, msi).is_some());
                    }
                    for msi in all {
                        machine.gic.free_msi(msi).unwrap();
                    }
                }
            });
        }
    });
    assert!(machine.its.0.lock().unwrap().events.is_empty());
}

#[test]
fn an_its_that_does_not_answer_is_a_timeout_and_its_numbers_are_not_used_again() {
    let machine = Machine::new(Quirks::default());
    let msi = one(&machine, DEVICE);
    let lpi = msi.interrupt();
    machine.its.0.lock().unwrap().quirks.mute = true;
    let timed_out = GicError::TimedOut("the ITS did not consume its commands");
    let live = machine.memory.live.load(Ordering::SeqCst);
    assert_eq!(machine.gic.free_msi(msi), Err(timed_out));
    assert_eq!(machine.gic.allocate_msi(its(DEVICE), 1, index()), Err(timed_out));
    assert_eq!(machine.gic.allocate_msi(its(DEVICE + 1), 1, index()), Err(timed_out));
    assert!(machine.memory.live.load(Ordering::SeqCst) > live, "a table the ITS may have taken is not freed");
    machine.its.0.lock().unwrap().quirks.mute = false;
    let next = one(&machine, DEVICE);
    assert!(next.data() == 2 && next.interrupt() != lpi, "{next:?}");
    let events = machine.its.0.lock().unwrap().events.clone();
    assert_eq!(events.len(), 2, "the late command has mapped the event that was given up: {events:?}");
    assert_eq!(events.values().filter(|(lpi, _)| *lpi == next.interrupt()).count(), 1);
}

#[test]
fn an_its_that_stalls_is_dead() {
    let machine = Machine::new(Quirks { stall_at: Some(0x0a), ..Default::default() });
    assert_eq!(machine.gic.allocate_msi(its(DEVICE), 1, index()), Err(GicError::Dead));
    machine.its.0.lock().unwrap().recover();
    assert_eq!(machine.gic.allocate_msi(its(DEVICE), 1, index()), Err(GicError::Dead));
}

#[test]
fn hardware_that_does_not_snoop_gets_non_cacheable_tables() {
    let machine = build(Quirks { no_snoop: true, ..Default::default() }, true).unwrap();
    let register = |offset| regs::Registers::read64(&machine.its, offset);
    for offset in [0x80, 0x100, 0x108] {
        assert_eq!((register(offset) >> 59 & 7, register(offset) >> 10 & 3), (1, 0), "register {offset:#x}");
    }
    machine.redistributors[0].0.lock().unwrap().no_snoop = true;
    machine.start(0);
    for offset in [0x70, 0x78] {
        let value = machine.redistributors[0].register(offset);
        assert_eq!((value >> 7 & 7, value >> 10 & 3), (1, 0), "register {offset:#x}");
    }
    let snooping = Machine::new(Quirks::default());
    let value = regs::Registers::read64(&snooping.its, 0x100);
    assert_eq!((value >> 59 & 7, value >> 10 & 3), (7, 1));
}

#[test]
fn the_only_page_size_of_the_hardware_is_taken() {
    for page_size in 0..3 {
        let machine = Machine::new(Quirks { page_size: Some(page_size), ..Default::default() });
        let value = regs::Registers::read64(&machine.its, 0x100);
        let bytes = ((value & 0xff) + 1) << (12 + 2 * page_size);
        assert_eq!((value >> 8 & 3, bytes), (page_size, 512 << 10), "64 Ki devices of 8 bytes");
        assert!(machine.gic.allocate_msi(its(0xffff), 1, index()).is_ok());
    }
}

#[test]
fn without_an_its_there_are_no_messages_and_everything_else_works() {
    let machine = build(Quirks::default(), false).unwrap();
    machine.start(0);
    assert!(!machine.gic.has_msi());
    assert_eq!(machine.gic.allocate_msi(its(DEVICE), 1, index()), Err(GicError::NoMsi));
    assert_eq!(machine.gic.doorbell(its(DEVICE)), Err(GicError::NoMsi));
    let (count, handler) = counter();
    machine.gic.enable(spi(1).unwrap(), Trigger::Level, Priority::NORMAL, handler).unwrap();
    machine.take(33);
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[test]
fn an_spi_is_configured_enabled_and_routed() {
    let machine = Machine::new(Quirks::default());
    let id = spi(74).unwrap();
    let window = machine.distributor;
    machine.gic.enable(id, Trigger::Edge, Priority::NORMAL, Arc::new(|| {})).unwrap();
    assert_eq!(window.read32(0x100 + 4 * (106 / 32)), 1 << (106 % 32));
    assert_eq!(window.read8(0x400 + 106), 0xa0);
    assert_eq!(window.read32(0xc00 + 4 * (106 / 16)) >> (2 * (106 % 16)) & 3, 2);
    assert_eq!(window.read64(0x6000 + 8 * 106), 0);
    assert_eq!(window.read32(0) & 0x12, 0x12, "affinity routing and group 1");
    let other = thread::scope(|scope| scope.spawn(|| machine.start(1)).join().unwrap());
    machine.gic.route(id, other).unwrap();
    assert_eq!(window.read64(0x6000 + 8 * 106), 1);
    assert_eq!(machine.gic.enable(id, Trigger::Edge, Priority::NORMAL, Arc::new(|| {})), Err(GicError::InUse(106)));
    machine.gic.disable(id).unwrap();
    assert_eq!(window.read32(0x180 + 4 * (106 / 32)), 1 << (106 % 32));
    let beyond = spi(288).unwrap();
    let refused = machine.gic.enable(beyond, Trigger::Edge, Priority::NORMAL, Arc::new(|| {}));
    assert_eq!(refused, Err(GicError::NoSuchInterrupt(320)));
    assert!(spi(988).is_err() && ppi(16).is_err());
}

#[test]
fn a_private_interrupt_is_enabled_on_cores_that_are_up_and_on_those_that_come_up() {
    let machine = Machine::new(Quirks::default());
    let timer = ppi(14).unwrap();
    machine.gic.enable(timer, Trigger::Level, Priority::URGENT, Arc::new(|| {})).unwrap();
    let enabled = |core: usize| machine.redistributors[core].0.lock().unwrap().enabled;
    assert_eq!(enabled(0), 1 << 30 | 0b11);
    assert_eq!(enabled(1), 0);
    thread::scope(|scope| scope.spawn(|| machine.start(1)).join().unwrap());
    assert_eq!(enabled(1), 1 << 30 | 0b11);
    machine.gic.disable(timer).unwrap();
    assert_eq!((enabled(0), enabled(1)), (0b11, 0b11));
}

#[test]
fn an_interrupt_that_nobody_serves_is_counted_and_silenced() {
    let machine = Machine::new(Quirks::default());
    machine.take(40);
    assert_eq!(machine.distributor.read32(0x184), 1 << 8);
    let msi = one(&machine, DEVICE);
    machine.gic.enable_msi(&msi, Arc::new(|| {})).unwrap();
    let other = msi.interrupt() + 1;
    machine.take(other);
    machine.gic.irq_entry();
    assert_eq!(machine.gic.stray(), Stray { spurious: 1, unknown: 2 });
    assert_eq!(cpu::ENDED.take(), [40, other], "a spurious one is not ended, the others are");
    assert_eq!(opcodes(&machine).last(), Some(&0x0d));
    assert!(raise(&machine, &msi).is_some());
}

#[test]
fn kicks_go_to_cores_that_are_up_and_need_no_handler() {
    let machine = Machine::new(Quirks::default());
    let other = thread::scope(|scope| scope.spawn(|| machine.start(1)).join().unwrap());
    machine.gic.kick(u64::MAX);
    let mut sent = cpu::SENT.take();
    sent.sort_unstable();
    assert_eq!(sent, [(0, 0), (0, 1)]);
    machine.gic.send(Sgi::Stop, 1 << other);
    assert_eq!(cpu::SENT.take(), [(1, 1)]);
    machine.take(0);
    assert_eq!(machine.gic.stray(), Stray::default());
}

#[test]
fn a_core_without_a_redistributor_is_refused() {
    let machine = build(Quirks::default(), true).unwrap();
    cpu::AFFINITY.set(7);
    assert_eq!(machine.gic.init_core(), Err(GicError::NoRedistributor(7)));
}

#[test]
fn lpis_that_firmware_keeps_are_refused() {
    let machine = build(Quirks::default(), true).unwrap();
    machine.redistributors[0].0.lock().unwrap().stuck = true;
    cpu::AFFINITY.set(0);
    assert!(matches!(machine.gic.init_core(), Err(GicError::Unsupported(_))));
}

#[test]
fn another_architecture_revision_is_refused() {
    let window = distributor(TYPER);
    window.write32(0xffe8, 0x20);
    let memory = machine_memory();
    // SAFETY: the window is ours alone.
    let refused = unsafe { Gic::new(window, &[], None, &[], memory) };
    assert_eq!(refused.err(), Some(GicError::NotGicV3(2)));
}

fn machine_memory() -> &'static fake::FakeMemory {
    alloc::boxed::Box::leak(alloc::boxed::Box::default())
}

#[test]
fn redistributors_are_found_by_stride_and_last_bit_and_never_outside_their_region() {
    let words = vec![0_u64; 5 * 0x2_0000 / 8].leak();
    // SAFETY: leaked and not referenced elsewhere.
    let region = unsafe { arch::mmio::Mmio::new(NonNull::from(words).cast(), 5 * 0x2_0000) };
    for (frame, (affinity, flags)) in [(0, 0), (1, 2), (9, 0), (2, 0), (3, 0)].into_iter().enumerate() {
        region.write64(frame * 0x2_0000 + 8, affinity << 32 | flags);
        region.write32(frame * 0x2_0000 + 0xffe8, 0x30);
    }
    let find = || {
        let mut found = Vec::new();
        redistributor::find(region, PhysAddr::new(0x80a_0000), &mut found).unwrap();
        found.iter().map(|each| (each.affinity(), each.phys().get())).collect::<Vec<_>>()
    };
    let all = [(0, 0x80a_0000), (1, 0x80c_0000), (2, 0x810_0000), (3, 0x812_0000)];
    assert_eq!(find(), all);
    region.write64(3 * 0x2_0000 + 8, 2 << 32 | 0x10);
    assert_eq!(find(), all[..3]);
    let _ = FakeRedistributor::default();
}
