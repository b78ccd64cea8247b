//! A machine with two SMMUs, each before a PCIe root bus of its own.
//!
//! QEMU has such machines from 10.2 on, but describes the second SMMU to ACPI only. So the device tree that it makes is
//! completed here: the second root bus becomes a host of its own, with the upper half of the bus numbers and a part of each
//! window, behind the second SMMU.

use crate::emulator::Emulator;
use crate::machine::{Iommu, Machine};
use crate::trees::{self, child, set};
use anyhow::{Context, Result, anyhow};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode};
use dtoolkit::{Node as _, Property as _};

/// The first bus number behind the second SMMU.
const BUS: u32 = 128;
/// What an SMMU's registers take, and where the second's are: they stand one behind the other.
const REGISTERS: u32 = 0x2_0000;
/// The device tree's number of the second SMMU, beyond all that QEMU gives.
const PHANDLE: u32 = 0xf001;

/// A device that only a QEMU has that can have several SMMUs.
pub const NEEDS: &str = "arm-smmuv3,primary-bus=pcie.0";

/// Gives the machine two SMMUs, with a root port `port1` behind the second.
pub fn fit(machine: &mut Machine, emulator: &Emulator) -> Result<()> {
    machine.iommu = Iommu::None;
    machine.bridges = vec![
        NEEDS.into(),
        format!("pxb-pcie,id=pcie.1,bus_nr={BUS},bus=pcie.0,addr=7"),
        "arm-smmuv3,primary-bus=pcie.1".into(),
        "pcie-root-port,bus=pcie.1,id=port1,chassis=1".into(),
    ];
    let tree = complete(&trees::described(machine, emulator, &[])?)?;
    trees::give(machine, "two-smmus", &tree)
}

fn complete(blob: &[u8]) -> Result<Vec<u8>> {
    let fdt = Fdt::new(blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let first = child(&tree, "smmuv3@")?;
    let cells = |node: &DeviceTreeNode, name: &str| -> Result<Vec<u32>> {
        let property = node.property(name).with_context(|| format!("no {name} in {}", node.name()))?;
        Ok(property
            .value()
            .chunks_exact(4)
            .map(|cell| u32::from_be_bytes([cell[0], cell[1], cell[2], cell[3]]))
            .collect())
    };
    let (registers, wires, phandle) =
        (cells(&first, "reg")?, cells(&first, "interrupts")?, cells(&first, "phandle")?[0]);
    let base = registers[1] + REGISTERS;
    let mut second = renamed(&first, &format!("smmuv3@{base:x}"))?;
    set(&mut second, "reg", [0, base, 0, REGISTERS])?;
    let next = u32::try_from(wires.len() / 3)?;
    let wires: Vec<u32> = wires.chunks(3).flat_map(|wire| [wire[0], wire[1] + next, wire[2]]).collect();
    set(&mut second, "interrupts", wires)?;
    set(&mut second, "phandle", PHANDLE)?;

    let host = child(&tree, "pcie@")?;
    let ecam = cells(&host, "reg")?;
    let middle = ecam[1] + (BUS << 20);
    // Three cells of the bus's address, two of the processor's, two of the length.
    let windows = cells(&host, "ranges")?;
    let (mut below, mut above) = (Vec::new(), Vec::new());
    for window in windows.chunks_exact(7) {
        let space = window[0] >> 24 & 3;
        let len = u64::from(window[5]) << 32 | u64::from(window[6]);
        if space == 1 {
            below.extend_from_slice(window);
            continue;
        }
        // Half of the largest power of two in it, so that both stay aligned.
        let half = 1 << (len.ilog2() - 1);
        below.extend(part(window, 0, half));
        above.extend(part(window, half, half));
    }
    let mut far = renamed(&host, "pcie@80000000")?;
    set(&mut far, "reg", [ecam[0], middle, 0, (256 - BUS) << 20])?;
    set(&mut far, "bus-range", [BUS, 255])?;
    set(&mut far, "ranges", above)?;
    set(&mut far, "iommu-map", [BUS << 8, PHANDLE, BUS << 8, (256 - BUS) << 8])?;
    let mut near = host;
    set(&mut near, "reg", [ecam[0], ecam[1], 0, BUS << 20])?;
    set(&mut near, "bus-range", [0, BUS - 1])?;
    set(&mut near, "ranges", below)?;
    set(&mut near, "iommu-map", [0, phandle, 0, BUS << 8])?;
    for node in [second, near, far] {
        tree.root.remove_child(node.name());
        tree.root.add_child(node);
    }
    Ok(tree.to_dtb())
}

/// `len` bytes of a window, from `offset` on.
fn part(window: &[u32], offset: u64, len: u64) -> [u32; 7] {
    let moved = |high: u32, low: u32| {
        let address = (u64::from(high) << 32 | u64::from(low)) + offset;
        [(address >> 32) as u32, address as u32]
    };
    let (bus, cpu) = (moved(window[1], window[2]), moved(window[3], window[4]));
    [window[0], bus[0], bus[1], cpu[0], cpu[1], (len >> 32) as u32, len as u32]
}

fn renamed(node: &DeviceTreeNode, name: &str) -> Result<DeviceTreeNode> {
    let mut copy = DeviceTreeNode::new(name).map_err(|error| anyhow!("{error}"))?;
    node.properties().for_each(|property| copy.add_property(property.clone()));
    Ok(copy)
}
