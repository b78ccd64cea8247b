//! One SMMU, as the rest of the kernel sees it.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`; the reasons are with the implementation.

use crate::Error;
use crate::cmdq::{Batch, CommandError, CommandQueue, Completion};
use crate::counters::{Counters, Statistics};
use crate::evtq::EventQueue;
use crate::features::Features;
use crate::ids::Ids;
use crate::priq::PriQueue;
use crate::registers::{Doorbell, Registers};
use crate::request::Request;
use crate::service::{Messages, Service};
use crate::space::Space;
use crate::start::Config;
use crate::streams::{Streams, Wish};
use crate::strtab::StreamTable;
use alloc::sync::Arc;
use base::irq::Handler;
use core::fmt;
use iommu::contract::{AddressSpace, Iommu, TableMemory};
use iommu::pgtable::{Geometry, Stage};
use iommu::{AttachError, FaultSink, PhysAddr, StreamId};

/// What the handle, the address spaces and the interrupt handlers share.
pub(crate) struct Shared<R: Registers> {
    pub registers: R,
    pub memory: &'static dyn TableMemory,
    pub sink: Arc<dyn FaultSink>,
    pub config: Config,
    pub features: Features,
    pub table: StreamTable,
    pub commands: CommandQueue,
    pub doorbell: Doorbell<R>,
    pub events: EventQueue,
    pub page_requests: Option<PriQueue>,
    pub asids: Ids,
    pub vmids: Ids,
    pub streams: Streams,
    pub counters: Counters,
    pub window_closed: bool,
    pub service: Service,
}

impl<R: Registers> Shared<R> {
    pub fn batch(&self) -> Batch<'_, R> {
        self.commands.batch(&self.registers, &self.counters)
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

    pub(crate) fn shared(&self) -> &Arc<Shared<R>> {
        &self.shared
    }

    /// Makes an empty address space of a certain kind. [`Iommu::create`] is this with the default request.
    ///
    /// # Errors
    ///
    /// [`AttachError::Unsupported`] where the SMMU lacks what is asked for; [`AttachError::ForeignSpace`] for a parent of
    /// another SMMU; [`AttachError::NoIdentifier`], [`AttachError::OutOfMemory`].
    pub fn create_with(&self, request: &Request) -> Result<Arc<dyn AddressSpace>, AttachError> {
        let space = Space::new(&[&self.shared], request)?;
        Ok(base::fallible::arc(space).map_err(|_| AttachError::OutOfMemory)?)
    }

    /// Where the root of `space`'s tables is, and their shape: for whoever lets a processor walk them too. `None` for what is not a
    /// stage 1 of this SMMU's that translates alone. The ASID of its context descriptor is the SMMU's own (ASET): what processors
    /// have of the tables is tagged and invalidated by whoever has them walk it.
    pub fn tables_of(&self, space: &Arc<dyn AddressSpace>) -> Option<(PhysAddr, Geometry)> {
        let (table, alone) = Space::member(space, &self.shared)?.table();
        (alone && table.geometry().stage() == Stage::One).then(|| (table.root(), *table.geometry()))
    }

    /// Gives the transactions of `stream` with SubstreamID `substream` (PCIe: PASID) the address space `space`, in place of what
    /// they had, without a moment in between in which they are translated by neither.
    ///
    /// Transactions without SubstreamID keep what they have: an address space, nothing, or bypass.
    /// [`Iommu::attach`] goes on changing only those, [`Iommu::block`] takes everything away. The stage 2 below, if any, is
    /// common to all substreams of a stream.
    ///
    /// # Errors
    ///
    /// [`AttachError::Unsupported`] where the SMMU has no substreams, or for a space that is not of stage 1 over the same
    /// parent as the others; [`AttachError::NoSuchSubstream`] for 0, which stands for none, and for what the table has no place
    /// for; else as [`Iommu::attach`].
    pub fn attach_substream(
        &self,
        stream: StreamId,
        substream: u32,
        space: &Arc<dyn AddressSpace>,
    ) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::AttachSubstream(substream, space))
    }

    /// Takes the address space of a SubstreamID away: its accesses are stopped from here on.
    ///
    /// # Errors
    ///
    /// [`AttachError::NoSuchSubstream`] if it has none; else as [`Iommu::block`].
    pub fn detach_substream(&self, stream: StreamId, substream: u32) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::DetachSubstream(substream))
    }

    /// Answers the translation requests (PCIe ATS) of `stream` from now on, whatever it is attached to, and includes the
    /// device's translation cache in every invalidation. Call it before ATS is enabled in the device.
    ///
    /// A device that has ATS is trusted to give up translations when it is told to: what it sends as translated is not
    /// translated again. That it says it did is waited for, in every revocation.
    ///
    /// # Errors
    ///
    /// [`AttachError::Unsupported`] where the SMMU has no ATS; else as [`Iommu::attach`].
    pub fn enable_ats(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::Ats(true))
    }

    /// Answers no more translation requests, lets no translated access pass, and empties the device's translation cache. Call
    /// it after ATS was disabled in the device.
    ///
    /// # Errors
    ///
    /// As [`Iommu::block`].
    pub fn disable_ats(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::Ats(false))
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
        let commands = &self.shared.commands;
        self.shared.counters.snapshot(commands.one_by_one(), commands.accesses())
    }

    /// Streams that are not blocked.
    pub fn attached_streams(&self) -> usize {
        self.shared.streams.attached()
    }

    /// Whether the SMMU takes no more commands: an invalidation is overdue, or it has failed.
    pub fn is_dead(&self) -> bool {
        self.shared.commands.is_dead(&self.shared.registers, &self.shared.counters)
    }

    /// The latest command at which the SMMU stopped, and why.
    pub fn latest_command_error(&self) -> Option<CommandError> {
        self.shared.commands.latest_error()
    }

    /// How the completion of commands is noticed.
    pub fn completion(&self) -> Completion {
        self.shared.commands.completion()
    }

    /// Has the SMMU's interrupts sent as messages instead of by wire. The board calls it once, after it has connected the
    /// handlers to the messages.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if the SMMU sends no messages ([`Features::msi`]); [`Error::NoAcknowledge`], after which it may not
    /// interrupt at all.
    pub fn use_messages(&self, messages: &Messages) -> Result<(), Error> {
        self.shared.use_messages(messages)
    }

    /// Does what all interrupt handlers do. For a kernel that polls, and for what came in before the interrupts were connected.
    pub fn service(&self) {
        self.shared.serve_errors();
        self.shared.serve_queues();
    }

    /// Whether a flood was left in a queue, and no interrupt will tell of it.
    pub fn has_backlog(&self) -> bool {
        self.shared.service.backlog()
    }

    /// Takes up what a flood has left behind, if one has. What [`Config::defer`] promises to call, with interrupts masked or not.
    pub fn serve_backlog(&self) {
        self.shared.serve_backlog();
    }

    /// The handler of the event queue's interrupt (`eventq`).
    pub fn event_handler(&self) -> Arc<dyn Handler> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.serve_queues())
    }

    /// The handler of the PRI queue's interrupt (`priq`).
    pub fn page_request_handler(&self) -> Arc<dyn Handler> {
        self.event_handler()
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
// - `attach` takes address spaces of this SMMU only, and the stream holds it as long as the STE may point at it;
// - where the stream has ATS, the device's cache has been emptied of the old space after that.
unsafe impl<R: Registers> Iommu for Smmu<R> {
    fn name(&self) -> &str {
        &self.shared.config.name
    }

    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        self.create_with(&Request::default())
    }

    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::Attach(space))
    }

    fn block(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::Block)
    }

    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError> {
        self.shared.change(stream, Wish::Bypass)
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
        f.write_str(match shared.commands.completion() {
            Completion::Poll => "",
            Completion::Event => ", completion by event",
            Completion::Message => ", completion by message",
        })?;
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
