//! Takes device trees apart and puts them together again, for tests.

#![allow(dead_code)]

use std::ops::Range;

pub const BEGIN_NODE: u32 = 1;
pub const END_NODE: u32 = 2;
pub const PROP: u32 = 3;
pub const NOP: u32 = 4;
pub const END: u32 = 9;

/// Trees that QEMU wrote (`-M virt,...,dtb-randomness=off,dumpdtb=F`), cut to the bytes in use.
pub const QEMU_10: &[u8] = include_bytes!("../data/qemu-10.0-virt.dtb");
pub const QEMU_7: &[u8] = include_bytes!("../data/qemu-7.2-virt.dtb");
pub const QEMU_11: &[u8] = include_bytes!("../data/qemu-11.1-virt.dtb");
pub const QEMU_10_GIC_V2: &[u8] = include_bytes!("../data/qemu-10.0-virt-gicv2.dtb");
pub const QEMU_10_VIRTIO_IOMMU: &[u8] = include_bytes!("../data/qemu-10.0-virt-virtio-iommu.dtb");
pub const QEMU: [&[u8]; 5] = [QEMU_10, QEMU_7, QEMU_11, QEMU_10_GIC_V2, QEMU_10_VIRTIO_IOMMU];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub properties: Vec<(String, Vec<u8>)>,
    pub children: Vec<Node>,
}

impl Node {
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), properties: Vec::new(), children: Vec::new() }
    }

    /// Sets a property, or replaces its value.
    pub fn set(&mut self, name: &str, value: impl Into<Vec<u8>>) -> &mut Self {
        let value = value.into();
        match self.properties.iter_mut().find(|(own, _)| own == name) {
            Some((_, old)) => *old = value,
            None => self.properties.push((name.into(), value)),
        }
        self
    }

    pub fn unset(&mut self, name: &str) -> &mut Self {
        self.properties.retain(|(own, _)| own != name);
        self
    }

    /// Finds the node with this path, making those that are missing.
    pub fn at(&mut self, path: &str) -> &mut Node {
        path.split('/').filter(|part| !part.is_empty()).fold(self, |node, part| {
            let index = node.children.iter().position(|child| child.name == part).unwrap_or_else(|| {
                node.children.push(Node::new(part));
                node.children.len() - 1
            });
            &mut node.children[index]
        })
    }

    pub fn remove(&mut self, path: &str) {
        let (parent, name) = path.rsplit_once('/').unwrap();
        self.at(parent).children.retain(|child| child.name != name);
    }
}

pub fn cells(cells: &[u32]) -> Vec<u8> {
    cells.iter().flat_map(|cell| cell.to_be_bytes()).collect()
}

pub fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub fn set_word(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
}

/// Where the nodes and properties of a well-formed tree are.
pub struct Places {
    /// Path, and all tokens from BEGIN_NODE to END_NODE.
    pub nodes: Vec<(String, Range<usize>)>,
    /// Path of the node, name, and all bytes from PROP to the end of the padded value.
    pub properties: Vec<(String, String, Range<usize>)>,
}

pub fn places(dtb: &[u8]) -> Places {
    let (structs, strings) = (word(dtb, 8) as usize, word(dtb, 12) as usize);
    let text = |at: usize| std::str::from_utf8(dtb[at..].split(|&byte| byte == 0).next().unwrap()).unwrap();
    let mut places = Places { nodes: Vec::new(), properties: Vec::new() };
    let mut open: Vec<(String, usize)> = Vec::new();
    let mut at = structs;
    loop {
        let start = at;
        at += 4;
        match word(dtb, start) {
            BEGIN_NODE => {
                let name = text(at);
                at = (at + name.len() + 1).next_multiple_of(4);
                let parent = open.last().map_or("", |(path, _)| path.as_str());
                let path = if open.is_empty() { String::new() } else { format!("{parent}/{name}") };
                open.push((path, start));
            }
            END_NODE => {
                let (path, start) = open.pop().unwrap();
                places.nodes.push((path, start..at));
            }
            PROP => {
                let (size, name) = (word(dtb, at) as usize, text(strings + word(dtb, at + 4) as usize));
                at = (at + 8 + size).next_multiple_of(4);
                places.properties.push((open.last().unwrap().0.clone(), name.into(), start..at));
            }
            NOP => {}
            END => return places,
            token => panic!("token {token}"),
        }
    }
}

/// Reads a well-formed tree.
pub fn parse(dtb: &[u8]) -> Node {
    let places = places(dtb);
    let mut root = Node::new("");
    let mut order: Vec<_> = places.nodes.iter().collect();
    order.sort_by_key(|(_, range)| range.start);
    for (path, _) in order {
        root.at(path);
    }
    for (path, name, range) in places.properties {
        let size = word(dtb, range.start + 4) as usize;
        root.at(&path).set(&name, &dtb[range.start + 12..range.start + 12 + size]);
    }
    root
}

/// Writes a tree, version 17, with these entries in the memory reservation map.
pub fn write(root: &Node, reservations: &[(u64, u64)]) -> Vec<u8> {
    fn add(node: &Node, structs: &mut Vec<u8>, strings: &mut Vec<u8>) {
        let pad = |structs: &mut Vec<u8>| structs.resize(structs.len().next_multiple_of(4), 0);
        structs.extend(BEGIN_NODE.to_be_bytes());
        structs.extend(node.name.as_bytes());
        structs.push(0);
        pad(structs);
        for (name, value) in &node.properties {
            let offset = strings.len() as u32;
            strings.extend(name.as_bytes());
            strings.push(0);
            structs.extend(cells(&[PROP, value.len() as u32, offset]));
            structs.extend(value);
            pad(structs);
        }
        for child in &node.children {
            add(child, structs, strings);
        }
        structs.extend(END_NODE.to_be_bytes());
    }
    let (mut structs, mut strings) = (Vec::new(), Vec::new());
    add(root, &mut structs, &mut strings);
    structs.extend(END.to_be_bytes());
    let map: Vec<u8> =
        reservations.iter().chain([&(0, 0)]).flat_map(|(a, b)| [a.to_be_bytes(), b.to_be_bytes()].concat()).collect();
    let structs_at = 40 + map.len() as u32;
    let strings_at = structs_at + structs.len() as u32;
    let total = strings_at + strings.len() as u32;
    let header =
        [0xd00d_feed, total, structs_at, strings_at, 40, 17, 16, 0, strings.len() as u32, structs.len() as u32];
    [cells(&header), map, structs, strings].concat()
}
