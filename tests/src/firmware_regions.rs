//! A machine whose firmware has started the device in slot 1 and goes on using some of its addresses.
//!
//! QEMU names no PCI function in the tree, and has no such firmware. So its tree is completed here: a node of the edu in slot 1
//! below the host bridge, and two regions of reserved memory with `iommu-addresses` for it.

use anyhow::{Result, anyhow};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node as _, ToPropertyValue};
use qemu::emulator::Emulator;
use qemu::machine::Machine;
use qemu::trees::{self, child, node};

/// The device tree's number of the edu, beyond all that QEMU gives.
const PHANDLE: u32 = 0xf002;
/// Of an address on a PCI bus: 32-bit memory.
const MEMORY: u32 = 0x0200_0000;
/// Memory that firmware uses through the edu, at its own addresses.
const SHARED: [u32; 2] = [0x5000_0000, 0x4000];
/// Addresses of the edu that lead to nothing, and are to be left alone. Such as are given out first.
const HIDDEN: [u32; 2] = [0x20_4000, 0x8000];

/// Makes a machine with that tree, and an edu in slot 8 of which firmware knows nothing.
pub fn fit(machine: &mut Machine, emulator: &Emulator) -> Result<()> {
    let tree = complete(&trees::described(machine, emulator, &[])?)?;
    machine.extra.extend(["-device".into(), "edu,addr=8,dma_mask=0xffffffffffffffff".into()]);
    trees::give(machine, "firmware", &tree)
}

fn complete(blob: &[u8]) -> Result<Vec<u8>> {
    let fdt = Fdt::new(blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut host = child(&tree, "pcie@")?;
    let mut edu = node("edu@1")?;
    add(&mut edu, "reg", [1_u32 << 11, 0, 0, 0, 0])?;
    add(&mut edu, "phandle", PHANDLE)?;
    host.add_child(edu);
    let mut reserved = node("reserved-memory")?;
    add(&mut reserved, "#address-cells", 2_u32)?;
    add(&mut reserved, "#size-cells", 2_u32)?;
    add(&mut reserved, "ranges", [0_u8; 0])?;
    for (name, [start, len], memory) in [("screen@50000000", SHARED, true), ("mailbox", HIDDEN, false)] {
        let mut region = node(name)?;
        if memory {
            add(&mut region, "reg", [0, start, 0, len])?;
        }
        add(&mut region, "iommu-addresses", [PHANDLE, MEMORY, 0, start, 0, len])?;
        reserved.add_child(region);
    }
    tree.root.remove_child(host.name());
    tree.root.add_child(host);
    tree.root.add_child(reserved);
    Ok(tree.to_dtb())
}

fn add(node: &mut DeviceTreeNode, name: &str, value: impl ToPropertyValue) -> Result<()> {
    node.add_property(DeviceTreeProperty::new(name, value).map_err(|error| anyhow!("{error}"))?);
    Ok(())
}
