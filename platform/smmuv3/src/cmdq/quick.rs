//! The way of a few commands with a CMD_SYNC behind them: what every revocation issues.
//!
//! The same steps as a [`Batch`](super::Batch) takes, without the parts that few need: the commands are at hand, all are claimed
//! at once together with the bell, and the CMD_SYNC has mostly been consumed by the time of the first look. Whatever is otherwise (no room, a
//! closed queue, other cores, a completion that takes its time, an error) goes the general way.

use super::{CommandQueue, Span, Words};
use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::{Doorbell, Register, Registers};
use crate::spec::command;
use base::cpu::Masked;
use base::{barrier, cpu};
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

/// What is left to do for a command that is not known to have been completed.
pub(crate) enum Later {
    /// Everything: it was not issued.
    Issue,
    /// The bell has to be given back to others. `cons` is CMDQ_CONS, read after the SMMU was told of everything before `end`.
    Leave { end: u64, cons: u32, masked: Masked },
    /// The SMMU has been told of everything before `end`, and not been seen to have passed it.
    Await { end: u64 },
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
        let span = self.submit(registers, counters, commands, !seeded(Bug::NoSync), true)?;
        if seeded(Bug::SyncNotAwaited) {
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
        let masked = cpu::mask_interrupts();
        let Some((run, at, cells)) = self.claim_two() else { return Err(Later::Issue) };
        let (end, index) = (run.end, self.ring.index(run.end));
        self.ring.telling(end);
        let [command0, command1, sync0, sync1] = cells;
        for (cell, word) in
            [(command0, command[0]), (command1, command[1]), (sync0, self.sync[0]), (sync1, self.sync[1])]
        {
            cell.store(word, Relaxed);
        }
        if !seeded(Bug::CommandNotPublished) {
            self.block.publish_as::<BARRIER>(at, at.wrapping_add(2 * command::WORDS));
        }
        let wrap = if seeded(Bug::WrapDropped) { self.size.entries() } else { 0 };
        doorbell.prod.write(index & !wrap);
        let cons = doorbell.cons.read();
        barrier::device_read();
        // After that: a refusal that the SMMU went on from has been noted by now, and whoever noted it has disturbed us.
        if !self.ring.leave_alone(end) {
            return Err(Later::Leave { end, cons, masked });
        }
        drop(masked);
        // Without an error, and exactly at the end of what was issued. Of all positions that look so this is the first that the
        // SMMU can be at: a claim leaves it no further behind than the queue is long, and half of what an index counts lies
        // behind it. What is known as consumed stays as it was; it is looked at again when room is short.
        if cons == index { Ok(()) } else { Err(Later::Await { end }) }
    }

    /// Claims slots for a command and a CMD_SYNC that lie side by side, with the bell, if nobody is here: their positions, the first
    /// word's place, the words. Called with interrupts masked.
    #[inline(always)]
    fn claim_two(&self) -> Option<(Range<u64>, usize, &[AtomicU64; 2 * command::WORDS])> {
        let next = self.ring.next();
        let at = self.ring.slot(next).wrapping_mul(command::WORDS);
        // At the end of the queue, the other way is as good.
        let cells = self.block.get(at..)?.first_chunk()?;
        Some((self.ring.claim_alone(next, 2)?, at, cells))
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
        let end = match later {
            Later::Issue => {
                // There may be more room than is known.
                if !self.ring.is_crowded() {
                    self.look(registers, counters);
                }
                return self.execute(registers, counters, &[command]);
            }
            Later::Leave { end, cons, masked } => {
                let behind = self.ring.behind();
                // As in `execute_one`. The others begin where this ends.
                if cons == self.ring.index(end) {
                    self.ring.reached(end);
                }
                self.leave(registers, 1, behind);
                drop(masked);
                end
            }
            Later::Await { end } => end,
        };
        self.wait(registers, counters, Span { start: end.wrapping_sub(2), end }, false)
    }

    /// How many commands went the way of [`Self::execute_one`], each with a CMD_SYNC: whatever did not go another way.
    pub fn one_by_one(&self) -> u64 {
        let claimed = self.ring.claimed();
        claimed.saturating_sub(self.others.load(Acquire)) / 2
    }
}
