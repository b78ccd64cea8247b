//! PCI Express host bridges.
//!
//! The `pci-host-ecam-generic`, `pci-iommu` and `pci-msi` bindings; IEEE 1275 PCI bus binding (the three-cell addresses).

use super::address::{BusCells, first_reg, to_cpu};
use super::error::{Error, PropertyFault};
use super::gic::{MsiController, msi_controller, msi_parent};
use super::interrupt::{Interrupt, Nexus, follow};
use super::iommu::{IommuRef, iommu_of};
use super::memory::regions_of;
use super::range::Span;
use super::tree::{Node, Tree, push};
use ::iommu::{Iova, PhysRange, StreamId};
use alloc::{string::String, vec::Vec};

/// What host bridges with memory-mapped configuration space are called.
pub(super) const ECAM: &[&str] = &["pci-host-ecam-generic"];
/// Bytes of configuration space of one bus.
const BUS: u64 = 1 << 20;
/// Cells of a PCI address.
pub(super) const PCI_CELLS: usize = 3;

/// A PCI Express host bridge with memory-mapped configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcieHost {
    /// The node's path.
    pub path: String,
    /// Configuration space: 1 MiB for each bus, the first of [`buses`](Self::buses) first.
    pub ecam: PhysRange,
    /// First and last bus number.
    pub buses: (u8, u8),
    /// Domain (segment) number.
    pub domain: u32,
    /// Where the host's address space shows up in ours.
    pub windows: Vec<Window>,
    /// From DMA addresses to CPU addresses; `None`: they are the same.
    pub dma_ranges: Option<Vec<DmaRange>>,
    /// DMA is coherent with the processors' caches.
    pub dma_coherent: bool,
    /// Wired interrupts.
    pub intx: IntxMap,
    /// Regions of [`Machine::reserved`](super::Machine::reserved) set aside for DMA of devices behind this host.
    pub memory_regions: Vec<usize>,
    /// From requester IDs to StreamIDs.
    pub iommu_map: RidMap<IommuRef>,
    /// From requester IDs to DeviceIDs.
    pub msi_map: RidMap<MsiController>,
}

/// What lies behind a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowKind {
    /// I/O ports.
    Io,
    /// Memory for 32-bit BARs.
    Mem32,
    /// Memory for 64-bit BARs.
    Mem64,
}

/// Part of a host's address space that processors can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// What lies behind it.
    pub kind: WindowKind,
    /// Reads have no side effects.
    pub prefetchable: bool,
    /// First address on the PCI side; the size is that of [`cpu`](Self::cpu).
    pub pci: u64,
    /// Where it is for processors.
    pub cpu: PhysRange,
}

/// Part of memory that devices behind a host can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// First DMA address; the size is that of [`cpu`](Self::cpu).
    pub dma: Iova,
    /// What it reaches.
    pub cpu: PhysRange,
}

/// From requester IDs to something else, as `iommu-map` and `msi-map` say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RidMap<T> {
    /// What of a requester ID counts.
    pub mask: u16,
    /// Sorted by requester ID, without overlaps.
    pub entries: Vec<RidRange<T>>,
}

/// A run of requester IDs, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RidRange<T> {
    /// First requester ID.
    pub rid: u16,
    /// Number of requester IDs: 1 to 65536.
    pub count: u32,
    /// Who knows them under another number.
    pub target: T,
    /// The number of the first there.
    pub output: u32,
}

impl<T: Copy> RidMap<T> {
    /// Says who knows requester ID `rid`, and under which number.
    pub fn lookup(&self, rid: u16) -> Option<(T, u32)> {
        let rid = u32::from(rid & self.mask);
        self.entries.iter().find_map(|entry| {
            let offset = rid.checked_sub(entry.rid.into()).filter(|&offset| offset < entry.count)?;
            Some((entry.target, entry.output.checked_add(offset)?))
        })
    }
}

/// Where the wired interrupts of slots on the first bus go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IntxMap {
    /// What of an address (first cell) counts.
    mask: u32,
    /// (address and mask, pin, interrupt)
    entries: Vec<(u32, u8, Interrupt)>,
}

impl IntxMap {
    /// Gives the interrupt of `pin` (1 is INTA) of the device at `slot` on the host's first bus.
    pub fn lookup(&self, slot: u8, pin: u8) -> Option<Interrupt> {
        let address = u32::from(slot & 31) << 11 & self.mask;
        self.entries.iter().find(|entry| (entry.0, entry.1) == (address, pin)).map(|entry| entry.2)
    }

    /// Says whether there are no wired interrupts.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl PcieHost {
    /// Says which IOMMU translates for requester ID `rid`, and the StreamID it has there. `None`: nobody translates.
    pub fn stream_of(&self, rid: u16) -> Option<(IommuRef, StreamId)> {
        self.iommu_map.lookup(rid).map(|(iommu, stream)| (iommu, StreamId::new(stream)))
    }

    /// Says which MSI controller knows requester ID `rid`, and the DeviceID it has there.
    pub fn msi_of(&self, rid: u16) -> Option<(MsiController, u32)> {
        self.msi_map.lookup(rid)
    }
}

/// Reads all host bridges.
pub(super) fn hosts(tree: &Tree<'_>) -> Result<Vec<PcieHost>, Error> {
    let mut hosts: Vec<PcieHost> = Vec::new();
    for node in tree.compatible(ECAM)? {
        let host = host(node, hosts.len() as u32)?;
        for other in &hosts {
            if other.ecam.overlaps(host.ecam) {
                return Err(node.fault("reg", PropertyFault::Overlap(host.ecam.start().get())));
            }
            if other.domain == host.domain && other.buses.0 <= host.buses.1 && host.buses.0 <= other.buses.1 {
                return Err(node.fault("bus-range", PropertyFault::Overlap(host.buses.0.into())));
            }
        }
        push(&mut hosts, host)?;
    }
    Ok(hosts)
}

fn host(node: Node<'_, '_>, index: u32) -> Result<PcieHost, Error> {
    let cells = BusCells::of(node)?;
    if cells.address != PCI_CELLS {
        return Err(node.fault("#address-cells", PropertyFault::Cells(cells.address as u32)));
    }
    if !(1..=2).contains(&cells.size) {
        return Err(node.fault("#size-cells", PropertyFault::Cells(cells.size as u32)));
    }
    let buses = buses(node)?;
    let ecam = first_reg(node, (u64::from(buses.1 - buses.0) + 1) * BUS)?;
    Ok(PcieHost {
        path: node.try_path()?,
        ecam,
        buses,
        domain: node.u32("linux,pci-domain")?.unwrap_or(index),
        windows: windows(node, cells)?,
        dma_ranges: dma_ranges(node, cells)?,
        dma_coherent: node.dma_coherent(),
        intx: intx(node)?,
        memory_regions: regions_of(node)?,
        iommu_map: rid_map(node, "iommu-map", "iommu-map-mask", iommu_of)?.unwrap_or_else(no_entries),
        msi_map: match rid_map(node, "msi-map", "msi-map-mask", msi_controller)? {
            Some(map) => map,
            None => msi_map_from_parent(node)?,
        },
    })
}

/// Reads the first and the last bus number.
pub(super) fn buses(node: Node<'_, '_>) -> Result<(u8, u8), Error> {
    let Some(mut range) = node.cells("bus-range")? else { return Ok((0, 255)) };
    let length = node.fault("bus-range", PropertyFault::Length(range.len()));
    let (Some(first), Some(last), true) = (range.cell(), range.cell(), range.is_empty()) else { return Err(length) };
    match (u8::try_from(first), u8::try_from(last)) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err(node.fault("bus-range", PropertyFault::Value(u64::from(first) << 32 | u64::from(last)))),
    }
}

/// An entry of `ranges` or `dma-ranges`: first cell of the PCI address, then the range on either side.
type Mapping = (u32, Span, PhysRange);

fn mapping(node: Node<'_, '_>, property: &'static str, cells: BusCells) -> Result<Option<Vec<Mapping>>, Error> {
    let Some(mut map) = node.cells(property)? else { return Ok(None) };
    let length = node.fault(property, PropertyFault::Length(map.len()));
    let Some(parent) = node.parent() else { return Err(length) };
    let up = BusCells::plain(parent)?;
    let mut found = Vec::new();
    while let Some(high) = map.cell() {
        let (Some(pci), Some(base), Some(size)) = (map.number(2), map.number(up.address), map.number(cells.size))
        else {
            return Err(length);
        };
        let (Some(cpu), Some(pci)) = (Span::new(base, size), Span::new(pci, size)) else {
            return Err(node.fault(property, PropertyFault::Range { base, size }));
        };
        push(&mut found, (high, pci, to_cpu(parent, cpu)?))?;
    }
    Ok(Some(found))
}

fn windows(node: Node<'_, '_>, cells: BusCells) -> Result<Vec<Window>, Error> {
    let mut windows: Vec<Window> = Vec::new();
    let mut spans: Vec<(bool, Span)> = Vec::new();
    for (high, pci, cpu) in mapping(node, "ranges", cells)?.unwrap_or_default() {
        let kind = match high >> 24 & 3 {
            1 => WindowKind::Io,
            2 => WindowKind::Mem32,
            3 => WindowKind::Mem64,
            // Configuration space is the ECAM's business.
            _ => return Err(node.fault("ranges", PropertyFault::Value(high.into()))),
        };
        if kind != WindowKind::Mem64 && pci.end() > 1 << 32 {
            return Err(node.fault("ranges", PropertyFault::Range { base: pci.base(), size: pci.size() }));
        }
        let is_io = kind == WindowKind::Io;
        let on_pci = spans.iter().any(|&(other_is_io, other)| is_io == other_is_io && pci.overlaps(other));
        if on_pci || windows.iter().any(|other| cpu.overlaps(other.cpu)) {
            return Err(node.fault("ranges", PropertyFault::Overlap(cpu.start().get())));
        }
        push(&mut spans, (is_io, pci))?;
        push(&mut windows, Window { kind, prefetchable: high & 1 << 30 != 0, pci: pci.base(), cpu })?;
    }
    Ok(windows)
}

fn dma_ranges(node: Node<'_, '_>, cells: BusCells) -> Result<Option<Vec<DmaRange>>, Error> {
    let Some(found) = mapping(node, "dma-ranges", cells)?.filter(|found| !found.is_empty()) else { return Ok(None) };
    let (mut ranges, mut spans): (_, Vec<Span>) = (Vec::new(), Vec::new());
    for (_, dma, cpu) in found {
        if spans.iter().any(|&other| dma.overlaps(other)) {
            return Err(node.fault("dma-ranges", PropertyFault::Overlap(dma.base())));
        }
        push(&mut spans, dma)?;
        push(&mut ranges, DmaRange { dma: Iova::new(dma.base()), cpu })?;
    }
    Ok(Some(ranges))
}

fn intx(node: Node<'_, '_>) -> Result<IntxMap, Error> {
    if !node.has("interrupt-map") {
        return Ok(IntxMap::default());
    }
    let nexus = Nexus::of(node)?;
    if nexus.specifier != 1 {
        return Err(node.fault("#interrupt-cells", PropertyFault::Cells(nexus.specifier as u32)));
    }
    let mut map = IntxMap { mask: nexus.masked(&[u32::MAX]).next().unwrap_or(0), entries: Vec::new() };
    for entry in nexus.entries()? {
        let mut child = nexus.masked(&entry.child);
        let (Some(address), Some(pin)) = (child.next(), child.nth(2)) else { continue };
        let pin = match u8::try_from(pin) {
            Ok(pin @ 1..=4) => pin,
            _ => return Err(node.fault("interrupt-map", PropertyFault::Value(pin.into()))),
        };
        let interrupt = follow(node, "interrupt-map", entry.parent, &entry.unit, entry.specifier)?;
        push(&mut map.entries, (address, pin, interrupt))?;
    }
    Ok(map)
}

fn no_entries<T>() -> RidMap<T> {
    RidMap { mask: u16::MAX, entries: Vec::new() }
}

/// Reads `iommu-map` or `msi-map`; `None` if it is not there. Entries whose target is disabled are left out.
fn rid_map<T: Copy>(
    node: Node<'_, '_>,
    property: &'static str,
    mask_property: &'static str,
    target: fn(Node<'_, '_>, &'static str, u32) -> Result<Option<T>, Error>,
) -> Result<Option<RidMap<T>>, Error> {
    let Some(mut list) = node.cells(property)? else { return Ok(None) };
    let length = node.fault(property, PropertyFault::Length(list.len()));
    let mut map = no_entries();
    if let Some(mask) = node.u32(mask_property)? {
        // Bits above a requester ID mask nothing.
        map.mask = (mask & 0xffff) as u16;
    }
    while let Some(first) = list.cell() {
        let (Some(phandle), Some(output), Some(count)) = (list.cell(), list.cell(), list.cell()) else {
            return Err(length);
        };
        let range = node.fault(property, PropertyFault::Range { base: first.into(), size: count.into() });
        let Ok(rid) = u16::try_from(first) else { return Err(range) };
        if count == 0 || count > 0x1_0000 - first || output.checked_add(count - 1).is_none() {
            return Err(range);
        }
        if let Some(target) = target(node, property, phandle)? {
            push(&mut map.entries, RidRange { rid, count, target, output })?;
        }
    }
    map.entries.sort_unstable_by_key(|entry| entry.rid);
    for pair in map.entries.windows(2) {
        if let [a, b] = pair
            && u32::from(a.rid) + a.count > b.rid.into()
        {
            return Err(node.fault(property, PropertyFault::Overlap(b.rid.into())));
        }
    }
    Ok(Some(map))
}

/// Without an `msi-map`, all requester IDs go unchanged to the `msi-parent`.
fn msi_map_from_parent(node: Node<'_, '_>) -> Result<RidMap<MsiController>, Error> {
    let mut map = no_entries();
    if let Some((target, _)) = msi_parent(node)? {
        push(&mut map.entries, RidRange { rid: 0, count: 0x1_0000, target, output: 0 })?;
    }
    Ok(map)
}
