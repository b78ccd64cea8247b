//! The interrupt controller and what turns messages into interrupts.
//!
//! The `arm,gic` and `arm,gic-v3` bindings. Arm IHI 0069, chapters 5 and 12.

use super::address::{first_reg, reg, require};
use super::error::{Error, PropertyFault};
use super::interrupt::{Interrupt, interrupts};
use super::tree::{Node, Tree, push};
use alloc::{string::String, vec::Vec};
use iommu::PhysRange;

/// What GICv3s are called (GICv4 too).
pub(super) const GIC_V3: &[&str] = &["arm,gic-v3"];
/// What GICv2s are called.
pub(super) const GIC_V2: &[&str] = &["arm,gic-400", "arm,cortex-a15-gic", "arm,cortex-a9-gic", "arm,cortex-a7-gic"];

/// What ITSs are called.
pub(super) const ITS: &[&str] = &["arm,gic-v3-its"];
/// What GICv2m frames are called.
pub(super) const V2M: &[&str] = &["arm,gic-v2m-frame"];

/// The interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gic {
    /// A GICv3 or GICv4.
    V3(GicV3),
    /// A GICv2.
    V2(GicV2),
}

/// Registers of a GICv3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GicV3 {
    /// GICD.
    pub distributor: PhysRange,
    /// GICR: one after the other in each region. Never empty.
    pub redistributors: Vec<PhysRange>,
    /// Bytes from one redistributor to the next, where that is not what GICR_TYPER says.
    pub stride: Option<u64>,
    /// The virtual CPU interface's maintenance interrupt.
    pub maintenance: Option<Interrupt>,
}

/// Registers of a GICv2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GicV2 {
    /// GICD.
    pub distributor: PhysRange,
    /// GICC.
    pub cpu_interface: PhysRange,
    /// The virtual CPU interface's maintenance interrupt.
    pub maintenance: Option<Interrupt>,
}

/// An interrupt translation service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Its {
    /// Its registers; GITS_TRANSLATER is in the second half.
    pub registers: PhysRange,
    /// Its phandle, if anything refers to it.
    pub phandle: Option<u32>,
    /// Its node's path.
    pub path: String,
}

/// A GICv2m frame: messages become SPIs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V2m {
    /// Its registers.
    pub registers: PhysRange,
    /// Its phandle, if anything refers to it.
    pub phandle: Option<u32>,
    /// The INTID of the first SPI, where that is not what MSI_TYPER says (which has an INTID, too).
    pub first_spi: Option<u32>,
    /// Number of SPIs, where that is not what MSI_TYPER says.
    pub spis: Option<u32>,
    /// Its node's path.
    pub path: String,
}

/// Which MSI controller of a [`Machine`](super::Machine).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MsiController {
    /// An index into [`Machine::its`](super::Machine::its).
    Its(usize),
    /// An index into [`Machine::v2m`](super::Machine::v2m).
    V2m(usize),
}

/// Reads the interrupt controller, if there is one that is known.
pub(super) fn gic(tree: &Tree<'_>) -> Result<Option<Gic>, Error> {
    let (v3, v2) = (tree.compatible(GIC_V3)?, tree.compatible(GIC_V2)?);
    let mut all = v3.iter().chain(&v2);
    let (first, second) = (all.next(), all.next());
    if let Some(second) = second {
        return Err(Error::Duplicate { node: second.path(), what: "an interrupt controller" });
    }
    let Some(&node) = first else { return Ok(None) };
    let registers = reg(node)?;
    let maintenance = interrupts(node)?.first().copied();
    let short = || node.fault("reg", PropertyFault::Length(registers.len()));
    let (&distributor, rest) = registers.split_first().ok_or_else(short)?;
    if v3.is_empty() {
        let distributor = require(node, distributor, 0x1000)?;
        let cpu_interface = require(node, *rest.first().ok_or_else(short)?, 0x1000)?;
        return Ok(Some(Gic::V2(GicV2 { distributor, cpu_interface, maintenance })));
    }
    let distributor = require(node, distributor, 0x1_0000)?;
    let count = node.u32("#redistributor-regions")?.unwrap_or(1) as usize;
    let regions = rest.get(..count).filter(|regions| !regions.is_empty()).ok_or_else(short)?;
    let mut redistributors = Vec::new();
    for &region in regions {
        if redistributors.iter().any(|&other: &PhysRange| region.overlaps(other)) || region.overlaps(distributor) {
            return Err(node.fault("reg", PropertyFault::Overlap(region.start().get())));
        }
        // RD_base and SGI_base.
        push(&mut redistributors, require(node, region, 0x2_0000)?)?;
    }
    let stride = node.number("redistributor-stride")?;
    if let Some(stride) = stride
        && (stride < 0x2_0000 || stride % 0x1_0000 != 0)
    {
        return Err(node.fault("redistributor-stride", PropertyFault::Value(stride)));
    }
    Ok(Some(Gic::V3(GicV3 { distributor, redistributors, stride, maintenance })))
}

/// Reads all interrupt translation services.
pub(super) fn its(tree: &Tree<'_>) -> Result<Vec<Its>, Error> {
    let mut found = Vec::new();
    for node in tree.kind(|kinds| &kinds.its) {
        push(&mut found, its_of(node)?)?;
    }
    Ok(found)
}

/// Reads one interrupt translation service.
pub(super) fn its_of(node: Node<'_, '_>) -> Result<Its, Error> {
    let registers = first_reg(node, 0x2_0000)?;
    Ok(Its { registers, phandle: node.u32("phandle")?, path: node.try_path()? })
}

/// Reads all GICv2m frames.
pub(super) fn v2m(tree: &Tree<'_>) -> Result<Vec<V2m>, Error> {
    let mut found = Vec::new();
    for node in tree.kind(|kinds| &kinds.v2m) {
        push(&mut found, v2m_of(node)?)?;
    }
    Ok(found)
}

/// Reads one GICv2m frame.
pub(super) fn v2m_of(node: Node<'_, '_>) -> Result<V2m, Error> {
    let (first_spi, spis) = (node.u32("arm,msi-base-spi")?, node.u32("arm,msi-num-spis")?);
    for (property, value) in [("arm,msi-base-spi", first_spi), ("arm,msi-num-spis", spis)] {
        if let Some(value) = value.filter(|&value| value > 1019) {
            return Err(node.fault(property, PropertyFault::Value(value.into())));
        }
    }
    let registers = first_reg(node, 0x1000)?;
    Ok(V2m { registers, phandle: node.u32("phandle")?, first_spi, spis, path: node.try_path()? })
}

/// Finds the MSI controller that `phandle`, found in `node`'s `property`, stands for; `None` if it is disabled.
pub(super) fn msi_controller(
    node: Node<'_, '_>,
    property: &'static str,
    phandle: u32,
) -> Result<Option<MsiController>, Error> {
    let controller = node.resolve(property, phandle)?;
    if controller.is_compatible(ITS)? {
        return Ok(controller.index_in(|kinds| &kinds.its).map(MsiController::Its));
    }
    if controller.is_compatible(V2M)? {
        return Ok(controller.index_in(|kinds| &kinds.v2m).map(MsiController::V2m));
    }
    Err(node.fault(property, PropertyFault::WrongKind { phandle, wanted: "an MSI controller that is known" }))
}

/// Reads a device's `msi-parent`: the controller and the identity the device has there.
pub(super) fn msi_parent(node: Node<'_, '_>) -> Result<Option<(MsiController, Option<u32>)>, Error> {
    let property = "msi-parent";
    let Some(mut list) = node.cells(property)? else { return Ok(None) };
    let length = node.fault(property, PropertyFault::Length(list.len()));
    let Some(phandle) = list.cell() else { return Err(length) };
    let identity = match node.resolve(property, phandle)?.u32("#msi-cells")?.unwrap_or(0) {
        0 => None,
        1 => Some(list.cell().ok_or(length)?),
        cells => return Err(node.fault(property, PropertyFault::Cells(cells))),
    };
    Ok(msi_controller(node, property, phandle)?.map(|controller| (controller, identity)))
}
