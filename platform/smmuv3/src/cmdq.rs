//! The command queue: many producers, polled completion, recovery from refused commands (IHI 0070, 3.5, 4.1.3 and 7.1).
//!
//! # Positions
//!
//! Commands are numbered from 0 as they are put into the queue, in 64 bits, so that "everything before position *p* has been
//! consumed" is one comparison however often the queue's indexes wrap. `consumed` follows CMDQ_CONS and never passes
//! `produced`: an index that claims more than was ever issued is counted and believed in nothing.
//!
//! # What makes a completion true
//!
//! A CMD_SYNC is consumed only after every earlier command has completed. A command that the SMMU refuses (CERROR_ILL) is
//! replaced by a CMD_SYNC so that the queue goes on, and its position is written down: a [`Batch`] that contains a refused
//! position fails, however many CMD_SYNCs are consumed after it. A wait that times out leaves the queue *lost* up to its
//! position; until the SMMU is seen to have passed it, every batch is refused with [`Error::Dead`] at once.
//!
//! # Locking
//!
//! One [`IrqMutex`] around claiming slots, writing them, and reading CMDQ_CONS. It is never held while waiting; waits poll
//! with a deadline and take it anew for each look. GERRORN is written only under this lock. Usable in handlers that can afford
//! to wait (none of this driver's do).

use crate::Error;
use crate::counters::Counters;
use crate::registers::Registers;
use crate::spec::command::{self, Command, SIZE};
use crate::spec::queue::QueueSize;
use crate::spec::registers::{self as reg, CERROR_ABT, Gerror, cmdq_cons, queue_base};
use base::time::Duration;
use base::{Deadline, IrqMutex, barrier};
use core::sync::atomic::Ordering::Relaxed;
use iommu::contract::{TableBlock, TableMemory};

/// Commands that a [`Batch`] collects before it puts them into the queue.
const BATCH: usize = 32;
/// Refused positions that are remembered one by one; a batch that missed more than these is taken to contain one.
const REMEMBERED: usize = 8;
/// Aborted reads of the same command before the queue is given up.
const FETCH_ATTEMPTS: u32 = 16;

pub(crate) struct CommandQueue {
    size: QueueSize,
    block: TableBlock,
    timeout: Duration,
    state: IrqMutex<State>,
}

#[derive(Default)]
struct State {
    /// The position of the next command.
    produced: u64,
    /// Everything before this position has been consumed.
    consumed: u64,
    /// The latest refused positions, `refusals` modulo the length being the next to overwrite.
    refused: [u64; REMEMBERED],
    /// How many were refused ever.
    refusals: u64,
    /// A wait for this position has timed out.
    lost: Option<u64>,
    /// The SMMU has failed for good.
    failed: bool,
    /// Aborted reads since the queue last went on.
    aborts: u32,
}

impl CommandQueue {
    /// Allocates a queue of at most 2^`log2` commands.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub fn new(log2: u32, timeout: Duration, memory: &'static dyn TableMemory) -> Result<Self, Error> {
        // A block has at least 64 bytes, that is four commands.
        let size = QueueSize::new(log2);
        let bytes = (size.entries() as usize * SIZE).max(64);
        Ok(Self { size, block: memory.allocate(bytes)?, timeout, state: IrqMutex::default() })
    }

    /// The number of commands that fit.
    pub fn entries(&self) -> u32 {
        self.size.entries()
    }

    /// Tells the SMMU where the queue is, empty. The queue is off.
    pub fn program(&self, registers: &impl Registers) {
        let mut state = self.state.lock();
        *state = State::default();
        let base = queue_base::ALLOC.mask()
            | queue_base::ADDR.address(self.block.phys().get())
            | queue_base::LOG2SIZE.put(u64::from(self.size.log2()));
        registers.write64(reg::CMDQ_BASE, base);
        registers.write32(reg::CMDQ_PROD, 0);
        registers.write32(reg::CMDQ_CONS, 0);
    }

    /// Begins a batch of commands.
    pub fn batch<'a, R: Registers>(&'a self, registers: &'a R, counters: &'a Counters) -> Batch<'a, R> {
        Batch { queue: self, registers, counters, commands: [[0; command::WORDS]; BATCH], len: 0, span: None }
    }

    /// Marks the SMMU as failed for good.
    pub fn fail(&self) {
        self.state.lock().failed = true;
    }

    /// Whether a batch would be refused at once.
    pub fn is_dead(&self, registers: &impl Registers, counters: &Counters) -> bool {
        let mut state = self.state.lock();
        self.look(registers, counters, &mut state);
        state.check_alive().is_err()
    }

    /// Serves an active GERROR.CMDQ_ERR, and acknowledges the other `active` errors. From the interrupt handler.
    pub fn acknowledge(&self, registers: &impl Registers, counters: &Counters) -> Gerror {
        let mut state = self.state.lock();
        let active = active_errors(registers);
        let others = active.difference(Gerror::CMDQ_ERR);
        if !others.is_empty() {
            registers.write32(reg::GERRORN, registers.read32(reg::GERRORN) ^ others.bits());
        }
        self.look(registers, counters, &mut state);
        active
    }

    /// Puts `commands` (at most [`BATCH`]) into the queue, waiting for room. Returns the positions that they took, as the
    /// first one and the one after the last, which are further apart if other producers came in between.
    fn submit(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        commands: &[[u64; command::WORDS]],
        deadline: Deadline,
    ) -> Result<Span, Error> {
        let mut span: Option<Span> = None;
        let mut rest = commands;
        loop {
            let mut state = self.state.lock();
            self.look(registers, counters, &mut state);
            state.check_alive()?;
            let used = u32::try_from(state.produced - state.consumed).unwrap_or(u32::MAX);
            let room = self.size.entries().saturating_sub(used) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            if !now.is_empty() {
                let refusals = state.refusals;
                let start = state.produced;
                self.write(registers, &mut state, now);
                let first = *span.get_or_insert(Span { start, end: start, refusals });
                span = Some(Span { end: state.produced, ..first });
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
            if deadline.has_passed() {
                state.lost = Some(state.produced);
                counters.sync_timeouts.add(1);
                return Err(Error::QueueFull);
            }
            drop(state);
            core::hint::spin_loop();
        }
        Ok(span.unwrap_or_default())
    }

    /// Writes commands for which there is room, and shows them to the SMMU.
    fn write(&self, registers: &impl Registers, state: &mut State, commands: &[[u64; command::WORDS]]) {
        let first = self.slot(state.produced);
        for words in commands {
            let word = self.slot(state.produced) * command::WORDS;
            self.store(word, *words);
            state.produced += 1;
        }
        // The slots may wrap around the end of the queue; the barrier in the last publication covers both runs.
        let count = commands.len();
        let before_wrap = count.min(self.size.entries() as usize - first);
        self.block.publish(first * command::WORDS, (first + before_wrap) * command::WORDS);
        if count > before_wrap {
            self.block.publish(0, (count - before_wrap) * command::WORDS);
        }
        registers.write32(reg::CMDQ_PROD, self.index(state.produced));
    }

    fn store(&self, word: usize, words: [u64; command::WORDS]) {
        for (cell, value) in self.block.iter().skip(word).zip(words) {
            cell.store(value, Relaxed);
        }
    }

    /// The index register's value for a position.
    fn index(&self, position: u64) -> u32 {
        #[allow(clippy::cast_possible_truncation)] // The mask is meant: position and wrap bit.
        let low = position as u32;
        low & self.size.mask()
    }

    fn slot(&self, position: u64) -> usize {
        self.size.slot(self.index(position))
    }

    /// Follows CMDQ_CONS, and gets the queue going again if the SMMU has stopped at an error.
    fn look(&self, registers: &impl Registers, counters: &Counters, state: &mut State) {
        let cons = self.follow(registers, counters, state);
        // CMDQ_CONS.ERR outlives its acknowledgement: it only says that GERROR is worth a look.
        if cmdq_cons::ERR.is_set(cons) && active_errors(registers).contains(Gerror::CMDQ_ERR) && !state.failed {
            self.recover(registers, counters, state);
            self.follow(registers, counters, state);
        }
    }

    fn follow(&self, registers: &impl Registers, counters: &Counters, state: &mut State) -> u64 {
        let cons = u64::from(registers.read32(reg::CMDQ_CONS));
        #[allow(clippy::cast_possible_truncation)] // A field of 20 bits.
        let index = cmdq_cons::RD.get(cons) as u32;
        let advanced = u64::from(self.size.distance(self.index(state.consumed), index));
        if advanced > state.produced - state.consumed {
            counters.bad_indexes.add(1);
        } else if advanced != 0 {
            state.consumed += advanced;
            state.aborts = 0;
        }
        if state.lost.is_some_and(|position| state.consumed >= position) {
            state.lost = None;
        }
        cons
    }

    /// Replaces the command at which the SMMU has stopped by a CMD_SYNC, or has it read again, and acknowledges the error.
    fn recover(&self, registers: &impl Registers, counters: &Counters, state: &mut State) {
        // Read anew: the error that is active now belongs to the index that goes with it.
        let cons = self.follow(registers, counters, state);
        if cmdq_cons::ERR.get(cons) == CERROR_ABT {
            counters.command_fetch_aborts.add(1);
            state.aborts += 1;
            if state.aborts > FETCH_ATTEMPTS {
                state.failed = true;
                return;
            }
        } else if state.consumed < state.produced {
            counters.refused_commands.add(1);
            let next = (state.refusals % REMEMBERED as u64) as usize;
            if let Some(place) = state.refused.get_mut(next) {
                *place = state.consumed;
            }
            state.refusals += 1;
            let word = self.slot(state.consumed) * command::WORDS;
            self.store(word, Command::Sync.encode());
            self.block.publish(word, word + command::WORDS);
        }
        registers.write32(reg::GERRORN, registers.read32(reg::GERRORN) ^ Gerror::CMDQ_ERR.bits());
    }

    /// Waits until everything in `span` has been consumed.
    fn wait(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        span: Span,
        deadline: Deadline,
    ) -> Result<(), Error> {
        loop {
            let expired = deadline.has_passed();
            {
                let mut state = self.state.lock();
                self.look(registers, counters, &mut state);
                if state.consumed >= span.end {
                    let refused = state.refused_in(span);
                    drop(state);
                    // What the devices wrote before they were stopped is read after the look at CMDQ_CONS.
                    barrier::device_read();
                    return if refused { Err(Error::CommandRefused) } else { Ok(()) };
                }
                if state.failed {
                    return Err(Error::Dead);
                }
                if expired {
                    state.lost = Some(state.lost.map_or(span.end, |position| position.max(span.end)));
                    counters.sync_timeouts.add(1);
                    return Err(Error::SyncTimedOut);
                }
            }
            core::hint::spin_loop();
        }
    }
}

impl State {
    fn check_alive(&self) -> Result<(), Error> {
        if self.failed || self.lost.is_some() { Err(Error::Dead) } else { Ok(()) }
    }

    fn refused_in(&self, span: Span) -> bool {
        let new = self.refusals - span.refusals;
        if new > REMEMBERED as u64 {
            return true;
        }
        (0..new).any(|back| {
            let place = ((self.refusals - 1 - back) % REMEMBERED as u64) as usize;
            self.refused.get(place).is_none_or(|&position| span.start <= position && position < span.end)
        })
    }
}

fn active_errors(registers: &impl Registers) -> Gerror {
    Gerror::from_bits_truncate(registers.read32(reg::GERROR) ^ registers.read32(reg::GERRORN))
}

/// The positions from the first command of a batch up to after its last.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u64,
    end: u64,
    /// How many commands had been refused when the first was issued.
    refusals: u64,
}

/// Commands on their way. Nothing is promised until [`Batch::complete`] has returned `Ok`.
#[must_use = "commands are complete only after `complete`"]
pub(crate) struct Batch<'a, R: Registers> {
    queue: &'a CommandQueue,
    registers: &'a R,
    counters: &'a Counters,
    commands: [[u64; command::WORDS]; BATCH],
    len: usize,
    span: Option<Span>,
}

impl<R: Registers> Batch<'_, R> {
    /// Adds a command.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`] or [`Error::Dead`] where commands had to be put into the queue to make room.
    pub fn push(&mut self, command: Command) -> Result<(), Error> {
        if self.len == BATCH {
            self.flush()?;
        }
        if let Some(place) = self.commands.get_mut(self.len) {
            *place = command.encode();
            self.len += 1;
        }
        let counters = self.counters;
        counters.commands.add(1);
        match command {
            Command::Sync => counters.syncs.add(1),
            Command::TlbiNhVa { .. } | Command::TlbiS2Ipa { .. } | Command::AtcInv { .. } => {
                counters.address_invalidations.add(1)
            }
            Command::CfgiSte { .. }
            | Command::CfgiSteRange { .. }
            | Command::CfgiAll
            | Command::CfgiCd { .. }
            | Command::CfgiCdAll { .. } => {
                counters.config_invalidations.add(1);
            }
            Command::TlbiNhAsid { .. }
            | Command::TlbiNhAll { .. }
            | Command::TlbiS12Vmall { .. }
            | Command::TlbiEl2All
            | Command::TlbiNsnhAll => counters.broad_invalidations.add(1),
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let deadline = Deadline::after(self.queue.timeout);
        let commands = self.commands.get(..self.len).unwrap_or_default();
        let span = self.queue.submit(self.registers, self.counters, commands, deadline)?;
        let first = *self.span.get_or_insert(span);
        self.span = Some(Span { end: span.end, ..first });
        self.len = 0;
        Ok(())
    }

    /// Issues everything with a CMD_SYNC behind it and waits until that has been consumed. `Ok` means that every command of
    /// the batch has been executed and completed.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`], [`Error::SyncTimedOut`], [`Error::Dead`], [`Error::CommandRefused`].
    pub fn complete(mut self) -> Result<(), Error> {
        self.push(Command::Sync)?;
        self.flush()?;
        let span = self.span.unwrap_or_default();
        self.queue.wait(self.registers, self.counters, span, Deadline::after(self.queue.timeout))
    }
}
