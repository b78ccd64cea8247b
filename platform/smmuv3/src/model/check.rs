//! What an STE and a CD may not contain (IHI 0070, 5.2.2 and 5.4.1).
//!
//! Stricter than most hardware: bits that the architecture reserves must be zero, because some later SMMU will look at them.

use super::Traits;
use super::cache::TlbEntry;
use super::walk::Regime;
use crate::entry::Entry;
use crate::spec::registers::{OAS_BITS, idr0, idr1, idr5};
use crate::spec::{Field, cd, ste};

/// The defined bits of the words of an STE.
const STE: [u64; 4] = [
    ste::V.mask() | ste::CONFIG.mask() | ste::S1FMT.mask() | ste::S1CONTEXTPTR.mask() | ste::S1CDMAX.mask(),
    ste::S1DSS.mask()
        | ste::S1CIR.mask()
        | ste::S1COR.mask()
        | ste::S1CSH.mask()
        | ste::MEV.mask()
        | ste::S2FWB.mask()
        | ste::S1STALLD.mask()
        | ste::EATS.mask()
        | ste::STRW.mask()
        | ste::MEMATTR.mask()
        | ste::MTCFG.mask()
        | ste::ALLOCCFG.mask()
        | ste::SHCFG.mask()
        | ste::NSCFG.mask()
        | ste::PRIVCFG.mask()
        | ste::INSTCFG.mask(),
    ste::S2VMID.mask()
        | ste::S2T0SZ.mask()
        | ste::S2SL0.mask()
        | ste::S2IR0.mask()
        | ste::S2OR0.mask()
        | ste::S2SH0.mask()
        | ste::S2TG.mask()
        | ste::S2PS.mask()
        | ste::S2AA64.mask()
        | ste::S2ENDI.mask()
        | ste::S2AFFD.mask()
        | ste::S2PTW.mask()
        | ste::S2S.mask()
        | ste::S2R.mask(),
    ste::S2TTB.mask(),
];

/// Says what is wrong with a valid STE, if anything is.
pub fn ste(entry: &Entry, traits: &Traits) -> Result<(), &'static str> {
    let config = ste::CONFIG.get(entry[0]);
    must(config == ste::CONFIG_ABORT || config & 0b100 != 0, "STE.Config is reserved")?;
    must(entry[4..] == [0; 4], "STE words 4 to 7 are not zero")?;
    must(entry.iter().zip(STE).all(|(word, defined)| word & !defined == 0), "STE has reserved bits set")?;
    if config & 0b100 == 0 {
        return Ok(());
    }
    let oas = output_bits(traits);
    let overrides = idr1::ATTR_PERMS_OVR.is_set(u64::from(traits.idr1));
    must(ste::PRIVCFG.get(entry[1]) == 0 || overrides, "STE.PRIVCFG where nothing is overridden")?;
    must(ste::EATS.get(entry[1]) == 0 || has(traits, idr0::ATS), "STE.EATS without ATS")?;
    if config & 0b001 != 0 {
        must(has(traits, idr0::S1P), "STE.Config asks for a stage 1 that is not there")?;
        must(ste::S1CONTEXTPTR.address(entry[0]) >> oas == 0, "STE.S1ContextPtr is beyond the output size")?;
        must(
            ste::S1CDMAX.get(entry[0]) <= idr1::SSIDSIZE.get(u64::from(traits.idr1)),
            "STE.S1CDMax is larger than the SubstreamIDs",
        )?;
        let substreams = ste::S1CDMAX.get(entry[0]) != 0;
        let format = ste::S1FMT.get(entry[0]);
        must(!substreams || format != 3, "STE.S1Fmt is reserved")?;
        must(
            !substreams || format == 0 || has(traits, idr0::CD2L),
            "STE.S1Fmt asks for two levels that are not there",
        )?;
        must(!substreams || ste::S1DSS.get(entry[1]) != 3, "STE.S1DSS is reserved")?;
        let bits = ste::S1CDMAX.get(entry[0]);
        let bytes = match format {
            _ if bits == 0 => 64,
            0 => 64 << bits,
            1 => (8 << bits.saturating_sub(6)).max(64),
            _ => (8 << bits.saturating_sub(10)).max(64),
        };
        let pointer = ste::S1CONTEXTPTR.address(entry[0]);
        must(pointer.is_multiple_of(bytes), "STE.S1ContextPtr is not aligned to the table's size")?;
        let stalls = idr0::STALL_MODEL.get(u64::from(traits.idr0)) == 0;
        must(!ste::S1STALLD.is_set(entry[1]) || stalls, "STE.S1STALLD where nothing stalls")?;
        must(ste::STRW.get(entry[1]) == ste::STRW_NSEL1, "STE.STRW is not NS-EL1")?;
    }
    if config & 0b010 != 0 {
        must(has(traits, idr0::S2P), "STE.Config asks for a stage 2 that is not there")?;
        must(ste::S2AA64.is_set(entry[2]), "STE.S2AA64 is clear")?;
        must(!ste::S2ENDI.is_set(entry[2]), "STE.S2ENDI is set")?;
        let input = 64 - ste::S2T0SZ.get(entry[2]);
        let output = OAS_BITS.get(ste::S2PS.get(entry[2]) as usize).copied().map(u64::from);
        must(output.is_some_and(|bits| bits <= oas && input <= bits), "STE.S2PS or S2T0SZ is too large")?;
        must((25..=48).contains(&input), "STE.S2T0SZ is out of range")?;
        must(granule_there(ste::S2TG.get(entry[2]), traits), "STE.S2TG is not supported")?;
        must(ste::S2SL0.get(entry[2]) != 3, "STE.S2SL0 is reserved")?;
        must(!ste::S2S.is_set(entry[2]), "STE.S2S is set")?;
        must(ste::S2TTB.address(entry[3]) >> oas == 0, "STE.S2TTB is beyond the output size")?;
        let regime = Regime::stage2(entry, oas as u32);
        must(regime.root.is_multiple_of(regime.root_bytes()), "STE.S2TTB is not aligned to the table's size")?;
        must(start_fits(&regime), "STE.S2SL0 does not fit S2T0SZ")?;
        let wide = has(traits, idr0::VMID16);
        must(wide || ste::S2VMID.get(entry[2]) < 256, "STE.S2VMID is too wide")?;
    }
    Ok(())
}

/// Whether a stage 2 of so many bits may start at its level: the first lookup resolves something, and at most 16 tables' worth.
fn start_fits(regime: &Regime) -> bool {
    let resolved = (regime.granule - 3) * u32::from(3 - regime.start) + regime.granule;
    regime.input > resolved && regime.input <= resolved + regime.granule - 3 + 4
}

/// Says what is wrong with a valid CD, if anything is. `intermediate` is the input size of the stage 2 behind it.
pub fn cd(entry: &Entry, traits: &Traits, intermediate: Option<u32>) -> Result<(), &'static str> {
    let word = entry[0];
    let oas = output_bits(traits);
    let space = intermediate.map_or(oas, u64::from);
    must(entry[4..] == [0; 4], "CD words 4 to 7 are not zero")?;
    must(cd::AA64.is_set(word), "CD.AA64 is clear")?;
    must(cd::A.is_set(word) || !has(traits, idr0::TERM_MODEL), "CD.A is clear")?;
    must(!cd::S.is_set(word), "CD.S is set")?;
    must(!cd::ENDI.is_set(word), "CD.ENDI is set")?;
    must(!cd::HA.is_set(word) && !cd::HD.is_set(word), "CD.HA or CD.HD without HTTU")?;
    must(cd::EPD1.is_set(word), "CD.EPD1 is clear")?;
    let output = OAS_BITS.get(cd::IPS.get(word) as usize).copied().map(u64::from);
    must(output.is_some_and(|bits| bits <= oas), "CD.IPS is larger than the output size")?;
    must(has(traits, idr0::ASID16) || cd::ASID.get(word) < 256, "CD.ASID is too wide")?;
    if !cd::EPD0.is_set(word) {
        must((16..=39).contains(&cd::T0SZ.get(word)), "CD.T0SZ is out of range")?;
        must(granule_there(cd::TG0.get(word), traits), "CD.TG0 is not supported")?;
        must(cd::TTB0.address(entry[1]) >> space == 0, "CD.TTB0 is beyond the output size")?;
        must(entry[1] & !cd::TTB0.mask() == 0, "CD word 1 has more than a table address")?;
        let regime = Regime::stage1(entry, 0, oas as u32);
        must(regime.root.is_multiple_of(regime.root_bytes()), "CD.TTB0 is not aligned to the table's size")?;
    }
    Ok(())
}

/// Whether the memory type of a translation is one that exists.
pub fn memory_type(entry: &TlbEntry) -> bool {
    let attributes = entry.attributes;
    let (outer, inner) = (attributes >> 4, attributes & 0xf);
    if entry.tag.asid.is_none() {
        // MemAttr of stage 2 (without FWB): Device, or Normal with both halves.
        return outer == 0 && (inner >> 2 == 0 || inner & 0b11 != 0);
    }
    if outer == 0 { inner & 0b11 == 0 } else { inner != 0 }
}

fn must(condition: bool, what: &'static str) -> Result<(), &'static str> {
    if condition { Ok(()) } else { Err(what) }
}

fn has(traits: &Traits, feature: Field) -> bool {
    feature.is_set(u64::from(traits.idr0))
}

/// Bits of output address.
pub fn output_bits(traits: &Traits) -> u64 {
    let encoded = idr5::OAS.get(u64::from(traits.idr5)) as usize;
    OAS_BITS.get(encoded).copied().map_or(48, u64::from)
}

fn granule_there(encoded: u64, traits: &Traits) -> bool {
    let feature = match encoded {
        cd::TG0_4K => idr5::GRAN4K,
        cd::TG0_64K => idr5::GRAN64K,
        cd::TG0_16K => idr5::GRAN16K,
        _ => return false,
    };
    feature.is_set(u64::from(traits.idr5))
}
