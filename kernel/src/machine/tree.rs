//! The device tree as a list of nodes: the only place that talks to the parser.
//!
//! A [`Tree`] borrows names and values from the bytes. It is built with the `fdt` crate after our own [`validate`] has
//! passed, and the two must agree on the number of nodes and properties. (The crate's iterators end silently where data ends
//! early, and do not fuse after an error: counting catches the first, stopping at the first error the second.)
//!
//! # Invariants
//!
//! - Nodes are in depth-first order, so a parent's index is smaller than its children's: walking up ends.
//! - A node's properties are sorted by name, and no two share one; no two siblings share a name.
//! - No two nodes share a phandle.

use super::error::{Error, HeaderFault, PropertyFault, StructureFault};
use super::gic::{ITS, V2M};
use super::iommu::{SMMU_V3, VIRTIO_IOMMU};
use super::pci::ECAM;
use super::validate::{MAX_DEPTH, validate};
use alloc::{string::String, vec::Vec};
use core::cell::Cell;
use fdt::Fdt;
use fdt::helpers::UnalignedFallibleNode;
use fdt::nodes::AsNode;
use iommu::PhysRange;

/// All nodes of a device tree.
pub(super) struct Tree<'a> {
    nodes: Vec<NodeData<'a>>,
    /// Sorted by phandle.
    phandles: Vec<(u32, usize)>,
    reservations: Vec<PhysRange>,
    kinds: Kinds,
    /// How many more steps may be spent on following references.
    budget: Cell<u32>,
}

/// Steps that may be spent on following references in one tree.
const BUDGET: u32 = 1 << 20;
/// Most bytes a list of cells may have.
const MAX_LIST: usize = 16 * 1024;

/// The nodes that others refer to by an index: those of each kind that are not disabled, in the tree's order.
#[derive(Default)]
pub(super) struct Kinds {
    pub smmus: Vec<usize>,
    pub virtio_iommus: Vec<usize>,
    pub pcie: Vec<usize>,
    pub its: Vec<usize>,
    pub v2m: Vec<usize>,
    pub regions: Vec<usize>,
}

impl Kinds {
    fn of(tree: &Tree<'_>) -> Result<Self, Error> {
        let all = |names| -> Result<Vec<usize>, Error> {
            let mut list = Vec::new();
            for node in tree.compatible(names)? {
                push(&mut list, node.index)?;
            }
            Ok(list)
        };
        let mut regions = Vec::new();
        for node in tree.find("/reserved-memory").into_iter().flat_map(Node::children) {
            if node.enabled()? {
                push(&mut regions, node.index)?;
            }
        }
        let (smmus, virtio_iommus, pcie) = (all(SMMU_V3)?, all(VIRTIO_IOMMU)?, all(ECAM)?);
        Ok(Self { smmus, virtio_iommus, pcie, its: all(ITS)?, v2m: all(V2M)?, regions })
    }

    /// Does the same, and passes over nodes that cannot be read.
    fn lenient(tree: &Tree<'_>) -> Result<Self, Error> {
        let all = |names: &[&str]| -> Result<Vec<usize>, Error> {
            let mut list = Vec::new();
            for node in tree.iter().filter(|node| node.is_compatible(names).unwrap_or(false) && node.usable()) {
                push(&mut list, node.index)?;
            }
            Ok(list)
        };
        let mut regions = Vec::new();
        for node in tree.find("/reserved-memory").into_iter().flat_map(Node::children).filter(|node| node.usable()) {
            push(&mut regions, node.index)?;
        }
        let (smmus, virtio_iommus, pcie) = (all(SMMU_V3)?, all(VIRTIO_IOMMU)?, all(ECAM)?);
        Ok(Self { smmus, virtio_iommus, pcie, its: all(ITS)?, v2m: all(V2M)?, regions })
    }
}

struct NodeData<'a> {
    name: &'a str,
    unit: Option<&'a str>,
    parent: Option<usize>,
    /// Sorted by name.
    properties: Vec<(&'a str, &'a [u8])>,
}

/// One node of a [`Tree`].
#[derive(Clone, Copy)]
pub(super) struct Node<'t, 'a> {
    tree: &'t Tree<'a>,
    index: usize,
    data: &'t NodeData<'a>,
}

/// Appends to `list`, or says that the heap is full.
pub(super) fn push<T>(list: &mut Vec<T>, item: T) -> Result<(), Error> {
    list.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
    list.push(item);
    Ok(())
}

/// Copies `text`, or says that the heap is full.
pub(super) fn owned(text: &str) -> Result<String, Error> {
    let mut copy = String::new();
    copy.try_reserve_exact(text.len()).map_err(|_| Error::OutOfMemory)?;
    copy.push_str(text);
    Ok(copy)
}

impl<'a> Tree<'a> {
    /// Reads all of the tree in `bytes`.
    pub fn read(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut tree = Self::nodes(bytes)?;
        tree.check_siblings()?;
        tree.collect_phandles()?;
        tree.kinds = Kinds::of(&tree)?;
        Ok(tree)
    }

    /// Reads all of the tree in `bytes`, and takes what [`read`](Self::read) refuses where only single nodes are wrong: two
    /// nodes of one name, phandles that are not what they should be (the first of two counts), properties that cannot be
    /// read. The old name `linux,phandle` is known.
    pub fn lenient(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut tree = Self::nodes(bytes)?;
        let mut phandles = Vec::new();
        for node in tree.iter() {
            let phandle = ["phandle", "linux,phandle"].into_iter().find_map(|name| node.u32(name).ok().flatten());
            if let Some(phandle) = phandle.filter(|&phandle| phandle != 0 && phandle != u32::MAX) {
                push(&mut phandles, (phandle, node.index))?;
            }
        }
        phandles.sort_unstable();
        phandles.dedup_by_key(|&mut (phandle, _)| phandle);
        tree.phandles = phandles;
        tree.kinds = Kinds::lenient(&tree)?;
        Ok(tree)
    }

    fn nodes(bytes: &'a [u8]) -> Result<Self, Error> {
        let checked = validate(bytes)?;
        let disagreement = || Error::Structure { node: String::from("/"), fault: StructureFault::Disagreement };
        let fdt = Fdt::new_unaligned_fallible(checked.bytes).map_err(|_| Error::Header(HeaderFault::NoRoot))?;
        let root = fdt.root().map_err(|_| Error::Header(HeaderFault::NoRoot))?;
        let mut tree = Self {
            nodes: Vec::new(),
            phandles: Vec::new(),
            reservations: checked.reservations,
            kinds: Kinds::default(),
            budget: Cell::new(BUDGET),
        };
        tree.nodes.try_reserve_exact(checked.nodes).map_err(|_| Error::OutOfMemory)?;
        tree.add(root.as_node(), None, 1)?;
        let properties: usize = tree.nodes.iter().map(|node| node.properties.len()).sum();
        if (tree.nodes.len(), properties) != (checked.nodes, checked.properties) {
            return Err(disagreement());
        }
        Ok(tree)
    }

    /// Adds `node` and all below it. The recursion is no deeper than [`MAX_DEPTH`], which [`validate`] has checked.
    fn add(&mut self, node: UnalignedFallibleNode<'a>, parent: Option<usize>, depth: usize) -> Result<(), Error> {
        let index = self.nodes.len();
        let disagreement = Error::Structure {
            node: self.node(parent.unwrap_or(0)).map_or_else(|| String::from("/"), |node| node.path()),
            fault: StructureFault::Disagreement,
        };
        let (Ok(name), Ok(list), Ok(children)) = (node.name(), node.properties(), node.children()) else {
            return Err(disagreement);
        };
        let mut properties = Vec::new();
        for property in list {
            let Ok(property) = property else { return Err(disagreement) };
            push(&mut properties, (property.name, property.value))?;
        }
        properties.sort_unstable_by_key(|&(name, _)| name);
        let twice = properties.windows(2).any(|pair| matches!(pair, [(a, _), (b, _)] if a == b));
        self.nodes.push(NodeData { name: name.name, unit: name.unit_address, parent, properties });
        if twice {
            let node = self.node(index).map_or_else(String::new, |node| node.path());
            return Err(Error::Structure { node, fault: StructureFault::SameProperty });
        }
        for child in children {
            let Ok(child) = child else { return Err(disagreement) };
            if depth >= MAX_DEPTH {
                return Err(disagreement);
            }
            self.add(child, Some(index), depth + 1)?;
        }
        Ok(())
    }

    fn check_siblings(&self) -> Result<(), Error> {
        let mut names = Vec::new();
        names.try_reserve_exact(self.nodes.len()).map_err(|_| Error::OutOfMemory)?;
        names.extend(self.iter().map(|node| (node.data.parent, node.data.name, node.data.unit, node.index)));
        names.sort_unstable();
        for pair in names.windows(2) {
            if let [(parent, name, unit, _), (same_parent, same_name, same_unit, second)] = *pair
                && (parent, name, unit) == (same_parent, same_name, same_unit)
            {
                let node = self.node(second).map_or_else(String::new, |node| node.path());
                return Err(Error::Structure { node, fault: StructureFault::SameNode });
            }
        }
        Ok(())
    }

    fn collect_phandles(&mut self) -> Result<(), Error> {
        let mut phandles = Vec::new();
        for node in self.iter() {
            if let Some(phandle) = node.u32("phandle")? {
                if phandle == 0 || phandle == u32::MAX {
                    return Err(node.fault("phandle", PropertyFault::Phandle(phandle)));
                }
                push(&mut phandles, (phandle, node.index))?;
            }
        }
        phandles.sort_unstable();
        for pair in phandles.windows(2) {
            if let [(first, _), (second, index)] = *pair
                && first == second
                && let Some(node) = self.node(index)
            {
                return Err(node.fault("phandle", PropertyFault::Phandle(second)));
            }
        }
        self.phandles = phandles;
        Ok(())
    }

    fn node(&self, index: usize) -> Option<Node<'_, 'a>> {
        Some(Node { tree: self, index, data: self.nodes.get(index)? })
    }

    /// Gives the root, which every tree has.
    pub fn root(&self) -> Result<Node<'_, 'a>, Error> {
        self.node(0).ok_or(Error::Header(HeaderFault::NoRoot))
    }

    /// Gives all nodes in depth-first order.
    pub fn iter(&self) -> impl Iterator<Item = Node<'_, 'a>> {
        self.nodes.iter().enumerate().map(|(index, data)| Node { tree: self, index, data })
    }

    /// Gives all nodes that, with everything above them, are not disabled, and are compatible with one of `names`.
    pub fn compatible<'t>(&'t self, names: &[&str]) -> Result<Vec<Node<'t, 'a>>, Error> {
        let mut found = Vec::new();
        for node in self.iter() {
            if node.is_compatible(names)? && node.enabled()? {
                push(&mut found, node)?;
            }
        }
        Ok(found)
    }

    /// Finds the node with this absolute path. As everywhere, a missing unit address matches the first of that name.
    pub fn find(&self, path: &str) -> Option<Node<'_, 'a>> {
        let mut node = self.node(0)?;
        for part in path.strip_prefix('/')?.split('/').filter(|part| !part.is_empty()) {
            let (name, unit) = part.split_once('@').map_or((part, None), |(name, unit)| (name, Some(unit)));
            node =
                node.children().find(|child| child.data.name == name && (unit.is_none() || unit == child.data.unit))?;
        }
        Some(node)
    }

    /// Gives the nodes whose indices in these lists stand for `kind`.
    pub fn kind(&self, kind: fn(&Kinds) -> &Vec<usize>) -> impl Iterator<Item = Node<'_, 'a>> {
        kind(&self.kinds).iter().filter_map(|&index| self.node(index))
    }

    /// Gives the entries of the memory reservation map.
    pub fn reservations(&self) -> &[PhysRange] {
        &self.reservations
    }
}

impl<'t, 'a> Node<'t, 'a> {
    /// Gives the node's path, or says that the heap is full.
    pub fn try_path(self) -> Result<String, Error> {
        let (mut chain, mut length) = (Vec::new(), 1);
        let mut next = Some(self);
        while let Some(node) = next {
            push(&mut chain, node)?;
            length += 2 + node.data.name.len() + node.data.unit.map_or(0, str::len);
            next = node.parent();
        }
        let mut path = String::new();
        path.try_reserve_exact(length).map_err(|_| Error::OutOfMemory)?;
        for node in chain.iter().rev().filter(|node| node.data.parent.is_some()) {
            path.push('/');
            path.push_str(node.data.name);
            if let Some(unit) = node.data.unit {
                path.push('@');
                path.push_str(unit);
            }
        }
        if path.is_empty() {
            path.push('/');
        }
        Ok(path)
    }

    /// Gives the node's path for an error; empty if the heap is full.
    pub fn path(self) -> String {
        self.try_path().unwrap_or_default()
    }

    /// Says whether this is a child of the root in which a compiler leaves notes (`__symbols__`, `__local_fixups__`, ...).
    pub fn is_note(self) -> bool {
        self.data.parent == Some(0) && self.data.name.starts_with("__")
    }

    /// Gives this node's index among the nodes of `kind`, if it is one of them and not disabled.
    pub fn index_in(self, kind: fn(&Kinds) -> &Vec<usize>) -> Option<usize> {
        kind(&self.tree.kinds).binary_search(&self.index).ok()
    }

    /// Pays for one step of following a reference; fails when the tree has had its share.
    pub fn spend(self, property: &'static str) -> Result<(), Error> {
        match self.tree.budget.get().checked_sub(1) {
            Some(left) => {
                self.tree.budget.set(left);
                Ok(())
            }
            None => Err(self.fault(property, PropertyFault::Work)),
        }
    }

    /// Gives the node above, unless this is the root.
    pub fn parent(self) -> Option<Self> {
        self.tree.node(self.data.parent?)
    }

    /// Gives the nodes directly below.
    pub fn children(self) -> impl Iterator<Item = Self> {
        // Depth-first order: all below this node follow it without a gap.
        self.tree
            .iter()
            .skip(self.index + 1)
            .take_while(move |node| node.data.parent.is_some_and(|parent| parent >= self.index))
            .filter(move |node| node.data.parent == Some(self.index))
    }

    /// Gives the value of a property, if it is there.
    pub fn property(self, name: &str) -> Option<&'a [u8]> {
        let index = self.data.properties.binary_search_by_key(&name, |&(name, _)| name).ok()?;
        self.data.properties.get(index).map(|&(_, value)| value)
    }

    /// Says whether the property is there, whatever its value.
    pub fn has(self, name: &str) -> bool {
        self.property(name).is_some()
    }

    /// Makes the error that names this node and one of its properties.
    pub fn fault(self, property: &'static str, fault: PropertyFault) -> Error {
        Error::Property { node: self.path(), property, fault }
    }

    /// Reads a property that is one cell.
    pub fn u32(self, name: &'static str) -> Result<Option<u32>, Error> {
        let Some(value) = self.property(name) else { return Ok(None) };
        let bytes = value.try_into().map_err(|_| self.fault(name, PropertyFault::Length(value.len())))?;
        Ok(Some(u32::from_be_bytes(bytes)))
    }

    /// Reads a property that is one number of one or two cells.
    pub fn number(self, name: &'static str) -> Result<Option<u64>, Error> {
        match self.property(name) {
            None => Ok(None),
            Some(value) => match (value.len(), Cells(value).number(value.len() / 4)) {
                (4 | 8, Some(number)) => Ok(Some(number)),
                (length, _) => Err(self.fault(name, PropertyFault::Length(length))),
            },
        }
    }

    /// Reads a property that is one text.
    pub fn text(self, name: &'static str) -> Result<Option<&'a str>, Error> {
        let Some(mut texts) = self.texts(name)? else { return Ok(None) };
        match (texts.next(), texts.next()) {
            (Some(text), None) => Ok(Some(text)),
            _ => Err(self.fault(name, PropertyFault::Text)),
        }
    }

    /// Reads a property that is a list of texts.
    pub fn texts(self, name: &'static str) -> Result<Option<impl Iterator<Item = &'a str> + Clone>, Error> {
        let Some(value) = self.property(name) else { return Ok(None) };
        let text =
            value.split_last().filter(|&(&last, _)| last == 0).and_then(|(_, text)| core::str::from_utf8(text).ok());
        Ok(Some(text.ok_or_else(|| self.fault(name, PropertyFault::Text))?.split('\0')))
    }

    /// Reads a property that is a whole number of cells, at most 16 KiB of them.
    pub fn cells(self, name: &'static str) -> Result<Option<Cells<'a>>, Error> {
        match self.property(name) {
            None => Ok(None),
            Some(value) if value.len() % 4 == 0 && value.len() <= MAX_LIST => Ok(Some(Cells(value))),
            Some(value) => Err(self.fault(name, PropertyFault::Length(value.len()))),
        }
    }

    /// Says whether the node calls itself compatible with one of `names`.
    pub fn is_compatible(self, names: &[&str]) -> Result<bool, Error> {
        Ok(self.texts("compatible")?.is_some_and(|mut list| list.any(|own| names.contains(&own))))
    }

    /// Says whether neither this node nor one above it is disabled.
    pub fn enabled(self) -> Result<bool, Error> {
        let mut next = Some(self);
        while let Some(node) = next {
            if !matches!(node.text("status")?, None | Some("okay" | "ok")) {
                return Ok(false);
            }
            next = node.parent();
        }
        Ok(true)
    }

    /// Says the same, and takes a `status` that cannot be read for disabled.
    pub fn usable(self) -> bool {
        let mut next = Some(self);
        while let Some(node) = next {
            let first = node.property("status").map(|status| status.split(|&byte| byte == 0).next());
            if !matches!(first, None | Some(Some(b"okay" | b"ok"))) {
                return false;
            }
            next = node.parent();
        }
        true
    }

    /// Says whether DMA of this device is coherent with the processors' caches: the nearest node at or above it that says so.
    pub fn dma_coherent(self) -> bool {
        let mut next = Some(self);
        while let Some(node) = next {
            if node.has("dma-noncoherent") {
                return false;
            }
            if node.has("dma-coherent") {
                return true;
            }
            next = node.parent();
        }
        false
    }

    /// Finds the node that `phandle`, found in this node's `property`, stands for.
    pub fn resolve(self, property: &'static str, phandle: u32) -> Result<Self, Error> {
        let list = &self.tree.phandles;
        list.binary_search_by_key(&phandle, |&(phandle, _)| phandle)
            .ok()
            .and_then(|at| self.tree.node(list.get(at)?.1))
            .ok_or_else(|| self.fault(property, PropertyFault::Unresolved(phandle)))
    }
}

/// Big-endian cells of a property, taken from the front.
#[derive(Clone, Copy)]
pub(super) struct Cells<'a>(&'a [u8]);

impl<'a> Cells<'a> {
    /// Says whether nothing is left.
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Gives how many bytes are left.
    pub fn len(self) -> usize {
        self.0.len()
    }

    /// Takes one cell.
    pub fn cell(&mut self) -> Option<u32> {
        let (cell, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*cell))
    }

    /// Takes a number of no, one or two cells. (No cells are the number 0.)
    pub fn number(&mut self, cells: usize) -> Option<u64> {
        match cells {
            0 => Some(0),
            1 => self.cell().map(u64::from),
            2 => Some(u64::from(self.cell()?) << 32 | u64::from(self.cell()?)),
            _ => None,
        }
    }

    /// Takes `count` cells as they are.
    pub fn take(&mut self, count: usize) -> Option<Cells<'a>> {
        let (head, rest) = self.0.split_at_checked(count.checked_mul(4)?)?;
        self.0 = rest;
        Some(Cells(head))
    }
}
