//! What the records say of a DMA address: the part of a fault report that names buffer, owner and time (rule R6).

use crate::record::{EndedMapping, LiveMapping, Records};
use crate::site::Site;
use crate::tracker::At;
use base::time::Duration;
use core::fmt;
use iommu::group::AttachmentState;
use iommu::{Iova, IovaRange, PhysAddr, Prot};

/// What is known of a DMA address of one device. Its `Display` is one line for a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation<'a> {
    /// The device's name.
    pub device: &'a str,
    /// The address in question.
    pub address: Iova,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a DMA address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// It is lent at this moment.
    Live {
        /// The loan that has it.
        range: IovaRange,
        /// What the device may do there.
        prot: Prot,
        /// Where the loan was made.
        mapped_at: Option<Site>,
    },
    /// It is mapped, but not by a loan that the records had a place for: a fixed mapping such as an MSI doorbell, or one of
    /// very many loans.
    Mapped {
        /// What it translates to.
        to: PhysAddr,
        /// What the device may do there.
        prot: Prot,
    },
    /// It was lent, and revoked.
    Ended {
        /// The loan that had it.
        range: IovaRange,
        /// Where the loan was made.
        mapped_at: Option<Site>,
        /// Where it was ended.
        unmapped_at: Option<Site>,
        /// How long ago.
        ago: Duration,
    },
    /// The device is not in the address space of the DMA-API at this moment: what is lent there does not matter.
    Elsewhere {
        /// Where its group is instead.
        state: AttachmentState,
    },
    /// Nothing translates for the device: the address is one of its bus, and its loans are counted only.
    Untranslated,
    /// Neither.
    Unknown {
        /// The closest loan that ends at or before the address, and the bytes from its end to the address.
        below: Option<(IovaRange, u64)>,
        /// The closest loan that begins after the address, and the bytes from the address to its start.
        above: Option<(IovaRange, u64)>,
        /// Whether loans have ended that the records no longer show, so that this may have been one of them.
        forgotten: bool,
    },
}

impl<'a> Explanation<'a> {
    pub(crate) fn new(
        device: &'a str,
        records: &Records,
        translation: Option<(PhysAddr, Prot)>,
        elsewhere: Option<AttachmentState>,
        address: Iova,
    ) -> Self {
        Self { device, address, fate: Fate::of(records, translation, elsewhere, address) }
    }
}

impl Fate {
    fn of(
        records: &Records,
        translation: Option<(PhysAddr, Prot)>,
        elsewhere: Option<AttachmentState>,
        address: Iova,
    ) -> Self {
        if let Some(state) = elsewhere {
            return Self::Elsewhere { state };
        }
        if records.only_counts() {
            return Self::Untranslated;
        }
        let (mut live, mut below, mut above) = (None, None, None);
        records.for_each_live(|LiveMapping { range, prot, site, .. }| {
            if range.contains(address) {
                live = Some(Self::Live { range, prot, mapped_at: site });
            } else if let Some(gap) = address.offset_from(range.end()) {
                nearer(&mut below, range, gap);
            } else if let Some(gap) = range.start().offset_from(address) {
                nearer(&mut above, range, gap);
            }
        });
        if let Some(live) = live {
            return live;
        }
        if let Some((to, prot)) = translation {
            return Self::Mapped { to, prot };
        }
        if let Some(EndedMapping { range, mapped_at, unmapped_at, when }) = records.last_ended(address) {
            return Self::Ended { range, mapped_at, unmapped_at, ago: when.elapsed() };
        }
        Self::Unknown { below, above, forgotten: records.has_forgotten() }
    }
}

fn nearer(nearest: &mut Option<(IovaRange, u64)>, range: IovaRange, gap: u64) {
    if nearest.is_none_or(|(_, old)| gap < old) {
        *nearest = Some((range, gap));
    }
}

fn rights(prot: Prot) -> &'static str {
    match (prot.contains(Prot::READ), prot.contains(Prot::WRITE)) {
        (true, true) => "to read and write",
        (true, false) => "to read only",
        (false, _) => "to write only",
    }
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, address) = (self.device, self.address);
        match self.fate {
            Fate::Live { range, prot, mapped_at } => {
                let offset = address.offset_from(range.start()).unwrap_or(0);
                let rights = rights(prot);
                write!(f, "{address} is byte {offset:#x} of {range}, lent to {device} {rights} at {}", At(mapped_at))
            }
            Fate::Mapped { to, prot } => {
                write!(f, "{address} is mapped for {device} {} to {to}, by no recorded loan", rights(prot))
            }
            Fate::Ended { range, mapped_at, unmapped_at, ago } => {
                write!(f, "{address} was unmapped {} us ago by {device} at {}", ago.as_micros(), At(unmapped_at))?;
                write!(f, " ({range}, lent at {})", At(mapped_at))
            }
            Fate::Elsewhere { state } => {
                write!(f, "{address} is not the DMA-API's: {device} is {state}")
            }
            Fate::Untranslated => write!(f, "{address} is on the bus of {device}, which nothing translates for"),
            Fate::Unknown { below, above, forgotten } => {
                let history = if forgotten { "is not mapped, nor was it lately" } else { "was never mapped" };
                write!(f, "{address} {history} for {device}")?;
                match (below, above) {
                    (Some((range, gap)), above) if above.is_none_or(|(_, other)| gap <= other) => {
                        write!(f, "; the nearest mapping, {range}, ends {gap:#x} below")
                    }
                    (_, Some((range, gap))) => write!(f, "; the nearest mapping, {range}, begins {gap:#x} above"),
                    (_, None) => f.write_str("; nothing is"),
                }
            }
        }
    }
}
