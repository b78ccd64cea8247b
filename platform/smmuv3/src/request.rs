//! What an address space can be asked to be, and whether the SMMU has that.

use crate::Error;
use crate::features::Features;
use crate::start::Config;
use alloc::sync::Arc;
use core::fmt;
use iommu::contract::AddressSpace;
use iommu::pgtable::{Geometry, Granule, Stage};

/// Which translations stand between a stream and memory.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Translation {
    /// Stage 1 where there is one, else stage 2.
    #[default]
    Any,
    /// Stage 1 alone, which substreams need.
    Stage1,
    /// Stage 2 alone, with a VMID of its own. It can be the parent of nested ones.
    Stage2,
    /// Stage 1 on top of the stage 2 that is named, which [`Translation::Stage2`] made on the same SMMU.
    ///
    /// What is then mapped are *intermediate* addresses: a device reaches what both stages allow, in the memory that the parent
    /// has behind them. The walker reads the tables and the context descriptor through the parent too, so the parent must map
    /// the memory that tables come from to itself, readable. Where it does not, devices reach nothing (and the events say that
    /// stage 2 stopped a table walk): creation fails for what is needed from the start, and later faults are contained as any.
    Nested(Arc<dyn AddressSpace>),
}

impl fmt::Debug for Translation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any stage"),
            Self::Stage1 => f.write_str("stage 1"),
            Self::Stage2 => f.write_str("stage 2"),
            Self::Nested(parent) => {
                f.write_str("stage 1 over (")?;
                parent.describe(f)?;
                f.write_str(")")
            }
        }
    }
}

/// What an address space shall be. The default leaves everything to the SMMU's configuration.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Which translations.
    pub translation: Translation,
    /// The translation granule.
    pub granule: Option<Granule>,
    /// Bits of device address. Stage 2 has at most as many as the SMMU puts out.
    pub input_bits: Option<u8>,
    /// Whatever its streams access is taken for privileged (STE.PRIVCFG): what is mapped with
    /// [`Prot::PRIVILEGED`](iommu::Prot::PRIVILEGED) is there for them too, although accesses of PCIe are not privileged. For
    /// tables that a processor walks too, in which something is for the device and not for EL0. Stage 1 only, and not for a
    /// stream with ATS.
    pub privileged: bool,
}

impl Request {
    /// Whether the override that is asked for can be had.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`].
    pub(crate) fn check_override(&self, features: &Features, stage: Stage) -> Result<(), Error> {
        if self.privileged && (!features.attr_perms_ovr || stage != Stage::One) {
            return Err(Error::Unsupported("an override of what is privileged"));
        }
        Ok(())
    }

    /// The stage whose tables the address space consists of.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the SMMU lacks what is asked for.
    pub(crate) fn stage(&self, features: &Features) -> Result<Stage, Error> {
        match self.translation {
            Translation::Any if features.stage1 => Ok(Stage::One),
            Translation::Any => Ok(Stage::Two),
            Translation::Stage1 if features.stage1 => Ok(Stage::One),
            Translation::Stage1 => Err(Error::Unsupported("stage 1")),
            Translation::Stage2 if features.stage2 => Ok(Stage::Two),
            Translation::Stage2 => Err(Error::Unsupported("stage 2")),
            Translation::Nested(_) if features.stage1 && features.stage2 => Ok(Stage::One),
            Translation::Nested(_) => Err(Error::Unsupported("nested translation")),
        }
    }

    /// The shape of the tables: what all of the SMMUs (their features with their configurations) can walk. `output_bits` limits
    /// what is put out.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`].
    pub(crate) fn geometry<'a>(
        &self,
        smmus: impl Iterator<Item = (&'a Features, &'a Config)> + Clone,
        stage: Stage,
        output_bits: Option<u8>,
    ) -> Result<Geometry, Error> {
        let least = |bits: fn((&'a Features, &'a Config)) -> u8| smmus.clone().map(bits).min().unwrap_or(48);
        let output = least(|(features, _)| features.output_bits).min(output_bits.unwrap_or(48));
        let input = least(|(features, _)| features.input_bits);
        let input = if stage == Stage::Two { input.min(output) } else { input };
        let input = match self.input_bits {
            Some(bits) if bits > input => return Err(Error::Unsupported("so many bits of device address")),
            Some(bits) => bits,
            None => input.min(least(|(_, config)| config.input_bits)),
        };
        let everybody = |granule: &Granule| smmus.clone().all(|(features, _)| features.has_granule(*granule));
        let granule = match self.granule {
            Some(granule) => Some(granule).filter(everybody),
            None => {
                let configured = smmus.clone().find_map(|(_, config)| config.granule).filter(everybody);
                configured.or_else(|| [Granule::K4, Granule::K16, Granule::K64].into_iter().find(everybody))
            }
        };
        let granule = granule.ok_or(Error::Unsupported("a granule of this size"))?;
        Geometry::new(granule, stage, input, output).map_err(|_| Error::Unsupported("translation tables of this size"))
    }
}
