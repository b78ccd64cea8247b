//! Requester IDs to streams and messages, and DMA addresses to CPU addresses.

use super::super::address::BusCells;
use super::super::error::{Error, PropertyFault};
use super::super::pci::PCI_CELLS;
use super::super::tree::{Cells, Node, push};
use alloc::{string::String, vec::Vec};

/// Most rows that a masked map may become.
const MAX_ROWS: usize = 1 << 16;

/// A run of requester IDs, and where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RidRow {
    /// First requester ID.
    pub rid: u32,
    /// Path of the node that knows them under another number.
    pub target: String,
    /// The number of the first there.
    pub output: u32,
    /// Number of requester IDs.
    pub count: u32,
}

/// Part of memory that a device can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaWindow {
    /// First DMA address.
    pub dma: u64,
    /// The CPU address it stands for.
    pub cpu: u64,
    /// Length in bytes, never 0.
    pub size: u64,
}

/// An entry of a map as the tree has it; without a target if that is disabled or cannot be found.
struct Entry<'t, 'a> {
    rid: u32,
    target: Option<Node<'t, 'a>>,
    output: u32,
    count: u32,
}

impl Entry<'_, '_> {
    fn offset_of(&self, rid: u32) -> Option<u32> {
        rid.checked_sub(self.rid).filter(|&offset| offset < self.count)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let end = |entry: &Self| u64::from(entry.rid) + u64::from(entry.count);
        u64::from(self.rid) < end(other) && u64::from(other.rid) < end(self)
    }
}

/// Reads `iommu-map` or `msi-map`. An entry has four cells whatever its target is. Rows are those of the tree where that is the
/// whole truth; where a mask hides bits, or entries overlap (the first counts), each requester ID on `buses` is looked up.
pub(super) fn rid_rows(
    node: Node<'_, '_>,
    property: &'static str,
    mask_property: &'static str,
    buses: (u8, u8),
    faults: &mut Vec<Error>,
) -> Result<Vec<RidRow>, Error> {
    let Some(mut list) = node.cells(property)? else { return Ok(Vec::new()) };
    let length = list.len();
    let mask = node.u32(mask_property)?.unwrap_or(u32::MAX) & 0xffff;
    let mut entries: Vec<Entry<'_, '_>> = Vec::new();
    while let Some(rid) = list.cell() {
        let (Some(phandle), Some(output), Some(count)) = (list.cell(), list.cell(), list.cell()) else {
            push(faults, node.fault(property, PropertyFault::Length(length)))?;
            break;
        };
        let target = match node.resolve(property, phandle) {
            Ok(target) => Some(target).filter(|target| target.usable()),
            Err(fault) => {
                push(faults, fault)?;
                None
            }
        };
        if count != 0 {
            push(&mut entries, Entry { rid, target, output, count })?;
        }
    }
    let mut sorted: Vec<&Entry<'_, '_>> = entries.iter().collect();
    sorted.sort_by_key(|entry| entry.rid);
    let apart = sorted.windows(2).all(|pair| !matches!(pair, [a, b] if a.overlaps(b)));
    if mask == 0xffff && apart { as_written(&entries) } else { looked_up(node, property, &entries, mask, buses) }
}

fn as_written(entries: &[Entry<'_, '_>]) -> Result<Vec<RidRow>, Error> {
    let mut rows = Vec::new();
    for entry in entries {
        if let Some(target) = entry.target {
            let (rid, output, count) = (entry.rid, entry.output, entry.count);
            push(&mut rows, RidRow { rid, target: target.try_path()?, output, count })?;
        }
    }
    Ok(rows)
}

fn looked_up(
    node: Node<'_, '_>,
    property: &'static str,
    entries: &[Entry<'_, '_>],
    mask: u32,
    (first, last): (u8, u8),
) -> Result<Vec<RidRow>, Error> {
    let mut paths = Vec::new();
    for entry in entries {
        push(&mut paths, entry.target.map(Node::try_path).transpose()?)?;
    }
    let mut rows: Vec<RidRow> = Vec::new();
    for rid in u32::from(first) << 8..=u32::from(last) << 8 | 0xff {
        let hit =
            entries.iter().zip(&paths).find_map(|(entry, path)| Some((entry, path, entry.offset_of(rid & mask)?)));
        let Some((entry, Some(target), offset)) = hit else { continue };
        let output = entry.output.wrapping_add(offset);
        if let Some(row) = rows.last_mut()
            && (row.rid + row.count, row.output.wrapping_add(row.count)) == (rid, output)
            && row.target == *target
        {
            row.count += 1;
            continue;
        }
        if rows.len() >= MAX_ROWS {
            return Err(node.fault(property, PropertyFault::Work));
        }
        push(&mut rows, RidRow { rid, target: super::owned(target)?, output, count: 1 })?;
    }
    Ok(rows)
}

/// Without an `msi-map`, all requester IDs go unchanged to the `msi-parent`: the first that is not disabled.
pub(super) fn msi_parent_row(node: Node<'_, '_>) -> Result<Vec<RidRow>, Error> {
    let mut rows = Vec::new();
    let Some(mut list) = node.cells("msi-parent")? else { return Ok(rows) };
    let length = list.len();
    while let Some(phandle) = list.cell() {
        let target = node.resolve("msi-parent", phandle)?;
        if target.usable() {
            push(&mut rows, RidRow { rid: 0, target: target.try_path()?, output: 0, count: 0x1_0000 })?;
            break;
        }
        let cells = target.u32("#msi-cells")?.unwrap_or(0) as usize;
        list.take(cells).ok_or_else(|| node.fault("msi-parent", PropertyFault::Length(length)))?;
    }
    Ok(rows)
}

/// Takes an address of `cells` cells; that of a PCI bus begins with one that says which space is meant.
fn address(list: &mut Cells<'_>, cells: usize) -> Option<u64> {
    if cells == PCI_CELLS {
        list.cell()?;
        return list.number(2);
    }
    list.number(cells)
}

/// Reads what `dma-ranges` of one bus says; `None` if addresses pass as they are.
fn one_level(bus: Node<'_, '_>, parent: Node<'_, '_>) -> Result<Option<Vec<DmaWindow>>, Error> {
    let Some(mut list) = bus.cells("dma-ranges")?.filter(|list| !list.is_empty()) else { return Ok(None) };
    let length = list.len();
    let (child, up) = (BusCells::of(bus)?, BusCells::of(parent)?);
    if child.address == 0 {
        return Err(bus.fault("#address-cells", PropertyFault::Cells(0)));
    }
    let mut windows = Vec::new();
    while !list.is_empty() {
        bus.spend("dma-ranges")?;
        let entry = (address(&mut list, child.address), address(&mut list, up.address), list.number(child.size));
        let (Some(dma), Some(cpu), Some(size)) = entry else {
            return Err(bus.fault("dma-ranges", PropertyFault::Length(length)));
        };
        if size != 0 {
            push(&mut windows, DmaWindow { dma, cpu, size })?;
        }
    }
    Ok(Some(windows))
}

/// Gives what devices on `bus` reach, through every `dma-ranges` from there up. Empty if nothing on the way says anything: every
/// address is then its own.
pub(super) fn dma_windows(bus: Node<'_, '_>) -> Result<Vec<DmaWindow>, Error> {
    let mut windows: Option<Vec<DmaWindow>> = None;
    let mut bus = bus;
    while let Some(parent) = bus.parent() {
        if let Some(level) = one_level(bus, parent)? {
            windows = Some(match windows {
                None => level,
                Some(lower) => through(bus, &lower, &level)?,
            });
        }
        bus = parent;
    }
    Ok(windows.unwrap_or_default())
}

/// Puts windows through those of the bus above: what passes both.
fn through(bus: Node<'_, '_>, lower: &[DmaWindow], upper: &[DmaWindow]) -> Result<Vec<DmaWindow>, Error> {
    let end = |base: u64, size: u64| u128::from(base) + u128::from(size);
    let mut passed = Vec::new();
    for low in lower {
        for high in upper {
            bus.spend("dma-ranges")?;
            let start = low.cpu.max(high.dma);
            let stop = end(low.cpu, low.size).min(end(high.dma, high.size));
            let Some(size) = stop.checked_sub(start.into()).filter(|&size| size != 0) else { continue };
            let window = DmaWindow {
                dma: low.dma.wrapping_add(start - low.cpu),
                cpu: high.cpu.wrapping_add(start - high.dma),
                // No longer than either, and so it fits.
                size: u64::try_from(size).unwrap_or(u64::MAX),
            };
            push(&mut passed, window)?;
        }
    }
    Ok(passed)
}
