//! Machines whose device tree is QEMU's own, with something changed.

use crate::emulator::Emulator;
use crate::firmware;
use crate::machine::Machine;
use anyhow::{Context, Result, anyhow, bail};
use dtoolkit::fdt::Fdt;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use dtoolkit::{Node as _, ToPropertyValue};
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Has QEMU write its own tree of the machine as it would be with no kernel, with these devices and without its disk.
pub fn described(machine: &Machine, emulator: &Emulator, devices: &[&str]) -> Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("tree");
    let mut machine = Machine { disk: None, window: None, trace: Vec::new(), ..machine.clone() };
    for device in devices {
        machine.extra.extend(["-device".into(), device.into()]);
    }
    machine.extra.extend(["-machine".into(), format!("dumpdtb={}", file.display()).into()]);
    let mut command = Command::new(&emulator.program);
    command.args(machine.arguments(emulator, Vec::new(), &directory.path().join("qmp"))?).stdin(Stdio::null());
    let output = command.output().context("QEMU cannot be started")?;
    if !output.status.success() {
        bail!("QEMU does not describe this machine: {}", String::from_utf8_lossy(&output.stderr));
    }
    std::fs::read(&file).context("QEMU does not describe this machine")
}

/// Completes a tree as a boot loader does: with the kernel's command line, and where an initrd lies.
pub fn with_chosen(blob: &[u8], command_line: &str, initrd: Option<Range<u64>>) -> Result<Vec<u8>> {
    let fdt = Fdt::new(blob).map_err(|error| anyhow!("QEMU's device tree: {error}"))?;
    let mut tree = DeviceTree::from_fdt(&fdt);
    if tree.root.child("chosen").is_none() {
        tree.root.add_child(node("chosen")?);
    }
    let chosen = tree.root.child_mut("chosen").context("no place for the command line")?;
    let mut put = |name: &str, value: &[u8]| -> Result<()> {
        chosen.remove_property(name);
        chosen.add_property(DeviceTreeProperty::new(name, value).map_err(|error| anyhow!("{error}"))?);
        Ok(())
    };
    if !command_line.is_empty() {
        put("bootargs", &[command_line.as_bytes(), &[0]].concat())?;
    }
    if let Some(initrd) = initrd {
        put("linux,initrd-start", &initrd.start.to_be_bytes())?;
        put("linux,initrd-end", &initrd.end.to_be_bytes())?;
    }
    Ok(tree.to_dtb())
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

#[cfg(test)]
mod tests {
    use super::*;
    use dtoolkit::Property as _;

    #[test]
    fn a_tree_is_completed_as_a_boot_loader_does_and_what_was_there_is_replaced() {
        let mut tree = DeviceTree::new();
        let mut chosen = node("chosen").unwrap();
        chosen.add_property(DeviceTreeProperty::new("bootargs", "old").unwrap());
        tree.root.add_child(chosen);
        for blob in [tree.to_dtb(), DeviceTree::new().to_dtb()] {
            let blob = with_chosen(&blob, "a=1 b", Some(0x1_0000_0000..0x1_0000_1234)).unwrap();
            let fdt = Fdt::new(&blob).unwrap();
            let chosen = fdt.root().child("chosen").unwrap();
            assert_eq!(chosen.property("bootargs").unwrap().value(), b"a=1 b\0");
            assert_eq!(chosen.property("linux,initrd-start").unwrap().value(), [0, 0, 0, 1, 0, 0, 0, 0]);
            assert_eq!(chosen.property("linux,initrd-end").unwrap().value(), [0, 0, 0, 1, 0, 0, 0x12, 0x34]);
        }
        assert!(with_chosen(b"no tree", "", None).is_err());
    }
}
