//! What the device says that it can do, checked.

use crate::Error;
use crate::spec::iommu::{config, feature};
use crate::transport::{self, Transport};
use ::iommu::contract::Aperture;
use ::iommu::{Iova, IovaRange, MapError, PAGE_SIZE, PhysAddr, PhysRange, Prot};
use base::Deadline;

/// Input addresses that are used, in bits, of those that the device offers.
const INPUT_BITS: u32 = 48;
/// Physical addresses, in bits: all that the architecture knows.
const OUTPUT_BITS: u32 = 52;
/// The largest leaf that is of interest: larger ones would only waste addresses for alignment.
const LARGEST_PAGE: u64 = 1 << 30;
/// The most bytes of properties that a device may want to tell of an endpoint.
const MAX_PROBE: u32 = 4096;

/// The device's abilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// What its address spaces translate.
    pub aperture: Aperture,
    /// First and last domain identifier.
    pub domains: (u32, u32),
    /// Bytes of properties, where the device can be probed.
    pub probe: Option<usize>,
    /// Whether it knows registers from memory.
    pub mmio: bool,
    /// Whether bypassing is configured, by domain and as a whole.
    pub bypass_config: bool,
}

impl Limits {
    /// Reads the configuration.
    pub fn read(transport: &dyn Transport, features: u64, deadline: Deadline) -> Result<Self, Error> {
        if features & feature::MAP_UNMAP == 0 {
            return Err(Error::MissingFeature("VIRTIO_IOMMU_F_MAP_UNMAP"));
        }
        let has = |bit| features & bit != 0;
        transport::read_config(transport, deadline, |field| {
            let wide = |at| -> Result<u64, Error> { Ok(u64::from(field(at)?) | u64::from(field(at + 4)?) << 32) };
            let mask = wide(config::PAGE_SIZE_MASK)?;
            let (mut start, mut last) = (0, u64::MAX);
            if has(feature::INPUT_RANGE) {
                (start, last) = (wide(config::INPUT_START)?, wide(config::INPUT_END)?);
            }
            let mut domains = (0, u32::MAX);
            if has(feature::DOMAIN_RANGE) {
                domains = (field(config::DOMAIN_START)?, field(config::DOMAIN_END)?);
            }
            if domains.0 > domains.1 {
                return Err(Error::BadConfig { field: "domain_range.end", value: domains.1.into() });
            }
            let probe = if has(feature::PROBE) { Some(field(config::PROBE_SIZE)?) } else { None };
            if let Some(size) = probe.filter(|size| *size > MAX_PROBE) {
                return Err(Error::BadConfig { field: "probe_size", value: size.into() });
            }
            Ok(Self {
                aperture: aperture(mask, start, last)?,
                domains,
                probe: probe.map(|size| size as usize),
                mmio: has(feature::MMIO),
                bypass_config: has(feature::BYPASS_CONFIG),
            })
        })
    }

    /// Checks what is to be mapped.
    pub fn check(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        // The protocol has no word for privileged transactions.
        if !prot.intersects(Prot::READ | Prot::WRITE) || prot.contains(Prot::PRIVILEGED) {
            return Err(MapError::BadProt);
        }
        if !self.aperture.range.covers(iova) {
            return Err(MapError::OutOfAperture(iova));
        }
        let page = self.aperture.page_size();
        if !iova.is_aligned(page) || runs.iter().any(|run| !run.is_aligned(page)) {
            return Err(MapError::Misaligned(page));
        }
        let beyond = |run: &&PhysRange| !run.is_empty() && run.end().get() - 1 > self.aperture.output_max.get();
        if let Some(run) = runs.iter().find(beyond) {
            return Err(MapError::OutputTooLarge(run.end().get()));
        }
        let physical = runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.len()));
        if physical != iova.len() {
            return Err(MapError::LengthMismatch { iova: iova.len(), physical });
        }
        Ok(())
    }
}

/// What can be mapped: from `start` to `last`, in pages as `mask` says.
fn aperture(mask: u64, start: u64, last: u64) -> Result<Aperture, Error> {
    if mask == 0 {
        return Err(Error::BadConfig { field: "page_size_mask", value: mask });
    }
    let page = (mask & mask.wrapping_neg()).max(PAGE_SIZE);
    if page > LARGEST_PAGE {
        return Err(Error::BadConfig { field: "page_size_mask", value: mask });
    }
    let empty = Error::BadConfig { field: "input_range.end", value: last };
    // The last page of the 64-bit space is never used: its end could not be written down.
    let end = last.checked_add(1).unwrap_or(last).min(1 << INPUT_BITS);
    let start = Iova::new(start).align_up(page);
    let range = start.and_then(|start| IovaRange::between(start, Iova::new(end).align_down(page)));
    let range = range.filter(|range| !range.is_empty()).ok_or(empty)?;
    let page_sizes = page | mask & !(page - 1) & (2 * LARGEST_PAGE - 1);
    Ok(Aperture { range, page_sizes, output_max: PhysAddr::new((1 << OUTPUT_BITS) - 1) })
}
