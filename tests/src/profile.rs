//! The machines that on-target tests ask for by name.

use crate::{carried, firmware_regions, pools};
use anyhow::{Result, bail};
use qemu::emulator::{Emulator, Version};
use qemu::machine::{Disk, Iommu, Machine, virtio_options};
use qemu::topology::two_smmus;
use std::ffi::OsString;

/// The names, with what each is for.
pub const PROFILES: &[(&str, &str)] = &[
    ("default", "two cores, and edu, a writable virtio-blk disk and a virtio-gpu on the root bus"),
    ("smp1", "as default, with one core"),
    ("smp8", "as default, with eight cores"),
    ("el2", "as default, entered at EL2, with the newest processor QEMU has"),
    ("max", "as default, with the newest processor QEMU has"),
    ("bridge", "as default, and an edu behind each of two PCIe root ports"),
    (
        "groups",
        "as default, and edus: two behind a bridge to conventional PCI, two in one device, one behind a root port",
    ),
    ("stage1", "as default, with an SMMU that has stage 1 only where this QEMU has such a machine"),
    ("testdev", "as default, and an iommu-testdev at slot 4 where this QEMU has one"),
    ("two_smmus", "as default without disk and display, and a second edu behind a second SMMU where this QEMU has one"),
    ("crowd", "as default, with 19 disks more from slot 4 on, and a second virtio-gpu"),
    (
        "foreign",
        "as default, with a virtio-rng and two virtio-serial, whose consoles are the ends of one wire, and a disk in slot 12 that goes \
         around the IOMMU",
    ),
    ("firmware", "as default, with a second edu in slot 8, and firmware that uses addresses of the first"),
    ("viommu", "as default, with a virtio-iommu in slot 6 in place of the SMMU"),
    (
        "narrow",
        "as default without disk and display, with 4 GiB of memory, an edu with its usual 28 address lines in slot 1, and one with \
         32 in slot 5",
    ),
    ("pools", "as default, with a carve-out of the edu's and an area for large allocations in the device tree"),
    ("carried", "as default without disk and display, and a PCIe bus that carries three pieces of the DMA addresses"),
    ("gicv2", "as default, with eight cores and a GICv2 with GICv2m"),
    (
        "intx",
        "as default, with nothing that takes messages (before QEMU 11, with disks that send none), two more disks in slots 6 and \
         10, one behind a switch and a bridge to conventional PCI, and one behind a further host bridge",
    ),
    ("far", "as default, with edus behind a further host bridge from bus 0x80 on and behind a switch"),
    ("resets", "as default without display, and an NVMe controller in slot 4"),
    ("bare", "no IOMMU, no disk, no display; two edus with few address lines"),
];

/// Returns the machine of that name, with `disk` where it has one. The devices of a machine stand at fixed places: edu in
/// slot 1, virtio-blk in slot 2, virtio-gpu in slot 3.
pub fn machine(name: &str, disk: Disk, emulator: &Emulator) -> Result<Machine> {
    let mut machine = Machine { disk: Some(disk.writable()), ..Machine::default() };
    match name {
        "default" => {}
        "smp1" => machine.smp = 1,
        "smp8" => machine.smp = 8,
        "el2" => {
            machine.cpu = "max".into();
            machine.extra = words(["-machine", "virtualization=on"]);
        }
        "max" => machine.cpu = "max".into(),
        "bridge" => {
            let edu = |bus: &str| format!("edu,bus={bus},dma_mask=0xffffffffffffffff");
            machine.extra = words(["-device", "pcie-root-port,id=port1,addr=8,chassis=1", "-device", &edu("port1")]);
            machine.extra.extend(words([
                "-device",
                "pcie-root-port,id=port2,addr=9,chassis=2",
                "-device",
                &edu("port2"),
            ]));
        }
        "groups" => {
            for device in [
                "pcie-pci-bridge,id=conventional,addr=8",
                "edu,bus=conventional,addr=1,dma_mask=0xffffffffffffffff",
                "edu,bus=conventional,addr=2,dma_mask=0xffffffffffffffff",
                "edu,addr=9.0,multifunction=on,dma_mask=0xffffffffffffffff",
                "edu,addr=9.1,dma_mask=0xffffffffffffffff",
                "pcie-root-port,id=alone,addr=a,chassis=3",
                "edu,bus=alone,dma_mask=0xffffffffffffffff",
            ] {
                machine.extra.extend(words(["-device", device]));
            }
        }
        "stage1" => {
            // Later machines have both stages, whatever is asked for; earlier emulators have stage 1 only, and no such machine.
            if emulator.version >= Version(9, 1, 0) {
                machine.extra = words(["-machine", "type=virt-9.1"]);
            }
        }
        "testdev" => {
            if emulator.has_device("iommu-testdev")? {
                machine.extra = words(["-device", "iommu-testdev,addr=4"]);
            }
        }
        "two_smmus" => {
            machine = Machine { gpu: false, ..Machine::default() };
            if emulator.can_have("virt", two_smmus::NEEDS)? {
                two_smmus::fit(&mut machine, emulator)?;
                machine.extra.extend(words(["-device", "edu,bus=port1,dma_mask=0xffffffffffffffff"]));
            }
        }
        "crowd" => {
            machine.more_disks = 19;
            machine.extra = words(["-device", &format!("virtio-gpu-pci,addr=18,{}", virtio_options(emulator))]);
        }
        "foreign" => {
            let virtio = "disable-legacy=on,iommu_platform=on";
            machine.extra.extend(words([
                "-blockdev",
                "driver=null-co,node-name=around,size=67108864",
                "-device",
                "virtio-blk-pci,addr=c,drive=around,disable-legacy=on",
            ]));
            // A socket without a place in the file system, of this process alone: its boots follow one another.
            let wire = format!("socket,path=sluice-wire-{},abstract=on", std::process::id());
            machine.extra.extend(words(["-device", &format!("virtio-rng-pci,addr=8,{virtio}")]));
            for (port, options) in [("a", ",server=on,wait=off"), ("b", "")] {
                machine.extra.extend(words([
                    "-chardev",
                    &format!("{wire},id=wire-{port}{options}"),
                    "-device",
                    &format!("virtio-serial-pci,addr={port},id=serial-{port},{virtio}"),
                    "-device",
                    &format!("virtconsole,bus=serial-{port}.0,chardev=wire-{port}"),
                ]));
            }
        }
        "firmware" => firmware_regions::fit(&mut machine, emulator)?,
        "pools" => pools::fit(&mut machine, emulator)?,
        "viommu" => machine.iommu = Iommu::Virtio,
        "narrow" => {
            machine = Machine { disk: None, gpu: false, edu: false, memory: "4G".into(), ..Machine::default() };
            machine.extra = words(["-device", "edu,addr=1", "-device", "edu,addr=5,dma_mask=0xffffffff"]);
        }
        "carried" => {
            machine = Machine { disk: None, gpu: false, ..Machine::default() };
            carried::fit(&mut machine, emulator)?;
        }
        "gicv2" => {
            machine.smp = 8;
            machine.extra = words(["-machine", "gic-version=2"]);
        }
        "intx" => {
            // Before, neither an edu nor a root port could be where nothing takes messages: there the disks have no vectors.
            machine.extra = if emulator.version >= Version(11, 0, 0) {
                words(["-machine", "its=off"])
            } else {
                words(["-global", "virtio-blk-pci.vectors=0"])
            };
            for bridge in [
                "pcie-root-port,id=near,bus=pcie.0,addr=8,chassis=1",
                "x3130-upstream,id=switch,bus=near",
                "xio3130-downstream,id=down,bus=switch,addr=1,chassis=2,slot=1",
                "pcie-pci-bridge,id=conventional,bus=down",
                "pxb-pcie,id=pxb,bus=pcie.0,bus_nr=0x80,addr=9",
                "pcie-root-port,id=far,bus=pxb,addr=2,chassis=3",
            ] {
                machine.extra.extend(words(["-device", bridge]));
            }
            for (name, place) in [
                ("b", "bus=pcie.0,addr=6"),
                ("c", "bus=pcie.0,addr=a"),
                ("d", "bus=conventional,addr=5"),
                ("e", "bus=far"),
            ] {
                machine.extra.extend(empty_disk(name, place, emulator));
            }
        }
        "far" => {
            for device in [
                "pxb-pcie,id=pxb,bus=pcie.0,bus_nr=0x80,addr=18",
                "pcie-root-port,id=far,bus=pxb,chassis=1",
                "edu,bus=far,dma_mask=0xffffffffffffffff",
                "pcie-root-port,id=near,bus=pcie.0,addr=19,chassis=2",
                "x3130-upstream,id=switch,bus=near",
                "xio3130-downstream,id=down,bus=switch,addr=3,chassis=3,slot=3",
                "edu,bus=down,dma_mask=0xffffffffffffffff",
            ] {
                machine.extra.extend(words(["-device", device]));
            }
        }
        "resets" => {
            machine.gpu = false;
            // The table of interrupts in a BAR of its own, so that the registers can be had without it.
            machine.extra = words(["-device", "nvme,addr=4,serial=sluice,msix-exclusive-bar=on"]);
        }
        "bare" => {
            let memory = "4G".into();
            machine = Machine { iommu: Iommu::None, gpu: false, edu: false, memory, ..Machine::default() };
            machine.extra = words(["-device", "edu,addr=6", "-device", "edu,addr=7,dma_mask=0xffffffff"]);
        }
        _ => {
            let known: Vec<&str> = PROFILES.iter().map(|(name, _)| *name).collect();
            bail!("there is no machine {name:?}; the machines are {}", known.join(", "));
        }
    }
    Ok(machine)
}

/// A disk of 64 MiB that reads as zeroes.
fn empty_disk(name: &str, place: &str, emulator: &Emulator) -> Vec<OsString> {
    let drive = format!("driver=null-co,node-name={name},size=67108864,read-zeroes=on");
    words([
        "-blockdev",
        &drive,
        "-device",
        &format!("virtio-blk-pci,{place},drive={name},{}", virtio_options(emulator)),
    ])
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.map(OsString::from).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qemu::machine::DiskFormat;

    #[test]
    fn every_named_machine_exists_and_no_other() {
        // Some take their device tree from it.
        let emulator = crate::emulator().unwrap();
        let disk = || Disk { file: "disk".into(), format: DiskFormat::Raw, writable: false };
        for (name, _) in PROFILES {
            machine(name, disk(), &emulator).unwrap();
        }
        assert!(machine("defualt", disk(), &emulator).unwrap_err().to_string().contains("default"));
    }
}
