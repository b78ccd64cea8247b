//! From DMA addresses to CPU addresses, through every `dma-ranges` on the way up.
//!
//! Unlike with `ranges`, a bus that says nothing passes addresses on as they are.
//!
//! Devicetree Specification v0.4, section 2.3.9.

use super::address::BusCells;
use super::error::{Error, PropertyFault};
use super::pci::PCI_CELLS;
use super::tree::{Cells, Node, push};
use alloc::vec::Vec;

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
    if windows.is_empty() {
        return Err(bus.fault("dma-ranges", PropertyFault::Range { base: 0, size: 0 }));
    }
    Ok(Some(windows))
}

/// Gives what devices on `bus` reach, through every `dma-ranges` from there up. Empty if nothing on the way says anything: every
/// address is then its own. Windows of which nothing passes are an error.
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
    // Nothing at all is not the same as no bounds.
    match lower.first() {
        Some(first) if passed.is_empty() => Err(bus.fault("dma-ranges", PropertyFault::NotPassedOn(first.cpu))),
        _ => Ok(passed),
    }
}
