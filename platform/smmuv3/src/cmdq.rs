//! The command queue: many producers at once, completion by message, event or polling, recovery from refused commands
//! (IHI 0070, 3.5, 4.1.3, 4.7.3 and 7.1).
//!
//! # How a batch goes
//!
//! Slots are claimed, written and shown to the SMMU as `ring.rs` says, by all cores at once; CMDQ_PROD is written once for a
//! batch. Commands of different batches may lie between each other, so a batch is known by its [`Span`] of positions.
//!
//! # What makes a completion true
//!
//! A CMD_SYNC is consumed only after every earlier command has completed. A command that the SMMU refuses (CERROR_ILL) is
//! replaced by a CMD_SYNC so that the queue goes on, and its position is written down: a [`Batch`] that contains a refused
//! position fails, however many CMD_SYNCs are consumed after it. A CMD_SYNC behind a device that did not answer CMD_ATC_INV
//! (CERROR_ATC_INV_SYNC) is tried again, and every batch with a CMD_ATC_INV before it fails. A wait that times out leaves the
//! queue *lost* up to its position and closed; until the SMMU is seen to have passed it, every batch is refused with
//! [`Error::Dead`] at once. Service Failure Mode, and a queue that cannot be read, close it for ever. All that is in
//! `trouble.rs`.
//!
//! # How completion is noticed
//!
//! [`Completion`], by what the hardware has: a word of memory for each slot, into which the SMMU writes the CMD_SYNC's position
//! (IDR0.MSI, coherent SMMUs only), WFE until the SMMU sends an event (IDR0.SEV), or reads of CMDQ_CONS. Whichever it is,
//! CMDQ_CONS is looked at now and then: a message can be lost to an abort, a replaced CMD_SYNC sends none.
//!
//! # Locking and interrupts
//!
//! No lock where nothing goes wrong. Interrupts are masked from the claim until the commands are marked as written and the bell
//! is rung (at most [`CHUNK`] + 1 stores of 16 bytes, one barrier, one register write): a handler on the same core that issued
//! commands in between would wait for commands behind the gap until it timed out. At any other moment a handler may come and
//! use the queue, whatever it interrupted. Nobody waits with interrupts masked by this module, nor with a lock held; all waits
//! have a deadline. A producer that is held up between claim and mark (a virtual processor can be) holds up those behind it,
//! until they time out.
//!
//! One [`IrqMutex`] around what went wrong, a leaf: refused positions, the lost position, and every write of GERRORN.

mod batch;
mod quick;
mod trouble;

pub(crate) use batch::Batch;
pub(crate) use quick::Later;
pub use trouble::CommandError;

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::features::Features;
use crate::registers::Registers;
use crate::ring::Ring;
use crate::spec::command::{self, Command, SIZE};
use crate::spec::queue::QueueSize;
use crate::spec::registers::{self as reg, cmdq_cons, queue_base};
use base::time::Duration;
use base::{Deadline, IrqMutex, barrier, cpu};
use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::{AtomicBool, AtomicU64};
use iommu::contract::{TableBlock, TableMemory};
use trouble::Trouble;

/// Commands that a [`Batch`] collects before it writes them to the queue.
const CHUNK: usize = 8;
/// Looks at a completion that is not there between two looks at everything that may be the reason.
const LOOKS: u32 = 16;

pub(crate) type Words = [u64; command::WORDS];

/// How the SMMU says that a CMD_SYNC has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It does not: CMDQ_CONS is polled.
    Poll,
    /// By an event that ends WFE.
    Event,
    /// By writing to memory.
    Message,
}

impl Completion {
    /// The best that the SMMU has.
    pub fn of(features: &Features) -> Self {
        match (features.msi && features.coherent, features.sev) {
            (true, _) => Self::Message,
            (false, true) => Self::Event,
            (false, false) => Self::Poll,
        }
    }
}

pub(crate) struct CommandQueue {
    size: QueueSize,
    block: TableBlock,
    timeout: Duration,
    completion: Completion,
    /// One word for each slot, for [`Completion::Message`].
    messages: Option<TableBlock>,
    /// The CMD_SYNC of all positions, if not [`Completion::Message`].
    sync: Words,
    ring: Ring<AtomicU64>,
    /// How many commands were refused ever.
    refusals: AtomicU64,
    /// Positions that were claimed on any way but that of one command (see [`CommandQueue::one_by_one`]).
    others: AtomicU64,
    /// The SMMU has failed for good.
    failed: AtomicBool,
    trouble: IrqMutex<Trouble>,
}

impl CommandQueue {
    /// Allocates a queue of at most 2^`log2` commands.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(
        log2: u32,
        timeout: Duration,
        completion: Completion,
        memory: &'static dyn TableMemory,
    ) -> Result<Self, Error> {
        let size = QueueSize::new(log2);
        // A block has at least 64 bytes, that is four commands or eight words.
        let block = |bytes: usize| memory.allocate((size.entries() as usize * bytes).max(64));
        let messages = (completion == Completion::Message).then(|| block(size_of::<u64>())).transpose()?;
        Ok(Self {
            size,
            block: block(SIZE)?,
            timeout,
            completion,
            messages,
            sync: if completion == Completion::Event { Command::SyncEvent } else { Command::Sync }.encode(),
            ring: Ring::new(size)?,
            refusals: AtomicU64::new(0),
            others: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            trouble: IrqMutex::default(),
        })
    }

    /// The number of commands that fit.
    pub fn entries(&self) -> u32 {
        self.size.entries()
    }

    /// How completion is noticed.
    pub fn completion(&self) -> Completion {
        self.completion
    }

    /// Tells the SMMU where the queue is, empty. The queue is off, and nothing was ever put into it.
    pub fn program(&self, registers: &impl Registers) {
        let base = queue_base::ALLOC.mask()
            | queue_base::ADDR.address(self.block.phys().get())
            | queue_base::LOG2SIZE.put(u64::from(self.size.log2()));
        registers.write64(reg::CMDQ_BASE, base);
        registers.write32(reg::CMDQ_PROD, 0);
        registers.write32(reg::CMDQ_CONS, 0);
    }

    /// Begins a batch of commands.
    pub fn batch<'a, R: Registers>(&'a self, registers: &'a R, counters: &'a Counters) -> Batch<'a, R> {
        Batch::new(self, registers, counters)
    }

    /// Puts one command into the queue if there is room, without waiting and without learning what became of it. For handlers.
    pub fn post(&self, registers: &impl Registers, command: Command) -> bool {
        self.issue(registers, &[command.encode()], false, true).is_ok_and(|run| !run.is_empty())
    }

    /// Puts `commands`, then a CMD_SYNC if `sync`, into the queue, waiting for room. Returns the positions that they took, as the
    /// first one and the one after the last, which are further apart if other producers came in between. The bell is rung at
    /// the end if `bell`, and when there is no room.
    fn submit(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        commands: &[Words],
        sync: bool,
        bell: bool,
    ) -> Result<Span, Error> {
        let refusals = self.refusals.load(Acquire);
        let mut span: Option<Span> = None;
        let mut rest = commands;
        let mut deadline = None;
        loop {
            let expired = deadline.is_some_and(|deadline: Deadline| deadline.has_passed());
            let Ok(run) = self.issue(registers, rest, sync, bell) else {
                self.revive(registers, counters)?;
                continue;
            };
            let (count, wanted) = ((run.end - run.start) as usize, rest.len() + usize::from(sync));
            if count != 0 {
                let first = *span.get_or_insert(Span { start: run.start, end: run.end, refusals });
                span = Some(Span { end: run.end, ..first });
            }
            if count == wanted {
                return Ok(span.unwrap_or_default());
            }
            rest = rest.get(count..).unwrap_or_default();
            self.look(registers, counters);
            if expired {
                self.abandon();
                counters.sync_timeouts.add(1);
                return Err(Error::QueueFull);
            }
            if count == 0 {
                deadline.get_or_insert_with(|| Deadline::after(self.timeout));
                self.look_closely(registers, counters);
                core::hint::spin_loop();
            }
        }
    }

    /// Claims slots for as much as there is room for, writes it, and rings the bell if `bell` or if that was not all. Interrupts
    /// are masked throughout.
    #[inline]
    fn issue(
        &self,
        registers: &impl Registers,
        commands: &[Words],
        sync: bool,
        bell: bool,
    ) -> Result<Range<u64>, crate::ring::Closed> {
        let wanted = (commands.len() + usize::from(sync)) as u64;
        cpu::without_interrupts(|| {
            if seeded(Bug::QueueOverfilled) {
                self.ring.reached(self.ring.published());
            }
            let run = self.ring.claim(wanted)?;
            if !run.is_empty() {
                self.others.fetch_add(run.end - run.start, Relaxed);
                if seeded(Bug::ProdBeforeCommands) {
                    registers.write32(reg::CMDQ_PROD, self.ring.index(run.end));
                }
                let mut commands = commands.iter();
                for position in run.clone() {
                    let words = commands.next().copied().unwrap_or_else(|| self.sync_at(position));
                    self.store(position, words);
                }
                self.publish(run.clone());
                self.ring.finish(run.clone());
            }
            if bell || run.end - run.start < wanted {
                self.ring_bell(registers);
            }
            Ok(run)
        })
    }

    #[inline]
    fn ring_bell(&self, registers: &impl Registers) {
        self.ring.ring(|index| self.tell(registers, index));
    }

    /// Tells the SMMU of everything before `index`.
    #[inline(always)]
    fn tell(&self, registers: &impl Registers, index: u32) {
        let wrap = if seeded(Bug::WrapDropped) { self.size.entries() } else { 0 };
        registers.write32(reg::CMDQ_PROD, index & !wrap);
    }

    /// The CMD_SYNC for a position.
    #[inline]
    fn sync_at(&self, position: u64) -> Words {
        match &self.messages {
            Some(messages) => self.sync_with_message(messages, position),
            None => self.sync,
        }
    }

    #[inline(never)] // Keeps the other way short.
    fn sync_with_message(&self, messages: &TableBlock, position: u64) -> Words {
        let slot = self.ring.slot(position);
        if let Some(word) = messages.get(slot) {
            // Whatever is left there of earlier rounds is not this position's.
            word.store(u64::from(!tag(position)), Relaxed);
        }
        let address = messages.phys().get() + (slot * size_of::<u64>()) as u64;
        Command::SyncMessage { address, data: tag(position) }.encode()
    }

    #[inline]
    fn store(&self, position: u64, words: Words) {
        let at = self.ring.slot(position) * command::WORDS;
        if let Some(cells) = self.block.get(at..at + command::WORDS) {
            for (cell, value) in cells.iter().zip(words) {
                cell.store(value, Relaxed);
            }
        }
    }

    /// Makes written commands visible to the SMMU. They may wrap around the end of the queue.
    #[inline]
    fn publish(&self, run: Range<u64>) {
        let first = self.ring.slot(run.start);
        let count = run.end.wrapping_sub(run.start) as usize;
        if seeded(Bug::CommandNotPublished) {
            return;
        }
        let before_wrap = count.min(self.size.entries() as usize - first);
        self.block.publish(first * command::WORDS, (first + before_wrap) * command::WORDS);
        if count > before_wrap {
            self.block.publish(0, (count - before_wrap) * command::WORDS);
        }
    }

    /// Follows CMDQ_CONS, and gets the queue going again if the SMMU has stopped at an error.
    #[inline]
    fn look(&self, registers: &impl Registers, counters: &Counters) {
        let cons = self.follow(registers, counters);
        // CMDQ_CONS.ERR outlives its acknowledgement: it only says that GERROR is worth a look.
        if cmdq_cons::ERR.is_set(u64::from(cons)) {
            self.recover(registers, counters);
        }
    }

    /// Follows CMDQ_CONS and returns it.
    #[inline]
    fn follow(&self, registers: &impl Registers, counters: &Counters) -> u32 {
        let mut cons = 0;
        let followed = self.ring.follow(|| {
            cons = registers.read32(reg::CMDQ_CONS);
            // What others have published, and what devices wrote before they were stopped, is looked at after this.
            barrier::device_read();
            cons & cmdq_cons::RD.mask() as u32
        });
        if followed.is_err() {
            counters.bad_indexes.add(1);
        }
        cons
    }

    /// Whether everything before `end`, a CMD_SYNC last, has been consumed.
    #[inline]
    fn passed(&self, registers: &impl Registers, counters: &Counters, end: u64) -> bool {
        if self.ring.consumed() >= end {
            return true;
        }
        let Some(messages) = &self.messages else {
            self.look(registers, counters);
            return self.ring.consumed() >= end;
        };
        let slot = self.ring.slot(end - 1);
        messages.observe(slot, slot + 1);
        #[allow(clippy::cast_possible_truncation)] // The message is the lower half of its word.
        let arrived = messages.get(slot).is_some_and(|word| word.load(Acquire) as u32 == tag(end - 1));
        if arrived {
            barrier::device_read();
            self.ring.reached(end);
        }
        arrived
    }

    /// Waits until everything in `span`, whose last command is a CMD_SYNC, has been consumed. `atc`: there was a CMD_ATC_INV in it.
    fn wait(&self, registers: &impl Registers, counters: &Counters, span: Span, atc: bool) -> Result<(), Error> {
        let mut deadline: Option<Deadline> = None;
        let mut looks = 0_u32;
        loop {
            let expired = deadline.is_some_and(|deadline| deadline.has_passed());
            if self.passed(registers, counters, span.end) {
                // Counted before the SMMU was told to go on, so before it could be seen to have passed.
                let unharmed = self.refusals.load(Acquire) == span.refusals;
                let refused = !unharmed && self.trouble.lock().refused_in(self, span, atc);
                return if refused { Err(Error::CommandRefused) } else { Ok(()) };
            }
            deadline.get_or_insert_with(|| Deadline::after(self.timeout));
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) || expired {
                self.look_closely(registers, counters);
                self.look(registers, counters);
                if self.failed.load(Acquire) {
                    return Err(Error::Dead);
                }
            }
            let told = self.ring.published() >= span.end;
            if !told {
                cpu::without_interrupts(|| self.ring_bell(registers));
            }
            if expired && self.give_up(span.end) {
                counters.sync_timeouts.add(1);
                return Err(Error::SyncTimedOut);
            }
            if told && self.completion == Completion::Event {
                registers.wait_for_event();
            } else {
                core::hint::spin_loop();
            }
        }
    }
}

/// What the SMMU writes to say that the CMD_SYNC at `position` has completed.
const fn tag(position: u64) -> u32 {
    position as u32
}

/// The positions from the first command of a batch up to after its last.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u64,
    end: u64,
    /// How many commands had been refused when the first was issued.
    refusals: u64,
}
