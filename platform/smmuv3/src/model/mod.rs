//! An SMMUv3 in software, for host tests of SMMUv3 drivers: this crate's, and any other.
//!
//! [`Model`] is what a driver sees of an SMMU: registers ([`Registers`]), a command queue that it consumes, an event queue that
//! it fills, stream tables, CDs and translation tables that it walks in a [`ModelMemory`]. Devices are calls:
//! [`Model::device_read`], [`Model::device_write`], [`Model::access`] (with a SubstreamID), [`Model::ats_request`].
//!
//! # It is not kind
//!
//! - It sees memory only as last published, caches all that the architecture lets it cache (invalid STEs too), keeps it until
//!   told otherwise, and takes out no more than it must (see [`cache`]): translations, links of every level, combined
//!   translations of both stages, STEs, CDs, L1STDs, L1CDs, and what devices hold by ATS.
//! - Invalidations take effect when a CMD_SYNC behind them is consumed, no earlier.
//! - With [`Model::eager`] it loads into its caches, before every register access, everything that the given streams can reach.
//! - With [`Model::adversary`] it does, at every register access, device access, publication and freeing of memory, a few things
//!   of its own accord, drawn from a seed: walks to mapped addresses and a little beyond them, from any cached link or from the
//!   root; prefetches of STEs and CDs, word by word, the words of one entry at different times; contiguous groups cached as one
//!   or page by page; commands consumed early or late ([`Consumption::Random`]); invalidations completed before their CMD_SYNC,
//!   in any order; stores that it sees although they were not published yet.
//! - It interrupts only when the event queue becomes non-empty.
//! - It can be slow, stuck, without GBPA, refuse commands, abort their reading, leave CMD_ATC_INV unanswered, acknowledge CR0
//!   late, and flood the event queue ([`Behaviour`]).
//!
//! # What it checks
//!
//! What a driver must not do is collected in [`Model::violations`]. A test ends with [`Model::assert_clean`].
//!
//! - **Registers**: queue bases, STRTAB_BASE and CR1/CR2 while what they belong to is on; CR0 and IRQ_CTRL before the last change
//!   was acknowledged; GBPA during an update; GERRORN for errors that are not active, or with the command that was refused still
//!   in its place; indexes that pass each other; sizes and alignment of queues and tables; reserved bits; translation switched
//!   on with anything cached from before.
//! - **Commands**: kinds that the identification registers do not announce, reserved bits, reserved range encodings, addresses
//!   that a level hint makes unpredictable, ASIDs, VMIDs and SubstreamIDs that are too wide.
//! - **STEs, CDs, L1STDs, L1CDs**: every reserved or unsupported value (see [`check`]), sizes, alignment, memory types.
//! - **Tables**: descriptors that change while cached without break-before-make, contiguous groups that are not of one piece,
//!   cached translations that disagree (TLB conflicts), an ASID or VMID used for other tables without an invalidation, memory
//!   that is freed while anything cached leads to it, or that is walked after it was freed (see [`audit`]).
//!
//! [`Model::paths_to`] lists every way, cached or not and of whatever stream, by which memory can be reached: what revocation
//! must leave empty.
//!
//! # What it does not check
//!
//! - It is one SMMU programming interface: Non-secure, no Secure or Realm state, no ECMDQ, no VMS, no MPAM, no HTTU, no stall
//!   (faults terminate), no LPA2 or 52-bit addresses, TTB0 only.
//! - Barriers count as far as [`ModelMemory`] sees them: an unpublished store is lost, or seen early. Reordering of loads on the
//!   processor is not modelled; `loom` is for that.
//! - Of the memory attributes it checks that they exist and reports them ([`Model::memory_type`]); data is not moved, so what
//!   a wrong attribute does to it is not seen.
//! - Whether an event was *due* is for the test to say; the model writes the events of what it stopped.
//! - Where the architecture leaves a choice to the implementation (the number of TLB entries, what else an invalidation takes out)
//!   it makes the choice that is worst for the driver, not each choice.
//!
//! # Example
//!
//! A driver, in short: it blocks a device, and believes that to be enough.
//!
//! ```
//! use core::sync::atomic::Ordering::Relaxed;
//! use iommu::contract::TableMemory;
//! use iommu::{Iova, StreamId};
//! use smmuv3::Registers;
//! use smmuv3::model::{Model, ModelMemory, Traits};
//! use smmuv3::spec::command::Command;
//! use smmuv3::spec::registers as reg;
//! use smmuv3::spec::ste;
//!
//! let memory = ModelMemory::new();
//! let smmu = Model::new(Traits::NESTED, memory);
//! let (streams, queue) = (memory.allocate(64 * ste::SIZE)?, memory.allocate(128)?);
//! smmu.write64(reg::STRTAB_BASE, streams.phys().get());
//! smmu.write32(reg::STRTAB_BASE_CFG, 6); // A linear table of 2^6 streams.
//! smmu.write64(reg::CMDQ_BASE, queue.phys().get() | 3); // 2^3 commands.
//!
//! // Stream 5 bypasses.
//! streams[5 * ste::WORDS].store(ste::V.mask() | ste::CONFIG.put(ste::CONFIG_BYPASS), Relaxed);
//! streams.publish(0, streams.len());
//! smmu.write32(reg::CR0, 1 << 3); // CMDQEN
//! smmu.write32(reg::CR0, 1 << 3 | 1); // and SMMUEN
//! let reads = || smmu.device_read(StreamId::new(5), Iova::new(0x1000), 4).is_ok();
//! assert!(reads());
//!
//! // It shall abort from now on. The SMMU has the old STE in its cache.
//! streams[5 * ste::WORDS].store(ste::V.mask() | ste::CONFIG.put(ste::CONFIG_ABORT), Relaxed);
//! streams.publish(5 * ste::WORDS, 6 * ste::WORDS);
//! assert!(reads(), "the STE is stale");
//!
//! for (slot, command) in [Command::CfgiSte { sid: 5, leaf: true }, Command::Sync].into_iter().enumerate() {
//!     let words = command.encode();
//!     queue[2 * slot].store(words[0], Relaxed);
//!     queue[2 * slot + 1].store(words[1], Relaxed);
//! }
//! queue.publish(0, 4);
//! smmu.write32(reg::CMDQ_PROD, 2);
//! assert!(!reads());
//! smmu.assert_clean();
//! # Ok::<(), iommu::OutOfMemory>(())
//! ```

mod adversary;
pub mod audit;
pub mod cache;
pub mod check;
mod commands;
pub mod config;
pub mod device;
pub mod memory;
mod output;
mod regs;
pub mod rng;
#[cfg(test)]
mod tests;
pub mod walk;

pub use memory::ModelMemory;

use crate::registers::{Offset, Registers};
use crate::spec::queue::QueueSize;
use alloc::collections::BTreeSet;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use cache::{Caches, Invalidation};

/// The hardware: its identification registers, and whether GBPA is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Registers, by their names.
pub struct Traits {
    pub idr0: u32,
    pub idr1: u32,
    pub idr3: u32,
    pub idr5: u32,
    pub aidr: u32,
    /// Whether GBPA is implemented.
    pub gbpa: bool,
}

impl Traits {
    /// Both stages, range invalidation, 16-bit ASIDs, two-level tables: QEMU 10.
    pub const NESTED: Self =
        Self { idr0: 0x0d44_101b, idr1: 0x0273_0010, idr3: 0x1414, idr5: 0x74, aidr: 1, gbpa: true };
    /// Stage 1 only and no GBPA: QEMU 7.2.
    pub const OLD: Self = Self { idr0: 0x0d40_101a, idr3: 0x1404, gbpa: false, ..Self::NESTED };
    /// Stage 2 only.
    pub const STAGE2: Self = Self { idr0: 0x0d44_1019, ..Self::NESTED };
    /// As little as there can be: stage 1, no range invalidation, 8-bit ASIDs, linear tables of 64 streams, not coherent,
    /// 40-bit output, 4 KiB granule only, queues of eight commands and 32 events.
    pub const MINIMAL: Self = Self { idr0: 0x0540_000a, idr1: 0x0065_0006, idr3: 0, idr5: 0x12, aidr: 0, gbpa: true };
}

/// When commands are consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumption {
    /// All of them, inside the write of CMDQ_PROD.
    Immediate,
    /// So many for each read of CMDQ_CONS.
    PerLook(u32),
    /// As many as an adversary likes, whenever it likes (see [`Model::adversary`]).
    Random,
    /// Never.
    Stuck,
}

/// How event queue overflow is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// By EVENTQ_PROD.OVFLG, as the architecture says.
    Flag,
    /// By GERROR.EVENTQ_ABT_ERR, as QEMU does.
    Abort,
}

/// What a test can turn.
#[derive(Clone, Copy, Debug)]
pub struct Behaviour {
    /// When commands are consumed.
    pub consumption: Consumption,
    /// Whether CR0ACK and IRQ_CTRLACK follow.
    pub acknowledges: bool,
    /// Whether GBPA.UPDATE ever clears.
    pub gbpa_updates: bool,
    /// How overflow is told.
    pub overflow: Overflow,
    /// Records for each stopped access.
    pub records: u32,
    /// The next command of this opcode is refused with CERROR_ILL.
    pub refuse: Option<u8>,
    /// So many reads of commands are aborted (CERROR_ABT).
    pub abort_fetches: u32,
    /// So many writes of EVENTQ_CONS are each followed by a new record.
    pub flood: u32,
    /// So many reads of IRQ_CTRLACK are each preceded by a new record.
    pub late_records: u32,
    /// What CMDQ_CONS reads as, whatever the truth.
    pub lie: Option<u32>,
    /// So many reads of CMDQ_CONS find that nothing has moved, before commands are consumed again.
    pub stall: u32,
    /// So many CMD_SYNCs behind a CMD_ATC_INV are stopped with CERROR_ATC_INV_SYNC.
    pub atc_timeouts: u32,
    /// An adversary does fewer things than this of its own accord in each moment.
    pub acts: u32,
    /// Messages of CMD_SYNCs are aborted.
    pub lose_messages: bool,
    /// CR0ACK follows when the adversary likes.
    pub slow_acknowledgements: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            consumption: Consumption::Immediate,
            acknowledges: true,
            gbpa_updates: true,
            overflow: Overflow::Flag,
            records: 1,
            refuse: None,
            abort_fetches: 0,
            flood: 0,
            late_records: 0,
            lie: None,
            stall: 0,
            atc_timeouts: 0,
            acts: 4,
            lose_messages: false,
            slow_acknowledgements: false,
        }
    }
}

/// Interrupts that were raised and not yet taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interrupts {
    /// The event queue became non-empty.
    pub events: bool,
    /// A global error became active.
    pub errors: bool,
    /// The PRI queue became non-empty.
    pub page_requests: bool,
}

/// An SMMU.
pub struct Model {
    memory: &'static ModelMemory,
    traits: Traits,
    state: IrqMutex<State>,
}

#[derive(Default)]
struct State {
    regs: regs::Regs,
    caches: Caches,
    /// Invalidations that were consumed and wait for a CMD_SYNC.
    pending: Vec<Invalidation>,
    behaviour: Behaviour,
    interrupts: Interrupts,
    output: output::Output,
    violations: Vec<String>,
    /// Opcodes in the order in which they were consumed.
    log: Vec<u8>,
    eager: BTreeSet<u32>,
    adversary: Option<adversary::Adversary>,
    /// Blocks freed when the caches were last compared with memory.
    frees: usize,
    /// Noticed during a walk, and not yet a violation.
    findings: Vec<audit::Finding>,
    /// The command at which consumption last stopped with CERROR_ILL, and where it is.
    stopped: Option<(u64, u64, u64)>,
    /// A CMD_ATC_INV waits for a CMD_SYNC.
    unsynced_atc: bool,
    /// CR0 was written, and CR0ACK does not follow yet.
    acknowledging: bool,
}

impl State {
    fn violation(&mut self, what: String) {
        if !self.violations.contains(&what) {
            self.violations.push(what);
        }
    }

    fn command_queue(&self) -> QueueSize {
        QueueSize::new((self.regs.cmdq_base & 0x1f) as u32)
    }

    fn event_queue(&self) -> QueueSize {
        QueueSize::new((self.regs.eventq_base & 0x1f) as u32)
    }
}

impl Model {
    /// Makes an SMMU in its reset state, which lets everything pass.
    pub fn new(traits: Traits, memory: &'static ModelMemory) -> Arc<Self> {
        Arc::new(Self { memory, traits, state: IrqMutex::default() })
    }

    /// Changes how the SMMU behaves.
    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.lock().behaviour);
    }

    /// From now on keeps the caches full of what these streams can reach.
    pub fn eager(&self, streams: impl IntoIterator<Item = u32>) {
        self.state.lock().eager = streams.into_iter().collect();
    }

    /// What the driver did that it must not do.
    pub fn violations(&self) -> Vec<String> {
        let mut state = self.state.lock();
        self.audit(&mut state);
        state.violations.clone()
    }

    /// Panics if the driver did anything that it must not do.
    ///
    /// # Panics
    ///
    /// With the list.
    #[track_caller]
    pub fn assert_clean(&self) {
        let violations = self.violations();
        assert!(violations.is_empty(), "the driver broke the rules: {violations:#?}");
    }

    /// Opcodes of the commands consumed since the last call.
    pub fn take_log(&self) -> Vec<u8> {
        core::mem::take(&mut self.state.lock().log)
    }

    /// Interrupts raised since the last call.
    pub fn take_interrupts(&self) -> Interrupts {
        core::mem::take(&mut self.state.lock().interrupts)
    }

    /// Whether transactions are translated.
    pub fn is_enabled(&self) -> bool {
        self.state.lock().regs.cr0 & 1 != 0
    }

    /// Raises a global error.
    pub fn raise(&self, error: crate::spec::registers::Gerror) {
        let mut state = self.state.lock();
        commands::raise(&mut state, error);
    }

    /// Lets the SMMU consume commands as if time had passed, whatever its [`Consumption`].
    pub fn run(&self) {
        let mut state = self.state.lock();
        while self.consume(&mut state) {}
    }
}

impl Registers for Arc<Model> {
    type Register = Offset<Self>;

    fn register(&self, offset: usize) -> Offset<Self> {
        Offset { registers: self.clone(), offset }
    }
    fn read32(&self, offset: usize) -> u32 {
        self.load(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.store(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.load64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.store64(offset, value);
    }
    fn size(&self) -> usize {
        crate::spec::registers::SIZE
    }
}
