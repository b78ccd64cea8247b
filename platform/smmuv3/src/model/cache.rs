//! What an SMMU may have cached, and what takes it out again.
//!
//! Nothing ever leaves by itself. Of the architecture's leave to invalidate more than was asked (4.3, 4.4) no use is made, and
//! of every hint that allows less, full use.

use crate::entry::Entry;
use crate::spec::command::TlbiRange;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What the entries of a translation are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TlbTag {
    /// The VMID (0 where there is no stage 2).
    pub vmid: u16,
    /// The ASID, for stage 1.
    pub asid: Option<u16>,
}

/// One cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry {
    /// Whose it is.
    pub tag: TlbTag,
    /// First input address.
    pub base: u64,
    /// Bytes: a page, a block, or a whole contiguous group.
    pub size: u64,
    /// First output address.
    pub phys: u64,
    /// Whether the device may read.
    pub read: bool,
    /// Whether the device may write.
    pub write: bool,
    /// The level of the leaf.
    pub level: u8,
    /// log2 of the granule.
    pub granule: u32,
}

/// One cached link from a table to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkEntry {
    /// Whose it is.
    pub tag: TlbTag,
    /// First input address below the link.
    pub base: u64,
    /// Bytes of input address below the link.
    pub size: u64,
    /// The level of the entry that links.
    pub level: u8,
    /// log2 of the granule.
    pub granule: u32,
    /// The table that is linked.
    pub table: u64,
}

/// All caches.
#[derive(Default)]
pub struct Caches {
    /// L1STDs by index.
    pub l1: BTreeMap<u32, u64>,
    /// STEs by StreamID.
    pub ste: BTreeMap<u32, Entry>,
    /// CDs by StreamID.
    pub cd: BTreeMap<u32, Entry>,
    /// Translations.
    pub tlb: Vec<TlbEntry>,
    /// Links between tables.
    pub walks: Vec<WalkEntry>,
}

/// An invalidation, issued and not yet known to be complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// STEs of `first..=last` with their CDs; the L1STDs of the indexes `l1.0..=l1.1` too.
    Config {
        /// First StreamID.
        first: u32,
        /// Last StreamID.
        last: u32,
        /// L1STDs.
        l1: Option<(u32, u32)>,
    },
    /// The CD of one stream.
    Cd {
        /// StreamID.
        sid: u32,
    },
    /// By address.
    Address {
        /// Whose.
        tag: TlbTag,
        /// First address.
        addr: u64,
        /// Range and hints.
        range: TlbiRange,
        /// Leaf entries only.
        leaf: bool,
    },
    /// One ASID.
    Asid(TlbTag),
    /// The stage 1 of one VMID.
    Vmid(u16),
    /// Both stages of one VMID.
    VmidBoth(u16),
    /// Everything.
    All,
}

impl Caches {
    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.l1.is_empty() && self.ste.is_empty() && self.cd.is_empty() && self.tlb.is_empty() && self.walks.is_empty()
    }

    /// Carries out an invalidation, to the least extent that the architecture demands.
    pub fn invalidate(&mut self, what: Invalidation) {
        match what {
            Invalidation::Config { first, last, l1 } => {
                self.ste.retain(|sid, _| !(first..=last).contains(sid));
                self.cd.retain(|sid, _| !(first..=last).contains(sid));
                if let Some((from, to)) = l1 {
                    self.l1.retain(|index, _| !(from..=to).contains(index));
                }
            }
            Invalidation::Cd { sid } => {
                self.cd.remove(&sid);
            }
            Invalidation::Address { tag, addr, range, leaf } => {
                self.tlb.retain(|entry| {
                    !(entry.tag == tag
                        && hit(addr, &range, entry.base, entry.size, entry.granule)
                        && (range.tg == 0 || range.ttl == 0 || range.ttl == entry.level))
                });
                if !leaf {
                    self.walks.retain(|entry| {
                        !(entry.tag == tag
                            && hit(addr, &range, entry.base, entry.size, entry.granule)
                            && (range.tg == 0 || range.ttl == 0 || entry.level < range.ttl))
                    });
                }
            }
            Invalidation::Asid(tag) => self.retain(|other| other != tag),
            Invalidation::Vmid(vmid) => self.retain(|tag| tag.vmid != vmid || tag.asid.is_none()),
            Invalidation::VmidBoth(vmid) => self.retain(|tag| tag.vmid != vmid),
            Invalidation::All => self.retain(|_| false),
        }
    }

    fn retain(&mut self, keep: impl Fn(TlbTag) -> bool) {
        self.tlb.retain(|entry| keep(entry.tag));
        self.walks.retain(|entry| keep(entry.tag));
    }
}

/// Whether an invalidation by address reaches an entry.
fn hit(addr: u64, range: &TlbiRange, base: u64, size: u64, granule: u32) -> bool {
    let last = base + (size - 1);
    if range.tg == 0 {
        return base <= addr && addr <= last;
    }
    if granule != granule_shift(range.tg) {
        return false;
    }
    let pages = (u64::from(range.num) + 1) << range.scale;
    // Saturating: a range does not wrap at the top of the address space.
    let end = addr.saturating_add(pages.saturating_mul(1 << granule) - 1);
    base <= end && addr <= last
}

/// log2 of the granule that TG encodes.
pub const fn granule_shift(tg: u8) -> u32 {
    match tg {
        1 => 12,
        2 => 14,
        _ => 16,
    }
}
