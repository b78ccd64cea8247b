//! A GPU in memory, which does what a real one does with a backing: it takes note of where it lies when it is attached, and of
//! nothing else until it is detached.

use super::{Bus, Chain, Model, Registers};
use crate::spec::gpu::{
    BYTES_PER_PIXEL, CTRL_HDR_SIZE, EDID_MAX, FLAG_FENCE, MAX_SCANOUTS, MEM_ENTRY_SIZE, command, config,
    feature as gpu, response,
};
use crate::spec::{device_type, feature};
use iommu::Iova;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::vec::Vec;

/// A GPU in memory. Clones share it.
#[derive(Clone)]
pub struct MemoryDisplay {
    shared: Arc<Mutex<State>>,
}

/// A lie about one answer.
type Distortion = fn(&mut Vec<u8>);

struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
    backing: Option<Vec<(Iova, u32)>>,
}

struct State {
    size: (u32, u32),
    edid: Vec<u8>,
    pictures: BTreeMap<u32, Picture>,
    scanouts: [u32; MAX_SCANOUTS],
    /// What is on each screen.
    screens: BTreeMap<usize, Vec<u8>>,
    faults: u64,
    log: Vec<u32>,
    refuse: BTreeMap<u32, u32>,
    distort: BTreeMap<u32, Distortion>,
}

impl MemoryDisplay {
    /// A GPU with one display of this size.
    #[must_use]
    pub fn new(width: u32, height: u32) -> Self {
        let state = State {
            size: (width, height),
            edid: edid(width, height),
            pictures: BTreeMap::new(),
            scanouts: [0; MAX_SCANOUTS],
            screens: BTreeMap::new(),
            faults: 0,
            log: Vec::new(),
            refuse: BTreeMap::new(),
            distort: BTreeMap::new(),
        };
        Self { shared: Arc::new(Mutex::new(state)) }
    }

    /// Registers of an ordinary GPU.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let mut bytes = std::vec![0; 16];
        bytes[config::NUM_SCANOUTS] = 1;
        Registers {
            device_type: device_type::GPU,
            features: feature::VERSION_1
                | feature::ACCESS_PLATFORM
                | feature::INDIRECT_DESC
                | feature::EVENT_IDX
                | gpu::EDID,
            insists_on: feature::ACCESS_PLATFORM,
            queues: std::vec![64, 16],
            config: bytes,
            restless: false,
            changes_once_after: None,
            resets: true,
            vectors: 3,
            read_only: false,
            claims_status: None,
        }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.shared.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is on the screen of `scanout`.
    #[must_use]
    pub fn screen(&self, scanout: usize) -> Option<Vec<u8>> {
        self.with(|state| state.screens.get(&scanout).cloned())
    }

    /// The resource that a scanout shows; 0 for none.
    #[must_use]
    pub fn shown(&self, scanout: usize) -> u32 {
        self.with(|state| state.scanouts[scanout])
    }

    /// How many resources there are, and how many have a backing.
    #[must_use]
    pub fn resources(&self) -> (usize, usize) {
        self.with(|state| {
            let attached = state.pictures.values().filter(|picture| picture.backing.is_some()).count();
            (state.pictures.len(), attached)
        })
    }

    /// Accesses that the bus refused.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.with(|state| state.faults)
    }

    /// The commands that it was given.
    #[must_use]
    pub fn log(&self) -> Vec<u32> {
        self.with(|state| state.log.clone())
    }

    /// Entries of the backing of resource `id`.
    #[must_use]
    pub fn backing(&self, id: u32) -> Option<Vec<(Iova, u32)>> {
        self.with(|state| state.pictures.get(&id)?.backing.clone())
    }

    /// Refuses every command of this type with `code`, or does so no more.
    pub fn refuse(&self, command: u32, code: Option<u32>) {
        self.with(|state| match code {
            Some(code) => state.refuse.insert(command, code),
            None => state.refuse.remove(&command),
        });
    }

    /// Distorts the answer to every command of this type.
    pub fn distort(&self, command: u32, how: Distortion) {
        self.with(|state| state.distort.insert(command, how));
    }
}

impl Model for MemoryDisplay {
    fn execute(&mut self, _queue: u16, chain: &Chain, bus: &dyn Bus) -> u32 {
        self.with(|state| state.execute(chain, bus))
    }

    fn reset(&mut self) {
        self.with(|state| {
            state.pictures.clear();
            state.scanouts = [0; MAX_SCANOUTS];
        });
    }
}

impl State {
    fn execute(&mut self, chain: &Chain, bus: &dyn Bus) -> u32 {
        let Some(input) = chain.read_all(bus) else {
            self.faults += 1;
            return 0;
        };
        let kind = word(&input, 0);
        self.log.push(kind);
        let (code, data) = match self.refuse.get(&kind) {
            Some(code) => (*code, Vec::new()),
            None => self.carry_out(kind, &input, bus),
        };
        let mut answer = Vec::from(code.to_le_bytes());
        answer.resize(CTRL_HDR_SIZE, 0);
        if word(&input, 4) & FLAG_FENCE != 0 {
            answer[4..16].copy_from_slice(&input[4..16]);
        }
        answer.extend(data);
        if let Some(distort) = self.distort.get(&kind) {
            distort(&mut answer);
        }
        answer.truncate(chain.room() as usize);
        if !chain.write_at(bus, 0, &answer) {
            self.faults += 1;
        }
        answer.len() as u32
    }

    fn carry_out(&mut self, kind: u32, input: &[u8], bus: &dyn Bus) -> (u32, Vec<u8>) {
        let at = |index: usize| word(input, CTRL_HDR_SIZE + 4 * index);
        let refuse = |code| (code, Vec::new());
        match kind {
            command::GET_DISPLAY_INFO => {
                let mut data = Vec::new();
                for value in [0, 0, self.size.0, self.size.1, 1, 0] {
                    data.extend(u32::to_le_bytes(value));
                }
                data.resize(24 * MAX_SCANOUTS, 0);
                return (response::OK_DISPLAY_INFO, data);
            }
            command::GET_EDID => {
                let mut data = Vec::from((self.edid.len() as u32).to_le_bytes());
                data.extend([0; 4]);
                data.extend(&self.edid);
                data.resize(8 + EDID_MAX, 0);
                return (response::OK_EDID, data);
            }
            command::RESOURCE_CREATE_2D => {
                let (id, width, height) = (at(0), at(2), at(3));
                if id == 0 || self.pictures.contains_key(&id) {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                }
                let pixels = std::vec![0; (width * height * BYTES_PER_PIXEL) as usize];
                self.pictures.insert(id, Picture { width, height, pixels, backing: None });
            }
            command::RESOURCE_UNREF => {
                if self.pictures.remove(&at(0)).is_none() {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                }
            }
            command::RESOURCE_ATTACH_BACKING => {
                let count = at(1) as usize;
                let Some(list) = input.get(CTRL_HDR_SIZE + 8..).filter(|list| list.len() == count * MEM_ENTRY_SIZE)
                else {
                    return refuse(response::ERR_UNSPEC);
                };
                let mut backing = Vec::new();
                for entry in list.chunks(MEM_ENTRY_SIZE) {
                    let address = u64::from(word(entry, 0)) | u64::from(word(entry, 4)) << 32;
                    let len = word(entry, 8);
                    if !bus.read(Iova::new(address), &mut std::vec![0; len as usize]) {
                        self.faults += 1;
                        return refuse(response::ERR_UNSPEC);
                    }
                    backing.push((Iova::new(address), len));
                }
                let Some(picture) = self.pictures.get_mut(&at(0)) else {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                };
                if picture.backing.is_some() {
                    return refuse(response::ERR_UNSPEC);
                }
                picture.backing = Some(backing);
            }
            command::RESOURCE_DETACH_BACKING => {
                if self.pictures.get_mut(&at(0)).and_then(|picture| picture.backing.take()).is_none() {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                }
            }
            command::SET_SCANOUT => {
                let (scanout, id) = (at(4) as usize, at(5));
                if scanout != 0 {
                    return refuse(response::ERR_INVALID_SCANOUT_ID);
                }
                if id != 0 && !self.pictures.contains_key(&id) {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                }
                self.scanouts[scanout] = id;
            }
            command::TRANSFER_TO_HOST_2D => {
                let (x, y, width, height) = (at(0), at(1), at(2), at(3));
                let (offset, id) = (u64::from(at(4)) | u64::from(at(5)) << 32, at(6));
                let Some(picture) = self.pictures.get_mut(&id) else {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                };
                let Some(backing) = &picture.backing else { return refuse(response::ERR_UNSPEC) };
                assert!(x + width <= picture.width && y + height <= picture.height, "a rectangle outside the picture");
                let memory = Chain { readable: backing.clone(), ..Chain::default() };
                let Some(bytes) = memory.read_all(bus) else {
                    self.faults += 1;
                    return refuse(response::ERR_UNSPEC);
                };
                let pitch = (picture.width * BYTES_PER_PIXEL) as usize;
                let len = (width * BYTES_PER_PIXEL) as usize;
                for row in 0..height as usize {
                    let from = offset as usize + row * pitch;
                    let to = (y as usize + row) * pitch + (x * BYTES_PER_PIXEL) as usize;
                    picture.pixels[to..to + len].copy_from_slice(&bytes[from..from + len]);
                }
            }
            command::RESOURCE_FLUSH => {
                let Some(picture) = self.pictures.get(&at(4)) else {
                    return refuse(response::ERR_INVALID_RESOURCE_ID);
                };
                for (index, shown) in self.scanouts.iter().enumerate() {
                    if *shown == at(4) {
                        self.screens.insert(index, picture.pixels.clone());
                    }
                }
            }
            _ => return refuse(response::ERR_UNSPEC),
        }
        (response::OK_NODATA, Vec::new())
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

/// The first block of an EDID with one detailed timing.
fn edid(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::vec![0; 128];
    bytes[1..7].fill(0xff);
    bytes[54] = 1;
    (bytes[56], bytes[58]) = (width as u8, (width >> 4) as u8 & 0xf0);
    (bytes[59], bytes[61]) = (height as u8, (height >> 4) as u8 & 0xf0);
    bytes[127] = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    bytes
}
