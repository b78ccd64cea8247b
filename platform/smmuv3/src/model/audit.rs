//! What only shows when caches and memory are compared: descriptors that changed under a cached copy, tables freed under one.

use super::cache::{Caches, TlbEntry, TlbTag};
use super::memory::ModelMemory;
use crate::spec::{cd, ste};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// A rule about translations that was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Two cached translations of one address disagree.
    Conflict {
        /// The address.
        addr: u64,
        /// One of them.
        one: TlbEntry,
        /// The other.
        other: TlbEntry,
    },
    /// Two sets of tables are cached under one tag: an ASID or VMID was used again without an invalidation.
    SharedTag {
        /// The tag.
        tag: TlbTag,
        /// The roots.
        roots: (u64, u64),
    },
    /// A valid descriptor was replaced by another valid one while the first was cached.
    NoBreak {
        /// The level.
        level: u8,
        /// The input address.
        addr: u64,
        /// Where the descriptor is.
        at: u64,
        /// What is cached.
        old: u64,
        /// What is in memory.
        new: u64,
    },
    /// The members of a contiguous group do not belong together.
    Group {
        /// Where the group is.
        at: u64,
        /// The member that was read.
        word: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conflict { addr, one, other } => {
                write!(f, "a TLB conflict at {addr:#x}: {one:x?} and {other:x?}")
            }
            Self::SharedTag { tag, roots: (one, other) } => {
                write!(
                    f,
                    "{tag:?} is used by the tables at {one:#x} and at {other:#x}, without an invalidation between"
                )
            }
            Self::NoBreak { level, addr, at, old, new } => write!(
                f,
                "no break before make: the level {level} descriptor of {addr:#x} at {at:#x} became {new:#x} while {old:#x} \
                 was cached"
            ),
            Self::Group { at, word } => write!(f, "the contiguous group at {at:#x} is not of one piece with {word:#x}"),
        }
    }
}

/// What is cached that leads into freed memory.
pub(super) fn freed(caches: &Caches, memory: &ModelMemory) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |what: &str, at: u64, leads: u64| {
        if memory.is_freed(leads) {
            found.push(format!(
                "memory at {leads:#x} was freed while {what} from {at:#x}, which leads there, is cached"
            ));
        }
    };
    for link in caches.walks.iter().filter(|link| !link.nested) {
        check("a link", link.source.at, link.table);
    }
    for &(at, word) in caches.l1.values() {
        check("a level 1 stream table descriptor", at, ste::L1STD_L2PTR.address(word));
    }
    let nested =
        |sid: u32| caches.ste.get(&sid).is_some_and(|held| ste::CONFIG.get(held.entry[0]) == ste::CONFIG_NESTED);
    for (_, &(at, word)) in caches.l1cd.iter().filter(|((sid, _), _)| !nested(*sid)) {
        check("a level 1 context descriptor", at, super::config::L1CD_L2PTR.address(word));
    }
    for held in caches.ste.values() {
        let config = ste::CONFIG.get(held.entry[0]);
        if ste::V.is_set(held.entry[0]) && config & 0b101 == 0b101 && config & 0b010 == 0 {
            check("an STE", held.at, ste::S1CONTEXTPTR.address(held.entry[0]));
        }
        if ste::V.is_set(held.entry[0]) && config & 0b110 == 0b110 {
            check("an STE", held.at, ste::S2TTB.address(held.entry[3]));
        }
    }
    for (_, held) in caches.cd.iter().filter(|((sid, _), _)| !nested(*sid)) {
        if cd::V.is_set(held.entry[0]) && !cd::EPD0.is_set(held.entry[0]) {
            check("a CD", held.at, cd::TTB0.address(held.entry[1]));
        }
    }
    found
}
