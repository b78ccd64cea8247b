//! What goes wrong with the command queue, and getting it going again (IHI 0070, 7.1 and 12.3).

use super::{CommandQueue, Span, Words};
use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::Registers;
use crate::spec::command::{self, Command};
use crate::spec::registers::{self as reg, CERROR_ABT, CERROR_ATC_INV_SYNC, Gerror, cmdq_cons};
use core::fmt;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Refused positions that are remembered one by one; a batch that may have missed one of more than these is taken to contain it.
const REMEMBERED: usize = 64;
/// Aborted reads of the same command before the queue is given up.
const FETCH_ATTEMPTS: u32 = 16;

/// Why the SMMU stopped at a command, and at which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandError {
    /// CMDQ_CONS.ERR.
    pub reason: u8,
    /// The command, as it was in the queue.
    pub command: Words,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [w0, w1] = self.command;
        let name = command::name(u8::try_from(command::OPCODE.get(w0)).unwrap_or(0));
        match u64::from(self.reason) {
            CERROR_ABT => write!(f, "CERROR_ABT: reading {name} was aborted"),
            CERROR_ATC_INV_SYNC => f.write_str("CERROR_ATC_INV_SYNC: a device did not answer CMD_ATC_INV"),
            reg::CERROR_ILL => write!(f, "CERROR_ILL: {name} ({w0:#018x} {w1:#018x}) was refused"),
            other => write!(f, "error {other:#x} at {name} ({w0:#018x} {w1:#018x})"),
        }
    }
}

/// A command that was not done.
#[derive(Clone, Copy, Default)]
struct Refusal {
    position: u64,
    /// It is a CMD_SYNC, and some CMD_ATC_INV before it was not answered.
    atc: bool,
}

pub(super) struct Trouble {
    /// The latest refusals, the count of all modulo the length being the next to overwrite. Their positions never go back.
    refused: [Refusal; REMEMBERED],
    refusals: u64,
    /// A wait for this position has timed out.
    lost: Option<u64>,
    /// Aborted reads of the command at `aborted`.
    aborts: u32,
    aborted: u64,
    latest: Option<CommandError>,
}

impl Default for Trouble {
    fn default() -> Self {
        Self { refused: [Refusal::default(); REMEMBERED], refusals: 0, lost: None, aborts: 0, aborted: 0, latest: None }
    }
}

impl Trouble {
    /// Closes the queue until the SMMU is seen to have passed `position`.
    pub fn lose(&mut self, queue: &CommandQueue, position: u64) {
        self.lost = Some(self.lost.map_or(position, |lost| lost.max(position)));
        queue.ring.close();
    }

    /// Notes a refusal, before the SMMU is told to go on.
    fn refuse(&mut self, queue: &CommandQueue, refusal: Refusal) {
        let refusal = match seeded(Bug::RefusalMisplaced) {
            true => Refusal { position: refusal.position.saturating_sub(1), ..refusal },
            false => refusal,
        };
        if let Some(place) = self.refused.get_mut((self.refusals % REMEMBERED as u64) as usize) {
            *place = refusal;
        }
        self.refusals += 1;
        queue.refused.store(refusal.position + 1, Release);
        // Whoever is on the short way looks at nothing but the ring.
        if !seeded(Bug::RefusalUnseen) {
            queue.ring.disturb();
        }
    }

    /// Whether something in `span` was not done.
    pub fn refused_in(&self, span: Span, atc: bool) -> bool {
        let known = self.refused.get(..self.refusals.min(REMEMBERED as u64) as usize).unwrap_or_default();
        // The oldest of them is not older than the span: there may have been others in it that are forgotten.
        let forgotten = self.refusals > REMEMBERED as u64 && known.iter().all(|refusal| refusal.position >= span.start);
        forgotten
            || known.iter().any(|refusal| {
                // A CMD_SYNC speaks of every CMD_ATC_INV before it, whosever.
                let ours = if refusal.atc { atc } else { refusal.position < span.end };
                ours && span.start <= refusal.position
            })
    }
}

impl CommandQueue {
    /// Marks the SMMU as failed for good. Says whether that is news.
    pub fn fail(&self) -> bool {
        // Under the lock, so that nobody opens the queue who has just found the SMMU well.
        let _opening = self.trouble.lock();
        let news = !self.failed.swap(true, Release);
        self.ring.close();
        news
    }

    /// Leaves everything that was ever claimed, and whoever claimed it: the queue was full for too long.
    pub fn abandon(&self) {
        self.trouble.lock().lose(self, self.ring.claimed());
    }

    /// Whether a batch would be refused at once.
    pub fn is_dead(&self, registers: &impl Registers, counters: &Counters) -> bool {
        self.look_closely(registers, counters);
        self.ring.claim(0).is_err() && self.revive(registers, counters).is_err()
    }

    /// The latest error at a command.
    pub fn latest_error(&self) -> Option<CommandError> {
        self.trouble.lock().latest
    }

    /// Opens the queue again if the SMMU has passed the position at which it was lost.
    ///
    /// # Errors
    ///
    /// [`Error::Dead`] if not.
    pub(super) fn revive(&self, registers: &impl Registers, counters: &Counters) -> Result<(), Error> {
        // Whoever gave up may have done so before those that it gave up had told the SMMU of their commands.
        if !seeded(Bug::NoBellOnRevival) {
            self.visit(registers, counters, Span::default());
        }
        self.look(registers, counters);
        let mut trouble = self.trouble.lock();
        let failed = self.failed.load(Acquire) && !seeded(Bug::FailureOpened);
        if failed || trouble.lost.is_some_and(|lost| self.ring.consumed() < lost) {
            return Err(Error::Dead);
        }
        trouble.lost = None;
        self.ring.open();
        Ok(())
    }

    /// Gives up waiting for `end`, unless it has been passed just now.
    pub(super) fn give_up(&self, end: u64) -> bool {
        let mut trouble = self.trouble.lock();
        let late = self.ring.consumed() < end;
        if late {
            trouble.lose(self, end);
        }
        late
    }

    /// Looks for errors that CMDQ_CONS does not tell of, or not yet.
    pub(super) fn look_closely(&self, registers: &impl Registers, counters: &Counters) {
        let active = active_errors(registers);
        if active.contains(Gerror::SFM_ERR) {
            self.service_failure(counters);
        } else if active.contains(Gerror::CMDQ_ERR) {
            self.recover(registers, counters);
        }
    }

    /// The SMMU has entered Service Failure Mode: it does nothing any more, and nobody knows what it did of the last commands.
    fn service_failure(&self, counters: &Counters) {
        if self.fail() {
            counters.service_failures.add(1);
            log::error!("SMMU: Service Failure Mode; it takes no more commands");
        }
    }

    /// Serves an active GERROR.CMDQ_ERR, and acknowledges the other active errors but `keep`. Returns all that are active. For the
    /// interrupt handler.
    pub fn acknowledge(&self, registers: &impl Registers, counters: &Counters, keep: Gerror) -> Gerror {
        let active = {
            let _writes = self.trouble.lock();
            let active = active_errors(registers);
            let others = active.difference(Gerror::CMDQ_ERR | keep);
            if !others.is_empty() {
                registers.write32(reg::GERRORN, registers.read32(reg::GERRORN) ^ others.bits());
            }
            active
        };
        if active.contains(Gerror::SFM_ERR) {
            self.service_failure(counters);
        }
        if active.contains(Gerror::CMDQ_ERR) {
            self.recover(registers, counters);
        }
        active
    }

    /// If the SMMU has stopped at a command: replaces it by a CMD_SYNC, or has it read again, and acknowledges the error.
    #[cold]
    pub(super) fn recover(&self, registers: &impl Registers, counters: &Counters) {
        if !active_errors(registers).contains(Gerror::CMDQ_ERR) {
            return;
        }
        let mut trouble = self.trouble.lock();
        // Another core may have seen to it.
        if self.failed.load(Acquire) || !active_errors(registers).contains(Gerror::CMDQ_ERR) {
            return;
        }
        // Read now: the error that is active belongs to the index that goes with it, which stays until it is acknowledged.
        let before = self.ring.consumed();
        let cons = u64::from(self.follow(registers, counters, || {}));
        let position = self.ring.consumed();
        let believed = u64::from(self.ring.index(position)) == cmdq_cons::RD.get(cons) & u64::from(self.size.mask());
        if !believed || position < before || position >= self.ring.told() {
            // An error at nothing that was issued: there is nothing to put right, and acknowledging could run into anything.
            return;
        }
        let at = self.ring.slot(position) * command::WORDS;
        let mut words = [0; command::WORDS];
        for (word, cell) in words.iter_mut().zip(self.block.iter().skip(at)) {
            *word = cell.load(Relaxed);
        }
        #[allow(clippy::cast_possible_truncation)] // A field of seven bits.
        let reason = cmdq_cons::ERR.get(cons) as u8;
        let error = CommandError { reason, command: words };
        trouble.latest = Some(error);
        let count = match u64::from(reason) {
            CERROR_ABT => {
                counters.command_fetch_aborts.add(1);
                trouble.aborts = if trouble.aborted == position { trouble.aborts + 1 } else { 1 };
                trouble.aborted = position;
                if trouble.aborts > FETCH_ATTEMPTS {
                    drop(trouble);
                    self.fail();
                    log::error!("SMMU: {error}, {FETCH_ATTEMPTS} times; it takes no more commands");
                    return;
                }
                counters.command_fetch_aborts.get()
            }
            CERROR_ATC_INV_SYNC => {
                counters.unanswered_atc_invalidations.add(1);
                trouble.refuse(self, Refusal { position, atc: true });
                base::barrier::publish();
                counters.unanswered_atc_invalidations.get()
            }
            _ => {
                counters.refused_commands.add(1);
                trouble.refuse(self, Refusal { position, atc: false });
                if !seeded(Bug::ErrorAckedWithoutRepair) {
                    self.store(position, Command::Sync.encode());
                }
                if !seeded(Bug::RepairNotPublished) {
                    self.publish(position..position + 1);
                }
                counters.refused_commands.get()
            }
        };
        registers.write32(reg::GERRORN, registers.read32(reg::GERRORN) ^ Gerror::CMDQ_ERR.bits());
        drop(trouble);
        // A device can make the SMMU stop again and again: told at every doubling.
        if count.is_power_of_two() {
            log::error!("SMMU: {error} ({count} times so far)");
        }
    }
}

fn active_errors(registers: &impl Registers) -> Gerror {
    Gerror::from_bits_truncate(registers.read32(reg::GERROR) ^ registers.read32(reg::GERRORN))
}
