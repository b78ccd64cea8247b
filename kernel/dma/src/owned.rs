//! Address spaces that a driver fills by itself: the IOMMU-API.
//!
//! An [`OwnedDomain`] is a device address space without an allocator of addresses: its owner says what lies where. Memory that
//! is owned goes in safely ([`OwnedDomain::map_owned`]): the [`Placed`] guard has it until it is revoked. Raw physical ranges,
//! such as another device's registers, go in by an `unsafe` promise.
//!
//! [`OwnedDomain::attach`] puts the domain *in place of* what the DMA-API has mapped for the device: there is no moment without
//! translation. While the [`OwnedAttachment`] lives, the DMA-API refuses to map for the device; its mappings are kept, and
//! valid again when the attachment has ended. [`OwnedAttachment::swap`] exchanges the domain for another one while the device
//! is at work: each of its accesses sees one of the two.
//!
//! What a device always needs (the doorbell of its interrupts, what firmware has given it) is in an owned domain from the
//! beginning, and where a device's DMA addresses do not reach memory nothing can be placed, as in its DMA domain. Devices that
//! differ in these cannot share a domain.
//!
//! # Invariants
//!
//! From [`OwnedDomain::map_owned`] until a revocation has succeeded the memory is owned by the [`Placed`], and nobody has a
//! reference into it. Whoever forgets a guard leaks memory, or leaves the device where it is, and nothing else.
//!
//! # Locking
//!
//! One [`IrqMutex`] for the list of raw ranges, a leaf but for the heap's; not held while mapping or revoking. One maps in a domain at
//! a time ([`Domain::begin_mapping`]). What was placed last is placed again by a short way (`anchors`).

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space")]

mod anchors;
mod attached;
mod placed;

use attached::Away;
pub use attached::{IdentityAttachment, OwnedAttachment, vouch};
pub use placed::Placed;
use placed::Placement;

use self::anchors::{Anchors, Remembered};
use crate::held;
use crate::{Buffer, Device, Direction, Error, Rejected};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::{IrqMutex, fallible};
use core::fmt;
use core::hint::cold_path;
use core::marker::PhantomData;
use core::mem::{self, ManuallyDrop};
use core::panic::Location;
use iommu::contract::AddressSpace;
use iommu::domain::{Domain, DomainKind, ReservedKind, Revoking, Turn};
use iommu::group::AttachmentState;
use iommu::{AttachError, Iova, IovaError, IovaRange, MapError, PAGE_SIZE, PhysAddr, PhysRange, Prot, RevokeError};

/// A mapping that a device needs wherever it is attached.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fixed {
    iova: IovaRange,
    to: PhysRange,
    prot: Prot,
}

struct Inner {
    name: Arc<str>,
    domain: Arc<Domain>,
    coherent: bool,
    fixed: Vec<Fixed>,
    /// What `map_raw` has mapped.
    raw: IrqMutex<Vec<IovaRange>>,
    /// Of what was placed last.
    anchors: Anchors,
}

/// Whether all of `iova` leads to `to` already, with the rights of `prot`.
fn is_there(space: &dyn AddressSpace, iova: IovaRange, to: PhysRange, prot: Prot) -> bool {
    const RIGHTS: Prot = Prot::READ.union(Prot::WRITE).union(Prot::PRIVILEGED);
    (0..iova.len()).step_by(PAGE_SIZE as usize).all(|offset| {
        let there = space.translate(Iova::new(iova.start().get() + offset));
        there.is_some_and(|(phys, has)| phys.get() == to.start().get() + offset && has & RIGHTS == prot & RIGHTS)
    })
}

/// A device address space that its owner fills. Clones are the same domain.
#[derive(Clone)]
pub struct OwnedDomain(Arc<Inner>);

impl OwnedDomain {
    /// Makes a domain fit for `device`, with nothing in it but what the device always needs. The `name` is for reports.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`] where nothing translates for the device; [`Error::Attach`] where the IOMMU has no more address
    /// spaces; [`Error::Map`], [`Error::OutOfMemory`].
    pub fn new(name: &str, device: &Device) -> Result<Self, Error> {
        let space = device.translated()?.group().iommu().create()?;
        // SAFETY: nobody else maps in it.
        unsafe { Self::around(name, device, space, Prot::empty()) }
    }

    /// Makes a domain fit for `device` around an address space that others fill: what is mapped there, now and later, the device
    /// reaches. What the device always needs is mapped with the additional `prot`.
    ///
    /// # Errors
    ///
    /// As [`OwnedDomain::new`]; [`Error::Attach`] on attaching a space that is not of the device's IOMMU.
    ///
    /// # Safety
    ///
    /// For as long as the domain is attached, or its space can be, every device of it may access what is mapped in `space`, within
    /// the permissions there: whoever maps in it keeps that promise as for [`OwnedDomain::map_raw`], and maps nothing where the
    /// device's domain has something reserved.
    pub unsafe fn around(name: &str, device: &Device, space: Arc<dyn AddressSpace>, prot: Prot) -> Result<Self, Error> {
        let model = device.translated()?.domain();
        let domain = Domain::new(DomainKind::Owned, space, model.iova().window())?;
        for reserved in model.reserved() {
            domain.reserve(reserved.range, reserved.kind)?;
        }
        let fixed = fixed(model)?;
        for Fixed { iova, to, prot: needed } in &fixed {
            let prot = *needed | prot;
            // SAFETY: the board has mapped this for the device in its DMA domain, for good; only devices that have the same in
            // theirs are ever attached here (`check`).
            match unsafe { domain.space().map(*iova, &[*to], prot) } {
                // For a device that was here before.
                Err(MapError::AlreadyMapped(_)) if is_there(&**domain.space(), *iova, *to, prot) => {}
                mapped => mapped?,
            }
        }
        let raw = IrqMutex::new(Vec::new());
        let coherent = device.is_coherent();
        let name = fallible::text(name).ok_or(Error::OutOfMemory)?;
        let domain = fallible::arc(domain).map_err(|_| Error::OutOfMemory)?;
        let inner = fallible::arc(Inner { name, domain, coherent, fixed, raw, anchors: Anchors::new() });
        inner.map(Self).map_err(|_| Error::OutOfMemory)
    }

    /// Its name in reports.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.0.domain
    }

    /// Whether the devices that it is fit for snoop the caches.
    pub(crate) fn is_coherent(&self) -> bool {
        self.0.coherent
    }

    /// Maps `buffer` at `iova`, for every device that is attached now or later. Until the mapping is unmapped or dropped nobody
    /// else has the buffer.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the buffer back, with the reason: part of the range is mapped or reserved or cannot be translated
    /// ([`Error::Iova`]), or there is no memory for tables.
    #[track_caller]
    #[inline(always)] // As `map` below.
    pub fn map_owned<D: Direction, B: Buffer>(&self, iova: Iova, buffer: B) -> Result<Placed<D, B>, Rejected<B>> {
        let site = Location::caller();
        match self.place::<D, B>(iova, &buffer) {
            Ok((range, anchor)) => {
                let buffer = ManuallyDrop::new(buffer);
                Ok(Placed { domain: self.clone(), range, anchor, buffer, site, direction: PhantomData })
            }
            Err(error) => Err(Rejected { buffer, error }),
        }
    }

    #[inline(always)]
    fn place<D: Direction, B: Buffer>(&self, iova: Iova, buffer: &B) -> Result<(IovaRange, Placement), Error> {
        let len = buffer.spans_len();
        let Some(range) = IovaRange::new(iova, len) else { return Err(Error::BadSize(len)) };
        if !self.0.coherent {
            held::prepare::<D, B>(buffer, 0, len)?;
        }
        // SAFETY: `buffer` is owned: nobody has a reference into it (contract of Spans). When this succeeds it goes into a
        // `Placed`, which gives it back, or frees it, only after a successful revocation.
        let anchor = unsafe { self.map_or_anchor(range, buffer.spans_runs(), D::PROT) }?;
        Ok((range, anchor))
    }

    /// Maps `runs` at `range`, in turn, by an anchor if there is one for it.
    ///
    /// # Safety
    ///
    /// As [`iommu::contract::AddressSpace::map`].
    #[inline(always)] // As `map` below.
    unsafe fn map_or_anchor(&self, range: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<Placement, Error> {
        let prot = self.prot(prot);
        // Of a range that has an anchor it has been checked whether it may be mapped.
        let turn = self.0.domain.take_turn(range)?;
        // SAFETY: the turn is of this domain.
        let anchor = unsafe { self.0.anchors.take(range, &turn) };
        if let Some(remembered) = anchor {
            if let [run] = runs
                // SAFETY: the caller's promise. Nobody else maps while we have the turn.
                && unsafe { remembered.anchor().map_inline(*run, prot) }
            {
                return match turn.mapped(range) {
                    Ok(()) => Ok(Some(remembered)),
                    Err(error) => Err(self.give_up_anchored(range, remembered, error)),
                };
            }
            cold_path();
            self.0.anchors.give_back(remembered);
        }
        // SAFETY: the caller's promise.
        unsafe { self.map_first(turn, range, runs, prot) }
    }

    /// [`Self::map_or_anchor`] where no anchor is remembered, or it does not fit.
    ///
    /// # Safety
    ///
    /// As [`Self::map_or_anchor`].
    #[inline(never)]
    unsafe fn map_first(
        &self,
        turn: Turn<'_>,
        range: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
    ) -> Result<Placement, Error> {
        self.0.domain.check(range)?;
        let anchors = &self.0.anchors;
        if let [run] = runs
            // SAFETY: the turn is of this domain.
            && let Some(made) = unsafe { anchors.make(range, &**self.0.domain.space(), &turn) }
        {
            // SAFETY: the caller's promise. Nobody else maps while we have the turn.
            if unsafe { made.anchor().map(*run, prot) } {
                return match turn.mapped(range) {
                    Ok(()) => Ok(Some(made)),
                    Err(error) => Err(self.give_up_anchored(range, made, error)),
                };
            }
            anchors.give_back(made);
        }
        // SAFETY: the caller's promise.
        unsafe { self.map_in_turn(turn, range, runs, prot) }.map(|()| None)
    }

    /// Ends a mapping by an anchor that must not be, because of `error`.
    #[cold]
    #[inline(never)]
    fn give_up_anchored(&self, range: IovaRange, anchor: Box<Remembered>, error: IovaError) -> Error {
        self.0.anchors.give_back(anchor);
        self.give_up(range, error)
    }

    /// Maps the physical `runs` one after another at `iova`, until [`OwnedDomain::unmap`] or the end of the domain.
    ///
    /// # Errors
    ///
    /// [`Error::Iova`] where part of the range is mapped or reserved or cannot be translated, [`Error::Map`],
    /// [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// Until [`OwnedDomain::unmap`] of the range has returned `Ok`, or the domain and all attachments of it have been dropped,
    /// every device that is attached to the domain may access what lies at `runs` within `prot`, at any moment: nobody holds a
    /// reference to it that this would invalidate, it is not freed, and accesses do no harm.
    pub unsafe fn map_raw(&self, iova: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), Error> {
        self.0.raw.lock().try_reserve(1)?;
        // SAFETY: the caller's promise.
        unsafe { self.map(iova, runs, prot) }?;
        let mut raw = self.0.raw.lock();
        if raw.try_reserve(1).is_err() {
            drop(raw);
            self.revoke(iova).map_err(Error::Revoke)?;
            return Err(Error::OutOfMemory);
        }
        raw.push(iova);
        Ok(())
    }

    /// Ends a mapping that [`OwnedDomain::map_raw`] has made. After `Ok` no device reaches through it.
    ///
    /// # Errors
    ///
    /// [`Error::Iova`] if exactly this range was not mapped so; [`Error::Revoke`] if the revocation gave no guarantee: the
    /// range is never used again.
    pub fn unmap(&self, range: IovaRange) -> Result<(), Error> {
        {
            let mut raw = self.0.raw.lock();
            let place = raw.iter().position(|mapped| *mapped == range);
            raw.swap_remove(place.ok_or(IovaError::NotAllocated(range))?);
        }
        self.revoke(range).map_err(Error::Revoke)
    }

    /// What the byte at `iova` translates to, and what a device may do there.
    pub fn iova_to_phys(&self, iova: Iova) -> Option<(PhysAddr, Prot)> {
        self.0.domain.space().translate(iova)
    }

    /// Attaches `device`, with all of its group, in place of its DMA domain.
    ///
    /// # Errors
    ///
    /// [`Error::OwnedDomain`] if it is attached to another owned domain; [`Error::Unfit`] if the domain lacks what the device
    /// needs, or has what is another's; [`Error::Attach`], also where another device of its group is in use
    /// ([`AttachError::Shared`]). The device is where it was then.
    pub fn attach(&self, device: &Device) -> Result<OwnedAttachment, Error> {
        self.check(device)?;
        let translated = device.translated()?;
        if translated.has_left() {
            let state = AttachmentState::Blocked;
            return Err(Error::NotAttached { device: device.shared_name().clone(), state });
        }
        translated.group().attach_owned(self.0.domain.clone()).map_err(|error| taken(error, device))?;
        Ok(OwnedAttachment { away: Away { device: device.clone() }, domain: self.clone() })
    }

    /// Whether the domain has what `device` needs, and nothing that only another may have.
    fn check(&self, device: &Device) -> Result<(), Error> {
        let needed = fixed(device.translated()?.domain())?;
        let same = needed.len() == self.0.fixed.len() && needed.iter().all(|fixed| self.0.fixed.contains(fixed));
        if same && device.is_coherent() == self.0.coherent {
            return Ok(());
        }
        Err(Error::Unfit { domain: self.0.name.clone(), device: device.shared_name().clone() })
    }

    /// Maps `runs` at `range`, in turn.
    ///
    /// # Safety
    ///
    /// As [`iommu::contract::AddressSpace::map`].
    #[inline(always)] // Else what is at hand is put by for the call.
    pub(crate) unsafe fn map(&self, range: IovaRange, runs: &[PhysRange], prot: Prot) -> Result<(), Error> {
        let turn = self.0.domain.begin_mapping(range)?;
        // SAFETY: the caller's promise.
        unsafe { self.map_in_turn(turn, range, runs, self.prot(prot)) }
    }

    /// [`Self::map`], for who has the turn.
    ///
    /// # Safety
    ///
    /// As [`iommu::contract::AddressSpace::map`].
    #[inline(always)] // As above.
    unsafe fn map_in_turn(
        &self,
        turn: Turn<'_>,
        range: IovaRange,
        runs: &[PhysRange],
        prot: Prot,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise. Nobody else maps while we have the turn.
        match unsafe { self.0.domain.space().map(range, runs, prot) } {
            Ok(()) => turn.mapped(range).map_err(|error| self.give_up(range, error)),
            Err(error) => Err(refused(range, error)),
        }
    }

    /// `prot`, and what the domain's devices need besides.
    #[inline(always)]
    fn prot(&self, prot: Prot) -> Prot {
        if self.0.coherent { prot } else { prot | Prot::NON_COHERENT }
    }

    /// Ends a mapping that must not be, because of `error`.
    #[cold]
    fn give_up(&self, range: IovaRange, error: IovaError) -> Error {
        match self.revoke(range) {
            Ok(()) => error.into(),
            Err(cause) => Error::Revoke(cause),
        }
    }

    /// [`Self::revoke`] of what was mapped by an anchor.
    #[inline(always)] // As above.
    fn revoke_anchored(&self, range: IovaRange, remembered: Box<Remembered>) -> Result<(), RevokeError> {
        let revoking = self.0.domain.begin_revoking(range);
        // SAFETY: what this domain remembers are anchors of its own address space.
        match unsafe { self.0.domain.space().revoke_anchored(remembered.anchor()) } {
            Ok(()) => {
                revoking.succeeded();
                self.0.anchors.give_back(remembered);
                Ok(())
            }
            Err(cause) => {
                self.lose_anchored(revoking, remembered);
                Err(cause)
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn lose_anchored(&self, revoking: Revoking<'_>, remembered: Box<Remembered>) {
        self.lose(revoking);
        self.0.anchors.give_up(remembered);
    }

    /// Ends what is mapped at `range`. Where that fails the range is never used again, and the address space stays.
    #[inline(always)] // As above.
    pub(crate) fn revoke(&self, range: IovaRange) -> Result<(), RevokeError> {
        let revoking = self.0.domain.begin_revoking(range);
        match self.0.domain.space().revoke(&[range]) {
            Ok(()) => {
                revoking.succeeded();
                Ok(())
            }
            Err(cause) => {
                self.lose(revoking);
                Err(cause)
            }
        }
    }

    /// The range is lost, and the address space stays: what it translates may still be walked.
    #[cold]
    #[inline(never)]
    fn lose(&self, revoking: Revoking<'_>) {
        drop(revoking);
        mem::forget(self.clone());
    }
}

impl fmt::Debug for OwnedDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedDomain({}, {:?})", self.0.name, self.0.domain)
    }
}

/// What is mapped in a domain for good: reserved regions that translate.
fn fixed(domain: &Domain) -> Result<Vec<Fixed>, Error> {
    let page = domain.iova().page_size();
    let mut found: Vec<Fixed> = Vec::new();
    let kept = |kind| matches!(kind, ReservedKind::MsiDoorbell | ReservedKind::Firmware);
    for reserved in domain.reserved().filter(|reserved| kept(reserved.kind)) {
        for offset in (0..reserved.range.len()).step_by(crate::buffer::to_usize(page)) {
            let Some(iova) = reserved.range.part(offset, page) else { break };
            let Some((phys, prot)) = domain.space().translate(iova.start()) else { continue };
            let Some(to) = PhysRange::new(phys, page) else { continue };
            if found.iter().any(|other| other.iova.overlaps(iova)) {
                continue;
            }
            match found.last_mut() {
                // The next page of the same.
                Some(last) if last.iova.end() == iova.start() && last.to.end() == phys && last.prot == prot => {
                    last.iova = IovaRange::between(last.iova.start(), iova.end()).unwrap_or(last.iova);
                    last.to = PhysRange::between(last.to.start(), to.end()).unwrap_or(last.to);
                }
                _ => {
                    found.try_reserve(1)?;
                    found.push(Fixed { iova, to, prot });
                }
            }
        }
    }
    Ok(found)
}

#[cold]
#[inline(never)]
fn refused(range: IovaRange, error: MapError) -> Error {
    match error {
        MapError::AlreadyMapped(_) => Error::Iova(IovaError::InUse(range)),
        error => error.into(),
    }
}

fn taken(error: AttachError, device: &Device) -> Error {
    match error {
        AttachError::Owned => Error::OwnedDomain(device.shared_name().clone()),
        error => Error::Attach(error),
    }
}
