//! The IOMMU as a virtio device \[5.13\]: an implementation of `iommu::contract` without translation tables.
//!
//! Mappings are requests to the device. A completed `UNMAP` is the device's word that no endpoint reaches the range any more,
//! its caches included; that word is the whole of a revocation here, and no more can be had of a paravirtual device. Everything
//! else that the device says is checked.
//!
//! # The device's own accesses
//!
//! It reads and writes its queues untranslated: nothing could translate for it before it works. Its `dma::Device` is therefore a
//! direct one, and the board vouches for the device, as it vouches for an SMMU's walker.
//!
//! # Blocked by default
//!
//! An endpoint that is attached to nothing is blocked: the driver does not accept `VIRTIO_IOMMU_F_BYPASS`, and turns the `bypass`
//! field off where there is one, before it starts the device. A device with which that cannot be done is refused.
//!
//! # Replacing an address space
//!
//! `ATTACH` of an attached endpoint replaces its domain, and the device does that between two accesses. But a domain exists only
//! while an endpoint is attached to it, so that a new one cannot be filled beforehand by its future user. A *spare* endpoint, one
//! that never masters the bus, holds the domain meanwhile. Without one ([`Config::spare`]) an attached endpoint can only be
//! blocked and attached anew; a replacement is refused.
//!
//! # Locking
//!
//! Attaching, blocking and bypassing are done one at a time, by a mark that is waited for with a deadline (`Turn`). Below it:
//! `streams` -> records of a space -> the heap's; the queue's lock; domain identifiers. None is held while an answer is awaited.
//! The handler of the event queue takes buffers -> queue, and streams -> records; it allocates nothing.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`.

mod channel;
mod domains;
mod events;
mod limits;
mod probe;
mod records;
mod request;
mod space;
mod streams;
#[cfg(test)]
mod tests;

pub use events::Events;

use crate::Error;
use crate::device::{ConfigHandler, Core, Vectors, Wired};
use crate::queue::QueueOptions;
use crate::spec::device_type;
use crate::spec::iommu::{config, feature, queue, size, status};
use crate::transport::{Transport, has_failed};
use ::iommu::contract::{AddressSpace, Aperture, Iommu};
use ::iommu::domain::Reserved;
use ::iommu::{AttachError, FaultSink, Iova, IovaRange, PAGE_SIZE, StreamId};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::irq::Handler;
use base::time::Duration;
use base::{Deadline, Turn};
use channel::{Channel, Outcome, attached, pause};
use core::fmt;
use core::sync::atomic::AtomicBool;
use domains::{DomainId, DomainIds};
use limits::Limits;
use request::Encoded;
use space::Space;
use streams::{Place, Streams, own};

/// Requests in flight.
const REQUESTS: u16 = 64;
/// Buffers for events.
const EVENTS: u16 = 256;

/// How the device is driven.
#[derive(Clone, Debug)]
pub struct Config {
    /// A name for reports.
    pub name: String,
    /// How long a request may take.
    pub timeout: Duration,
    /// An endpoint of this device's that never masters the bus, and that nobody attaches.
    pub spare: Option<StreamId>,
    /// Where it interrupts: configuration changes, and the event queue; nowhere, and by wire, if it has no vectors. Answers to
    /// requests are polled.
    pub vectors: Vectors,
    /// Has [`Events::serve_backlog`] called a little later, from a timer: what keeps a flood of events from holding up the kernel.
    /// Called in handlers.
    pub defer: Option<fn()>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: String::from("virtio-iommu"),
            timeout: Duration::from_secs(1),
            spare: None,
            vectors: Vectors::default(),
            defer: None,
        }
    }
}

/// What the driver and its address spaces share.
struct Common {
    channel: Channel,
    limits: Limits,
    ids: Arc<DomainIds>,
}

/// A started virtio-iommu. Dropping it resets the device: everything is blocked then.
pub struct VirtioIommu {
    common: Arc<Common>,
    streams: Arc<Streams>,
    events: Arc<Events>,
    spare: Option<StreamId>,
    turn: AtomicBool,
    core: Core,
}

impl VirtioIommu {
    /// Resets, negotiates and starts the IOMMU behind `transport`, whose bus master is `device`. Every endpoint is blocked when
    /// this returns `Ok`.
    ///
    /// # Errors
    ///
    /// [`Error::MissingFeature`], [`Error::BypassStuck`], [`Error::BadConfig`], and whatever else is wrong with the device; it has
    /// been reset again then.
    pub fn new(
        transport: Arc<dyn Transport>,
        device: dma::Device,
        sink: Arc<dyn FaultSink>,
        settings: Config,
        deadline: Deadline,
    ) -> Result<Self, Error> {
        let wanted = feature::INPUT_RANGE
            | feature::DOMAIN_RANGE
            | feature::MAP_UNMAP
            | feature::PROBE
            | feature::MMIO
            | feature::BYPASS_CONFIG;
        let mut core = Core::negotiate(transport, device, device_type::IOMMU, wanted, deadline)?;
        let limits = Limits::read(&**core.transport(), core.features(), deadline)?;
        if limits.bypass_config {
            turn_bypass_off(&**core.transport())?;
        }
        let requests = core.add_queue(
            queue::REQUEST,
            &QueueOptions {
                size: REQUESTS,
                header: size::LARGEST,
                response: limits.probe.unwrap_or(0) + size::TAIL,
                segments: 0,
                vector: None,
                quiet: true,
            },
        )?;
        let events = core.add_queue(
            queue::EVENT,
            &QueueOptions {
                size: EVENTS,
                header: 0,
                response: size::FAULT,
                segments: 0,
                vector: settings.vectors.queue,
                quiet: false,
            },
        )?;
        let streams = Arc::new(Streams::default());
        let events = Arc::new(Events::new(events, streams.clone(), sink, settings.defer)?);
        core.start(settings.vectors.config)?;
        events.begin();
        if limits.bypass_config {
            // The device may have thought better of it.
            turn_bypass_off(&**core.transport())?;
        }
        let common = Arc::new(Common {
            channel: Channel::new(settings.name, requests, settings.timeout),
            limits,
            ids: DomainIds::new(limits.domains),
        });
        let started = Self { common, streams, events, spare: settings.spare, turn: AtomicBool::new(false), core };
        started.try_out()?;
        Ok(started)
    }

    /// Looks whether the device answers at all: it is asked to unmap something in a domain that does not exist.
    fn try_out(&self) -> Result<(), Error> {
        let domain = self.common.ids.allocate().map_err(|_| Error::OutOfMemory)?;
        let page = IovaRange::new(Iova::new(0), PAGE_SIZE).unwrap_or_default();
        match self.common.channel.ask(&Encoded::unmap(domain.get(), page)) {
            Outcome::Answered(_) => Ok(()),
            _ if has_failed(&**self.core.transport()) => Err(Error::NeedsReset),
            _ => Err(Error::TimedOut),
        }
    }

    /// What serves the event queue's interrupt.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// What serves the configuration interrupt.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`].
    pub fn config_handler(&self) -> Result<Arc<ConfigHandler>, Error> {
        self.core.config_handler()
    }

    /// What serves the device's wired interrupt, where it has no vectors.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`].
    pub fn wired_handler(&self) -> Result<Arc<dyn Handler>, Error> {
        let (transport, events) = (self.core.transport().clone(), self.events.clone());
        Ok(Arc::new(Wired::new(transport, self.config_handler()?, events)))
    }

    /// Whether the device has failed to answer, and is asked nothing any more.
    pub fn is_dead(&self) -> bool {
        self.common.channel.is_dead()
    }

    /// What every address space can translate.
    pub fn aperture(&self) -> Aperture {
        self.common.limits.aperture
    }

    /// Says what the device can do.
    pub fn features(&self) -> impl fmt::Display + '_ {
        Features(self)
    }

    /// Begins a change of attachments. Others wait until the answer is dropped.
    fn turn(&self) -> Result<Turn<'_>, AttachError> {
        let deadline = self.common.channel.deadline();
        let mut looks = 0;
        loop {
            let expired = deadline.has_passed();
            if let Some(turn) = Turn::try_take(&self.turn) {
                return Ok(turn);
            }
            if expired {
                return Err(AttachError::TimedOut);
            }
            pause(&mut looks, deadline);
        }
    }

    fn ask(&self, request: &Encoded, endpoint: StreamId) -> Result<(), AttachError> {
        attached(self.common.channel.ask(request), endpoint)
    }

    /// The endpoint that holds a new domain while it is filled, for a `stream` that has something to lose.
    fn holder(&self, stream: StreamId, old: &Place) -> Result<StreamId, AttachError> {
        match (old, self.spare) {
            (Place::Blocked, _) => Ok(stream),
            (_, Some(spare)) if spare != stream => Ok(spare),
            _ => Err(AttachError::Unsupported("replacing an address space: it has no spare endpoint")),
        }
    }

    /// Makes a domain for `space`, which has none, with everything that is recorded in it and `holder` attached to it.
    fn found(&self, space: &Space, holder: StreamId) -> Result<Arc<DomainId>, AttachError> {
        let domain = self.common.ids.allocate()?;
        let asked = self.ask(&Encoded::attach(domain.get(), holder, false), holder);
        if let Err(error) = asked {
            if error == AttachError::TimedOut {
                core::mem::forget(domain);
            }
            return Err(error);
        }
        if let Err(error) = space.populate(&domain) {
            self.release(space, &domain, holder);
            return Err(error);
        }
        Ok(domain)
    }

    /// Takes `holder` out of `domain`, which nobody else is attached to: it is gone then.
    fn release(&self, space: &Space, domain: &Arc<DomainId>, holder: StreamId) {
        domain.set_leaving(true);
        match self.ask(&Encoded::detach(domain.get(), holder), holder) {
            Ok(()) => space.abandon(),
            Err(error) => {
                domain.set_leaving(false);
                self.stuck(space, domain, holder, error);
            }
        }
    }

    /// `holder` cannot be taken out of `domain`: it keeps it in being for ever.
    fn stuck(&self, space: &Space, domain: &Arc<DomainId>, holder: StreamId, error: AttachError) {
        log::error!("{}: endpoint {holder} stays in domain {}: {error}", self.name(), domain.get());
        space.join();
        core::mem::forget(domain.clone());
    }

    /// Attaches `stream` to an existing domain in place of what it has, which is told.
    fn replace(&self, stream: StreamId, request: &Encoded, old: &Place) -> Result<(), AttachError> {
        let leaving = old.space().and_then(Space::begin_leaving);
        let outcome = self.common.channel.ask(request);
        let result = attached(outcome, stream);
        if let Some(space) = old.space() {
            // Where the answer is lost, the endpoint may be there yet.
            space.end_leaving(result.is_ok());
        }
        if outcome == Outcome::Lost {
            core::mem::forget((leaving, old.clone()));
        }
        result
    }
}

/// Has the device block what is attached to nothing.
fn turn_bypass_off(transport: &dyn Transport) -> Result<(), Error> {
    let read = || transport.config_read(config::BYPASS).map(|word| word as u8);
    transport.config_write8(config::BYPASS, 0);
    match read() {
        Some(0) => Ok(()),
        Some(other) => Err(Error::BypassStuck(other)),
        None => Err(Error::BadConfig { field: "a length that ends before byte", value: config::BYPASS as u64 }),
    }
}

// SAFETY: the contract of `iommu::contract`:
// - endpoints that are attached to nothing are blocked (see the module), and none is attached but here;
// - after `attach`, `block` or `bypass` returned `Ok` the device has answered the request that took the old domain away from the
//   endpoint; until then, and after an error, the records say that the endpoint has what it had.
unsafe impl Iommu for VirtioIommu {
    fn name(&self) -> &str {
        self.common.channel.name()
    }

    fn reserved(&self, stream: StreamId) -> Result<Vec<Reserved>, AttachError> {
        let Some(size) = self.common.limits.probe else { return Ok(Vec::new()) };
        let mut answer = Vec::new();
        answer.try_reserve_exact(size + size::TAIL).map_err(|_| AttachError::OutOfMemory)?;
        answer.resize(size + size::TAIL, 0);
        match self.common.channel.ask_for(&Encoded::probe(stream), &mut answer) {
            Outcome::Answered(status::OK) => Ok(probe::reserved(answer.get(..size).unwrap_or_default())?),
            outcome => attached(outcome, stream).map(|()| Vec::new()),
        }
    }

    fn create(&self) -> Result<Arc<dyn AddressSpace>, AttachError> {
        let space = Space::new(self.common.clone());
        Ok(base::fallible::arc(space).map_err(|_| AttachError::OutOfMemory)?)
    }

    fn attach(&self, stream: StreamId, space: &Arc<dyn AddressSpace>) -> Result<(), AttachError> {
        let target = own(&**space).filter(|own| own.is_of(&self.common)).ok_or(AttachError::ForeignSpace)?;
        if self.spare == Some(stream) {
            return Err(AttachError::Unsupported("attaching the spare endpoint"));
        }
        let _turn = self.turn()?;
        let old = self.streams.enter(stream)?;
        if old.space().is_some_and(|old| core::ptr::eq(old, target)) {
            return Ok(());
        }
        let (domain, holder) = match target.domain() {
            Some(domain) => (domain, None),
            None => {
                let holder = self.holder(stream, &old)?;
                let found = self.found(target, holder);
                if found.is_err() && holder == stream && target.domain().is_some() {
                    // It could not be taken out again: it is no more blocked.
                    drop(self.streams.set(stream, Place::Translated(space.clone())));
                }
                (found?, Some(holder))
            }
        };
        let mut result = Ok(());
        if holder != Some(stream) {
            result = self.replace(stream, &Encoded::attach(domain.get(), stream, false), &old);
            if result == Err(AttachError::TimedOut) {
                // Perhaps it is there.
                core::mem::forget((domain.clone(), space.clone()));
                target.join();
            }
        }
        if result.is_ok() {
            target.join();
            let old = self.streams.set(stream, Place::Translated(space.clone()));
            drop(old);
        }
        if let Some(holder) = holder.filter(|holder| *holder != stream) {
            match result {
                Ok(()) => {
                    if let Err(error) = self.ask(&Encoded::detach(domain.get(), holder), holder) {
                        self.stuck(target, &domain, holder, error);
                    }
                }
                Err(_) => self.release(target, &domain, holder),
            }
        }
        result
    }

    fn block(&self, stream: StreamId) -> Result<(), AttachError> {
        let _turn = self.turn()?;
        let old = self.streams.enter(stream)?;
        let domain = match &old {
            // Perhaps attached by a request whose answer was lost.
            Place::Blocked if self.is_dead() => return Err(AttachError::Dead),
            Place::Blocked => return Ok(()),
            Place::Translated(_) => old.space().and_then(Space::domain),
            Place::Bypass(domain) => Some(domain.clone()),
        };
        let Some(domain) = domain else { return Err(AttachError::Dead) };
        self.replace(stream, &Encoded::detach(domain.get(), stream), &old)?;
        let old = self.streams.set(stream, Place::Blocked);
        drop(old);
        Ok(())
    }

    unsafe fn bypass(&self, stream: StreamId) -> Result<(), AttachError> {
        if !self.common.limits.bypass_config {
            return Err(AttachError::Unsupported("bypassing it"));
        }
        let _turn = self.turn()?;
        let old = self.streams.enter(stream)?;
        let domain = self.common.ids.allocate()?;
        let result = self.replace(stream, &Encoded::attach(domain.get(), stream, true), &old);
        match result {
            Ok(()) => drop(self.streams.set(stream, Place::Bypass(domain))),
            Err(AttachError::TimedOut) => core::mem::forget(domain),
            Err(_) => {}
        }
        result
    }
}

/// See [`VirtioIommu::features`].
struct Features<'a>(&'a VirtioIommu);

impl fmt::Display for Features<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Limits { aperture, domains, probe, mmio, bypass_config } = self.0.common.limits;
        write!(f, "{}: {} in pages of {:#x} bytes", self.0.name(), aperture.range, aperture.page_size())?;
        write!(f, ", domains {} to {}", domains.0, domains.1)?;
        for (is_there, name) in [(probe.is_some(), "probe"), (mmio, "mmio"), (bypass_config, "bypass off")] {
            if is_there {
                write!(f, ", {name}")?;
            }
        }
        if self.0.spare.is_none() { f.write_str(", no spare endpoint") } else { Ok(()) }
    }
}

impl fmt::Debug for VirtioIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.features())
    }
}
