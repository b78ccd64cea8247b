//! A look at a board from its device tree alone: what this kernel would find there, and what it would miss.
//!
//! [`Machine::from_fdt`](super::Machine::from_fdt) refuses a tree whose first fault it meets, as a kernel that is about to run
//! there must. A [`Survey`] is for people and tools: every node fails alone, and is listed with what is [missing](Survey::missing).
//! It has devices that no driver here knows, too: IOMMUs of any kind, host bridges without an ECAM.
//!
//! Nodes that are disabled, or below one that is, are left out. Addresses are CPU physical addresses, after every `ranges` on the
//! way up; DMA addresses become CPU addresses through every `dma-ranges`.
//!
//! Like the strict reader, it ends for every input: what follows references is paid for from the tree's budget.
//!
//! # Locking
//!
//! None: a `Survey` is a value.
//!
//! Devicetree Specification v0.4; the `iommu`, `pci-iommu`, `pci-msi` and `reserved-memory` bindings.

mod maps;
mod missing;

pub use maps::{DmaWindow, RidRow};
pub use missing::Missing;

use super::address::{BusCells, to_cpu};
use super::error::{Error, PropertyFault};
use super::interrupt::{Interrupt, interrupts};
use super::iommu::{SMMU_V3, VIRTIO_IOMMU};
use super::memory::{self, ReservedMemory};
use super::pci::{ECAM, PCI_CELLS};
use super::range::Span;
use super::tree::{Node, Tree, owned, push};
use ::iommu::PhysRange;
use alloc::{string::String, vec::Vec};

/// What a device tree says that concerns memory and the devices that reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The board's name; empty if the tree gives none.
    pub model: String,
    /// What the board is compatible with, the most exact name first.
    pub compatible: Vec<String>,
    /// Memory, in the tree's order. Ranges of no bytes, which firmware fills in, are left out.
    pub memory: Vec<PhysRange>,
    /// The memory reservation map of the tree: not to be touched.
    pub memreserve: Vec<PhysRange>,
    /// The children of `/reserved-memory`.
    pub reserved: Vec<ReservedMemory>,
    /// SMMUv3s.
    pub smmus: Vec<SurveyedSmmu>,
    /// Paths of SMMUv3s that are disabled.
    pub disabled_smmus: Vec<String>,
    /// IOMMUs of any other kind.
    pub other_iommus: Vec<OtherIommu>,
    /// PCI host bridges.
    pub pci: Vec<SurveyedHost>,
    /// Devices with an `iommus` property.
    pub masters: Vec<SurveyedMaster>,
    /// What keeps this kernel from running there, or from using a part of it.
    pub missing: Vec<Missing>,
}

/// An SMMUv3, as a tree has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurveyedSmmu {
    /// The node's path.
    pub path: String,
    /// Its registers, if they can be reached by processors.
    pub registers: Option<PhysRange>,
    /// Its own accesses (tables, queues) are coherent with the processors' caches.
    pub coherent: bool,
    /// It can send messages instead of its wired interrupts: it has an `msi-parent`.
    pub msi: bool,
    /// The names of its interrupts, in the tree's order; a single one without a name is `combined`.
    pub interrupts: Vec<String>,
    /// Where they go, where that could be followed to a GIC.
    pub wired: Vec<Interrupt>,
}

/// An IOMMU that is not an SMMUv3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherIommu {
    /// The node's path.
    pub path: String,
    /// What it is compatible with.
    pub compatible: Vec<String>,
}

/// A PCI host bridge, as a tree has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurveyedHost {
    /// The node's path.
    pub path: String,
    /// What it is compatible with.
    pub compatible: Vec<String>,
    /// Configuration space, if it is all mapped to memory in the standard way.
    pub ecam: Option<PhysRange>,
    /// First and last bus number.
    pub buses: (u8, u8),
    /// DMA is coherent with the processors' caches.
    pub coherent: bool,
    /// From requester IDs to StreamIDs, with `iommu-map-mask` applied.
    pub iommu_map: Vec<RidRow>,
    /// From requester IDs to DeviceIDs, with `msi-map-mask` applied.
    pub msi_map: Vec<RidRow>,
    /// From DMA addresses to CPU addresses. Empty if they are the same everywhere.
    pub dma_ranges: Vec<DmaWindow>,
}

/// A device with an `iommus` property, as a tree has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurveyedMaster {
    /// The node's path.
    pub path: String,
    /// The streams it is known by.
    pub streams: Vec<Stream>,
    /// DMA is coherent with the processors' caches.
    pub coherent: bool,
    /// From DMA addresses to CPU addresses (or to what its IOMMU translates to them). Empty if they are the same everywhere.
    pub dma_ranges: Vec<DmaWindow>,
}

/// One stream of a bus master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Path of the IOMMU.
    pub iommu: String,
    /// The StreamID. An IOMMU that does not number its streams (`#iommu-cells` of 0) has one, number 0.
    pub id: u32,
    /// Bits of the StreamID that do not count, where the IOMMU's specifiers say so (`#iommu-cells` of 2).
    pub mask: Option<u32>,
}

impl Survey {
    /// Reads the flattened device tree that `fdt` begins with.
    ///
    /// # Errors
    ///
    /// If this is no tree, or its structure is broken, or the heap is full. What single nodes say wrongly is listed as missing.
    pub fn from_fdt(fdt: &[u8]) -> Result<Self, Error> {
        let tree = Tree::lenient(fdt)?;
        let root = tree.root()?;
        let mut survey = Self { compatible: words(root)?, ..Self::default() };
        survey.model = owned(root.text("model").ok().flatten().unwrap_or(""))?;
        for &range in tree.reservations() {
            push(&mut survey.memreserve, range)?;
        }
        survey.read_memory(&tree)?;
        for node in tree.iter().filter(|&node| is_device(node)) {
            survey.look_at(node)?;
        }
        survey.look_for_the_rest(&tree)?;
        Ok(survey)
    }

    /// Keeps what could be read; a fault is one more thing that is missing.
    fn or_missing<T>(&mut self, read: Result<T, Error>) -> Result<Option<T>, Error> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(Error::OutOfMemory) => Err(Error::OutOfMemory),
            Err(fault) => {
                push(&mut self.missing, Missing::Fault(fault))?;
                Ok(None)
            }
        }
    }

    fn read_memory(&mut self, tree: &Tree<'_>) -> Result<(), Error> {
        let root = tree.root()?;
        let mut described = false;
        for node in root.children().filter(|node| node.property("device_type") == Some(b"memory\0") && node.usable()) {
            described = true;
            if let Some(ranges) = self.or_missing(plain_reg(root, node))? {
                for range in ranges {
                    push(&mut self.memory, range)?;
                }
            }
        }
        if self.memory.is_empty() {
            push(&mut self.missing, if described { Missing::MemorySize } else { Missing::Memory })?;
        }
        let Some(parent) = tree.find("/reserved-memory") else { return Ok(()) };
        for node in parent.children().filter(|node| node.usable()) {
            if let Some(region) = self.or_missing(memory::region(parent, node))? {
                push(&mut self.reserved, region)?;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, node: Node<'_, '_>) -> Result<(), Error> {
        let is = |names| node.is_compatible(names).unwrap_or(false);
        if !node.usable() {
            if is(SMMU_V3) {
                push(&mut self.disabled_smmus, node.try_path()?)?;
            }
            return Ok(());
        }
        if is(SMMU_V3) {
            self.add_smmu(node)?;
        } else if node.has("#iommu-cells") {
            push(&mut self.other_iommus, OtherIommu { path: node.try_path()?, compatible: words(node)? })?;
        }
        if is_host(node) {
            self.add_host(node)?;
        }
        if node.has("iommus") {
            self.add_master(node)?;
        }
        Ok(())
    }

    fn add_smmu(&mut self, node: Node<'_, '_>) -> Result<(), Error> {
        let registers = self.or_missing(first_reg(node))?;
        let wired = self.or_missing(interrupts(node))?.unwrap_or_default();
        let mut names = Vec::new();
        let named =
            self.or_missing(node.texts("interrupt-names").map(|names| names.map(|names| names.collect::<Vec<_>>())))?;
        for name in named.flatten().unwrap_or_default() {
            push(&mut names, owned(name)?)?;
        }
        if names.is_empty() && wired.len() == 1 {
            push(&mut names, owned("combined")?)?;
        }
        let (coherent, msi) = (node.dma_coherent(), !node.property("msi-parent").unwrap_or_default().is_empty());
        push(
            &mut self.smmus,
            SurveyedSmmu { path: node.try_path()?, registers, coherent, msi, interrupts: names, wired },
        )
    }

    fn add_host(&mut self, node: Node<'_, '_>) -> Result<(), Error> {
        let buses = self.or_missing(super::pci::buses(node))?.unwrap_or((0, 255));
        let ecam = match node.is_compatible(ECAM).unwrap_or(false) {
            true => self.or_missing(first_reg(node))?,
            false => None,
        };
        let iommu_map = self.rid_rows(node, "iommu-map", "iommu-map-mask", buses)?.unwrap_or_default();
        let msi_map = match self.rid_rows(node, "msi-map", "msi-map-mask", buses)? {
            Some(rows) => rows,
            None => self.or_missing(maps::msi_parent_row(node))?.unwrap_or_default(),
        };
        let host = SurveyedHost {
            path: node.try_path()?,
            compatible: words(node)?,
            ecam,
            buses,
            coherent: node.dma_coherent(),
            iommu_map,
            msi_map,
            dma_ranges: self.or_missing(maps::dma_windows(node))?.unwrap_or_default(),
        };
        push(&mut self.pci, host)
    }

    fn rid_rows(
        &mut self,
        node: Node<'_, '_>,
        property: &'static str,
        mask: &'static str,
        buses: (u8, u8),
    ) -> Result<Option<Vec<RidRow>>, Error> {
        if !node.has(property) {
            return Ok(None);
        }
        let mut faults = Vec::new();
        let rows = maps::rid_rows(node, property, mask, buses, &mut faults);
        for fault in faults {
            push(&mut self.missing, Missing::Fault(fault))?;
        }
        Ok(Some(self.or_missing(rows)?.unwrap_or_default()))
    }

    fn add_master(&mut self, node: Node<'_, '_>) -> Result<(), Error> {
        let mut streams = Vec::new();
        let read = streams_of(node, &mut streams);
        self.or_missing(read)?;
        let dma_ranges = match node.parent() {
            Some(bus) => self.or_missing(maps::dma_windows(bus))?.unwrap_or_default(),
            None => Vec::new(),
        };
        push(
            &mut self.masters,
            SurveyedMaster { path: node.try_path()?, streams, coherent: node.dma_coherent(), dma_ranges },
        )
    }
}

/// The words of `compatible`; none if it cannot be read.
fn words(node: Node<'_, '_>) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for name in node.texts("compatible").ok().flatten().into_iter().flatten() {
        push(&mut found, owned(name)?)?;
    }
    Ok(found)
}

/// Says whether the node may be a device: it is not one of those (`__symbols__`, `__local_fixups__`, ...) in which a compiler
/// leaves notes that look like the nodes they are about.
fn is_device(node: Node<'_, '_>) -> bool {
    let mut next = Some(node);
    while let Some(at) = next {
        if at.is_note() {
            return false;
        }
        next = at.parent();
    }
    true
}

/// Says whether the node is a PCI bus.
fn is_pci(node: Node<'_, '_>) -> bool {
    if matches!(node.property("device_type"), Some(b"pci\0" | b"pciex\0")) {
        return true;
    }
    let three = matches!(BusCells::of(node), Ok(BusCells { address: PCI_CELLS, .. }));
    three && (node.has("bus-range") || node.is_compatible(ECAM).unwrap_or(false))
}

/// Says whether the node is a PCI host bridge: a PCI bus on a bus of another kind.
fn is_host(node: Node<'_, '_>) -> bool {
    let mut above = node.parent();
    while let Some(at) = above {
        if is_pci(at) {
            return false;
        }
        above = at.parent();
    }
    is_pci(node)
}

/// Reads all of `reg`; ranges of no bytes are left out.
fn plain_reg(bus: Node<'_, '_>, node: Node<'_, '_>) -> Result<Vec<PhysRange>, Error> {
    let cells = BusCells::plain(bus)?;
    let mut list = node.cells("reg")?.ok_or_else(|| node.fault("reg", PropertyFault::Missing))?;
    let length = list.len();
    let mut found = Vec::new();
    while !list.is_empty() {
        let (Some(base), Some(size)) = (list.number(cells.address), list.number(cells.size)) else {
            return Err(node.fault("reg", PropertyFault::Length(length)));
        };
        if size != 0 {
            let span = Span::new(base, size).ok_or_else(|| node.fault("reg", PropertyFault::Range { base, size }))?;
            push(&mut found, to_cpu(bus, span)?)?;
        }
    }
    Ok(found)
}

/// Reads the first range of `reg` as CPU addresses, whatever comes after it.
fn first_reg(node: Node<'_, '_>) -> Result<PhysRange, Error> {
    let missing = || node.fault("reg", PropertyFault::Missing);
    let bus = node.parent().ok_or_else(missing)?;
    let cells = BusCells::plain(bus)?;
    let mut list = node.cells("reg")?.ok_or_else(missing)?;
    let length = list.len();
    let (Some(base), Some(size)) = (list.number(cells.address), list.number(cells.size)) else {
        return Err(node.fault("reg", PropertyFault::Length(length)));
    };
    to_cpu(bus, Span::new(base, size).ok_or_else(|| node.fault("reg", PropertyFault::Range { base, size }))?)
}

/// Reads `iommus` up to the first thing in it that cannot be. Streams of IOMMUs that are disabled are left out.
fn streams_of(node: Node<'_, '_>, streams: &mut Vec<Stream>) -> Result<(), Error> {
    let Some(mut list) = node.cells("iommus")? else { return Ok(()) };
    let length = list.len();
    while let Some(phandle) = list.cell() {
        let iommu = node.resolve("iommus", phandle)?;
        let cells = iommu.u32("#iommu-cells")?.ok_or_else(|| iommu.fault("#iommu-cells", PropertyFault::Missing))?;
        let specifier = list.take(cells as usize);
        let mut specifier = specifier.ok_or_else(|| node.fault("iommus", PropertyFault::Length(length)))?;
        if iommu.usable() {
            let (id, mask) = (specifier.cell().unwrap_or(0), specifier.cell());
            push(streams, Stream { iommu: iommu.try_path()?, id, mask })?;
        }
    }
    Ok(())
}

/// Says whether an IOMMU is one that this kernel has a driver for.
fn is_driven(iommu: &OtherIommu) -> bool {
    iommu.compatible.iter().any(|name| VIRTIO_IOMMU.contains(&name.as_str()))
}
