//! The driver on the model.
//!
//! Bugs that were put into the driver by hand and seen to turn a test red are listed at the head of each file.

mod ats;
mod attach;
mod crowd;
mod events;
mod fail_nth;
mod fleet;
mod floods;
mod mixed;
mod pri;
mod producers;
mod queue;
mod random;
mod revoke;
mod rules;
mod seeded;
mod spaces;
mod start;
mod substreams;
mod swap;
mod world;

use super::{Model, ModelMemory, Traits};
use crate::{Config, Error, Smmu};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::time::Duration;
use iommu::contract::{AddressSpace, Iommu};
use iommu::{Fault, FaultSink, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, StreamId};
use std::sync::Mutex;

/// Cases of a property: what `PROPTEST_CASES` says, or `usual`.
fn cases(usual: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(usual)
}

/// Memory to lend: far from where the tables are.
const RAM: u64 = 0x20_0000_0000;
const RW: Prot = Prot::READ.union(Prot::WRITE);
const PAGE: u64 = 4096;

#[derive(Default)]
struct Log(Mutex<Vec<Fault>>);

impl FaultSink for Log {
    fn fault(&self, fault: &Fault) {
        self.0.lock().unwrap().push(*fault);
    }
}

impl Log {
    fn take(&self) -> Vec<Fault> {
        core::mem::take(&mut self.0.lock().unwrap())
    }
}

struct Rig {
    memory: &'static ModelMemory,
    model: Arc<Model>,
    smmu: Smmu<Arc<Model>>,
    log: Arc<Log>,
}

/// Nothing times out: for an SMMU that does what it is told, however slowly and however busy the host is.
fn patient() -> Config {
    let forever = Duration::from_secs(60);
    Config { eventq_log2: 7, input_bits: 32, sync_timeout: forever, acknowledge_timeout: forever, ..Config::default() }
}

/// For an SMMU that is stuck. Nothing else may take time: one that consumes at once is never found late.
fn hasty() -> Config {
    let soon = Duration::from_millis(20);
    Config { sync_timeout: soon, acknowledge_timeout: soon, ..patient() }
}

type Started = (Result<Smmu<Arc<Model>>, Error>, Arc<Log>);

fn start(memory: &'static ModelMemory, model: &Arc<Model>, config: Config) -> Started {
    let log = Arc::new(Log::default());
    (Smmu::new(Arc::clone(model), memory, log.clone(), config), log)
}

fn rig_with(traits: Traits, config: Config) -> Rig {
    let memory = ModelMemory::new();
    let model = Model::new(traits, memory);
    let (smmu, log) = start(memory, &model, config);
    let smmu = smmu.unwrap();
    model.take_log();
    Rig { memory, model, smmu, log }
}

fn rig(traits: Traits) -> Rig {
    rig_with(traits, patient())
}

impl Rig {
    fn space(&self) -> Arc<dyn AddressSpace> {
        self.smmu.create().unwrap()
    }

    fn attached(&self, stream: u32) -> Arc<dyn AddressSpace> {
        let space = self.space();
        self.smmu.attach(id(stream), &space).unwrap();
        space
    }

    fn reads(&self, stream: u32, iova: u64) -> Option<u64> {
        self.model.device_read(id(stream), Iova::new(iova), 4).ok().map(|runs| runs[0].start().get())
    }

    fn interrupt(&self) {
        let interrupts = self.model.take_interrupts();
        if interrupts.events {
            self.smmu.event_handler().handle();
        }
        if interrupts.page_requests {
            self.smmu.page_request_handler().handle();
        }
        if interrupts.errors {
            self.smmu.error_handler().handle();
        }
    }
}

fn id(stream: u32) -> StreamId {
    StreamId::new(stream)
}

fn iova(start: u64, len: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), len).unwrap()
}

fn ram(offset: u64, len: u64) -> PhysRange {
    PhysRange::new(PhysAddr::new(RAM + offset), len).unwrap()
}

#[allow(unsafe_code)]
fn map(space: &Arc<dyn AddressSpace>, range: IovaRange, run: PhysRange, prot: Prot) -> Result<(), MapError> {
    // SAFETY: the model's devices access no memory: they say which they would.
    unsafe { space.map(range, &[run], prot) }
}

#[allow(unsafe_code)]
fn bypass(rig: &Rig, stream: u32) {
    // SAFETY: the model's devices access no memory.
    unsafe { rig.smmu.bypass(id(stream)) }.unwrap();
}

/// Everything there is: both stages, ATS, SubstreamIDs of eight bits in tables of two levels.
const FULL: Traits =
    Traits { idr0: Traits::NESTED.idr0 | 1 << 10 | 1 << 19, idr1: Traits::NESTED.idr1 | 8 << 6, ..Traits::NESTED };

/// The same where the SMMU does not snoop.
const FULL_NON_COHERENT: Traits = Traits { idr0: FULL.idr0 & !(1 << 4), ..FULL };

impl Rig {
    /// What a device reads, with a SubstreamID.
    fn reads_as(&self, stream: u32, substream: u32, iova: u64) -> Option<u64> {
        let (stream, substream, iova) = (id(stream), Some(substream), Iova::new(iova));
        let access = super::device::Access { stream, substream, iova, len: 4, write: false, privileged: false };
        self.model.access(&access).ok().map(|runs| runs[0].start().get())
    }

    fn asked(&self, request: &crate::Request) -> Arc<dyn AddressSpace> {
        self.smmu.create_with(request).unwrap()
    }
}
