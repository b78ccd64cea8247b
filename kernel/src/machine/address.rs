//! From `reg` properties to CPU physical addresses, through every `ranges` on the way up.
//!
//! Devicetree Specification v0.4, sections 2.3.5 to 2.3.8.

use super::error::{Error, PropertyFault};
use super::range::Span;
use super::tree::{Node, push};
use alloc::vec::Vec;
use iommu::{PhysAddr, PhysRange};

/// How many cells an address and a size have for the children of a node.
#[derive(Clone, Copy)]
pub(super) struct BusCells {
    pub address: usize,
    pub size: usize,
}

impl BusCells {
    /// Reads what `bus` says for its children; the specification's defaults are 2 and 1.
    pub fn of(bus: Node<'_, '_>) -> Result<Self, Error> {
        let read = |name, default| match bus.u32(name)?.unwrap_or(default) {
            cells @ 0..=3 => Ok(cells as usize),
            cells => Err(bus.fault(name, PropertyFault::Cells(cells))),
        };
        Ok(Self { address: read("#address-cells", 2)?, size: read("#size-cells", 1)? })
    }

    /// Reads the same, for a bus whose addresses are plain numbers of one or two cells, with sizes.
    pub fn plain(bus: Node<'_, '_>) -> Result<Self, Error> {
        let cells = Self::of(bus)?;
        if !(1..=2).contains(&cells.address) {
            return Err(bus.fault("#address-cells", PropertyFault::Cells(cells.address as u32)));
        }
        if !(1..=2).contains(&cells.size) {
            return Err(bus.fault("#size-cells", PropertyFault::Cells(cells.size as u32)));
        }
        Ok(cells)
    }
}

/// Reads a list of (address, size) of `node`'s `property`, as the bus `cells` belong to numbers them.
pub(super) fn ranges_of(
    node: Node<'_, '_>,
    property: &'static str,
    cells: BusCells,
) -> Result<Option<Vec<Span>>, Error> {
    let Some(mut value) = node.cells(property)? else { return Ok(None) };
    let fault = node.fault(property, PropertyFault::Length(value.len()));
    if value.is_empty() {
        return Err(fault);
    }
    let mut found = Vec::new();
    while !value.is_empty() {
        let (Some(base), Some(size)) = (value.number(cells.address), value.number(cells.size)) else {
            return Err(fault);
        };
        let range = Span::new(base, size).ok_or_else(|| node.fault(property, PropertyFault::Range { base, size }))?;
        push(&mut found, range)?;
    }
    Ok(Some(found))
}

/// Reads `reg` and translates every range in it to CPU addresses; a missing `reg` is an error.
pub(super) fn reg(node: Node<'_, '_>) -> Result<Vec<PhysRange>, Error> {
    let Some(bus) = node.parent() else { return Err(node.fault("reg", PropertyFault::Missing)) };
    let found = ranges_of(node, "reg", BusCells::plain(bus)?)?;
    all_to_cpu(bus, found.ok_or_else(|| node.fault("reg", PropertyFault::Missing))?)
}

/// Reads the first range of `reg` as CPU addresses, and checks that it has room for `needed` bytes.
pub(super) fn first_reg(node: Node<'_, '_>, needed: u64) -> Result<PhysRange, Error> {
    let range = reg(node)?.first().copied().ok_or_else(|| node.fault("reg", PropertyFault::Missing))?;
    require(node, range, needed)
}

/// Checks that `range`, one of `node`'s registers, has room for `needed` bytes.
pub(super) fn require(node: Node<'_, '_>, range: PhysRange, needed: u64) -> Result<PhysRange, Error> {
    if range.len() < needed {
        return Err(node.fault("reg", PropertyFault::TooSmall { size: range.len(), needed }));
    }
    Ok(range)
}

/// Translates `range`, an address on `bus`, to CPU addresses. It must lie in one entry of each `ranges` on the way.
pub(super) fn to_cpu(bus: Node<'_, '_>, range: Span) -> Result<PhysRange, Error> {
    let (mut bus, mut range) = (bus, range);
    while let Some(parent) = bus.parent() {
        range = one_level_up(bus, parent, range)?;
        bus = parent;
    }
    let (base, size) = (range.base(), range.size());
    PhysRange::new(PhysAddr::new(base), size).ok_or_else(|| bus.fault("ranges", PropertyFault::Range { base, size }))
}

/// Translates several ranges.
pub(super) fn all_to_cpu(bus: Node<'_, '_>, ranges: Vec<Span>) -> Result<Vec<PhysRange>, Error> {
    let mut found = Vec::new();
    for range in ranges {
        push(&mut found, to_cpu(bus, range)?)?;
    }
    Ok(found)
}

fn one_level_up(bus: Node<'_, '_>, parent: Node<'_, '_>, range: Span) -> Result<Span, Error> {
    let not_passed_on = || bus.fault("ranges", PropertyFault::NotPassedOn(range.base()));
    let Some(mut map) = bus.cells("ranges")? else { return Err(not_passed_on()) };
    if map.is_empty() {
        return Ok(range);
    }
    let (child, up) = (BusCells::plain(bus)?, BusCells::plain(parent)?);
    let length = bus.fault("ranges", PropertyFault::Length(map.len()));
    let mut found = None;
    while !map.is_empty() {
        let entry = (map.number(child.address), map.number(up.address), map.number(child.size));
        let (Some(from), Some(to), Some(size)) = entry else { return Err(length) };
        let (Some(window), Some(_)) = (Span::new(from, size), Span::new(to, size)) else {
            return Err(bus.fault("ranges", PropertyFault::Range { base: to, size }));
        };
        bus.spend("ranges")?;
        if found.is_none() && window.contains(range) {
            found = Span::new(to + (range.base() - from), range.size());
        }
    }
    found.ok_or_else(not_passed_on)
}
