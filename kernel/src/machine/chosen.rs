//! What firmware chose for us: command line, console, initial ramdisk, randomness.
//!
//! Devicetree Specification v0.4, sections 3.3 and 3.6; the `arm,pl011` binding.

use super::address::first_reg;
use super::error::{Error, PropertyFault};
use super::interrupt::{Interrupt, interrupts};
use super::tree::{Node, Tree, owned, push};
use alloc::{string::String, vec::Vec};
use iommu::{PhysAddr, PhysRange};

/// What `/chosen` says, apart from the console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The command line.
    pub bootargs: String,
    /// The initial ramdisk.
    pub initrd: Option<PhysRange>,
    /// Random bytes from the boot loader.
    pub rng_seed: Vec<u8>,
}

/// The console that `stdout-path` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Console {
    /// The node's path.
    pub path: String,
    /// What kind of device it is.
    pub kind: ConsoleKind,
    /// Its registers.
    pub registers: PhysRange,
    /// Its interrupt.
    pub interrupt: Option<Interrupt>,
    /// Frequency of its clock in Hz, where that is fixed.
    pub clock: Option<u32>,
    /// What follows the colon in `stdout-path`, as in `115200n8`.
    pub options: Option<String>,
}

/// What kind of device the console is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsoleKind {
    /// Arm's PL011.
    Pl011,
    /// A PL011 that may not be configured (SBSA generic UART).
    Sbsa,
    /// Something else: the first word of its `compatible`.
    Other(String),
}

/// Reads `/chosen`; all of it may be missing.
pub(super) fn chosen(tree: &Tree<'_>) -> Result<Chosen, Error> {
    let mut chosen = Chosen::default();
    let Some(node) = tree.find("/chosen") else { return Ok(chosen) };
    if let Some(bootargs) = node.text("bootargs")? {
        chosen.bootargs = owned(bootargs)?;
    }
    if let Some(seed) = node.property("rng-seed") {
        chosen.rng_seed.try_reserve_exact(seed.len()).map_err(|_| Error::OutOfMemory)?;
        chosen.rng_seed.extend_from_slice(seed);
    }
    chosen.initrd = match (node.number("linux,initrd-start")?, node.number("linux,initrd-end")?) {
        (None, None) => None,
        (Some(_), None) => return Err(node.fault("linux,initrd-end", PropertyFault::Missing)),
        (None, Some(_)) => return Err(node.fault("linux,initrd-start", PropertyFault::Missing)),
        (Some(start), Some(end)) => {
            let range = PhysRange::between(PhysAddr::new(start), PhysAddr::new(end)).filter(|range| !range.is_empty());
            Some(range.ok_or_else(|| node.fault("linux,initrd-end", PropertyFault::Value(end)))?)
        }
    };
    Ok(chosen)
}

/// Reads the console, if `stdout-path` names one that is not disabled.
pub(super) fn console(tree: &Tree<'_>) -> Result<Option<Console>, Error> {
    let Some(chosen) = tree.find("/chosen") else { return Ok(None) };
    let Some(text) = chosen.text("stdout-path")? else { return Ok(None) };
    let (path, options) = text.split_once(':').map_or((text, None), |(path, options)| (path, Some(options)));
    let path = match path.starts_with('/') {
        true => path,
        false => alias(tree, path)?.ok_or_else(|| chosen.fault("stdout-path", PropertyFault::Path))?,
    };
    let node = tree.find(path).ok_or_else(|| chosen.fault("stdout-path", PropertyFault::Path))?;
    if !node.enabled()? {
        return Ok(None);
    }
    let kind = if node.is_compatible(&["arm,pl011"])? {
        ConsoleKind::Pl011
    } else if node.is_compatible(&["arm,sbsa-uart"])? {
        ConsoleKind::Sbsa
    } else {
        let name = node.texts("compatible")?.and_then(|mut names| names.next()).unwrap_or("");
        ConsoleKind::Other(owned(name)?)
    };
    Ok(Some(Console {
        path: node.try_path()?,
        registers: first_reg(node, if matches!(kind, ConsoleKind::Other(_)) { 1 } else { 0x1000 })?,
        kind,
        interrupt: interrupts(node)?.first().copied(),
        clock: clock(node, "uartclk")?,
        options: options.map(owned).transpose()?,
    }))
}

/// Looks up a path in `/aliases`.
fn alias<'a>(tree: &Tree<'a>, name: &str) -> Result<Option<&'a str>, Error> {
    let Some(aliases) = tree.find("/aliases") else { return Ok(None) };
    let Some(value) = aliases.property(name) else { return Ok(None) };
    let text = value.strip_suffix(&[0]).and_then(|text| core::str::from_utf8(text).ok());
    text.map(Some).ok_or_else(|| aliases.fault("stdout-path", PropertyFault::Text))
}

/// Reads the frequency of the clock called `wanted` (or the first, where they have no names) if it is a fixed one.
fn clock(node: Node<'_, '_>, wanted: &str) -> Result<Option<u32>, Error> {
    let Some(mut list) = node.cells("clocks")? else { return Ok(None) };
    let length = node.fault("clocks", PropertyFault::Length(list.len()));
    let index = match node.texts("clock-names")? {
        Some(mut names) => match names.position(|name| name == wanted) {
            Some(index) => index,
            None => return Ok(None),
        },
        None => 0,
    };
    let mut clocks = Vec::new();
    while let Some(phandle) = list.cell() {
        let clock = node.resolve("clocks", phandle)?;
        let cells = clock.u32("#clock-cells")?;
        let cells = cells.ok_or_else(|| clock.fault("#clock-cells", PropertyFault::Missing))?;
        if list.take(cells as usize).is_none() {
            return Err(length);
        }
        push(&mut clocks, clock)?;
    }
    let clock = clocks.get(index).ok_or(length)?;
    if clock.is_compatible(&["fixed-clock"])? { clock.u32("clock-frequency") } else { Ok(None) }
}

/// Reads where QEMU's `fw_cfg` is, if it is there.
pub(super) fn fw_cfg(tree: &Tree<'_>) -> Result<Option<PhysRange>, Error> {
    let nodes = tree.compatible(&["qemu,fw-cfg-mmio"])?;
    if let Some(second) = nodes.get(1) {
        return Err(Error::Duplicate { node: second.path(), what: "an fw_cfg" });
    }
    nodes.first().map(|&node| first_reg(node, 0x10)).transpose()
}
