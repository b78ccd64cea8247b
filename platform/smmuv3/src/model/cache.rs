//! What an SMMU may have cached, and what takes it out again.
//!
//! Nothing ever leaves by itself. Of the architecture's leave to invalidate more than was asked (4.3, 4.4) no use is made, and
//! of every hint that allows less, full use. Everything remembers the descriptor that it was made of, so that a descriptor that
//! changes under a cached copy, and a table that is freed under one, are noticed (see `audit.rs`).

use crate::entry::{Entry, WORDS};
use crate::spec::command::TlbiRange;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What the entries of a translation are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TlbTag {
    /// The VMID (0 where there is no stage 2).
    pub vmid: u16,
    /// The ASID, for stage 1 (alone or combined with stage 2).
    pub asid: Option<u16>,
}

/// The descriptor that something was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it was read.
    pub at: u64,
    /// What was read.
    pub word: u64,
    /// The root of the tables that it belongs to.
    pub root: u64,
}

/// One cached translation. Of nested translation it is the combined one, from IOVA to physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry {
    /// Whose it is.
    pub tag: TlbTag,
    /// Not bound to the ASID (nG clear).
    pub global: bool,
    /// First input address.
    pub base: u64,
    /// Bytes: a page, a block, or a whole contiguous group; the smaller of both stages.
    pub size: u64,
    /// First output address.
    pub phys: u64,
    /// Whether the device may read.
    pub read: bool,
    /// Whether the device may write.
    pub write: bool,
    /// Whether only privileged transactions may do either (stage 1, AP\[1\] clear).
    pub privileged: bool,
    /// The level of the leaf (of stage 1 if there is one).
    pub level: u8,
    /// log2 of the granule.
    pub granule: u32,
    /// Input addresses of the leaf, of which an invalidation of any takes this out: base and bytes.
    pub leaf: (u64, u64),
    /// The memory type: the MAIR byte (stage 1), or MemAttr (stage 2 alone).
    pub attributes: u8,
    /// The leaf's descriptor.
    pub source: Source,
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
    /// The table that is linked (an intermediate address in a nested stage 1).
    pub table: u64,
    /// Of a nested stage 1.
    pub nested: bool,
    /// The link's descriptor.
    pub source: Source,
}

/// A cached STE or CD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// Where it was read.
    pub at: u64,
    /// What was read.
    pub entry: Entry,
}

/// An STE or CD of which not all words have been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetching {
    /// Where it is read.
    pub at: u64,
    /// What was read so far.
    pub entry: Entry,
    /// One bit for each word that was read.
    pub words: u8,
}

impl Fetching {
    /// Nothing has been read yet.
    pub const fn new(at: u64) -> Self {
        Self { at, entry: [0; WORDS], words: 0 }
    }
}

/// A translation that a device keeps for itself (ATS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtcEntry {
    /// The device.
    pub sid: u32,
    /// The SubstreamID, if the request had one.
    pub ssid: Option<u32>,
    /// The translation.
    pub entry: TlbEntry,
}

/// All caches.
#[derive(Default)]
pub struct Caches {
    /// L1STDs by index: where they were read, and what.
    pub l1: BTreeMap<u32, (u64, u64)>,
    /// STEs by StreamID.
    pub ste: BTreeMap<u32, Configuration>,
    /// L1CDs by StreamID and index: where they were read, and what.
    pub l1cd: BTreeMap<(u32, u32), (u64, u64)>,
    /// CDs by StreamID and SubstreamID.
    pub cd: BTreeMap<(u32, u32), Configuration>,
    /// STEs that are being read, by StreamID.
    pub ste_fetches: BTreeMap<u32, Fetching>,
    /// CDs that are being read, by StreamID and SubstreamID.
    pub cd_fetches: BTreeMap<(u32, u32), Fetching>,
    /// Translations.
    pub tlb: Vec<TlbEntry>,
    /// Links between tables.
    pub walks: Vec<WalkEntry>,
    /// The devices' own translations.
    pub atc: Vec<AtcEntry>,
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
    /// The CD of one SubstreamID of one stream.
    Cd {
        /// StreamID.
        sid: u32,
        /// SubstreamID.
        ssid: u32,
        /// Not the L1CD.
        leaf: bool,
    },
    /// All CDs of one stream.
    CdAll {
        /// StreamID.
        sid: u32,
    },
    /// By address.
    Address {
        /// Whose; without an ASID, of stage 2 alone.
        tag: TlbTag,
        /// Whatever the ASID is.
        any_asid: bool,
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
    /// A device's own translations.
    Atc {
        /// The device.
        sid: u32,
        /// The SubstreamID.
        ssid: Option<u32>,
        /// Whatever the SubstreamID is.
        global: bool,
        /// First address.
        addr: u64,
        /// Bytes less one.
        last: u64,
    },
}

impl Caches {
    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        let configuration = self.l1.is_empty() && self.ste.is_empty() && self.l1cd.is_empty() && self.cd.is_empty();
        configuration && self.ste_fetches.is_empty() && self.tlb.is_empty() && self.walks.is_empty()
    }

    /// Carries out an invalidation, to the least extent that the architecture demands.
    pub fn invalidate(&mut self, what: Invalidation) {
        match what {
            Invalidation::Config { first, last, l1 } => {
                let other = |sid: u32| !(first..=last).contains(&sid);
                self.ste.retain(|&sid, _| other(sid));
                self.ste_fetches.retain(|&sid, _| other(sid));
                self.l1cd.retain(|&(sid, _), _| other(sid));
                self.cd.retain(|&(sid, _), _| other(sid));
                self.cd_fetches.retain(|&(sid, _), _| other(sid));
                if let Some((from, to)) = l1 {
                    self.l1.retain(|index, _| !(from..=to).contains(index));
                }
            }
            Invalidation::Cd { sid, ssid, leaf } => {
                self.cd.remove(&(sid, ssid));
                self.cd_fetches.remove(&(sid, ssid));
                if !leaf {
                    // The index depends on the format, which is the STE's: both possible ones go.
                    self.l1cd.remove(&(sid, ssid >> 6));
                    self.l1cd.remove(&(sid, ssid >> 10));
                }
            }
            Invalidation::CdAll { sid } => {
                self.cd.retain(|&(stream, _), _| stream != sid);
                self.cd_fetches.retain(|&(stream, _), _| stream != sid);
                self.l1cd.retain(|&(stream, _), _| stream != sid);
            }
            Invalidation::Address { tag, any_asid, addr, range, leaf } => {
                let whose = |other: TlbTag, global: bool| {
                    other.vmid == tag.vmid
                        && (other == tag || other.asid.is_some() && tag.asid.is_some() && (any_asid || global))
                };
                self.tlb.retain(|entry| {
                    !(whose(entry.tag, entry.global)
                        && hit(addr, &range, entry.leaf.0, entry.leaf.1, entry.granule)
                        && (range.tg == 0 || range.ttl == 0 || range.ttl == entry.level))
                });
                if !leaf {
                    self.walks.retain(|entry| {
                        !(whose(entry.tag, false)
                            && hit(addr, &range, entry.base, entry.size, entry.granule)
                            && (range.tg == 0 || range.ttl == 0 || entry.level < range.ttl))
                    });
                }
            }
            Invalidation::Asid(tag) => {
                self.tlb.retain(|entry| entry.tag != tag || entry.global);
                self.walks.retain(|entry| entry.tag != tag);
            }
            Invalidation::Vmid(vmid) => self.retain(|tag| tag.vmid != vmid || tag.asid.is_none()),
            Invalidation::VmidBoth(vmid) => self.retain(|tag| tag.vmid != vmid),
            Invalidation::All => self.retain(|_| false),
            Invalidation::Atc { sid, ssid, global, addr, last } => self.atc.retain(|own| {
                let apart = own.entry.base > addr.saturating_add(last) || own.entry.base + (own.entry.size - 1) < addr;
                own.sid != sid || !global && own.ssid != ssid || apart
            }),
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
