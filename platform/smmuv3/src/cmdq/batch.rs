//! Commands on their way to the queue.

use super::{CHUNK, CommandQueue, Span, Words};
use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::counters::Counters;
use crate::registers::Registers;
use crate::spec::command::{self, Command, opcode};

/// Commands on their way. Nothing is promised until [`Batch::complete`] has returned `Ok`.
#[must_use = "commands are complete only after `complete`"]
pub(crate) struct Batch<'a, R: Registers> {
    queue: &'a CommandQueue,
    registers: &'a R,
    counters: &'a Counters,
    commands: [Words; CHUNK],
    len: usize,
    span: Option<Span>,
    /// There is a CMD_ATC_INV among the commands.
    atc: bool,
    issued: Issued,
}

/// What was pushed; added to the counters once for the batch.
#[derive(Default)]
struct Issued {
    config: u64,
    by_address: u64,
    broad: u64,
    other: u64,
}

impl<'a, R: Registers> Batch<'a, R> {
    pub(super) fn new(queue: &'a CommandQueue, registers: &'a R, counters: &'a Counters) -> Self {
        let commands = [[0; command::WORDS]; CHUNK];
        Batch { queue, registers, counters, commands, len: 0, span: None, atc: false, issued: Issued::default() }
    }

    /// Adds a command.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`] or [`Error::Dead`] where commands had to be put into the queue to make room.
    #[inline]
    pub fn push(&mut self, command: Command) -> Result<(), Error> {
        if self.len == CHUNK {
            self.flush(false)?;
        }
        let words = command.encode();
        if let Some(place) = self.commands.get_mut(self.len) {
            *place = words;
            self.len += 1;
        }
        let issued = &mut self.issued;
        match command::OPCODE.get(words[0]) {
            opcode::CFGI_STE..=opcode::CFGI_CD_ALL => issued.config += 1,
            opcode::TLBI_NH_VA | opcode::TLBI_NH_VAA | opcode::TLBI_S2_IPA => issued.by_address += 1,
            opcode::TLBI_NH_ALL..=opcode::TLBI_NSNH_ALL => issued.broad += 1,
            opcode::ATC_INV => {
                self.atc = true;
                issued.other += 1;
            }
            _ => issued.other += 1,
        }
        Ok(())
    }

    /// Writes what was collected to the queue; with `last`, a CMD_SYNC behind it, and shows all of it to the SMMU.
    #[inline]
    fn flush(&mut self, last: bool) -> Result<(), Error> {
        let commands = self.commands.get(..self.len).unwrap_or_default();
        let span = self.queue.submit(self.registers, self.counters, commands, last, last)?;
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
        self.count();
        self.flush(!seeded(Bug::NoSync))?;
        if seeded(Bug::SyncNotAwaited) {
            return Ok(());
        }
        let span = self.span.unwrap_or_default();
        self.queue.wait(self.registers, self.counters, span, self.atc)
    }

    fn count(&self) {
        let Issued { config, by_address, broad, other } = self.issued;
        let counters = self.counters;
        counters.commands.add(config + by_address + broad + other + 1);
        counters.syncs.add(1);
        for (counter, count) in [
            (&counters.config_invalidations, config),
            (&counters.address_invalidations, by_address),
            (&counters.broad_invalidations, broad),
        ] {
            if count != 0 {
                counter.add(count);
            }
        }
    }
}
