//! One bus master: who it is, what it can reach, and the way from its memory to its addresses.
//!
//! # Locking
//!
//! None on the way of a mapping but those of the group, the address allocator and the page table below, which are taken one
//! after the other.

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space")]

use crate::coherent::{Coherent, DeviceShared};
use crate::direct::{BusWindow, Windows};
use crate::explain::Explanation;
use crate::lazy::Lazy;
use crate::lent::{Lent, Segment, Segments};
use crate::memory::{DmaMemory, PageRequest};
use crate::pages::round_up;
use crate::record::{Records, Slot};
use crate::scoped::{self, Scoped};
use crate::site::Site;
use crate::stats::{self, DeviceStats};
use crate::translated::Translated;
use crate::{Buffer, Direction, Error, Ladder, Limits, Mapped, PageSet, Pages, Rejected};
use alloc::sync::Arc;
use core::fmt;
use core::panic::Location;
use core::sync::atomic::Ordering;
use iommu::contract::AddressSpace;
use iommu::group::{AttachmentState, Group};
use iommu::{Iova, IovaRange, PAGE_SIZE, PhysRange, Prot, RevokeError};

/// What a device behind an IOMMU is made of.
pub struct DeviceConfig<'a> {
    /// Its name in reports, such as `virtio-blk 0000:00:02.0`.
    pub name: &'a str,
    /// Its group, attached to its default DMA domain.
    pub group: Arc<Group>,
    /// What it can put on the bus.
    pub limits: Limits,
    /// Whether it snoops the CPU's caches.
    pub coherent: bool,
    /// Where its coherent and bounce memory comes from.
    pub memory: &'static dyn DmaMemory,
}

/// What a device without an IOMMU is made of.
pub struct DirectConfig<'a> {
    /// Its name in reports.
    pub name: &'a str,
    /// The physical memory that it reaches, and where; [`BusWindow::identity`] if nothing is said of it.
    pub windows: &'a [BusWindow],
    /// What it can put on the bus.
    pub limits: Limits,
    /// Whether it snoops the CPU's caches.
    pub coherent: bool,
    /// Where its coherent and bounce memory comes from.
    pub memory: &'static dyn DmaMemory,
}

/// One bus master. Clones are the same device; its mappings keep it, and with it the address space, alive.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    name: Arc<str>,
    limits: Limits,
    coherent: bool,
    memory: &'static dyn DmaMemory,
    backend: Backend,
    records: Arc<Records>,
    lazy: Lazy,
}

enum Backend {
    Translated(Translated),
    Direct(Windows),
}

impl Device {
    /// Makes the device of a group that is attached to its default DMA domain. The device keeps to that domain: what is mapped
    /// while the group is elsewhere would not be reached, and is refused.
    ///
    /// # Errors
    ///
    /// [`Error::NotAttached`] or [`Error::OwnedDomain`] where the group is attached to nothing or to another domain,
    /// [`Error::BadLimits`], [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// - All bus masters that the device stands for are streams of `group` and are translated by the group's IOMMU, so that
    ///   the contract of [`iommu::contract`] speaks of them.
    /// - `coherent` is true only if the device's accesses snoop the CPU's caches.
    pub unsafe fn new(config: DeviceConfig<'_>) -> Result<Self, Error> {
        config.limits.check()?;
        let name = Arc::from(config.name);
        let backend = Backend::Translated(Translated::new(config.group, &name)?);
        Self::register(name, config.limits, config.coherent, config.memory, backend)
    }

    /// Makes a device that no IOMMU translates for. Nothing keeps it from any memory.
    ///
    /// # Errors
    ///
    /// [`Error::BadWindow`], [`Error::BadLimits`], [`Error::OutOfMemory`].
    ///
    /// # Safety
    ///
    /// - The board vouches for the device: it accesses no memory but what its driver tells it to, and no longer than its driver
    ///   tells it to.
    /// - The windows say where the memory is for the device.
    /// - `coherent` is true only if the device's accesses snoop the CPU's caches.
    pub unsafe fn direct(config: DirectConfig<'_>) -> Result<Self, Error> {
        config.limits.check()?;
        let backend = Backend::Direct(Windows::new(config.windows)?);
        Self::register(Arc::from(config.name), config.limits, config.coherent, config.memory, backend)
    }

    fn register(
        name: Arc<str>,
        limits: Limits,
        coherent: bool,
        memory: &'static dyn DmaMemory,
        backend: Backend,
    ) -> Result<Self, Error> {
        let records = Arc::new(Records::new()?);
        stats::register(&records)?;
        Ok(Self(Arc::new(Inner { name, limits, coherent, memory, backend, records, lazy: Lazy::new() })))
    }

    /// Its name in reports.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// What it can put on the bus.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Whether an IOMMU keeps it from memory that it was not lent.
    pub fn is_isolated(&self) -> bool {
        matches!(self.0.backend, Backend::Translated(_))
    }

    /// Whether it snoops the CPU's caches.
    #[inline]
    pub fn is_coherent(&self) -> bool {
        self.0.coherent
    }

    /// Where its memory comes from.
    pub fn memory(&self) -> &'static dyn DmaMemory {
        self.0.memory
    }

    /// The smallest unit that can be lent to it, in bytes: buffers are multiples of this.
    pub fn page_size(&self) -> u64 {
        match &self.0.backend {
            Backend::Translated(translated) => translated.page_size(),
            Backend::Direct(_) => PAGE_SIZE,
        }
    }

    /// Checks that `lent` was lent to this device. Every driver does so before it names an address to its device.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignDevice`].
    #[inline]
    pub fn check_loan(&self, lent: &dyn Lent) -> Result<(), Error> {
        let owner = lent.device();
        if owner == self {
            return Ok(());
        }
        Err(Error::ForeignDevice { lent_to: owner.0.name.clone(), device: self.0.name.clone() })
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that the device reaches.
    ///
    /// # Errors
    ///
    /// As [`Pages::zeroed`].
    pub fn pages(&self, bytes: u64) -> Result<Pages, Error> {
        Pages::allocate(self.0.memory, self.request(bytes)?)
    }

    /// Allocates at least `bytes` of zeroed memory that the device reaches, in chunks of `ladder`.
    ///
    /// # Errors
    ///
    /// As [`PageSet::allocate`].
    pub fn page_set(&self, bytes: u64, ladder: Ladder) -> Result<PageSet, Error> {
        PageSet::allocate(self.0.memory, self.request(bytes)?, ladder)
    }

    /// A request for whole pages of the device's, where the device reaches them.
    pub(crate) fn request(&self, bytes: u64) -> Result<PageRequest, Error> {
        let page_size = self.page_size();
        let bytes = round_up(bytes)?.checked_next_multiple_of(page_size).ok_or(Error::BadSize(bytes))?;
        let below = match &self.0.backend {
            Backend::Translated(translated) => translated.space().aperture().output_max,
            Backend::Direct(windows) => windows.reach(&self.0.limits),
        };
        Ok(PageRequest { bytes, align: page_size, below })
    }

    /// Lends `buffer` to the device. Until the mapping is unmapped or dropped nobody else has it.
    ///
    /// # Errors
    ///
    /// [`Rejected`] gives the buffer back, with the reason: no free address, no memory for tables, the group is blocked or
    /// attached to a driver's own domain, the memory cannot be reached.
    #[inline]
    #[track_caller]
    pub fn map<D: Direction, B: Buffer>(&self, buffer: B) -> Result<Mapped<D, B>, Rejected<B>> {
        Mapped::new(self, buffer, Location::caller())
    }

    /// Lends `buffer` to the device at `iova`: for devices that insist on an address. From here on until the mapping ends, the
    /// DMA-API allocates only from what remains.
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::Iova`] where part of the range is reserved or lent already, or out of the device's reach;
    /// [`Error::NotIsolated`] where nothing translates.
    #[track_caller]
    pub fn map_at<D: Direction, B: Buffer>(&self, iova: Iova, buffer: B) -> Result<Mapped<D, B>, Rejected<B>> {
        Mapped::new_at(self, Some(iova), buffer, Location::caller())
    }

    /// Allocates a zeroed `T` that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::BadLayout`], and as [`Device::map`].
    #[track_caller]
    pub fn coherent<T: DeviceShared>(&self) -> Result<Coherent<T>, Error> {
        Coherent::new(self, Location::caller())
    }

    /// Allocates `count` zeroed `T` one after another that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// As [`Device::coherent`].
    #[track_caller]
    pub fn coherent_slice<T: DeviceShared>(&self, count: usize) -> Result<Coherent<[T]>, Error> {
        Coherent::new_slice(self, count, Location::caller())
    }

    /// Lends a copy of borrowed `bytes` to the device while `f` runs; see [`Scoped`] for why it is always a copy.
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::StillLent`] or [`Error::Quarantined`] where the device could not be shown to have
    /// finished: `bytes` are then as they were.
    #[track_caller]
    pub fn with_mapped<D: Direction, R>(
        &self,
        bytes: &mut [u8],
        f: impl FnOnce(&Scoped<'_, D>) -> R,
    ) -> Result<R, Error> {
        scoped::run(self, bytes, f, Location::caller())
    }

    /// Says what the records know of a DMA address: for fault reports. Neither allocates nor waits; looks at the group's state
    /// under its lock.
    pub fn explain(&self, iova: Iova) -> Explanation<'_> {
        let translation = match &self.0.backend {
            Backend::Translated(translated) => translated.space().translate(iova),
            Backend::Direct(_) => None,
        };
        let elsewhere = match &self.0.backend {
            Backend::Translated(translated) => match translated.group().current() {
                state @ (AttachmentState::Owned | AttachmentState::Identity) => Some(state),
                _ => None,
            },
            Backend::Direct(_) => None,
        };
        Explanation::new(&self.0.name, &self.0.records, translation, elsewhere, iova)
    }

    /// The way through the IOMMU.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`] where there is none.
    pub(crate) fn translated(&self) -> Result<&Translated, Error> {
        match &self.0.backend {
            Backend::Translated(translated) => Ok(translated),
            Backend::Direct(_) => Err(Error::NotIsolated(self.0.name.clone())),
        }
    }

    #[inline]
    pub(crate) fn lazy(&self) -> &Lazy {
        &self.0.lazy
    }

    /// What is lent to the device, and what was.
    pub fn stats(&self) -> DeviceStats {
        DeviceStats::of(&self.0.records)
    }

    /// Takes the device out of use: nothing can be mapped for it any more, and if no other device of its group is in use, the
    /// group is blocked, so that it reaches nothing. For removal; mappings may outlive it harmlessly. (A device that shares its
    /// group with one in use cannot be told from it by the IOMMU: whoever removes it takes it off the bus first.)
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]. A device without an IOMMU cannot be blocked; that is no error.
    pub fn shut_down(&self) -> Result<(), Error> {
        match &self.0.backend {
            Backend::Translated(translated) => {
                translated.leave()?;
                self.0.lazy.flush();
                Ok(())
            }
            Backend::Direct(_) => Ok(()),
        }
    }

    /// Lends the memory of `runs`, `len` bytes: at `at`, or wherever there is room.
    ///
    /// # Safety
    ///
    /// Until a revocation of the loan has succeeded, the device may access the memory within `prot`: there is no reference to it that
    /// this would invalidate, and it is not freed.
    #[inline]
    pub(crate) unsafe fn lend(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        let prot = if self.0.coherent { prot } else { prot | Prot::NON_COHERENT };
        let (segments, range) = match &self.0.backend {
            Backend::Translated(translated) => {
                let range = match at {
                    // SAFETY: the caller's promise is what `map` asks for.
                    None => unsafe { translated.map(runs, len, prot, &self.0.limits, &self.0.name) }?,
                    Some(iova) => {
                        let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
                        // SAFETY: as above.
                        unsafe { translated.map_at(range, runs, prot, &self.0.limits, &self.0.name) }?;
                        range
                    }
                };
                (Segments::One(Segment { iova: range.start(), len }), range)
            }
            Backend::Direct(_) if at.is_some() => return Err(Error::NotIsolated(self.0.name.clone())),
            Backend::Direct(windows) => {
                let segments = windows.segments(runs, &self.0.limits, &self.0.name)?;
                let first = segments.as_slice().first().map(|segment| segment.iova).unwrap_or_default();
                (segments, IovaRange::new(first, len).unwrap_or_default())
            }
        };
        let slot = self.0.records.begin(range, prot, site);
        let origin = if at.is_some() { Origin::Fixed } else { Origin::Allocated };
        Ok(Loan { device: self.clone(), segments, range, slot, site, origin })
    }

    /// Lends the memory of `runs`, `len` bytes, at `iova`, which the caller has reserved and keeps until the loan has ended.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_reserved(
        &self,
        iova: Iova,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        let prot = if self.0.coherent { prot } else { prot | Prot::NON_COHERENT };
        let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
        // SAFETY: the caller's promise.
        unsafe { self.translated()?.map_reserved(range, runs, prot, &self.0.name) }?;
        let slot = self.0.records.begin(range, prot, site);
        let segments = Segments::One(Segment { iova, len });
        Ok(Loan { device: self.clone(), segments, range, slot, site, origin: Origin::Reserved })
    }
}

/// Two handles are equal when they are the same device.
impl PartialEq for Device {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.0.name)
    }
}

/// The address side of a mapping: what the device was told. Ends by [`Loan::settle`] only; forgetting it leaks.
pub struct Loan {
    pub(crate) device: Device,
    pub(crate) segments: Segments,
    pub(crate) range: IovaRange,
    slot: Slot,
    pub(crate) site: Site,
    origin: Origin,
}

/// Whose the address range of a loan is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The loan's, from the allocator.
    Allocated,
    /// The loan's, where its driver wanted it.
    Fixed,
    /// Somebody else's, who reserved it.
    Reserved,
}

impl Loan {
    /// The address space that it was made in; `None` where nothing translates.
    #[inline]
    pub(crate) fn space(&self) -> Option<&dyn AddressSpace> {
        match &self.device.0.backend {
            Backend::Translated(translated) => Some(translated.space()),
            Backend::Direct(_) => None,
        }
    }

    /// Revokes this loan alone.
    #[inline]
    pub(crate) fn revoke(&self) -> Result<(), RevokeError> {
        self.space().map_or(Ok(()), |space| space.revoke(&[self.range]))
    }

    /// Gives the address range back after a revocation of it that ended with `outcome`.
    ///
    /// # Errors
    ///
    /// That of the revocation: the device may reach the memory for ever. The address range is never used again, and the
    /// address space stays.
    #[inline]
    pub(crate) fn settle(self, outcome: Result<(), RevokeError>, site: Site) -> Result<(), (RevokeError, Self)> {
        let inner = &self.device.0;
        if let Err(cause) = outcome {
            let counters = &inner.records.counters;
            counters.quarantined.fetch_add(self.range.len() / PAGE_SIZE, Ordering::Relaxed);
            counters.quarantined_bytes.fetch_add(self.range.len(), Ordering::Relaxed);
            core::mem::forget(self.device.clone());
            return Err((cause, self));
        }
        inner.records.end(self.slot, self.range, self.site, site);
        if let Backend::Translated(translated) = &inner.backend {
            match self.origin {
                Origin::Allocated => translated.release(self.range),
                Origin::Fixed => translated.release_fixed(self.range),
                Origin::Reserved => (),
            }
        }
        Ok(())
    }
}
