//! QEMU's own device trees, read exactly; trees that lie, refused by name.

mod fdt;

use fdt::{
    Node, QEMU, QEMU_7, QEMU_10, QEMU_10_GIC_V2, QEMU_10_VIRTIO_IOMMU, QEMU_11, cells, parse, places, set_word, write,
};
use iommu::{Iova, IovaRange, PhysAddr, PhysRange, StreamId};
use kernel::machine::*;

fn phys(base: u64, size: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(base), size).unwrap()
}

fn level(intid: u32) -> Option<Interrupt> {
    Some(Interrupt { intid, trigger: Trigger::LevelHigh })
}

fn edge(intid: u32) -> Option<Interrupt> {
    Some(Interrupt { intid, trigger: Trigger::EdgeRising })
}

#[test]
fn qemus_tree_with_smmu_and_its_is_read_exactly() {
    for dtb in [QEMU_10, QEMU_7, QEMU_11] {
        let machine = Machine::from_fdt(dtb).unwrap();
        assert_eq!(machine.model, "linux,dummy-virt");
        assert_eq!(machine.compatible, ["linux,dummy-virt"]);
        assert_eq!(machine.memory, [phys(0x4000_0000, 0x8000_0000)]);
        assert!(machine.memreserve.is_empty() && machine.reserved.is_empty() && machine.masters.is_empty());
        let cpu = |n| Cpu { mpidr: n, enable: EnableMethod::Psci, path: format!("/cpus/cpu@{n}") };
        assert_eq!(machine.cpus, [cpu(0), cpu(1)]);
        let psci = machine.psci.unwrap();
        assert_eq!((psci.conduit, psci.version, psci.cpu_on), (PsciConduit::Hvc, PsciVersion::V1_0, Some(0xc400_0003)));
        let console = machine.console.as_ref().unwrap();
        assert_eq!((&console.kind, console.registers), (&ConsoleKind::Pl011, phys(0x0900_0000, 0x1000)));
        assert_eq!((console.interrupt, console.clock), (level(33), Some(24_000_000)));
        assert_eq!((console.path.as_str(), &console.options), ("/pl011@9000000", &None));
        let gic = GicV3 {
            distributor: phys(0x0800_0000, 0x1_0000),
            redistributors: vec![phys(0x080a_0000, 0xf6_0000)],
            stride: None,
            maintenance: None,
        };
        assert_eq!(machine.gic, Some(Gic::V3(gic)));
        let its_phandle = Some(0x8004);
        let its = |path: &str| Its { registers: phys(0x0808_0000, 0x2_0000), phandle: its_phandle, path: path.into() };
        assert_eq!(machine.its, [its("/intc@8000000/its@8080000")]);
        assert!(machine.v2m.is_empty());
        let timer = machine.timer.unwrap();
        // 7.2, 10.0 and 11.1 differ in nothing here.
        let timers = (timer.secure_physical, timer.physical, timer.virtual_, timer.hypervisor_physical);
        assert_eq!(timers, (level(29), level(30), level(27), level(26)));
        assert!(timer.always_on && timer.frequency.is_none() && timer.hypervisor_virtual.is_none());
        assert_eq!(machine.fw_cfg, Some(phys(0x0902_0000, 0x18)));
        assert_eq!(machine.chosen, Chosen::default());

        let [smmu] = machine.smmus.as_slice() else { panic!("{:?}", machine.smmus) };
        assert_eq!((smmu.registers, smmu.coherent), (phys(0x0905_0000, 0x2_0000), true));
        let interrupts = SmmuInterrupts {
            eventq: edge(106),
            priq: edge(107),
            cmdq_sync: edge(108),
            gerror: edge(109),
            combined: None,
        };
        assert_eq!((smmu.interrupts, smmu.phandle, smmu.msi_parent), (interrupts, Some(0x8005), None));

        let [host] = machine.pcie.as_slice() else { panic!("{:?}", machine.pcie) };
        assert_eq!((host.ecam, host.buses, host.domain), (phys(0x40_1000_0000, 0x1000_0000), (0, 255), 0));
        assert!(host.dma_coherent && host.dma_ranges.is_none() && host.memory_regions.is_empty());
        let window = |kind, pci, base, size| Window { kind, prefetchable: false, pci, cpu: phys(base, size) };
        assert_eq!(
            host.windows,
            [
                window(WindowKind::Io, 0, 0x3eff_0000, 0x1_0000),
                window(WindowKind::Mem32, 0x1000_0000, 0x1000_0000, 0x2eff_0000),
                window(WindowKind::Mem64, 0x80_0000_0000, 0x80_0000_0000, 0x80_0000_0000),
            ]
        );
        for rid in [0u16, 0x10, 0x1234, 0xffff] {
            assert_eq!(host.stream_of(rid), Some((IommuRef::Smmu(SmmuIndex(0)), StreamId::new(rid.into()))));
            assert_eq!(host.msi_of(rid), Some((MsiController::Its(0), rid.into())));
        }
        for slot in 0..32 {
            for pin in 1..=4 {
                assert_eq!(host.intx.lookup(slot, pin), level(35 + (u32::from(slot) + u32::from(pin) - 1) % 4));
            }
        }
        assert_eq!((host.intx.lookup(0, 0), host.intx.lookup(0, 5)), (None, None));
    }
}

#[test]
fn a_tree_with_a_gicv2_and_no_smmu_is_read_exactly() {
    let machine = Machine::from_fdt(QEMU_10_GIC_V2).unwrap();
    let gic = GicV2 {
        distributor: phys(0x0800_0000, 0x1_0000),
        cpu_interface: phys(0x0801_0000, 0x1_0000),
        maintenance: level(25),
    };
    assert_eq!(machine.gic, Some(Gic::V2(gic)));
    assert!(machine.smmus.is_empty() && machine.its.is_empty());
    assert_eq!(machine.v2m[0].registers, phys(0x0802_0000, 0x1000));
    assert_eq!(machine.psci.unwrap().conduit, PsciConduit::Smc);
    assert_eq!(machine.pcie[0].stream_of(8), None);
    assert_eq!(machine.memory, [phys(0x4000_0000, 0x4000_0000)]);
    // The upper byte of a GICv2's PPI flags is a set of processors.
    assert_eq!(machine.timer.unwrap().virtual_, level(27));
}

#[test]
fn a_tree_with_a_virtio_iommu_is_read_exactly() {
    let machine = Machine::from_fdt(QEMU_10_VIRTIO_IOMMU).unwrap();
    let iommu = VirtioIommu { path: format!("{PCIE}/{VIRTIO_IOMMU}"), host: 0, rid: 0x30, phandle: Some(0x8006) };
    assert_eq!(machine.virtio_iommus, [iommu]);
    assert!(machine.smmus.is_empty() && machine.masters.is_empty());
    let [host] = machine.pcie.as_slice() else { panic!("{:?}", machine.pcie) };
    let here = IommuRef::Virtio(VirtioIommuIndex(0));
    let entry = |rid: u16, count| RidRange { rid, count, target: here, output: rid.into() };
    // Everything but the IOMMU itself.
    assert_eq!(host.iommu_map.entries, [entry(0, 0x30), entry(0x31, 0xffcf)]);
    assert_eq!(host.stream_of(0x30), None);
    for rid in [0u16, 0x2f, 0x31, 0xffff] {
        assert_eq!(host.stream_of(rid), Some((here, StreamId::new(rid.into()))));
    }
    assert_eq!(host.msi_of(0x30), Some((MsiController::Its(0), 0x30)));
}

#[test]
fn a_virtio_iommu_that_cannot_be_where_it_says_is_refused() {
    let node = format!("{PCIE}/{VIRTIO_IOMMU}");
    let fault = |edit: &dyn Fn(&mut Node)| {
        let mut tree = parse(QEMU_10_VIRTIO_IOMMU);
        edit(&mut tree);
        match Machine::from_fdt(&write(&tree, &[])) {
            Err(Error::Property { node, property, fault }) => (node, property, fault),
            other => panic!("{other:?}"),
        }
    };
    let reg = |value: &[u32]| fault(&|tree: &mut Node| _ = tree.at(&node).set("reg", cells(value)));
    assert_eq!(reg(&[0x3000]), (node.clone(), "reg", PropertyFault::Length(4)));
    for high in [0x0200_3000, 0x3004, 0x0100_0000] {
        assert_eq!(reg(&[high, 0, 0, 0, 0]), (node.clone(), "reg", PropertyFault::Value(high.into())));
    }
    let unset = fault(&|tree: &mut Node| _ = tree.at(&node).unset("reg"));
    assert_eq!(unset, (node.clone(), "reg", PropertyFault::Missing));
    let cells_missing = fault(&|tree: &mut Node| _ = tree.at(&node).unset("#iommu-cells"));
    assert_eq!(cells_missing, (node.clone(), "#iommu-cells", PropertyFault::Missing));
    let twice = fault(&|tree: &mut Node| {
        let other = tree.at(&format!("{PCIE}/virtio_iommu@6,1"));
        other.set("compatible", "virtio,pci-iommu\0").set("reg", cells(&[0x3000, 0, 0, 0, 0]));
    });
    assert_eq!((twice.1, twice.2), ("reg", PropertyFault::Overlap(0x30)));
    let homeless = fault(&|tree: &mut Node| _ = tree.at("/virtio_iommu").set("compatible", "virtio,pci-iommu\0"));
    assert_eq!((homeless.0.as_str(), homeless.1), ("/virtio_iommu", "compatible"));
}

#[test]
fn what_a_disabled_virtio_iommu_would_translate_is_translated_by_nobody() {
    let mut tree = parse(QEMU_10_VIRTIO_IOMMU);
    tree.at(&format!("{PCIE}/{VIRTIO_IOMMU}")).set("status", "disabled\0");
    let machine = Machine::from_fdt(&write(&tree, &[])).unwrap();
    assert!(machine.virtio_iommus.is_empty());
    assert_eq!(machine.pcie[0].stream_of(8), None);
}

#[test]
fn a_nop_reads_like_absence() {
    let machine_or_error = |dtb: &[u8]| Machine::from_fdt(dtb).map_err(|error| error.to_string());
    let mut checked = 0;
    for dtb in QEMU {
        assert!(Machine::from_fdt(dtb).is_ok());
        let (whole, places) = (parse(dtb), places(dtb));
        assert_eq!(Machine::from_fdt(&write(&whole, &[])), Machine::from_fdt(dtb));
        let nop = |range: &std::ops::Range<usize>| {
            let mut edited = dtb.to_vec();
            range.clone().step_by(4).for_each(|at| set_word(&mut edited, at, fdt::NOP));
            machine_or_error(&edited)
        };
        for (path, name, range) in &places.properties {
            let mut without = whole.clone();
            without.at(path).unset(name);
            assert_eq!(nop(range), machine_or_error(&write(&without, &[])), "{path} {name}");
            checked += 1;
        }
        for (path, range) in places.nodes.iter().filter(|(path, _)| !path.is_empty()) {
            let mut without = whole.clone();
            without.remove(path);
            assert_eq!(nop(range), machine_or_error(&write(&without, &[])), "{path}");
            checked += 1;
        }
    }
    assert!(checked > 1000, "only {checked} edits");
}

/// QEMU's tree, edited.
fn edited(edit: impl FnOnce(&mut Node)) -> Result<Machine, Error> {
    let mut tree = parse(QEMU_10);
    edit(&mut tree);
    Machine::from_fdt(&write(&tree, &[]))
}

/// The node, property and fault that reading QEMU's tree, edited, ends with.
#[track_caller]
fn fault(edit: impl FnOnce(&mut Node)) -> (String, &'static str, PropertyFault) {
    match edited(edit) {
        Err(Error::Property { node, property, fault }) => (node, property, fault),
        other => panic!("{other:?}"),
    }
}

const GIC: &str = "/intc@8000000";
const PCIE: &str = "/pcie@10000000";
const VIRTIO_IOMMU: &str = "virtio_iommu@6,0";
const SMMU: &str = "/smmuv3@9050000";
const UART: &str = "/pl011@9000000";
const MEMORY: &str = "/memory@40000000";

#[test]
fn memory_that_is_missing_empty_or_described_twice_is_refused() {
    assert_eq!(edited(|tree| tree.remove(MEMORY)), Err(Error::NoMemory));
    let (node, property, what) = fault(|tree| _ = tree.at(MEMORY).set("reg", cells(&[0, 0x4000_0000, 0, 0])));
    assert_eq!((node.as_str(), property), (MEMORY, "reg"));
    assert_eq!(what, PropertyFault::Range { base: 0x4000_0000, size: 0 });
    let (node, _, what) = fault(|tree| {
        let second = tree.at("/memory@50000000");
        second.set("device_type", "memory\0").set("reg", cells(&[0, 0x5000_0000, 0, 0x1000]));
    });
    assert_eq!((node.as_str(), what), ("/memory@50000000", PropertyFault::Overlap(0x5000_0000)));
    let (_, _, what) = fault(|tree| _ = tree.at(MEMORY).set("reg", cells(&[u32::MAX, 0, u32::MAX, 0])));
    assert!(matches!(what, PropertyFault::Range { .. }));
    let several = edited(|tree| _ = tree.at(MEMORY).set("reg", cells(&[1, 0, 0, 4096, 0, 0x4000_0000, 0, 4096])));
    assert_eq!(several.unwrap().memory, [phys(0x4000_0000, 4096), phys(0x1_0000_0000, 4096)]);
}

#[test]
fn no_processor_or_one_described_twice_is_refused() {
    assert_eq!(edited(|tree| tree.remove("/cpus")), Err(Error::NoCpu));
    let (node, _, what) = fault(|tree| _ = tree.at("/cpus/cpu@1").set("reg", cells(&[0])));
    assert_eq!((node.as_str(), what), ("/cpus/cpu@1", PropertyFault::Overlap(0)));
    let (node, ..) = fault(|tree| _ = tree.at("/cpus/cpu@1").set("reg", cells(&[0x8000_0000])));
    assert_eq!(node, "/cpus/cpu@1");
    let machine = edited(|tree| _ = tree.at("/cpus/cpu@1").set("status", "disabled\0")).unwrap();
    assert_eq!(machine.cpus.len(), 1);
}

#[test]
fn chains_of_interrupt_parents_without_an_end_are_refused() {
    // Two nexuses that each send every interrupt to the other.
    let (node, property, what) = fault(|tree| {
        for (name, own, other) in [("a", 0x9001, 0x9002), ("b", 0x9002, 0x9001)] {
            let nexus = tree.at(&format!("/{name}"));
            nexus.set("phandle", cells(&[own])).set("#interrupt-cells", cells(&[1])).set("#address-cells", cells(&[0]));
            nexus.set("interrupt-map-mask", cells(&[0])).set("interrupt-map", cells(&[0, other, 0]));
        }
        tree.at(UART).set("interrupt-parent", cells(&[0x9001])).set("interrupts", cells(&[0]));
    });
    assert_eq!((node.as_str(), property, what), (UART, "interrupts", PropertyFault::Cycle));
    // A device that is its own interrupt parent.
    let (node, ..) = fault(|tree| {
        tree.at(UART).set("phandle", cells(&[0x9001])).set("interrupt-parent", cells(&[0x9001]));
    });
    assert_eq!(node, UART);
}

#[test]
fn a_nexus_on_the_way_to_the_gic_is_followed() {
    let machine = edited(|tree| {
        let nexus = tree.at("/nexus");
        nexus.set("phandle", cells(&[0x9001])).set("#interrupt-cells", cells(&[1])).set("#address-cells", cells(&[0]));
        nexus.set("interrupt-map", cells(&[7, 0x8003, 0, 0, 0, 9, 1]));
        tree.at(UART).set("interrupts-extended", cells(&[0x9001, 7]));
    });
    assert_eq!(machine.unwrap().console.unwrap().interrupt, edge(41));
}

#[test]
fn references_to_nowhere_or_to_the_wrong_kind_are_named() {
    let unresolved = PropertyFault::Unresolved(0x7777);
    for (path, property, value) in [
        (PCIE, "iommu-map", vec![0, 0x7777, 0, 0x1_0000]),
        (PCIE, "msi-map", vec![0, 0x7777, 0, 0x1_0000]),
        (PCIE, "interrupt-map", vec![0, 0, 0, 1, 0x7777, 0, 0, 0, 3, 4]),
        (SMMU, "interrupt-parent", vec![0x7777]),
        (SMMU, "msi-parent", vec![0x7777]),
        (UART, "clocks", vec![0x7777, 0x8000]),
        ("/fw-cfg@9020000", "iommus", vec![0x7777, 0]),
    ] {
        let found = fault(|tree| _ = tree.at(path).set(property, cells(&value)));
        assert_eq!(found, (path.into(), property, unresolved));
    }
    let (node, property, what) = fault(|tree| _ = tree.at(PCIE).set("iommu-map", cells(&[0, 0x8004, 0, 1])));
    assert_eq!((node.as_str(), property), (PCIE, "iommu-map"));
    assert_eq!(what, PropertyFault::WrongKind { phandle: 0x8004, wanted: "an SMMUv3 or a virtio-iommu" });
    let (node, property, what) = fault(|tree| _ = tree.at("/timer").set("phandle", cells(&[0x8003])));
    assert_eq!((property, what), ("phandle", PropertyFault::Phandle(0x8003)), "{node}");
    for reserved in [0, u32::MAX] {
        let (node, _, what) = fault(|tree| _ = tree.at("/timer").set("phandle", cells(&[reserved])));
        assert_eq!((node.as_str(), what), ("/timer", PropertyFault::Phandle(reserved)));
    }
    let (node, property, what) = fault(|tree| _ = tree.at("/chosen").set("stdout-path", "/nothing\0"));
    assert_eq!((node.as_str(), property, what), ("/chosen", "stdout-path", PropertyFault::Path));
}

#[test]
fn the_console_is_found_through_an_alias_with_options() {
    let console = edited(|tree| _ = tree.at("/chosen").set("stdout-path", "serial0:115200n8\0")).unwrap().console;
    let console = console.unwrap();
    assert_eq!((console.path.as_str(), console.options.as_deref()), (UART, Some("115200n8")));
    assert_eq!(edited(|tree| _ = tree.at(UART).set("status", "disabled\0")).unwrap().console, None);
}

#[test]
fn addresses_go_through_every_bus_on_the_way() {
    let build = |tree: &mut Node, outer: &[u32]| {
        let smmu = tree.at(SMMU).clone();
        tree.remove(SMMU);
        let bus = tree.at("/outer");
        bus.set("#address-cells", cells(&[1])).set("#size-cells", cells(&[1])).set("ranges", cells(outer));
        let bus = tree.at("/outer/inner");
        bus.set("#address-cells", cells(&[1])).set("#size-cells", cells(&[1]));
        bus.set("ranges", cells(&[0, 0x10_0000, 0x2_0000]));
        *tree.at("/outer/inner/smmu@0") = Node { name: "smmu@0".into(), ..smmu };
        tree.at("/outer/inner/smmu@0").set("reg", cells(&[0, 0x2_0000]));
    };
    let machine = edited(|tree| build(tree, &[0, 0x12, 0x3400_0000, 0x20_0000])).unwrap();
    assert_eq!(machine.smmus[0].registers, phys(0x12_3410_0000, 0x2_0000));
    assert_eq!(machine.pcie[0].stream_of(1), Some((IommuRef::Smmu(SmmuIndex(0)), StreamId::new(1))));
    // One byte too small.
    let (node, property, what) = fault(|tree| build(tree, &[0, 0x12, 0x3400_0000, 0x11_ffff]));
    assert_eq!((node.as_str(), property, what), ("/outer", "ranges", PropertyFault::NotPassedOn(0x10_0000)));
    // A bus that passes nothing on.
    let (node, ..) = fault(|tree| {
        build(tree, &[0, 0x12, 0x3400_0000, 0x20_0000]);
        tree.at("/outer/inner").unset("ranges");
    });
    assert_eq!(node, "/outer/inner");
}

#[test]
fn requester_ids_are_mapped_by_range_and_mask() {
    let machine = edited(|tree| {
        let host = tree.at(PCIE);
        host.set("iommu-map", cells(&[0x100, 0x8005, 0x1_0000, 0x80, 0, 0x8005, 0x20, 8]));
        host.set("iommu-map-mask", cells(&[0xfff8]));
    });
    let machine = machine.unwrap();
    let host = &machine.pcie[0];
    let stream = |rid| host.stream_of(rid).map(|(_, stream)| stream);
    assert_eq!(stream(7), Some(StreamId::new(0x20)));
    assert_eq!(stream(8), None);
    assert_eq!(stream(0x17f), Some(StreamId::new(0x1_0078)));
    assert_eq!(stream(0x180), None);
    for bad in [&[0, 0x8005, 0, 0][..], &[0xffff, 0x8005, 0, 2], &[0, 0x8005, u32::MAX, 2], &[0x1_0000, 0x8005, 0, 1]] {
        let (node, property, what) = fault(|tree| _ = tree.at(PCIE).set("iommu-map", cells(bad)));
        assert_eq!((node.as_str(), property), (PCIE, "iommu-map"));
        assert!(matches!(what, PropertyFault::Range { .. }), "{what:?}");
    }
    let twice = [0, 0x8005, 0, 0x100, 0x80, 0x8005, 0x1000, 0x100];
    let (_, _, what) = fault(|tree| _ = tree.at(PCIE).set("iommu-map", cells(&twice)));
    assert_eq!(what, PropertyFault::Overlap(0x80));
}

#[test]
fn a_disabled_smmu_translates_for_nobody() {
    let machine = edited(|tree| _ = tree.at(SMMU).set("status", "disabled\0")).unwrap();
    assert!(machine.smmus.is_empty());
    assert_eq!(machine.pcie[0].stream_of(0), None);
}

#[test]
fn windows_that_overlap_or_do_not_fit_are_refused() {
    for bad in [
        // Twice the same.
        &[
            0x0200_0000,
            0,
            0x1000_0000,
            0,
            0x1000_0000,
            0,
            0x1000,
            0x0200_0000,
            0,
            0x2000_0000,
            0,
            0x1000_0000,
            0,
            0x1000,
        ][..],
        // 32-bit memory above 4 GiB.
        &[0x0200_0000, 1, 0, 1, 0, 0, 0x1000],
        // Configuration space.
        &[0, 0, 0, 1, 0, 0, 0x1000],
        // Half an entry.
        &[0x0200_0000, 0, 0x1000_0000, 0],
    ] {
        let (node, property, _) = fault(|tree| _ = tree.at(PCIE).set("ranges", cells(bad)));
        assert_eq!((node.as_str(), property), (PCIE, "ranges"));
    }
    let (node, property, what) = fault(|tree| _ = tree.at(PCIE).set("reg", cells(&[0x40, 0x1000_0000, 0, 0x10_0000])));
    assert_eq!((node.as_str(), property), (PCIE, "reg"));
    assert_eq!(what, PropertyFault::TooSmall { size: 0x10_0000, needed: 0x1000_0000 });
    let machine = edited(|tree| {
        _ = tree.at(PCIE).set("dma-ranges", cells(&[0x0300_0000, 0, 0x4000_0000, 0, 0x8000_0000, 0, 0x1000]))
    });
    let expected = DmaRange { dma: Iova::new(0x4000_0000), cpu: phys(0x8000_0000, 0x1000) };
    assert_eq!(machine.unwrap().pcie[0].dma_ranges, Some(vec![expected]));
}

#[test]
fn reserved_memory_and_bus_masters_are_read() {
    let mut tree = parse(QEMU_10);
    let parent = tree.at("/reserved-memory");
    parent.set("#address-cells", cells(&[2])).set("#size-cells", cells(&[2])).set("ranges", "");
    let pool = tree.at("/reserved-memory/pool@60000000");
    pool.set("compatible", "restricted-dma-pool\0").set("reg", cells(&[0, 0x6000_0000, 0, 0x10_0000]));
    pool.set("phandle", cells(&[0x9001]));
    let secret = tree.at("/reserved-memory/secret@70000000");
    secret.set("no-map", "").set("reg", cells(&[0, 0x7000_0000, 0, 0x1000]));
    let cma = tree.at("/reserved-memory/cma");
    cma.set("compatible", "shared-dma-pool\0").set("reusable", "").set("size", cells(&[0, 0x40_0000]));
    cma.set("alignment", cells(&[0, 0x20_0000])).set("alloc-ranges", cells(&[0, 0x4000_0000, 0, 0x1000_0000]));
    let screen = tree.at("/reserved-memory/screen");
    screen.set("iommu-addresses", cells(&[0x9002, 1, 0, 0, 0x1000]));
    let master = tree.at("/display@a0000000");
    master.set("phandle", cells(&[0x9002])).set("compatible", "acme,display\0").set("iommus", cells(&[0x8005, 0x42]));
    master.set("dma-noncoherent", "").set("memory-region", cells(&[0x9001]));
    let machine = Machine::from_fdt(&write(&tree, &[(0x4800_0000, 0x1000)])).unwrap();

    assert_eq!(machine.memreserve, [phys(0x4800_0000, 0x1000)]);
    let [pool, secret, cma, screen] = machine.reserved.as_slice() else { panic!("{:?}", machine.reserved) };
    assert!(pool.is_compatible("restricted-dma-pool") && pool.ranges == [phys(0x6000_0000, 0x10_0000)]);
    assert!(secret.no_map && !secret.reusable && secret.ranges == [phys(0x7000_0000, 0x1000)]);
    let dynamic =
        DynamicReservation { size: 0x40_0000, alignment: 0x20_0000, allowed: vec![phys(0x4000_0000, 0x1000_0000)] };
    assert!(cma.reusable && cma.ranges.is_empty() && cma.dynamic == Some(dynamic));
    let range = IovaRange::new(Iova::new(0x1_0000_0000), 0x1000).unwrap();
    assert_eq!(screen.iommu_addresses, [IommuAddresses { device: "/display@a0000000".into(), range }]);
    let master = BusMaster {
        path: "/display@a0000000".into(),
        compatible: vec!["acme,display".into()],
        streams: vec![(IommuRef::Smmu(SmmuIndex(0)), StreamId::new(0x42))],
        dma_coherent: false,
        memory_regions: vec![0],
    };
    assert_eq!(machine.masters, [master]);

    tree.at("/reserved-memory/secret@70000000").set("reg", cells(&[0, 0x6000_0000, 0, 0x1000]));
    let error = Machine::from_fdt(&write(&tree, &[])).unwrap_err().to_string();
    assert!(error.contains("/reserved-memory/pool@60000000") || error.contains("secret@70000000"), "{error}");
}

/// Red when a path was compared by its beginning only, and when memory at other addresses was taken for one to one.
#[test]
fn firmwares_addresses_are_found_for_the_functions_they_are_meant_for() {
    let mut tree = parse(QEMU_10);
    let parent = tree.at("/reserved-memory");
    parent.set("#address-cells", cells(&[2])).set("#size-cells", cells(&[2])).set("ranges", "");
    let screen = tree.at("/reserved-memory/screen@60000000");
    screen.set("reg", cells(&[0, 0x6000_0000, 0, 0x10_0000]));
    screen.set("iommu-addresses", cells(&[0x9001, 0x0200_0000, 0, 0x6000_0000, 0, 0x10_0000]));
    let log = tree.at("/reserved-memory/log@61000000");
    log.set("reg", cells(&[0, 0x6100_0000, 0, 0x1000]));
    // Elsewhere, and for everything behind the host.
    log.set("iommu-addresses", cells(&[0x9003, 0, 0x7000_0000, 0, 0x1000]));
    let hidden = tree.at("/reserved-memory/hidden");
    hidden.set("iommu-addresses", cells(&[0x9002, 0, 0, 0x6200_0000, 0, 0x2000]));
    let host = tree.at(PCIE);
    host.set("phandle", cells(&[0x9003]));
    let behind = format!("{PCIE}/bridge@8/display@0,1");
    for (path, phandle) in [(format!("{PCIE}/display@1f,2"), 0x9001), (behind.clone(), 0x9002)] {
        tree.at(&path).set("phandle", cells(&[phandle])).set("reg", cells(&[0, 0, 0, 0, 0]));
    }
    // The same way below another bus, whose path begins with the host's.
    let other = format!("{PCIE}0");
    tree.at(&other).set("#address-cells", cells(&[3])).set("#size-cells", cells(&[2]));
    tree.at(&format!("{other}/display@1f,2")).set("phandle", cells(&[0x9004]));
    let foreign = tree.at("/reserved-memory/foreign");
    foreign.set("iommu-addresses", cells(&[0x9004, 0, 0, 0x6300_0000, 0, 0x1000]));
    let bridge = tree.at(&format!("{PCIE}/bridge@8"));
    bridge.set("#address-cells", cells(&[3])).set("#size-cells", cells(&[2])).set("reg", cells(&[0x4000, 0, 0, 0, 0]));
    let machine = Machine::from_fdt(&write(&tree, &[])).unwrap();
    assert_eq!(machine.reserved.iter().map(|region| region.iommu_addresses.len()).sum::<usize>(), 4);

    let iova = |start, len| IovaRange::new(Iova::new(start), len).unwrap();
    let everybody = FirmwareRegion { iova: iova(0x7000_0000, 0x1000), memory: None };
    let display = FirmwareRegion { iova: iova(0x6000_0000, 0x10_0000), memory: Some(phys(0x6000_0000, 0x10_0000)) };
    let hidden = FirmwareRegion { iova: iova(0x6200_0000, 0x2000), memory: None };
    let of = |way: &[(u8, u8)]| {
        let mut found: Vec<_> = machine.firmware_regions(0, way).collect();
        found.sort_by_key(|region| region.iova);
        found
    };
    assert_eq!(of(&[(0x1f, 2)]), [display, everybody]);
    assert_eq!(of(&[(8, 0), (0, 1)]), [hidden, everybody]);
    for other in [&[(0x1f, 0)][..], &[(1, 2)], &[(8, 0)], &[(8, 0), (0, 0)], &[(0, 1)]] {
        assert_eq!(of(other), [everybody], "{other:?}");
    }
    assert_eq!(machine.firmware_regions(1, &[(0x1f, 2)]).count(), 0);
}

#[test]
fn chosen_is_read_and_checked() {
    let chosen = edited(|tree| {
        let chosen = tree.at("/chosen");
        chosen.set("bootargs", "picture=/a.bmp iommu.off=allow\0").set("rng-seed", [7u8; 32]);
        chosen.set("linux,initrd-start", cells(&[0x4800_0000])).set("linux,initrd-end", cells(&[0, 0x4800_1000]));
    });
    let expected = Chosen {
        bootargs: "picture=/a.bmp iommu.off=allow".into(),
        initrd: Some(phys(0x4800_0000, 0x1000)),
        rng_seed: vec![7; 32],
    };
    assert_eq!(chosen.unwrap().chosen, expected);
    let (node, property, _) = fault(|tree| _ = tree.at("/chosen").set("bootargs", "not terminated"));
    assert_eq!((node.as_str(), property), ("/chosen", "bootargs"));
    let backwards = |tree: &mut Node| {
        tree.at("/chosen").set("linux,initrd-start", cells(&[9])).set("linux,initrd-end", cells(&[8]));
    };
    assert_eq!(fault(backwards).1, "linux,initrd-end");
}

/// Wraps a structure block, written by hand, in a tree whose strings block is `name`.
fn by_hand(structs: &[u32]) -> Result<Machine, Error> {
    let (structs, strings) = (cells(structs), b"name\0\0\0\0");
    let at = 56 + structs.len() as u32;
    let header = [0xd00d_feed, at + 8, 56, at, 40, 17, 16, 0, 8, structs.len() as u32];
    Machine::from_fdt(&[cells(&header), vec![0; 16], structs, strings.to_vec()].concat())
}

#[test]
fn a_broken_structure_names_the_node_that_was_open() {
    use fdt::{BEGIN_NODE, END, END_NODE, NOP, PROP};
    let a = u32::from_be_bytes(*b"a\0\0\0");
    let fault = |structs: &[u32]| match by_hand(structs) {
        Err(Error::Structure { node, fault }) => (node, fault),
        other => panic!("{other:?}"),
    };
    let (root, in_a) = (String::from("/"), String::from("/a"));
    assert_eq!(by_hand(&[BEGIN_NODE, 0, END_NODE, END]), Err(Error::NoMemory));
    assert_eq!(by_hand(&[NOP, BEGIN_NODE, 0, NOP, PROP, 0, 0, NOP, END_NODE, NOP, END]), Err(Error::NoMemory));
    let after_child = [BEGIN_NODE, 0, BEGIN_NODE, a, END_NODE, PROP, 0, 0, END_NODE, END];
    assert_eq!(fault(&after_child), (root.clone(), StructureFault::Misplaced { token: PROP, offset: 20 }));
    for length in [5, u32::MAX] {
        let too_long = [BEGIN_NODE, 0, BEGIN_NODE, a, PROP, length, 0, 0];
        assert_eq!(fault(&too_long), (in_a.clone(), StructureFault::Truncated(28)));
    }
    assert_eq!(fault(&[BEGIN_NODE, 0, BEGIN_NODE, a]), (in_a.clone(), StructureFault::Truncated(16)));
    assert_eq!(fault(&[BEGIN_NODE, 0, PROP, 0, 7]).1, StructureFault::PropertyName(7));
    assert_eq!(fault(&[BEGIN_NODE, 0, PROP, 0, 99]).1, StructureFault::PropertyName(99));
    assert_eq!(fault(&[BEGIN_NODE, 0, 7]), (root.clone(), StructureFault::Token { token: 7, offset: 8 }));
    let two_roots = [BEGIN_NODE, 0, END_NODE, BEGIN_NODE, 0, END_NODE, END];
    assert_eq!(fault(&two_roots), (root.clone(), StructureFault::Misplaced { token: BEGIN_NODE, offset: 12 }));
    let behind = [BEGIN_NODE, 0, END_NODE, END, NOP];
    assert_eq!(fault(&behind), (root.clone(), StructureFault::Misplaced { token: END, offset: 12 }));
    assert_eq!(fault(&[BEGIN_NODE, 0, END]), (root, StructureFault::Misplaced { token: END, offset: 8 }));
}

#[test]
fn a_header_that_lies_says_which_field() {
    let with = |field: usize, value: u32| {
        let mut dtb = QEMU_10.to_vec();
        set_word(&mut dtb, 4 * field, value);
        match Machine::from_fdt(&dtb) {
            Err(Error::Header(fault)) => fault,
            other => panic!("{other:?}"),
        }
    };
    let available = QEMU_10.len();
    assert_eq!(with(0, 1), HeaderFault::Magic(1));
    assert_eq!(with(1, u32::MAX), HeaderFault::TotalSize { claimed: u32::MAX, available });
    assert_eq!(with(1, 39), HeaderFault::TotalSize { claimed: 39, available });
    assert!(matches!(with(2, u32::MAX - 3), HeaderFault::Block { block: "structure", .. }));
    assert!(matches!(with(9, u32::MAX - 3), HeaderFault::Block { block: "structure", .. }));
    assert!(matches!(with(8, u32::MAX), HeaderFault::Block { block: "strings", .. }));
    assert_eq!(with(3, 64), HeaderFault::Overlap("structure", "strings"));
    assert!(matches!(with(4, 44), HeaderFault::Block { block: "memory reservation", .. }));
    assert_eq!(with(4, 64), HeaderFault::Overlap("memory reservation", "structure"));
    assert_eq!(with(5, 16), HeaderFault::Version { version: 16, compatible: 16 });
    assert_eq!(with(6, 18), HeaderFault::Version { version: 17, compatible: 18 });
    // A reservation of two bytes at the end of the address space.
    let tree = write(&parse(QEMU_10), &[(u64::MAX, 2)]);
    assert_eq!(Machine::from_fdt(&tree), Err(Error::Header(HeaderFault::Reservation(40))));
}

#[test]
fn nesting_and_names_are_bounded() {
    let deep = |levels: usize| edited(|tree| _ = tree.at(&"/a".repeat(levels)));
    assert!(deep(MAX_DEPTH - 1).is_ok());
    let error = deep(MAX_DEPTH).unwrap_err();
    assert!(matches!(error, Error::Structure { fault: StructureFault::Depth, .. }), "{error}");
    let error = edited(|tree| _ = tree.at(&format!("/{}", "x".repeat(200)))).unwrap_err();
    assert!(matches!(error, Error::Structure { fault: StructureFault::NodeName(_), .. }), "{error}");
    let error = edited(|tree| tree.at(GIC).properties.push(("phandle".into(), cells(&[1])))).unwrap_err();
    let expected = Error::Structure { node: GIC.into(), fault: StructureFault::SameProperty };
    assert_eq!(error, expected);
    let error = edited(|tree| tree.children.push(Node::new("timer"))).unwrap_err();
    assert_eq!(error, Error::Structure { node: "/timer".into(), fault: StructureFault::SameNode });
}

#[test]
fn a_tree_of_nothing_but_references_does_not_take_forever() {
    // As much of the 2 MiB as possible goes into interrupt maps that must be searched to their ends, and asked for often.
    let start = std::time::Instant::now();
    let result = edited(|tree| {
        let smmu = tree.at(SMMU).clone();
        for nexus in 0..8 {
            let node = tree.at(&format!("/nexus{nexus}"));
            node.set("phandle", cells(&[0x9000 + nexus])).set("#interrupt-cells", cells(&[1]));
            node.set("#address-cells", cells(&[0]));
            let mut map: Vec<u32> = (0..1300).flat_map(|entry| [1 + entry, 0x9000, 0]).collect();
            map.extend([0, if nexus == 7 { 0x8003 } else { 0x9001 + nexus }, 0]);
            if nexus == 7 {
                map.extend([0, 0, 9, 4]);
            }
            node.set("interrupt-map", cells(&map));
        }
        for index in 0..200 {
            let name = format!("smmu@{:x}", 0x1000_0000 + index * 0x2_0000);
            let mut copy = Node { name: name.clone(), ..smmu.clone() };
            copy.set("reg", cells(&[1, 0x1000_0000 + index * 0x2_0000, 0, 0x2_0000])).unset("phandle");
            copy.set("interrupt-parent", cells(&[0x9000])).set("interrupts", cells(&[0; 4]));
            tree.children.push(copy);
        }
    });
    assert!(matches!(result, Err(Error::Property { fault: PropertyFault::Work, .. })), "{result:?}");
    // Not a clock test: minutes are what this is about.
    assert!(start.elapsed().as_secs() < 60);
}

#[test]
fn a_bus_above_bounds_what_a_host_reaches_and_a_device_need_not_name_a_nexus() {
    // The host says nothing of DMA itself; the bus it is on moves addresses, and nothing but its window passes.
    let bus = |own: Option<[u32; 7]>, above: [u32; 6]| {
        edited(|tree| {
            let mut host = tree.at(PCIE).clone();
            tree.remove(PCIE);
            if let Some(own) = own {
                host.set("dma-ranges", cells(&own));
            }
            let bus = tree.at("/bus");
            bus.set("#address-cells", cells(&[2])).set("#size-cells", cells(&[2])).set("ranges", Vec::new());
            bus.set("dma-ranges", cells(&above));
            bus.children.push(host);
        })
    };
    let above = [0, 0x1000_0000, 0, 0x4000_0000, 0, 0x2000_0000];
    let window = |dma, base, size| Some(vec![DmaRange { dma: Iova::new(dma), cpu: phys(base, size) }]);
    assert_eq!(bus(None, above).unwrap().pcie[0].dma_ranges, window(0x1000_0000, 0x4000_0000, 0x2000_0000));
    let own = [0x0300_0000, 0x80, 0, 0, 0x2000_0000, 0, 0x4000_0000];
    assert_eq!(bus(Some(own), above).unwrap().pcie[0].dma_ranges, window(0x80_0000_0000, 0x5000_0000, 0x1000_0000));
    // No address passes both: that is not the same as no bounds.
    let fault = bus(Some(own), [0, 0, 0, 0, 0, 0x1000]).unwrap_err().to_string();
    assert!(fault.contains("dma-ranges"), "{fault}");

    let machine = edited(|tree| {
        let gic = tree.at(GIC).properties.iter().find(|(name, _)| name == "phandle").unwrap().1.clone();
        tree.at("/nexus/uart@0")
            .set("compatible", *b"test\0")
            .set("interrupts", cells(&[5]))
            .set("reg", cells(&[0, 0, 1]));
        let nexus = tree.at("/nexus");
        nexus.set("#address-cells", cells(&[2])).set("#size-cells", cells(&[1])).set("#interrupt-cells", cells(&[1]));
        nexus.set("ranges", Vec::new()).set("interrupt-map-mask", cells(&[0, 0, 63]));
        nexus.set("interrupt-map", [cells(&[0, 0, 5]), gic, cells(&[0, 0, 0, 42, 4])].concat());
        tree.at("/chosen").set("stdout-path", *b"/nexus/uart@0\0");
    });
    assert_eq!(machine.unwrap().console.unwrap().interrupt, level(32 + 42));
}
