//! The table of topologies.

use super::Need::{self, Device, Option, Type, UBoot, Value};
use super::{Topology, two_smmus};
use crate::board::{Board, Name, Places};
use crate::emulator::Emulator;
use crate::machine::{Iommu, Machine, Slots, virtio_options};
use crate::progress::Progress;
use crate::trees;
use crate::trial::Expect::{Picture, Refusal};
use anyhow::Result;
use std::path::PathBuf;

/// All topologies, in the order in which they are shown.
pub const TOPOLOGIES: &[Topology] = &[
    Topology { name: "plain", about: "GICv3 with an ITS, SMMUv3, everything on the root bus", ..PLAIN },
    Topology {
        name: "gicv2",
        about: "GICv2 and GICv2m",
        change: |machine, _| option(machine, "gic-version=2"),
        ..PLAIN
    },
    Topology {
        name: "gicv2-intx",
        about: "GICv2, no MSI: wired interrupts",
        needs: &[Value("msi=off")],
        change: |machine, _| without_msi(machine, "gic-version=2,msi=off"),
        ..PLAIN
    },
    Topology {
        name: "gicv3-v2m",
        about: "GICv3 and GICv2m in place of the ITS",
        needs: &[Value("msi=gicv2m")],
        change: |machine, _| option(machine, "msi=gicv2m"),
        ..PLAIN
    },
    Topology {
        name: "gicv3-intx",
        about: "GICv3, no MSI: wired interrupts",
        needs: &[Option("its")],
        change: |machine, _| without_msi(machine, "its=off"),
        ..PLAIN
    },
    Topology {
        name: "el2",
        about: "entered at EL2",
        says: &[("sluice", "entered at EL2")],
        change: |machine, _| option(machine, "virtualization=on"),
        ..PLAIN
    },
    Topology {
        name: "el3",
        about: "entered at EL3, on a machine without EL2",
        says: &[("sluice", "entered at EL3")],
        change: |machine, emulator| at_el3(machine, emulator, "secure=on"),
        ..PLAIN
    },
    Topology {
        name: "el3-el2",
        about: "entered at EL3, on a machine with EL2",
        says: &[("sluice", "entered at EL3")],
        change: |machine, emulator| at_el3(machine, emulator, "secure=on,virtualization=on"),
        ..PLAIN
    },
    Topology {
        name: "u-boot",
        about: "started by U-Boot's `booti`, with tree and initrd at the end of memory",
        needs: &[UBoot],
        change: |machine, _| {
            // It finds kernel and command line where QEMU leaves them for firmware.
            machine.extra.extend(["-bios".into(), u_boot().into()]);
            Ok(())
        },
        ..PLAIN
    },
    Topology {
        name: "highmem-off",
        about: "nothing above 4 GiB",
        change: |machine, _| option(machine, "highmem=off"),
        ..PLAIN
    },
    Topology {
        name: "ecam-low",
        about: "PCIe configuration space below 4 GiB, with 16 buses",
        needs: &[Option("highmem-ecam")],
        change: |machine, _| option(machine, "highmem-ecam=off"),
        ..PLAIN
    },
    Topology { name: "memory-128m", about: "128 MiB of memory", change: |machine, _| memory(machine, "128M"), ..PLAIN },
    Topology { name: "memory-4g", about: "4 GiB", change: |machine, _| memory(machine, "4G"), ..PLAIN },
    Topology { name: "memory-64g", about: "64 GiB", change: |machine, _| memory(machine, "64G"), ..PLAIN },
    Topology {
        name: "cores-1",
        about: "one core",
        says: &[("sluice", " 1 core,")],
        change: |machine, _| cores(machine, 1),
        ..PLAIN
    },
    Topology {
        name: "cores-3",
        about: "3 cores",
        says: &[("sluice", " 3 cores,")],
        change: |machine, _| cores(machine, 3),
        ..PLAIN
    },
    Topology {
        name: "cores-8",
        about: "8 cores",
        says: &[("sluice", " 8 cores,")],
        change: |machine, _| cores(machine, 8),
        ..PLAIN
    },
    Topology {
        name: "root-ports",
        about: "each device behind a PCIe root port",
        change: |machine, _| {
            machine.bridges = (1..=3).map(|port| root_port("pcie.0", port)).collect();
            slots(machine, ["bus=port1", "bus=port2", "bus=port3"])
        },
        ..PLAIN
    },
    Topology {
        name: "switch",
        about: "the devices behind the ports of a PCIe switch",
        change: |machine, _| {
            machine.bridges = vec![root_port("pcie.0", 1), "x3130-upstream,id=switch,bus=port1".into()];
            machine.bridges.extend(
                (0..3).map(|port| {
                    format!("xio3130-downstream,id=down{port},bus=switch,chassis={},slot={port}", port + 10)
                }),
            );
            slots(machine, ["bus=down0", "bus=down1", "bus=down2"])
        },
        ..PLAIN
    },
    Topology {
        name: "pci-bridge",
        about: "the disk behind a PCIe-to-PCI bridge, whose requester ID it has",
        change: |machine, _| {
            machine.bridges = vec![root_port("pcie.0", 1), "pcie-pci-bridge,id=conventional,bus=port1".into()];
            slots(machine, [EDU_SLOT, "bus=conventional,addr=5", "bus=pcie.0,addr=3"])
        },
        ..PLAIN
    },
    Topology {
        name: "pxb",
        about: "disk and display behind a further host bridge (`pxb-pcie`), from bus 0x40 on",
        change: |machine, _| {
            machine.bridges = vec!["pxb-pcie,id=pxb,bus=pcie.0,bus_nr=0x40,addr=8".into()];
            machine.bridges.extend((1..=2).map(|port| root_port("pxb", port)));
            slots(machine, [EDU_SLOT, "bus=port1", "bus=port2"])
        },
        ..PLAIN
    },
    Topology {
        name: "pxb-above-80",
        about: "the same from bus 0xc0 on",
        change: |machine, _| {
            machine.bridges = vec!["pxb-pcie,id=pxb,bus=pcie.0,bus_nr=0xc0,addr=8".into()];
            machine.bridges.extend((1..=2).map(|port| root_port("pxb", port)));
            slots(machine, [EDU_SLOT, "bus=port1", "bus=port2"])
        },
        ..PLAIN
    },
    Topology {
        name: "buses-above-80",
        about: "disk and display behind the last two of 136 root ports, on buses 0x87 and 0x88",
        says: &[("device    virtio-blk", " 87:00.0 "), ("device    virtio-gpu", " 88:00.0 ")],
        change: |machine, _| {
            // Eight functions in each slot. The kernel numbers the buses in their order.
            machine.bridges = (0..136)
                .map(|port| {
                    let (slot, function) = (port / 8 + 8, port % 8);
                    let several = if function == 0 { ",multifunction=on" } else { "" };
                    format!(
                        "pcie-root-port,id=port{port},bus=pcie.0,addr={slot:x}.{function}{several},chassis={}",
                        port + 1
                    )
                })
                .collect();
            slots(machine, [EDU_SLOT, "bus=port134", "bus=port135"])
        },
        ..PLAIN
    },
    Topology {
        name: "twenty-disks",
        about: "20 disks, the picture on the first",
        change: |machine, _| {
            machine.more_disks = 19;
            Ok(())
        },
        ..PLAIN
    },
    Topology {
        name: "two-displays",
        about: "two virtio-gpu, the picture on the first",
        change: |machine, emulator| {
            let device = format!("virtio-gpu-pci,addr=4,id=second,{}", virtio_options(emulator));
            machine.extra.extend(["-device".into(), device.into()]);
            Ok(())
        },
        ..PLAIN
    },
    Topology {
        name: "two-smmus",
        about: "two SMMUs, each before a host bridge: the disk behind one, the display behind the other",
        needs: &[Device(two_smmus::NEEDS)],
        change: |machine, emulator| {
            two_smmus::fit(machine, emulator)?;
            slots(machine, [EDU_SLOT, "bus=pcie.0,addr=2", "bus=port1"])
        },
        ..PLAIN
    },
    Topology {
        name: "stage-1",
        about: "an SMMU with stage 1 only",
        says: &[("smmu", " stage 1,")],
        change: |machine, emulator| stage(machine, emulator, "1"),
        ..PLAIN
    },
    Topology {
        name: "stage-2",
        about: "an SMMU with stage 2 only",
        says: &[("smmu", " stage 2,")],
        needs: STAGES,
        change: |machine, emulator| stage(machine, emulator, "2"),
        ..PLAIN
    },
    Topology {
        name: "nested",
        about: "an SMMU with both stages, as asked for",
        says: &[("smmu", " stages 1 and 2,")],
        needs: STAGES,
        change: |machine, emulator| stage(machine, emulator, "nested"),
        ..PLAIN
    },
    Topology {
        name: "smmu-device",
        about: "an SMMU that is a device of its own (`-device arm-smmuv3`)",
        needs: &[Device(two_smmus::NEEDS)],
        change: |machine, _| smmu_device(machine, ""),
        ..PLAIN
    },
    Topology {
        name: "bypass",
        about: "a root bus that bypasses the SMMU (`default-bus-bypass-iommu=on`)",
        expect: Refusal("iommu"),
        change: |machine, _| option(machine, "default-bus-bypass-iommu=on"),
        ..PLAIN
    },
    Topology {
        name: "no-smmu",
        about: "no IOMMU at all",
        expect: Refusal("iommu"),
        change: |machine, _| {
            machine.iommu = Iommu::None;
            Ok(())
        },
        ..PLAIN
    },
    Topology {
        name: "sbsa-ref",
        about: "another board, as with `--board sbsa`: from flash, at EL3, memory from 1 TiB on",
        says: &[("sluice", "QEMU sbsa-ref")],
        change: |machine, _| {
            machine.board = Name::Sbsa.prepare(&mut Progress::silent())?;
            Ok(())
        },
        ..PLAIN
    },
];

/// Where the edu is if not elsewhere.
const EDU_SLOT: &str = "bus=pcie.0,addr=1";

const PLAIN: Topology = Topology { name: "", about: "", expect: Picture, says: &[], needs: &[], change: |_, _| Ok(()) };

/// An SMMU whose stages can be chosen. Where it is not a device of its own, only the machine of 9.1 lets them be.
const STAGES: &[Need] = &[Need::Any(&[Device(two_smmus::NEEDS), Type("virt-9.1")])];

/// U-Boot for QEMU's machine `virt`: Debian's, unless `SLUICE_UBOOT` names another.
pub(super) fn u_boot() -> PathBuf {
    std::env::var_os("SLUICE_UBOOT").unwrap_or_else(|| "/usr/lib/u-boot/qemu_arm64/u-boot.bin".into()).into()
}

fn option(machine: &mut Machine, option: &str) -> Result<()> {
    machine.options.push(option.into());
    Ok(())
}

/// A machine without MSI, and so without an edu, which QEMU does not make then.
fn without_msi(machine: &mut Machine, options: &str) -> Result<()> {
    machine.edu = false;
    option(machine, options)
}

fn memory(machine: &mut Machine, size: &str) -> Result<()> {
    machine.memory = size.into();
    // So much memory that is not touched need not be there.
    let object = format!("memory-backend-ram,id=memory,size={size},reserve=off");
    machine.extra.extend(["-object".into(), object.into(), "-machine".into(), "memory-backend=memory".into()]);
    Ok(())
}

fn cores(machine: &mut Machine, count: u32) -> Result<()> {
    machine.smp = count;
    Ok(())
}

/// Where edu, disk and display are.
fn slots(machine: &mut Machine, [edu, disk, display]: [&str; 3]) -> Result<()> {
    machine.slots = Some(Slots { edu: edu.into(), disk: disk.into(), display: display.into() });
    Ok(())
}

fn root_port(bus: &str, number: u32) -> String {
    format!("pcie-root-port,id=port{number},bus={bus},addr={:x},chassis={number}", number + 8)
}

/// The image entered in the highest exception level that the machine has: there is no boot loader that would give it up.
fn at_el3(machine: &mut Machine, emulator: &Emulator, options: &str) -> Result<()> {
    machine.options.push(options.into());
    // A machine that starts so has no PSCI, and nothing that would start the other cores.
    machine.smp = 1;
    let tree = trees::described(machine, emulator, &[])?.into();
    machine.board = Board::Loaded { places: Places { image: 0x4020_0000, tree: 0x4800_1000, initrd: None }, tree };
    Ok(())
}

fn stage(machine: &mut Machine, emulator: &Emulator, stage: &str) -> Result<()> {
    if emulator.can_have("virt", two_smmus::NEEDS)? {
        return smmu_device(machine, &format!(",stage={stage}"));
    }
    // An SMMU that knows no stages has stage 1 only.
    if stage == "1" && !emulator.can_be("virt-9.1")? {
        return Ok(());
    }
    machine.options.push("type=virt-9.1".into());
    machine.extra.extend(["-global".into(), format!("arm-smmuv3.stage={stage}").into()]);
    Ok(())
}

fn smmu_device(machine: &mut Machine, options: &str) -> Result<()> {
    machine.iommu = Iommu::None;
    machine.bridges.push(format!("arm-smmuv3,primary-bus=pcie.0{options}"));
    Ok(())
}
