//! What can be wrong with a device tree, always with the node (and property) that is wrong.

use alloc::string::String;

/// Why a device tree could not be turned into a [`Machine`](super::Machine).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The header is unusable, so there are no nodes to name.
    #[error("device tree header: {0}")]
    Header(HeaderFault),
    /// The structure block is broken inside, or right after, this node.
    #[error("device tree, in node {node}: {fault}")]
    Structure {
        /// Path of the innermost node that was open.
        node: String,
        /// What is broken.
        fault: StructureFault,
    },
    /// A property says something that cannot be.
    #[error("device tree, node {node}, property {property}: {fault}")]
    Property {
        /// Path of the node.
        node: String,
        /// Name of the property.
        property: &'static str,
        /// What is wrong with its value.
        fault: PropertyFault,
    },
    /// Two nodes describe what there can be only one of.
    #[error("device tree, node {node}: there already is {what}")]
    Duplicate {
        /// Path of the second node.
        node: String,
        /// What there is two of.
        what: &'static str,
    },
    /// No memory is described.
    #[error("device tree, node /: no memory is described below it")]
    NoMemory,
    /// No usable processor is described.
    #[error("device tree, node /cpus: no processor is described below it")]
    NoCpu,
    /// The heap has no room for the description.
    #[error("no heap left for the description of the machine")]
    OutOfMemory,
}

/// What is wrong with a device tree's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderFault {
    /// Fewer bytes than a header has.
    #[error("only {0} bytes, a header has 40")]
    Truncated(usize),
    /// Not a flattened device tree.
    #[error("magic number {0:#010x}, not 0xd00dfeed")]
    Magic(u32),
    /// A version this reader does not know.
    #[error("version {version}, compatible with {compatible}: version 17 is needed")]
    Version {
        /// The tree's version.
        version: u32,
        /// The oldest version it is compatible with.
        compatible: u32,
    },
    /// The total size is larger than the bytes at hand, or than the 2 MiB the boot protocol allows.
    #[error("total size {claimed}, but there are {available} bytes")]
    TotalSize {
        /// What the header says.
        claimed: u32,
        /// What there is.
        available: usize,
    },
    /// A block lies outside the tree, or is not aligned.
    #[error("the {block} block (offset {offset}, {size} bytes) is misaligned or outside the tree")]
    Block {
        /// Which block.
        block: &'static str,
        /// Its offset in bytes.
        offset: u32,
        /// Its size in bytes.
        size: u32,
    },
    /// Two blocks share bytes.
    #[error("the {0} and {1} blocks overlap")]
    Overlap(&'static str, &'static str),
    /// The memory reservation map has no end, or an entry that runs past the end of the address space.
    #[error("the memory reservation map is broken at offset {0}")]
    Reservation(usize),
    /// The parser behind the validator does not agree that this is a tree.
    #[error("the structure block has no root node")]
    NoRoot,
}

/// What is wrong with the structure block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StructureFault {
    /// The block ends in the middle of something.
    #[error("the structure block ends too early, at offset {0}")]
    Truncated(usize),
    /// A token that does not exist.
    #[error("unknown token {token:#x} at offset {offset}")]
    Token {
        /// The token's value.
        token: u32,
        /// Its offset in the structure block.
        offset: usize,
    },
    /// A token that may not stand here.
    #[error("token {token:#x} at offset {offset} may not stand here")]
    Misplaced {
        /// The token's value.
        token: u32,
        /// Its offset in the structure block.
        offset: usize,
    },
    /// A node name that is empty, too long, not printable ASCII, or contains `/`.
    #[error("bad node name at offset {0}")]
    NodeName(usize),
    /// A property name outside the strings block, not terminated, too long or not printable ASCII.
    #[error("bad property name: offset {0} in the strings block")]
    PropertyName(u32),
    /// The node has two properties of one name.
    #[error("two of its properties have the same name")]
    SameProperty,
    /// The node's parent has another child of this name.
    #[error("its parent has another child of this name")]
    SameNode,
    /// The nesting is deeper than [`MAX_DEPTH`](super::MAX_DEPTH).
    #[error("nested deeper than {} nodes", super::MAX_DEPTH)]
    Depth,
    /// There are more nodes or properties than [`MAX_NODES`](super::MAX_NODES) and
    /// [`MAX_PROPERTIES`](super::MAX_PROPERTIES).
    #[error("more nodes or properties than this kernel takes")]
    Count,
    /// Two readers of the same tree disagree.
    #[error("two readers of the structure block disagree")]
    Disagreement,
}

/// What is wrong with the value of a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PropertyFault {
    /// The property has to be there and is not.
    #[error("it is missing")]
    Missing,
    /// The length is not a multiple of what it should be, or too short.
    #[error("a length of {0} bytes does not fit")]
    Length(usize),
    /// Not text that ends in NUL.
    #[error("it is not terminated text")]
    Text,
    /// A cell count that no address here can have.
    #[error("{0} cells are not supported")]
    Cells(u32),
    /// A range that is empty or runs past the end of the address space.
    #[error("the range at {base:#x}, {size:#x} bytes, is empty or wraps")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        size: u64,
    },
    /// A range that is too small for what it should hold.
    #[error("{size:#x} bytes are too few, {needed:#x} are needed")]
    TooSmall {
        /// Length in bytes.
        size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// A range that overlaps another one of its kind.
    #[error("the range at {0:#x} overlaps another one")]
    Overlap(u64),
    /// An address that the bus does not pass on to its parent.
    #[error("address {0:#x} is not passed on by this bus")]
    NotPassedOn(u64),
    /// A phandle that no node has.
    #[error("no node has phandle {0:#x}")]
    Unresolved(u32),
    /// A phandle that two nodes have, or that is reserved.
    #[error("phandle {0:#x} is reserved or used twice")]
    Phandle(u32),
    /// A reference to a node of the wrong kind.
    #[error("phandle {phandle:#x} is not {wanted}")]
    WrongKind {
        /// The phandle followed.
        phandle: u32,
        /// What the node should have been.
        wanted: &'static str,
    },
    /// A path or alias that names no node.
    #[error("the path names no node")]
    Path,
    /// A chain of references that comes back to where it was, or is far too long.
    #[error("the chain of references has no end")]
    Cycle,
    /// The tree's references are so many that following them all takes too long.
    #[error("following it takes too long: this tree has more references than a machine needs")]
    Work,
    /// An interrupt specifier that no GIC has.
    #[error("the interrupt specifier {0:#x} {1:#x} {2:#x} does not exist")]
    Interrupt(u32, u32, u32),
    /// An interrupt that the map does not mention.
    #[error("the interrupt is not in the map")]
    Unmapped,
    /// A value that cannot be.
    #[error("the value {0:#x} cannot be")]
    Value(u64),
    /// A word that is not known.
    #[error("the word is not one of those known")]
    Word,
}
