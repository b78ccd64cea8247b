//! An address space: records of what is mapped, and a domain of the device's while an endpoint is attached.
//!
//! The device forgets a domain, with all its mappings, when the last endpoint leaves it \[5.13.6.4\]. The records stay and are
//! mapped again, before the next endpoint is attached, into a new domain.
//!
//! # Invariants
//!
//! - What may be in the device is in the records: a record goes in before its `MAP` is sent, and goes only when an `UNMAP` of it
//!   has been answered with success, or the domain has ceased to exist, or its `MAP` was never sent.
//! - What was mapped to be synced later is told to the device by the sync, many requests at a time; until then no request about it
//!   exists, and a revocation needs none. A sync that fails leaves all as made: only a revocation decides.
//! - A `MAP` whose outcome is unknown counts as made. Its memory can then be had back by a revocation only, and that fails where
//!   the device does not answer: the memory goes to quarantine.
//!
//! # Locking
//!
//! One [`IrqMutex`] around the records, never held while an answer is awaited: records about which requests are on their way are
//! marked as busy instead. Only a revocation may have to wait for such a mark, with a deadline: that of a mapping which a
//! simultaneous attachment is just taking into a new domain.

#![allow(unsafe_code)] // Implements the contract of `iommu::contract`.

use super::Common;
use super::channel::{Outcome, pause};
use super::domains::DomainId;
use super::records::{Piece, Record, Records, Stage, pieces};
use super::request::Encoded;
use crate::spec::iommu::status;
use ::iommu::contract::{AddressSpace, Aperture};
use ::iommu::{AttachError, Iova, IovaRange, MapError, PhysAddr, PhysRange, Prot, RevokeError};
use alloc::sync::Arc;
use base::IrqMutex;
use core::fmt;

/// Mappings that are taken into a new domain at a time.
const CHUNK: usize = 32;

pub(super) struct Space {
    common: Arc<Common>,
    state: IrqMutex<State>,
}

#[derive(Default)]
struct State {
    /// The device's domain, while it exists.
    domain: Option<Arc<DomainId>>,
    /// Endpoints in it.
    endpoints: usize,
    records: Records,
}

/// What became of the `MAP` requests of one mapping.
#[derive(Default)]
struct Verdict {
    /// Sent, whatever came of it.
    sent: bool,
    refused: Option<u8>,
    lost: bool,
    unsent: bool,
}

impl Verdict {
    fn note(&mut self, outcome: Outcome, domain: &DomainId) {
        match outcome {
            Outcome::Answered(status::OK) => self.sent = true,
            // The domain is going, or gone: the records are all there is.
            Outcome::Answered(status::NOENT) if domain.is_leaving() => self.sent = true,
            Outcome::Answered(refused) => {
                self.sent = true;
                self.refused = self.refused.or(Some(refused));
            }
            Outcome::Lost => {
                self.sent = true;
                self.lost = true;
            }
            Outcome::NotSent => self.unsent = true,
        }
    }
}

impl Space {
    pub fn new(common: Arc<Common>) -> Self {
        Self { common, state: IrqMutex::default() }
    }

    /// Whether it belongs to this device.
    pub fn is_of(&self, common: &Arc<Common>) -> bool {
        Arc::ptr_eq(&self.common, common)
    }

    /// The device's domain, while it exists.
    pub fn domain(&self) -> Option<Arc<DomainId>> {
        self.state.lock().domain.clone()
    }

    /// Notes that another endpoint is attached to the domain.
    pub fn join(&self) {
        self.state.lock().endpoints += 1;
    }

    /// Notes that an endpoint is about to leave the domain, which is returned.
    pub fn begin_leaving(&self) -> Option<Arc<DomainId>> {
        let state = self.state.lock();
        let domain = state.domain.clone()?;
        domain.set_leaving(state.endpoints <= 1);
        Some(domain)
    }

    /// Notes that the endpoint has left (or not); with the last one the domain is gone.
    pub fn end_leaving(&self, left: bool) {
        let gone = {
            let mut state = self.state.lock();
            if left {
                state.endpoints = state.endpoints.saturating_sub(1);
                if state.endpoints == 0 { state.cease() } else { None }
            } else {
                if let Some(domain) = &state.domain {
                    domain.set_leaving(false);
                }
                None
            }
        };
        drop(gone);
    }

    /// Notes that the domain does not exist any more, although no endpoint was ever counted.
    pub fn abandon(&self) {
        let gone = self.state.lock().cease();
        drop(gone);
    }

    /// Maps everything that is recorded into `domain`, which exists and in which nothing is mapped, and which is the space's
    /// domain from here on. One attachment at a time does this.
    ///
    /// # Errors
    ///
    /// [`AttachError::OutOfMemory`] and others as the device says; the domain is the space's all the same.
    pub fn populate(&self, domain: &Arc<DomainId>) -> Result<(), AttachError> {
        let old = self.state.lock().domain.replace(domain.clone());
        drop(old);
        let mut from = 0;
        loop {
            let mut chunk = [Record::default(); CHUNK];
            let mut count = 0;
            {
                let mut state = self.state.lock();
                let recorded = state.records.from(from).filter(|record| record.stage == Stage::Recorded);
                for (place, record) in chunk.iter_mut().zip(recorded) {
                    record.stage = Stage::Busy;
                    *place = *record;
                    count += 1;
                }
            }
            let chunk = &chunk[..count];
            let Some(last) = chunk.last() else { return Ok(()) };
            from = last.end();
            let requests =
                chunk.iter().map(|record| self.map_request(domain, record.piece, record.prot.unwrap_or(Prot::empty())));
            let mut result = Ok(());
            let mut done = chunk.iter();
            self.common.channel.ask_all(requests, |outcome| {
                let Some(record) = done.next() else { return };
                let stage = match outcome {
                    Outcome::Answered(status::OK) | Outcome::Lost => Stage::Mapped,
                    _ => Stage::Recorded,
                };
                for record in self.state.lock().records.within(record.range()) {
                    record.stage = stage;
                }
                if result.is_ok() {
                    result =
                        super::channel::attached(outcome, ::iommu::StreamId::new(0)).map_err(|error| match error {
                            AttachError::NoSuchStream(_) => AttachError::Unsupported("this mapping"),
                            other => other,
                        });
                }
            });
            result?;
        }
    }

    fn map_request(&self, domain: &DomainId, piece: Piece, prot: Prot) -> Encoded {
        Encoded::map(domain.get(), piece, prot, self.common.limits.mmio)
    }

    /// Ends being busy with `range`. Returns a domain that the space has got meanwhile, and into which nobody else maps the
    /// range; it stays busy then.
    fn settle(&self, range: IovaRange, domain: &Arc<DomainId>) -> Option<Arc<DomainId>> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let stage = match &state.domain {
            Some(own) if !Arc::ptr_eq(own, domain) => return Some(own.clone()),
            Some(_) => Stage::Mapped,
            None => Stage::Recorded,
        };
        for record in state.records.within(range) {
            record.stage = stage;
        }
        None
    }

    /// What a mapping is cut into: one request each.
    fn pieces<'a>(
        &self,
        iova: IovaRange,
        runs: &'a [PhysRange],
        prot: Prot,
    ) -> Result<impl Iterator<Item = Piece> + Clone + 'a, MapError> {
        self.common.limits.check(iova, runs, prot)?;
        let page = prot.contains(Prot::PAGEWISE).then(|| self.common.limits.aperture.page_size());
        Ok(pieces(iova, runs, page))
    }

    /// Records `pieces`, which are all of `iova`, in the stage that `stage` says. Returns the domain.
    fn record(
        &self,
        iova: IovaRange,
        pieces: &(impl Iterator<Item = Piece> + Clone),
        prot: Prot,
        stage: impl FnOnce(&Option<Arc<DomainId>>) -> Stage,
    ) -> Result<Option<Arc<DomainId>>, MapError> {
        if iova.is_empty() {
            return Ok(None);
        }
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if let Some(taken) = state.records.within(iova).first() {
            return Err(MapError::AlreadyMapped(Iova::new(taken.piece.iova).max(iova.start())));
        }
        let stage = stage(&state.domain);
        let records = pieces.clone().map(|piece| Record { piece, prot: Some(prot), stage });
        state.records.insert(pieces.clone().count(), records)?;
        Ok(state.domain.clone())
    }

    /// Why a `MAP` of `what` was answered with `status`.
    fn refusal(&self, status: u8, what: impl fmt::Display) -> MapError {
        if status == status::NOMEM {
            return MapError::OutOfMemory;
        }
        log::error!("{}: it refuses to map {what} (status {status})", self.common.channel.name());
        MapError::Refused
    }

    /// Maps into the device what has been recorded as busy. `Err` is why not, and nothing is mapped then.
    fn make(
        &self,
        domain: &Arc<DomainId>,
        range: IovaRange,
        requests: impl Iterator<Item = Encoded>,
    ) -> Result<(), MapError> {
        let channel = &self.common.channel;
        let mut verdict = Verdict::default();
        channel.ask_all(requests, |outcome| verdict.note(outcome, domain));
        if !verdict.sent && verdict.unsent {
            return Err(MapError::Dead);
        }
        if verdict.lost {
            // Its number must not become another's: the request may yet be carried out.
            core::mem::forget(domain.clone());
        } else if verdict.refused.is_some() || verdict.unsent {
            let outcome = channel.ask(&Encoded::unmap(domain.get(), range));
            if outcome.is_ok() || outcome == Outcome::Answered(status::NOENT) && domain.is_leaving() {
                return Err(verdict.refused.map_or(MapError::Dead, |refused| self.refusal(refused, range)));
            }
            log::error!("{}: {range} is mapped in part and cannot be unmapped", channel.name());
        }
        Ok(())
    }

    /// Tells the device of up to [`CHUNK`] mappings in `ranges` that it has not been told of. `false` if there are none.
    ///
    /// # Errors
    ///
    /// Why not. All of them count as made then, so that a revocation asks the device.
    fn tell(&self, ranges: &[IovaRange]) -> Result<bool, MapError> {
        let mut chunk = [Record::default(); CHUNK];
        let mut count = 0;
        let mut current = {
            let mut guard = self.state.lock();
            let State { domain, records, .. } = &mut *guard;
            let stage = if domain.is_some() { Stage::Busy } else { Stage::Recorded };
            let mut places = chunk.iter_mut();
            for range in ranges {
                for record in records.within(*range).iter_mut().filter(|record| record.stage == Stage::Unsynced) {
                    let Some(place) = places.next() else { break };
                    record.stage = stage;
                    *place = *record;
                    count += 1;
                }
            }
            domain.clone()
        };
        let chunk = &chunk[..count];
        while let Some(domain) = current.take() {
            let requests = chunk
                .iter()
                .map(|record| self.map_request(&domain, record.piece, record.prot.unwrap_or(Prot::empty())));
            let mut verdict = Verdict::default();
            self.common.channel.ask_all(requests, |outcome| verdict.note(outcome, &domain));
            if verdict.lost {
                // As in `make`.
                core::mem::forget(domain.clone());
            }
            let failed = verdict.lost || verdict.unsent || verdict.refused.is_some();
            let mut guard = self.state.lock();
            let state = &mut *guard;
            let stage = match &state.domain {
                // It has none of them, and was not told by anybody else: they are busy.
                Some(own) if !Arc::ptr_eq(own, &domain) && !failed => {
                    current = Some(own.clone());
                    continue;
                }
                None if !failed => Stage::Recorded,
                _ => Stage::Mapped,
            };
            for record in chunk.iter().map(|record| record.range()) {
                state.records.within(record).iter_mut().for_each(|record| record.stage = stage);
            }
            drop(guard);
            match verdict.refused {
                _ if !failed => (),
                Some(refused) => return Err(self.refusal(refused, format_args!("one of {} mappings", chunk.len()))),
                None => return Err(MapError::Dead),
            }
        }
        Ok(count != 0)
    }

    /// Claims all records in `ranges`. Returns the domain, and the first address at which there is none.
    fn claim(&self, ranges: &[IovaRange]) -> Result<(Option<Arc<DomainId>>, Option<Iova>), RevokeError> {
        let deadline = self.common.channel.deadline();
        let mut looks = 0;
        loop {
            let expired = deadline.has_passed();
            if let Some(claimed) = self.try_claim(ranges)? {
                return Ok(claimed);
            }
            if expired {
                return Err(RevokeError::TimedOut);
            }
            pause(&mut looks, deadline);
        }
    }

    /// As [`Space::claim`], or `None` if somebody else is at work on one of the records.
    #[allow(clippy::type_complexity)]
    fn try_claim(&self, ranges: &[IovaRange]) -> Result<Option<(Option<Arc<DomainId>>, Option<Iova>)>, RevokeError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut missing = None;
        for range in ranges {
            let mut at = range.start().get();
            for record in state.records.within(*range) {
                let start = Iova::new(record.piece.iova);
                if start < range.start() || record.end() > range.end().get() {
                    return Err(RevokeError::SplitsBlock(start));
                }
                if record.stage == Stage::Busy {
                    return Ok(None);
                }
                if record.piece.iova > at {
                    missing = missing.or(Some(Iova::new(at)));
                }
                at = record.end();
            }
            if at < range.end().get() {
                missing = missing.or(Some(Iova::new(at)));
            }
        }
        for range in ranges {
            let records = state.records.within(*range);
            if records.iter().all(|record| record.stage == Stage::Unsynced) {
                state.records.remove(*range);
                continue;
            }
            for record in records {
                record.stage = Stage::Busy;
            }
        }
        Ok(Some((state.domain.clone(), missing)))
    }

    /// Ends the claim to `range`: its records go, or stay because the device did not do as it was told.
    fn release(&self, range: IovaRange, revoked: bool) {
        let mut state = self.state.lock();
        if revoked {
            state.records.remove(range);
        } else {
            for record in state.records.within(range) {
                record.stage = Stage::Mapped;
            }
        }
    }
}

impl State {
    /// The domain is gone. To be dropped without the lock.
    fn cease(&mut self) -> Option<Arc<DomainId>> {
        self.endpoints = 0;
        for record in self.records.all() {
            if record.stage == Stage::Mapped {
                record.stage = Stage::Recorded;
            }
        }
        self.domain.take()
    }
}

// SAFETY: the contract of `iommu::contract`:
// - `revoke` returns `Ok` (or `NotMapped`) only after the device has answered an `UNMAP` of each range with success, which
//   includes the removal from its caches, or where the domain, and with it every mapping and every endpoint's way to them, is
//   gone; records about which a request is lost are kept as mapped, so that no later revocation passes over them;
// - `MAP` requests are made from what `map` was told, with the flags of its `prot`; the record of each is there before it.
unsafe impl AddressSpace for Space {
    fn aperture(&self) -> Aperture {
        self.common.limits.aperture
    }

    unsafe fn map(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let pieces = self.pieces(iova, runs, prot)?;
        let prot = prot - Prot::PAGEWISE;
        let with = |domain: &Option<_>| if domain.is_some() { Stage::Busy } else { Stage::Recorded };
        let Some(mut domain) = self.record(iova, &pieces, prot, with)? else { return Ok(()) };
        loop {
            let requests = pieces.clone().map(|piece| self.map_request(&domain, piece, prot));
            if let Err(error) = self.make(&domain, iova, requests) {
                self.release(iova, true);
                return Err(error);
            }
            match self.settle(iova, &domain) {
                None => return Ok(()),
                Some(new) => domain = new,
            }
        }
    }

    unsafe fn map_unsynced(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), MapError> {
        let pieces = self.pieces(iova, runs, prot)?;
        self.record(iova, &pieces, prot - Prot::PAGEWISE, |_| Stage::Unsynced).map(drop)
    }

    fn sync(&self, ranges: &[IovaRange]) -> Result<(), MapError> {
        while self.tell(ranges)? {}
        Ok(())
    }

    fn revoke(&self, ranges: &[IovaRange]) -> Result<(), RevokeError> {
        let aperture = self.common.limits.aperture.range;
        if let Some(&outside) = ranges.iter().find(|&&range| !aperture.covers(range)) {
            return Err(RevokeError::OutOfAperture(outside));
        }
        let (domain, missing) = self.claim(ranges)?;
        let missing = missing.map_or(Ok(()), |at| Err(RevokeError::NotMapped(at)));
        // What the device was never told is gone with its record.
        let told = |range: &IovaRange| !range.is_empty() && !self.state.lock().records.within(*range).is_empty();
        let ranges = || ranges.iter().copied().filter(told);
        let Some(domain) = domain else {
            // No endpoint: nothing reaches anything through this address space.
            ranges().for_each(|range| self.release(range, true));
            return missing;
        };
        let channel = &self.common.channel;
        let mut result = Ok(());
        let mut done = ranges();
        channel.ask_all(ranges().map(|range| Encoded::unmap(domain.get(), range)), |outcome| {
            let Some(range) = done.next() else { return };
            let gone = outcome == Outcome::Answered(status::NOENT) && domain.is_leaving();
            let revoked = outcome.is_ok() || gone;
            self.release(range, revoked);
            if revoked {
                return;
            }
            if outcome == Outcome::Lost {
                core::mem::forget(domain.clone());
            }
            if let Outcome::Answered(status) = outcome {
                log::error!("{}: it refuses to unmap {range} (status {status})", channel.name());
            }
            if result.is_ok() {
                result = Err(if outcome == Outcome::Lost { RevokeError::TimedOut } else { RevokeError::Dead });
            }
        });
        result.and(missing)
    }

    fn translate(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        self.state.lock().records.find(iova)
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, mappings) = {
            let state = self.state.lock();
            (state.domain.as_ref().map(|domain| domain.get()), state.records.len())
        };
        match number {
            Some(number) => write!(f, "virtio-iommu domain {number}")?,
            None => write!(f, "no virtio-iommu domain yet")?,
        }
        write!(f, ", {mappings} mappings")
    }
}
