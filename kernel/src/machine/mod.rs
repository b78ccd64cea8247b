//! What the machine is made of: a [`Machine`] value, read once from the flattened device tree.
//!
//! Nothing after this module sees the tree. All addresses are CPU physical addresses, whatever buses lie in between; all
//! references from node to node have become indices; disabled nodes are left out.
//!
//! # The tree is not trusted
//!
//! [`Machine::from_fdt`] ends for every input, and gives an [`Error`] that names the node (and property) for whatever is
//! broken or contradicts itself: `validate` bounds the structure, `tree` lets the parser read it, and the readers of the
//! single parts check what values say. Every way through the tree that follows references is bounded.
//!
//! # Locking
//!
//! None: a `Machine` is a value.
//!
//! Devicetree Specification v0.4.

#![forbid(unsafe_code)]

mod address;
mod carried;
mod chosen;
mod cpu;
mod error;
mod firmware;
mod gic;
mod interrupt;
mod iommu;
mod memory;
mod pci;
mod pools;
mod range;
pub mod survey;
mod tree;
mod validate;

pub use chosen::{Chosen, Console, ConsoleKind};
pub use cpu::{Cpu, EnableMethod, Psci, PsciConduit, PsciVersion, Timer};
pub use error::{Error, HeaderFault, PropertyFault, StructureFault};
pub use firmware::FirmwareRegion;
pub use gic::{Gic, GicV2, GicV3, Its, MsiController, V2m};
pub use interrupt::{Interrupt, Trigger};
pub use iommu::{BusMaster, IommuRef, Smmu, SmmuIndex, SmmuInterrupts, VirtioIommu, VirtioIommuIndex};
pub use memory::{DynamicReservation, IommuAddresses, ReservedMemory};
pub use pci::{DmaRange, IntxMap, PcieHost, RidMap, RidRange, Window, WindowKind};
pub use pools::{DevicePools, PciNode, Pool, PoolKind};
pub use validate::{MAX_DEPTH, MAX_NODES, MAX_PROPERTIES, MAX_SIZE};

use ::iommu::PhysRange;
use alloc::{string::String, vec::Vec};
use tree::{Tree, owned, push};

/// What the machine is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The board's name; empty if the tree gives none.
    pub model: String,
    /// What the board is compatible with, the most exact name first.
    pub compatible: Vec<String>,
    /// Memory: sorted, without overlaps, never empty.
    pub memory: Vec<PhysRange>,
    /// The memory reservation map of the tree: not to be touched.
    pub memreserve: Vec<PhysRange>,
    /// The children of `/reserved-memory`.
    pub reserved: Vec<ReservedMemory>,
    /// Processors, never empty, in the tree's order.
    pub cpus: Vec<Cpu>,
    /// PSCI firmware.
    pub psci: Option<Psci>,
    /// The generic timer.
    pub timer: Option<Timer>,
    /// The console.
    pub console: Option<Console>,
    /// The interrupt controller.
    pub gic: Option<Gic>,
    /// Interrupt translation services.
    pub its: Vec<Its>,
    /// GICv2m frames.
    pub v2m: Vec<V2m>,
    /// PCI Express host bridges.
    pub pcie: Vec<PcieHost>,
    /// PCI functions and bridges that memory is set aside for, in the tree's order.
    pub pci_nodes: Vec<PciNode>,
    /// SMMUs.
    pub smmus: Vec<Smmu>,
    /// Virtio-iommus.
    pub virtio_iommus: Vec<VirtioIommu>,
    /// Bus masters behind an IOMMU that are not PCI devices.
    pub masters: Vec<BusMaster>,
    /// QEMU's `fw_cfg`.
    pub fw_cfg: Option<PhysRange>,
    /// Command line, initial ramdisk, randomness.
    pub chosen: Chosen,
}

impl Machine {
    /// Reads the flattened device tree that `fdt` begins with.
    ///
    /// # Errors
    ///
    /// The first thing found to be wrong, with the node it is wrong in.
    pub fn from_fdt(fdt: &[u8]) -> Result<Self, Error> {
        let tree = Tree::read(fdt)?;
        let root = tree.root()?;
        let mut compatible = Vec::new();
        for name in root.texts("compatible")?.into_iter().flatten() {
            push(&mut compatible, owned(name)?)?;
        }
        let mut memreserve = Vec::new();
        for &range in tree.reservations() {
            push(&mut memreserve, range)?;
        }
        Ok(Self {
            model: owned(root.text("model")?.unwrap_or(""))?,
            compatible,
            memory: memory::memory(&tree)?,
            memreserve,
            reserved: memory::reserved(&tree)?,
            cpus: cpu::cpus(&tree)?,
            psci: cpu::psci(&tree)?,
            timer: cpu::timer(&tree)?,
            console: chosen::console(&tree)?,
            gic: gic::gic(&tree)?,
            its: gic::its(&tree)?,
            v2m: gic::v2m(&tree)?,
            pcie: pci::hosts(&tree)?,
            pci_nodes: pools::pci_nodes(&tree)?,
            smmus: iommu::smmus(&tree)?,
            virtio_iommus: iommu::virtio_iommus(&tree)?,
            masters: iommu::masters(&tree)?,
            fw_cfg: chosen::fw_cfg(&tree)?,
            chosen: chosen::chosen(&tree)?,
        })
    }

    /// Gives an SMMU by the index that a PCI host or a bus master has for it.
    pub fn smmu(&self, index: SmmuIndex) -> Option<&Smmu> {
        self.smmus.get(index.0)
    }

    /// Gives the size of the tree that `bytes` begins with, as its header has it (from at least 8 bytes).
    ///
    /// # Errors
    ///
    /// If this is not the beginning of a tree, or the size cannot be.
    pub fn fdt_size(bytes: &[u8]) -> Result<usize, Error> {
        validate::size(bytes).map_err(Error::Header)
    }
}
