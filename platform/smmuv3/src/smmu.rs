//! One SMMU, as the rest of the kernel sees it.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`; the reasons are with the implementation.

use crate::Error;
use crate::cmdq::{Batch, CommandQueue};
use crate::counters::{Counters, Statistics};
use crate::descriptors::{ste_abort, ste_bypass};
use crate::evtq::EventQueue;
use crate::features::Features;
use crate::ids::Ids;
use crate::registers::Registers;
use crate::space::Space;
use crate::spec::registers::Gerror;
use crate::start::Config;
use crate::streams::{Streams, Treatment};
use crate::strtab::StreamTable;
use alloc::sync::Arc;
use base::irq::Handler;
use core::any::Any;
use core::fmt;
use iommu::contract::{AddressSpace, Iommu, TableMemory};
use iommu::pgtable::Granule;
use iommu::{AttachError, FaultSink, StreamId};

/// What the handle, the address spaces and the interrupt handlers share.
pub(crate) struct Shared<R: Registers> {
    pub registers: R,
    pub memory: &'static dyn TableMemory,
    pub sink: Arc<dyn FaultSink>,
    pub config: Config,
    pub features: Features,
    pub granule: Granule,
    pub table: StreamTable,
    pub commands: CommandQueue,
    pub events: EventQueue,
    pub asids: Ids,
    pub vmids: Ids,
    pub streams: Streams,
    pub counters: Counters,
    pub window_closed: bool,
}

impl<R: Registers> Shared<R> {
    pub fn batch(&self) -> Batch<'_, R> {
        self.commands.batch(&self.registers, &self.counters)
    }

    fn serve_events(&self) {
        self.events.drain(&self.registers, &self.counters, &*self.sink);
    }

    fn serve_errors(&self) {
        let active = self.commands.acknowledge(&self.registers, &self.counters);
        if active.contains(Gerror::SFM_ERR) {
            self.commands.fail();
        }
        if active.contains(Gerror::EVENTQ_ABT_ERR) {
            self.counters.event_overflows.add(1);
            self.serve_events();
        }
        let others = active.difference(Gerror::CMDQ_ERR | Gerror::EVENTQ_ABT_ERR);
        self.counters.other_global_errors.add(u64::from(others.bits().count_ones()));
        if !active.is_empty() || self.events.backlog() {
            base::notify();
        }
    }
}

/// An SMMUv3 that translates. Cloning gives another handle to the same SMMU.
pub struct Smmu<R: Registers> {
    shared: Arc<Shared<R>>,
}

impl<R: Registers> Clone for Smmu<R> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<R: Registers> Smmu<R> {
    /// Starts the SMMU behind `registers`, with tables and queues from `memory`: every stream is blocked. Faults go to `sink`,
    /// from the interrupt handlers. An SMMU is never taken down again.
    ///
    /// # Errors
    ///
    /// See [`Error`]. The SMMU then aborts everything, as far as it could be made to.
    pub fn new(
        registers: R,
        memory: &'static dyn TableMemory,
        sink: Arc<dyn FaultSink>,
        config: Config,
    ) -> Result<Self, Error> {
        Ok(Self { shared: Shared::start(registers, memory, sink, config)? })
    }

    /// What the SMMU can do.
    pub fn features(&self) -> &Features {
        &self.shared.features
    }

    /// Whether the SMMU could be told to abort everything before it was enabled. If not, devices could reach memory
    /// untranslated from reset until translation was switched on.
    pub fn boot_window_closed(&self) -> bool {
        self.shared.window_closed
    }

    /// What has been counted.
    pub fn statistics(&self) -> Statistics {
        self.shared.counters.snapshot()
    }

    /// Streams that are not blocked.
    pub fn attached_streams(&self) -> usize {
        self.shared.streams.attached()
    }

    /// Whether the SMMU takes no more commands: an invalidation is overdue, or it has failed.
    pub fn is_dead(&self) -> bool {
        self.shared.commands.is_dead(&self.shared.registers, &self.shared.counters)
    }

    /// Does what both interrupt handlers do. For a kernel that polls, and for what a flood of events left behind (see
    /// [`Self::has_backlog`]).
    pub fn service(&self) {
        self.shared.serve_errors();
        self.shared.serve_events();
    }

    /// Whether a flood of events was left in the queue, to be taken up by [`Self::service`] or by the next interrupt.
    pub fn has_backlog(&self) -> bool {
        self.shared.events.backlog()
    }

    /// The handler of the event queue's interrupt (`eventq`).
    pub fn event_handler(&self) -> Arc<dyn Handler> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.serve_events())
    }

    /// The handler of the global error interrupt (`gerror`).
    pub fn error_handler(&self) -> Arc<dyn Handler> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.serve_errors())
    }

    /// One handler for an SMMU with a single interrupt for everything (`combined`).
    pub fn combined_handler(&self) -> Arc<dyn Handler> {
        let smmu = self.clone();
        Arc::new(move || smmu.service())
    }
}

// SAFETY: the contract of `iommu::contract`:
// - every STE aborts, or does not exist, until `attach` or `bypass` (see `strtab.rs`);
// - `attach` and `block` return `Ok` only when an invalidation of the STE, and of the CD found through it, has completed after
//   the last change. By 3.21.3 of the architecture all transactions that used the old ones are complete then;
// - `attach` takes address spaces of this SMMU only, and the stream holds it as long as the STE may point at it.
unsafe impl<R: Registers> Iommu for Smmu<R> {
    fn name(&self) -> &str {
        &self.shared.config.name
    }

    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        Ok(Arc::new(Space::new(Arc::clone(&self.shared))?))
    }

    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        let any: &dyn Any = &**space;
        let ours = any.downcast_ref::<Space<R>>().filter(|space| space.is_of(&self.shared));
        let ours = ours.ok_or(AttachError::ForeignSpace)?;
        self.shared.change(stream, &ours.ste(), Treatment::Translated(Arc::clone(space)))
    }

    fn block(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, &ste_abort(), Treatment::Blocked)
    }

    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, &ste_bypass(self.shared.features.attr_types_ovr), Treatment::Bypass)
    }
}

impl<R: Registers> fmt::Display for Smmu<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.shared;
        write!(f, "{}: {}", shared.config.name, shared.features)?;
        let levels = if shared.table.is_two_level() { "two-level" } else { "linear" };
        write!(
            f,
            "; {levels} stream table for 2^{} streams, {} commands, {} events",
            shared.table.bits(),
            shared.commands.entries(),
            shared.events.entries()
        )?;
        if !shared.window_closed {
            f.write_str("; untranslated until it was enabled (no GBPA)")?;
        }
        Ok(())
    }
}

impl<R: Registers> fmt::Debug for Smmu<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Smmu({self})")
    }
}

#[cfg(feature = "provoke")]
#[path = "provoke.rs"]
mod provoke;
