//! Enumeration against a fake segment: topologies, addresses, and devices that lie.

#![allow(unsafe_code)] // Implements `Attached`, and lays an ECAM over memory.

use crate::fake::{FakeEnv, FakeFunction, FakeMsi, FakeSpace};
use crate::*;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};
use iommu::PhysAddr;
use proptest::prelude::*;

const ROOT_PORT: u8 = 4;
const UPSTREAM: u8 = 5;
const DOWNSTREAM: u8 = 6;
const TO_PCI: u8 = 7;

/// The windows of QEMU's virt.
fn windows() -> Vec<Window> {
    let memory = WindowKind::Memory { prefetchable: false };
    vec![
        Window { kind: WindowKind::Io, bus: 0, phys: PhysAddr::new(0x3eff_0000), len: 0x1_0000 },
        Window { kind: memory, bus: 0x1000_0000, phys: PhysAddr::new(0x1000_0000), len: 0x2eff_0000 },
        Window { kind: memory, bus: 0x80_0000_0000, phys: PhysAddr::new(0x80_0000_0000), len: 0x80_0000_0000 },
    ]
}

fn enumerate(root: Vec<FakeFunction>) -> (Host, Arc<FakeSpace>) {
    let space = FakeSpace::new(0, root);
    let env = Arc::new(FakeEnv::default());
    let host = Host::with_space(space.clone(), 0, 0..=255, &windows(), env).unwrap();
    (host, space)
}

fn at(host: &Host, bus: u8, device: u8, function: u8) -> &Arc<Function> {
    host.find(Bdf::new(bus, device, function).unwrap()).unwrap()
}

struct Proof(Vec<u16>);

// SAFETY: there is no DMA in these tests.
unsafe impl Attached for Proof {
    fn covers(&self, requester: RequesterId) -> bool {
        self.0.contains(&requester.get())
    }
}

/// A root port with a switch of two downstream ports, one of which leads to a bridge to conventional PCI.
fn topology() -> Vec<FakeFunction> {
    let nvme = FakeFunction::endpoint(0, 0, 0x1234, 1).bar64(0, 0x4000, false).express(0);
    let legacy = FakeFunction::endpoint(3, 0, 0x1234, 2).bar32(0, 0x1000, false).io(1, 0x20);
    let to_pci = FakeFunction::bridge(0, 0, Some(TO_PCI)).child(legacy);
    let switch = FakeFunction::bridge(0, 0, Some(UPSTREAM))
        .child(FakeFunction::bridge(1, 0, Some(DOWNSTREAM)).child(nvme))
        .child(FakeFunction::bridge(2, 0, Some(DOWNSTREAM)).child(to_pci));
    let gpu = FakeFunction::endpoint(4, 0, 0x1234, 3).bar64(0, 1 << 28, true).bar32(2, 1 << 24, false).multi_function();
    let sound = FakeFunction::endpoint(4, 5, 0x1234, 4).bar32(0, 0x4000, false);
    vec![
        FakeFunction::endpoint(0, 0, 0x1b36, 8),
        FakeFunction::bridge(1, 0, Some(ROOT_PORT)).child(switch),
        FakeFunction::bridge(2, 0, None).child(FakeFunction::endpoint(7, 0, 0x1234, 5)),
        gpu,
        sound,
    ]
}

#[test]
fn bridges_are_numbered_depth_first_and_everything_behind_them_is_found() {
    let (host, space) = enumerate(topology());
    let found: Vec<_> = host.functions().iter().map(|function| (function.bdf(), function.ids().device)).collect();
    let bdf = |bus, device, function| Bdf::new(bus, device, function).unwrap();
    assert_eq!(
        found,
        [
            (bdf(0, 0, 0), 8),
            (bdf(0, 1, 0), 0xc),
            (bdf(1, 0, 0), 0xc),
            (bdf(2, 1, 0), 0xc),
            (bdf(3, 0, 0), 1),
            (bdf(2, 2, 0), 0xc),
            (bdf(4, 0, 0), 0xc),
            (bdf(5, 3, 0), 2),
            (bdf(0, 2, 0), 0xc),
            (bdf(6, 7, 0), 5),
            (bdf(0, 4, 0), 3),
            (bdf(0, 4, 5), 4),
        ]
    );
    assert!(host.functions().iter().all(|function| function.check().is_ok()));
    let root = space.snapshot();
    let numbers = |bridge: &FakeFunction| bridge.register(0x18, Width::Word);
    assert_eq!(numbers(&root[1]), 0x0005_0100);
    assert_eq!(numbers(&root[2]), 0x0006_0600);
}

/// A host bridge that shows on the first bus, before another root bus.
fn expander(device: u8) -> FakeFunction {
    FakeFunction::endpoint(device, 0, 0x1b36, 0xb).with(8, &(0x0600_0000_u32).to_le_bytes())
}

/// Red with one range of numbers for all roots (a bus behind the first root takes the second root's), and without silencing bridges
/// that firmware has set up (their buses pass for roots).
#[test]
fn further_root_buses_keep_their_numbers_and_what_is_behind_each_stays_below_the_next() {
    let device = |id| FakeFunction::endpoint(0, 0, 0x1234, id).bar32(0, 0x1000, false);
    let port = |device, child: FakeFunction| FakeFunction::bridge(device, 0, Some(ROOT_PORT)).child(child);
    let set_up = |port: FakeFunction, bus| port.with(0x19, &[bus, bus]);
    let first = vec![
        FakeFunction::endpoint(0, 0, 0x1b36, 8).with(8, &(0x0600_0000_u32).to_le_bytes()),
        set_up(port(1, device(1)), 1),
        port(2, device(2)),
        port(3, device(3)),
        expander(4),
        expander(5),
    ];
    let space = FakeSpace::with_roots(vec![
        (0, first),
        (3, vec![set_up(port(0, device(4)), 7), port(1, device(5))]),
        (0xff, vec![device(6), port(1, device(7))]),
    ]);
    let host = Host::with_space(space, 0, 0..=255, &windows(), Arc::new(FakeEnv::default())).unwrap();
    let found =
        |id| host.functions().iter().find(|function| function.ids().device == id).map(|function| function.bdf());
    assert_eq!((found(1), found(2)), (Bdf::new(1, 0, 0), Bdf::new(2, 0, 0)));
    assert_eq!(found(3), None, "no number is left below 3");
    assert_eq!(at(&host, 0, 3, 0).check(), Err(PciError::NoBusNumber));
    assert_eq!((found(4), found(5)), (Bdf::new(4, 0, 0), Bdf::new(5, 0, 0)));
    assert_eq!((found(6), found(7)), (Bdf::new(0xff, 0, 0), None));
    assert_eq!(at(&host, 4, 0, 0).wire(), None);
    let addresses: Vec<_> =
        [1, 2, 4, 5, 6].iter().map(|id| at_id(&host, *id).memory_bar(0).unwrap().phys.unwrap()).collect();
    assert!(addresses.iter().enumerate().all(|(index, one)| !addresses[..index].contains(one)), "{addresses:?}");
}

fn at_id(host: &Host, id: u16) -> &Arc<Function> {
    host.functions().iter().find(|function| function.ids().device == id).unwrap()
}

/// Some platforms answer for their only device on every number of the bus behind a bridge: that is no reason to look.
#[test]
fn without_a_second_host_bridge_there_is_one_root() {
    let space = FakeSpace::with_roots(vec![
        (0, vec![FakeFunction::endpoint(0, 0, 0x1b36, 8).with(8, &(0x0600_0000_u32).to_le_bytes())]),
        (0x80, vec![FakeFunction::endpoint(0, 0, 0x1234, 1)]),
    ]);
    let host = Host::with_space(space, 0, 0..=255, &windows(), Arc::new(FakeEnv::default())).unwrap();
    assert_eq!(host.functions().len(), 1);
}

/// A function that answers everywhere, and says that it is a host bridge.
struct Everywhere;

impl ConfigSpace for Everywhere {
    fn read(&self, _: Bdf, offset: u16, width: Width) -> u32 {
        match offset {
            8 => 0x0600_0000,
            0xe => 0x80,
            0 => 0x1234_1234 & width.ones(),
            _ => 0,
        }
    }
    fn write(&self, _: Bdf, _: u16, _: Width, _: u32) {}
}

#[test]
fn a_space_that_answers_everywhere_is_enumerated_to_its_end() {
    let host = Host::with_space(Arc::new(Everywhere), 0, 0..=3, &[], Arc::new(FakeEnv::default())).unwrap();
    assert_eq!(host.functions().len(), 4 * 32 * 8);
}

#[test]
fn a_function_behind_conventional_pci_is_known_by_its_bridge() {
    let (host, _) = enumerate(topology());
    assert_eq!(at(&host, 3, 0, 0).requester_id().get(), 0x0300);
    assert_eq!(at(&host, 5, 3, 0).requester_id().get(), 0x0500, "PCIe-to-PCI: the secondary bus, device 0");
    assert_eq!(at(&host, 6, 7, 0).requester_id().get(), 0x0010, "conventional bridge: its own name");
    let names: Vec<_> = at(&host, 5, 3, 0).requester_ids().map(RequesterId::get).collect();
    assert_eq!(names, [0x0518, 0x0500]);
}

/// Adds an ACS capability with these bits of capability, all of which can be enabled.
fn acs(function: FakeFunction, bits: u8) -> FakeFunction {
    function.with(0x100, &[0xd, 0, 1, 0, bits, 0, 0, 0]).with_writable(0x106, &[bits])
}

/// Who is grouped with whom: the group of each function that is no bridge.
fn groups(root: Vec<FakeFunction>) -> Vec<(u16, u16)> {
    let (host, _) = enumerate(root);
    let endpoints = host.functions().iter().filter(|function| !function.is_bridge());
    let number = |bdf: Bdf| bdf.requester_id().get();
    endpoints.map(|function| (number(function.bdf()), number(function.group()))).collect()
}

#[test]
fn functions_below_ports_with_access_control_are_groups_of_their_own() {
    let leaf = || FakeFunction::endpoint(0, 0, 0x1234, 1).express(0);
    let port = |device, acs_bits| acs(FakeFunction::bridge(device, 0, Some(DOWNSTREAM)), acs_bits).child(leaf());
    let switch = |acs_bits| {
        let upstream = FakeFunction::bridge(0, 0, Some(UPSTREAM)).child(port(0, 0x1d)).child(port(1, acs_bits));
        acs(FakeFunction::bridge(1, 0, Some(ROOT_PORT)), 0x1d).child(upstream)
    };
    assert_eq!(groups(vec![switch(0x1d)]), [(0x300, 0x300), (0x400, 0x400)]);
    assert_eq!(groups(vec![switch(0x19)]), [(0x300, 0x300), (0x400, 0x100)], "no request redirect: the switch");
    let bare = FakeFunction::bridge(2, 0, Some(ROOT_PORT)).child(leaf());
    assert_eq!(groups(vec![bare]), [(0x100, 0x10)]);
}

#[test]
fn access_control_that_does_not_stay_enabled_does_not_count() {
    let stuck = acs(FakeFunction::bridge(2, 0, Some(ROOT_PORT)), 0x1d).with_writable(0x106, &[0x0d]);
    assert_eq!(groups(vec![stuck.child(FakeFunction::endpoint(0, 0, 0x1234, 1))]), [(0x100, 0x10)]);
}

#[test]
fn conventional_pci_and_multi_function_devices_are_one_group() {
    let conventional = FakeFunction::bridge(1, 0, None)
        .child(FakeFunction::endpoint(1, 0, 0x1234, 1))
        .child(FakeFunction::endpoint(2, 0, 0x1234, 1));
    let function = |number| FakeFunction::endpoint(3, number, 0x1234, 1).express(0).multi_function();
    let all = vec![conventional, function(0), function(2), FakeFunction::endpoint(4, 0, 0x1234, 1)];
    assert_eq!(groups(all), [(0x108, 0x8), (0x110, 0x8), (0x18, 0x18), (0x1a, 0x18), (0x20, 0x20)]);
    let apart = vec![acs(function(0), 0), acs(function(2), 0x0c)];
    assert_eq!(groups(apart), [(0x18, 0x18), (0x1a, 0x1a)]);
}

#[test]
fn nothing_decodes_or_masters_the_bus_after_enumeration() {
    let left_on = FakeFunction::endpoint(3, 0, 0x1234, 1).bar32(0, 0x1000, false).with(4, &[7, 0]);
    let (host, space) = enumerate(vec![left_on]);
    assert_eq!(space.snapshot()[0].register(4, Width::Half), 0x400);
    let _registers = at(&host, 0, 3, 0).bar(0).unwrap();
    assert_eq!(space.snapshot()[0].register(4, Width::Half), 0x402);
    at(&host, 0, 3, 0).disable_memory();
    assert_eq!(space.snapshot()[0].register(4, Width::Half), 0x400);
}

#[test]
fn bus_mastering_needs_proof_for_every_name_of_the_function() {
    let (host, _) = enumerate(topology());
    let legacy = at(&host, 5, 3, 0);
    for names in [vec![], vec![0x0518], vec![0x0500], vec![0x0300]] {
        assert_eq!(legacy.enable_bus_master(&Proof(names)), Err(PciError::NotAttached(legacy.bdf())));
        assert!(!legacy.is_bus_master());
    }
    legacy.enable_bus_master(&Proof(vec![0x0500, 0x0518])).unwrap();
    assert!(legacy.is_bus_master());
}

#[test]
fn a_bridge_masters_the_bus_exactly_while_something_behind_it_does() {
    let (host, _) = enumerate(topology());
    let (nvme, legacy) = (at(&host, 3, 0, 0), at(&host, 5, 3, 0));
    let (port, switch) = (at(&host, 0, 1, 0), at(&host, 1, 0, 0));
    nvme.enable_bus_master(&Proof(vec![0x0300])).unwrap();
    nvme.enable_bus_master(&Proof(vec![0x0300])).unwrap();
    legacy.enable_bus_master(&Proof(vec![0x0500, 0x0518])).unwrap();
    assert!(port.is_bus_master() && switch.is_bus_master() && at(&host, 4, 0, 0).is_bus_master());
    legacy.disable_bus_master().unwrap();
    assert!(port.is_bus_master() && !at(&host, 4, 0, 0).is_bus_master());
    nvme.disable_bus_master().unwrap();
    nvme.disable_bus_master().unwrap();
    assert!(!port.is_bus_master() && !switch.is_bus_master() && !nvme.is_bus_master());
}

#[test]
fn transactions_that_stay_pending_are_reported_and_mastering_is_off_all_the_same() {
    let stuck = FakeFunction::endpoint(1, 0, 0x1234, 1).express(0).with(0x40 + 0x0a, &[0x20]);
    let (host, _) = enumerate(vec![stuck]);
    let function = at(&host, 0, 1, 0);
    function.enable_bus_master(&Proof(vec![8])).unwrap();
    assert_eq!(function.disable_bus_master(), Err(PciError::TransactionsPending));
    assert!(!function.is_bus_master());
}

#[test]
fn a_capability_list_in_a_circle_is_an_error_of_that_function_only() {
    let circle =
        FakeFunction::endpoint(1, 0, 0x1234, 1).capability(9, &[0; 6]).capability(9, &[0; 6]).with(0x49, &[0x40]);
    let header = FakeFunction::endpoint(2, 0, 0x1234, 2).capability(9, &[0; 6]).with(0x41, &[0x10]);
    let fine = FakeFunction::endpoint(3, 0, 0x1234, 3).bar32(0, 0x1000, false).capability(9, &[0; 6]);
    let extended = FakeFunction::endpoint(4, 0, 0x1234, 4).express(0).with(0x100, &[0xd, 0, 1, 0x10]);
    let outside = FakeFunction::endpoint(5, 0, 0x1234, 5).express(0).with(0x100, &[0xd, 0, 1, 0x08]);
    let (host, _) = enumerate(vec![circle, header, fine, extended, outside]);
    assert_eq!(at(&host, 0, 1, 0).check(), Err(PciError::BadCapabilityList(0x40)));
    assert_eq!(at(&host, 0, 2, 0).check(), Err(PciError::BadCapabilityList(0x10)));
    assert_eq!(at(&host, 0, 4, 0).check(), Err(PciError::BadCapabilityList(0x100)));
    assert_eq!(at(&host, 0, 5, 0).check(), Err(PciError::BadCapabilityList(0x80)));
    assert_eq!(at(&host, 0, 1, 0).enable_bus_master(&Proof(vec![8])), Err(PciError::BadCapabilityList(0x40)));
    assert!(at(&host, 0, 3, 0).bar(0).is_ok());
}

#[test]
fn the_full_list_of_capabilities_is_found() {
    let mut function = FakeFunction::endpoint(1, 0, 0x1234, 1).express(0).with(0x100, &[0xd, 0, 1, 0x14]);
    function.set(0x140, &[0xf, 0, 1, 0]);
    for _ in 0..8 {
        function = function.capability(capability::VENDOR, &[0; 10]);
    }
    let (host, _) = enumerate(vec![function]);
    let function = at(&host, 0, 1, 0);
    assert_eq!(function.capabilities().len(), 9);
    assert_eq!(function.capabilities().last().map(|last| last.offset), Some(0x40 + 60 + 7 * 12));
    let extended: Vec<_> = function.extended_capabilities().iter().map(|found| (found.id, found.offset)).collect();
    assert_eq!(extended, [(0xd, 0x100), (0xf, 0x140)]);
}

#[test]
fn nonsense_in_a_bar_is_an_error_of_that_function_only() {
    let cases = [
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar_raw(0, 0, 0xf0f0_f000),
        FakeFunction::endpoint(2, 0, 0x1234, 1).bar_raw(0, 6, 0xffff_f000),
        FakeFunction::endpoint(3, 0, 0x1234, 1).bar_raw(5, 4, 0xffff_f000),
        FakeFunction::endpoint(4, 0, 0x1234, 1).bar_raw(0, 4, 0).bar_raw(1, 0, 0),
        FakeFunction::endpoint(5, 0, 0x1234, 1).bar_raw(0, 1, 0xfff0_0000),
        FakeFunction::endpoint(6, 0, 0x1234, 1).bar_raw(0, 0, 0xffff_f00f),
    ];
    let count = cases.len();
    let mut root: Vec<_> = cases.into();
    root.push(FakeFunction::endpoint(31, 0, 0x1234, 2).bar32(0, 0x1000, false));
    let (host, _) = enumerate(root);
    for device in 1..=count {
        let function = at(&host, 0, device as u8, 0);
        assert!(matches!(function.check(), Err(PciError::BadBar(0 | 5))), "{device}: {:?}", function.check());
        assert!(function.bar(0).is_err());
    }
    assert!(at(&host, 0, 31, 0).bar(0).is_ok());
}

#[test]
fn a_function_of_all_ones_or_with_an_unknown_header_is_left_alone() {
    let ones = FakeFunction::endpoint(1, 0, 0x1234, 1).with(2, &[0xff; 0xffe]);
    let cardbus = FakeFunction::endpoint(2, 0, 0x1234, 1).with(0xe, &[2]);
    let (host, _) = enumerate(vec![ones, cardbus, FakeFunction::endpoint(3, 0, 0x1234, 1)]);
    assert_eq!(at(&host, 0, 1, 0).check(), Err(PciError::HeaderType(0x7f)));
    assert_eq!(at(&host, 0, 2, 0).check(), Err(PciError::HeaderType(2)));
    assert_eq!(at(&host, 0, 3, 0).check(), Ok(()));
}

#[test]
fn a_bar_too_large_for_every_window_fails_its_function_and_no_other() {
    let greedy = FakeFunction::endpoint(0, 0, 0x1234, 1).bar64(0, 1 << 50, true);
    let modest = FakeFunction::endpoint(1, 0, 0x1234, 2).bar64(0, 0x4000, true).bar32(2, 0x1000, false);
    let whole = FakeFunction::endpoint(2, 0, 0x1234, 3).bar64(0, 1 << 63, false);
    let low = FakeFunction::endpoint(3, 0, 0x1234, 4).bar32(0, 1 << 31, false);
    let bridge = FakeFunction::bridge(5, 0, Some(TO_PCI)).child(greedy).child(modest).child(whole).child(low);
    let (host, _) = enumerate(vec![bridge]);
    assert_eq!(at(&host, 1, 0, 0).check(), Err(PciError::NoSpace { bar: 0, size: 1 << 50 }));
    assert_eq!(at(&host, 1, 2, 0).check(), Err(PciError::NoSpace { bar: 0, size: 1 << 63 }));
    assert_eq!(at(&host, 1, 3, 0).check(), Err(PciError::NoSpace { bar: 0, size: 1 << 31 }));
    assert!(at(&host, 1, 1, 0).bar(0).is_ok() && at(&host, 1, 1, 0).bar(2).is_ok());
}

#[test]
fn io_space_that_runs_out_costs_the_io_bar_and_not_the_function() {
    let root = (0..32)
        .map(|device| {
            let inner = FakeFunction::endpoint(0, 0, 0x1234, 1).io(0, 0x100).bar32(1, 0x1000, false);
            FakeFunction::bridge(device, 0, Some(ROOT_PORT)).child(inner)
        })
        .collect();
    let (host, _) = enumerate(root);
    let endpoints: Vec<_> = host.functions().iter().filter(|function| !function.is_bridge()).collect();
    assert_eq!(endpoints.len(), 32);
    assert!(endpoints.iter().all(|function| function.bar(1).is_ok()));
    assert_eq!(
        endpoints.iter().filter(|function| function.bars().any(|bar| !bar.is_memory() && bar.bus.is_some())).count(),
        15
    );
}

#[test]
fn a_bridge_that_does_not_keep_its_bus_numbers_is_not_followed() {
    let stuck = FakeFunction::bridge(1, 0, Some(ROOT_PORT))
        .with_writable(0x19, &[0])
        .child(FakeFunction::endpoint(0, 0, 0x1234, 1));
    let fine = FakeFunction::bridge(2, 0, Some(ROOT_PORT)).child(FakeFunction::endpoint(0, 0, 0x1234, 2));
    let (host, _) = enumerate(vec![stuck, fine]);
    assert_eq!(at(&host, 0, 1, 0).check(), Err(PciError::BridgeNotWritable));
    assert_eq!(at(&host, 1, 0, 0).ids().device, 2);
    assert_eq!(host.functions().len(), 3);
}

#[test]
fn bridges_without_end_are_followed_to_a_bounded_depth() {
    let mut tower = FakeFunction::endpoint(0, 0, 0x1234, 1);
    for _ in 0..40 {
        tower = FakeFunction::bridge(0, 0, Some(DOWNSTREAM)).child(tower);
    }
    let (host, _) = enumerate(vec![tower]);
    assert_eq!(host.functions().last().map(|last| last.check()), Some(Err(PciError::TooDeep)));
}

#[test]
fn when_bus_numbers_run_out_the_rest_still_works() {
    let bridges = |count: u8| {
        (0..count)
            .map(|device| {
                FakeFunction::bridge(device, 0, Some(ROOT_PORT))
                    .child(FakeFunction::endpoint(0, 0, 0x1234, 1).bar32(0, 0x1000, false))
            })
            .collect::<Vec<_>>()
    };
    let space = FakeSpace::new(4, bridges(6));
    let host = Host::with_space(space, 0, 4..=7, &windows(), Arc::new(FakeEnv::default())).unwrap();
    let checks: Vec<_> =
        host.functions().iter().filter(|function| function.is_bridge() || function.check().is_err()).collect();
    assert_eq!(checks.iter().filter(|function| function.check() == Err(PciError::NoBusNumber)).count(), 3);
    assert_eq!(host.functions().iter().filter(|function| function.bar(0).is_ok()).count(), 3);
}

#[test]
fn only_device_0_is_looked_for_below_a_port_with_a_link() {
    let port = FakeFunction::bridge(1, 0, Some(ROOT_PORT))
        .child(FakeFunction::endpoint(0, 0, 0x1234, 1))
        .child(FakeFunction::endpoint(1, 0, 0x1234, 1));
    let (host, _) = enumerate(vec![port]);
    assert_eq!(host.functions().len(), 2);
}

#[test]
fn msix_vectors_are_programmed_masked_and_given_back() {
    let device = FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(3, 1, 0, 0x800);
    let (host, space) = enumerate(vec![device]);
    let function = at(&host, 0, 1, 0);
    let controller = Arc::new(FakeMsi::default());
    let table = function.bar(1).unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let mut msix = Msix::new(function.clone(), controller.clone()).unwrap();
    assert_eq!(msix.count(), 3);
    for vector in 0..3 {
        assert_eq!(table.read32(vector * 16 + 12), 1, "vector {vector} starts masked");
    }
    assert_eq!(space.snapshot()[0].register(0x42, Width::Half), 0x8002);
    let seen = calls.clone();
    msix.connect(
        2,
        Arc::new(move || {
            seen.fetch_add(1, Ordering::SeqCst);
        }),
    )
    .unwrap();
    assert_eq!(table.read64(32), FakeMsi::DOORBELL);
    assert_eq!(table.read32(44), 0);
    assert!(controller.raise(function.requester_id(), table.read32(40)));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!(msix.connect(3, Arc::new(|| {})), Err(PciError::NoVector { vector: 3, count: 3 }));
    msix.connect(2, Arc::new(|| {})).unwrap();
    assert_eq!(controller.live(), 1, "the interrupt that was replaced has been given back");
    drop(msix);
    assert_eq!(controller.live(), 0);
    assert_eq!(table.read32(44), 1);
    assert_eq!(space.snapshot()[0].register(0x42, Width::Half), 0x0002);
}

#[test]
fn an_msix_table_outside_its_bar_is_refused() {
    let cases = [
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(257, 1, 0, 0),
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(1, 1, 0xff8, 0),
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(1, 1, 0, 0x1000),
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(1, 0, 0, 0),
        FakeFunction::endpoint(1, 0, 0x1234, 1).bar32(1, 0x1000, false).msix(1, 7, 0, 0),
    ];
    for case in cases {
        let (host, _) = enumerate(vec![case]);
        let error = Msix::new(at(&host, 0, 1, 0).clone(), Arc::new(FakeMsi::default())).err();
        assert!(matches!(error, Some(PciError::OutsideBar { .. } | PciError::NoBar(0 | 7))), "{error:?}");
    }
}

#[test]
fn msi_is_programmed_and_given_back() {
    let (host, space) = enumerate(vec![FakeFunction::endpoint(1, 0, 0x1234, 0x11e8).msi64()]);
    let controller = Arc::new(FakeMsi::default());
    let msi = Msi::new(at(&host, 0, 1, 0).clone(), controller.clone(), Arc::new(|| {})).unwrap();
    let device = &space.snapshot()[0];
    assert_eq!(device.register(0x42, Width::Half), 0x81);
    assert_eq!(device.register(0x44, Width::Word), FakeMsi::DOORBELL as u32);
    assert_eq!((device.register(0x48, Width::Word), device.register(0x4c, Width::Half)), (0, 0));
    drop(msi);
    assert_eq!(space.snapshot()[0].register(0x42, Width::Half), 0x80);
    assert_eq!(controller.live(), 0);
}

#[test]
fn an_ecam_that_does_not_hold_its_buses_is_refused() {
    let words = vec![0xffff_ffff_ffff_ffff_u64; (1 << 20) / 8].leak();
    // SAFETY: the memory is leaked and not referenced elsewhere.
    let window = unsafe { arch::mmio::Mmio::new(core::ptr::NonNull::from(words).cast(), 1 << 20) };
    assert!(matches!(Ecam::new(window, 0..=1), Err(PciError::BadEcam { .. })));
    #[allow(clippy::reversed_empty_ranges)]
    let empty = Ecam::new(window, 1..=0);
    assert!(matches!(empty, Err(PciError::BadEcam { .. })));
    let ecam = Ecam::new(window, 3..=3).unwrap();
    let inside = Bdf::new(3, 31, 7).unwrap();
    ecam.write(inside, 0xffc, Width::Word, 0x1234_5678);
    assert_eq!(window.read32(0xf_fffc), 0x1234_5678);
    assert_eq!(ecam.read(inside, 0xffe, Width::Half), 0x1234);
    assert_eq!(ecam.read(Bdf::new(4, 0, 0).unwrap(), 0, Width::Word), u32::MAX);
    assert_eq!(ecam.read(Bdf::new(2, 0, 0).unwrap(), 0, Width::Byte), 0xff);
}

/// A BAR as the strategy wants it: place, bits of size, 64-bit, prefetchable, I/O.
type WantedBar = (usize, u32, bool, bool, bool);

fn endpoint(device: u8, bars: &[WantedBar]) -> FakeFunction {
    let mut function = FakeFunction::endpoint(device, 0, 0x1234, 1);
    let mut free = 0;
    for (skip, bits, wide, prefetchable, io) in bars {
        let index = free + skip;
        if index > 5 {
            break;
        }
        free = index + 1;
        if *io {
            function = function.io(index, 4 << (bits % 7));
        } else if *wide && index < 5 {
            function = function.bar64(index, 0x10 << bits, *prefetchable);
            free = index + 2;
        } else {
            function = function.bar32(index, 0x10 << (bits % 27), *prefetchable);
        }
    }
    function
}

fn bars() -> impl Strategy<Value = Vec<WantedBar>> {
    prop::collection::vec((0..2_usize, 0..34_u32, any::<bool>(), any::<bool>(), prop::bool::weighted(0.2)), 0..5)
}

/// A bus: endpoints and bridges by device number.
fn bus() -> impl Strategy<Value = Vec<FakeFunction>> {
    let leaf = prop::collection::vec(bars(), 0..5).prop_map(|endpoints| {
        endpoints.iter().enumerate().map(|(device, bars)| endpoint(device as u8, bars)).collect::<Vec<_>>()
    });
    leaf.prop_recursive(4, 24, 4, |inner| {
        (prop::collection::vec((inner, any::<bool>(), bars()), 0..4), prop::collection::vec(bars(), 0..3)).prop_map(
            |(bridges, endpoints)| {
                let mut bus: Vec<_> = endpoints.iter().enumerate().map(|(at, bars)| endpoint(at as u8, bars)).collect();
                for (children, prefetch, own) in bridges {
                    let mut bridge = FakeFunction::bridge(8 + bus.len() as u8, 0, Some(TO_PCI));
                    if !prefetch {
                        bridge = bridge.without_prefetch();
                    }
                    if let Some((_, bits, ..)) = own.first() {
                        bridge = bridge.bar32(0, 0x1000 << (bits % 12), false);
                    }
                    bus.push(children.into_iter().fold(bridge, FakeFunction::child));
                }
                bus
            },
        )
    })
}

/// What a range of bus addresses is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Io,
    Memory,
    Prefetchable,
}

/// A claimed range of bus addresses: what for, first and last.
type Claim = (For, u64, u64);

/// Whether one range may lie inside another: memory that can be prefetched may be where other memory is.
fn reaches(outer: &Claim, inner: &Claim) -> bool {
    let kind = outer.0 == inner.0 || (outer.0, inner.0) == (For::Memory, For::Prefetchable);
    kind && outer.1 <= inner.1 && inner.2 <= outer.2
}

/// Reads a bridge's windows from its registers: I/O, memory, prefetchable memory.
fn bridge_windows(bridge: &FakeFunction) -> Vec<Claim> {
    let r = |offset, width| u64::from(bridge.register(offset, width));
    let io_base = r(0x1c, Width::Byte) >> 4 << 12 | r(0x30, Width::Half) << 16;
    let io_limit = r(0x1d, Width::Byte) >> 4 << 12 | r(0x32, Width::Half) << 16 | 0xfff;
    let base = r(0x20, Width::Half) >> 4 << 20;
    let limit = r(0x22, Width::Half) >> 4 << 20 | 0xf_ffff;
    let prefetch_base = r(0x24, Width::Half) >> 4 << 20 | r(0x28, Width::Word) << 32;
    let prefetch_limit = r(0x26, Width::Half) >> 4 << 20 | r(0x2c, Width::Word) << 32 | 0xf_ffff;
    let mut windows = vec![(For::Io, io_base, io_limit), (For::Memory, base, limit)];
    if r(0x24, Width::Half) & 0xf == 1 {
        windows.push((For::Prefetchable, prefetch_base, prefetch_limit));
    }
    windows.retain(|(_, base, limit)| base <= limit);
    windows
}

/// Checks a bus against its registers, and returns what it claims. `outer` is what reaches the bus.
fn check_bus(host: &Host, bus: u8, functions: &[FakeFunction], outer: &[Claim]) -> Result<Vec<Claim>, TestCaseError> {
    let mut claims: Vec<Claim> = Vec::new();
    for function in functions {
        let (device, number) = function.place();
        let found = at(host, bus, device, number);
        for bar in found.bars().filter(|bar| found.check().is_ok() && (bar.is_memory() || bar.bus.is_some())) {
            let at = 0x10 + 4 * usize::from(bar.index);
            let low = u64::from(function.register(at, Width::Word));
            let io = !bar.is_memory();
            let wide = matches!(bar.kind, BarKind::Memory { wide: true, .. });
            let high = if wide { u64::from(function.register(at + 4, Width::Word)) } else { 0 };
            let address = high << 32 | low & if io { !3 } else { !0xf };
            prop_assert_eq!(address % bar.size, 0, "BAR {} of {} aligned", bar.index, found.bdf());
            prop_assert_eq!(Some(address), bar.bus);
            let purpose = match bar.kind {
                BarKind::Io => For::Io,
                BarKind::Memory { prefetchable: false, .. } => For::Memory,
                BarKind::Memory { prefetchable: true, .. } => For::Prefetchable,
            };
            claims.push((purpose, address, address + (bar.size - 1)));
        }
        if function.register(0xe, Width::Byte) & 0x7f == 1 {
            let secondary = function.register(0x19, Width::Byte) as u8;
            let windows = bridge_windows(function);
            check_bus(host, secondary, function.children(), &windows)?;
            claims.extend(windows);
        }
    }
    for (index, claim) in claims.iter().enumerate() {
        let (purpose, base, limit) = claim;
        prop_assert!(
            outer.iter().any(|outer| reaches(outer, claim)),
            "bus {}: {:#x}..={:#x} is reached from above: {:x?}",
            bus,
            base,
            limit,
            outer
        );
        for (other, other_base, other_limit) in &claims[..index] {
            let io = (*purpose == For::Io, *other == For::Io);
            let apart = io.0 != io.1 || limit < other_base || other_limit < base;
            prop_assert!(apart, "bus {}: {:#x}..={:#x} is claimed twice", bus, base, limit);
        }
    }
    Ok(claims)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn assigned_bars_are_aligned_disjoint_and_reached_through_every_bridge(root in bus()) {
        let (host, space) = enumerate(root);
        let outer: Vec<_> = windows()
            .iter()
            .map(|window| {
                let purpose = if window.kind == WindowKind::Io { For::Io } else { For::Memory };
                (purpose, window.bus, window.bus + (window.len - 1))
            })
            .collect();
        check_bus(&host, 0, &space.snapshot(), &outer)?;
        for function in host.functions() {
            let check = function.check();
            prop_assert!(matches!(check, Ok(()) | Err(PciError::NoSpace { .. })), "{:?}: {:?}", function, check);
            prop_assert!(function.bars().all(|bar| function.check().is_err() || !bar.is_memory() || bar.phys.is_some()));
        }
    }

    #[test]
    fn no_content_of_configuration_space_panics_or_hangs(
        bytes in prop::collection::vec(any::<u8>(), 256),
        masks in prop::collection::vec(any::<u8>(), 256),
        header in prop::sample::select(vec![0_u8, 1, 0x80, 0x81]),
    ) {
        let device = FakeFunction::endpoint(1, 0, 1, 1)
            .with(4, &bytes[4..])
            .with_writable(4, &masks[4..])
            .with(0x100, &bytes)
            .with(0xe, &[header])
            .with_writable(0xe, &[0]);
        let fine = FakeFunction::endpoint(2, 0, 0x1234, 1).bar32(0, 0x1000, false);
        let (host, _) = enumerate(vec![device, fine]);
        prop_assert!(at(&host, 0, 2, 0).bar(0).is_ok());
        let hostile = at(&host, 0, 1, 0).clone();
        let _ = Msix::new(hostile.clone(), Arc::new(FakeMsi::default()));
        let _ = Msi::new(hostile.clone(), Arc::new(FakeMsi::default()), Arc::new(|| {}));
        let _ = hostile.bar_part(0, u64::from(bytes[8]), u64::from(bytes[9]));
    }
}
