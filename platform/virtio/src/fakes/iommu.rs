//! An IOMMU in software, written from the specification and independent of the driver's side.

use super::{Bus, Chain, Model, Registers};
use crate::spec::iommu::{ATTACH_F_BYPASS, config, feature as bit, map_flag, property, request, size, status};
use crate::spec::{device_type, feature};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

/// Bytes of properties.
const PROBE_SIZE: u32 = 64;

/// A mapping: last address, physical address, flags.
type Mapping = (u64, u64, u32);

#[derive(Default)]
struct Domain {
    bypass: bool,
    mappings: BTreeMap<u64, Mapping>,
}

/// One request, as the device has understood it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Domain, endpoint, flags.
    Attach(u32, u32, u32),
    /// Domain, endpoint.
    Detach(u32, u32),
    /// Domain, first address, last address, physical address, flags.
    Map(u32, u64, u64, u64, u32),
    /// Domain, first address, last address.
    Unmap(u32, u64, u64),
    /// Endpoint.
    Probe(u32),
}

#[derive(Default)]
struct State {
    endpoints: BTreeSet<u32>,
    attached: BTreeMap<u32, u32>,
    domains: BTreeMap<u32, Domain>,
    reserved: Vec<(u8, u64, u64)>,
    /// Statuses that the next requests get without being carried out; `None` is an honest one.
    plan: VecDeque<Option<u8>>,
    log: Vec<Asked>,
    /// What endpoints reached after each request, for those that are watched.
    watched: Vec<(u32, u64)>,
    seen: Vec<Option<u64>>,
}

/// An IOMMU in software. Clones are the same one.
#[derive(Clone, Default)]
pub struct MemoryIommu(Arc<Mutex<State>>);

impl MemoryIommu {
    /// Makes one with these endpoints.
    #[must_use]
    pub fn new(endpoints: &[u32]) -> Self {
        let fake = Self::default();
        fake.state().endpoints.extend(endpoints);
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its registers: every feature, 4 KiB pages, bypassing as machines start.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let mut bytes = std::vec![0; 40];
        bytes[config::PAGE_SIZE_MASK..][..8].copy_from_slice(&(!0xfff_u64).to_le_bytes());
        bytes[config::INPUT_END..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        bytes[config::DOMAIN_END..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        bytes[config::PROBE_SIZE..][..4].copy_from_slice(&PROBE_SIZE.to_le_bytes());
        bytes[config::BYPASS] = 1;
        let own = bit::INPUT_RANGE | bit::DOMAIN_RANGE | bit::MAP_UNMAP | bit::BYPASS | bit::PROBE | bit::MMIO;
        Registers {
            device_type: device_type::IOMMU,
            features: feature::VERSION_1
                | feature::ACCESS_PLATFORM
                | feature::INDIRECT_DESC
                | feature::EVENT_IDX
                | own
                | bit::BYPASS_CONFIG,
            insists_on: feature::ACCESS_PLATFORM,
            queues: std::vec![64, 16],
            config: bytes,
            restless: false,
            changes_once_after: None,
            resets: true,
            vectors: 2,
            read_only: false,
            claims_status: None,
        }
    }

    /// What `endpoint` reaches at `iova`: the physical address and the flags. `None` if it is stopped.
    #[must_use]
    pub fn reach(&self, endpoint: u32, iova: u64) -> Option<(u64, u32)> {
        self.state().reach(endpoint, iova)
    }

    /// Has the next requests fail with these statuses, without being carried out; `None` is carried out.
    pub fn refuse(&self, statuses: &[Option<u8>]) {
        self.state().plan.extend(statuses);
    }

    /// Tells of a reserved region: subtype, first and last address.
    pub fn reserve(&self, subtype: u8, first: u64, last: u64) {
        self.state().reserved.push((subtype, first, last));
    }

    /// The requests so far, which are forgotten.
    #[must_use]
    pub fn log(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().log)
    }

    /// Looks after each request from now on what `endpoint` reaches at `iova`.
    pub fn watch(&self, endpoint: u32, iova: u64) {
        self.state().watched.push((endpoint, iova));
    }

    /// What was seen by watching.
    #[must_use]
    pub fn seen(&self) -> Vec<Option<u64>> {
        std::mem::take(&mut self.state().seen)
    }

    /// The domains that exist.
    #[must_use]
    pub fn domains(&self) -> Vec<u32> {
        self.state().domains.keys().copied().collect()
    }
}

impl State {
    fn reach(&self, endpoint: u32, iova: u64) -> Option<(u64, u32)> {
        let domain = self.domains.get(self.attached.get(&endpoint)?)?;
        if domain.bypass {
            return Some((iova, map_flag::READ | map_flag::WRITE));
        }
        let (first, (last, phys, flags)) = domain.mappings.range(..=iova).next_back()?;
        (iova <= *last).then(|| (phys + (iova - first), *flags))
    }

    fn leave(&mut self, endpoint: u32) {
        if let Some(domain) = self.attached.remove(&endpoint)
            && !self.attached.values().any(|other| *other == domain)
        {
            self.domains.remove(&domain);
        }
    }

    fn carry_out(&mut self, asked: Asked) -> u8 {
        match asked {
            Asked::Attach(domain, endpoint, flags) => {
                let bypass = flags & ATTACH_F_BYPASS != 0;
                if !self.endpoints.contains(&endpoint) {
                    return status::NOENT;
                }
                self.leave(endpoint);
                let known = self.domains.entry(domain).or_insert(Domain { bypass, ..Domain::default() });
                if known.bypass != bypass {
                    return status::INVAL;
                }
                self.attached.insert(endpoint, domain);
            }
            Asked::Detach(domain, endpoint) => {
                if !self.endpoints.contains(&endpoint) {
                    return status::NOENT;
                }
                if self.attached.get(&endpoint) != Some(&domain) {
                    return status::INVAL;
                }
                self.leave(endpoint);
            }
            Asked::Map(domain, first, last, phys, flags) => {
                let Some(domain) = self.domains.get_mut(&domain) else { return status::NOENT };
                if domain.bypass || first > last || (first | (last.wrapping_add(1)) | phys) & 0xfff != 0 {
                    return status::INVAL;
                }
                let overlaps = domain.mappings.range(..=last).next_back().is_some_and(|(_, (end, ..))| *end >= first);
                if overlaps || flags & !7 != 0 {
                    return status::INVAL;
                }
                domain.mappings.insert(first, (last, phys, flags));
            }
            Asked::Unmap(domain, first, last) => {
                let Some(domain) = self.domains.get_mut(&domain) else { return status::NOENT };
                let touched = |start: u64, end: u64| start <= last && end >= first;
                let cut = domain
                    .mappings
                    .iter()
                    .any(|(start, (end, ..))| touched(*start, *end) && (*start < first || *end > last));
                if cut {
                    return status::RANGE;
                }
                domain.mappings.retain(|start, (end, ..)| !touched(*start, *end));
            }
            Asked::Probe(endpoint) if !self.endpoints.contains(&endpoint) => return status::NOENT,
            Asked::Probe(_) => {}
        }
        status::OK
    }
}

/// Understands a request.
fn parse(bytes: &[u8]) -> Option<Asked> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let wide = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    match (*bytes.first()?, bytes.len()) {
        (request::ATTACH, size::ATTACH) => Some(Asked::Attach(word(4)?, word(8)?, word(12)?)),
        (request::DETACH, size::DETACH) => Some(Asked::Detach(word(4)?, word(8)?)),
        (request::MAP, size::MAP) => Some(Asked::Map(word(4)?, wide(8)?, wide(16)?, wide(24)?, word(32)?)),
        (request::UNMAP, size::UNMAP) => Some(Asked::Unmap(word(4)?, wide(8)?, wide(16)?)),
        (request::PROBE, size::PROBE) => Some(Asked::Probe(word(4)?)),
        _ => None,
    }
}

impl Model for MemoryIommu {
    fn execute(&mut self, _queue: u16, chain: &Chain, bus: &dyn Bus) -> u32 {
        let mut state = self.state();
        let asked = chain.read_all(bus).and_then(|bytes| parse(&bytes));
        let code = match (state.plan.pop_front().flatten(), asked) {
            (Some(code), _) => code,
            (None, Some(asked)) => {
                state.log.push(asked);
                state.carry_out(asked)
            }
            (None, None) => status::INVAL,
        };
        for (endpoint, iova) in state.watched.clone() {
            let reached = state.reach(endpoint, iova).map(|(phys, _)| phys);
            state.seen.push(reached);
        }
        let mut answer = Vec::new();
        if let Some(Asked::Probe(_)) = asked {
            for (subtype, first, last) in &state.reserved {
                answer.extend(property::RESV_MEM.to_le_bytes());
                answer.extend((property::RESV_MEM_LEN as u16).to_le_bytes());
                answer.extend([*subtype, 0, 0, 0]);
                answer.extend(first.to_le_bytes());
                answer.extend(last.to_le_bytes());
            }
            answer.resize(PROBE_SIZE as usize, 0);
        }
        answer.extend([code, 0, 0, 0]);
        if chain.write_at(bus, 0, &answer) { answer.len() as u32 } else { 0 }
    }

    fn holds(&self, queue: u16) -> bool {
        queue == crate::spec::iommu::queue::EVENT
    }

    fn reset(&mut self) {
        let mut state = self.state();
        state.attached.clear();
        state.domains.clear();
    }
}
