//! Walking VMSAv8-64 tables (DDI 0487, D8.2 and D8.3), written without a look at the code that makes them.

use super::cache::{TlbEntry, TlbTag, WalkEntry};
use super::memory::{BadRead, ModelMemory};
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
    /// A table could not be read: its address.
    Abort(u64, BadRead),
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
        }
    }

    /// log2 of what an entry of `level` maps.
    fn shift(&self, level: u8) -> u32 {
        self.granule + (self.granule - 3) * u32::from(3 - level)
    }

    /// Walks for `addr`, from the deepest cached link if there is one. Gives the translation and the links on the way.
    ///
    /// # Errors
    ///
    /// See [`Failure`].
    pub fn walk(
        &self,
        memory: &ModelMemory,
        addr: u64,
        cached: &[WalkEntry],
        links: &mut Vec<WalkEntry>,
    ) -> Result<TlbEntry, Failure> {
        if addr >> self.input != 0 {
            return Err(Failure::Translation);
        }
        let deepest = cached
            .iter()
            .filter(|link| link.tag == self.tag && link.granule == self.granule)
            .filter(|link| addr.wrapping_sub(link.base) < link.size)
            .max_by_key(|link| link.level);
        let (mut table, mut level) = deepest.map_or((self.root, self.start), |link| (link.table, link.level + 1));
        loop {
            let shift = self.shift(level);
            // The first level may be concatenated tables: its index takes all the bits that are left.
            let bits = if level == self.start { self.input - shift } else { self.granule - 3 };
            let at = table + ((addr >> shift) & ((1 << bits) - 1)) * 8;
            let entry = memory.read(at).map_err(|bad| Failure::Abort(at, bad))?;
            let address = entry & 0x0000_ffff_ffff_f000 & !((1 << self.granule) - 1);
            match (entry & 0b11, level) {
                (0b11, 3) => return self.leaf(entry, address, addr, level, shift),
                (0b11, _) => {
                    if address >> self.output != 0 {
                        return Err(Failure::AddressSize);
                    }
                    let base = addr & !((1 << shift) - 1);
                    let link = WalkEntry {
                        tag: self.tag,
                        base,
                        size: 1 << shift,
                        level,
                        granule: self.granule,
                        table: address,
                    };
                    links.push(link);
                    table = address;
                    level += 1;
                }
                (0b01, 1 | 2) if self.granule == 12 || level == 2 => {
                    return self.leaf(entry, address, addr, level, shift);
                }
                _ => return Err(Failure::Translation),
            }
        }
    }

    fn leaf(&self, entry: u64, address: u64, addr: u64, level: u8, shift: u32) -> Result<TlbEntry, Failure> {
        if address >> self.output != 0 {
            return Err(Failure::AddressSize);
        }
        if entry >> 10 & 1 == 0 && !self.affd {
            return Err(Failure::AccessFlag);
        }
        // A contiguous group is cached as one.
        let group = if entry >> 52 & 1 == 1 { self.contiguous(level) } else { 1 };
        let size = group << shift;
        let (read, write) =
            if self.s2 { (entry >> 6 & 1 == 1, entry >> 7 & 1 == 1) } else { (true, entry >> 7 & 1 == 0) };
        Ok(TlbEntry {
            tag: self.tag,
            base: addr & !(size - 1),
            size,
            phys: address & !(size - 1),
            read,
            write,
            level,
            granule: self.granule,
        })
    }

    const fn contiguous(&self, level: u8) -> u64 {
        match (self.granule, level) {
            (12, _) => 16,
            (14, 3) => 128,
            _ => 32,
        }
    }

    /// Every translation that the tables in memory hold, with the links that lead to them.
    pub fn all(&self, memory: &ModelMemory, links: &mut Vec<WalkEntry>) -> Result<Vec<TlbEntry>, Failure> {
        let mut found = Vec::new();
        let bits = self.input - self.shift(self.start);
        self.collect(memory, self.root, self.start, bits, 0, &mut found, links)?;
        Ok(found)
    }

    /// Every translation below a cached link.
    pub fn below(&self, memory: &ModelMemory, link: &WalkEntry) -> Result<Vec<TlbEntry>, Failure> {
        let mut found = Vec::new();
        let mut links = Vec::new();
        self.collect(memory, link.table, link.level + 1, self.granule - 3, link.base, &mut found, &mut links)?;
        Ok(found)
    }

    #[allow(clippy::too_many_arguments)] // A recursion over a tree, with its place in the tree.
    fn collect(
        &self,
        memory: &ModelMemory,
        table: u64,
        level: u8,
        bits: u32,
        base: u64,
        found: &mut Vec<TlbEntry>,
        links: &mut Vec<WalkEntry>,
    ) -> Result<(), Failure> {
        let shift = self.shift(level);
        let entries = memory.read_run(table, 1 << bits).map_err(|bad| Failure::Abort(table, bad))?;
        for (index, entry) in (0..).zip(entries) {
            if entry & 1 == 0 {
                continue;
            }
            let addr = base + (index << shift);
            let address = entry & 0x0000_ffff_ffff_f000 & !((1 << self.granule) - 1);
            if level < 3 && entry & 0b10 != 0 {
                links.push(WalkEntry {
                    tag: self.tag,
                    base: addr,
                    size: 1 << shift,
                    level,
                    granule: self.granule,
                    table: address,
                });
                self.collect(memory, address, level + 1, self.granule - 3, addr, found, links)?;
            } else {
                found.push(self.leaf(entry, address, addr, level, shift)?);
            }
        }
        Ok(())
    }
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
