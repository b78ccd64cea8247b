//! A machine whose device tree sets memory aside for DMA: a carve-out of the edu's, and an area for large allocations.

use anyhow::{Context, Result, anyhow};
use dtoolkit::Node as _;
use dtoolkit::ToPropertyValue;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use qemu::emulator::Emulator;
use qemu::machine::Machine;
use qemu::trees::{described, give, node};

/// Where the carve-out is, in the middle of memory, and its size. The on-target tests know both.
const CARVE_OUT: (u32, u32) = (0x5000_0000, 0x40_0000);
/// The size of the area, whose place is left open.
const AREA: u32 = 0x180_0000;
/// The device tree's number of the carve-out, beyond all that QEMU gives.
const PHANDLE: u32 = 0xf002;

/// Gives the machine such a tree.
pub fn fit(machine: &mut Machine, emulator: &Emulator) -> Result<()> {
    let tree = complete(&described(machine, emulator, &[])?)?;
    give(machine, "pools", &tree)
}

fn set(node: &mut DeviceTreeNode, name: &str, value: impl ToPropertyValue) -> Result<()> {
    node.add_property(DeviceTreeProperty::new(name, value).map_err(|error| anyhow!("{name}: {error}"))?);
    Ok(())
}

fn complete(blob: &[u8]) -> Result<Vec<u8>> {
    let fdt = Fdt::new(blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut own = node(&format!("edu@{:x}", CARVE_OUT.0))?;
    set(&mut own, "compatible", "shared-dma-pool")?;
    set(&mut own, "no-map", [0_u32; 0])?;
    set(&mut own, "reg", [0, CARVE_OUT.0, 0, CARVE_OUT.1])?;
    set(&mut own, "phandle", PHANDLE)?;
    let mut area = node("area")?;
    set(&mut area, "compatible", "shared-dma-pool")?;
    set(&mut area, "reusable", [0_u32; 0])?;
    set(&mut area, "linux,cma-default", [0_u32; 0])?;
    set(&mut area, "size", [0, AREA])?;
    let mut reserved = node("reserved-memory")?;
    set(&mut reserved, "#address-cells", 2_u32)?;
    set(&mut reserved, "#size-cells", 2_u32)?;
    set(&mut reserved, "ranges", [0_u32; 0])?;
    reserved.add_child(own);
    reserved.add_child(area);
    tree.root.add_child(reserved);
    let name =
        tree.root.children().find(|child| child.name().starts_with("pcie@")).map(|child| child.name().to_string());
    let host = name.and_then(|name| tree.root.child_mut(&name)).context("no PCIe host in QEMU's tree")?;
    // Slot 1.
    let mut edu = node("edu@1")?;
    set(&mut edu, "reg", [0x800_u32, 0, 0, 0, 0])?;
    set(&mut edu, "memory-region", PHANDLE)?;
    host.add_child(edu);
    Ok(tree.to_dtb())
}
