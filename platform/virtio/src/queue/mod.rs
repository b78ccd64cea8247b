//! The split virtqueue \[2.7\].
//!
//! A [`Command`] is a header that the device reads, a range of lent memory, and an answer that the device writes. Header and
//! answer live in memory that belongs to the queue, so that a command maps and allocates nothing.
//!
//! Requests that come in numbers, all of one kind of loan, go through a [`Lane`]: it allocates nothing, takes no reference count and
//! takes back what has been returned many at a time.
//!
//! # Invariants
//!
//! - The queue (or the lane) holds a request's loans from before the device can see their addresses until a used entry for it has been
//!   validated, or the device has been reset.
//! - A queue that has failed takes nothing from the used ring any more, and gives no loan back, until its device
//!   has been reset.
//!
//! # Locking
//!
//! One `IrqMutex` per queue. Wakers are woken and dropped, loans dropped and the doorbell rung without it.

mod lane;
mod parts;
mod request;
mod ring;
mod slots;

pub(crate) use lane::Item;
pub use lane::{Lane, Reply};
pub use parts::{Access, Loans, MAX_PIECE, Part, Parts, check_loan};
pub use request::{Request, Watch};

use crate::spec::{feature, queue as spec};
use crate::transport::{self, QueueSetup, Transport};
use crate::{Error, Misbehaviour};
use alloc::sync::Arc;
use base::{Deadline, IrqMutex, barrier};
use core::task::Waker;
use dma::Device;
use iommu::Iova;
use ring::{Descriptor, Ring, SlotMemory};
use slots::{Completed, Ended, Phase, Returned, Slots};

/// How many wakers are carried out of the lock at a time.
const WAKE_BATCH: usize = 16;

/// Why a queue is out of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    Misbehaved(Misbehaviour),
    NeedsReset,
    ShutDown,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Misbehaved(what) => Self::DeviceMisbehaved { what },
            Failure::NeedsReset => Self::NeedsReset,
            Failure::ShutDown => Self::ShutDown,
        }
    }
}

/// What a driver wants of its queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// The most entries; rounded down to a power of two and to what the device has.
    pub size: u16,
    /// Bytes of the largest header; 0 for a queue of buffers that the device only writes.
    pub header: usize,
    /// Bytes of the largest answer.
    pub response: usize,
    /// The most pieces of lent memory in one request, where the device has indirect descriptors.
    pub segments: usize,
    /// MSI-X vector, or none for a queue that is polled.
    pub vector: Option<u16>,
    /// Whether the device is asked not to interrupt at all, by wire either: the queue is polled.
    pub quiet: bool,
}

/// When the device is to interrupt next.
#[derive(Clone, Copy)]
enum Interrupt {
    /// When it returns another request.
    Next,
    /// When so many requests of a lane have been returned; with the next one if others are in flight too.
    Lane(u16, u16),
    /// As whoever waits has said; with the next one if anything is in flight that is in no lane.
    AsIs,
}

/// One request to a device.
pub struct Command<'a> {
    /// What the device reads first; at most [`QueueOptions::header`] bytes. Empty only
    /// in a queue without headers, and with an answer.
    pub header: &'a [u8],
    /// Lent memory.
    pub data: Parts<'a>,
    /// What the device does with `data`.
    pub access: Access,
    /// Bytes of the answer, which the device writes last; at most [`QueueOptions::response`].
    pub response: usize,
    /// What the queue is to hold while the device has the request: whatever `data` points into.
    pub loans: Loans,
}

/// A request as it is laid out for the device.
struct Chain<'a, I> {
    head: u16,
    header: &'a [u8],
    data: I,
    /// Whether the device writes `data`.
    write: bool,
    response: usize,
    /// Descriptors: of header, data and answer.
    entries: usize,
    /// Whether they stand in the slot's table, rather than in the descriptor area itself.
    table: bool,
}

impl<I: Iterator<Item = Part>> Chain<'_, I> {
    /// Writes descriptors, header and a blank answer. The device does not see them yet.
    #[inline]
    fn write(self, ring: &Ring, slots: &Slots) {
        let Self { head, header, data, write, response, entries, table } = self;
        let (mut index, mut at) = (0, head);
        let entries_of_table = ring.table(head);
        let mut put = |descriptor: Descriptor| {
            let last = index + 1 == entries;
            if table {
                Ring::put_indirect(entries_of_table, index, descriptor, last);
            } else {
                let next = slots.next(at);
                ring.put(at, descriptor, (!last).then_some(next));
                at = next;
            }
            index += 1;
        };
        if !header.is_empty() {
            put(ring.put_header(head, header));
        }
        for part in data {
            put(Descriptor { part, write });
        }
        if response != 0 {
            put(ring.prepare_response(head, response));
        }
        if table {
            ring.put_table(head, entries);
        }
    }
}

/// Counters of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests handed to the device.
    pub submitted: u64,
    /// Requests that it returned.
    pub completed: u64,
    /// Times that the doorbell was rung.
    pub kicks: u64,
    /// Interrupts served.
    pub interrupts: u64,
}

/// A virtqueue. Shared by its driver, its requests and its interrupt.
pub struct Queue {
    index: u16,
    size: u16,
    event_idx: bool,
    quiet: bool,
    max_data: usize,
    header: usize,
    response: usize,
    indirect: bool,
    device: Device,
    transport: Arc<dyn Transport>,
    areas: (Iova, Iova, Iova),
    state: IrqMutex<State>,
}

struct State {
    /// `None` once the device has been reset for good.
    ring: Option<Ring>,
    slots: Slots,
    /// The available index that the device has been shown.
    available: u16,
    /// The available index at the last decision whether to ring the doorbell.
    kicked: u16,
    /// The used index up to which entries have been taken.
    used: u16,
    /// The used index whose passing interrupts, as the device was last told.
    event: u16,
    failure: Option<Failure>,
    stats: QueueStats,
}

impl Queue {
    /// Allocates queue number `index` of a device. The device is told by the caller.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchQueue`], [`Error::BadQueueSize`], [`Error::OutOfMemory`], [`Error::Dma`].
    #[track_caller]
    pub(crate) fn new(
        transport: &Arc<dyn Transport>,
        device: &Device,
        index: u16,
        features: u64,
        options: &QueueOptions,
    ) -> Result<Self, Error> {
        let offered = transport.queue_size(index);
        if offered == 0 {
            return Err(Error::NoSuchQueue(index));
        }
        let most = offered.min(options.size);
        if most < 4 || offered > spec::MAX_SIZE {
            return Err(Error::BadQueueSize { queue: index, size: most });
        }
        let size = 1 << most.ilog2();
        let indirect = features & feature::INDIRECT_DESC != 0;
        // A chain, direct or in a table, has at most `size` descriptors [2.7.5.3.1]; two are for header and answer.
        let room = usize::from(size) - 2;
        let max_data = if indirect { options.segments.min(room) } else { room };
        let table = if indirect { max_data + 2 } else { 0 };
        let memory = SlotMemory { header: options.header, response: options.response, indirect: table };
        let ring = Ring::new(device, size, memory)?;
        let areas = ring.areas();
        let event_idx = features & feature::EVENT_IDX != 0;
        if options.quiet {
            ring.decline_interrupts(event_idx);
        }
        let state = State {
            ring: Some(ring),
            slots: Slots::new(size)?,
            available: 0,
            kicked: 0,
            used: 0,
            event: 0,
            failure: None,
            stats: QueueStats::default(),
        };
        Ok(Self {
            index,
            size,
            event_idx,
            quiet: options.quiet,
            max_data,
            header: options.header,
            response: options.response,
            indirect,
            device: device.clone(),
            transport: transport.clone(),
            areas,
            state: IrqMutex::new(state),
        })
    }

    /// What to tell the device about this queue.
    pub(crate) fn setup(&self, vector: Option<u16>) -> QueueSetup {
        let (descriptors, driver, device) = self.areas;
        QueueSetup { size: self.size, descriptors, driver, device, vector }
    }

    /// The bus master whose queue this is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number of descriptors; with indirect descriptors also the most requests in flight.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The most pieces of lent memory in one request.
    pub fn max_segments(&self) -> usize {
        self.max_data
    }

    /// How many requests the device has.
    pub fn in_flight(&self) -> usize {
        usize::from(self.state.lock().slots.in_flight())
    }

    /// Counters.
    pub fn stats(&self) -> QueueStats {
        self.state.lock().stats
    }

    /// Hands one request to the device and rings the doorbell if the device wants that.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`] (wait with [`Queue::wait_for_room`]), [`Error::TooManySegments`], [`Error::TooLong`], and why the
    /// queue is out of use. The device has not seen the request then.
    pub fn submit(self: &Arc<Self>, command: Command<'_>) -> Result<Request, Error> {
        let request = self.add(command)?;
        self.kick();
        Ok(request)
    }

    /// Hands one request to the device without telling it; [`Queue::kick`] does that once for several.
    ///
    /// # Errors
    ///
    /// As [`Queue::submit`].
    pub fn add(self: &Arc<Self>, command: Command<'_>) -> Result<Request, Error> {
        let Command { header, data, access, response, loans } = command;
        // A queue without headers is one of buffers that the device only writes.
        let nothing = header.is_empty() && (self.header != 0 || response == 0);
        if nothing || header.len() > self.header || response > self.response {
            return Err(Error::TooLong);
        }
        let mut count = 0;
        let mut bytes = 0_u64;
        for part in data.clone() {
            count += 1;
            bytes += u64::from(part.len);
        }
        if count > self.max_data {
            return Err(Error::TooManySegments { count, max: self.max_data });
        }
        // Used lengths have 32 bits, and a chain is not longer than that [2.7.4.2].
        let total = bytes + header.len() as u64 + response as u64;
        u32::try_from(total).map_err(|_| Error::TooLong)?;
        let writable = if access == Access::Write { bytes } else { 0 } + response as u64;
        let entries = usize::from(!header.is_empty()) + count + usize::from(response != 0);
        self.reap();

        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(failure) = state.failure {
            return Err(failure.into());
        }
        let Some(ring) = &state.ring else { return Err(Error::ShutDown) };
        let table = self.indirect && entries > 1;
        // `entries` is at most `size`, see `new`.
        let chain = if table { 1 } else { entries as u16 };
        let head = match state.slots.begin(chain, writable as u32, loans) {
            Ok(head) => head,
            Err(loans) => {
                drop(guard);
                drop(loans);
                return Err(Error::QueueFull);
            }
        };
        let chain = Chain { head, header, data, write: access == Access::Write, response, entries, table };
        chain.write(ring, &state.slots);
        state.publish(head);
        // While only lanes were at work the device may have been asked to be silent.
        let silent = (state.event != state.used || state.slots.any_in_lanes()) && !self.quiet;
        drop(guard);
        let request = Request::new(self.clone(), head);
        if silent {
            self.drain();
        }
        Ok(request)
    }

    /// Tells the device about requests that were added since the last time, if it wants to hear of them.
    pub fn kick(&self) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let (old, new) = (state.kicked, state.available);
        let Some(ring) = &state.ring else { return };
        if old == new || state.failure.is_some() {
            return;
        }
        state.kicked = new;
        // The index must be visible to the device before its wish is read: else both sides could miss each other.
        barrier::publish();
        let wanted = if self.event_idx { spec::need_event(ring.avail_event(), new, old) } else { !ring.no_notify() };
        if wanted {
            state.stats.kicks += 1;
            drop(guard);
            self.transport.notify(self.index);
        }
    }

    /// Sleeps until `requests` more requests can be added (with indirect descriptors; else until so many descriptors are free).
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`], and why the queue is out of use.
    pub fn wait_for_room(&self, requests: u16, deadline: Deadline) -> Result<(), Error> {
        loop {
            self.reap();
            let ready = || {
                self.drain();
                let state = self.state.lock();
                state.failure.is_some() || state.slots.free() >= requests || state.slots.reapable() != 0
            };
            base::wait_until(deadline, ready).map_err(|_| self.timed_out())?;
            self.reap();
            let state = self.state.lock();
            if let Some(failure) = state.failure {
                return Err(failure.into());
            }
            if state.slots.free() >= requests {
                return Ok(());
            }
        }
    }

    /// Takes what the device has returned from the used ring and wakes the waiters. Neither allocates nor drops a loan.
    pub(crate) fn drain(&self) {
        self.drain_and_ask(Interrupt::Next);
    }

    fn drain_and_ask(&self, next: Interrupt) {
        loop {
            let mut wakers = [const { None::<Waker> }; WAKE_BATCH];
            let result = self.state.lock().drain_or_fail(self.event_idx && !self.quiet, next, &mut wakers);
            wake(&mut wakers);
            let more = match result {
                Ok(more) => more,
                Err(what) => return self.misbehaved(what),
            };
            if !more {
                return;
            }
        }
    }

    /// Tells everybody that the queue has been put out of use because of what the device did.
    #[cold]
    fn misbehaved(&self, what: Misbehaviour) {
        log::error!("{}: queue {} is out of use: the device misbehaved: {what}", self.device.name(), self.index);
        self.wake_all();
        // Who watches a request has no waker in it.
        base::notify();
    }

    /// Puts the queue out of use and tells everybody who waits. Loans stay where they are.
    pub(crate) fn fail(&self, failure: Failure) {
        {
            let mut state = self.state.lock();
            if state.failure.is_some() {
                return;
            }
            state.failure = Some(failure);
        }
        self.wake_all();
        base::notify();
    }

    /// Lets go of everything that the device had. The device has been reset.
    pub(crate) fn retire(&self) {
        self.fail(Failure::ShutDown);
        loop {
            let retired = self.state.lock().slots.retire();
            let Some((waker, ended)) = retired else { break };
            self.let_go(ended);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        self.reap();
        let ring = self.state.lock().ring.take();
        drop(ring);
        base::notify();
    }

    /// Ends abandoned requests that the device has returned. Task context only: loans end here.
    fn reap(&self) {
        loop {
            let over = self.state.lock().slots.reap();
            let Some((ended, store)) = over else { return };
            self.let_go(ended);
            drop(store);
        }
    }

    /// Drops the loans of a request that is over. Who watches it sees how it went until that is done; only then its place is free.
    #[inline]
    fn let_go(&self, ended: Ended) {
        let Ended { loans, kept } = ended;
        drop(loans);
        if let Some(head) = kept {
            self.state.lock().slots.free_watched(head);
            // For those who wait for room.
            base::notify();
        }
    }

    fn wake_all(&self) {
        loop {
            let waker = self.state.lock().slots.take_listener();
            match waker {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }

    /// The error of a wait that took too long: the device may have said that it has failed, without an interrupt.
    fn timed_out(&self) -> Error {
        if transport::has_failed(&*self.transport) {
            self.fail(Failure::NeedsReset);
        }
        match self.state.lock().failure {
            Some(failure) => failure.into(),
            None => Error::TimedOut,
        }
    }
}

impl State {
    /// Shows the device the request that starts at `head`.
    #[inline]
    fn publish(&mut self, head: u16) {
        if let Some(ring) = &self.ring {
            ring.publish(self.available, head);
            self.available = self.available.wrapping_add(1);
            self.stats.submitted += 1;
        }
    }

    /// Takes requests that are over from a lane's list. Returns how many.
    #[inline]
    fn take_returned(&mut self, lane: u16, batch: &mut [Returned]) -> usize {
        let mut count = 0;
        for place in batch {
            let Some(mut returned) = self.slots.take_returned(lane) else { break };
            if let Some(ring) = &self.ring {
                returned.status = ring.status(returned.head);
            }
            *place = returned;
            count += 1;
        }
        count
    }

    /// Whether so many requests of a lane can be taken back, counting those that lie in the used ring where it has no others. They
    /// are judged when they are taken.
    #[inline]
    fn has(&self, lane: u16, wanted: u16) -> bool {
        let Some(ring) = &self.ring else { return false };
        if self.failure.is_some() || !self.slots.all_in_lane(lane) {
            return false;
        }
        let pending = ring.used_index().wrapping_sub(self.used);
        pending <= self.slots.in_flight() && pending.saturating_add(self.slots.returned(lane)) >= wanted
    }

    /// Takes entries from the used ring: those of a lane into `batch` from `count` on, until it is full. `Ok(true)` if `wakers` has
    /// something, which may not be all; the queue is out of use when this fails, and what was taken before is valid.
    #[inline]
    fn take_used(
        &mut self,
        lane: u16,
        batch: &mut [Returned],
        count: &mut usize,
        wakers: &mut [Option<Waker>],
    ) -> Result<bool, Misbehaviour> {
        let Some(ring) = &self.ring else { return Ok(false) };
        if self.failure.is_some() {
            return Ok(false);
        }
        let pending = ring.used_index().wrapping_sub(self.used);
        let in_flight = self.slots.in_flight();
        if pending > in_flight {
            let what = Misbehaviour::UsedIndexJumped { moved: pending, in_flight };
            self.failure = Some(Failure::Misbehaved(what));
            return Err(what);
        }
        let mut wakers = wakers.iter_mut();
        let mut woken = false;
        for _ in 0..pending {
            let Some(place) = batch.get_mut(*count) else { break };
            let (id, len) = ring.used_entry(self.used);
            self.used = self.used.wrapping_add(1);
            self.stats.completed += 1;
            match self.slots.complete_in(lane, id, len) {
                Ok(Completed::Here(returned)) => {
                    *place = Returned { status: ring.status(returned.head), ..returned };
                    *count += 1;
                }
                Ok(Completed::Elsewhere(None)) => {}
                Ok(Completed::Elsewhere(waker)) => {
                    woken = true;
                    if let Some(place) = wakers.next() {
                        *place = waker;
                    }
                    if wakers.len() == 0 {
                        break;
                    }
                }
                Err(what) => {
                    self.failure = Some(Failure::Misbehaved(what));
                    return Err(what);
                }
            }
        }
        Ok(woken)
    }

    /// As [`State::drain`]; the queue is out of use when that fails.
    fn drain_or_fail(
        &mut self,
        event_idx: bool,
        next: Interrupt,
        wakers: &mut [Option<Waker>],
    ) -> Result<bool, Misbehaviour> {
        let result = self.drain(event_idx, next, wakers);
        if let Err(what) = result {
            self.failure = Some(Failure::Misbehaved(what));
        }
        result
    }

    /// Takes entries from the used ring until `wakers` is full (then `Ok(true)`: there may be more) or there are none.
    fn drain(&mut self, event_idx: bool, next: Interrupt, wakers: &mut [Option<Waker>]) -> Result<bool, Misbehaviour> {
        let Some(ring) = &self.ring else { return Ok(false) };
        if self.failure.is_some() {
            return Ok(false);
        }
        let mut room = wakers.iter_mut();
        loop {
            let pending = ring.used_index().wrapping_sub(self.used);
            if pending > self.slots.in_flight() {
                let in_flight = self.slots.in_flight();
                return Err(Misbehaviour::UsedIndexJumped { moved: pending, in_flight });
            }
            if pending == 0 {
                // Ask for the next interrupt, then look again: what came before the asking raises none.
                let event = match next {
                    Interrupt::AsIs if self.slots.all_in_lanes() => return Ok(false),
                    Interrupt::Lane(lane, wanted) if self.slots.all_in_lane(lane) => {
                        let missing = wanted.saturating_sub(self.slots.returned(lane));
                        self.used.wrapping_add(missing.saturating_sub(1))
                    }
                    _ => self.used,
                };
                if !event_idx || event == self.event {
                    return Ok(false);
                }
                self.event = event;
                ring.set_used_event(event);
                continue;
            }
            for _ in 0..pending {
                if room.len() == 0 {
                    return Ok(true);
                }
                let (id, len) = ring.used_entry(self.used);
                self.used = self.used.wrapping_add(1);
                if let waker @ Some(_) = self.slots.complete(id, len)?
                    && let Some(place) = room.next()
                {
                    *place = waker;
                }
                self.stats.completed += 1;
            }
        }
    }
}

fn wake(wakers: &mut [Option<Waker>]) {
    for waker in wakers.iter_mut().filter_map(Option::take) {
        waker.wake();
    }
}

impl base::irq::Handler for Queue {
    fn handle(&self) {
        let laned = {
            let mut state = self.state.lock();
            state.stats.interrupts += 1;
            state.slots.all_in_open_lanes()
        };
        // What is in lanes is taken by their owners, who are woken.
        if !laned {
            self.drain_and_ask(Interrupt::AsIs);
        }
        base::notify();
    }
}
