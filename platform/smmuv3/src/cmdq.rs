//! The command queue: many producers at once, completion by message, event or polling, recovery from refused commands
//! (IHI 0070, 3.5, 4.1.3, 4.7.3 and 7.1).
//!
//! # How a batch goes
//!
//! Slots are claimed, written and shown to the SMMU as `ring.rs` says. Commands of different batches may lie between each other, so
//! a batch is known by its [`Span`] of positions.
//!
//! Where nobody else is here, two exchanges of one word are all that the cores have to do with each other: with the first one the slots
//! are claimed and the *bell* is taken, then the commands are written, CMDQ_PROD is, CMDQ_CONS is read once, and with the second the bell
//! is given back. Where others are, whoever finds the bell taken touches no register: he writes his commands and looks at memory.
//! Whoever takes the bell next tells the SMMU of all that is written, by one write of CMDQ_PROD, and notes for all how far
//! CMDQ_CONS is. And where cores have met, those who come first wait a moment for the others, so that they go on sharing
//! both accesses (`company.rs`). The bell is never kept while something is waited for: if the SMMU takes its time,
//! others go to the registers in between.
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
//! No lock where nothing goes wrong. Interrupts are masked from the claim until the commands are marked as written (at most
//! [`CHUNK`] + 1 stores of 16 bytes and one barrier), and while the bell is had (one write and one read of a register): a handler
//! on the same core that issued commands in between would wait for commands behind the gap, or for a bell that does not come back, until
//! it timed out. At any other moment a handler may come and use the queue, whatever it interrupted; who waits for others to come has nothing
//! that anybody needs. Nobody waits with interrupts masked by this module, nor with a lock held; all waits have a deadline,
//! and the clock is not looked at before many looks at memory were in vain. A producer that is held up between claim and mark, or with the
//! bell (a virtual processor can be), holds up others until they time out.
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
use crate::counters::{Counter, Counters};
use crate::features::Features;
use crate::registers::Registers;
use crate::ring::{Closed, Ring, Turn};
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
/// Looks at a completion that is not there between two looks at the clock, and at everything that may be the reason.
const LOOKS: u32 = 64;
/// Looks for which one counts that slept.
const SLEEP: u32 = 8;

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
    /// Looks at memory that somebody takes who waits for others to come.
    linger: u32,
    completion: Completion,
    /// One word for each slot, for [`Completion::Message`].
    messages: Option<TableBlock>,
    /// The CMD_SYNC of all positions, if not [`Completion::Message`].
    sync: Words,
    ring: Ring<AtomicU64>,
    /// The position behind the last command that was refused.
    refused: AtomicU64,
    /// Positions that were claimed on any way but that of one command (see [`CommandQueue::one_by_one`]).
    others: AtomicU64,
    /// Accesses to CMDQ_PROD and CMDQ_CONS on any way but that.
    accesses: Counter,
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
        linger: u32,
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
            linger,
            completion,
            // A message is awaited where it arrives, not at the register.
            ring: Ring::new(size, messages.is_none())?,
            messages,
            sync: if completion == Completion::Event { Command::SyncEvent } else { Command::Sync }.encode(),
            refused: AtomicU64::new(0),
            others: AtomicU64::new(0),
            accesses: Counter::default(),
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
        self.issue(registers, &[command.encode()], false, Await::Nothing).is_ok_and(|run| !run.is_empty())
    }

    /// Puts `commands`, then a CMD_SYNC if `sync`, into the queue, waiting for room. Returns the positions that they took, as the
    /// first one and the one after the last, which are further apart if other producers came in between. If they are `last`, they may
    /// have been shown to the SMMU; [`Self::wait`] does the rest.
    fn submit(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        commands: &[Words],
        sync: bool,
        last: bool,
    ) -> Result<Span, Error> {
        let mut span: Option<Span> = None;
        let mut rest = commands;
        let mut deadline = None;
        loop {
            let expired = deadline.is_some_and(|deadline: Deadline| deadline.has_passed());
            let Ok(run) = self.issue(registers, rest, sync, if last { Await::These } else { Await::Later }) else {
                self.revive(registers, counters)?;
                continue;
            };
            let (count, wanted) = ((run.end - run.start) as usize, rest.len() + usize::from(sync));
            if count != 0 {
                let first = *span.get_or_insert(Span { start: run.start, end: run.end });
                span = Some(Span { end: run.end, ..first });
            }
            if count == wanted {
                return Ok(span.unwrap_or_default());
            }
            rest = rest.get(count..).unwrap_or_default();
            // What was written so far is shown to the SMMU, and how far it is gone is looked at, whatever the completion.
            self.visit(registers, counters, Span::default());
            if self.messages.is_some() {
                self.look(registers, counters);
            }
            if expired {
                self.look(registers, counters);
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

    /// Claims slots for as much as there is room for, and writes it. Interrupts are masked throughout.
    #[inline]
    fn issue(
        &self,
        registers: &impl Registers,
        commands: &[Words],
        sync: bool,
        then: Await,
    ) -> Result<Range<u64>, Closed> {
        cpu::without_interrupts(|| {
            if then != Await::Later
                && let Some(run) = self.issue_alone(registers, commands, sync)
            {
                return Ok(run);
            }
            if seeded(Bug::QueueOverfilled) {
                self.ring.reached(self.ring.told());
            }
            let wanted = (commands.len() + usize::from(sync)) as u64;
            let run = match then {
                Await::Nothing => self.ring.post(wanted),
                Await::These | Await::Later => self.ring.claim(wanted),
            }?;
            if !run.is_empty() {
                self.write(registers, commands, run.clone());
                self.ring.finish(run.clone());
            }
            if then == Await::Nothing {
                self.ring.ring(|index| self.tell(registers, index));
            }
            Ok(run)
        })
    }

    /// Where nobody else is here, and there is room: claims slots for all of it, writes it, shows it to the SMMU and, if `sync`, looks
    /// whether it has been consumed. Or does nothing. Called with interrupts masked.
    #[inline]
    fn issue_alone(&self, registers: &impl Registers, commands: &[Words], sync: bool) -> Option<Range<u64>> {
        if seeded(Bug::QueueOverfilled) {
            return None;
        }
        let run = self.ring.claim_alone(self.ring.next(), (commands.len() + usize::from(sync)) as u64)?;
        self.ring.telling(run.end);
        self.write(registers, commands, run.clone());
        let index = self.ring.index(run.end);
        self.tell(registers, index);
        let cons = if sync && self.messages.is_none() { self.read_cons(registers) } else { !index };
        if !self.ring.leave_alone(run.end) {
            let behind = self.ring.behind();
            self.leave(registers, 1, behind);
        }
        // As in `execute_one`.
        if cons == index {
            self.ring.reached(run.end);
        }
        Some(run)
    }

    /// Writes `commands`, and CMD_SYNCs into what they leave of `run`, and publishes that.
    #[inline]
    fn write(&self, registers: &impl Registers, commands: &[Words], run: Range<u64>) {
        self.others.fetch_add(run.end.wrapping_sub(run.start), Relaxed);
        if seeded(Bug::ProdBeforeCommands) {
            registers.write32(reg::CMDQ_PROD, self.ring.index(run.end));
        }
        let mut commands = commands.iter();
        for position in run.clone() {
            let words = commands.next().copied().unwrap_or_else(|| self.sync_at(position));
            self.store(position, words);
        }
        self.publish(run);
    }

    /// Goes to the registers if nobody is there, for all: tells the SMMU of everything that is written and sees how far it is, and gets
    /// the queue going again if the SMMU has stopped at an error. `own` is what the caller waits for. Returns whether it did.
    fn visit(&self, registers: &impl Registers, counters: &Counters, own: Span) -> bool {
        let cons = cpu::without_interrupts(|| {
            if !self.ring.take_bell() {
                return None;
            }
            // Whoever was there may have seen to it, since the caller looked.
            if own.end != 0 && self.ring.consumed() >= own.end {
                self.leave(registers, 0, 0);
                return Some(0);
            }
            let runs = self.ring.tell_written(&(own.start..own.end), |index| self.tell(registers, index));
            let (mut cons, mut behind) = (0, 0);
            if self.messages.is_some() {
                behind = self.ring.behind();
            } else {
                cons = self.follow(registers, counters, || behind = self.ring.behind());
            }
            self.leave(registers, runs, behind);
            Some(cons)
        });
        // CMDQ_CONS.ERR outlives its acknowledgement: it only says that GERROR is worth a look.
        if cons.is_some_and(|cons| cmdq_cons::ERR.is_set(u64::from(cons))) {
            self.recover(registers, counters);
        }
        cons.is_some()
    }

    /// Gives the bell back after the SMMU was told of `runs`, and `behind` came behind them. Called with interrupts masked.
    fn leave(&self, registers: &impl Registers, runs: u64, behind: u64) {
        if !self.ring.leave(runs, behind) {
            self.ring.ring(|index| self.tell(registers, index));
        }
    }

    /// What of the ring a test lets cores meet by: the end of what is marked.
    #[cfg(test)]
    pub fn written(&self) -> u64 {
        self.ring.written()
    }

    /// Whether others are here, or were a moment ago.
    #[cfg(test)]
    pub fn is_crowded(&self) -> bool {
        self.ring.is_crowded()
    }

    /// Makes it look so.
    #[cfg(test)]
    pub fn disturb(&self) {
        self.ring.disturb();
    }

    /// Accesses to CMDQ_PROD and CMDQ_CONS so far.
    pub fn accesses(&self) -> u64 {
        self.accesses.get().wrapping_add(self.one_by_one().wrapping_mul(2))
    }

    /// Tells the SMMU of everything before `index`.
    #[inline(always)]
    fn tell(&self, registers: &impl Registers, index: u32) {
        let wrap = if seeded(Bug::WrapDropped) { self.size.entries() } else { 0 };
        self.accesses.add(1);
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
        let cons = self.follow(registers, counters, || {});
        // CMDQ_CONS.ERR outlives its acknowledgement: it only says that GERROR is worth a look.
        if cmdq_cons::ERR.is_set(u64::from(cons)) {
            self.recover(registers, counters);
        }
    }

    /// Reads CMDQ_CONS.
    #[inline]
    fn read_cons(&self, registers: &impl Registers) -> u32 {
        self.accesses.add(1);
        let cons = registers.read32(reg::CMDQ_CONS);
        // What others have published, and what devices wrote before they were stopped, is looked at after this.
        barrier::device_read();
        cons
    }

    /// Follows CMDQ_CONS and returns it. `meanwhile` is done after it was read and before anybody can know of it.
    #[inline]
    fn follow(&self, registers: &impl Registers, counters: &Counters, meanwhile: impl FnOnce()) -> u32 {
        let mut cons = 0;
        let followed = self.ring.follow(|| {
            cons = self.read_cons(registers);
            meanwhile();
            cons & cmdq_cons::RD.mask() as u32
        });
        if followed.is_err() {
            counters.bad_indexes.add(1);
        }
        cons
    }

    /// Whether everything before `end`, a CMD_SYNC last, is known to be consumed. Looks at memory only.
    #[inline]
    fn passed(&self, end: u64) -> bool {
        if self.ring.consumed() >= end || seeded(Bug::OthersTakenForOwn) && self.ring.consumed() == self.ring.told() {
            return true;
        }
        self.messages.as_ref().is_some_and(|messages| self.arrived(messages, end))
    }

    /// Whether the message of the CMD_SYNC before `end` is there.
    fn arrived(&self, messages: &TableBlock, end: u64) -> bool {
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

    /// Whether a command in `span`, which has been consumed, was refused. `atc`: there was a CMD_ATC_INV in it.
    #[inline]
    fn verdict(&self, span: Span, atc: bool) -> Result<(), Error> {
        // Noted before the SMMU was told to go on, so before it could be seen to have passed.
        let unharmed = self.refused.load(Acquire) <= span.start;
        let refused = !unharmed && self.trouble.lock().refused_in(span, atc);
        if refused { Err(Error::CommandRefused) } else { Ok(()) }
    }

    /// Waits until everything in `span`, whose last command is a CMD_SYNC, has been consumed. `atc`: there was a CMD_ATC_INV in it.
    fn wait(&self, registers: &impl Registers, counters: &Counters, span: Span, atc: bool) -> Result<(), Error> {
        let mut deadline: Option<Deadline> = None;
        let (mut looks, mut linger) = (0, self.linger);
        loop {
            if self.passed(span.end) {
                return self.verdict(span, atc);
            }
            looks += 1;
            match self.ring.turn(span.end) {
                Turn::Wait => core::hint::spin_loop(),
                Turn::Linger if linger != 0 => {
                    linger -= 1;
                    core::hint::spin_loop();
                }
                // What is to come is in memory.
                Turn::Go { told: true } if self.messages.is_some() => core::hint::spin_loop(),
                Turn::Go { told: true } if self.completion == Completion::Event => {
                    if self.visit(registers, counters, span) && !self.passed(span.end) {
                        registers.wait_for_event();
                        looks += SLEEP;
                    }
                }
                Turn::Linger | Turn::Go { .. } => {
                    self.visit(registers, counters, span);
                }
            }
            if looks < LOOKS {
                continue;
            }
            looks = 0;
            self.find_the_reason(registers, counters, span, &mut deadline)?;
        }
    }

    /// Looks at everything that may be the reason why a completion does not come, and at the clock.
    ///
    /// # Errors
    ///
    /// [`Error::Dead`] and [`Error::SyncTimedOut`]: it will not come, or not in time.
    #[cold]
    #[inline(never)] // Keeps the looks at memory short.
    fn find_the_reason(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        span: Span,
        deadline: &mut Option<Deadline>,
    ) -> Result<(), Error> {
        let expired = deadline.get_or_insert_with(|| Deadline::after(self.timeout)).has_passed();
        self.look_closely(registers, counters);
        // A message may be lost; and whoever has the bell may be held up with it.
        if self.messages.is_some() || expired {
            self.look(registers, counters);
        }
        if self.failed.load(Acquire) && !self.passed(span.end) {
            return Err(Error::Dead);
        }
        if expired && self.give_up(span.end) {
            counters.sync_timeouts.add(1);
            return Err(Error::SyncTimedOut);
        }
        Ok(())
    }
}

/// What the SMMU writes to say that the CMD_SYNC at `position` has completed.
const fn tag(position: u64) -> u32 {
    position as u32
}

/// What of the commands that are issued is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Await {
    /// That they are consumed.
    These,
    /// That others are consumed that will be issued behind them.
    Later,
    /// Nothing.
    Nothing,
}

/// The positions from the first command of a batch up to after its last.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u64,
    end: u64,
}
