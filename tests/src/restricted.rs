//! A device tree in which all PCI devices have a restricted pool: no other memory may be theirs.

use anyhow::{Context, Result, anyhow};
use dtoolkit::Node as _;
use dtoolkit::ToPropertyValue;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use qemu::emulator::Emulator;
use qemu::machine::Machine;
use qemu::trees::{described, keep, node};
use std::path::PathBuf;

/// The device tree's number of the pool, beyond all that QEMU gives.
const PHANDLE: u32 = 0xf002;

/// Writes QEMU's tree of `machine` with a pool of `bytes` for its PCI devices, at a place that the kernel chooses, and returns the
/// file.
pub fn tree(machine: &Machine, emulator: &Emulator, bytes: u32) -> Result<PathBuf> {
    let blob = described(machine, emulator, &[])?;
    let fdt = Fdt::new(&blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut pool = node("pool")?;
    put(&mut pool, "compatible", "restricted-dma-pool")?;
    put(&mut pool, "size", vec![0, bytes])?;
    put(&mut pool, "alignment", vec![0, 0x1000_u32])?;
    put(&mut pool, "phandle", PHANDLE)?;
    let mut reserved = node("reserved-memory")?;
    put(&mut reserved, "#address-cells", 2_u32)?;
    put(&mut reserved, "#size-cells", 2_u32)?;
    put(&mut reserved, "ranges", Vec::<u32>::new())?;
    reserved.add_child(pool);
    tree.root.add_child(reserved);
    let host = tree.root.children().find(|node| node.name().starts_with("pcie@")).map(|node| node.name().to_owned());
    let host = host.context("no PCIe host in the device tree")?;
    let host = tree.root.child_mut(&host).context("no PCIe host in the device tree")?;
    put(host, "memory-region", PHANDLE)?;
    keep("restricted", &tree.to_dtb())
}

fn put(node: &mut DeviceTreeNode, name: &str, value: impl ToPropertyValue) -> Result<()> {
    node.add_property(DeviceTreeProperty::new(name, value).map_err(|error| anyhow!("{error}"))?);
    Ok(())
}
