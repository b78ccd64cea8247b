//! Memory set aside for DMA: the pools among the children of `/reserved-memory`, and which device has which.
//!
//! | `compatible` | properties | [`PoolKind`] |
//! |---|---|---|
//! | `restricted-dma-pool` | | [`Restricted`](PoolKind::Restricted): every transfer of the device goes through it |
//! | `shared-dma-pool` | `reusable` | [`Contiguous`](PoolKind::Contiguous): an area from which large allocations are made |
//! | `shared-dma-pool` | | [`CarveOut`](PoolKind::CarveOut): coherent memory of the devices that refer to it |
//!
//! A device refers to its pools with `memory-region`. For a PCI function the nearest node counts that has one: its own, that of
//! a bridge that leads to it, the host's. A `reusable` or plain `shared-dma-pool` may call itself the default for all others
//! (`linux,cma-default`, `linux,dma-default`).
//!
//! The `reserved-memory` and `shared-dma-pool` bindings.

use super::Machine;
use super::address::BusCells;
use super::error::{Error, PropertyFault};
use super::iommu::function;
use super::memory::{DynamicReservation, ReservedMemory, regions_of};
use super::pci::PCI_CELLS;
use super::tree::{Node, Tree, push};
use alloc::{string::String, vec::Vec};
use iommu::{PAGE_SIZE, PhysAddr, PhysRange};

/// What a pool of memory for DMA is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolKind {
    /// Every transfer of the devices that refer to it goes through it, and they reach nothing else.
    Restricted,
    /// Coherent memory for the devices that refer to it. Nobody else allocates from it, and it is in no linear map.
    CarveOut,
    /// Large contiguous allocations are made from it.
    Contiguous,
}

/// A pool of memory for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool<'a> {
    /// An index into [`Machine::reserved`].
    pub region: usize,
    /// The node's path.
    pub path: &'a str,
    /// What it is for.
    pub kind: PoolKind,
    /// Where it is: whole pages. `None` if the place was left open and there was none ([`Machine::place`]).
    pub range: Option<PhysRange>,
    /// It is also for all devices that have no pool of this kind of their own.
    pub default: bool,
}

/// The pools of one device: the first of each kind that it refers to, else the default of that kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DevicePools<'a> {
    /// All its transfers go through this one. There is no default of this kind.
    pub restricted: Option<Pool<'a>>,
    /// Its coherent memory is from this one.
    pub carve_out: Option<Pool<'a>>,
    /// Its large contiguous memory is from this one.
    pub contiguous: Option<Pool<'a>>,
}

/// Device and function numbers, from the root bus on.
type Way = Vec<(u8, u8)>;

/// A PCI function or bridge that has a node with `memory-region`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciNode {
    /// The node's path.
    pub path: String,
    /// An index into [`Machine::pcie`]: the host that it is behind.
    pub host: usize,
    /// The device and function numbers of the bridges that lead to it from the root bus, and its own.
    pub way: Way,
    /// Regions of [`Machine::reserved`] set aside for its DMA.
    pub memory_regions: Vec<usize>,
}

impl Machine {
    /// Lists the pools of memory for DMA.
    pub fn pools(&self) -> impl Iterator<Item = Pool<'_>> {
        (0..self.reserved.len()).filter_map(|region| self.pool(region))
    }

    /// Gives region number `region` of [`Machine::reserved`] as a pool, if it is one.
    pub fn pool(&self, region: usize) -> Option<Pool<'_>> {
        let memory = self.reserved.get(region)?;
        let (kind, range) = (memory.pool?, memory.ranges.first().copied());
        Some(Pool { region, path: &memory.path, kind, range, default: memory.default })
    }

    /// Lists the regions set aside for DMA of the PCI function at the end of `way`: the device and function numbers of the
    /// bridges that lead to it from the root bus of host bridge number `host`, and its own.
    pub fn function_regions(&self, host: usize, way: &[(u8, u8)]) -> &[usize] {
        let leads = |node: &&PciNode| node.host == host && !node.way.is_empty() && way.starts_with(&node.way);
        let nearest = self.pci_nodes.iter().filter(leads).max_by_key(|node| node.way.len());
        match nearest {
            Some(node) => &node.memory_regions,
            None => self.pcie.get(host).map_or(&[], |host| &host.memory_regions),
        }
    }

    /// Gives the pools of a PCI function, named as for [`function_regions`](Self::function_regions).
    pub fn function_pools(&self, host: usize, way: &[(u8, u8)]) -> DevicePools<'_> {
        self.device_pools(self.function_regions(host, way))
    }

    /// Gives the pools of a device that refers to `regions`: those of a [`BusMaster`](super::BusMaster), or of a PCI function.
    pub fn device_pools(&self, regions: &[usize]) -> DevicePools<'_> {
        let own = |kind| regions.iter().filter_map(|&region| self.pool(region)).find(|pool| pool.kind == kind);
        let default = |kind| self.pools().find(|pool| pool.kind == kind && pool.default);
        let either = |kind| own(kind).or_else(|| default(kind));
        DevicePools {
            restricted: own(PoolKind::Restricted),
            carve_out: either(PoolKind::CarveOut),
            contiguous: either(PoolKind::Contiguous),
        }
    }

    /// Chooses places for the reservations that left it open, the highest that fit: in memory, where they are allowed, and apart
    /// from `taken`, the memory reservation map and all other regions. Returns the paths of those that found none; they stay
    /// without a range. Called once, before memory is given to the frame allocator.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn place(&mut self, taken: &[PhysRange]) -> Result<Vec<String>, Error> {
        let mut holes: Vec<PhysRange> = Vec::new();
        let fixed = self.reserved.iter().flat_map(|region| region.ranges.iter());
        for range in taken.iter().chain(&self.memreserve).chain(fixed) {
            push(&mut holes, *range)?;
        }
        let mut homeless = Vec::new();
        for region in &mut self.reserved {
            let Some(dynamic) = region.dynamic.as_ref().filter(|_| region.ranges.is_empty()) else { continue };
            match place(&self.memory, dynamic, &holes) {
                Some(range) => {
                    push(&mut holes, range)?;
                    push(&mut region.ranges, range)?;
                }
                None => push(&mut homeless, super::tree::owned(&region.path)?)?,
            }
        }
        Ok(homeless)
    }
}

/// The highest place for a reservation in `memory` that overlaps none of `holes`.
fn place(memory: &[PhysRange], dynamic: &DynamicReservation, holes: &[PhysRange]) -> Option<PhysRange> {
    let size = dynamic.size.checked_next_multiple_of(PAGE_SIZE)?;
    let alignment = dynamic.alignment.max(PAGE_SIZE);
    let everywhere = [PhysRange::between(PhysAddr::new(0), PhysAddr::new(u64::MAX))?];
    let allowed = if dynamic.allowed.is_empty() { &everywhere[..] } else { &dynamic.allowed };
    let in_part = |bank: &PhysRange, part: &PhysRange| {
        let start = bank.start().max(part.start());
        let mut end = bank.end().min(part.end());
        // Each hole in the way lowers the end below its start: as many rounds as there are holes.
        loop {
            let at = PhysAddr::new(end.get().checked_sub(size)?).align_down(alignment);
            let range = PhysRange::new(at, size).filter(|_| at >= start)?;
            match holes.iter().filter(|hole| hole.overlaps(range)).map(|hole| hole.start()).min() {
                Some(lower) => end = lower,
                None => return Some(range),
            }
        }
    };
    memory.iter().flat_map(|bank| allowed.iter().filter_map(move |part| in_part(bank, part))).max()
}

/// Says what kind of pool `node`, read as `region`, is, and checks that it can be one.
pub(super) fn kind(node: Node<'_, '_>, region: &ReservedMemory) -> Result<Option<PoolKind>, Error> {
    let (restricted, shared) = (region.is_compatible("restricted-dma-pool"), region.is_compatible("shared-dma-pool"));
    let kind = match (restricted, shared, region.reusable) {
        (true, true, _) => return Err(node.fault("compatible", PropertyFault::Word)),
        (true, false, _) => PoolKind::Restricted,
        (false, true, true) => PoolKind::Contiguous,
        (false, true, false) => PoolKind::CarveOut,
        (false, false, _) => return Ok(None),
    };
    let (cma, dma) = (node.has("linux,cma-default"), node.has("linux,dma-default"));
    // A device's only memory is nobody else's, and the processors copy into it and out of it.
    let wrong = match kind {
        PoolKind::Restricted => [
            (region.no_map, "no-map"),
            (region.reusable, "reusable"),
            (cma, "linux,cma-default"),
            (dma, "linux,dma-default"),
        ],
        PoolKind::Contiguous => [(dma, "linux,dma-default"), (false, ""), (false, ""), (false, "")],
        PoolKind::CarveOut => [(cma && region.no_map, "linux,cma-default"), (false, ""), (false, ""), (false, "")],
    };
    if let Some((_, property)) = wrong.into_iter().find(|(wrong, _)| *wrong) {
        return Err(node.fault(property, PropertyFault::Word));
    }
    match (region.ranges.as_slice(), &region.dynamic) {
        ([range], _) if range.is_aligned(PAGE_SIZE) => {}
        ([range], _) => {
            let (base, size) = (range.start().get(), range.len());
            return Err(node.fault("reg", PropertyFault::Range { base, size }));
        }
        ([], Some(_)) => {}
        ([], None) => return Err(node.fault("reg", PropertyFault::Missing)),
        (several, _) => return Err(node.fault("reg", PropertyFault::Length(several.len()))),
    }
    Ok(Some(kind))
}

/// Checks that `region` is not the second default of its kind.
pub(super) fn only_default(node: Node<'_, '_>, found: &[ReservedMemory], region: &ReservedMemory) -> Result<(), Error> {
    let second = region.default && region.pool.is_some();
    if second && found.iter().any(|other| other.default && other.pool == region.pool) {
        return Err(Error::Duplicate { node: node.try_path()?, what: "a default pool" });
    }
    Ok(())
}

/// Reads the nodes of PCI functions and bridges that have a `memory-region`.
pub(super) fn pci_nodes(tree: &Tree<'_>) -> Result<Vec<PciNode>, Error> {
    let mut found: Vec<PciNode> = Vec::new();
    for node in tree.iter() {
        if !node.has("memory-region") || node.index_in(|kinds| &kinds.pcie).is_some() || !node.enabled()? {
            continue;
        }
        let Some((host, way)) = way_to(node)? else { continue };
        if found.iter().any(|other| (other.host, &other.way) == (host, &way)) {
            return Err(node.fault("reg", PropertyFault::Overlap(function(node)?.into())));
        }
        push(&mut found, PciNode { path: node.try_path()?, host, way, memory_regions: regions_of(node)? })?;
    }
    Ok(found)
}

/// The host bridge above `node`, and the way from there; `None` if it is behind none.
fn way_to(node: Node<'_, '_>) -> Result<Option<(usize, Way)>, Error> {
    let mut chain = Vec::new();
    let mut next = node;
    let host = loop {
        push(&mut chain, next)?;
        let Some(parent) = next.parent() else { return Ok(None) };
        if BusCells::of(parent)?.address != PCI_CELLS {
            // Something behind a PCI function, which masters no bus.
            return Ok(None);
        }
        if let Some(host) = parent.index_in(|kinds| &kinds.pcie) {
            break host;
        }
        next = parent;
    };
    let mut way = Way::new();
    for node in chain.into_iter().rev() {
        // The bus number in it is what firmware once gave; ours differ, and the way does not.
        let [_, devfn] = function(node)?.to_be_bytes();
        push(&mut way, (devfn >> 3, devfn & 7))?;
    }
    Ok(Some((host, way)))
}
