//! The sequence of a function-level reset, and functions that spoil it.

#![allow(unsafe_code)] // Implements `Attached`.

use super::*;
use crate::fake::{FakeEnv, FakeFunction, FakeReset, FakeSpace};
use crate::{Attached, Host, RequesterId, Window, WindowKind};
use alloc::sync::Arc;
use alloc::vec;
use iommu::PhysAddr;

struct Proof;

// SAFETY: there is no DMA in these tests.
unsafe impl Attached for Proof {
    fn covers(&self, _: RequesterId) -> bool {
        true
    }
}

const CONTROL: u16 = 0x285f;

/// A function at work: it decodes memory, masters the bus, and firmware has agreed on the size of packets.
fn at_work(reset: FakeReset) -> (Host, Arc<FakeSpace>) {
    let function = FakeFunction::endpoint(3, 0, 0x1234, 7).bar64(0, 0x4000, false).bar32(2, 0x1000, false);
    let space = FakeSpace::new(0, vec![function.express_with_reset(CONTROL, reset)]);
    let memory = WindowKind::Memory { prefetchable: false };
    let window = Window { kind: memory, bus: 0x1000_0000, phys: PhysAddr::new(0x1000_0000), len: 0x1000_0000 };
    let host = Host::with_space(space.clone(), 0, 0..=255, &[window], Arc::new(FakeEnv::default())).unwrap();
    let function = &host.functions()[0];
    function.bar(0).unwrap();
    function.enable_bus_master(&Proof).unwrap();
    (host, space)
}

fn soon() -> Deadline {
    Deadline::after_millis(60_000)
}

/// What configuration software would see: the addresses, and Device Control.
fn see(function: &Function) -> [u32; 4] {
    let express = function.capability(id::EXPRESS).unwrap().offset;
    [0x10, 0x14, 0x18, express + DEVICE_CONTROL].map(|at| function.read_config32(at))
}

/// Seen red: reset before transactions have ended, or with the bus mastered; addresses, Device Control or Command not restored; the
/// function looked at only once.
#[test]
fn a_function_that_was_reset_has_its_addresses_and_is_off_the_bus() {
    let (host, space) = at_work(FakeReset { pending: 3, unready: 4, ..FakeReset::default() });
    let function = &host.functions()[0];
    let before = see(function);
    assert!(before[0] >= 0x1000_0000 && before[3] == u32::from(CONTROL));
    function.set_wired_interrupt(true);
    assert!(function.has_reset());
    function.reset(soon()).unwrap();
    assert_eq!(see(function), before);
    let [fake] = &space.snapshot()[..] else { panic!("one function") };
    let story = fake.reset_story();
    assert_eq!(story.count, 1);
    assert_eq!(story.command, Command::INTX_DISABLE.bits(), "what it could do when it was reset");
    assert!(!story.pending, "something was under way");
    let command = Command::INTX_DISABLE | Command::MEMORY;
    assert_eq!(function.read_config16(reg::COMMAND), command.bits());
    function.enable_bus_master(&Proof).unwrap();
    assert!(function.is_bus_master());
}

#[test]
fn a_function_without_a_reset_is_left_alone() {
    let plain = FakeFunction::endpoint(3, 0, 0x1234, 7).express(0);
    let bridge = FakeFunction::bridge(4, 0, Some(4));
    let conventional = FakeFunction::endpoint(5, 0, 0x1234, 7);
    let space = FakeSpace::new(0, vec![plain, bridge, conventional]);
    let host = Host::with_space(space, 0, 0..=255, &[], Arc::new(FakeEnv::default())).unwrap();
    for function in host.functions() {
        if !function.is_bridge() {
            function.enable_bus_master(&Proof).unwrap();
        }
        assert!(!function.has_reset());
        assert_eq!(function.reset(soon()), Err(PciError::NoCapability("function-level reset")));
        assert!(function.is_bridge() || function.is_bus_master());
    }
}

#[test]
fn a_function_whose_transactions_do_not_end_is_not_reset() {
    let (host, space) = at_work(FakeReset { pending: u32::MAX, ..FakeReset::default() });
    let function = &host.functions()[0];
    assert_eq!(function.reset(soon()), Err(PciError::TransactionsPending));
    let [fake] = &space.snapshot()[..] else { panic!("one function") };
    assert_eq!(fake.reset_story().count, 0);
    assert!(!function.is_bus_master());
}

/// Red where what does not answer, or another device, counts as ready.
#[test]
fn a_function_that_does_not_come_back_decodes_nothing() {
    for reset in [
        FakeReset { unready: u32::MAX, ..FakeReset::default() },
        FakeReset { unready: u32::MAX, vendor_while_unready: 1, ..FakeReset::default() },
        FakeReset { device_after: Some(8), ..FakeReset::default() },
    ] {
        let (host, space) = at_work(reset);
        let function = &host.functions()[0];
        assert_eq!(function.reset(Deadline::after_millis(RESET_MILLIS + 50)), Err(PciError::NotReady));
        // Red where it is written what was read of a function that does not answer.
        function.set_wired_interrupt(false);
        let _ = function.disable_bus_master();
        let [fake] = &space.snapshot()[..] else { panic!("one function") };
        assert_eq!(
            fake.register(usize::from(reg::COMMAND), crate::Width::Half) as u16 & !Command::INTX_DISABLE.bits(),
            0
        );
    }
}

/// Red where the addresses are not read back.
#[test]
fn a_function_that_does_not_take_its_addresses_again_decodes_nothing() {
    let (host, space) = at_work(FakeReset { bars_stuck: true, ..FakeReset::default() });
    let function = &host.functions()[0];
    assert_eq!(function.reset(soon()), Err(PciError::BarNotWritable(0)));
    let [fake] = &space.snapshot()[..] else { panic!("one function") };
    let command = fake.register(usize::from(reg::COMMAND), crate::Width::Half) as u16;
    assert_eq!(command & (Command::MEMORY | Command::BUS_MASTER).bits(), 0);
}
