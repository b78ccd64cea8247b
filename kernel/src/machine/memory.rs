//! Memory, and the parts of it that are somebody's already.
//!
//! Devicetree Specification v0.4, sections 3.4 and 3.5; the `reserved-memory`, `shared-dma-pool` and `iommu-addresses`
//! bindings.

use super::address::{BusCells, all_to_cpu, ranges_of, reg};
use super::error::{Error, PropertyFault};
use super::pools::{self, PoolKind};
use super::range::Span;
use super::tree::{Node, Tree, owned, push};
use alloc::{string::String, vec::Vec};
use iommu::{Iova, IovaRange, PhysRange};

/// A child of `/reserved-memory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservedMemory {
    /// The node's path.
    pub path: String,
    /// Where it is. Empty if the operating system chooses the place ([`dynamic`](Self::dynamic)), or if only device
    /// addresses are reserved ([`iommu_addresses`](Self::iommu_addresses)).
    pub ranges: Vec<PhysRange>,
    /// What to choose a place by.
    pub dynamic: Option<DynamicReservation>,
    /// The processors must not have it mapped.
    pub no_map: bool,
    /// The operating system may use it until its owner asks for it.
    pub reusable: bool,
    /// What it is for: `restricted-dma-pool`, `shared-dma-pool`, ...
    pub compatible: Vec<String>,
    /// What kind of DMA pool it is, if it is one.
    pub pool: Option<PoolKind>,
    /// A pool for all devices that have none of their own (`linux,cma-default`, `linux,dma-default`).
    pub default: bool,
    /// Device addresses that are spoken for.
    pub iommu_addresses: Vec<IommuAddresses>,
}

impl ReservedMemory {
    /// Says whether the region calls itself compatible with `name`.
    pub fn is_compatible(&self, name: &str) -> bool {
        self.compatible.iter().any(|own| own == name)
    }
}

/// A reservation whose place is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamicReservation {
    /// Bytes needed.
    pub size: u64,
    /// Alignment in bytes, a power of two.
    pub alignment: u64,
    /// Where it may be; empty for anywhere.
    pub allowed: Vec<PhysRange>,
}

/// Device addresses that a device uses without asking: its address space must keep them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuAddresses {
    /// Path of the device.
    pub device: String,
    /// The addresses, never empty.
    pub range: IovaRange,
}

/// Reads the memory of the machine: sorted, without overlaps, not empty.
pub(super) fn memory(tree: &Tree<'_>) -> Result<Vec<PhysRange>, Error> {
    let mut ranges = Vec::new();
    for node in tree.root()?.children() {
        if node.text("device_type")? != Some("memory") || !node.enabled()? {
            continue;
        }
        for range in reg(node)? {
            push(&mut ranges, (range, node))?;
        }
    }
    if ranges.is_empty() {
        return Err(Error::NoMemory);
    }
    without_overlaps(ranges)
}

/// Sorts ranges; an overlap is the fault of the node whose range begins later.
fn without_overlaps(mut ranges: Vec<(PhysRange, Node<'_, '_>)>) -> Result<Vec<PhysRange>, Error> {
    ranges.sort_unstable_by_key(|&(range, _)| range);
    let mut sorted: Vec<PhysRange> = Vec::new();
    for (range, node) in ranges {
        if sorted.last().is_some_and(|&last| last.overlaps(range)) {
            return Err(node.fault("reg", PropertyFault::Overlap(range.start().get())));
        }
        push(&mut sorted, range)?;
    }
    Ok(sorted)
}

/// Reads the children of `/reserved-memory` that are not disabled.
pub(super) fn reserved(tree: &Tree<'_>) -> Result<Vec<ReservedMemory>, Error> {
    let (mut found, mut ranges) = (Vec::new(), Vec::new());
    let Some(parent) = tree.find("/reserved-memory") else { return Ok(found) };
    for node in tree.kind(|kinds| &kinds.regions) {
        let region = region(parent, node)?;
        for &range in &region.ranges {
            push(&mut ranges, (range, node))?;
        }
        pools::only_default(node, &found, &region)?;
        push(&mut found, region)?;
    }
    without_overlaps(ranges)?;
    Ok(found)
}

/// Reads one child of `/reserved-memory`.
pub(super) fn region(parent: Node<'_, '_>, node: Node<'_, '_>) -> Result<ReservedMemory, Error> {
    let cells = BusCells::plain(parent)?;
    let iommu_addresses = iommu_addresses(node)?;
    let (mut ranges, mut dynamic) = (Vec::new(), None);
    if node.has("reg") {
        ranges = reg(node)?;
    } else if let Some(size) = node.number("size")? {
        let alignment = node.number("alignment")?.unwrap_or(4096);
        if size == 0 {
            return Err(node.fault("size", PropertyFault::Value(0)));
        }
        if !alignment.is_power_of_two() {
            return Err(node.fault("alignment", PropertyFault::Value(alignment)));
        }
        let allowed = all_to_cpu(parent, ranges_of(node, "alloc-ranges", cells)?.unwrap_or_default())?;
        dynamic = Some(DynamicReservation { size, alignment, allowed });
    } else if iommu_addresses.is_empty() {
        return Err(node.fault("reg", PropertyFault::Missing));
    }
    let mut compatible = Vec::new();
    for name in node.texts("compatible")?.into_iter().flatten() {
        push(&mut compatible, owned(name)?)?;
    }
    let (no_map, reusable) = (node.has("no-map"), node.has("reusable"));
    if no_map && reusable {
        return Err(node.fault("reusable", PropertyFault::Word));
    }
    let default = node.has("linux,cma-default") || node.has("linux,dma-default");
    let path = node.try_path()?;
    let mut region =
        ReservedMemory { path, ranges, dynamic, no_map, reusable, compatible, pool: None, default, iommu_addresses };
    region.pool = pools::kind(node, &region)?;
    Ok(region)
}

/// Reads `iommu-addresses`: (device, address, size), the two numbers in the cells of the bus that the device is on. On a PCI
/// bus a cell that says which space is meant stands before the address; there is only one for DMA.
fn iommu_addresses(node: Node<'_, '_>) -> Result<Vec<IommuAddresses>, Error> {
    let property = "iommu-addresses";
    let mut found = Vec::new();
    let Some(mut list) = node.cells(property)? else { return Ok(found) };
    let length = node.fault(property, PropertyFault::Length(list.len()));
    while let Some(phandle) = list.cell() {
        let device = node.resolve(property, phandle)?;
        let bus = device.parent().ok_or_else(|| node.fault(property, PropertyFault::Unresolved(phandle)))?;
        let mut cells = BusCells::of(bus)?;
        if cells.address == 3 {
            let Some(_space) = list.cell() else { return Err(length) };
            cells.address = 2;
        } else {
            cells = BusCells::plain(bus)?;
        }
        let (Some(base), Some(size)) = (list.number(cells.address), list.number(cells.size)) else {
            return Err(length);
        };
        let range = Span::new(base, size).and_then(|_| IovaRange::new(Iova::new(base), size));
        let range = range.ok_or_else(|| node.fault(property, PropertyFault::Range { base, size }))?;
        push(&mut found, IommuAddresses { device: device.try_path()?, range })?;
    }
    Ok(found)
}

/// Reads the `memory-region` of a device, as indices into what [`reserved`] gives. Regions that are disabled are left out.
pub(super) fn regions_of(node: Node<'_, '_>) -> Result<Vec<usize>, Error> {
    let property = "memory-region";
    let mut found = Vec::new();
    let Some(mut list) = node.cells(property)? else { return Ok(found) };
    while let Some(phandle) = list.cell() {
        let region = node.resolve(property, phandle)?;
        if let Some(index) = region.index_in(|kinds| &kinds.regions) {
            push(&mut found, index)?;
        } else if region.enabled()? {
            return Err(node.fault(property, PropertyFault::WrongKind { phandle, wanted: "reserved memory" }));
        }
    }
    Ok(found)
}
