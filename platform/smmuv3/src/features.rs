//! What this SMMU can do, read from its identification registers.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::registers::Registers;
use crate::spec::Field;
use crate::spec::registers::{self as reg, idr0, idr1, idr3, idr5};
use core::fmt;
use iommu::pgtable::Granule;

/// Whether faults can stall a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StallModel {
    /// Stall or terminate, as the CD says.
    Both,
    /// Always terminate.
    Terminate,
    /// Always stall.
    Forced,
}

/// The features of one SMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // It is a list of yes-or-no features.
pub struct Features {
    /// Minor version of the architecture: 1 is SMMUv3.1.
    pub minor: u8,
    /// Stage 1.
    pub stage1: bool,
    /// Stage 2.
    pub stage2: bool,
    /// The SMMU's own accesses snoop the processors' caches.
    pub coherent: bool,
    /// Two-level stream tables.
    pub two_level: bool,
    /// Two-level context descriptor tables.
    pub two_level_cd: bool,
    /// Takes part in broadcast TLB maintenance.
    pub broadcast_tlb: bool,
    /// EL2 stream worlds.
    pub hyp: bool,
    /// Interrupts by message.
    pub msi: bool,
    /// Completion by an event that ends WFE.
    pub sev: bool,
    /// PCIe ATS.
    pub ats: bool,
    /// PCIe PRI.
    pub pri: bool,
    /// Bits of an ASID.
    pub asid_bits: u8,
    /// Bits of a VMID.
    pub vmid_bits: u8,
    /// Whether faults stall.
    pub stall_model: StallModel,
    /// Bits of a StreamID.
    pub stream_id_bits: u8,
    /// Bits of a SubstreamID.
    pub substream_id_bits: u8,
    /// log2 of the largest command queue.
    pub cmdq_log2: u8,
    /// log2 of the largest PRI queue.
    pub priq_log2: u8,
    /// log2 of the largest event queue.
    pub eventq_log2: u8,
    /// Whether accesses are privileged can be overridden.
    pub attr_perms_ovr: bool,
    /// Memory attributes of bypassing streams can be overridden.
    pub attr_types_ovr: bool,
    /// Range invalidation and level hints.
    pub range_invalidation: bool,
    /// Break-before-make level.
    pub bbml: u8,
    /// Bits of an output address.
    pub output_bits: u8,
    /// Bits of an input address that a table can translate.
    pub input_bits: u8,
    /// 4 KiB granule.
    pub granule_4k: bool,
    /// 16 KiB granule.
    pub granule_16k: bool,
    /// 64 KiB granule.
    pub granule_64k: bool,
}

impl Features {
    /// Reads the identification registers.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for what this driver cannot drive: no translation, no VMSAv8-64 tables, big-endian tables,
    /// forced stalls, or tables and queues at addresses fixed by the implementation.
    pub fn read(registers: &impl Registers) -> Result<Self, Error> {
        let [idr0, idr1, idr3, idr5, aidr] =
            [reg::IDR0, reg::IDR1, reg::IDR3, reg::IDR5, reg::AIDR].map(|offset| u64::from(registers.read32(offset)));
        #[allow(clippy::cast_possible_truncation)] // No identification field is wider than 8 bits here.
        let small = |field: Field, word: u64| field.get(word) as u8;
        let features = Self {
            minor: (aidr & 0xf) as u8,
            stage1: idr0::S1P.is_set(idr0),
            stage2: idr0::S2P.is_set(idr0),
            coherent: idr0::COHACC.is_set(idr0),
            two_level: idr0::ST_LEVEL.get(idr0) == 1,
            two_level_cd: idr0::CD2L.is_set(idr0),
            broadcast_tlb: idr0::BTM.is_set(idr0),
            hyp: idr0::HYP.is_set(idr0),
            msi: idr0::MSI.is_set(idr0),
            sev: idr0::SEV.is_set(idr0),
            ats: idr0::ATS.is_set(idr0),
            pri: idr0::PRI.is_set(idr0),
            asid_bits: if idr0::ASID16.is_set(idr0) { 16 } else { 8 },
            vmid_bits: if idr0::VMID16.is_set(idr0) { 16 } else { 8 },
            stall_model: match idr0::STALL_MODEL.get(idr0) {
                0 => StallModel::Both,
                1 => StallModel::Terminate,
                _ => StallModel::Forced,
            },
            stream_id_bits: small(idr1::SIDSIZE, idr1).min(32),
            substream_id_bits: small(idr1::SSIDSIZE, idr1).min(20),
            cmdq_log2: small(idr1::CMDQS, idr1).min(19),
            priq_log2: small(idr1::PRIQS, idr1).min(19),
            eventq_log2: small(idr1::EVENTQS, idr1).min(19),
            attr_perms_ovr: idr1::ATTR_PERMS_OVR.is_set(idr1),
            attr_types_ovr: idr1::ATTR_TYPES_OVR.is_set(idr1),
            range_invalidation: idr3::RIL.is_set(idr3),
            bbml: small(idr3::BBML, idr3),
            // A reserved encoding is a larger size than this driver knows of; what fits in 48 bits works there too.
            output_bits: reg::OAS_BITS.get(usize::from(small(idr5::OAS, idr5))).copied().unwrap_or(48).min(48),
            input_bits: 48,
            granule_4k: idr5::GRAN4K.is_set(idr5),
            granule_16k: idr5::GRAN16K.is_set(idr5),
            granule_64k: idr5::GRAN64K.is_set(idr5),
        };
        features.check(idr0, idr1)?;
        Ok(features)
    }

    fn check(&self, idr0: u64, idr1: u64) -> Result<(), Error> {
        let unsupported = |condition: bool, what| if condition { Err(Error::Unsupported(what)) } else { Ok(()) };
        unsupported(!self.stage1 && !self.stage2, "an SMMU without translation")?;
        unsupported(idr0::TTF.get(idr0) & 0b10 == 0, "an SMMU without VMSAv8-64 tables")?;
        unsupported(idr0::TTENDIAN.get(idr0) == 3, "big-endian translation tables")?;
        unsupported(self.stall_model == StallModel::Forced, "an SMMU that stalls every fault")?;
        unsupported(idr1::QUEUES_PRESET.is_set(idr1), "queues at preset addresses")?;
        unsupported(idr1::TABLES_PRESET.is_set(idr1), "a stream table at a preset address")?;
        unsupported(!self.granule_4k && !self.granule_16k && !self.granule_64k, "an SMMU without a granule")
    }

    /// Whether tables of that granule can be walked.
    pub const fn has_granule(&self, granule: Granule) -> bool {
        match granule {
            Granule::K4 => self.granule_4k,
            Granule::K16 => self.granule_16k,
            Granule::K64 => self.granule_64k,
        }
    }

    /// The encoding of `bits` of output address for CD.IPS, never beyond what the SMMU puts out: larger encodings are
    /// reserved, and a processor's PARange may well be larger than the SMMU's.
    pub fn ips(&self, bits: u8) -> u64 {
        let bits = if seeded(Bug::IpsUnclamped) { 48 } else { bits.min(self.output_bits) };
        let fitting = reg::OAS_BITS.iter().take_while(|&&size| size <= bits).count();
        u64::try_from(fitting.saturating_sub(1)).unwrap_or(0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages = match (self.stage1, self.stage2) {
            (true, true) => "stages 1 and 2",
            (true, false) => "stage 1",
            _ => "stage 2",
        };
        write!(f, "SMMUv3.{}, {stages}, {} bits out, granules", self.minor, self.output_bits)?;
        for (present, name) in [(self.granule_4k, " 4K"), (self.granule_16k, " 16K"), (self.granule_64k, " 64K")] {
            if present {
                f.write_str(name)?;
            }
        }
        let table = if self.two_level { "two-level" } else { "linear" };
        write!(f, ", {}-bit StreamIDs ({table}), {}-bit ASIDs", self.stream_id_bits, self.asid_bits)?;
        for (present, name) in [
            (self.coherent, ", coherent"),
            (self.range_invalidation, ", range invalidation"),
            (self.broadcast_tlb, ", broadcast TLB maintenance"),
            (self.hyp, ", EL2"),
            (self.msi, ", MSI"),
            (self.sev, ", SEV"),
            (self.ats, ", ATS"),
            (self.pri, ", PRI"),
        ] {
            if present {
                f.write_str(name)?;
            }
        }
        Ok(())
    }
}
