//! A machine whose PCIe bus carries few addresses for DMA: `dma-ranges` of three pieces, with holes between them.
//!
//! QEMU has no such bus and carries all of them; the device tree says otherwise.

use anyhow::{Result, anyhow};
use dtoolkit::Node as _;
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeProperty};
use qemu::emulator::Emulator;
use qemu::machine::Machine;
use qemu::trees::{self, child};

/// On a PCI bus: 64-bit memory.
const MEMORY: u32 = 0x0300_0000;
/// First DMA address, where that leads without an IOMMU, and bytes. Not in their order; the last has the doorbell of the ITS.
const RANGES: [[u32; 3]; 3] =
    [[0x4002_0000, 0x4002_0000, 0x1_0000], [0x4000_0000, 0x4000_0000, 0x1_0000], [0x0808_0000, 0x0808_0000, 0x2_0000]];

/// Gives the machine that tree.
pub fn fit(machine: &mut Machine, emulator: &Emulator) -> Result<()> {
    let blob = trees::described(machine, emulator, &[])?;
    let fdt = Fdt::new(&blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    let mut host = child(&tree, "pcie@")?;
    let cells: Vec<u32> = RANGES.iter().flat_map(|&[dma, cpu, len]| [MEMORY, 0, dma, 0, cpu, 0, len]).collect();
    host.add_property(DeviceTreeProperty::new("dma-ranges", cells).map_err(|error| anyhow!("{error}"))?);
    tree.root.remove_child(host.name());
    tree.root.add_child(host);
    trees::give(machine, "carried", &tree.to_dtb())
}
