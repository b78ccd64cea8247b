//! What a foreign driver has lent, and what it did wrong.

use crate::attributed::AttributedPages;
use crate::buffer::Spans;
use crate::held::Held;
use crate::quarantine::Quarantined;
use crate::site::Site;
use crate::{Bidirectional, Device, Error, FromDevice, Pages, ToDevice};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::ptr::NonNull;
use iommu::{Iova, IovaRange, Prot};
use virtio_drivers::BufferDirection;

/// What a foreign driver did against the rules of its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// It ended a share that does not exist: never made, ended before, or revoked when its device was removed.
    #[error("it unshared {0}, which is not shared")]
    NotShared(Iova),
    /// It ended a share with another buffer, or in another direction, than it was made with. Nothing was copied back.
    #[error("it unshared {0} with another buffer or direction than it was shared with")]
    OtherBuffer(Iova),
    /// It gave back pages that it does not have.
    #[error("it freed pages at {0}, which it does not have")]
    NotAllocated(Iova),
    /// It gave back other pages, or another number, than it was given. It keeps them.
    #[error("it freed the pages at {0} with another pointer or number than it was given")]
    OtherPages(Iova),
}

/// What became of the memory of a foreign driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The device in the slot, or the one that was in it last.
    pub device: Option<Arc<str>>,
    /// Buffers that are shared; in the report of a removal: that were left shared, and were revoked.
    pub shares: usize,
    /// Allocations (rings) that the driver has; in the report of a removal: that it still had, and were revoked.
    pub rings: usize,
    /// Requests for memory that failed.
    pub failures: u64,
    /// The last of them.
    pub last_failure: Option<Error>,
    /// What the driver did against the rules.
    pub misuses: u64,
    /// The last of it.
    pub last_misuse: Option<Misuse>,
    /// Pieces of memory that are in quarantine, because their revocation failed.
    pub quarantined: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shares, rings, failures, misuses, quarantined, .. } = self;
        write!(f, "{}: {shares} shares, {rings} rings", self.device.as_deref().unwrap_or("no device"))?;
        write!(f, ", {failures} failures, {misuses} misuses, {quarantined} in quarantine")?;
        if let Some(failure) = &self.last_failure {
            write!(f, "; the last failure: {failure}")?;
        }
        if let Some(misuse) = &self.last_misuse {
            write!(f, "; the last misuse: {misuse}")?;
        }
        Ok(())
    }
}

/// A loan in a direction that is known at run time only.
pub(super) enum Loan<M: Spans> {
    ToDevice(Held<ToDevice, M>),
    FromDevice(Held<FromDevice, M>),
    Both(Held<Bidirectional, M>),
}

impl<M: Spans> Loan<M> {
    /// Lends memory that is copied in and out.
    pub(super) fn lend(device: &Device, memory: M, direction: BufferDirection, site: Site) -> Result<Self, Error> {
        let lent = match direction {
            BufferDirection::DriverToDevice => Held::lend(device, memory, site).map(Self::ToDevice),
            BufferDirection::DeviceToDriver => Held::lend(device, memory, site).map(Self::FromDevice),
            BufferDirection::Both => Held::lend(device, memory, site).map(Self::Both),
        };
        lent.map_err(|(_, error)| error)
    }

    /// Lends memory that driver and device share.
    pub(super) fn lend_ring(device: &Device, memory: M, direction: BufferDirection, site: Site) -> Result<Self, Error> {
        let none = Prot::empty();
        match direction {
            BufferDirection::DriverToDevice => Held::lend_coherent(device, memory, none, site).map(Self::ToDevice),
            BufferDirection::DeviceToDriver => Held::lend_coherent(device, memory, none, site).map(Self::FromDevice),
            BufferDirection::Both => Held::lend_coherent(device, memory, none, site).map(Self::Both),
        }
    }

    pub(super) fn range(&self) -> IovaRange {
        match self {
            Self::ToDevice(held) => held.loan().range(),
            Self::FromDevice(held) => held.loan().range(),
            Self::Both(held) => held.loan().range(),
        }
    }

    pub(super) fn device(&self) -> &Device {
        match self {
            Self::ToDevice(held) => &held.loan().device,
            Self::FromDevice(held) => &held.loan().device,
            Self::Both(held) => &held.loan().device,
        }
    }

    fn memory(&self) -> &M {
        match self {
            Self::ToDevice(held) => held.memory(),
            Self::FromDevice(held) => held.memory(),
            Self::Both(held) => held.memory(),
        }
    }

    pub(super) fn take_back(self, site: Site) -> Result<M, Quarantined> {
        match self {
            Self::ToDevice(held) => held.take_back(site),
            Self::FromDevice(held) => held.take_back(site),
            Self::Both(held) => held.take_back(site),
        }
    }
}

/// A copy of a buffer of the driver's.
pub(super) struct Share {
    pub(super) loan: Loan<Pages>,
    /// The buffer, to be compared only.
    pub(super) buffer: NonZeroAddress,
    pub(super) len: usize,
    pub(super) direction: BufferDirection,
}

/// An address that nothing is reached through.
pub(super) type NonZeroAddress = core::num::NonZero<usize>;

impl Share {
    pub(super) fn is_of(&self, buffer: NonNull<[u8]>, direction: BufferDirection) -> bool {
        self.buffer == buffer.addr() && self.len == buffer.len() && self.direction == direction
    }
}

/// Pages that the driver was given, by pointer.
pub(super) struct Ring {
    pub(super) address: Iova,
    pub(super) pages: usize,
    pub(super) memory: RingMemory,
}

/// Where a ring is.
pub(super) enum RingMemory {
    /// With driver and device.
    Lent(Loan<AttributedPages>),
    /// With the driver alone: its device was removed.
    Kept(AttributedPages),
    /// In quarantine, since its device was removed.
    Lost,
}

impl Ring {
    /// Whether the driver got it as `pointer` to so many `pages`.
    pub(super) fn is(&self, pointer: NonNull<u8>, pages: usize) -> bool {
        let start = match &self.memory {
            RingMemory::Lent(loan) => loan.memory().span(0),
            RingMemory::Kept(memory) => memory.span(0),
            RingMemory::Lost => None,
        };
        self.pages == pages && start.is_none_or(|start| start.ptr == pointer)
    }

    pub(super) fn range(&self) -> Option<IovaRange> {
        match &self.memory {
            RingMemory::Lent(loan) => Some(loan.range()),
            _ => None,
        }
    }

    /// Revokes the device's access, and keeps the memory for the driver. Says if that failed.
    pub(super) fn revoke(&mut self, site: Site) -> Result<(), Quarantined> {
        match mem::replace(&mut self.memory, RingMemory::Lost) {
            RingMemory::Lent(loan) => {
                self.memory = RingMemory::Kept(loan.take_back(site)?);
                Ok(())
            }
            memory => {
                self.memory = memory;
                Ok(())
            }
        }
    }

    pub(super) fn start(&self) -> Option<NonNull<u8>> {
        match &self.memory {
            RingMemory::Lent(loan) => loan.memory().span(0).map(|start| start.ptr),
            _ => None,
        }
    }
}

/// The device of a slot.
pub(super) struct Occupant {
    pub(super) device: Device,
    /// Addresses that are set aside and never mapped.
    pub(super) nowhere: IovaRange,
}

/// All that a slot knows. Its lists have their room from the start.
pub(super) struct Account {
    pub(super) occupant: Option<Occupant>,
    pub(super) shares: Vec<Share>,
    pub(super) rings: Vec<Ring>,
    /// Rings that a driver still has whose device was removed.
    pub(super) orphans: Vec<Ring>,
    pub(super) report: Report,
}

impl Account {
    pub(super) const fn new() -> Self {
        let report = Report {
            device: None,
            shares: 0,
            rings: 0,
            failures: 0,
            last_failure: None,
            misuses: 0,
            last_misuse: None,
            quarantined: 0,
        };
        Self { occupant: None, shares: Vec::new(), rings: Vec::new(), orphans: Vec::new(), report }
    }

    /// Whether `device` is the one in the slot.
    fn has(&self, device: &Device) -> bool {
        self.occupant.as_ref().is_some_and(|occupant| occupant.device == *device)
    }

    /// Takes note of a share, and takes it; it stays where there is no room, or its device is gone meanwhile.
    pub(super) fn add_share(&mut self, share: &mut Option<Share>) -> Result<(), Error> {
        let ours = share.as_ref().is_some_and(|share| self.has(share.loan.device()));
        admit(&mut self.shares, share, ours)
    }

    /// As [`Account::add_share`], of a ring of `device`.
    pub(super) fn add_ring(&mut self, device: &Device, ring: &mut Option<Ring>) -> Result<(), Error> {
        let ours = self.has(device);
        admit(&mut self.rings, ring, ours)
    }

    /// Takes the ring at `address` out of the books, if it is exactly the one that the driver names. Those of a device that
    /// was removed come last: their addresses may be in use again.
    pub(super) fn take_ring(&mut self, address: Iova, pointer: NonNull<u8>, pages: usize) -> Result<Ring, Misuse> {
        let mut known = false;
        for list in [&mut self.rings, &mut self.orphans] {
            known |= list.iter().any(|ring| ring.address == address);
            if let Some(index) = list.iter().position(|ring| ring.address == address && ring.is(pointer, pages)) {
                return Ok(list.swap_remove(index));
            }
        }
        Err(if known { Misuse::OtherPages(address) } else { Misuse::NotAllocated(address) })
    }

    /// The report as of now.
    pub(super) fn report(&self) -> Report {
        Report { shares: self.shares.len(), rings: self.rings.len(), ..self.report.clone() }
    }
}

/// Moves `item` into `list`, if there is room without an allocation.
fn admit<T>(list: &mut Vec<T>, item: &mut Option<T>, ours: bool) -> Result<(), Error> {
    if !ours {
        return Err(Error::SlotEmpty);
    }
    if list.len() == list.capacity() {
        return Err(Error::TooMany(list.len()));
    }
    list.extend(item.take());
    Ok(())
}
