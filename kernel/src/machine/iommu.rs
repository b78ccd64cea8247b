//! SMMUs, and the bus masters behind them that are not on PCI.
//!
//! The `arm,smmu-v3` and `iommu` bindings. Arm IHI 0070, section 6.1 (register map) and 3.18 (interrupts).

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

/// An index into [`Machine::smmus`](super::Machine::smmus).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SmmuIndex(pub usize);

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
    /// Its StreamIDs. Empty if all its SMMUs are disabled.
    pub streams: Vec<(SmmuIndex, StreamId)>,
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

/// Finds the SMMU that `phandle`, found in `node`'s `property`, stands for; `None` if it is disabled.
pub(super) fn iommu_of(node: Node<'_, '_>, property: &'static str, phandle: u32) -> Result<Option<SmmuIndex>, Error> {
    let smmu = node.resolve(property, phandle)?;
    if !smmu.is_compatible(SMMU_V3)? {
        return Err(node.fault(property, PropertyFault::WrongKind { phandle, wanted: "an SMMUv3" }));
    }
    match smmu.u32("#iommu-cells")? {
        Some(1) => {}
        Some(cells) => return Err(smmu.fault("#iommu-cells", PropertyFault::Cells(cells))),
        None => return Err(smmu.fault("#iommu-cells", PropertyFault::Missing)),
    }
    Ok(smmu.index_in(|kinds| &kinds.smmus).map(SmmuIndex))
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
            let smmu = iommu_of(node, "iommus", phandle)?;
            let Some(stream) = list.cell() else { return Err(length) };
            if let Some(smmu) = smmu {
                push(&mut streams, (smmu, StreamId::new(stream)))?;
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
