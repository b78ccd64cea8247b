//! GICv2 and message frames against a fake distributor with banked registers.
//!
//! Seen red: with the mask of ITARGETSR fixed to 1 (targets, kicks), with the sender cut off before EOIR, with priorities written
//! without their neighbours, with `forget` left out of `free_msi`, with frames that are not checked against the limit.

use crate::gic::Gic;
use crate::regs::Registers;
use crate::v2::GicV2;
use crate::*;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use base::cpu::index;
use core::sync::atomic::{AtomicUsize, Ordering};
use iommu::PhysAddr;
use std::sync::Mutex;
use std::thread;

/// 8 x 32 interrupts.
const LIMIT: u32 = 256;

/// A distributor and CPU interface. Which core accesses them is told by its index, and its bit in masks is given when it comes.
#[derive(Default)]
struct State {
    /// SPIs, and what is not banked.
    shared: BTreeMap<usize, u32>,
    /// The first 32 interrupts' registers, by core.
    banked: BTreeMap<(usize, usize), u32>,
    enabled: BTreeMap<usize, Vec<bool>>,
    masks: BTreeMap<usize, u8>,
    /// What IAR returns, by core; then spurious.
    pending: BTreeMap<usize, Vec<u32>>,
    ended: Vec<u32>,
    sgis: Vec<u32>,
    forgotten: Vec<u32>,
    revision: u32,
    /// Whether ITARGETSR0 reads as zero.
    alone: bool,
}

#[derive(Clone, Default)]
struct Distributor(Arc<Mutex<State>>);
#[derive(Clone)]
struct Interface(Arc<Mutex<State>>);

fn bits(first: usize, value: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |bit| value >> bit & 1 != 0).map(move |bit| first as u32 + bit)
}

impl State {
    fn enabled(&mut self, core: usize, id: u32) -> &mut bool {
        // An SPI is the same for all.
        let core = if id < 32 { core } else { usize::MAX };
        &mut self.enabled.entry(core).or_insert_with(|| vec![true; LIMIT as usize])[id as usize]
    }

    fn byte(&self, at: usize) -> u8 {
        self.shared.get(&(at & !3)).map_or(0, |word| word.to_le_bytes()[at & 3])
    }
}

impl Registers for Distributor {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.0.lock().unwrap();
        match offset {
            0x4 => LIMIT / 32 - 1,
            0xfe8 => state.revision << 4,
            0x800..0x820 if state.alone => 0,
            0x800..0x820 => u32::from_ne_bytes([state.masks.get(&index()).copied().unwrap_or(0); 4]),
            0x400..0x420 | 0xc00..0xc08 => state.banked.get(&(index(), offset)).copied().unwrap_or(0),
            _ => state.shared.get(&offset).copied().unwrap_or(0),
        }
    }
    fn write32(&self, offset: usize, value: u32) {
        let mut state = self.0.lock().unwrap();
        let core = index();
        match offset {
            0x100..0x180 => bits((offset - 0x100) * 8, value).for_each(|id| *state.enabled(core, id) = true),
            0x180..0x200 => {
                bits((offset - 0x180) * 8, value)
                    .filter(|id| *id < LIMIT)
                    .for_each(|id| *state.enabled(core, id) = false);
            }
            0x280..0x300 => state.forgotten.extend(bits((offset - 0x280) * 8, value)),
            0x400..0x420 | 0xc00..0xc08 => drop(state.banked.insert((core, offset), value)),
            0xf00 => state.sgis.push(value),
            _ => drop(state.shared.insert(offset, value)),
        }
    }
    fn read64(&self, _: usize) -> u64 {
        panic!("a GICv2 has no 64-bit registers")
    }
    fn write64(&self, _: usize, _: u64) {
        panic!("a GICv2 has no 64-bit registers")
    }
}

impl Registers for Interface {
    fn read32(&self, offset: usize) -> u32 {
        assert_eq!(offset, 0xc, "only IAR is read");
        self.0.lock().unwrap().pending.get_mut(&index()).and_then(Vec::pop).unwrap_or(1023)
    }
    fn write32(&self, offset: usize, value: u32) {
        let mut state = self.0.lock().unwrap();
        if offset == 0x10 {
            state.ended.push(value);
        } else {
            state.banked.insert((index(), 0x1_0000 + offset), value);
        }
    }
    fn read64(&self, _: usize) -> u64 {
        panic!("a GICv2 has no 64-bit registers")
    }
    fn write64(&self, _: usize, _: u64) {
        panic!("a GICv2 has no 64-bit registers")
    }
}

struct Machine {
    gic: Gic,
    state: Arc<Mutex<State>>,
}

impl Machine {
    /// This thread is the core with bit 0.
    fn new() -> Self {
        let distributor = Distributor::default();
        let state = distributor.0.clone();
        state.lock().unwrap().revision = 2;
        let v2 = GicV2::new(Box::new(distributor), Box::new(Interface(state.clone()))).unwrap();
        let machine = Self { gic: Gic::of_v2(v2).unwrap(), state };
        machine.start(1);
        machine
    }

    fn start(&self, mask: u8) -> usize {
        self.state.lock().unwrap().masks.insert(index(), mask);
        self.gic.init_core().unwrap();
        index()
    }

    fn take(&self, iar: u32) {
        self.state.lock().unwrap().pending.entry(index()).or_default().push(iar);
        self.gic.irq_entry();
    }

    fn is_enabled(&self, core: usize, id: u32) -> bool {
        *self.state.lock().unwrap().enabled(core, id)
    }
}

fn counter() -> (Arc<AtomicUsize>, Arc<dyn base::irq::Handler>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = count.clone();
    let handler = Arc::new(move || {
        seen.fetch_add(1, Ordering::SeqCst);
    });
    (count, handler)
}

#[test]
fn nothing_is_enabled_at_first_but_kicks_and_stops() {
    let machine = Machine::new();
    let enabled: Vec<u32> = (0..LIMIT).filter(|id| machine.is_enabled(index(), *id)).collect();
    assert_eq!(enabled, [0, 1]);
    let state = machine.state.lock().unwrap();
    assert_eq!(state.shared[&0], 1, "forwarding");
    let interface = |offset: usize| state.banked[&(index(), 0x1_0000 + offset)];
    assert_eq!((interface(0), interface(4)), (1, 0xff));
}

#[test]
fn an_spi_is_configured_beside_its_neighbours_and_goes_to_one_core() {
    let machine = Machine::new();
    let before = spi(9).unwrap();
    machine.gic.enable(before, Trigger::Level, Priority::URGENT, Arc::new(|| {})).unwrap();
    let (count, handler) = counter();
    let id = spi(10).unwrap();
    machine.gic.enable(id, Trigger::Edge, Priority::NORMAL, handler).unwrap();
    {
        let state = machine.state.lock().unwrap();
        assert_eq!((state.byte(0x400 + 41), state.byte(0x400 + 42)), (0x80, 0xa0));
        assert_eq!((state.byte(0x800 + 41), state.byte(0x800 + 42)), (1, 1));
        assert_eq!(state.shared[&0xc08] >> 18 & 0xf, 0b1000, "level, then edge");
    }
    machine.take(42);
    assert_eq!((count.load(Ordering::SeqCst), machine.gic.stray()), (1, Stray::default()));
    let other = thread::scope(|scope| scope.spawn(|| machine.start(4)).join().unwrap());
    machine.gic.route(id, other).unwrap();
    assert_eq!(machine.state.lock().unwrap().byte(0x800 + 42), 4);
    machine.gic.disable(id).unwrap();
    assert!(!machine.is_enabled(0, 42) && machine.is_enabled(0, 41));
    let beyond = spi(LIMIT - 32).unwrap();
    let refused = machine.gic.enable(beyond, Trigger::Edge, Priority::NORMAL, Arc::new(|| {}));
    assert_eq!(refused, Err(GicError::NoSuchInterrupt(LIMIT)));
}

#[test]
fn an_sgi_is_ended_with_its_sender_and_kicks_go_to_cores_that_are_up() {
    let machine = Machine::new();
    let other = thread::scope(|scope| scope.spawn(|| machine.start(8)).join().unwrap());
    machine.gic.kick(u64::MAX);
    machine.gic.send(Sgi::Stop, 1 << other);
    machine.gic.send(Sgi::Stop, !(1 << other | 1 << index()));
    assert_eq!(machine.state.lock().unwrap().sgis, [9 << 16, 8 << 16 | 1], "nobody is up to hear the last one");
    machine.take(3 << 10);
    assert_eq!(machine.state.lock().unwrap().ended, [3 << 10]);
    assert_eq!(machine.gic.stray(), Stray::default());
}

#[test]
fn a_private_interrupt_reaches_cores_that_are_up_by_a_kick_and_later_ones_when_they_come() {
    let machine = Machine::new();
    let timer = ppi(11).unwrap();
    thread::scope(|scope| {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let (up, is_up) = std::sync::mpsc::channel::<usize>();
        let machine = &machine;
        let second = scope.spawn(move || {
            let core = machine.start(2);
            up.send(core).unwrap();
            wait.recv().unwrap();
            assert!(!machine.is_enabled(core, 27), "no core changes another's");
            machine.take(1 << 10);
            assert!(machine.is_enabled(core, 27));
            wait.recv().unwrap();
            machine.take(1 << 10);
            assert!(!machine.is_enabled(core, 27));
        });
        is_up.recv().unwrap();
        machine.gic.enable(timer, Trigger::Level, Priority::URGENT, Arc::new(|| {})).unwrap();
        assert!(machine.is_enabled(index(), 27));
        go.send(()).unwrap();
        let third = scope.spawn(|| machine.start(4)).join().unwrap();
        assert!(machine.is_enabled(third, 27));
        while !machine.is_enabled(second_core(machine), 27) {
            thread::yield_now();
        }
        machine.gic.disable(timer).unwrap();
        assert!(!machine.is_enabled(index(), 27));
        go.send(()).unwrap();
        second.join().unwrap();
    });
}

/// The core with bit 1.
fn second_core(machine: &Machine) -> usize {
    *machine.state.lock().unwrap().masks.iter().find(|(_, mask)| **mask == 2).unwrap().0
}

#[test]
fn an_interrupt_that_nobody_serves_is_counted_and_silenced() {
    let machine = Machine::new();
    *machine.state.lock().unwrap().enabled(0, 50) = true;
    machine.take(50);
    machine.take(1023);
    machine.take(1022);
    assert!(!machine.is_enabled(0, 50));
    assert_eq!(machine.gic.stray(), Stray { spurious: 2, unknown: 1 });
    assert_eq!(machine.state.lock().unwrap().ended, [50]);
}

#[test]
fn the_only_core_need_not_have_a_bit_and_no_core_has_two() {
    let machine = Machine::new();
    machine.state.lock().unwrap().alone = true;
    machine.gic.init_core().unwrap();
    machine.state.lock().unwrap().alone = false;
    machine.state.lock().unwrap().masks.insert(index(), 3);
    assert!(matches!(machine.gic.init_core(), Err(GicError::Unsupported(_))));
}

#[test]
fn a_gicv3_is_not_driven_as_a_gicv2() {
    let distributor = Distributor::default();
    let state = distributor.0.clone();
    state.lock().unwrap().revision = 3;
    let refused = GicV2::new(Box::new(distributor), Box::new(Interface(state)));
    assert_eq!(refused.err(), Some(GicError::NotGicV2(3)));
}

/// A frame's registers: only MSI_TYPER.
struct Typer(u32);

impl Registers for Typer {
    fn read32(&self, offset: usize) -> u32 {
        if offset == 8 { self.0 } else { 0 }
    }
    fn write32(&self, _: usize, _: u32) {}
    fn read64(&self, _: usize) -> u64 {
        0
    }
    fn write64(&self, _: usize, _: u64) {}
}

const FRAME: Source = Source::Frame(0);

/// A machine with a frame of 16 SPIs from 83 on.
fn with_frame() -> Machine {
    let mut machine = Machine::new();
    machine.gic.add_frame(&Typer(83 << 16 | 16), PhysAddr::new(0x802_0000), None, None).unwrap();
    machine
}

#[test]
fn a_frames_message_is_an_edge_and_given_back_it_is_silent_and_forgotten() {
    let machine = with_frame();
    assert!(machine.gic.has_msi());
    assert_eq!(machine.gic.doorbell(FRAME), Ok(PhysAddr::new(0x802_0040)));
    let msi = machine.gic.allocate_msi(FRAME, 1, index()).unwrap().remove(0);
    assert_eq!((msi.data(), msi.interrupt(), msi.doorbell().get()), (83, 83, 0x802_0040));
    let (count, handler) = counter();
    machine.gic.enable_msi(&msi, handler).unwrap();
    assert!(machine.is_enabled(0, 83));
    assert_eq!(machine.state.lock().unwrap().shared[&0xc14] >> 6 & 3, 2, "edge");
    machine.take(83);
    assert_eq!(count.load(Ordering::SeqCst), 1);
    machine.state.lock().unwrap().forgotten.clear();
    machine.gic.free_msi(msi).unwrap();
    assert!(!machine.is_enabled(0, 83));
    assert_eq!(Arc::strong_count(&count), 1, "the handler is dropped");
    assert_eq!(machine.state.lock().unwrap().forgotten, [83]);
    let again = machine.gic.allocate_msi(FRAME, 1, index()).unwrap().remove(0);
    assert_eq!(again.data(), 83);
    machine.gic.free_msi(again).unwrap();
}

#[test]
fn a_frame_gives_what_it_has_aligned_and_no_more() {
    let machine = with_frame();
    let gic = &machine.gic;
    let data = |all: &[Msi]| all.iter().map(Msi::data).collect::<Vec<_>>();
    let three = gic.allocate_msi(FRAME, 3, index()).unwrap();
    let one = gic.allocate_msi(FRAME, 1, index()).unwrap();
    let eight = gic.allocate_msi(FRAME, 8, index()).unwrap();
    assert_eq!((data(&three), data(&one)), (vec![84, 85, 86], vec![83]));
    assert_eq!(data(&eight), (88..96).collect::<Vec<_>>());
    assert!(gic.can_allocate(FRAME, 4) && !gic.can_allocate(FRAME, 5) && !gic.can_allocate(Source::Frame(1), 1));
    assert_eq!(gic.allocate_msi(FRAME, 4, index()), Err(GicError::NoSpi), "four, but not in a row");
    assert_eq!(gic.allocate_msi(FRAME, 0, index()), Err(GicError::NoSpi));
    assert_eq!(gic.allocate_msi(FRAME, usize::MAX / 2, index()), Err(GicError::OutOfMemory));
    assert_eq!(gic.allocate_msi(Source::Frame(1), 1, index()), Err(GicError::NoMsi));
    assert_eq!(gic.allocate_msi(Source::Its { device: 8 }, 1, index()), Err(GicError::NoMsi));
    assert_eq!(gic.allocate_msi(FRAME, 1, 63), Err(GicError::CoreOffline(63)));
    for msi in three.into_iter().chain(one).chain(eight) {
        gic.free_msi(msi).unwrap();
    }
    assert!(gic.can_allocate(FRAME, 16));
}

#[test]
fn a_frame_whose_interrupts_are_not_spis_is_refused_and_the_trees_numbers_count() {
    let mut machine = Machine::new();
    let mut add = |typer, first, count| machine.gic.add_frame(&Typer(typer), PhysAddr::new(0x802_0000), first, count);
    for (first, count) in [(16, 8), (32, 0), (LIMIT - 8, 9), (1023, 1023), (0, 0)] {
        assert_eq!(add(first << 16 | count, None, None), Err(GicError::BadFrame { first, count }));
    }
    assert!(add(0, Some(u32::MAX), Some(2)).is_err());
    add(0, Some(64), Some(2)).unwrap();
    let core = index();
    assert_eq!(machine.gic.allocate_msi(FRAME, 2, core).unwrap().last().map(Msi::data), Some(65));
}

#[test]
fn a_message_and_a_wire_do_not_share_an_interrupt() {
    let machine = with_frame();
    machine.gic.enable(spi(51).unwrap(), Trigger::Level, Priority::NORMAL, Arc::new(|| {})).unwrap();
    // What the wire has is not given out, and stays when all messages have come back. (Seen red: a message was made of it, and
    // silenced the wire when it was given back.)
    assert_eq!(machine.gic.allocate_msi(FRAME, 16, index()), Err(GicError::NoSpi));
    let all: Vec<Msi> = (0..15).map(|_| machine.gic.allocate_msi(FRAME, 1, index()).unwrap().remove(0)).collect();
    assert!(all.iter().all(|msi| msi.data() != 83) && !machine.gic.can_allocate(FRAME, 1));
    // Nor is what a message has given to a wire.
    let wire = spi(52).unwrap();
    assert_eq!(machine.gic.enable(wire, Trigger::Level, Priority::NORMAL, Arc::new(|| {})), Err(GicError::InUse(84)));
    all.into_iter().for_each(|msi| machine.gic.free_msi(msi).unwrap());
    assert!(machine.is_enabled(0, 83), "the wire's stays");
    machine.gic.enable(wire, Trigger::Level, Priority::NORMAL, Arc::new(|| {})).unwrap();
}

#[test]
fn a_message_can_be_moved_to_another_core() {
    let machine = with_frame();
    let mut msi = machine.gic.allocate_msi(FRAME, 1, index()).unwrap().remove(0);
    machine.gic.enable_msi(&msi, Arc::new(|| {})).unwrap();
    let other = thread::scope(|scope| scope.spawn(|| machine.start(16)).join().unwrap());
    machine.gic.route_msi(&mut msi, other).unwrap();
    assert_eq!((machine.state.lock().unwrap().byte(0x800 + 83), msi.core()), (16, other));
    machine.gic.free_msi(msi).unwrap();
}
