//! Machines whose device tree is QEMU's own, with something changed.

use anyhow::{Context, Result, anyhow, bail};
use dtoolkit::model::{DeviceTree, DeviceTreeNode};
use dtoolkit::{Node as _, ToPropertyValue};
use qemu::emulator::Emulator;
use qemu::firmware;
use qemu::machine::{Iommu, Machine};
use std::path::PathBuf;
use std::process::Command;

/// Has QEMU write its own tree of the machine, with these devices.
pub fn described(machine: &Machine, emulator: &Emulator, devices: &[&str]) -> Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("tree");
    let mut command = Command::new(&emulator.program);
    let iommu = if machine.iommu == Iommu::SmmuV3 { "smmuv3" } else { "none" };
    let kind = format!("virt,gic-version=3,iommu={iommu},dtb-randomness=off,dumpdtb={}", file.display());
    command.args(["-M", &kind, "-cpu", &machine.cpu, "-smp", &machine.smp.to_string(), "-m", &machine.memory]);
    command.args(["-nodefaults", "-display", "none"]);
    for device in devices {
        command.args(["-device", device]);
    }
    let output = command.output().context("QEMU cannot be started")?;
    if !output.status.success() {
        bail!("QEMU does not describe this machine: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(std::fs::read(&file)?)
}

/// Keeps the device tree `tree` under `name` and the number of this process, and returns its file.
pub fn keep(name: &str, tree: &[u8]) -> Result<PathBuf> {
    let directory = firmware::workspace().join("target").join("trees");
    std::fs::create_dir_all(&directory).context("the directory for device trees cannot be made")?;
    let file = directory.join(format!("{name}-{}.dtb", std::process::id()));
    std::fs::write(&file, tree).with_context(|| format!("{} cannot be written", file.display()))?;
    Ok(file)
}

/// Gives `machine` the device tree `tree`, kept as by [`keep`].
pub fn give(machine: &mut Machine, name: &str, tree: &[u8]) -> Result<()> {
    machine.extra.extend(["-dtb".into(), keep(name, tree)?.into()]);
    Ok(())
}

/// A copy of the first node below the root whose name begins with `prefix`.
pub fn child(tree: &DeviceTree, prefix: &str) -> Result<DeviceTreeNode> {
    let mut found = tree.root.children().filter(|node| node.name().starts_with(prefix));
    found.next().cloned().with_context(|| format!("no {prefix} in the device tree"))
}

/// Changes a property that is there.
pub fn set(node: &mut DeviceTreeNode, property: &str, value: impl ToPropertyValue) -> Result<()> {
    node.property_mut(property).with_context(|| format!("no {property}"))?.set_value(value);
    Ok(())
}

/// A node with nothing in it.
pub fn node(name: &str) -> Result<DeviceTreeNode> {
    DeviceTreeNode::new(name).map_err(|error| anyhow!("{error}"))
}
