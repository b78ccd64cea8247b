//! Requester IDs to streams and messages.

use super::super::error::{Error, PropertyFault};
use super::super::tree::{Node, push};
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
