//! The stream table entries and context descriptors that this driver writes (IHI 0070, 5.2 and 5.4).

use crate::bugs::{Bug, seeded};
use crate::entry::{Entry, WORDS};
use crate::features::Features;
use crate::spec::{cd, ste};
use iommu::pgtable::{Geometry, Granule};

/// An STE whose transactions are aborted, without an event.
pub const fn ste_abort() -> Entry {
    let mut entry = [0; WORDS];
    entry[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_ABORT);
    entry
}

/// An STE whose transactions pass untranslated. `attr_types_ovr` is IDR1's: where attributes can be overridden, the incoming
/// shareability must be asked for.
pub const fn ste_bypass(attr_types_ovr: bool) -> Entry {
    let mut entry = [0; WORDS];
    entry[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_BYPASS);
    if attr_types_ovr {
        entry[1] = ste::SHCFG.put(ste::SHCFG_INCOMING);
    }
    entry
}

/// An STE that translates by stage 1 through the single CD at `context`. VMID 0 and StreamWorld NS-EL1 (all zeroes), no ATS.
/// `coherent` is IDR0.COHACC: how the CD is read. S1DSS says nothing where there is one CD; it has the value that it gets with
/// a table of them, so that a stream comes to substreams, and back, by the change of one word.
pub const fn ste_stage1(context: u64, coherent: bool) -> Entry {
    let mut entry = [0; WORDS];
    entry[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_S1) | ste::S1CONTEXTPTR.address(context);
    let (cache, shareable) = attributes(coherent);
    entry[1] = ste::S1CIR.put(cache)
        | ste::S1COR.put(cache)
        | ste::S1CSH.put(shareable)
        | ste::STRW.put(ste::STRW_NSEL1)
        | ste::S1DSS.put(ste::S1DSS_SSID0);
    entry
}

/// An STE that translates by stage 2 alone, with `vmid` and the table at `root`. 64-bit tables (S2AA64), faults recorded (S2R)
/// and aborted.
pub fn ste_stage2(vmid: u16, geometry: &Geometry, root: u64, features: &Features) -> Entry {
    let (cache, shareable) = attributes(features.coherent);
    // S2SL0 counts from the last start level that the granule has without small tables: level 2 for 4K, level 3 else.
    let last = if geometry.granule() == Granule::K4 { 2 } else { 3 };
    let start = u64::from(geometry.start_level()) + u64::from(seeded(Bug::S2StartWrong));
    let mut entry = [0; WORDS];
    entry[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_S2);
    if features.attr_types_ovr {
        entry[1] = ste::SHCFG.put(ste::SHCFG_INCOMING);
    }
    entry[2] = ste::S2VMID.put(u64::from(vmid))
        | ste::S2T0SZ.put(u64::from(geometry.tsz()))
        | ste::S2SL0.put(u64::saturating_sub(last, start).min(2))
        | ste::S2IR0.put(cache)
        | ste::S2OR0.put(cache)
        | ste::S2SH0.put(shareable)
        | ste::S2TG.put(tg0(geometry.granule()))
        | ste::S2PS.put(features.ips(geometry.output_bits()))
        | ste::S2AA64.mask()
        | ste::S2R.mask();
    entry[3] = ste::S2TTB.address(root);
    entry
}

/// The STE of `stage1` with the stage 2 of `stage2` under it: what both have, and Config for both.
pub fn ste_nested(stage1: &Entry, stage2: &Entry) -> Entry {
    let mut entry: Entry = core::array::from_fn(|i| stage1[i] | stage2[i]);
    entry[0] = ste::CONFIG.set(stage1[0], ste::CONFIG_NESTED);
    entry
}

/// The encoding of a granule in CD.TG0 and STE.S2TG.
pub const fn tg0(granule: Granule) -> u64 {
    match granule {
        Granule::K4 => cd::TG0_4K,
        Granule::K16 => cd::TG0_16K,
        Granule::K64 => cd::TG0_64K,
    }
}

/// Cacheability and shareability of the SMMU's own accesses.
pub const fn attributes(coherent: bool) -> (u64, u64) {
    if coherent { (ste::CACHE_WBRA, ste::SH_ISH) } else { (ste::CACHE_NC, ste::SH_OSH) }
}

/// What a CD is made of.
#[derive(Clone, Copy, Debug)]
pub struct CdFields {
    /// Address space identifier.
    pub asid: u16,
    /// Address of the root table.
    pub ttb0: u64,
    /// 64 minus the bits of input address.
    pub t0sz: u8,
    /// Granule: [`cd::TG0_4K`], [`cd::TG0_16K`] or [`cd::TG0_64K`].
    pub tg0: u64,
    /// Encoded output size, at most IDR5.OAS.
    pub ips: u64,
    /// Memory attributes by index.
    pub mair: u64,
    /// How tables are read: IDR0.COHACC.
    pub coherent: bool,
}

/// A CD for TTB0 alone, in 64-bit format. Faults are recorded (R) and aborted (A), never stalled; the ASID is the SMMU's own
/// (ASET), so that the processors' broadcast invalidations need not reach it.
pub const fn cd(fields: &CdFields) -> Entry {
    let (cache, shareable) = attributes(fields.coherent);
    let mut entry = [0; WORDS];
    entry[0] = cd::T0SZ.put(fields.t0sz as u64)
        | cd::TG0.put(fields.tg0)
        | cd::IR0.put(cache)
        | cd::OR0.put(cache)
        | cd::SH0.put(shareable)
        | cd::EPD1.mask()
        | cd::V.mask()
        | cd::IPS.put(fields.ips)
        | cd::AA64.mask()
        | cd::R.mask()
        | cd::A.mask()
        | cd::ASET.mask()
        | cd::ASID.put(fields.asid as u64);
    entry[1] = cd::TTB0.address(fields.ttb0);
    entry[3] = fields.mair;
    entry
}

#[cfg(test)]
impl CdFields {
    pub const TEST: Self =
        Self { asid: 1, ttb0: 0x8000, t0sz: 16, tg0: cd::TG0_4K, ips: 4, mair: 0x04_ff, coherent: true };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_architectures_bits() {
        assert_eq!(ste_abort(), [0x1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ste_bypass(true), [0x9, 1 << 44, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ste_bypass(false), [0x9, 0, 0, 0, 0, 0, 0, 0]);
        // V, Config S1; CD fetches inner shareable, write-back.
        assert_eq!(ste_stage1(0x4_1234_5640, true), [0x4_1234_564b, 0xd6, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn where_the_smmu_does_not_snoop_it_is_told_to_read_past_the_caches() {
        let ste = ste_stage1(0x1000, false);
        assert_eq!((ste::S1CIR.get(ste[1]), ste::S1COR.get(ste[1])), (ste::CACHE_NC, ste::CACHE_NC));
        let words = cd(&CdFields { coherent: false, ..CdFields::TEST });
        assert_eq!((cd::IR0.get(words[0]), cd::OR0.get(words[0])), (ste::CACHE_NC, ste::CACHE_NC));
        assert_eq!((ste::S1CSH.get(ste[1]), cd::SH0.get(words[0])), (ste::SH_OSH, ste::SH_OSH));
    }

    #[test]
    fn a_nested_entry_has_the_words_of_both() {
        let stage1 = ste_stage1(0x1000, true);
        let mut stage2 = [0; WORDS];
        stage2[0] = ste::V.mask() | ste::CONFIG.put(ste::CONFIG_S2);
        stage2[2] = ste::S2VMID.put(5) | ste::S2AA64.mask();
        stage2[3] = ste::S2TTB.address(0x8000);
        let both = ste_nested(&stage1, &stage2);
        assert_eq!(ste::CONFIG.get(both[0]), ste::CONFIG_NESTED);
        assert_eq!(ste::S1CONTEXTPTR.address(both[0]), 0x1000);
        assert_eq!((both[1], both[2], both[3]), (stage1[1], stage2[2], stage2[3]));
    }

    #[test]
    fn a_context_descriptor_has_the_architectures_bits() {
        let words = cd(&CdFields::TEST);
        // ASID 1; ASET, A, R, AA64; IPS 4; V, EPD1; inner shareable write-back walks; T0SZ 16.
        assert_eq!(words, [0x0001_e204_c000_3510, 0x8000, 0, 0x04ff, 0, 0, 0, 0]);
    }
}
