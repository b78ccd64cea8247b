//! The drivers against devices in memory.

use crate::edu::{BUFFER_SIZE, Completion};
use crate::{Edu, IommuTestdev, TestdevError, edu, iommu_testdev};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use arch::mmio::Registers;
use base::{Deadline, Instant};
use iommu::{Iova, PhysAddr};
use pci::fake::{FakeEnv, FakeFunction, FakeMsi, FakeSpace};
use pci::{Function, Host, Window, WindowKind};
use std::boxed::Box;
use std::sync::Mutex;

/// Memory that the fake device can reach: one page at this address.
const PAGE: u64 = 0x4000_0000;

/// An edu that finishes a transfer when its command register has been looked at `delay` times, or, with interrupts, at once.
struct FakeEdu {
    state: Mutex<State>,
    controller: Option<Arc<FakeMsi>>,
}

struct State {
    id: u32,
    liveness: u32,
    status: u32,
    dma: [u64; 4],
    delay: usize,
    /// Never finishes.
    stuck: bool,
    buffer: Vec<u8>,
    page: Vec<u8>,
}

impl FakeEdu {
    fn new(controller: Option<Arc<FakeMsi>>) -> Arc<Self> {
        let state = State {
            id: 0x0100_00ed,
            liveness: 0,
            status: 0,
            dma: [0; 4],
            delay: 3,
            stuck: false,
            buffer: vec![0; 4096],
            page: vec![0; 4096],
        };
        Arc::new(Self { state: Mutex::new(state), controller })
    }

    /// Sets status bits and sends the message, with no lock held: the handler reads registers.
    fn interrupt(&self, bits: u32) {
        self.state.lock().unwrap().status |= bits;
        if let Some(controller) = &self.controller {
            controller.raise(pci::RequesterId::new(8), 0);
        }
    }
}

impl State {
    fn copy(&mut self) {
        let [source, destination, count, command] = self.dma;
        let (memory, buffer) = if command & 2 != 0 { (destination, source) } else { (source, destination) };
        let (from, count) = ((buffer - 0x4_0000) as usize, count as usize);
        assert!(from + count < 4096, "QEMU would end here");
        let device = &mut self.buffer[from..from + count];
        match memory.checked_sub(PAGE).filter(|offset| *offset + count as u64 <= 4096) {
            Some(offset) if command & 2 != 0 => {
                self.page[offset as usize..offset as usize + count].copy_from_slice(device);
            }
            Some(offset) => device.copy_from_slice(&self.page[offset as usize..offset as usize + count]),
            None if command & 2 != 0 => {}
            None => device.fill(0),
        }
        self.dma[3] &= !1;
    }
}

impl Registers for FakeEdu {
    fn read32(&self, offset: usize) -> u32 {
        let state = self.state.lock().unwrap();
        match offset {
            0x00 => state.id,
            0x04 => !state.liveness,
            0x08 => 120,
            0x24 => state.status,
            _ => 0,
        }
    }
    fn write32(&self, offset: usize, value: u32) {
        match offset {
            0x04 => self.state.lock().unwrap().liveness = value,
            0x60 => self.interrupt(value),
            0x64 => self.state.lock().unwrap().status &= !value,
            _ => {}
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        let mut state = self.state.lock().unwrap();
        if offset == 0x98 && state.dma[3] & 1 != 0 && !state.stuck {
            state.delay -= 1;
            if state.delay == 0 {
                state.copy();
            }
        }
        state.dma[(offset - 0x80) / 8]
    }
    fn write64(&self, offset: usize, value: u64) {
        let mut state = self.state.lock().unwrap();
        state.dma[(offset - 0x80) / 8] = value;
        if offset == 0x98 && value & 5 == 5 && !state.stuck {
            state.copy();
            drop(state);
            self.interrupt(0x100);
        }
    }
}

fn function(device: FakeFunction) -> Arc<Function> {
    let memory = WindowKind::Memory { prefetchable: false };
    let windows = [Window { kind: memory, bus: 0x1000_0000, phys: PhysAddr::new(0x1000_0000), len: 0x1000_0000 }];
    let env = Arc::new(FakeEnv::default());
    let host = Host::with_space(FakeSpace::new(0, vec![device]), 0, 0..=0, &windows, env).unwrap();
    host.functions()[0].clone()
}

fn edu_function() -> Arc<Function> {
    function(FakeFunction::endpoint(1, 0, edu::ID.0, edu::ID.1).bar32(0, 1 << 20, false).msi64())
}

fn with_interrupt() -> (Edu, Arc<FakeEdu>) {
    let controller = Arc::new(FakeMsi::default());
    let device = FakeEdu::new(Some(controller.clone()));
    let edu = Edu::with_registers(edu_function(), device.clone(), Some(controller)).unwrap();
    (edu, device)
}

fn soon() -> Deadline {
    Deadline::after_millis(10_000)
}

#[test]
fn bytes_go_to_the_device_and_back() {
    for by in [Completion::Interrupt, Completion::Polling] {
        let (edu, device) = with_interrupt();
        device.state.lock().unwrap().page[16..20].copy_from_slice(b"edu!");
        edu.dma_to_device(Iova::new(PAGE + 16), 4, by, soon()).unwrap();
        assert_eq!(device.state.lock().unwrap().buffer[..4], *b"edu!");
        device.state.lock().unwrap().delay = 1;
        edu.dma_from_device(Iova::new(PAGE + 100), 4, by, soon()).unwrap();
        assert_eq!(device.state.lock().unwrap().page[100..104], *b"edu!");
        assert_eq!(edu.interrupts(), if by == Completion::Interrupt { 2 } else { 0 });
        assert_eq!(device.state.lock().unwrap().status, 0, "acknowledged");
    }
}

#[test]
fn a_transfer_never_reaches_the_last_word_of_the_buffer_or_past_it() {
    let (edu, _device) = with_interrupt();
    let transfer = |offset, len| {
        edu.transfer(edu::Direction::ToDevice, Iova::new(PAGE), offset, len, Completion::Interrupt, soon())
    };
    for (offset, len) in [(0, 4096), (0, 4093), (4092, 4), (1, 4092), (u32::MAX, 2), (0, u32::MAX), (0, 0), (4096, 1)] {
        let refused = TestdevError::OutsideBuffer { offset, len, size: BUFFER_SIZE };
        assert_eq!(transfer(offset, len), Err(refused));
    }
    assert_eq!(transfer(0, 4092), Ok(()));
    assert_eq!(transfer(4088, 4), Ok(()));
}

#[test]
fn a_transfer_that_does_not_end_times_out_and_the_device_stays_busy() {
    let (edu, device) = with_interrupt();
    device.state.lock().unwrap().stuck = true;
    for by in [Completion::Interrupt, Completion::Polling] {
        let past = Deadline::at(Instant::from_nanos(0));
        assert_eq!(edu.dma_to_device(Iova::new(PAGE), 4, by, past), Err(TestdevError::TimedOut));
        assert_eq!(edu.dma_to_device(Iova::new(PAGE), 4, by, soon()), Err(TestdevError::Busy));
        device.state.lock().unwrap().dma[3] = 0;
    }
}

#[test]
fn an_old_interrupt_does_not_complete_a_new_transfer() {
    let (edu, device) = with_interrupt();
    edu.raise_interrupt(0x101, soon()).unwrap();
    device.interrupt(0x100);
    device.state.lock().unwrap().stuck = true;
    let past = Deadline::at(Instant::from_nanos(0));
    let result = edu.dma_to_device(Iova::new(PAGE), 4, Completion::Interrupt, past);
    assert_eq!(result, Err(TestdevError::TimedOut));
}

#[test]
fn an_interrupt_that_is_asked_for_arrives() {
    let (edu, _) = with_interrupt();
    edu.raise_interrupt(0x2, soon()).unwrap();
    assert_eq!(edu.interrupts(), 1);
    let silent = Edu::with_registers(edu_function(), FakeEdu::new(None), None).unwrap();
    assert!(!silent.has_message());
    let past = Deadline::at(Instant::from_nanos(0));
    assert_eq!(silent.raise_interrupt(0x2, past), Err(TestdevError::TimedOut));
    assert_eq!(silent.factorial(5, soon()), Ok(120));
}

#[test]
fn another_device_is_refused() {
    let other = function(FakeFunction::endpoint(1, 0, 0x1234, 0x1111).bar32(0, 1 << 20, false));
    assert_eq!(Edu::new(other, None).err(), Some(TestdevError::WrongDevice));
    let dead = FakeEdu::new(None);
    dead.state.lock().unwrap().id = u32::MAX;
    assert_eq!(Edu::with_registers(edu_function(), dead, None).err(), Some(TestdevError::NotAlive(u32::MAX)));
    assert_eq!(Edu::new(edu_function(), None).err(), Some(TestdevError::NotAlive(0)), "plain memory is not alive");
}

#[test]
fn iommu_testdev_is_told_from_pci_testdev() {
    let (vendor, id) = iommu_testdev::ID;
    let device = || FakeFunction::endpoint(1, 0, vendor, id);
    assert!(IommuTestdev::matches(&function(device().bar32(0, 0x1000, false))));
    let others = [
        device().bar32(0, 0x1000, false).io(1, 0x100),
        device().bar32(0, 0x2000, false),
        device().bar32(0, 0x1000, false).msi64(),
        device().bar32(1, 0x1000, false),
        FakeFunction::endpoint(1, 0, vendor, 6).bar32(0, 0x1000, false),
    ];
    for other in others {
        assert_eq!(IommuTestdev::new(function(other)).err(), Some(TestdevError::WrongDevice));
    }
}

#[test]
fn what_iommu_testdev_reports_is_told_apart() {
    struct Fake(Mutex<([u32; 16], u32)>);
    struct Handle(Arc<Fake>);
    impl Registers for Handle {
        fn read32(&self, offset: usize) -> u32 {
            let mut state = self.0.0.lock().unwrap();
            if offset == 0 {
                let armed = state.0[5] == 1;
                state.0[4] = if armed { state.1 } else { 0xdead_0005 };
            }
            state.0[offset / 4]
        }
        fn write32(&self, offset: usize, value: u32) {
            self.0.0.lock().unwrap().0[offset / 4] = value;
        }
        fn read64(&self, _: usize) -> u64 {
            unreachable!("the device has 32-bit registers")
        }
        fn write64(&self, _: usize, _: u64) {
            unreachable!("the device has 32-bit registers")
        }
    }
    let fake = Arc::new(Fake(Mutex::new(([0; 16], 0))));
    let (vendor, id) = iommu_testdev::ID;
    let device = function(FakeFunction::endpoint(1, 0, vendor, id).bar32(0, 0x1000, false));
    let device = IommuTestdev::with_registers(device, Box::new(Handle(fake.clone())));
    let cases = [
        (0, Ok(())),
        (0xdead_0002, Err(TestdevError::Blocked)),
        (0xdead_0004, Err(TestdevError::Mismatch)),
        (0xdead_0001, Err(TestdevError::Refused(0xdead_0001))),
    ];
    for (result, expected) in cases {
        fake.0.lock().unwrap().1 = result;
        assert_eq!(device.write(Iova::new(0x1_2345_6000), 64, PhysAddr::new(0x2_4000_0000)), expected);
        let regs = fake.0.lock().unwrap().0;
        assert_eq!(regs[1..4], [0x2345_6000, 1, 64]);
        assert_eq!((regs[5], regs[7], regs[8]), (0, 0x4000_0000, 2), "disarmed afterwards");
    }
}
