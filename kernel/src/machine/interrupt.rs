//! Interrupt specifiers, followed through `interrupt-parent` and `interrupt-map` to the GIC.
//!
//! Devicetree Specification v0.4, section 2.4; the `arm,gic` and `arm,gic-v3` bindings. Arm IHI 0069, section 2.2 (INTIDs).

use super::address::BusCells;
use super::error::{Error, PropertyFault};
use super::gic::{GIC_V2, GIC_V3};
use super::tree::{Cells, Node, push};
use alloc::vec::Vec;

/// Longest chain of interrupt nexuses followed.
const MAX_CHAIN: usize = 16;

/// An interrupt of the GIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// The INTID (PPIs start at 16, SPIs at 32).
    pub intid: u32,
    /// How it is signalled.
    pub trigger: Trigger,
}

/// How an interrupt is signalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The tree does not say.
    Unspecified,
    /// On a rising edge.
    EdgeRising,
    /// On a falling edge.
    EdgeFalling,
    /// While the level is high.
    LevelHigh,
    /// While the level is low.
    LevelLow,
}

impl Trigger {
    /// Says whether the interrupt is edge-triggered.
    pub const fn is_edge(self) -> bool {
        matches!(self, Self::EdgeRising | Self::EdgeFalling)
    }
}

/// Reads all interrupts of a device, from `interrupts-extended` or else `interrupts`; none is an empty list.
pub(super) fn interrupts(node: Node<'_, '_>) -> Result<Vec<Interrupt>, Error> {
    let mut found = Vec::new();
    if let Some(mut list) = node.cells("interrupts-extended")? {
        let property = "interrupts-extended";
        let length = node.fault(property, PropertyFault::Length(list.len()));
        while let Some(phandle) = list.cell() {
            let controller = node.resolve(property, phandle)?;
            let Some(specifier) = list.take(specifier_cells(controller)?) else { return Err(length) };
            push(&mut found, follow(node, property, controller, &unit_address(node)?, specifier)?)?;
        }
    } else if let Some(mut list) = node.cells("interrupts")? {
        let controller = parent(node)?;
        let length = node.fault("interrupts", PropertyFault::Length(list.len()));
        let cells = specifier_cells(controller)?;
        while !list.is_empty() {
            let Some(specifier) = list.take(cells) else { return Err(length) };
            push(&mut found, follow(node, "interrupts", controller, &unit_address(node)?, specifier)?)?;
        }
    }
    Ok(found)
}

/// Finds the interrupt parent: what the nearest `interrupt-parent` names, or the nearest node above that has interrupts of its
/// own (a nexus between the device and its controller is not named by its devices).
fn parent<'t, 'a>(node: Node<'t, 'a>) -> Result<Node<'t, 'a>, Error> {
    let mut at = node;
    loop {
        if let Some(phandle) = at.u32("interrupt-parent")? {
            return at.resolve("interrupt-parent", phandle);
        }
        at = at.parent().ok_or_else(|| node.fault("interrupt-parent", PropertyFault::Missing))?;
        if at.has("#interrupt-cells") {
            return Ok(at);
        }
    }
}

/// Gives how many cells an interrupt of this controller has, at least 1.
fn specifier_cells(controller: Node<'_, '_>) -> Result<usize, Error> {
    let property = "#interrupt-cells";
    match controller.u32(property)? {
        Some(cells @ 1..=4) => Ok(cells as usize),
        Some(cells) => Err(controller.fault(property, PropertyFault::Cells(cells))),
        None => Err(controller.fault(property, PropertyFault::Missing)),
    }
}

/// Gives the cells of the first address in `reg`, which a nexus matches against; none without `reg`.
fn unit_address(node: Node<'_, '_>) -> Result<Vec<u32>, Error> {
    let mut address = Vec::new();
    if let (Some(bus), Some(mut reg)) = (node.parent(), node.cells("reg")?) {
        for _ in 0..BusCells::of(bus)?.address {
            let Some(cell) = reg.cell() else { return Err(node.fault("reg", PropertyFault::Length(reg.len()))) };
            push(&mut address, cell)?;
        }
    }
    Ok(address)
}

/// Follows an interrupt from `controller` through nexuses to the GIC. `node` and `property` are who asks.
pub(super) fn follow<'t, 'a>(
    node: Node<'t, 'a>,
    property: &'static str,
    controller: Node<'t, 'a>,
    unit: &[u32],
    specifier: Cells<'a>,
) -> Result<Interrupt, Error> {
    let mut controller = controller;
    let mut unit = collect(unit.iter().copied())?;
    let mut specifier = specifier;
    for _ in 0..MAX_CHAIN {
        if controller.has("interrupt-controller") {
            if !(controller.is_compatible(GIC_V3)? || controller.is_compatible(GIC_V2)?) {
                let phandle = controller.u32("phandle")?.unwrap_or(0);
                return Err(node.fault(property, PropertyFault::WrongKind { phandle, wanted: "a GIC" }));
            }
            return gic(node, property, specifier);
        }
        let map = Nexus::of(controller)?;
        let mut wanted = unit;
        // A device without an address of its own matches as if at address 0, as does one that is not on the nexus' bus.
        wanted.resize(map.address, 0);
        let mut rest = specifier;
        while let Some(cell) = rest.cell() {
            push(&mut wanted, cell)?;
        }
        let hit = map.entries()?.into_iter().find(|entry| map.matches(entry, &wanted));
        let Some(hit) = hit else { return Err(controller.fault("interrupt-map", PropertyFault::Unmapped)) };
        (controller, unit, specifier) = (hit.parent, hit.unit, hit.specifier);
    }
    Err(node.fault(property, PropertyFault::Cycle))
}

fn collect(cells: impl Iterator<Item = u32>) -> Result<Vec<u32>, Error> {
    let mut list = Vec::new();
    for cell in cells {
        push(&mut list, cell)?;
    }
    Ok(list)
}

/// Decodes a specifier of a GIC.
fn gic(node: Node<'_, '_>, property: &'static str, mut specifier: Cells<'_>) -> Result<Interrupt, Error> {
    let length = node.fault(property, PropertyFault::Length(specifier.len()));
    let (Some(kind), Some(number), Some(flags)) = (specifier.cell(), specifier.cell(), specifier.cell()) else {
        return Err(length);
    };
    let fault = node.fault(property, PropertyFault::Interrupt(kind, number, flags));
    let intid = match (kind, number) {
        (0, 0..=987) => 32 + number,
        (1, 0..=15) => 16 + number,
        (2, 0..=1023) => 4096 + number,
        (3, 0..=63) => 1056 + number,
        _ => return Err(fault),
    };
    let trigger = match flags & 0xf {
        0 => Trigger::Unspecified,
        1 => Trigger::EdgeRising,
        2 => Trigger::EdgeFalling,
        4 => Trigger::LevelHigh,
        8 => Trigger::LevelLow,
        _ => return Err(fault),
    };
    Ok(Interrupt { intid, trigger })
}

/// A node with an `interrupt-map`.
pub(super) struct Nexus<'t, 'a> {
    node: Node<'t, 'a>,
    /// Cells of a child's unit address and interrupt specifier.
    pub address: usize,
    pub specifier: usize,
    mask: Vec<u32>,
}

/// An entry of an `interrupt-map`.
pub(super) struct Entry<'t, 'a> {
    /// Unit address and specifier of the child, not masked.
    pub child: Vec<u32>,
    /// Where it goes.
    pub parent: Node<'t, 'a>,
    /// The unit address there.
    pub unit: Vec<u32>,
    /// The specifier there.
    pub specifier: Cells<'a>,
}

impl<'t, 'a> Nexus<'t, 'a> {
    /// Reads the sizes and the mask of a nexus.
    pub fn of(node: Node<'t, 'a>) -> Result<Self, Error> {
        let address = BusCells::of(node)?.address;
        let specifier = specifier_cells(node)?;
        let mask = match node.cells("interrupt-map-mask")? {
            None => collect((0..address + specifier).map(|_| u32::MAX))?,
            Some(mut cells) if cells.len() == 4 * (address + specifier) => {
                collect(core::iter::from_fn(|| cells.cell()))?
            }
            Some(cells) => return Err(node.fault("interrupt-map-mask", PropertyFault::Length(cells.len()))),
        };
        Ok(Self { node, address, specifier, mask })
    }

    /// Reads the entries of the map; a nexus without a map is an error.
    pub fn entries(&self) -> Result<Vec<Entry<'t, 'a>>, Error> {
        let node = self.node;
        let map = node.cells("interrupt-map")?;
        let Some(mut map) = map else { return Err(node.fault("interrupt-map", PropertyFault::Missing)) };
        let length = node.fault("interrupt-map", PropertyFault::Length(map.len()));
        let mut entries = Vec::new();
        while !map.is_empty() {
            let (Some(mut child), Some(phandle)) = (map.take(self.address + self.specifier), map.cell()) else {
                return Err(length);
            };
            node.spend("interrupt-map")?;
            let parent = node.resolve("interrupt-map", phandle)?;
            // Here, unlike elsewhere, a missing #address-cells means none.
            let units = if parent.has("#address-cells") { BusCells::of(parent)?.address } else { 0 };
            let (Some(mut unit), Some(specifier)) = (map.take(units), map.take(specifier_cells(parent)?)) else {
                return Err(length);
            };
            let child = collect(core::iter::from_fn(|| child.cell()))?;
            let unit = collect(core::iter::from_fn(|| unit.cell()))?;
            push(&mut entries, Entry { child, parent, unit, specifier })?;
        }
        Ok(entries)
    }

    /// Applies the mask to a child's unit address and specifier.
    pub fn masked<'m>(&'m self, child: &'m [u32]) -> impl Iterator<Item = u32> + 'm {
        child.iter().zip(&self.mask).map(|(cell, mask)| cell & mask)
    }

    fn matches(&self, entry: &Entry<'_, '_>, wanted: &[u32]) -> bool {
        // Wrong lengths never match: `zip` alone would ignore what is too much.
        entry.child.len() == wanted.len() && self.masked(&entry.child).eq(self.masked(wanted))
    }
}
