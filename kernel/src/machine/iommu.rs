//! IOMMUs, and the bus masters behind them that are not on PCI.
//!
//! The `arm,smmu-v3`, `virtio,pci-iommu` and `iommu` bindings. Arm IHI 0070, section 6.1 (register map) and 3.18 (interrupts).

use super::address::first_reg;
use super::error::{Error, PropertyFault};
use super::gic::{MsiController, msi_parent};
use super::interrupt::{Interrupt, interrupts};
use super::memory::regions_of;
use super::tree::{Node, Tree, owned, push};
use ::iommu::{PhysRange, StreamId};
use alloc::{string::String, vec::Vec};

/// What SMMUv3s are called.
pub(super) const SMMU_V3: &[&str] = &["arm,smmu-v3"];
/// What virtio-iommus on PCI are called.
pub(super) const VIRTIO_IOMMU: &[&str] = &["virtio,pci-iommu"];

/// An index into [`Machine::smmus`](super::Machine::smmus).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SmmuIndex(pub usize);

/// An index into [`Machine::virtio_iommus`](super::Machine::virtio_iommus).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtioIommuIndex(pub usize);

/// An IOMMU of the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IommuRef {
    /// An SMMUv3.
    Smmu(SmmuIndex),
    /// A virtio-iommu.
    Virtio(VirtioIommuIndex),
}

/// A virtio-iommu: a PCI function that translates for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioIommu {
    /// The node's path.
    pub path: String,
    /// An index into [`Machine::pcie`](super::Machine::pcie): the host that it is behind.
    pub host: usize,
    /// Its requester ID there, as firmware has numbered the buses.
    pub rid: u16,
    /// Its phandle, if anything refers to it.
    pub phandle: Option<u32>,
}

/// An SMMUv3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smmu {
    /// The node's path.
    pub path: String,
    /// Register pages 0 and 1.
    pub registers: PhysRange,
    /// Wired interrupts.
    pub interrupts: SmmuInterrupts,
    /// Its own accesses (tables, queues) are coherent with the processors' caches.
    pub coherent: bool,
    /// Its phandle, if anything refers to it.
    pub phandle: Option<u32>,
    /// Who takes its messages, and its DeviceID there.
    pub msi_parent: Option<(MsiController, u32)>,
}

/// Wired interrupts of an SMMUv3, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmmuInterrupts {
    /// The event queue is not empty any more.
    pub eventq: Option<Interrupt>,
    /// The PRI queue is not empty any more.
    pub priq: Option<Interrupt>,
    /// A CMD_SYNC with an interrupt as completion signal was consumed.
    pub cmdq_sync: Option<Interrupt>,
    /// GERROR changed.
    pub gerror: Option<Interrupt>,
    /// All of the above on one wire.
    pub combined: Option<Interrupt>,
}

/// A bus master that is not a PCI device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusMaster {
    /// The node's path.
    pub path: String,
    /// What it is.
    pub compatible: Vec<String>,
    /// Its StreamIDs. Empty if all its IOMMUs are disabled.
    pub streams: Vec<(IommuRef, StreamId)>,
    /// DMA is coherent with the processors' caches.
    pub dma_coherent: bool,
    /// Regions of [`Machine::reserved`](super::Machine::reserved) set aside for its DMA.
    pub memory_regions: Vec<usize>,
}

/// Reads all SMMUv3s.
pub(super) fn smmus(tree: &Tree<'_>) -> Result<Vec<Smmu>, Error> {
    let mut found: Vec<Smmu> = Vec::new();
    for node in tree.kind(|kinds| &kinds.smmus) {
        let registers = first_reg(node, 0x2_0000)?;
        if found.iter().any(|other| other.registers.overlaps(registers)) {
            return Err(node.fault("reg", PropertyFault::Overlap(registers.start().get())));
        }
        let smmu = Smmu {
            path: node.try_path()?,
            registers,
            interrupts: named_interrupts(node)?,
            coherent: node.dma_coherent(),
            phandle: node.u32("phandle")?,
            msi_parent: msi_parent(node)?.map(|(controller, identity)| (controller, identity.unwrap_or(0))),
        };
        push(&mut found, smmu)?;
    }
    Ok(found)
}

/// Reads all virtio-iommus.
pub(super) fn virtio_iommus(tree: &Tree<'_>) -> Result<Vec<VirtioIommu>, Error> {
    let mut found: Vec<VirtioIommu> = Vec::new();
    for node in tree.kind(|kinds| &kinds.virtio_iommus) {
        let Some(host) = node.parent().and_then(|parent| parent.index_in(|kinds| &kinds.pcie)) else {
            // Of a disabled host, perhaps: nothing behind it can be used.
            return Err(node.fault("compatible", PropertyFault::Word));
        };
        let rid = function(node)?;
        if found.iter().any(|other| (other.host, other.rid) == (host, rid)) {
            return Err(node.fault("reg", PropertyFault::Overlap(rid.into())));
        }
        push(&mut found, VirtioIommu { path: node.try_path()?, host, rid, phandle: node.u32("phandle")? })?;
    }
    Ok(found)
}

/// The requester ID in the `reg` of a PCI function's node.
pub(super) fn function(node: Node<'_, '_>) -> Result<u16, Error> {
    let Some(mut reg) = node.cells("reg")? else { return Err(node.fault("reg", PropertyFault::Missing)) };
    let length = node.fault("reg", PropertyFault::Length(reg.len()));
    // The first entry is the configuration space: three cells of address, two of size.
    let (Some(high), Some(_), Some(_)) = (reg.cell(), reg.number(2), reg.number(2)) else { return Err(length) };
    let bad = node.fault("reg", PropertyFault::Value(high.into()));
    // Neither a space other than configuration, nor a register in it.
    if high & 0xff00_00ff != 0 { Err(bad) } else { u16::try_from(high >> 8).map_err(|_| bad) }
}

fn named_interrupts(node: Node<'_, '_>) -> Result<SmmuInterrupts, Error> {
    let mut named = SmmuInterrupts::default();
    let list = interrupts(node)?;
    let Some(names) = node.texts("interrupt-names")? else {
        // Nothing says which is which, unless there is only one.
        return match list.as_slice() {
            [] => Ok(named),
            [only] => Ok(SmmuInterrupts { combined: Some(*only), ..named }),
            _ => Err(node.fault("interrupt-names", PropertyFault::Missing)),
        };
    };
    if names.clone().count() != list.len() {
        return Err(node.fault("interrupt-names", PropertyFault::Text));
    }
    for (name, interrupt) in names.zip(list) {
        let slot = match name {
            "eventq" => &mut named.eventq,
            "priq" => &mut named.priq,
            "cmdq-sync" => &mut named.cmdq_sync,
            "gerror" => &mut named.gerror,
            "combined" => &mut named.combined,
            _ => return Err(node.fault("interrupt-names", PropertyFault::Word)),
        };
        if slot.replace(interrupt).is_some() {
            return Err(node.fault("interrupt-names", PropertyFault::Word));
        }
    }
    Ok(named)
}

/// Finds the IOMMU that `phandle`, found in `node`'s `property`, stands for; `None` if it is disabled.
pub(super) fn iommu_of(node: Node<'_, '_>, property: &'static str, phandle: u32) -> Result<Option<IommuRef>, Error> {
    let iommu = node.resolve(property, phandle)?;
    let found = if iommu.is_compatible(SMMU_V3)? {
        iommu.index_in(|kinds| &kinds.smmus).map(|index| IommuRef::Smmu(SmmuIndex(index)))
    } else if iommu.is_compatible(VIRTIO_IOMMU)? {
        iommu.index_in(|kinds| &kinds.virtio_iommus).map(|index| IommuRef::Virtio(VirtioIommuIndex(index)))
    } else {
        return Err(node.fault(property, PropertyFault::WrongKind { phandle, wanted: "an SMMUv3 or a virtio-iommu" }));
    };
    match iommu.u32("#iommu-cells")? {
        Some(1) => Ok(found),
        Some(cells) => Err(iommu.fault("#iommu-cells", PropertyFault::Cells(cells))),
        None => Err(iommu.fault("#iommu-cells", PropertyFault::Missing)),
    }
}

/// Reads all bus masters with an `iommus` property.
pub(super) fn masters(tree: &Tree<'_>) -> Result<Vec<BusMaster>, Error> {
    let mut found = Vec::new();
    for node in tree.iter() {
        let Some(mut list) = node.cells("iommus")? else { continue };
        if !node.enabled()? {
            continue;
        }
        let length = node.fault("iommus", PropertyFault::Length(list.len()));
        let mut streams = Vec::new();
        while let Some(phandle) = list.cell() {
            let iommu = iommu_of(node, "iommus", phandle)?;
            let Some(stream) = list.cell() else { return Err(length) };
            if let Some(iommu) = iommu {
                push(&mut streams, (iommu, StreamId::new(stream)))?;
            }
        }
        let mut compatible = Vec::new();
        for name in node.texts("compatible")?.into_iter().flatten() {
            push(&mut compatible, owned(name)?)?;
        }
        let (dma_coherent, memory_regions) = (node.dma_coherent(), regions_of(node)?);
        push(&mut found, BusMaster { path: node.try_path()?, compatible, streams, dma_coherent, memory_regions })?;
    }
    Ok(found)
}
