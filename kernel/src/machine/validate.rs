//! Checks the structure of a flattened device tree before a parser is let at it.
//!
//! After [`validate`] the header's arithmetic cannot overflow, the blocks lie inside the bytes and apart from each other,
//! every token is known and in its place, every name is terminated printable ASCII, and nesting and counts are bounded. What
//! the properties *say* is nobody's business here.
//!
//! Devicetree Specification v0.4, chapter 5.

use super::error::{Error, HeaderFault, StructureFault};
use alloc::{string::String, vec::Vec};
use iommu::{PhysAddr, PhysRange};

/// Deepest nesting accepted, the root being at depth 1.
pub const MAX_DEPTH: usize = 32;
/// Most nodes accepted.
pub const MAX_NODES: usize = 16 * 1024;
/// Most properties accepted.
pub const MAX_PROPERTIES: usize = 128 * 1024;
/// Most bytes accepted: what the arm64 boot protocol allows.
pub const MAX_SIZE: usize = 2 << 20;

/// Longest name of a node or property accepted, in bytes.
const MAX_NAME: usize = 127;
const HEADER: usize = 40;
const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// What [`validate`] found out on the way.
pub(super) struct Validated<'a> {
    /// Exactly the tree: the first `totalsize` bytes.
    pub bytes: &'a [u8],
    /// The entries of the memory reservation map.
    pub reservations: Vec<PhysRange>,
    /// Number of nodes.
    pub nodes: usize,
    /// Number of properties.
    pub properties: usize,
}

/// Reads the big-endian word at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let end = offset.checked_add(4)?;
    Some(u32::from_be_bytes(bytes.get(offset..end)?.try_into().ok()?))
}

/// Reads the big-endian double word at `offset`.
fn double(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from(word(bytes, offset)?) << 32 | u64::from(word(bytes, offset.checked_add(4)?)?))
}

/// Gives the printable, NUL-terminated name of at most [`MAX_NAME`] bytes at `offset`.
fn name(bytes: &[u8], offset: usize) -> Option<&str> {
    let rest = bytes.get(offset..)?;
    let rest = rest.get(..MAX_NAME + 1).unwrap_or(rest);
    let name = rest.get(..rest.iter().position(|&byte| byte == 0)?)?;
    name.iter().all(u8::is_ascii_graphic).then(|| core::str::from_utf8(name).ok())?
}

/// Checks the tree that `bytes` begins with, and says where it is broken if it is.
pub(super) fn validate(bytes: &[u8]) -> Result<Validated<'_>, Error> {
    let header = Header::read(bytes).map_err(Error::Header)?;
    let bytes = bytes.get(..header.total).ok_or(Error::Header(HeaderFault::Truncated(bytes.len())))?;
    let reservations = reservations(bytes, &header)?;
    let (structs, strings) = header.blocks(bytes).ok_or(Error::Header(HeaderFault::NoRoot))?;
    let (nodes, properties) = Walk::new(structs, strings).run()?;
    Ok(Validated { bytes, reservations, nodes, properties })
}

/// Reads the size that the header of the tree claims.
pub(super) fn size(bytes: &[u8]) -> Result<usize, HeaderFault> {
    let (Some(magic), Some(claimed)) = (word(bytes, 0), word(bytes, 4)) else {
        return Err(HeaderFault::Truncated(bytes.len()));
    };
    if magic != MAGIC {
        return Err(HeaderFault::Magic(magic));
    }
    match claimed as usize {
        size @ HEADER..=MAX_SIZE => Ok(size),
        _ => Err(HeaderFault::TotalSize { claimed, available: MAX_SIZE }),
    }
}

/// The header's fields that matter, as sizes that are inside the tree.
struct Header {
    total: usize,
    structs: (usize, usize),
    strings: (usize, usize),
    reservations: usize,
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Self, HeaderFault> {
        let mut fields = [0u32; HEADER / 4];
        for (index, field) in fields.iter_mut().enumerate() {
            *field = word(bytes, index * 4).ok_or(HeaderFault::Truncated(bytes.len()))?;
        }
        let [magic, claimed, structs, strings, map, version, compatible, _, strings_size, structs_size] = fields;
        if magic != MAGIC {
            return Err(HeaderFault::Magic(magic));
        }
        if version < 17 || compatible > 17 || compatible > version {
            return Err(HeaderFault::Version { version, compatible });
        }
        let total = claimed as usize;
        if total > bytes.len() || !(HEADER..=MAX_SIZE).contains(&total) {
            return Err(HeaderFault::TotalSize { claimed, available: bytes.len() });
        }
        let block = |block, offset: u32, size: u32, align: u32| {
            let inside = offset.checked_add(size).is_some_and(|end| end as usize <= total);
            if !inside
                || (offset as usize) < HEADER
                || !offset.is_multiple_of(align)
                || !size.is_multiple_of(align.min(4))
            {
                return Err(HeaderFault::Block { block, offset, size });
            }
            Ok((offset as usize, size as usize))
        };
        let header = Self {
            total,
            structs: block("structure", structs, structs_size, 4)?,
            strings: block("strings", strings, strings_size, 1)?,
            // At least the terminating entry.
            reservations: block("memory reservation", map, 16, 8)?.0,
        };
        if overlap(header.structs, header.strings) {
            return Err(HeaderFault::Overlap("structure", "strings"));
        }
        Ok(header)
    }

    fn blocks<'a>(&self, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let cut = |(offset, size): (usize, usize)| bytes.get(offset..offset.checked_add(size)?);
        Some((cut(self.structs)?, cut(self.strings)?))
    }
}

fn overlap((a, a_size): (usize, usize), (b, b_size): (usize, usize)) -> bool {
    a < b.saturating_add(b_size) && b < a.saturating_add(a_size)
}

/// Reads the memory reservation map, up to the entry that is all zero.
fn reservations(bytes: &[u8], header: &Header) -> Result<Vec<PhysRange>, Error> {
    let mut found = Vec::new();
    let mut offset = header.reservations;
    loop {
        let broken = Error::Header(HeaderFault::Reservation(offset));
        let (Some(base), Some(size)) = (double(bytes, offset), double(bytes, offset.saturating_add(8))) else {
            return Err(broken);
        };
        let entry = (header.reservations, offset + 16 - header.reservations);
        for (name, block) in [("structure", header.structs), ("strings", header.strings)] {
            if overlap(entry, block) {
                return Err(Error::Header(HeaderFault::Overlap("memory reservation", name)));
            }
        }
        if base == 0 && size == 0 {
            return Ok(found);
        }
        let range = PhysRange::new(PhysAddr::new(base), size).filter(|range| !range.is_empty()).ok_or(broken)?;
        found.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        found.push(range);
        offset += 16;
    }
}

/// One walk over the structure block, with the names of the nodes that are open.
struct Walk<'a> {
    structs: &'a [u8],
    strings: &'a [u8],
    at: usize,
    open: Vec<Open<'a>>,
    nodes: usize,
    properties: usize,
}

/// A node that has begun and not yet ended.
struct Open<'a> {
    name: &'a str,
    has_children: bool,
}

impl<'a> Walk<'a> {
    fn new(structs: &'a [u8], strings: &'a [u8]) -> Self {
        Self { structs, strings, at: 0, open: Vec::new(), nodes: 0, properties: 0 }
    }

    fn run(mut self) -> Result<(usize, usize), Error> {
        loop {
            let offset = self.at;
            let token = self.word()?;
            match token {
                NOP => {}
                BEGIN_NODE if self.open.is_empty() == (self.nodes == 0) => self.begin(offset)?,
                END_NODE if !self.open.is_empty() => drop(self.open.pop()),
                PROP if self.open.last().is_some_and(|node| !node.has_children) => self.property()?,
                END if self.open.is_empty() && self.nodes > 0 && self.at == self.structs.len() => {
                    return Ok((self.nodes, self.properties));
                }
                BEGIN_NODE | END_NODE | PROP | END => {
                    return Err(self.fault(StructureFault::Misplaced { token, offset }));
                }
                _ => return Err(self.fault(StructureFault::Token { token, offset })),
            }
        }
    }

    fn begin(&mut self, offset: usize) -> Result<(), Error> {
        let name = name(self.structs, self.at).ok_or_else(|| self.fault(StructureFault::NodeName(offset)))?;
        if name.contains('/') || name.starts_with('@') || name.is_empty() != self.open.is_empty() {
            return Err(self.fault(StructureFault::NodeName(offset)));
        }
        self.skip(name.len() + 1)?;
        self.nodes += 1;
        if let Some(parent) = self.open.last_mut() {
            parent.has_children = true;
        }
        if self.nodes > MAX_NODES {
            return Err(self.fault(StructureFault::Count));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(self.fault(StructureFault::Depth));
        }
        self.open.try_reserve(1).map_err(|_| Error::OutOfMemory)?;
        self.open.push(Open { name, has_children: false });
        Ok(())
    }

    fn property(&mut self) -> Result<(), Error> {
        let size = self.word()? as usize;
        let offset = self.word()?;
        match name(self.strings, offset as usize) {
            Some(name) if !name.is_empty() => {}
            _ => return Err(self.fault(StructureFault::PropertyName(offset))),
        }
        self.skip(size)?;
        self.properties += 1;
        if self.properties > MAX_PROPERTIES { Err(self.fault(StructureFault::Count)) } else { Ok(()) }
    }

    fn word(&mut self) -> Result<u32, Error> {
        let word = word(self.structs, self.at).ok_or_else(|| self.fault(StructureFault::Truncated(self.at)))?;
        self.at += 4;
        Ok(word)
    }

    /// Goes `bytes` further, and on to the next word.
    fn skip(&mut self, bytes: usize) -> Result<(), Error> {
        let end = bytes.checked_next_multiple_of(4).and_then(|bytes| self.at.checked_add(bytes));
        match end {
            Some(end) if end <= self.structs.len() => {
                self.at = end;
                Ok(())
            }
            _ => Err(self.fault(StructureFault::Truncated(self.at))),
        }
    }

    fn fault(&self, fault: StructureFault) -> Error {
        let mut node = String::new();
        for open in self.open.iter().skip(1) {
            node.push('/');
            node.push_str(open.name);
        }
        if node.is_empty() {
            node.push('/');
        }
        Error::Structure { node, fault }
    }
}
