//! Processors, how to start them, and their timer.
//!
//! Devicetree Specification v0.4, section 3.7 and 3.8; the `arm/cpus`, `arm/psci` and `arm,arch_timer` bindings.

use super::address::BusCells;
use super::error::{Error, PropertyFault};
use super::interrupt::{Interrupt, interrupts};
use super::tree::{Tree, owned, push};
use alloc::{string::String, vec::Vec};
use iommu::PhysAddr;

/// The affinity fields of MPIDR_EL1.
const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

/// A processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// The affinity fields of its MPIDR_EL1, in place.
    pub mpidr: u64,
    /// How it is started.
    pub enable: EnableMethod,
    /// Its node's path.
    pub path: String,
}

/// How a processor is started.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EnableMethod {
    /// With PSCI's CPU_ON.
    Psci,
    /// It watches this CPU physical address for where to go.
    SpinTable(PhysAddr),
    /// The tree does not say (right for the one that boots).
    Unspecified,
    /// Some other way.
    Other(String),
}

/// How PSCI is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PsciConduit {
    /// With HVC.
    Hvc,
    /// With SMC.
    Smc,
}

/// The version of PSCI that the tree promises; firmware may tell of a newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PsciVersion {
    /// 0.1: function numbers are the tree's.
    V0_1,
    /// 0.2: function numbers are standard.
    V0_2,
    /// 1.0 or newer.
    V1_0,
}

/// PSCI firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Psci {
    /// How it is called.
    pub conduit: PsciConduit,
    /// What it can do.
    pub version: PsciVersion,
    /// CPU_ON's function number, where the tree gives one.
    pub cpu_on: Option<u32>,
    /// CPU_OFF's function number, where the tree gives one.
    pub cpu_off: Option<u32>,
}

/// The generic timer's interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    /// EL1 physical timer, secure.
    pub secure_physical: Option<Interrupt>,
    /// EL1 physical timer.
    pub physical: Option<Interrupt>,
    /// EL1 virtual timer.
    pub virtual_: Option<Interrupt>,
    /// EL2 physical timer.
    pub hypervisor_physical: Option<Interrupt>,
    /// EL2 virtual timer.
    pub hypervisor_virtual: Option<Interrupt>,
    /// The frequency in Hz, for firmware that does not set CNTFRQ_EL0.
    pub frequency: Option<u32>,
    /// It keeps counting while all processors sleep.
    pub always_on: bool,
}

/// Reads the processors that may be used, in the tree's order.
pub(super) fn cpus(tree: &Tree<'_>) -> Result<Vec<Cpu>, Error> {
    let mut cpus: Vec<Cpu> = Vec::new();
    let parent = tree.find("/cpus").ok_or(Error::NoCpu)?;
    let cells = BusCells::of(parent)?.address;
    for node in parent.children() {
        if node.text("device_type")? != Some("cpu") || !node.enabled()? {
            continue;
        }
        let Some(mut reg) = node.cells("reg")? else { return Err(node.fault("reg", PropertyFault::Missing)) };
        let length = node.fault("reg", PropertyFault::Length(reg.len()));
        let (Some(mpidr), true) = (reg.number(cells), reg.is_empty() && cells > 0) else { return Err(length) };
        if mpidr & !MPIDR_AFFINITY != 0 {
            return Err(node.fault("reg", PropertyFault::Value(mpidr)));
        }
        if cpus.iter().any(|other| other.mpidr == mpidr) {
            return Err(node.fault("reg", PropertyFault::Overlap(mpidr)));
        }
        let enable = match node.text("enable-method")? {
            None => EnableMethod::Unspecified,
            Some("psci") => EnableMethod::Psci,
            Some("spin-table") => match node.number("cpu-release-addr")? {
                Some(address) => EnableMethod::SpinTable(PhysAddr::new(address)),
                None => return Err(node.fault("cpu-release-addr", PropertyFault::Missing)),
            },
            Some(other) => EnableMethod::Other(owned(other)?),
        };
        push(&mut cpus, Cpu { mpidr, enable, path: node.try_path()? })?;
    }
    if cpus.is_empty() { Err(Error::NoCpu) } else { Ok(cpus) }
}

/// Reads the PSCI node, if there is one.
pub(super) fn psci(tree: &Tree<'_>) -> Result<Option<Psci>, Error> {
    let nodes = tree.compatible(&["arm,psci-1.0", "arm,psci-0.2", "arm,psci"])?;
    if let Some(second) = nodes.get(1) {
        return Err(Error::Duplicate { node: second.path(), what: "a PSCI node" });
    }
    let Some(&node) = nodes.first() else { return Ok(None) };
    let conduit = match node.text("method")? {
        Some("hvc") => PsciConduit::Hvc,
        Some("smc") => PsciConduit::Smc,
        Some(_) => return Err(node.fault("method", PropertyFault::Word)),
        None => return Err(node.fault("method", PropertyFault::Missing)),
    };
    let version = if node.is_compatible(&["arm,psci-1.0"])? {
        PsciVersion::V1_0
    } else if node.is_compatible(&["arm,psci-0.2"])? {
        PsciVersion::V0_2
    } else {
        PsciVersion::V0_1
    };
    Ok(Some(Psci { conduit, version, cpu_on: node.u32("cpu_on")?, cpu_off: node.u32("cpu_off")? }))
}

/// Reads the generic timer, if there is one.
pub(super) fn timer(tree: &Tree<'_>) -> Result<Option<Timer>, Error> {
    let nodes = tree.compatible(&["arm,armv8-timer"])?;
    if let Some(second) = nodes.get(1) {
        return Err(Error::Duplicate { node: second.path(), what: "a generic timer" });
    }
    let Some(&node) = nodes.first() else { return Ok(None) };
    let list = interrupts(node)?;
    let mut timer =
        Timer { frequency: node.u32("clock-frequency")?, always_on: node.has("always-on"), ..Timer::default() };
    let unnamed = ["sec-phys", "phys", "virt", "hyp-phys", "hyp-virt"];
    let names = match node.texts("interrupt-names")? {
        Some(names) => {
            let mut list = Vec::new();
            for name in names {
                push(&mut list, name)?;
            }
            list
        }
        None => unnamed.into_iter().take(list.len()).collect(),
    };
    if names.len() != list.len() {
        return Err(node.fault("interrupts", PropertyFault::Length(4 * list.len())));
    }
    for (name, interrupt) in names.into_iter().zip(list) {
        let slot = match name {
            "sec-phys" => &mut timer.secure_physical,
            "phys" => &mut timer.physical,
            "virt" => &mut timer.virtual_,
            "hyp-phys" => &mut timer.hypervisor_physical,
            "hyp-virt" => &mut timer.hypervisor_virtual,
            _ => return Err(node.fault("interrupt-names", PropertyFault::Word)),
        };
        if slot.replace(interrupt).is_some() {
            return Err(node.fault("interrupt-names", PropertyFault::Word));
        }
    }
    Ok(Some(timer))
}
