//! Which stream has what, and the changing of it.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the table of streams. A change of an STE takes several invalidations and waits, during which no lock
//! is held: the stream is marked as being changed instead, and whoever wants to change the same stream waits for the mark, with
//! a deadline.
//!
//! # Lifetimes
//!
//! A stream holds its address space. The old one is let go only after the SMMU has completed the change; if it does not,
//! both stay in memory for ever, because the SMMU may be walking either.

use crate::Error;
use crate::bugs::{Bug, seeded};
use crate::entry::{Entry, Kind, Sink, update};
use crate::registers::Registers;
use crate::smmu::Shared;
use crate::spec::command::Command;
use crate::strtab::Slot;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use base::{Deadline, IrqMutex};
use iommu::contract::AddressSpace;
use iommu::{AttachError, StreamId};

/// What becomes of a stream's transactions.
#[derive(Clone, Default)]
pub(crate) enum Treatment {
    /// They are aborted.
    #[default]
    Blocked,
    /// They are translated by an address space.
    Translated(Arc<dyn AddressSpace>),
    /// They pass untranslated.
    Bypass,
}

#[derive(Default)]
struct Stream {
    treatment: Treatment,
    /// Somebody is changing the STE.
    changing: bool,
    /// The SMMU may have cached something older than the STE in memory.
    stale: bool,
}

/// All streams that were ever attached.
#[derive(Default)]
pub(crate) struct Streams {
    table: IrqMutex<BTreeMap<u32, Stream>>,
}

impl Streams {
    /// Marks `stream` as being changed, and says whether its STE is stale.
    fn begin(&self, stream: StreamId, deadline: Deadline) -> Result<bool, AttachError> {
        loop {
            let expired = deadline.has_passed();
            {
                let mut table = self.table.lock();
                let entry = table.entry(stream.get()).or_default();
                if !entry.changing {
                    entry.changing = true;
                    return Ok(entry.stale);
                }
            }
            if expired {
                return Err(AttachError::TimedOut);
            }
            core::hint::spin_loop();
        }
    }

    /// Ends a change. Returns what the stream had, for the caller to drop with no lock held.
    fn end(&self, stream: StreamId, treatment: Option<Treatment>, stale: bool) -> Option<Treatment> {
        let mut table = self.table.lock();
        let entry = table.entry(stream.get()).or_default();
        entry.changing = false;
        entry.stale = stale;
        treatment.map(|treatment| core::mem::replace(&mut entry.treatment, treatment))
    }

    /// How many streams are not blocked.
    pub fn attached(&self) -> usize {
        self.table.lock().values().filter(|stream| !matches!(stream.treatment, Treatment::Blocked)).count()
    }
}

impl<R: Registers> Shared<R> {
    /// Gives `stream` another STE and another treatment.
    ///
    /// # Errors
    ///
    /// [`AttachError::NoSuchStream`] and [`AttachError::OutOfMemory`], after which nothing has changed;
    /// [`AttachError::TimedOut`] and [`AttachError::Dead`], after which the STE in memory aborts, but the SMMU may not have
    /// taken notice.
    pub fn change(&self, stream: StreamId, target: &Entry, treatment: Treatment) -> Result<(), AttachError> {
        let Some(slot) = self.table.slot(stream)? else { return Err(AttachError::NoSuchStream(stream)) };
        let stale = self.streams.begin(stream, Deadline::after(self.config.sync_timeout))?;
        if seeded(Bug::SpaceFreedEarly) {
            drop(self.streams.end(stream, Some(Treatment::Blocked), stale));
        }
        let mut sink = SteSink { shared: self, slot: &slot, stream };
        let result = if stale { sink.sync() } else { Ok(()) };
        let result = result.and_then(|()| update(Kind::Ste, &slot.read(), target, &mut sink));
        match result {
            Ok(_) => {
                let old = self.streams.end(stream, Some(treatment), false);
                drop(old);
                Ok(())
            }
            Err(error) => {
                // One store, whatever state the entry is in: Config has no other way to abort, and V stays set.
                if let Some(&word) = crate::descriptors::ste_abort().first() {
                    slot.store(0, word);
                }
                let old = self.streams.end(stream, Some(Treatment::Blocked), !seeded(Bug::StaleForgotten));
                self.leak(old);
                self.leak(Some(treatment));
                Err(error.into())
            }
        }
    }

    /// Keeps an address space for ever: the SMMU may still walk it.
    fn leak(&self, treatment: Option<Treatment>) {
        if let Some(Treatment::Translated(space)) = treatment
            && !seeded(Bug::FailedSpaceFreed)
        {
            self.counters.leaked_spaces.add(1);
            core::mem::forget(space);
        }
    }
}

struct SteSink<'a, R: Registers> {
    shared: &'a Shared<R>,
    slot: &'a Slot<'a>,
    stream: StreamId,
}

impl<R: Registers> Sink for SteSink<'_, R> {
    fn store(&mut self, index: usize, word: u64) {
        self.slot.store(index, word);
    }

    fn sync(&mut self) -> Result<(), Error> {
        let mut batch = self.shared.batch();
        // Leaf clear: the L1STD may be new, linked by this core or by one that has not got as far as this.
        let sid = self.stream.get() ^ u32::from(seeded(Bug::CfgiWrongStream));
        if !seeded(Bug::NoCfgiSte) {
            batch.push(Command::CfgiSte { sid, leaf: seeded(Bug::CfgiLeafOnly) })?;
        }
        batch.complete()
    }
}
