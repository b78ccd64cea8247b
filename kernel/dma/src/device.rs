//! One bus master: who it is, what it can reach, and the way from its memory to its addresses.
//!
//! # Locking
//!
//! None on the way of a mapping but those of the group, the address allocator and the page table below, which are taken one
//! after the other.

#![expect(unsafe_code, reason = "makes mappings, through an unsafe method of the address space")]

use crate::bounce::Bounced;
use crate::coherent::{Coherent, DeviceShared, Unpublished};
use crate::combined::WriteCombined;
use crate::direct::{BusWindow, Direct};
use crate::explain::Explanation;
use crate::hidden::HiddenPages;
use crate::lazy::Lazy;
use crate::lent::{Lent, Segment, Segments};
use crate::memory::{DmaMemory, PageRequest};
use crate::pages::round_up;
use crate::policy::{self, Source};
use crate::pool::PoolRef;
use crate::record::{Records, Slot};
use crate::scoped::{self, Scoped};
use crate::site::Site;
use crate::stats::{self, DeviceStats};
use crate::tracker::Report;
use crate::translated::{self, Translated};
use crate::{
    Bidirectional, Bounce, Buffer, Bytes, Direction, Error, Ladder, Limits, Mapped, MappedBytes, MappedPeer, PageSet,
    Pages, PeerRange, Policy, Pool, Rejected,
};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::fallible;
use core::fmt;
use core::panic::Location;
use core::sync::atomic::{AtomicU64, Ordering};
use iommu::contract::AddressSpace;
use iommu::group::{AttachmentState, Group};
use iommu::{Iova, IovaRange, PAGE_SIZE, PhysRange, Prot, RevokeError};

/// Mappings that are named one by one on the console when a device is removed.
const LOGGED: usize = 8;

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
    trusted: bool,
    pool: Source,
    /// Copies that were lent.
    copies: AtomicU64,
    lazy: Lazy,
}

/// The way of a device's memory to its addresses. What is special about a device is another variant, so that the others do not
/// ask for it.
enum Backend {
    Translated(Translated),
    Direct(Direct),
    /// Buffers are copied first, and the copies go one of the two ways above.
    CopiedTranslated(Translated, Copying),
    CopiedDirect(Direct, Copying),
}

/// Which buffers are copied.
enum Copying {
    All,
    /// All that are not this pool's.
    Foreign(&'static Pool),
}

/// Through the IOMMU or past it.
enum Way<'a> {
    Translated(&'a Translated),
    Direct(&'a Direct),
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
        // SAFETY: the caller's promise; nothing is trusted.
        unsafe { Self::with_policy(config, Policy::default()) }
    }

    /// As [`Device::new`], with a say in how it is treated. Where its only memory is a restricted pool, that is its memory instead
    /// of what `config` says.
    ///
    /// # Errors
    ///
    /// As [`Device::new`].
    ///
    /// # Safety
    ///
    /// As [`Device::new`], and where the policy says that it is trusted: the board vouches for the device, as for
    /// [`Device::direct`].
    pub unsafe fn with_policy(config: DeviceConfig<'_>, policy: Policy) -> Result<Self, Error> {
        config.limits.check()?;
        let name = fallible::text(config.name).ok_or(Error::OutOfMemory)?;
        let translated = Translated::new(config.group, &name)?;
        let backend = match Copying::of(&policy) {
            None => Backend::Translated(translated),
            Some(copying) => Backend::CopiedTranslated(translated, copying),
        };
        Self::register(name, config.limits, config.coherent, config.memory, backend, &policy)
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
        // SAFETY: the caller's promise.
        unsafe { Self::direct_with_policy(config, None, Policy::default()) }
    }

    /// As [`Device::direct`], with a say in how it is treated, and with the `group` that an IOMMU lets through
    /// ([`Group::attach_identity`]), if there is one. The device is then a user of the group.
    ///
    /// # Errors
    ///
    /// As [`Device::direct`]; [`Error::NotAttached`] where the group is not let through.
    ///
    /// # Safety
    ///
    /// As [`Device::direct`].
    pub unsafe fn direct_with_policy(
        config: DirectConfig<'_>,
        group: Option<Arc<Group>>,
        policy: Policy,
    ) -> Result<Self, Error> {
        config.limits.check()?;
        let name = fallible::text(config.name).ok_or(Error::OutOfMemory)?;
        let direct = Direct::new(config.windows, &config.limits, group, &name)?;
        let backend = match Copying::of(&policy) {
            None => Backend::Direct(direct),
            Some(copying) => Backend::CopiedDirect(direct, copying),
        };
        Self::register(name, config.limits, config.coherent, config.memory, backend, &policy)
    }

    fn register(
        name: Arc<str>,
        limits: Limits,
        coherent: bool,
        memory: &'static dyn DmaMemory,
        backend: Backend,
        policy: &Policy,
    ) -> Result<Self, Error> {
        let translated = matches!(backend, Backend::Translated(_));
        let records = fallible::arc(Records::new(name.clone(), translated)?).map_err(|_| Error::OutOfMemory)?;
        stats::register(&records)?;
        let memory = match policy.bounce {
            Bounce::Restricted(pool) => pool,
            _ => memory,
        };
        let (trusted, pool, copies) = (policy.trusted, Source::new(&policy.bounce), AtomicU64::new(0));
        let inner =
            Inner { name, limits, coherent, memory, backend, records, trusted, pool, copies, lazy: Lazy::new() };
        fallible::arc(inner).map(Self).map_err(|_| Error::OutOfMemory)
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
        matches!(self.way(), Way::Translated(_))
    }

    /// Whether a buffer that shares its page with other memory is lent to it as it is.
    pub fn is_trusted(&self) -> bool {
        self.0.trusted
    }

    /// How often it was lent a copy in place of a buffer.
    pub fn copies(&self) -> u64 {
        self.0.copies.load(Ordering::Relaxed)
    }

    /// The most bytes that can be mapped at one time, wherever the buffer is: bounded by the device's addresses, and where it may
    /// need a copy, by the pool. (A buffer that the device itself has allocated may be larger.)
    pub fn max_mapping_size(&self) -> u64 {
        let limits = &self.0.limits;
        let addresses = match self.way() {
            Way::Translated(translated) => translated.largest(limits.address_mask),
            Way::Direct(direct) => direct.windows.reach(limits.address_mask).get(),
        };
        let copied = match &self.0.backend {
            Backend::Translated(_) => false,
            Backend::Direct(direct) => {
                let unlimited = limits.address_mask == u64::MAX && limits.min_align <= PAGE_SIZE;
                !(unlimited && direct.windows.is_all()) && self.0.pool.size() != 0
            }
            Backend::CopiedTranslated(..) | Backend::CopiedDirect(..) => true,
        };
        if copied { addresses.min(self.0.pool.size()) } else { addresses }
    }

    /// The size of mappings, in bytes, beyond which larger ones gain nothing: what the device says, and what the allocator of
    /// addresses keeps ready.
    pub fn optimal_mapping_size(&self) -> u64 {
        let ready = match self.way() {
            Way::Translated(translated) => translated.page_size().saturating_mul(translated::READY_PAGES),
            Way::Direct(_) => u64::MAX,
        };
        self.0.limits.optimal_size.min(ready).min(self.max_mapping_size())
    }

    #[inline]
    fn way(&self) -> Way<'_> {
        match &self.0.backend {
            Backend::Translated(translated) | Backend::CopiedTranslated(translated, _) => Way::Translated(translated),
            Backend::Direct(direct) | Backend::CopiedDirect(direct, _) => Way::Direct(direct),
        }
    }

    #[inline(always)]
    fn translated_way(&self) -> Option<&Translated> {
        match self.way() {
            Way::Translated(translated) => Some(translated),
            Way::Direct(_) => None,
        }
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
        match self.way() {
            Way::Translated(translated) => translated.page_size(),
            Way::Direct(_) => PAGE_SIZE,
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
        self.request_below(bytes, self.0.limits.address_mask)
    }

    /// A request for whole pages that are coherent memory of the device's.
    pub(crate) fn coherent_request(&self, bytes: u64) -> Result<PageRequest, Error> {
        self.request_below(bytes, self.0.limits.coherent_mask)
    }

    fn request_below(&self, bytes: u64, mask: u64) -> Result<PageRequest, Error> {
        let page_size = self.page_size();
        let bytes = round_up(bytes)?.checked_next_multiple_of(page_size).ok_or(Error::BadSize(bytes))?;
        let (align, below) = match self.way() {
            Way::Translated(translated) => (page_size, translated.space().aperture().output_max),
            Way::Direct(direct) => (page_size.max(self.0.limits.min_align), direct.windows.reach(mask)),
        };
        Ok(PageRequest { bytes, align, below })
    }

    /// A pool for copies, of memory that the device reaches.
    pub(crate) fn make_pool(&self, bytes: u64) -> Result<Pool, Error> {
        let Inner { name, limits, memory, .. } = &*self.0;
        match self.way() {
            Way::Translated(translated) => Pool::new(name, *memory, bytes, translated.space().aperture().output_max),
            Way::Direct(Direct { windows, .. }) => {
                let fit = |run| windows.segments(&[run], limits.address_mask, 1, name).is_ok();
                Pool::reached(name, *memory, bytes, windows.reach(limits.address_mask), fit)
            }
        }
    }

    /// The pool for a copy of a buffer that was refused because of `why`.
    ///
    /// # Errors
    ///
    /// `why`, if a copy does not help, or there is no memory that the device reaches to make a pool of.
    #[cold]
    pub(crate) fn pool_for(&self, why: Error) -> Result<PoolRef, Error> {
        if !policy::helps(&why) {
            return Err(why);
        }
        self.0.pool.get(self).map_err(|_| why)
    }

    pub(crate) fn count_copy(&self) {
        self.0.copies.fetch_add(1, Ordering::Relaxed);
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

    /// Lends bytes that are no whole pages. A device that is not trusted gets a copy: see [`Bytes`].
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::PoolExhausted`].
    #[track_caller]
    pub fn map_bytes<D: Direction>(&self, bytes: Bytes) -> Result<MappedBytes<D>, Rejected<Bytes>> {
        MappedBytes::new(self, bytes, Location::caller())
    }

    /// Lends what belongs to another device on the bus: see [`PeerRange`].
    ///
    /// # Errors
    ///
    /// As [`Device::map`]; [`Error::Unreachable`] where a restricted pool is all that the device may reach.
    #[track_caller]
    pub fn map_peer<D: Direction>(&self, range: PeerRange) -> Result<MappedPeer<D>, Rejected<PeerRange>> {
        MappedPeer::new(self, range, Location::caller())
    }

    /// Allocates a zeroed `T` that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::BadLayout`], and as [`Device::map`].
    #[track_caller]
    pub fn coherent<T: DeviceShared>(&self) -> Result<Coherent<T>, Error> {
        Coherent::new(self, Prot::empty(), Location::caller())
    }

    /// As [`Device::coherent`], for privileged transactions of the device only.
    ///
    /// # Errors
    ///
    /// As there; [`Error::Unsupported`] where nothing tells them from others.
    #[track_caller]
    pub fn coherent_privileged<T: DeviceShared>(&self) -> Result<Coherent<T>, Error> {
        Coherent::new(self, Prot::PRIVILEGED, Location::caller())
    }

    /// Allocates a zeroed `T` for sharing with the device, which does not reach it before [`Unpublished::publish`].
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], [`Error::BadLayout`], [`Error::Attributes`].
    pub fn coherent_init<T: DeviceShared>(&self) -> Result<Unpublished<T>, Error> {
        Unpublished::new(self)
    }

    /// As [`Device::coherent_init`], for `count` of them one after another.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn coherent_init_slice<T: DeviceShared>(&self, count: usize) -> Result<Unpublished<[T]>, Error> {
        Unpublished::new_slice(self, count)
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that the CPU streams into and the device reads.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`]; [`Error::Attributes`] where the memory cannot be had uncached.
    #[track_caller]
    pub fn write_combined(&self, bytes: u64) -> Result<WriteCombined, Error> {
        WriteCombined::new(self, bytes, Location::caller())
    }

    /// Allocates at least `bytes` of zeroed, contiguous memory that only the device reaches.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`]; [`Error::Attributes`] where the memory cannot leave the kernel's address space.
    #[track_caller]
    pub fn hidden(&self, bytes: u64) -> Result<HiddenPages, Error> {
        HiddenPages::new(self, bytes, Location::caller())
    }

    /// Allocates at least `bytes` of zeroed, contiguous, cached memory and lends it in both directions: for long, with
    /// [`Mapped::sync_for_cpu`] and [`Mapped::sync_for_device`] between the two sides' turns.
    ///
    /// # Errors
    ///
    /// As [`Device::pages`] and [`Device::map`].
    #[track_caller]
    pub fn non_coherent(&self, bytes: u64) -> Result<Mapped<Bidirectional, Pages>, Error> {
        Ok(Mapped::new(self, self.pages(bytes)?, Location::caller())?)
    }

    /// Allocates `count` zeroed `T` one after another that the CPU and the device share without synchronization.
    ///
    /// # Errors
    ///
    /// As [`Device::coherent`].
    #[track_caller]
    pub fn coherent_slice<T: DeviceShared>(&self, count: usize) -> Result<Coherent<[T]>, Error> {
        Coherent::new_slice(self, count, Prot::empty(), Location::caller())
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
        let translated = self.translated().ok();
        let translation = translated.and_then(|translated| translated.space().translate(iova));
        let elsewhere = translated.map(|translated| translated.group().current());
        let away = |state: &AttachmentState| matches!(state, AttachmentState::Owned | AttachmentState::Identity);
        let elsewhere = elsewhere.filter(away);
        Explanation::new(&self.0.name, &self.0.records, translation, elsewhere, iova)
    }

    /// The way through the IOMMU.
    ///
    /// # Errors
    ///
    /// [`Error::NotIsolated`] where there is none.
    pub(crate) fn translated(&self) -> Result<&Translated, Error> {
        match self.way() {
            Way::Translated(translated) => Ok(translated),
            Way::Direct(_) => Err(Error::NotIsolated(self.0.name.clone())),
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

    /// Lists what is lent to the device at this moment.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if there is no memory for the list.
    pub fn lendings(&self) -> Result<Report, Error> {
        let mut report = Report::default();
        report.add(&self.0.records)?;
        report.sort();
        Ok(report)
    }

    /// Takes the device out of use, as [`Device::shut_down`] does, and lists what its drivers have not taken back, the
    /// first on the console too: for the removal of a device whose drivers should be done with it.
    ///
    /// # Errors
    ///
    /// As [`Device::shut_down`]; [`Error::OutOfMemory`] if there is no memory for the list (the device is out of use then).
    pub fn remove(&self) -> Result<Report, Error> {
        self.shut_down()?;
        let left = self.lendings()?;
        if !left.is_empty() {
            log::warn!("{}: {} still lent at its removal", self.0.name, left.count());
            left.lendings.iter().take(LOGGED).for_each(|lending| log::warn!("  {lending}"));
        }
        Ok(left)
    }

    /// Takes the device out of use: nothing can be mapped for it any more, and if no other device of its group is in use, the
    /// group is blocked, so that it reaches nothing. For removal; mappings may outlive it harmlessly. (A device that shares its
    /// group with one in use cannot be told from it by the IOMMU: whoever removes it takes it off the bus first.)
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]. A device without an IOMMU cannot be blocked; that is no error. One that an IOMMU lets through is
    /// blocked too, but mapping for it is not refused.
    pub fn shut_down(&self) -> Result<(), Error> {
        match self.way() {
            Way::Translated(translated) => {
                translated.leave()?;
                self.0.lazy.flush();
                Ok(())
            }
            Way::Direct(direct) => Ok(direct.leave()?),
        }
    }

    /// Lends the memory of `runs`, `len` bytes: at `at`, or wherever there is room.
    ///
    /// # Safety
    ///
    /// Until a revocation of the loan has succeeded, the device may access the memory within `prot`: there is no reference to it that
    /// this would invalidate, and it is not freed.
    #[inline(always)]
    pub(crate) unsafe fn lend(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        let mask = self.0.limits.address_mask;
        match &self.0.backend {
            // SAFETY: the caller's promise, here and below.
            Backend::Translated(translated) => unsafe { self.translate(translated, at, runs, len, prot, mask, site) },
            Backend::Direct(direct) => match (runs, at) {
                ([run], None) => match direct.near(*run) {
                    Some(iova) => Ok(self.one(Segment { iova, len }, prot, site)),
                    None => self.pass(direct, at, runs, len, prot, mask, site),
                },
                _ => self.pass(direct, at, runs, len, prot, mask, site),
            },
            Backend::CopiedTranslated(_, copying) | Backend::CopiedDirect(_, copying) => {
                copying.check(runs, &self.0.name)?;
                // SAFETY: as above.
                unsafe { self.lend_copy(at, runs, len, prot, site) }
            }
        }
    }

    /// As [`Device::lend`], of a copy: it is not copied again.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_copy(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(at, runs, len, prot, self.0.limits.address_mask, site) }
    }

    /// As [`Device::lend`], of coherent memory, which is never copied.
    ///
    /// # Errors
    ///
    /// Also where the memory is not in the restricted pool that is the device's only memory.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_coherent(
        &self,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        site: Site,
    ) -> Result<Loan, Error> {
        self.check_restricted(runs)?;
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(None, runs, len, prot, self.0.limits.coherent_mask, site) }
    }

    /// As [`Device::lend`], of what is not memory, which is never copied.
    ///
    /// # Errors
    ///
    /// Also where a restricted pool is the device's only memory.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    pub(crate) unsafe fn lend_peer(&self, runs: &[PhysRange], len: u64, prot: Prot, site: Site) -> Result<Loan, Error> {
        self.check_restricted(runs)?;
        // SAFETY: the caller's promise.
        unsafe { self.lend_below(None, runs, len, prot | Prot::MMIO, self.0.limits.address_mask, site) }
    }

    /// Refuses what is not in the pool that is the device's only memory, if it has one.
    fn check_restricted(&self, runs: &[PhysRange]) -> Result<(), Error> {
        match &self.0.backend {
            Backend::CopiedTranslated(_, copying) | Backend::CopiedDirect(_, copying)
                if matches!(copying, Copying::Foreign(_)) =>
            {
                copying.check(runs, &self.0.name)
            }
            _ => Ok(()),
        }
    }

    /// # Safety
    ///
    /// As [`Device::lend`].
    unsafe fn lend_below(
        &self,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        match self.way() {
            // SAFETY: the caller's promise.
            Way::Translated(translated) => unsafe { self.translate(translated, at, runs, len, prot, mask, site) },
            Way::Direct(direct) => self.pass(direct, at, runs, len, prot, mask, site),
        }
    }

    /// Lends through the IOMMU.
    ///
    /// # Safety
    ///
    /// As [`Device::lend`].
    #[inline(always)]
    #[expect(clippy::too_many_arguments, reason = "what a mapping is made of")]
    unsafe fn translate(
        &self,
        translated: &Translated,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        let snooped = self.0.coherent || prot.contains(Prot::MMIO);
        let prot = if snooped { prot } else { prot | Prot::NON_COHERENT };
        let Inner { limits, name, .. } = &*self.0;
        let (range, kind) = match at {
            // SAFETY: the caller's promise is what `map` asks for.
            None => (unsafe { translated.map(runs, len, prot, limits, mask, name) }?, Kind::Plain),
            Some(iova) => {
                let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
                // SAFETY: as above.
                unsafe { translated.map_at(range, runs, prot, mask, name) }?;
                (range, Kind::Fixed)
            }
        };
        let slot = self.0.records.begin(range, prot, site);
        Ok(self.loan(Segment { iova: range.start(), len }, slot, kind, site))
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
        if let Backend::CopiedTranslated(_, copying) = &self.0.backend {
            copying.check(runs, &self.0.name)?;
        }
        let prot = if self.0.coherent { prot } else { prot | Prot::NON_COHERENT };
        let range = IovaRange::new(iova, len).ok_or(Error::BadSize(len))?;
        // SAFETY: the caller's promise.
        unsafe { self.translated()?.map_reserved(range, runs, prot, &self.0.name) }?;
        let slot = self.0.records.begin(range, prot, site);
        Ok(self.loan(Segment { iova, len }, slot, Kind::Reserved, site))
    }

    /// Lends memory that no IOMMU translates for, and that is one segment.
    #[inline(always)]
    fn one(&self, segment: Segment, prot: Prot, site: Site) -> Loan {
        let slot = self.0.records.begin_direct(as_range(segment), prot, site);
        self.loan(segment, slot, Kind::Direct, site)
    }

    /// A loan as most are.
    #[inline(always)]
    fn loan(&self, whole: Segment, slot: Slot, kind: Kind, site: Site) -> Loan {
        Loan { device: self.clone(), whole, site, slot, kind, special: None }
    }

    /// Lends memory that no IOMMU translates for.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "what a mapping is made of")]
    fn pass(
        &self,
        direct: &Direct,
        at: Option<Iova>,
        runs: &[PhysRange],
        len: u64,
        prot: Prot,
        mask: u64,
        site: Site,
    ) -> Result<Loan, Error> {
        let Inner { limits, name, .. } = &*self.0;
        if at.is_some() {
            return Err(Error::NotIsolated(name.clone()));
        }
        let segments = direct.windows.segments(runs, mask, limits.min_align, name)?;
        let first = segments.as_slice().first().map(|segment| segment.iova).unwrap_or_default();
        let special = match segments {
            Segments::One(_) => None,
            Segments::Many(_) => Some(Special::new(segments)?),
        };
        let loan = self.one(Segment { iova: first, len }, prot, site);
        Ok(Loan { special, ..loan })
    }
}

impl Copying {
    /// What the policy demands.
    fn of(policy: &Policy) -> Option<Self> {
        match policy.bounce {
            Bounce::Never | Bounce::Needed(_) => None,
            Bounce::Always(_) => Some(Self::All),
            Bounce::Restricted(pool) => Some(Self::Foreign(pool)),
        }
    }

    /// Refuses memory that is to be copied.
    fn check(&self, runs: &[PhysRange], device: &Arc<str>) -> Result<(), Error> {
        let foreign = |run: &&PhysRange| match self {
            Self::All => true,
            Self::Foreign(pool) => !pool.covers(**run),
        };
        match runs.iter().find(foreign) {
            Some(run) => Err(Error::Unreachable { device: device.clone(), memory: *run }),
            None => Ok(()),
        }
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

/// The address side of a mapping: what the device was told. Small, because it moves with the memory. Ends by [`Loan::settle`] only;
/// forgetting it leaks.
pub struct Loan {
    pub(crate) device: Device,
    /// All of it, as one; [`Special`] has the rest to say, where there is more.
    whole: Segment,
    pub(crate) site: Site,
    slot: Slot,
    kind: Kind,
    special: Option<Box<[Special; 1]>>,
}

const _: () = assert!(size_of::<Loan>() == 48);

/// What most loans do not have.
struct Special {
    /// What the driver is told.
    segments: Segments,
    /// What the device has in place of the memory.
    copied: Option<Bounced>,
}

impl Special {
    fn new(segments: Segments) -> Result<Box<[Self; 1]>, Error> {
        let mut one = Vec::new();
        one.try_reserve_exact(1)?;
        one.push(Self { segments, copied: None });
        // It has the one element.
        one.into_boxed_slice().try_into().map_err(|_| Error::OutOfMemory)
    }
}

/// How an address range was had.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It was allocated.
    Plain,
    /// Its driver wanted it: it was reserved.
    Fixed,
    /// Somebody else reserved it.
    Reserved,
    /// It is where the memory is: nothing translates.
    Direct,
}

/// The addresses of a segment that a device was told.
#[inline(always)]
fn as_range(segment: Segment) -> IovaRange {
    // It was made from a range, or from a bus window, whose end is an address too.
    IovaRange::new(segment.iova, segment.len).unwrap_or_default()
}

impl Loan {
    /// The address range.
    #[inline(always)]
    pub(crate) fn range(&self) -> IovaRange {
        as_range(self.whole)
    }

    /// Where the address range begins.
    #[inline(always)]
    pub(crate) fn start(&self) -> Iova {
        self.whole.iova
    }

    /// What the driver is told.
    #[inline(always)]
    pub(crate) fn segments(&self) -> &[Segment] {
        match &self.special {
            None => core::slice::from_ref(&self.whole),
            Some(special) => special[0].segments.as_slice(),
        }
    }

    /// What the device has in place of the memory.
    #[inline(always)]
    pub(crate) fn copy(&self) -> Option<&Bounced> {
        self.special.as_ref().and_then(|special| special[0].copied.as_ref())
    }

    /// Takes the copy that was lent out.
    #[inline(always)]
    pub(crate) fn take_copy(&mut self) -> Option<Bounced> {
        self.special.as_mut().and_then(|special| special[0].copied.take())
    }

    /// Takes nothing over of what the device writes into a copy.
    pub(crate) fn discard_copy(&mut self) {
        if let Some(copied) = self.special.as_mut().and_then(|special| special[0].copied.as_mut()) {
            copied.discard();
        }
    }

    /// Room for what makes a loan special.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`].
    pub(crate) fn room() -> Result<Room, Error> {
        Special::new(Segments::default()).map(Room)
    }

    /// Names to the driver only the `len` bytes at `skip` of what was lent, and takes in the copy that was lent if it was one.
    pub(crate) fn narrow(&mut self, room: Room, skip: u64, len: u64, copied: Option<Bounced>) {
        let mut special = match self.special.take() {
            Some(special) => special,
            None => {
                let mut special = room.0;
                special[0].segments = Segments::One(self.whole);
                special
            }
        };
        special[0].segments.narrow(skip, len);
        special[0].copied = copied;
        self.special = Some(special);
    }

    /// The address space that it was made in; `None` where nothing translates.
    #[inline(always)]
    pub(crate) fn space(&self) -> Option<&dyn AddressSpace> {
        match self.kind {
            Kind::Direct => None,
            _ => self.device.translated_way().map(Translated::space),
        }
    }

    /// Revokes this loan alone.
    #[inline(always)]
    pub(crate) fn revoke(&self) -> Result<(), RevokeError> {
        self.space().map_or(Ok(()), |space| space.revoke(&[self.range()]))
    }

    /// Gives the address range back after a revocation of it that ended with `outcome`. Called once; after `Ok` the loan is dropped.
    ///
    /// # Errors
    ///
    /// That of the revocation: the device may reach the memory for ever. The address range is never used again, and the
    /// address space stays. Whoever lent a copy forgets the loan.
    #[inline(always)]
    pub(crate) fn settle(&mut self, outcome: Result<(), RevokeError>, site: Site) -> Result<(), RevokeError> {
        if let Err(cause) = outcome {
            self.lose();
            return Err(cause);
        }
        self.finish(site);
        Ok(())
    }

    #[inline(always)]
    fn finish(&self, site: Site) {
        let inner = &*self.device.0;
        if self.kind == Kind::Direct {
            inner.records.end_direct(self.slot, self.range(), self.site, site);
        } else if let Some(translated) = self.device.translated_way() {
            let range = self.range();
            inner.records.end(self.slot, range, self.site, site);
            match self.kind {
                Kind::Plain => translated.release(range),
                Kind::Fixed => translated.release_fixed(range),
                Kind::Reserved | Kind::Direct => (),
            }
        }
    }

    #[cold]
    fn lose(&self) {
        self.device.0.records.quarantined.fetch_add(self.whole.len / PAGE_SIZE, Ordering::Relaxed);
        core::mem::forget(self.device.clone());
    }
}

/// See [`Loan::room`].
pub(crate) struct Room(Box<[Special; 1]>);
