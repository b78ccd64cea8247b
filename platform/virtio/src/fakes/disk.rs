//! A disk in memory.

use super::{Bus, Chain, Model, Registers};
use crate::spec::blk::{ID_SIZE, SECTOR_SIZE, config, feature as blk, request, status};
use crate::spec::{device_type, feature};
use std::sync::{Arc, Mutex, PoisonError};
use std::vec::Vec;

/// A disk in memory. Clones share the contents.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<Mutex<Contents>>,
}

struct Contents {
    bytes: Vec<u8>,
    /// Requests carried out: type, sector, segments of data.
    log: Vec<(u32, u64, usize)>,
    flushes: u64,
    faults: u64,
    /// The next requests are answered with these status bytes and not carried out.
    answers: Vec<u8>,
}

impl MemoryDisk {
    /// A disk of `sectors` sectors, each filled with bytes that tell it apart.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let bytes = (0..sectors * SECTOR_SIZE).map(Self::pattern).collect();
        let contents = Contents { bytes, log: Vec::new(), flushes: 0, faults: 0, answers: Vec::new() };
        Self { shared: Arc::new(Mutex::new(contents)) }
    }

    /// The byte at `offset` of a new disk.
    #[must_use]
    pub fn pattern(offset: u64) -> u8 {
        (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    /// Registers of an ordinary disk of this size.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let sectors = self.with(|contents| contents.bytes.len() as u64 / SECTOR_SIZE);
        let mut bytes = std::vec![0; 64];
        bytes[config::CAPACITY..][..8].copy_from_slice(&sectors.to_le_bytes());
        bytes[config::SEG_MAX..][..4].copy_from_slice(&254_u32.to_le_bytes());
        bytes[config::BLK_SIZE..][..4].copy_from_slice(&512_u32.to_le_bytes());
        Registers {
            device_type: device_type::BLOCK,
            features: feature::VERSION_1
                | feature::ACCESS_PLATFORM
                | feature::INDIRECT_DESC
                | feature::EVENT_IDX
                | blk::SEG_MAX
                | blk::BLK_SIZE
                | blk::FLUSH,
            insists_on: feature::ACCESS_PLATFORM,
            queues: std::vec![256],
            config: bytes,
            restless: false,
            changes_once_after: None,
            resets: true,
            vectors: 2,
            read_only: false,
            claims_status: None,
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut Contents) -> R) -> R {
        f(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The contents from byte `offset` on.
    #[must_use]
    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.with(|contents| contents.bytes[offset..offset + len].to_vec())
    }

    /// What was carried out: request type, sector, segments of data.
    #[must_use]
    pub fn log(&self) -> Vec<(u32, u64, usize)> {
        self.with(|contents| contents.log.clone())
    }

    /// How often it was flushed.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.with(|contents| contents.flushes)
    }

    /// Accesses that the bus refused.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.with(|contents| contents.faults)
    }

    /// Answers the next requests with these status bytes instead of carrying them out.
    pub fn answer(&self, answers: &[u8]) {
        self.with(|contents| contents.answers.extend(answers));
    }
}

impl Model for MemoryDisk {
    fn execute(&mut self, _queue: u16, chain: &Chain, bus: &dyn Bus) -> u32 {
        self.with(|contents| contents.execute(chain, bus))
    }
}

impl Contents {
    fn execute(&mut self, chain: &Chain, bus: &dyn Bus) -> u32 {
        let room = chain.room();
        assert!(room >= 1, "a request without a status byte");
        let (state, written) = if self.answers.is_empty() {
            match self.carry_out(chain, bus, room - 1) {
                Some((state, written)) => (state, written),
                None => {
                    self.faults += 1;
                    (status::IOERR, 0)
                }
            }
        } else {
            (self.answers.remove(0), 0)
        };
        if !chain.write_at(bus, room - 1, &[state]) {
            self.faults += 1;
        }
        written as u32 + 1
    }

    fn carry_out(&mut self, chain: &Chain, bus: &dyn Bus, room: u64) -> Option<(u8, u64)> {
        let input = chain.read_all(bus)?;
        let kind = u32::from_le_bytes(input.get(..4)?.try_into().ok()?);
        let sector = u64::from_le_bytes(input.get(8..16)?.try_into().ok()?);
        let start = (sector * SECTOR_SIZE) as usize;
        match kind {
            request::IN => {
                self.log.push((kind, sector, chain.writable.len() - 1));
                let Some(data) = self.bytes.get(start..start + room as usize) else { return Some((status::IOERR, 0)) };
                chain.write_at(bus, 0, data).then_some((status::OK, room))
            }
            request::OUT => {
                self.log.push((kind, sector, chain.readable.len() - 1));
                let data = &input[16..];
                let Some(place) = self.bytes.get_mut(start..start + data.len()) else {
                    return Some((status::IOERR, 0));
                };
                place.copy_from_slice(data);
                Some((status::OK, 0))
            }
            request::FLUSH => {
                self.flushes += 1;
                Some((status::OK, 0))
            }
            request::GET_ID => {
                let mut id = [0; ID_SIZE];
                id[..9].copy_from_slice(b"fake-disk");
                chain.write_at(bus, 0, &id).then_some((status::OK, ID_SIZE as u64))
            }
            _ => Some((status::UNSUPP, 0)),
        }
    }
}
