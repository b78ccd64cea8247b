//! The way of a few commands with a CMD_SYNC behind them: what every revocation issues.
//!
//! The same steps as a [`Batch`](super::Batch) takes, without the parts that few need: the commands are at hand, all are claimed
//! at once, and the CMD_SYNC has mostly been consumed by the time of the first look. Whatever is otherwise (no room, a closed
//! queue, another core that claims at the same moment, a completion that takes its time) goes the general way.

use super::{CommandQueue, Span, Words};
use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::Registers;
use crate::spec::command;
use crate::spec::registers as reg;
use base::{barrier, cpu};
use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

/// A command that is not known to have been completed.
#[derive(Clone, Copy)]
pub(crate) struct Later {
    /// The position after its CMD_SYNC, or 0 if it was not issued.
    end: u64,
    refusals: u64,
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

    /// [`Self::execute`] for one command, as far as nothing has to be waited for.
    ///
    /// # Errors
    ///
    /// What [`Self::finish`] needs to do the rest.
    #[inline(always)] // Into the one place that calls it.
    pub fn execute_one(&self, registers: &impl Registers, counters: &Counters, command: Words) -> Result<(), Later> {
        let refusals = self.refusals.load(Acquire);
        let Some(end) = self.issue_one(registers, command) else { return Err(Later { end: 0, refusals }) };
        counters.quick.add(1);
        // Read after the bell was rung. Without an error, and exactly at the end of what the SMMU has been told: of all positions
        // that look so only this one lies between what was consumed before and what is published.
        let cons = registers.read32(reg::CMDQ_CONS);
        barrier::device_read();
        if cons == self.ring.index(end) && self.ring.published() >= end {
            self.ring.reached(end);
            if self.refusals.load(Acquire) == refusals {
                return Ok(());
            }
        }
        Err(Later { end, refusals })
    }

    /// Does what [`Self::execute_one`] has left.
    ///
    /// # Errors
    ///
    /// As [`Self::execute`].
    #[cold]
    #[inline(never)]
    pub fn finish(
        &self,
        registers: &impl Registers,
        counters: &Counters,
        command: Words,
        later: Later,
    ) -> Result<(), Error> {
        let Later { end, refusals } = later;
        match end.checked_sub(2) {
            Some(start) => self.wait(registers, counters, Span { start, end, refusals }, false),
            None => self.execute(registers, counters, &[command]),
        }
    }

    /// Claims slots for `command` and a CMD_SYNC, writes them, and rings the bell; or does nothing. Returns the position after them.
    #[inline(always)]
    fn issue_one(&self, registers: &impl Registers, command: Words) -> Option<u64> {
        // These bugs are in the other ways.
        if seeded(Bug::NoSync)
            || seeded(Bug::QueueOverfilled)
            || seeded(Bug::SyncNotAwaited)
            || seeded(Bug::ProdBeforeCommands)
        {
            return None;
        }
        cpu::without_interrupts(|| {
            let next = self.ring.next();
            let at = self.ring.slot(next).wrapping_mul(command::WORDS);
            // Where the two do not lie side by side (at the end of the queue), the other way is as good.
            let [command0, command1, sync0, sync1] = self.block.get(at..)?.first_chunk()?;
            let run = self.ring.claim_from(next, 2)?;
            let sync = self.sync_at(run.start.wrapping_add(1));
            for (cell, word) in [(command0, command[0]), (command1, command[1]), (sync0, sync[0]), (sync1, sync[1])] {
                cell.store(word, Relaxed);
            }
            if !seeded(Bug::CommandNotPublished) {
                self.block.publish(at, at.wrapping_add(2 * command::WORDS));
            }
            self.ring.finish_and_ring(run.clone(), |index| self.tell(registers, index));
            Some(run.end)
        })
    }

    /// Claims slots for all of `commands` and a CMD_SYNC, writes them, and rings the bell; or does nothing.
    #[inline]
    fn issue_all(&self, registers: &impl Registers, commands: &[Words]) -> Option<Range<u64>> {
        if seeded(Bug::NoSync) || seeded(Bug::QueueOverfilled) {
            return None;
        }
        cpu::without_interrupts(|| {
            let run = self.ring.claim_all(commands.len() as u64 + 1)?;
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
            self.ring.finish(run.clone());
            self.ring_bell(registers);
            Some(run)
        })
    }
}
