//! The way of a few commands with a CMD_SYNC behind them: what every revocation issues.
//!
//! The same steps as a [`Batch`](super::Batch) takes, without the parts that few need: the commands are at hand, all are claimed
//! at once, and the CMD_SYNC has mostly been consumed by the time of the first look. Whatever is otherwise (no room, a closed
//! queue, another core that claims at the same moment, a completion that takes its time) goes the general way.

use super::{CommandQueue, Span, Words};
use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::{Doorbell, Register, Registers};
use crate::spec::command;
use crate::spec::registers as reg;
use base::cpu::Masked;
use base::{barrier, cpu};
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

/// What is left to do for a command that is not known to have been completed.
pub(crate) enum Later {
    /// Everything: it was not issued.
    Issue,
    /// It and its CMD_SYNC are written, from the position `start` on, and the SMMU has to be told of them when it is their turn.
    Tell { start: u64, refusals: u64, masked: Masked },
    /// The SMMU has been told of everything before `end`, but perhaps not of what others have written behind.
    TellOthers { end: u64, refusals: u64, masked: Masked },
    /// The SMMU has not been seen to have passed `end`, or has refused something.
    Await { end: u64, refusals: u64 },
}

impl CommandQueue {
    /// Issues `commands` with a CMD_SYNC behind them and waits until that has been consumed. `Ok` means that every one of them has
    /// been executed and completed. There is no CMD_ATC_INV among them, and they are invalidations by address.
    ///
    /// # Errors
    ///
    /// As [`Batch::complete`](super::Batch::complete).
    pub fn execute(&self, registers: &impl Registers, counters: &Counters, commands: &[Words]) -> Result<(), Error> {
        counters.quick.add(1);
        if commands.len() != 1 {
            counters.quick_more.add((commands.len() as u64).wrapping_sub(1));
        }
        let refusals = self.refusals.load(Acquire);
        let Some(run) = self.issue_all(registers, commands) else {
            let span = self.submit(registers, counters, commands, !seeded(Bug::NoSync), true)?;
            return self.wait(registers, counters, span, false);
        };
        if seeded(Bug::SyncNotAwaited) {
            return Ok(());
        }
        let span = Span { start: run.start, end: run.end, refusals };
        // As `wait` does, but for what needs a clock.
        if self.passed(registers, counters, span.end) && self.refusals.load(Acquire) == refusals {
            return Ok(());
        }
        self.wait(registers, counters, span, false)
    }

    /// [`Self::execute`] for one command, as far as nothing has to be waited for. `BARRIER`: the queue is in memory that a barrier
    /// publishes. Calls nothing that comes back: what is left is the caller's last call.
    ///
    /// # Errors
    ///
    /// What is left to do, by [`Self::finish`].
    #[inline(always)] // Into the few places that call it.
    pub fn execute_one<R: Registers, const BARRIER: bool>(
        &self,
        doorbell: &Doorbell<R>,
        command: Words,
    ) -> Result<(), Later> {
        // These bugs are in the other ways.
        if seeded(Bug::NoSync)
            || seeded(Bug::QueueOverfilled)
            || seeded(Bug::SyncNotAwaited)
            || seeded(Bug::ProdBeforeCommands)
        {
            return Err(Later::Issue);
        }
        // A message is awaited where it arrives, not at the register.
        if self.messages.is_some() {
            return Err(Later::Issue);
        }
        let refusals = self.refusals.load(Acquire);
        let masked = cpu::mask_interrupts();
        let Some((run, at, cells)) = self.claim_two() else { return Err(Later::Issue) };
        let (start, end, index) = (run.start, run.end, self.ring.index(run.end));
        let [command0, command1, sync0, sync1] = cells;
        for (cell, word) in
            [(command0, command[0]), (command1, command[1]), (sync0, self.sync[0]), (sync1, self.sync[1])]
        {
            cell.store(word, Relaxed);
        }
        if !seeded(Bug::CommandNotPublished) {
            self.block.publish_as::<BARRIER>(at, at.wrapping_add(2 * command::WORDS));
        }
        if !self.ring.take_bell_for(&run) {
            return Err(Later::Tell { start, refusals, masked });
        }
        let wrap = if seeded(Bug::WrapDropped) { self.size.entries() } else { 0 };
        doorbell.prod.write(index & !wrap);
        if !self.ring.give_bell_back(end) {
            return Err(Later::TellOthers { end, refusals, masked });
        }
        drop(masked);
        // Read after the bell was rung. Without an error, and exactly at the end of what was issued. Of all positions that look so
        // this is the first that the SMMU can be at: a claim leaves it no further behind than the queue is long, and half of what
        // an index counts lies behind it. What is known as consumed stays as it was; it is looked at again when room is short.
        let cons = doorbell.cons.read();
        barrier::device_read();
        // The refusals are read after that (which is why they need no order of their own).
        if cons == index && self.refusals.load(Relaxed) == refusals {
            return Ok(());
        }
        Err(Later::Await { end, refusals })
    }

    /// Claims slots for a command and a CMD_SYNC that lie side by side: their positions, the first word's place, the words. Called
    /// with interrupts masked.
    #[inline(always)]
    fn claim_two(&self) -> Option<(Range<u64>, usize, &[AtomicU64; 2 * command::WORDS])> {
        let next = self.ring.next();
        let at = self.ring.slot(next).wrapping_mul(command::WORDS);
        // At the end of the queue, the other way is as good.
        let cells = self.block.get(at..)?.first_chunk()?;
        Some((self.ring.claim_from(next, 2)?, at, cells))
    }

    /// Does what [`Self::execute_one`] has left.
    ///
    /// # Errors
    ///
    /// As [`Self::execute`].
    #[cold]
    pub fn finish(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        command: Words,
        later: Later,
    ) -> Result<(), Error> {
        let tell = |index| self.tell(registers, index);
        let (end, refusals) = match later {
            Later::Issue => {
                // There may be more room than is known.
                if self.messages.is_none() {
                    self.look(registers, counters);
                }
                return self.execute(registers, counters, &[command]);
            }
            Later::Tell { start, refusals, masked } => {
                let end = start.wrapping_add(2);
                self.ring.finish_and_ring_in_turn(start..end, tell);
                drop(masked);
                (end, refusals)
            }
            Later::TellOthers { end, refusals, masked } => {
                self.ring.ring_for_others(end, tell);
                drop(masked);
                (end, refusals)
            }
            Later::Await { end, refusals } => (end, refusals),
        };
        let start = end.wrapping_sub(2);
        self.wait(registers, counters, Span { start, end, refusals }, false)
    }

    /// How many commands went the way of [`Self::execute_one`], each with a CMD_SYNC: whatever did not go another way.
    pub fn one_by_one(&self) -> u64 {
        let claimed = self.ring.claimed();
        claimed.saturating_sub(self.others.load(Acquire)) / 2
    }

    /// Claims slots for all of `commands` and a CMD_SYNC, writes them, and rings the bell; or does nothing.
    #[inline]
    fn issue_all(&self, registers: &impl Registers, commands: &[Words]) -> Option<Range<u64>> {
        if seeded(Bug::NoSync) || seeded(Bug::QueueOverfilled) {
            return None;
        }
        cpu::without_interrupts(|| {
            let run = self.ring.claim_all(commands.len() as u64 + 1)?;
            self.others.fetch_add(run.end.wrapping_sub(run.start), Relaxed);
            if seeded(Bug::ProdBeforeCommands) {
                registers.write32(reg::CMDQ_PROD, self.ring.index(run.end));
            }
            let mut position = run.start;
            for words in commands {
                self.store(position, *words);
                position = position.wrapping_add(1);
            }
            self.store(position, self.sync_at(position));
            self.publish(run.clone());
            self.ring.finish_and_ring(run.clone(), |index| self.tell(registers, index));
            Some(run)
        })
    }
}
