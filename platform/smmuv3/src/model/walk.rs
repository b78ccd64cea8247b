//! Walking VMSAv8-64 tables (DDI 0487, D8.2 and D8.3), written without a look at the code that makes them.
//!
//! A [`Walker`] walks through the caches as hardware does: from the deepest cached link, or from any other, filling the caches
//! on the way. In a nested translation every address that stage 1 produces (its root, its links, its output) goes through
//! stage 2 first.

use super::audit::Finding;
use super::cache::{Caches, Source, TlbEntry, TlbTag, WalkEntry};
use super::memory::{BadRead, ModelMemory};
use super::rng::Rng;
use crate::entry::Entry;
use crate::spec::{cd, ste};
use alloc::vec::Vec;

/// Where a walk starts, and how.
#[derive(Clone, Copy, Debug)]
pub struct Regime {
    /// What its translations are tagged with.
    pub tag: TlbTag,
    /// Stage 2.
    pub s2: bool,
    /// The root table.
    pub root: u64,
    /// Bits of input address.
    pub input: u32,
    /// log2 of the granule.
    pub granule: u32,
    /// Level of the first lookup.
    pub start: u8,
    /// Bits of output address.
    pub output: u32,
    /// Access flag faults are off.
    pub affd: bool,
    /// The memory types by index (stage 1).
    pub mair: u64,
}

/// What a transaction is translated by: one stage, or stage 1 and then stage 2.
#[derive(Clone, Copy, Debug)]
pub struct Stages {
    /// The only stage, or stage 1.
    pub first: Regime,
    /// Stage 2, of a nested translation.
    pub second: Option<Regime>,
}

/// Why a walk ended without a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An invalid descriptor, or an address beyond the input size.
    Translation,
    /// An address beyond the output size.
    AddressSize,
    /// The access flag is clear.
    AccessFlag,
    /// A table may not be read, or the leaf not be used, through stage 2.
    Permission,
    /// A table could not be read: its address.
    Abort(u64, BadRead),
}

/// A [`Failure`], and where it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What happened.
    pub failure: Failure,
    /// At stage 2, for this intermediate address.
    pub ipa: Option<u64>,
    /// While a table of stage 1 was read, not for the transaction's own address.
    pub table: bool,
}

impl Fault {
    const fn plain(failure: Failure) -> Self {
        Self { failure, ipa: None, table: false }
    }
}

impl Regime {
    /// Stage 1, as a CD describes it; `vmid` from the STE.
    pub fn stage1(entry: &Entry, vmid: u16, oas: u32) -> Self {
        let input = 64 - cd::T0SZ.get(entry[0]) as u32;
        let granule = granule(cd::TG0.get(entry[0]));
        Self {
            tag: TlbTag { vmid, asid: Some(cd::ASID.get(entry[0]) as u16) },
            s2: false,
            root: cd::TTB0.address(entry[1]),
            input,
            granule,
            start: start_level(input, granule),
            output: size(cd::IPS.get(entry[0])).min(oas),
            affd: cd::AFFD.is_set(entry[0]),
            mair: entry[3],
        }
    }

    /// Stage 2, as an STE describes it.
    pub fn stage2(entry: &Entry, oas: u32) -> Self {
        let granule = granule(ste::S2TG.get(entry[2]));
        let last = if granule == 12 { 2 } else { 3 };
        Self {
            tag: TlbTag { vmid: ste::S2VMID.get(entry[2]) as u16, asid: None },
            s2: true,
            root: ste::S2TTB.address(entry[3]),
            input: 64 - ste::S2T0SZ.get(entry[2]) as u32,
            granule,
            start: last - ste::S2SL0.get(entry[2]).min(2) as u8,
            output: size(ste::S2PS.get(entry[2])).min(oas),
            affd: ste::S2AFFD.is_set(entry[2]),
            mair: 0,
        }
    }

    /// log2 of what an entry of `level` maps.
    fn shift(&self, level: u8) -> u32 {
        self.granule + (self.granule - 3) * u32::from(3 - level)
    }

    /// Index bits of a table of `level`. The first level may be concatenated tables: its index takes all the bits that are
    /// left.
    fn bits(&self, level: u8) -> u32 {
        if level == self.start { self.input.saturating_sub(self.shift(level)) } else { self.granule - 3 }
    }

    /// Bytes of the root table, to which it must be aligned (at least 64).
    pub fn root_bytes(&self) -> u64 {
        (8 << self.bits(self.start)).max(64)
    }

    const fn contiguous(&self, level: u8) -> u64 {
        match (self.granule, level) {
            (12, _) => 16,
            (14, 3) => 128,
            _ => 32,
        }
    }

    /// What a descriptor of `level` says.
    fn decode(&self, entry: u64, level: u8) -> Kind {
        let address = entry & 0x0000_ffff_ffff_f000 & !((1 << self.granule) - 1);
        match (entry & 0b11, level) {
            (0b11, 3) => Kind::Leaf(address),
            (0b11, _) => Kind::Table(address),
            (0b01, 1 | 2) if self.granule == 12 || level == 2 => Kind::Leaf(address),
            _ => Kind::Invalid,
        }
    }

    /// The translation that a leaf makes for `addr`, of a contiguous group as one if `group`.
    fn leaf(&self, source: Source, addr: u64, level: u8, group: bool) -> Result<TlbEntry, Failure> {
        let entry = source.word;
        let Kind::Leaf(address) = self.decode(entry, level) else { return Err(Failure::Translation) };
        if address >> self.output != 0 {
            return Err(Failure::AddressSize);
        }
        if entry >> 10 & 1 == 0 && !self.affd {
            return Err(Failure::AccessFlag);
        }
        let one = 1 << self.shift(level);
        let size = if group && entry >> 52 & 1 == 1 { self.contiguous(level) * one } else { one };
        let (read, write) =
            if self.s2 { (entry >> 6 & 1 == 1, entry >> 7 & 1 == 1) } else { (true, entry >> 7 & 1 == 0) };
        let attributes = if self.s2 { (entry >> 2 & 0xf) as u8 } else { (self.mair >> (8 * (entry >> 2 & 7))) as u8 };
        // One of a group alone: its own output address is the descriptor's.
        let phys = if size == one { address } else { address & !(size - 1) };
        let base = addr & !(size - 1);
        Ok(TlbEntry {
            tag: self.tag,
            global: !self.s2 && entry >> 11 & 1 == 0,
            base,
            size,
            phys,
            read,
            write,
            privileged: !self.s2 && entry >> 6 & 1 == 0,
            level,
            granule: self.granule,
            leaf: (base, size),
            attributes,
            source,
        })
    }
}

enum Kind {
    Invalid,
    Table(u64),
    Leaf(u64),
}

/// Walks tables through the caches.
pub struct Walker<'a> {
    /// What is walked.
    pub memory: &'a ModelMemory,
    /// What is cached.
    pub caches: &'a mut Caches,
    /// What was noticed on the way.
    pub findings: &'a mut Vec<Finding>,
    /// Chooses where the architecture lets the SMMU choose; without it, the choices are the same each time: the deepest link,
    /// and groups as one.
    pub rng: Option<&'a mut Rng>,
}

impl Walker<'_> {
    /// Translates `addr`, from the TLB or by a walk. Does not check permissions of the last stage.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn translate(&mut self, stages: &Stages, addr: u64) -> Result<TlbEntry, Fault> {
        if let Some(entry) = self.cached(stages.first.tag, addr) {
            let roots = (entry.source.root, stages.first.root);
            if entry.tag == stages.first.tag && roots.0 != roots.1 {
                self.findings.push(Finding::SharedTag { tag: entry.tag, roots });
            }
            return Ok(entry);
        }
        let first = self.walk(&stages.first, stages.second.as_ref(), addr)?;
        let entry = match &stages.second {
            None => first,
            Some(second) => {
                let ipa = first.phys + (addr - first.base);
                let second = self.stage2(second, ipa, false)?;
                combine(&first, &second, addr, ipa)
            }
        };
        self.keep(entry);
        Ok(entry)
    }

    /// Translates an intermediate address, of a table if `table`.
    fn stage2(&mut self, second: &Regime, ipa: u64, table: bool) -> Result<TlbEntry, Fault> {
        let fault = |failure| Fault { failure, ipa: Some(ipa), table };
        let entry = match self.cached(second.tag, ipa) {
            Some(entry) => entry,
            None => {
                let entry = self.walk(second, None, ipa).map_err(|inner| fault(inner.failure))?;
                self.keep(entry);
                entry
            }
        };
        if table && !entry.read { Err(fault(Failure::Permission)) } else { Ok(entry) }
    }

    /// Where the tables of stage 1 and the CDs are in physical memory.
    ///
    /// # Errors
    ///
    /// [`Fault`] of stage 2.
    pub fn physical(&mut self, second: Option<&Regime>, at: u64) -> Result<u64, Fault> {
        match second {
            None => Ok(at),
            Some(second) => self.stage2(second, at, true).map(|entry| entry.phys + (at - entry.base)),
        }
    }

    fn cached(&mut self, tag: TlbTag, addr: u64) -> Option<TlbEntry> {
        let covers = |entry: &&TlbEntry| {
            let whose = entry.tag == tag
                || entry.global && entry.tag.vmid == tag.vmid && entry.tag.asid.is_some() == tag.asid.is_some();
            whose && addr.wrapping_sub(entry.base) < entry.size
        };
        let mut found = self.caches.tlb.iter().filter(covers);
        let entry = *found.next()?;
        if let Some(other) = found.find(|other| other.phys + (addr - other.base) != entry.phys + (addr - entry.base)) {
            self.findings.push(Finding::Conflict { addr, one: entry, other: *other });
        }
        Some(entry)
    }

    /// Puts a translation into the TLB.
    pub fn keep(&mut self, entry: TlbEntry) {
        if !self.caches.tlb.contains(&entry) {
            self.caches.tlb.push(entry);
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.rng.as_deref_mut().is_some_and(|rng| rng.chance(one_in))
    }

    fn walk(&mut self, regime: &Regime, second: Option<&Regime>, addr: u64) -> Result<TlbEntry, Fault> {
        if regime.input < 64 && addr >> regime.input != 0 {
            return Err(Fault::plain(Failure::Translation));
        }
        // From the deepest link that is cached, or, as the SMMU likes, from none.
        let deepest = if self.chance(4) {
            None
        } else {
            let links = self.caches.walks.iter();
            let fitting = links.filter(|link| link.tag == regime.tag && link.granule == regime.granule);
            fitting.filter(|link| addr.wrapping_sub(link.base) < link.size).max_by_key(|link| link.level).copied()
        };
        if let Some(link) = deepest.filter(|link| link.source.root != regime.root) {
            self.findings.push(Finding::SharedTag { tag: regime.tag, roots: (link.source.root, regime.root) });
        }
        let (mut table, mut level) = deepest.map_or((regime.root, regime.start), |link| (link.table, link.level + 1));
        loop {
            let shift = regime.shift(level);
            let offset = ((addr >> shift) & ((1 << regime.bits(level)) - 1)) * 8;
            let at = self.physical(second, table + offset)?;
            let word = self.memory.read(at).map_err(|bad| Fault::plain(Failure::Abort(at, bad)))?;
            let source = Source { at, word, root: regime.root };
            self.compare(regime, source, level, addr);
            match regime.decode(word, level) {
                Kind::Invalid => return Err(Fault::plain(Failure::Translation)),
                Kind::Leaf(_) => {
                    self.check_group(regime, source, level);
                    // The Contiguous bit is a hint.
                    let group = !self.chance(3);
                    return regime.leaf(source, addr, level, group).map_err(Fault::plain);
                }
                Kind::Table(address) => {
                    if address >> regime.output != 0 {
                        return Err(Fault::plain(Failure::AddressSize));
                    }
                    let base = addr & !((1 << shift) - 1);
                    let (tag, granule) = (regime.tag, regime.granule);
                    let nested = second.is_some();
                    self.link(WalkEntry {
                        tag,
                        base,
                        size: 1 << shift,
                        level,
                        granule,
                        table: address,
                        nested,
                        source,
                    });
                    table = address;
                    level += 1;
                }
            }
        }
    }

    fn link(&mut self, link: WalkEntry) {
        if !self.caches.walks.contains(&link) {
            self.caches.walks.push(link);
        }
    }

    /// Every translation that the tables in memory hold, and the links that lead to them, into the caches if `keep`.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn all(&mut self, stages: &Stages, keep: bool) -> Result<Vec<TlbEntry>, Fault> {
        let mut found = Vec::new();
        let regime = &stages.first;
        let root = Table { at: regime.root, level: regime.start, base: 0 };
        self.collect(stages, root, keep, &mut found)?;
        Ok(found)
    }

    /// Every translation below a cached link.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    pub fn below(&mut self, stages: &Stages, link: &WalkEntry) -> Result<Vec<TlbEntry>, Fault> {
        let mut found = Vec::new();
        let table = Table { at: link.table, level: link.level + 1, base: link.base };
        self.collect(stages, table, false, &mut found)?;
        Ok(found)
    }

    fn collect(&mut self, stages: &Stages, table: Table, keep: bool, found: &mut Vec<TlbEntry>) -> Result<(), Fault> {
        let Stages { first: regime, second } = stages;
        let Table { at: table, level, base } = table;
        let shift = regime.shift(level);
        for (index, (at, word)) in (0..).zip(self.entries(regime, second.as_ref(), table, level)?) {
            if word & 1 == 0 {
                continue;
            }
            let addr = base + (index << shift);
            let source = Source { at, word, root: regime.root };
            if keep {
                self.compare(regime, source, level, addr);
            }
            if let Kind::Table(address) = regime.decode(word, level) {
                let (tag, granule) = (regime.tag, regime.granule);
                if keep {
                    let (base, size, nested) = (addr, 1 << shift, second.is_some());
                    self.link(WalkEntry { tag, base, size, level, granule, table: address, nested, source });
                }
                self.collect(stages, Table { at: address, level: level + 1, base: addr }, keep, found)?;
            } else {
                self.check_group(regime, source, level);
                let entry = regime.leaf(source, addr, level, true).map_err(Fault::plain)?;
                if let Some(second) = second {
                    // A leaf of stage 1 may reach further than one of stage 2, and over holes of it.
                    let mut offset = addr - entry.base;
                    while offset < entry.size {
                        let ipa = entry.phys + offset;
                        let step = match self.stage2(second, ipa, false) {
                            Ok(inner) => {
                                let combined = combine(&entry, &inner, entry.base + offset, ipa);
                                found.push(combined);
                                combined.base + combined.size - (entry.base + offset)
                            }
                            Err(_) => 1 << second.granule,
                        };
                        offset += step;
                    }
                } else if found.last().is_none_or(|last| (last.base, last.phys) != (entry.base, entry.phys)) {
                    // The members of a contiguous group count as one.
                    found.push(entry);
                }
            }
        }
        if keep && level == regime.start {
            found.iter().for_each(|entry| self.keep(*entry));
        }
        Ok(())
    }

    /// The descriptors of a table, and where they are.
    fn entries(
        &mut self,
        regime: &Regime,
        second: Option<&Regime>,
        table: u64,
        level: u8,
    ) -> Result<Vec<(u64, u64)>, Fault> {
        let count = 1_u64 << regime.bits(level);
        if second.is_none() {
            let words = self.memory.read_run(table, count as usize);
            let words = words.map_err(|bad| Fault::plain(Failure::Abort(table, bad)))?;
            return Ok((0..).map(|index| table + index * 8).zip(words).collect());
        }
        let read = |index| {
            let at = self.physical(second, table + index * 8)?;
            self.memory.read(at).map(|word| (at, word)).map_err(|bad| Fault::plain(Failure::Abort(at, bad)))
        };
        (0..count).map(read).collect()
    }

    /// A random mapped address, found by descending through random valid descriptors.
    pub fn somewhere(&mut self, stages: &Stages) -> Option<u64> {
        let Stages { first: regime, second } = stages;
        let (mut table, mut level, mut base) = (regime.root, regime.start, 0);
        loop {
            let words = self.entries(regime, second.as_ref(), table, level).ok()?;
            let words = words.into_iter().map(|(_, word)| word);
            let valid: Vec<(u64, u64)> = (0..).zip(words).filter(|(_, word)| word & 1 != 0).collect();
            let pick = self.rng.as_deref_mut()?.below(valid.len() as u32)?;
            let &(index, word) = valid.get(pick as usize)?;
            base += index << regime.shift(level);
            match regime.decode(word, level) {
                Kind::Table(address) => (table, level) = (address, level + 1),
                _ => return Some(base),
            }
        }
    }

    /// A descriptor whose cached copy differs in more than permissions was changed without break-before-make.
    fn compare(&mut self, regime: &Regime, source: Source, level: u8, addr: u64) {
        // Access flag, permissions, dirty and what is software's may change in place.
        const SOFT: u64 = 1 << 10 | 0b11 << 6 | 1 << 51 | 0b11 << 53 | 0xf << 55;
        if source.word & 1 == 0 {
            return;
        }
        let old = self.caches.tlb.iter().map(|entry| (entry.tag, entry.source));
        let old = old.chain(self.caches.walks.iter().map(|link| (link.tag, link.source)));
        let changed = |&(tag, old): &(TlbTag, Source)| {
            tag == regime.tag && old.at == source.at && (old.word ^ source.word) & !SOFT != 0
        };
        if let Some((_, old)) = old.into_iter().find(changed) {
            self.findings.push(Finding::NoBreak { level, addr, at: source.at, old: old.word, new: source.word });
        }
    }

    /// All valid members of a contiguous group must agree.
    fn check_group(&mut self, regime: &Regime, source: Source, level: u8) {
        if source.word >> 52 & 1 == 0 {
            return;
        }
        let count = regime.contiguous(level);
        let first = source.at & !(count * 8 - 1);
        let Ok(words) = self.memory.read_run(first, count as usize) else { return };
        const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
        let size = 1_u64 << regime.shift(level);
        let start = (source.word & ADDRESS) & !(count * size - 1);
        let fits = |(index, word): (u64, u64)| {
            word & 1 == 0 || word & ADDRESS == start + index * size && (word ^ source.word) & !ADDRESS == 0
        };
        if !(0..).zip(words).all(fits) {
            self.findings.push(Finding::Group { at: first, word: source.word });
        }
    }
}

/// A table on the way.
struct Table {
    at: u64,
    level: u8,
    base: u64,
}

/// The translation through both stages.
fn combine(first: &TlbEntry, second: &TlbEntry, addr: u64, ipa: u64) -> TlbEntry {
    let size = first.size.min(second.size);
    let (base, phys) = (addr & !(size - 1), second.phys + (ipa - second.base) - (addr & (size - 1)));
    TlbEntry { base, size, phys, read: first.read && second.read, write: first.write && second.write, ..*first }
}

/// log2 of the granule that TG0 and S2TG encode.
const fn granule(tg: u64) -> u32 {
    match tg {
        cd::TG0_4K => 12,
        cd::TG0_16K => 14,
        _ => 16,
    }
}

/// Bits of address that IPS and S2PS encode.
fn size(encoded: u64) -> u32 {
    [32, 36, 40, 42, 44, 48, 52].get(encoded as usize).copied().unwrap_or(52)
}

/// The level of the first lookup of stage 1.
const fn start_level(input: u32, granule: u32) -> u8 {
    let levels = (input - granule).div_ceil(granule - 3);
    (4 - levels) as u8
}
