//! What a board has that this kernel lacks, and what it needs that the board does not say.

use super::super::chosen::{self, ConsoleKind};
use super::super::cpu::{self, EnableMethod};
use super::super::error::Error;
use super::super::gic;
use super::super::tree::{Tree, owned, push};
use super::{Survey, is_driven};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// One thing that keeps this kernel from running on a board, or from using a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// No memory is described.
    Memory,
    /// Memory is described, but firmware has to fill in its size.
    MemorySize,
    /// There is no interrupt controller that is known.
    Gic,
    /// There is no generic timer.
    Timer,
    /// There is no PSCI firmware to start other cores and to power off.
    Psci,
    /// Cores that are started in a way that is not known: how, and how many of them.
    Cores(String, usize),
    /// The tree names no console.
    Console,
    /// The console is of a kind that is not known: its `compatible`.
    ConsoleDriver(String),
    /// There is no IOMMU at all.
    Iommu,
    /// IOMMUs of a kind that is not known: its `compatible`, and how many of them.
    IommuDriver(String, usize),
    /// Host bridges without memory-mapped configuration space: their `compatible`, and how many of them.
    PcieDriver(String, usize),
    /// Messages go to a controller that is not known: its path.
    MsiDriver(String),
    /// A node that could not be read.
    Fault(Error),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => write!(f, "memory: the tree describes none, firmware has to"),
            Self::MemorySize => write!(f, "memory: its size is left to firmware"),
            Self::Gic => write!(f, "an interrupt controller that is known (GICv2, GICv3)"),
            Self::Timer => write!(f, "the generic timer"),
            Self::Psci => write!(f, "PSCI firmware"),
            Self::Cores(method, count) => write!(f, "a way to start cores by {method} ({count} of them)"),
            Self::Console => write!(f, "a console: stdout-path names none"),
            Self::ConsoleDriver(name) => write!(f, "a driver for the console, {name}"),
            Self::Iommu => write!(f, "an IOMMU: without one nothing is isolated"),
            Self::IommuDriver(name, 1) => write!(f, "a driver for the IOMMU {name}"),
            Self::IommuDriver(name, count) => write!(f, "a driver for {count} IOMMUs {name}"),
            Self::PcieDriver(name, 1) => write!(f, "a driver for the PCIe host {name}"),
            Self::PcieDriver(name, count) => write!(f, "a driver for {count} PCIe hosts {name}"),
            Self::MsiDriver(path) => write!(f, "a driver for the MSI controller {path}"),
            Self::Fault(fault) => write!(f, "{fault}"),
        }
    }
}

/// Counts `name` in a list of names.
fn count(list: &mut Vec<(String, usize)>, name: &str) -> Result<(), Error> {
    match list.iter_mut().find(|(own, _)| own == name) {
        Some((_, count)) => {
            *count += 1;
            Ok(())
        }
        None => push(list, (owned(name)?, 1)),
    }
}

impl Survey {
    /// Looks at what else this kernel needs, and lists what it has no driver for.
    pub(super) fn look_for_the_rest(&mut self, tree: &Tree<'_>) -> Result<(), Error> {
        self.look_for_processors(tree)?;
        self.look_for_interrupts(tree)?;
        match self.or_missing(chosen::console(tree))? {
            Some(Some(console)) => {
                if let ConsoleKind::Other(name) = console.kind {
                    push(&mut self.missing, Missing::ConsoleDriver(name))?;
                }
            }
            Some(None) => push(&mut self.missing, Missing::Console)?,
            None => {}
        }
        let (mut iommus, mut hosts) = (Vec::new(), Vec::new());
        for iommu in self.other_iommus.iter().filter(|&iommu| !is_driven(iommu)) {
            count(&mut iommus, iommu.compatible.first().map_or("without a name", String::as_str))?;
        }
        for host in self.pci.iter().filter(|host| host.ecam.is_none()) {
            count(&mut hosts, host.compatible.first().map_or("without a name", String::as_str))?;
        }
        if self.smmus.is_empty() && self.other_iommus.is_empty() {
            push(&mut self.missing, Missing::Iommu)?;
        }
        for (name, count) in iommus {
            push(&mut self.missing, Missing::IommuDriver(name, count))?;
        }
        for (name, count) in hosts {
            push(&mut self.missing, Missing::PcieDriver(name, count))?;
        }
        Ok(())
    }

    fn look_for_processors(&mut self, tree: &Tree<'_>) -> Result<(), Error> {
        let mut methods = Vec::new();
        for core in self.or_missing(cpu::cpus(tree))?.unwrap_or_default() {
            match core.enable {
                EnableMethod::Psci | EnableMethod::Unspecified => {}
                EnableMethod::SpinTable(_) => count(&mut methods, "spin-table")?,
                EnableMethod::Other(method) => count(&mut methods, &method)?,
            }
        }
        for (method, count) in methods {
            push(&mut self.missing, Missing::Cores(method, count))?;
        }
        if self.or_missing(cpu::psci(tree))? == Some(None) {
            push(&mut self.missing, Missing::Psci)?;
        }
        if self.or_missing(cpu::timer(tree))? == Some(None) {
            push(&mut self.missing, Missing::Timer)?;
        }
        Ok(())
    }

    fn look_for_interrupts(&mut self, tree: &Tree<'_>) -> Result<(), Error> {
        if self.or_missing(gic::gic(tree))? == Some(None) {
            push(&mut self.missing, Missing::Gic)?;
        }
        let mut known = Vec::new();
        for node in tree.kind(|kinds| &kinds.its) {
            push(&mut known, node.try_path()?)?;
            self.or_missing(gic::its_of(node))?;
        }
        for node in tree.kind(|kinds| &kinds.v2m) {
            push(&mut known, node.try_path()?)?;
            self.or_missing(gic::v2m_of(node))?;
        }
        let mut unknown: Vec<String> = Vec::new();
        for row in self.pci.iter().flat_map(|host| &host.msi_map) {
            if !known.contains(&row.target) && !unknown.contains(&row.target) {
                push(&mut unknown, owned(&row.target)?)?;
            }
        }
        for path in unknown {
            push(&mut self.missing, Missing::MsiDriver(path))?;
        }
        Ok(())
    }
}
