//! The command queue.
//!
//! # Locking
//!
//! One lock guards the write position; it is held while commands are written, never while they are waited for. Handlers may
//! put a command in (`try_put`), so it masks interrupts.
//!
//! # Completion
//!
//! Positions are counted from the beginning of time; `GITS_CREADR` tells them modulo the queue's size, and there are never
//! more commands under way than that.

use super::command::{Command, WORDS};
use crate::GicError;
use crate::regs::{Registers, STEP_MILLIS, write_table_register};
use base::{Deadline, IrqMutex};
use core::sync::atomic::Ordering;
use iommu::contract::{TableBlock, TableMemory};

const CBASER: usize = 0x80;
const CWRITER: usize = 0x88;
const CREADR: usize = 0x90;

const VALID: u64 = 1 << 63;
const INNER_CACHE_SHIFT: u32 = 59;
const READ_STALLED: u64 = 1;

/// Bytes in the queue; the architecture aligns it to 64 KiB.
const BYTES: usize = 1 << 16;
/// Commands in the queue.
const SLOTS: u64 = (BYTES / (8 * WORDS)) as u64;

struct State {
    memory: TableBlock,
    /// Commands ever put in.
    put: u64,
    /// Commands known to have been consumed.
    taken: u64,
    dead: bool,
}

pub(crate) struct CommandQueue {
    state: IrqMutex<State>,
    snoops: bool,
}

impl CommandQueue {
    /// Gives the (disabled) ITS an empty queue.
    pub fn new(regs: &dyn Registers, memory: &'static dyn TableMemory) -> Result<Self, GicError> {
        let memory = memory.allocate(BYTES)?;
        let base = VALID | memory.phys().get() | (BYTES as u64 / 4096 - 1);
        let (kept, snoops) = write_table_register(regs, CBASER, INNER_CACHE_SHIFT, base);
        let mask = VALID | 0x000f_ffff_ffff_f0ff;
        if kept & mask != base {
            return Err(GicError::TableRejected("command"));
        }
        regs.write64(CWRITER, 0);
        Ok(Self { state: IrqMutex::new(State { memory, put: 0, taken: 0, dead: false }), snoops })
    }

    /// Whether the ITS snoops the caches for its commands.
    pub fn snoops(&self) -> bool {
        self.snoops
    }

    /// Puts `commands` in and waits until all are consumed. The caller holds no lock.
    ///
    /// # Errors
    ///
    /// [`GicError::TimedOut`]: the commands may still take effect. [`GicError::Dead`]: the ITS stalled at one; this and all
    /// later calls fail.
    pub fn run(&self, regs: &dyn Registers, commands: &[Command]) -> Result<(), GicError> {
        // Room for all of a chunk at once: one command is always left free, or a full queue would look empty.
        for chunk in commands.chunks(SLOTS as usize / 2) {
            let deadline = Deadline::after_millis(STEP_MILLIS);
            let target = loop {
                if let Some(target) = self.state.lock().put(regs, chunk)? {
                    break target;
                }
                expire(deadline)?;
            };
            while self.state.lock().progress(regs)? < target {
                expire(deadline)?;
            }
        }
        Ok(())
    }

    /// Puts one command in without waiting for its completion, if that can be done at once. For handlers.
    pub fn try_put(&self, regs: &dyn Registers, command: Command) -> bool {
        self.state.try_lock().is_some_and(|mut state| matches!(state.put(regs, &[command]), Ok(Some(_))))
    }
}

fn expire(deadline: Deadline) -> Result<(), GicError> {
    if deadline.has_passed() {
        return Err(GicError::TimedOut("the ITS did not consume its commands"));
    }
    core::hint::spin_loop();
    Ok(())
}

impl State {
    /// Puts commands in and rings the bell. Returns the count at which they are consumed, or `None` if there is no room.
    fn put(&mut self, regs: &dyn Registers, commands: &[Command]) -> Result<Option<u64>, GicError> {
        let taken = self.progress(regs)?;
        if self.put - taken + commands.len() as u64 >= SLOTS {
            return Ok(None);
        }
        for command in commands {
            let first = (self.put % SLOTS) as usize * WORDS;
            for (offset, word) in command.0.iter().enumerate() {
                if let Some(slot) = self.memory.get(first + offset) {
                    slot.store(word.to_le(), Ordering::Relaxed);
                }
            }
            self.memory.publish(first, first + WORDS);
            self.put += 1;
        }
        regs.write64(CWRITER, (self.put % SLOTS) << 5);
        Ok(Some(self.put))
    }

    /// Looks how far the ITS is.
    fn progress(&mut self, regs: &dyn Registers) -> Result<u64, GicError> {
        if self.dead {
            return Err(GicError::Dead);
        }
        let read = regs.read64(CREADR);
        let position = read >> 5 & 0x7fff;
        let step = (position + SLOTS).wrapping_sub(self.taken % SLOTS) % SLOTS;
        if read & READ_STALLED != 0 || position >= SLOTS || self.taken + step > self.put {
            self.dead = true;
            log::error!("ITS: stalled at GITS_CREADR {read:#x} after {} of {} commands", self.taken, self.put);
            return Err(GicError::Dead);
        }
        self.taken += step;
        Ok(self.taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeIts, FakeMemory};
    use alloc::boxed::Box;

    #[test]
    fn a_full_queue_takes_no_more_and_loses_nothing() {
        let its = FakeIts::default();
        let memory: &'static FakeMemory = Box::leak(Box::default());
        let queue = CommandQueue::new(&its, memory).unwrap();
        its.0.lock().unwrap().quirks.mute = true;
        let put = (0..3_000).filter(|number| queue.try_put(&its, Command::invall(*number))).count();
        assert_eq!(put as u64, SLOTS - 1);
        its.0.lock().unwrap().quirks.mute = false;
        its.0.lock().unwrap().run();
        queue.run(&its, &[Command::invall(9_999)]).unwrap();
        let seen = its.0.lock().unwrap().log.iter().map(|command| command[2]).collect::<alloc::vec::Vec<_>>();
        let expected = (0..SLOTS - 1).chain([9_999]).collect::<alloc::vec::Vec<_>>();
        assert_eq!(seen, expected);
    }
}
